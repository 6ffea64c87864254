"""The cpu target: the fused graph as a flat list of calls into torch's own kernels.

It plans its own layouts (channels-last for the convolutional part) and its own fusions:
convolution with relu, the three gradients of a convolution in one call, all updates of one kind
in one call. Everything else runs each op's `cpu` twin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphnet.ir.graph import Eqn, Graph, Value
from graphnet.ir.op import get_op
from graphnet.ops.conv2d import ConvAttrs

Env = list[Any]
Call = Callable[[Env], None]


@dataclass
class Task:
    """One call: what it reads and writes, so that values can be dropped after their last use.

    in_place says that its results already stand where the graph commits them.
    """

    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    make: Callable[[Callable[[Value], int]], Call]
    eqns: tuple[Eqn, ...] = ()
    in_place: bool = False


def _flatten(graph: Graph) -> list[Eqn]:
    """Bodies inlined, every value under a name of its own."""
    out: list[Eqn] = []
    for at, eqn in enumerate(graph.eqns):
        if eqn.body is None:
            out.append(eqn)
            continue
        env = dict(zip(eqn.body.input_values, eqn.inputs, strict=True))
        env.update(zip(eqn.body.returns, eqn.results, strict=True))
        for k, e in enumerate(eqn.body.eqns):
            for j, v in enumerate(e.outputs):
                if v is not None and v not in env:
                    env[v] = Value(f".{at}.{k}.{j}", v.type)
            outs = tuple(None if v is None else env[v] for v in e.outputs)
            out.append(Eqn(e.op, tuple(env[v] for v in e.inputs), outs, e.attrs, None, eqn.where))
    return out


def _generic(eqn: Eqn) -> Task:
    fn, attrs = get_op(eqn.op).cpu, eqn.attrs

    def make(slot: Callable[[Value], int]) -> Call:
        ins = [slot(v) for v in eqn.inputs]
        outs = [None if v is None else slot(v) for v in eqn.outputs]

        def call(env: Env) -> None:
            for at, value in zip(outs, fn(attrs, *[env[i] for i in ins]), strict=False):
                if at is not None:
                    env[at] = value

        return call

    return Task(eqn.inputs, eqn.results, make, (eqn,))


def _symmetric(attrs: ConvAttrs) -> bool:
    return attrs.padding[0] == attrs.padding[1] and attrs.padding[2] == attrs.padding[3]


def _last(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _conv(eqn: Eqn, relu: Eqn | None) -> Task:
    """Convolution, channels-last, with the relu behind it in the same oneDNN primitive."""
    attrs: ConvAttrs = eqn.attrs  # type: ignore[assignment]
    pad = [attrs.padding[0], attrs.padding[2]]
    stride, dilation = list(attrs.stride), list(attrs.dilation)
    out = (relu or eqn).out
    pointwise = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    fp32 = all(v.type.dtype.name == "f32" for v in (*eqn.inputs, out))
    fused = relu is not None and pointwise is not None and fp32

    def make(slot: Callable[[Value], int]) -> Call:
        ins, at = [slot(v) for v in eqn.inputs], slot(out)

        def call(env: Env) -> None:
            x, w, *rest = (env[i] for i in ins)
            b = rest[0].to(x.dtype) if rest else None
            w = _last(w)
            if fused:
                y = pointwise(_last(x), w, b, pad, stride, dilation, attrs.groups, "relu", [], "")
            else:
                y = torch.conv2d(_last(x), w, b, stride, pad, dilation, attrs.groups)
                y = y.relu_() if relu is not None else y
            env[at] = y if y.dtype == out.type.dtype.torch else y.to(out.type.dtype.torch)

        return call

    return Task(eqn.inputs, (out,), make, (eqn,) if relu is None else (eqn, relu))


def _linear_relu(eqn: Eqn, relu: Eqn) -> Task:
    def make(slot: Callable[[Value], int]) -> Call:
        ins, at = [slot(v) for v in eqn.inputs], slot(relu.out)

        def call(env: Env) -> None:
            x, w, *rest = (env[i] for i in ins)
            bias = rest[0].to(x.dtype) if rest else None
            env[at] = torch.nn.functional.linear(x, w, bias).relu_()

        return call

    return Task(eqn.inputs, (relu.out,), make, (eqn, relu))


def _conv_backward(wgrad: Eqn, dgrad: Eqn | None) -> Task:
    """All gradients of one convolution in one call, which shares the reordering of dy."""
    attrs: Any = wgrad.attrs
    x, dy = wgrad.inputs
    w = dgrad.inputs[1] if dgrad is not None else None
    dw, db = wgrad.outputs
    dx = dgrad.out if dgrad is not None else None
    pad = [attrs.padding[0], attrs.padding[2]]
    mask = [dx is not None, dw is not None, db is not None]
    shape = (dy.type.shape[1], x.type.shape[1] // attrs.groups, *attrs.kernel)
    # Without a dgrad only the weight's shape matters.
    blank = torch.empty(shape, dtype=x.type.dtype.torch).to(memory_format=torch.channels_last)
    outs = [v for v in (dx, dw, db) if v is not None]

    def make(slot: Callable[[Value], int]) -> Call:
        at = [None if v is None else slot(v) for v in (dx, dw, db)]
        ix, idy, iw = slot(x), slot(dy), None if w is None else slot(w)

        def call(env: Env) -> None:
            weight = blank if iw is None else _last(env[iw])
            got = torch.ops.aten.convolution_backward(
                _last(env[idy]), _last(env[ix]), weight, [shape[0]], list(attrs.stride), pad,
                list(attrs.dilation), False, [0, 0], attrs.groups, mask,
            )  # fmt: skip
            for k, value in zip(at, got, strict=True):
                if k is not None:
                    env[k] = value.float() if k != at[0] else value

        return call

    reads = (x, dy) if w is None else (x, dy, w)
    eqns = (wgrad,) if dgrad is None else (wgrad, dgrad)
    return Task(reads, tuple(outs), make, eqns)


def _maxpool(eqn: Eqn, wide: dict[Value, Value]) -> Task | None:
    """torch's max-pool, keeping its int64 index beside the IR's byte, which nobody else reads."""
    attrs: Any = eqn.attrs
    t, b, le, r = attrs.padding
    if (t, le) != (b, r):
        return None
    x, idx = eqn.inputs[0], eqn.outputs[1]

    def make(slot: Callable[[Value], int]) -> Call:
        ix, iy = slot(x), slot(eqn.out)
        ii = slot(wide[idx]) if idx is not None else None

        def call(env: Env) -> None:
            y, index = torch.ops.aten.max_pool2d_with_indices(
                env[ix], attrs.kernel, attrs.stride, (t, le), attrs.dilation, attrs.ceil_mode
            )
            env[iy] = y
            if ii is not None:
                env[ii] = index

        return call

    writes = (eqn.out,) if idx is None else (eqn.out, wide[idx])
    return Task((x,), writes, make, (eqn,))


def _maxpool_grad(eqn: Eqn, wide: dict[Value, Value]) -> Task:
    attrs: Any = eqn.attrs
    dy, idx = eqn.inputs
    like = torch.empty(eqn.out.type.shape, dtype=dy.type.dtype.torch)
    like = like.to(memory_format=torch.channels_last)
    pad = [attrs.padding[0], attrs.padding[2]]

    def make(slot: Callable[[Value], int]) -> Call:
        idy, ii, at = slot(dy), slot(wide[idx]), slot(eqn.out)

        def call(env: Env) -> None:
            env[at] = torch.ops.aten.max_pool2d_with_indices_backward(
                _last(env[idy]), like, attrs.kernel, attrs.stride, pad, attrs.dilation,
                attrs.ceil_mode, env[ii],
            )  # fmt: skip

        return call

    return Task((dy, wide[idx]), (eqn.out,), make, (eqn,))


def _cross_entropy(loss: Eqn, grad: Eqn) -> Task:
    """The loss and its gradient from one log-softmax."""
    smoothing = loss.attrs.label_smoothing  # type: ignore[attr-defined]

    def make(slot: Callable[[Value], int]) -> Call:
        iz, il, iv = (slot(v) for v in loss.inputs)
        ol, og = slot(loss.out), slot(grad.out)

        def call(env: Env) -> None:
            z, labels, live = env[iz], env[il], int(env[iv])
            n, classes = z.shape
            logp = torch.log_softmax(z[:live], 1)
            hit = labels[:live, None]
            rows = logp.gather(1, hit).mul_(smoothing - 1.0)
            if smoothing:
                rows -= logp.sum(1, keepdim=True) * (smoothing / classes)
            env[ol] = rows.sum() / live
            g = logp.exp_()
            if smoothing:
                g -= smoothing / classes
            g.scatter_add_(1, hit, g.new_full((1, 1), smoothing - 1.0).expand(live, 1))
            g /= live
            if live < n:
                full = z.new_zeros(n, classes)
                full[:live] = g
                g = full
            env[og] = g

        return call

    return Task(loss.inputs, (loss.out, grad.out), make, (loss, grad))


def _sgd(updates: Sequence[Eqn], storage: dict[str, torch.Tensor]) -> Task:
    """All plain torch-form updates in one call, in place on the state."""
    attrs: Any = updates[0].attrs
    hypers = updates[0].inputs[-(3 if attrs.momentum else 2) :]
    lr, wd = hypers[0], hypers[-1]
    mom = hypers[1] if attrs.momentum else None
    params = [storage[e.inputs[0].name] for e in updates]
    slots = [storage[e.inputs[2].name] for e in updates] if attrs.momentum else []
    grads = [e.inputs[1] for e in updates]
    hyper_reads = tuple(dict.fromkeys(v for v in (lr, mom, wd) if v is not None))

    def make(slot: Callable[[Value], int]) -> Call:
        ig = [slot(g) for g in grads]
        ilr, iwd, imom = slot(lr), slot(wd), None if mom is None else slot(mom)

        def call(env: Env) -> None:
            momentum = 0.0 if imom is None else float(env[imom])
            torch._fused_sgd_(
                params,
                # The kernel walks storage: a gradient must lie as its parameter does.
                [env[i].contiguous() for i in ig],
                slots,
                weight_decay=float(env[iwd]), momentum=momentum, lr=float(env[ilr]),
                dampening=0.0, nesterov=attrs.nesterov, maximize=False, is_first_step=False,
            )  # fmt: skip

        return call

    results = tuple(v for e in updates for v in e.results)
    return Task((*grads, *hyper_reads), results, make, tuple(updates), in_place=True)


def _schedule(graph: Graph, storage: dict[str, torch.Tensor]) -> list[Task]:
    """The flat graph as tasks, with the peepholes applied."""
    eqns = _flatten(graph)
    readers: dict[Value, list[Eqn]] = {}
    for e in eqns:
        for v in e.inputs:
            readers.setdefault(v, []).append(e)
    escaping = graph.escaping()
    wide = {
        e.outputs[1]: Value(f".wide.{e.outputs[1].name}", e.outputs[1].type)
        for e in eqns
        if e.op == "maxpool2d" and e.outputs[1] is not None and _narrow_unread(e, readers, escaping)
    }
    done: set[int] = set()
    tasks: list[Task] = []
    updates: list[Eqn] = []

    def only_reader(v: Value, op: str) -> Eqn | None:
        found = readers.get(v, [])
        return found[0] if len(found) == 1 and found[0].op == op and v not in escaping else None

    for e in eqns:
        if id(e) in done:
            continue
        task: Task | None = None
        if e.op == "conv2d" and _symmetric(e.attrs):  # type: ignore[arg-type]
            task = _conv(e, only_reader(e.out, "relu"))
        elif e.op == "linear" and (relu := only_reader(e.out, "relu")):
            task = _linear_relu(e, relu)
        elif e.op in ("conv2d_wgrad", "conv2d_dgrad") and _symmetric(e.attrs):  # type: ignore[arg-type]
            task = _gradients(e, eqns, done)
        elif e.op == "maxpool2d" and (e.outputs[1] is None or e.outputs[1] in wide):
            task = _maxpool(e, wide)
        elif e.op == "maxpool2d_grad" and e.inputs[1] in wide:
            task = _maxpool_grad(e, wide)
        elif e.op == "cross_entropy":
            twins = [t for t in readers[e.inputs[0]] if t.op == "cross_entropy_grad"]
            if len(twins) == 1 and twins[0].inputs == e.inputs:
                task = _cross_entropy(e, twins[0])
        elif _groups(e, readers, storage, graph):
            updates.append(e)
            done.add(id(e))
            continue
        task = task or _generic(e)
        done.update(map(id, task.eqns))
        tasks.append(task)
    kinds: dict[tuple, list[Eqn]] = {}
    for e in updates:
        kinds.setdefault((e.attrs, e.inputs[-2:]), []).append(e)
    return _sorted(tasks, graph) + [_sgd(k, storage) for k in kinds.values()]


def _sorted(tasks: list[Task], graph: Graph) -> list[Task]:
    """Merged tasks may read what a later one writes: order them again, stably."""
    ready = {v for t in tasks for v in t.reads} - {v for t in tasks for v in t.writes}
    ready |= set(graph.input_values)
    out: list[Task] = []
    while tasks:
        rest = []
        for t in tasks:
            if all(v in ready for v in t.reads):
                ready.update(t.writes)
                out.append(t)
            else:
                rest.append(t)
        assert len(rest) < len(tasks), "a peephole closed a cycle"
        tasks = rest
    return out


def _narrow_unread(pool: Eqn, readers: dict[Value, list[Eqn]], escaping: set[Value]) -> bool:
    """Whether gradients of this pool alone read its index."""
    idx = pool.outputs[1]
    t, b, le, r = pool.attrs.padding  # type: ignore[attr-defined]
    assert idx is not None
    grads = all(e.op == "maxpool2d_grad" for e in readers.get(idx, []))
    return grads and idx not in escaping and (t, le) == (b, r)


def _gradients(e: Eqn, eqns: list[Eqn], done: set[int]) -> Task | None:
    """The wgrad and dgrad of one convolution together; a lone dgrad stays generic."""
    dy = e.inputs[1] if e.op == "conv2d_wgrad" else e.inputs[0]
    base = e.attrs.base()  # type: ignore[attr-defined]

    def twin(op: str, at: int) -> Eqn | None:
        found = [
            t
            for t in eqns
            if t.op == op and t.inputs[at] == dy and id(t) not in done
            and t.attrs.base() == base  # type: ignore[attr-defined]
        ]  # fmt: skip
        return found[0] if len(found) == 1 else None

    wgrad = e if e.op == "conv2d_wgrad" else twin("conv2d_wgrad", 1)
    dgrad = e if e.op == "conv2d_dgrad" else twin("conv2d_dgrad", 0)
    if wgrad is None or wgrad.outputs[0] is None:
        return None
    if dgrad is not None and dgrad.out.type.shape != wgrad.inputs[0].type.shape:
        dgrad = None
    return _conv_backward(wgrad, dgrad)


def _groups(
    e: Eqn, readers: dict[Value, list[Eqn]], storage: dict[str, torch.Tensor], graph: Graph
) -> bool:
    """Whether an update can join the one call at the end of the step."""
    if e.op != "sgd_update" or e.attrs.form != "torch":  # type: ignore[attr-defined]
        return False
    if any(readers.get(v) for v in e.results):
        return False
    targets = {new: old for old, new in graph.commits}
    state = (e.inputs[0], *e.inputs[2 : 1 + len(e.results)])
    return all(targets.get(v) == s for v, s in zip(e.results, state, strict=True)) and all(
        storage[s.name].is_contiguous() and storage[s.name].dtype == torch.float32 for s in state
    )


def prepare(plan: Any, storage: dict[str, torch.Tensor]) -> Callable[[], None]:
    """The step as a callable over fixed storage, by name of input and of returned value."""
    graph: Graph = plan.graph
    tasks = _schedule(graph, storage)
    slots: dict[Value, int] = {}

    def slot(v: Value) -> int:
        return slots.setdefault(v, len(slots))

    calls = [t.make(slot) for t in tasks]
    fixed = [(slot(i.value), storage[i.value.name]) for i in graph.inputs]
    placed = {v for t in tasks if t.in_place for v in t.writes}
    commits = [
        (storage[old.name], slot(new)) for old, new in graph.commits if new not in placed
    ]
    returns = [(storage[v.name], slot(v)) for v in graph.returns if v not in graph.input_values]
    keep = {at for _, at in commits} | {at for _, at in returns} | {at for at, _ in fixed}
    last: dict[int, int] = {}
    for k, t in enumerate(tasks):
        last.update((slots[v], k) for v in (*t.reads, *t.writes) if v in slots)
    drops = [[at for at, when in last.items() if when == k and at not in keep] for k in
             range(len(tasks))]  # fmt: skip
    blank: Env = [None] * len(slots)
    for at, tensor in fixed:
        blank[at] = tensor
    program = list(zip(calls, drops, strict=True))

    def run() -> None:
        env = blank.copy()
        for call, dead in program:
            call(env)
            for at in dead:  # freed as the step goes, so that its memory is still in cache
                env[at] = None
        for tensor, at in returns:
            tensor.copy_(env[at])
        for tensor, at in commits:
            tensor.copy_(env[at])

    return run
