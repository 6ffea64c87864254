"""The cpu target: the fused graph as a flat list of calls into torch's own kernels, and a few in C.

It plans its own layouts (`cpu_conv`) and its own fusions: convolution with relu and pool, the
gradients of a convolution in one call, the loss with its gradient, all updates of one kind in one
call at the end. Everything else runs each op's `cpu` twin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphnet import config
from graphnet.ir.graph import Eqn, Graph, Value
from graphnet.lowering import watch
from graphnet.lowering.targets import (
    cpu_conv,
    cpu_dense,
    cpu_norm,
    cpu_ranks,
    cpu_thin,
    cpu_update,
)
from graphnet.lowering.targets.collectives import Group
from graphnet.lowering.targets.cpu_fold import Folded, folds
from graphnet.lowering.targets.cpu_norm import Around
from graphnet.lowering.targets.cpu_over import Readers, over
from graphnet.lowering.targets.cpu_record import allowed, record, sticky
from graphnet.lowering.targets.cpu_task import (
    Call,
    Env,
    Task,
    flatten,
    generic,
    in_order,
    symmetric,
)
from graphnet.ops.collective import exchanging
from graphnet.passes.autodiff import cotangent
from graphnet.passes.templates import is_update

Storage = dict[str, torch.Tensor]
_VIEWS = ("reshape", "slice", "relayout", "cast")
_COPIES = ("cast", "round_tf32")  # what a derived copy is made by
_LARGEST_KEPT = 31 << 20  # bytes: glibc's dynamic threshold stops at 32 MiB, its header included


class _Schedule:
    """The flat graph as tasks: `body` reads the old state, `tail` writes the new one in place.

    `rest` is the backward pass from cotangents of so many `results`. It may run several times
    behind one forward pass, so it writes over nothing that came before it.
    """

    def __init__(
        self, graph: Graph, storage: Storage, group: Group | None = None, results: int = 0
    ) -> None:
        self.graph, self.storage = graph, storage
        self.eqns = flatten(graph)
        self.escaping = graph.escaping
        self.readers: dict[Value, list[Eqn]] = {}
        for e in self.eqns:
            for v in dict.fromkeys(e.inputs):
                self.readers.setdefault(v, []).append(e)
        self.made = {v: e for e in self.eqns for v in e.results}
        self.late = _behind(self.eqns, graph, results)
        self.done: set[int] = set()
        self.twins: dict[tuple[Value, cpu_conv.Form], Value] = {}
        self.wide: dict[Value, Value] = {}
        self.fused: set[Value] = set()  # gradients that their update makes
        self.folded: list[Folded] = []
        self.flags: list[Task] = []  # what updates look at
        self.starts, waits = cpu_ranks.tasks_of(self.eqns, group)
        tail = self._tail()
        norms = cpu_norm.tasks_of(Around(self.eqns, self.made, self.read_by, self._spare))
        self.norms = {id(t.eqns[0]): self._add(t) for t in norms}
        body = [t for e in self.eqns for t in self._tasks(e)]
        self.body, self.rest, self.tail = [], [], tail
        for t in in_order(self.flags + body + waits, set(graph.input_values)):
            if self.late.isdisjoint(t.reads):
                self.body.append(t)
            else:
                self.rest.append(t)
                self.late.update(t.writes)  # twins in another layout, too

    def forget(self) -> None:
        """The next step folds normalizations into its weights again."""
        for f in self.folded:
            f.forget()

    def read_by(self, v: Value) -> list[Eqn]:
        """The readers of a value that stays inside the graph; none where it leaves it."""
        return [] if v in self.escaping else self.readers.get(v, [])

    def _spare(self, e: Eqn) -> Readers:
        """`read_by` for the operands that an equation may write over: in a backward pass that may
        run twice only what is made there."""
        late = not self.late.isdisjoint(e.results)
        return lambda v: self.read_by(v) if v in self.late or not late else []

    def _add(self, task: Task) -> Task:
        self.done.update(map(id, task.eqns))
        return task

    # ---- the end of the step ----------------------------------------------------------------

    def _tail(self) -> list[Task]:
        kinds: dict[tuple, list[cpu_update.Update]] = {}
        tasks, after = [], []
        targets = {new: old for old, new in self.graph.commits}
        for e in self.eqns:
            if is_update(e.op) and (u := self._in_place(e, targets)) is not None:
                kinds.setdefault(u.kind, []).append(u)
                after += [r for v, _ in u.new for r in self.readers.get(v, [])]
            elif e.op == "record_step" and self._commits(cpu_update.recorded(e), targets):
                self.flags += [allowed(e, self.storage)] if sticky(e) else []
                tasks.append(self._add(record(e, self.storage)))
        for kind in kinds.values():
            rest = []
            for u in kind:
                if (wgrad := self._wide_gradient(u.eqn)) is not None:
                    tasks.append(self._add(cpu_update.wide_updated(wgrad, u, self.storage)))
                else:
                    rest.append(u)
            tasks += [self._add(cpu_update.updated(rest, self.storage))] if rest else []
        return tasks + [self._add(generic(e)) for e in dict.fromkeys(after)]

    def _wide_gradient(self, update: Eqn) -> Eqn | None:
        """The linear_wgrad whose large result only this update reads: the two run together."""
        g = update.inputs[1]
        made = next((e for e in self.eqns if g in e.results), None)
        if made is None:  # the gradient is an input
            return None
        alone = made.op == "linear_wgrad" and self.read_by(g) == [update] and g == made.outputs[0]
        wide = g.type.numel >= cpu_update.WIDE and all(
            v.type.dtype.name == "f32" for v in (*made.inputs, g)
        )
        if not (alone and wide):
            return None
        self.fused.add(g)
        return made

    def _commits(self, pairs: list[tuple[Value, Value]], targets: dict[Value, Value]) -> bool:
        """Whether each value does nothing but replace the state that stands beside it."""
        return all(
            targets.get(v) == old
            and v not in self.graph.returns
            and old.type.layout.lies(self.storage[old.name])
            for v, old in pairs
        )

    def _guards(self, e: Eqn) -> tuple[Eqn, ...]:
        """The `if_finite` of each result of an update, where all of them have one."""
        found = [
            r
            for v, old in cpu_update.replaced(e)
            for r in self.read_by(v)
            if r.op == "if_finite" and r.inputs[:2] == (v, old)
        ]
        alike = len({g.inputs[2:] for g in found}) == 1
        return tuple(found) if alike and len(found) == len(e.results) else ()

    def _in_place(self, e: Eqn, targets: dict[Value, Value]) -> cpu_update.Update | None:
        """The update with its guards, where it can join the call at the end of the step."""
        update = cpu_update.Update(e, self._guards(e))
        if not self._commits(update.new, targets):
            return None
        inner = set(e.results) if update.guards else set()
        if any(len(self.readers[v]) > 1 for v in inner):
            return None
        # Only the derived copy may read the new parameter, behind the update.
        copies = all(
            r.op in _COPIES and r.out in targets and not self.readers.get(r.out)
            for v, _ in update.new
            for r in self.readers.get(v, [])
        )
        state = update.state(self.storage)
        return update if copies and all(t.dtype == torch.float32 for t in state) else None

    # ---- the rest ---------------------------------------------------------------------------

    def _tasks(self, e: Eqn) -> list[Task]:
        if id(e) in self.norms:
            return [self.norms[id(e)]]
        if id(e) in self.done:
            return []
        return [self._add(t) for t in self._choose(e)]

    def _choose(self, e: Eqn) -> list[Task]:
        if id(e) in self.starts:
            return [self.starts[id(e)]]
        if e.op == "conv2d" and symmetric(e.attrs):
            return self._conv(e)
        if e.op in ("conv2d_wgrad", "conv2d_dgrad") and symmetric(e.attrs):
            return self._gradients(e)
        if e.op == "linear_wgrad" and (e.outputs[0] is None or e.outputs[0] in self.fused):
            return [cpu_update.bias_gradient(e)] if e.outputs[1] is not None else []
        if e.op == "linear" and (relu := self._alone_behind(e, "relu")) is not None:
            return [cpu_dense.linear_relu(e, relu)]
        if e.op == "maxpool2d" and e.attrs.torchs:  # type: ignore[attr-defined]
            idx = e.outputs[1]
            if idx is None:
                return [cpu_conv.maxpool(e, None)]
            if idx not in self.escaping and self._only(idx, "maxpool2d_grad"):
                self.wide[idx] = Value(f".wide.{idx.name}", idx.type)
                return [cpu_conv.maxpool(e, self.wide[idx])]
        if e.op == "maxpool2d_grad" and e.inputs[1] in self.wide:
            return [cpu_conv.maxpool_grad(e, self.wide[e.inputs[1]])]
        if e.op == "cross_entropy":
            pair = [t for t in self.readers[e.inputs[0]] if t.op == "cross_entropy_grad"]
            if len(pair) == 1 and (pair[0].inputs, pair[0].attrs) == (e.inputs, e.attrs):
                return [cpu_dense.cross_entropy(e, pair[0])]
        return [over(e, self.made, self._spare(e)) or generic(e)]

    def _only(self, v: Value, op: str) -> bool:
        return all(r.op == op for r in self.readers.get(v, []))

    def _twin(self, v: Value, tasks: list[Task], e: Eqn) -> Value:
        """The twin of a value in the layout that the convolution wants, made when first asked."""
        form = cpu_conv.form_of(e.attrs)
        if (v, form) not in self.twins:
            twin = Value(f".laid{len(self.twins)}.{v.name}", v.type)
            self.twins[v, form] = twin
            tasks.append(cpu_conv.relay(v, twin, form))
        return self.twins[v, form]

    def _conv(self, e: Eqn) -> list[Task]:
        pooled = cpu_thin.pooled_conv(e, self.read_by)
        if pooled is not None:
            return [pooled.forward(), *(pooled.backward(g, w) for g, w in pooled.grads)]
        norm = self._alone_behind(e, "normalize")
        folded = Folded(e, norm) if norm is not None and folds(e, norm, self.graph) else None
        self.folded += [folded] if folded else []
        tasks: list[Task] = []
        x = self._twin(e.inputs[0], tasks, e)
        relu = self._alone_behind(folded.norm if folded else e, "relu")
        return [*tasks, cpu_conv.conv(e, relu, x, folded)]

    def _alone_behind(self, e: Eqn, op: str) -> Eqn | None:
        """The only reader of a result, where it is of that op."""
        behind = self.read_by(e.out)
        return behind[0] if len(behind) == 1 and behind[0].op == op else None

    def _gradients(self, e: Eqn) -> list[Task]:
        """The gradients of one convolution, together where that is faster."""
        wgrad: Eqn | None
        dgrad: Eqn | None
        if e.op == "conv2d_dgrad":
            wgrad, dgrad = self._partner(e, e.inputs[0], "conv2d_wgrad", 1), e
        else:
            wgrad, dgrad = e, self._partner(e, e.inputs[1], "conv2d_dgrad", 0)
        if dgrad is not None and wgrad is not None:
            fits = dgrad.out.type.shape == wgrad.inputs[0].type.shape
            if not fits or cpu_conv.splits(dgrad):
                wgrad, dgrad = (wgrad, None) if e is wgrad else (None, dgrad)
        if wgrad is None:
            assert dgrad is not None
            if not cpu_conv.splits(dgrad):
                return [generic(dgrad)]
            thin = cpu_thin.runs_input_gradient(dgrad)
            return [cpu_thin.input_gradient(dgrad) if thin else cpu_conv.conv_dgrad(dgrad)]
        tasks: list[Task] = []
        x, dy = (self._twin(v, tasks, wgrad) for v in wgrad.inputs)
        return [*tasks, cpu_conv.conv_backward(wgrad, dgrad, x, dy)]

    def _partner(self, e: Eqn, dy: Value, op: str, at: int) -> Eqn | None:
        found = [
            t
            for t in self.readers[dy]
            if t.op == op and t.inputs[at] == dy and id(t) not in self.done
            and t.attrs.base() == e.attrs.base()  # type: ignore[attr-defined]
        ]  # fmt: skip
        return found[0] if len(found) == 1 else None


def _behind(eqns: list[Eqn], graph: Graph, results: int) -> set[Value]:
    """The cotangents of so many results, and all values that depend on them."""
    given = {cotangent(k) for k in range(results)}
    out = {v for v in graph.input_values if v.name in given}
    for e in eqns:
        if not out.isdisjoint(e.inputs):
            out.update(e.results)
    return out


def _views(graph: Graph) -> set[Value]:
    """Values that may share memory with an input."""
    out = set(graph.input_values)
    for e in graph.eqns:
        if e.op in _VIEWS and e.inputs[0] in out:
            out.add(e.out)
    return out


def prepare(
    plan: Any, storage: Storage, *, around: Callable[[Task, Call], Call] = lambda task, call: call,
    group: Group | None = None, results: int | None = None,
) -> Callable[[], None]:  # fmt: skip
    """The step as a callable over fixed storage, by name of input and of returned value.

    around   is given each task with its call and returns what is called instead: to time it
    group    the processes that take part, where there are several
    results  of a graph that takes cotangents: how many returned values the forward pass has. Then
             the callable runs that, and its method `rest` the backward pass of its latest call
    It reads `plan.graph` only. Calling it runs one step: returned values are copied to their
    storage, then committed state is replaced. Gradients are off while it runs. Where it keeps
    weights that are made of others, it has a method `forget`.
    """
    graph: Graph = plan.graph
    _keep_freed_memory()
    schedule = _Schedule(graph, storage, group, results or 0)
    slots: dict[Value, int] = {}

    def slot(v: Value) -> int:
        return slots.setdefault(v, len(slots))

    fixed = [(slot(i.value), storage[i.value.name]) for i in graph.inputs]
    tasks = schedule.body + schedule.rest + schedule.tail
    calls = [around(t, watch.timed_task(t, t.make(slot))) for t in tasks]
    placed = {v for t in schedule.tail for e in t.eqns if e.op not in _COPIES for v in e.results}
    shared = _views(graph)
    returns = [(storage[v.name], slot(v)) for v in graph.returns]
    # What may be a view of the state is copied before the state changes.
    early = [slot(new) for _, new in graph.commits if new in shared]
    early += [slot(old) for old, _ in graph.commits if any(old in t.reads for t in schedule.rest)]
    commits = [(storage[old.name], slot(new)) for old, new in graph.commits if new not in placed]
    keep = {at for _, at in (*commits, *returns)} | {at for at, _ in fixed}
    drops = _last_uses(tasks, slots, keep)
    program = list(zip(calls, drops, strict=True))
    first, last = len(schedule.body), len(tasks) - len(schedule.tail)
    body, rest, tail = program[:first], program[first:last], calls[last:]
    blank: Env = [None] * len(slots)
    for at, tensor in fixed:
        blank[at] = tensor
    latest: Env = []  # what the forward pass leaves

    def perform(env: Env, program: list[tuple[Call, list[int]]], returns: list[Any]) -> None:
        for call, dead in program:
            call(env)
            for at in dead:  # freed as the step goes, so that its memory is still in cache
                env[at] = None
        for tensor, at in returns:
            if env[at] is not tensor:
                tensor.copy_(env[at])

    @torch.no_grad()
    def run() -> None:
        latest.clear()
        env = blank.copy()
        perform(env, body, returns[:results])
        for at in early:
            env[at] = env[at].clone()
        for call in tail:
            call(env)
        for tensor, at in commits:
            tensor.copy_(env[at])
        if rest:
            latest.extend(env)

    @torch.no_grad()
    def backward() -> None:
        perform(latest.copy(), rest, returns[results:])

    step = run
    if config.check():
        step = _checked(graph, storage, run, group)
    if schedule.folded:
        step.forget = schedule.forget  # type: ignore[attr-defined]
    if results is not None:
        step.rest = backward  # type: ignore[attr-defined]
    return step


def _checked(
    graph: Graph, storage: Storage, run: Callable[[], None], group: Group | None
) -> Callable[[], None]:
    """The step with every value compared, among ranks where there are several."""
    checked = watch.check_step(graph, storage, run)
    if group is None:
        return checked

    def among() -> None:
        with exchanging(group.gather, group.rank):
            checked()

    return among


def _keep_freed_memory() -> None:
    """Lets malloc reuse what a step frees, up to 31 MiB a block, in place of asking the kernel.

    glibc gets a large block from the kernel and returns it there when it is freed. A step that
    allocates it anew pays a page fault for each 4 kB: LeNet-5 at batch 128 takes 2,000 of them,
    8.1 in place of 4.8 ms, or none at all, as the blocks that were freed before happen to be.
    When glibc frees such a block it raises its threshold to the size of that block (`man mallopt`,
    M_MMAP_THRESHOLD). The memory of this one is never touched, so it costs nothing. Where another
    allocator is at work this does nothing.
    """
    torch.empty(_LARGEST_KEPT, dtype=torch.uint8)


def _last_uses(tasks: list[Task], slots: dict[Value, int], keep: set[int]) -> list[list[int]]:
    """Per task the places whose value nobody reads any more."""
    last: dict[int, int] = {}
    for k, t in enumerate(tasks):
        last.update((slots[v], k) for v in (*t.reads, *t.writes) if v in slots)
    out: list[list[int]] = [[] for _ in tasks]
    for at, k in last.items():
        if at not in keep:
            out[k].append(at)
    return out
