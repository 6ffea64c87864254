"""The plan: steps with their order, and where every value lies. Made once, before allocation.

Values get buffers: a view shares its source's; what leaves the graph lies in its own storage; a
committed result is written straight over the state where every reader of the old value can run
before, else it is copied there at the end; everything else lies in the arena.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from graphnet.errors import GraphError
from graphnet.ir.graph import Eqn, Graph, Value
from graphnet.ir.types import DTYPES, TensorType
from graphnet.lowering.launch.choice import Kernels
from graphnet.lowering.launch.equation import launches
from graphnet.lowering.launch.moves import is_view, run_move
from graphnet.lowering.launch.registry import kernels_for
from graphnet.lowering.launch.steps import Collective, Copy, Launch, Step, Table
from graphnet.lowering.plan.buckets import bucketed, opened
from graphnet.lowering.plan.groups import grouped
from graphnet.lowering.plan.memory import Life, Slot, assign, overlaid, reachability
from graphnet.lowering.plan.schedule import chained, memory_order, program_order, streams_of


@dataclass(frozen=True)
class Plan:
    """A lowered graph.

    steps     in an order that keeps all `edges`
    edges     (step, later step): data, reads before the value is overwritten, and the order of
              each stream
    streams   the stream of each step; what two streams hold may run at once
    storage   buffer to the graph input or returned value whose storage it is
    arena     buffer to its place; `types` gives element type and stored count of every buffer
    alone     small launches that are in no group, and why
    """

    graph: Graph
    target: str
    steps: tuple[Step, ...] = ()
    edges: tuple[tuple[int, int], ...] = ()
    storage: dict[str, str] = field(default_factory=dict)
    arena: dict[str, Slot] = field(default_factory=dict)
    arena_bytes: int = 0
    types: dict[str, tuple[str, int]] = field(default_factory=dict)
    streams: tuple[int, ...] = ()
    alone: tuple[tuple[Launch, str], ...] = ()

    @property
    def collectives(self) -> tuple[Collective, ...]:
        return tuple(s for s in self.steps if isinstance(s, Collective))

    @property
    def launches(self) -> tuple[Launch, ...]:
        return tuple(s for s in self.steps if isinstance(s, Launch))

    @property
    def parts(self) -> tuple[Launch, ...]:
        """The launches, groups by their members."""
        return tuple(m for s in self.launches for m in s.parts)

    @cached_property
    def tables(self) -> tuple[Table, ...]:
        """The constant buffers that launches read, each once."""
        return tuple(dict.fromkeys(t for s in self.launches for t in s.tables))

    @property
    def state_bytes(self) -> int:
        """Everything that outlives a step: parameters, slots, counters, derived copies, tables."""
        kept = (i.value.type.bytes for i in self.graph.inputs if i.role not in ("data", "hyper"))
        return sum(kept) + sum(4 * len(t.values) for t in self.tables)

    @property
    def io_bytes(self) -> int:
        """Inputs, hyper-parameters and returned values."""
        inputs = sum(i.value.type.bytes for i in self.graph.inputs if i.role in ("data", "hyper"))
        own = set(self.graph.input_values)
        return inputs + sum(v.type.bytes for v in set(self.graph.returns) - own)

    @cached_property
    def peak_bytes(self) -> int:
        """Device memory of a step: state, inputs, outputs, and the arena with its workspaces."""
        return self.state_bytes + self.io_bytes + self.arena_bytes

    def largest_batch(self, memory: float) -> int:
        """A batch whose step fits in `memory` bytes, by this plan's bytes for each row; 0 where
        the state alone does not fit. Larger plans take less for each row, so it is no upper limit.
        """
        rows = next((i.value.type.shape[0] for i in self.graph.inputs if i.role == "data"), 1)
        each = (self.io_bytes + self.arena_bytes) / rows
        return max(0, int((memory - self.state_bytes) / each))

    def largest(self, count: int = 5) -> list[tuple[str, int]]:
        """(name, bytes) of the largest tensors, state included; a value's name says whose it is."""
        made = {v.name: ", ".join(e.where.layers) for e in self.graph.eqns for v in e.results}
        of = {n: f"%{n} of {layers}" for n, layers in made.items() if layers}
        sizes = {of.get(n, n): s.size for n, s in self.arena.items()}
        sizes |= {i.value.name: i.value.type.bytes for i in self.graph.inputs}
        return sorted(sizes.items(), key=lambda p: (-p[1], p[0]))[:count]

    def __str__(self) -> str:
        lines = [f"plan {self.graph.name}: {len(self.steps)} steps, arena {self.arena_bytes} B"]
        beside = {0: "", 1: "  | "}
        pairs = enumerate(zip(self.steps, self.streams, strict=True))
        lines += [f"  {k:3}  {beside[n]}{s}" for k, (s, n) in pairs]
        lines += [f"  {n}: {s.offset}..{s.end}" for n, s in sorted(self.arena.items())]
        return "\n".join(lines) + "\n"


class _Planner:
    """Gives each SSA value a buffer; which buffers share memory is decided after the steps."""

    def __init__(self, graph: Graph, kernels: Kernels) -> None:
        self.graph, self.kernels = graph, kernels
        self.alias: dict[Value, Value] = {}
        self.types: dict[str, TensorType] = {}
        self.steps: list[Step] = []
        self.place: dict[str, str] = {}  # buffer to the state buffer that it is written over
        self.inputs = {i.value.name for i in graph.inputs}
        for i in graph.inputs:
            self.types[i.value.name] = i.value.type
        for e in graph.eqns:
            self._eqn(e)

    def root(self, v: Value) -> str:
        while v in self.alias:
            v = self.alias[v]
        return v.name

    def _eqn(self, e: Eqn) -> None:
        if is_view(e):
            self.alias[e.out] = e.inputs[0]
            return
        if e.op == "all_reduce":
            self._in_place(e)
        for v in e.results:
            self.types[self.root(v)] = v.type
        made = launches(e, self.root, self.kernels)
        for s in made:
            if isinstance(s, Launch):
                self.types |= _scratch(s)
        self.steps += made

    def _in_place(self, e: Eqn) -> None:
        """A sum over ranks stands where its operand stood, where no equation behind reads that."""
        for v, out in zip(e.inputs, e.outputs, strict=True):
            alone = v not in self.alias and list(self.graph.readers[v]) == [e]
            free = v.name not in self.inputs and v not in self.graph.escaping
            if out is not None and alone and free and v.type == out.type:
                self.alias[out] = v

    # ---- what leaves the graph --------------------------------------------------------------

    def leave(self) -> dict[str, str]:
        """Gives returned and committed values their storage; adds copies where they need one."""
        storage = {name: name for name in self.inputs}
        committed = {old.name for old, _ in self.graph.commits}
        travels = {n for s in self.steps if isinstance(s, Collective) and len(s.outs) > 1
                   for n in s.writes}  # in one message, so it lies with the others
        keeps: list[Step] = []  # before any state is replaced
        ends: list[Step] = []
        for v in dict.fromkeys(self.graph.returns):
            root = self.root(v)
            if v.name in self.inputs:
                continue
            if root in storage or root in travels or not self._same(root, v):
                self.types[v.name] = v.type
                storage[v.name] = v.name
                ends += self._moved(root, v.name)
            else:
                storage[root] = v.name
        for old, new in self.graph.commits:
            root = self.root(new)
            if root == old.name:
                continue
            if self.types[root].layout != old.type.layout:
                root = self._relaid(root, old)
            if root in committed:  # state that another commit replaces: keep the old value
                kept = f".old.{root}.{old.name}"
                self.types[kept] = new.type
                keeps.append(Copy(root, kept))
                root = kept
            elif root not in storage and self._same(root, old) and self._over(root, old.name):
                self.place[root] = old.name
                storage[root] = old.name
                continue
            elif old.type.layout.s2d:  # its padding holds zeros that no kernel writes
                raise GraphError(f"{old}: {old.type} cannot be replaced in place")
            ends.append(Copy(root, old.name))
        self.steps += keeps + ends
        self._start()
        return storage

    def _same(self, root: str, v: Value) -> bool:
        """Whether the buffer can be the storage of `v`: in its layout, of its type."""
        a, b = self.types[root], v.type
        alike = a.layout == b.layout and (a.layout.is_default or a.shape == b.shape)
        return alike and (a.dtype, a.numel) == (b.dtype, b.numel)

    def _relaid(self, root: str, state: Value) -> str:
        """A buffer with the value of another, in the layout of the state that it will replace."""
        source, laid = Value(root, self.types[root]), Value(f".laid.{state.name}", state.type)
        self.types[laid.name] = laid.type
        self.steps += run_move(Eqn("relayout", (source,), (laid,)), lambda v: v.name)
        return laid.name

    def _moved(self, root: str, name: str) -> list[Step]:
        if not self.types[root].layout.is_default:
            raise GraphError(f"%{name} leaves the graph in the layout {self.types[root].layout}")
        return [Copy(root, name)]

    def _over(self, new: str, old: str) -> bool:
        """Whether `new` can be written over `old`: all others read the old value before."""
        writers = [k for k, s in enumerate(self.steps) if new in s.writes]
        for k in writers:
            s = self.steps[k]
            pairs = (*s.inplace, *s.starts_as) if isinstance(s, Launch) else ()
            if old in s.reads and (old, new) not in pairs:
                return False
        trial = {**self.place, new: old}
        return program_order(len(self.steps), _edges(self.steps, trial)) is not None

    def _start(self) -> None:
        """Copies for kernels that work in place, where the result lies elsewhere."""
        out: list[Step] = []
        for s in self.steps:
            if isinstance(s, Launch):
                out += [Copy(o, n) for o, n in s.starts_as if self.place.get(n) != o]
            out.append(s)
        self.steps = out


def _scratch(s: Launch) -> dict[str, TensorType]:
    """The private buffers of a launch, typed as its pointers to them are."""
    dtypes = {r.name: DTYPES[r.dtype] for r in s.refs}
    return {
        name: TensorType(dtypes[name], (size // dtypes[name].itemsize,)) for name, size in s.scratch
    }


def _edges(steps: Sequence[Step], place: dict[str, str]) -> set[tuple[int, int]]:
    """Data edges, writes of one buffer in order, and reads of state before it is overwritten."""
    writers: dict[str, list[int]] = {}
    readers: dict[str, list[int]] = {}
    for k, s in enumerate(steps):
        for name in s.writes:
            writers.setdefault(name, []).append(k)
        for name in s.reads:
            readers.setdefault(name, []).append(k)
    edges: set[tuple[int, int]] = set()
    replaced = set(place.values())
    for name, made in writers.items():
        edges.update(zip(made, made[1:], strict=False))
        if name not in replaced:
            # What is read between two writes is read there: before a sum over ranks that takes
            # its operand's place, before a copy that ends the life of an input.
            pairs = ((k, r) for k in made for r in readers.get(name, ()) if k != r)
            edges.update((min(p), max(p)) for p in pairs)
    together = [k for k, s in enumerate(steps) if isinstance(s, Collective)]
    edges.update(zip(together, together[1:], strict=False))
    for new, old in place.items():
        for w in writers[new]:
            edges.update((r, w) for r in readers.get(old, ()) if r != w)
    return edges


def make_plan(graph: Graph, target: str, kernels: Kernels | None = None) -> Plan:
    """The plan of a fused graph. The cpu target reads the graph only and plans its own memory.

    kernels  what decides between variants; by default the rules
    """
    if target == "cpu":
        return Plan(graph, target)
    planner = _Planner(graph, kernels or kernels_for(target))
    storage = planner.leave()
    program = planner.steps
    edges = _edges(program, planner.place)
    if program_order(len(program), edges) is None:
        raise GraphError(f"the steps of {graph.name} depend on each other in a circle")
    program, edges, alone = grouped(program, edges)
    sizes = {n: t.bytes for n, t in planner.types.items() if n not in storage}
    order = memory_order(program, edges, sizes)
    at = {k: n for n, k in enumerate(order)}
    steps = tuple(program[k] for k in order)
    moved = {(at[a], at[b]) for a, b in edges}
    streams = streams_of(steps, moved)
    ordered = tuple(sorted(chained(streams, moved)))
    lives: dict[str, Life] = {}
    for name, type in planner.types.items():
        if name in storage:
            continue
        writers = tuple(k for k, s in enumerate(steps) if name in s.writes)
        readers = tuple(k for k, s in enumerate(steps) if name in s.reads)
        lives[name] = Life(type.bytes, writers, readers)
    steps, lives, buckets = bucketed(steps, lives)
    reach = reachability(len(steps), ordered)
    pairs = [
        (k, old, new)
        for k, s in enumerate(steps)
        if isinstance(s, Launch)
        for old, new in s.inplace
        if planner.types[old] == planner.types[new]
    ]
    merged, home = overlaid(lives, pairs, reach)
    arena, size = assign(merged, reach)
    arena |= {new: arena[old] for new, old in home.items()}
    arena |= opened(buckets, arena)
    types = {
        n: (t.dtype.name, t.layout.numel(t.shape)) for n, t in planner.types.items()
    }  # fmt: skip
    for c in steps:
        if isinstance(c, Collective) and c.bucket:
            types[c.bucket] = c.dtype.name, arena[c.bucket].size // c.dtype.itemsize
    return Plan(graph, target, steps, ordered, storage, arena, size, types, streams, alone)
