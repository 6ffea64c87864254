"""Reverse-mode differentiation on the graph: `traced -> joint`.

Each op's `vjp` writes its cotangents as ordinary equations. A gradient `%g` and the separate
`*_update(%w, %g, ...)` are the only link to the optimizer; joining them is a fusion like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from graphnet.errors import GraphError
from graphnet.ir.graph import Builder, Eqn, Graph, Input, Value, Where
from graphnet.ir.op import get_op
from graphnet.ir.types import DTYPES, TensorType, f32, i64
from graphnet.ops.gradient import Handling
from graphnet.passes.dce import dce

RING = 4096  # losses kept on the device
BUCKET = 25 << 20  # bytes of gradients that travel together, as torch's DDP has it


def _depends_on(graph: Graph, roots: Collection[Value]) -> set[Value]:
    """Values that a change of `roots` can change."""
    out = set(roots)
    for e in graph.eqns:
        if any(v in out for v in e.inputs):
            out.update(e.results)
    return out


def _copy(graph: Graph, suffix: str) -> tuple[Builder, dict[Value, Value]]:
    b = Builder(f"{graph.name.split('.')[0]}.{suffix}")
    for i in graph.inputs:
        b.inputs.append(i)
        b.fresh(i.value.name)
    env: dict[Value, Value] = {}
    for e in graph.eqns:
        # Optional results (a pool's index) may be what a gradient wants: ask for all, dce prunes.
        outs = b.emit(e.op, [env.get(v, v) for v in e.inputs], e.attrs, where=e.where)
        for old, new in zip(e.outputs, outs, strict=True):
            if old is not None and new is not None:
                env[old] = new
    return b, env


def backward(b: Builder, loss: Value, wrt: Sequence[Value]) -> dict[Value, Value]:
    """Appends the backward pass of everything in `b`; value to cotangent for each of `wrt`."""
    if loss.type.shape != ():
        raise GraphError(f"{loss}: {loss.type} is no scalar loss and has no gradient")
    one = get_op("full").attrs_type(value=1.0, shape=(), dtype="f32")  # type: ignore[call-arg]
    return _pulled(b, wrt, {loss: lambda: b.one("full", attrs=one, where=Where(by="autodiff"))})


def _pulled(
    b: Builder, wrt: Sequence[Value], seeds: Mapping[Value, Callable[[], Value]]
) -> dict[Value, Value]:
    """Appends the backward pass from the cotangents that `seeds` make for values of `b`; value to
    cotangent for each of `wrt`."""
    forward = list(b.eqns)
    wanted = _depends_on(Graph(b.name, tuple(b.inputs), tuple(forward), tuple(seeds)), wrt)
    given = {v: make() for v, make in seeds.items() if v in wanted}
    for eqn in reversed(forward):
        cts = [None if v is None else given.get(v) for v in eqn.outputs]
        if all(c is None for c in cts) or not any(v in wanted for v in eqn.inputs):
            continue
        _accumulate(b, eqn, cts, wanted, given)
    return {v: given[v] for v in wrt if v in given}


def _accumulate(
    b: Builder,
    eqn: Eqn,
    cts: Sequence[Value | None],
    wanted: set[Value],
    cotangent: dict[Value, Value],
) -> None:
    where = Where(eqn.where.layers, eqn.where.place, "autodiff")
    b.where = where
    needs = [v in wanted for v in eqn.inputs]
    for v, need, g in zip(eqn.inputs, needs, get_op(eqn.op).vjp(b, eqn, cts, needs), strict=True):
        if g is None or not need:
            continue
        if g.type.shape != v.type.shape:
            raise GraphError(
                f"the gradient of {eqn.op} with respect to {v}: {v.type} has type {g.type}",
                **eqn.where.located,
            )
        cotangent[v] = b.one("add", cotangent[v], g, where=where) if v in cotangent else g


def pullback(traced: Graph, wrt: Sequence[str]) -> Graph:
    """The joint graph of a traced graph and its backward pass from given cotangents.

    It takes one more input of role data for each result, of its type and named by `cotangent`, and
    returns the results, then the gradient of each input of `wrt` that they depend on (`reached`).
    The forward pass commits what the traced graph does. The count of steps is an input of each
    call, not state: who calls it draws the masks of both passes.
    """
    b, env = _copy(traced, "joint")
    b.inputs = [replace(i, role="hyper") if i.role == "counter" else i for i in b.inputs]
    returns = [env.get(v, v) for v in traced.returns]
    values = [traced.input(name).value for name in wrt]

    def seed(k: int, v: Value) -> Callable[[], Value]:
        return lambda: b.input(cotangent(k), v.type, "data")

    gradient = _pulled(b, values, {v: seed(k, v) for k, v in enumerate(returns)})
    for old, new in traced.commits:
        b.commit(old, env.get(new, new))
    return dce(b.build(*returns, *(gradient[v] for v in values if v in gradient)))


def cotangent(k: int) -> str:
    """The input of `pullback` that is the cotangent of result k."""
    return f"dy{k or ''}"


def reached(traced: Graph, wrt: Sequence[str]) -> tuple[str, ...]:
    """Those of the inputs on which a result depends."""
    return tuple(
        name for name in wrt
        if not _depends_on(traced, [traced.input(name).value]).isdisjoint(traced.returns)
    )  # fmt: skip


def autodiff(
    traced: Graph,
    *,
    trainable: Sequence[str],
    optimizer: Any = None,
    grads: bool = False,
    multipliers: Mapping[str, tuple[float, float]] | None = None,
    handling: Handling | None = None,
    ranks: int = 1,
    reduce: str | None = None,
) -> Graph:
    """The joint graph of a traced graph whose first result is the loss.

    trainable    names of the parameters to differentiate for
    optimizer    an `OptimizerSpec`; adds the update and its commits
    grads        return the gradients behind the loss, in the order of `trainable`; nothing is
                 committed then, statistics neither
    handling     accumulation, clipping and the guard of the gradients
    multipliers  by name, what a parameter multiplies the learning rate and the penalties with
    ranks        with several, the loss and the gradients are summed over them
    reduce       "bf16": gradients travel, and are summed, in bf16

    Of parameters that ranks hold in parts, the norm is that of all parts together, and the
    gradients that are returned are whole.
    """
    b, env = _copy(traced, "joint")
    loss = env.get(traced.returns[0], traced.returns[0])
    params = [traced.input(name).value for name in trainable]
    gradient = backward(b, loss, params)
    b.where = Where(by="autodiff")
    if grads:
        loss = _reduced(b, loss, _in_order(b, params, gradient), gradient, ranks, reduce)
        zeros = get_op("full")
        for p in params:
            if p not in gradient:  # the loss does not depend on it
                attrs = zeros.attrs_type(value=0.0, shape=p.type.shape, dtype="f32")  # type: ignore[call-arg]
                gradient[p] = b.one("full", attrs=attrs)
        for p, parts in _divided(traced, params).items():
            attrs = get_op("all_gather").attrs_type(ranks=parts)  # type: ignore[call-arg]
            gradient[p] = b.one("all_gather", gradient[p], attrs=attrs)
        return dce(b.build(loss, *(gradient[p] for p in params)))
    if optimizer is not None:
        how = handling or Handling()
        ordered = _in_order(b, params, gradient)
        if how.accumulate:
            _accumulated(b, ordered, gradient, how.apply, _divided(traced, ordered))
        loss = _reduced(b, loss, ordered if how.apply else (), gradient, ranks, reduce)
        norm = None
        if how.apply:
            if how.norm:
                norm = _norm(b, ordered, gradient, _divided(traced, ordered))
            if how.clip:
                assert norm is not None
                limit = b.input("clip_norm", TensorType(f32, ()), "hyper")
                gradient = {p: b.one("clip", gradient[p], norm, limit) for p in ordered}
        flags = [] if how.nonfinite is None else [v for v in (loss, norm) if v is not None]
        if go := _record(b, loss, flags[1:], how.sticky):
            flags = [go]
        if how.apply:
            _update(b, traced, ordered, gradient, optimizer, multipliers or {}, flags)
        made = {v: e.where for e in traced.eqns for v in e.results}
        for old, new in traced.commits:  # statistics, once for each call
            b.where = made.get(new, b.where)
            b.commit(old, _kept(b, old, env.get(new, new), flags))
    return dce(b.build(loss))


def _record(b: Builder, loss: Value, norm: Sequence[Value], sticky: bool) -> Value | None:
    """Keeps the loss and counts the step; where it is sticky, the flag that updates look at."""
    have = {i.value.name: i.value for i in b.inputs}
    step = have.get("step") or b.input("step", TensorType(i64, ()), "counter")
    ring = b.input("ring", TensorType(f32, (RING,)), "counter")
    held = [b.input("held", TensorType(f32, ()), "counter")] if sticky else []
    attrs = get_op("record_step").attrs_type(sticky=sticky)  # type: ignore[call-arg]
    results = b.emit("record_step", [ring, loss, step, *held, *norm], attrs)
    for old, new in zip((ring, step, *held), results, strict=False):
        b.commit(old, new)  # type: ignore[arg-type]
    return results[3] if sticky else None


def _in_order(
    b: Builder, params: Sequence[Value], gradient: Mapping[Value, Value]
) -> list[Value]:  # fmt: skip
    """The parameters that have a gradient, in the order in which the gradients arise."""
    made = {v: at for at, e in enumerate(b.eqns) for v in e.results}
    return sorted((p for p in params if p in gradient), key=lambda p: made[gradient[p]])


def _accumulated(
    b: Builder, params: Sequence[Value], gradient: dict[Value, Value], last: bool,
    divided: Mapping[Value, int],
) -> None:  # fmt: skip
    """Adds each gradient, times its live rows, to a sum in the state; `last` makes the mean over
    all rows of it and clears the sum."""
    given = {i.value.name: i.value for i in b.inputs}
    live = given.get("live_all") or given["live"]
    rows = [b.input("rows", TensorType(f32, ()), "hyper")] if last else []
    full = get_op("full").attrs_type
    for p in params:
        total = b.input(f"{p.name}.grad_sum", p.type, "slot", p.name, divided.get(p, 1))
        gradient[p] = b.one("accumulate", total, gradient[p], live, *rows)
        zero = full(value=0.0, shape=p.type.shape, dtype="f32")  # type: ignore[call-arg]
        b.commit(total, b.one("full", attrs=zero) if last else gradient[p])


def _reduced(
    b: Builder, loss: Value, params: Sequence[Value], gradient: dict[Value, Value], ranks: int,
    reduce: str | None = None,
) -> Value:  # fmt: skip
    """Sums the gradients over the ranks, in place of them in `gradient`, and gives the loss of all.

    They travel in buckets of about BUCKET bytes, in the order in which they arise, each as soon as
    its last one is there, beside the rest of the backward pass. The loss goes with the first, or
    alone where gradients travel in another type.
    """
    if ranks == 1:
        return loss
    made = {v: at for at, e in enumerate(b.eqns) for v in e.results}
    buckets: list[list[Value | None]] = [[None]]  # None: the loss
    size = 0
    for p in params:
        own = p.type.bytes if reduce is None else p.type.with_dtype(DTYPES[reduce]).bytes
        if size + own > BUCKET and size or reduce and len(buckets) == 1:
            buckets.append([])
            size = 0
        buckets[-1].append(p)
        size += own
    attrs = get_op("all_reduce").attrs_type(ranks=ranks)  # type: ignore[call-arg]
    total = loss
    written: list[tuple[int, list[Eqn]]] = []
    for bucket in buckets:
        operands: list[Value] = [loss if q is None else gradient[q] for q in bucket]
        at, start = 1 + max(made[v] for v in operands), len(b.eqns)
        low = reduce if bucket != [None] else None
        sent = [_cast(b, v, low) for v in operands] if low else operands
        found = [v for v in b.emit("all_reduce", sent, attrs) if v is not None]
        sums = [_cast(b, v, "f32") for v in found] if low else found
        written.append((at, b.eqns[start:]))
        del b.eqns[start:]
        for q, s in zip(bucket, sums, strict=True):
            if q is None:
                total = s
            else:
                gradient[q] = s
    for at, eqns in reversed(written):
        b.eqns[at:at] = eqns
    return total


def _cast(b: Builder, v: Value, dtype: str) -> Value:
    return b.one("cast", v, attrs=get_op("cast").attrs_type(dtype=dtype))  # type: ignore[call-arg]


def _divided(traced: Graph, params: Sequence[Value]) -> dict[Value, int]:
    """The parameters of which a rank holds one of several parts, and of how many."""
    return {p: n for p in params if (n := traced.input(p.name).parts) > 1}


def _norm(
    b: Builder, params: Sequence[Value], gradient: Mapping[Value, Value],
    divided: Mapping[Value, int],
) -> Value:  # fmt: skip
    """The norm of all gradients: of parts that of all ranks, of what all hold alike once."""
    alike = [gradient[p] for p in params if p not in divided]
    if divided:
        own = b.one("global_norm", *(gradient[p] for p in divided))
        vector = b.one("reshape", own, attrs=get_op("reshape").attrs_type(shape=(1,)))  # type: ignore[call-arg]
        ranks = next(iter(divided.values()))
        attrs = get_op("all_gather").attrs_type(ranks=ranks)  # type: ignore[call-arg]
        alike.append(b.one("all_gather", vector, attrs=attrs))
    return b.one("global_norm", *alike)


def _kept(b: Builder, old: Value, new: Value, flags: Sequence[Value]) -> Value:
    """What becomes of state: the new value, or the old one where a flag is not finite."""
    return b.one("if_finite", new, old, *flags) if flags else new


def _update(
    b: Builder, traced: Graph, params: Sequence[Value], gradient: Mapping[Value, Value], spec: Any,
    multipliers: Mapping[str, tuple[float, float]], flags: Sequence[Value],
) -> None:  # fmt: skip
    """One update per parameter; nothing changes where a flag is not finite."""

    def commit(old: Value, new: Value) -> None:
        b.commit(old, _kept(b, old, new, flags))

    hypers = {name: b.input(name, TensorType(f32, ()), "hyper") for name in spec.hypers}
    scalars, own = spec.scalars(b, hypers)
    layer: dict[Value, Where] = {}
    for e in traced.eqns:
        for v in e.inputs:
            layer.setdefault(v, Where(e.where.layers, e.where.place, "autodiff"))
    for p in params:
        b.where = layer.get(p, Where(by="autodiff"))
        parts = traced.input(p.name).parts
        slots = [b.input(f"{p.name}.{s}", p.type, "slot", p.name, parts) for s in spec.slots]
        attrs = spec.attrs(*multipliers.get(p.name, (1.0, 1.0)))
        outs = b.emit(spec.op, [p, gradient[p], *slots, *scalars], attrs)
        for old, new in zip((p, *slots), outs, strict=True):
            assert new is not None
            commit(old, new)
    b.where = Where(by="autodiff")
    for old, new in own:
        commit(old, new)


def roles(graph: Graph, role: str) -> list[Input]:
    """The inputs of one role, in order."""
    return [i for i in graph.inputs if i.role == role]
