"""One equation, alone: operands of its own, its reference, and any launches of it to run.

A trial must neither read what another kernel has written nor leave anything behind.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from graphnet.ir.graph import Eqn, Graph, Value
from graphnet.ir.types import DTYPES
from graphnet.lowering.launch.codegen import Ref
from graphnet.lowering.launch.steps import Copy, Launch, Step
from graphnet.lowering.plan.memory import Slot, round_up
from graphnet.lowering.plan.plan import Plan
from graphnet.lowering.watch import disagreement, oracle
from graphnet.ops.round_tf32 import rounded

Buffer = Callable[[Ref], torch.Tensor]


@contextmanager
def mode(target: str) -> Iterator[None]:
    """The context in which launches of a target are called."""
    from graphnet.lowering.targets.interpret import MODE, interpreted

    with interpreted() if target == "interpret" else MODE:
        yield


class Alone:
    """An equation with operands of its own, its reference, and a way to run any launches of it."""

    def __init__(self, graph: Graph, eqn: Eqn, target: str, seed: int = 0) -> None:
        self.eqn, self.target = eqn, target
        self.module = importlib.import_module(f"graphnet.lowering.targets.{target}")
        self.device = torch.device("cuda" if target == "cuda" else "cpu")
        made = _Operands(graph, self.device, seed)
        self.operands = {v: made.of(v) for v in _integers_first(eqn.inputs)}
        # Operands of a product in TF32 come rounded, as the precision pass has it.
        for v in {v for e in eqn.plain for v in e.inputs[:2] if _math(e) == "tf32"}:
            if v in self.operands:
                self.operands[v] = rounded(self.operands[v])
        old = {new: before for before, new in graph.commits}
        self.old = {v: self.operands[old[v]] for v in eqn.results if old.get(v) in self.operands}
        self.want = oracle(eqn, self.operands)
        self.arena = torch.empty(0, dtype=torch.uint8, device=self.device)

    def plan(self, steps: Sequence[Step]) -> Plan:
        """A plan of these steps alone, every buffer in a place of its own, operands first."""
        types = {v.name: (v.type.dtype.name, v.type.layout.numel(v.type.shape))
                 for v in (*self.operands, *self.eqn.results)}  # fmt: skip
        program: list[Step] = []
        for s in steps:
            if isinstance(s, Launch):
                types |= {n: (_dtype(s, n), size // _itemsize(s, n)) for n, size in s.scratch}
                program += [Copy(a, b) for a, b in s.starts_as]
            program.append(s)
        arena, offset = {}, 0
        for name, (dtype, count) in types.items():
            size = DTYPES[dtype].itemsize * count
            arena[name] = Slot(offset, size)
            offset += round_up(size)
        return Plan(
            Graph(self.eqn.op, (), (), ()), self.target, tuple(program), arena=arena,
            arena_bytes=offset, types=types, streams=(0,) * len(program),
        )  # fmt: skip

    def prepare(self, steps: Sequence[Step]) -> tuple[Callable[[], None], Buffer]:
        """(run the steps once, buffer by reference)."""
        plan = self.plan(steps)
        if plan.arena_bytes > self.arena.numel():
            self.arena = torch.empty(plan.arena_bytes, dtype=torch.uint8, device=self.device)
        tensor = self.module.buffers(plan, {}, self.arena[: plan.arena_bytes])
        program = self.module.calls(plan, tensor)

        def run() -> None:
            for call in program:
                call()

        return run, tensor

    def fill(self, tensor: Buffer) -> None:
        """NaN everywhere, then the operands."""
        self.arena.fill_(0xFF)
        for v, value in self.operands.items():
            flat = tensor(Ref(v.name, v.type.dtype.name))
            flat.zero_()  # what pads a layout
            v.type.layout.write(value, flat)

    def verdict(self, run: Callable[[], None], tensor: Buffer) -> str | None:
        """Runs once over fresh buffers; how the results differ from the reference, or None."""
        self.fill(tensor)
        run()
        got = [
            None if v is None
            else v.type.layout.read(tensor(Ref(v.name, v.type.dtype.name)), v.type.shape)
            for v in self.eqn.outputs
        ]  # fmt: skip
        return disagreement(self.eqn, got, self.want, self.old)


def _math(e: Eqn) -> str:
    """How an equation forms products; empty where it forms none."""
    return getattr(e.attrs, "math", "")


def _dtype(launch: Launch, name: str) -> str:
    return next(r.dtype for r in launch.refs if r.name == name)


def _itemsize(launch: Launch, name: str) -> int:
    return DTYPES[_dtype(launch, name)].itemsize


def _integers_first(values: Sequence[Value]) -> list[Value]:
    """The integer operands first: the equations that make them also decide floating-point ones."""
    return sorted(dict.fromkeys(values), key=lambda v: v.type.dtype.torch.is_floating_point)


class _Operands:
    """Random operands that make sense: indices come from the equation that makes them."""

    def __init__(self, graph: Graph, device: torch.device, seed: int) -> None:
        self.graph, self.device = graph, device
        self.random = torch.Generator(device).manual_seed(seed)
        self.producers = graph.producers
        self.roles = {i.value: i.role for i in graph.inputs}
        self.made: dict[Value, torch.Tensor] = {}

    def of(self, v: Value) -> torch.Tensor:
        if v not in self.made:
            self._make(v)
        return self.made[v]

    def _make(self, v: Value) -> None:
        dtype, shape = v.type.dtype.torch, v.type.shape
        if not dtype.is_floating_point and v in self.producers:
            e = self.producers[v]
            args = {a: self.of(a) for a in _integers_first(e.inputs)}
            for r, value in zip(e.outputs, oracle(e, args), strict=True):
                if r is not None and value is not None:
                    self.made[r] = value.to(r.type.dtype.torch)
            return
        if dtype.is_floating_point:
            value = torch.randn(shape, generator=self.random, device=self.device)
            if shape == ():
                value = torch.tensor(0.1)  # a rate
            elif self.roles.get(v) in ("param", "derived") and len(shape) > 1:
                value /= (v.type.numel / shape[0]) ** 0.5
            elif self.roles.get(v) == "slot":
                value = value.abs()  # a second moment is not negative
        elif shape == ():
            rows = self.graph.input("x").value.type.shape[0]  # live rows, counters
            value = torch.tensor(2 * rows if v.name == "live_all" else rows)
        else:
            classes = self._classes(v)
            value = torch.randint(0, classes, shape, generator=self.random, device=self.device)
        self.made[v] = value.to(dtype).to(self.device)

    def _classes(self, labels: Value) -> int:
        sizes = []
        for e in self.graph.eqns:
            inner = e.body.input_values if e.body is not None else e.inputs
            names = {i for i, o in zip(inner, e.inputs, strict=True) if o == labels}
            sizes += [p.inputs[0].type.shape[-1] for p in e.plain if names & set(p.inputs)]
        return min(sizes, default=2)
