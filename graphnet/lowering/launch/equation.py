"""An equation becomes launches: which kernel, which operands, which numbers.

One function per kernel family; `launches` is the entry. Everything that a kernel needs to know
about its operands, strides included, becomes a constexpr here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

from graphnet.errors import UnsupportedOpError
from graphnet.ir.graph import Eqn, Value
from graphnet.ir.op import get_op
from graphnet.lowering.launch.augment import AUGMENTS
from graphnet.lowering.launch.codegen import Index, Ref, write_epilogue
from graphnet.lowering.launch.config import PROCESSORS, cdiv, choices, choose, next_power
from graphnet.lowering.launch.conv import CONVS
from graphnet.lowering.launch.cost import with_costs
from graphnet.lowering.launch.linear import LINEARS
from graphnet.lowering.launch.moves import MOVES, pointwise_launch, run_move
from graphnet.lowering.launch.pool import POOLS
from graphnet.lowering.launch.steps import Launch, Step, arguments, make, source
from graphnet.lowering.launch.work import Work, take_apart


def launches(eqn: Eqn, name: Callable[[Value], str] = str) -> list[Step]:
    """The steps that compute an equation; none for a view. `name` gives each value's buffer."""
    with choices() as asked:
        steps = _steps(eqn, name)
    once = tuple(dict.fromkeys(asked))
    return [replace(s, choices=once) if isinstance(s, Launch) else s for s in steps]


def _steps(eqn: Eqn, name: Callable[[Value], str]) -> list[Step]:
    if eqn.op in MOVES:
        return run_move(eqn, name)
    _check_layouts(eqn)
    if eqn.op == "global_norm":
        return _global_norm(eqn, name)
    work = take_apart(eqn, name, _FAMILIES)
    if work.anchors:
        steps = _FAMILIES[work.anchor.op](work)
    elif eqn.op == "record_step":
        steps = [_record(work)]
    else:
        steps = [_pointwise(work)]
    return list(with_costs(work, steps))


def _check_layouts(eqn: Eqn) -> None:
    for v in (*eqn.inputs, *eqn.results):
        if v.type.layout.flat is not None:
            raise UnsupportedOpError(f"no kernel takes the layout of {v}: {v.type}")


# ---- losses ---------------------------------------------------------------------------------


def _loss(work: Work) -> list[Launch]:
    e = work.anchor
    kernel = e.op.removesuffix("_grad")
    logits, labels, live = (work.ref(v) for v in e.inputs)
    m, n = e.inputs[0].type.shape
    grad = next((a for a in work.anchors if a.op.endswith("_grad")), None)
    value = next((a for a in work.anchors if not a.op.endswith("_grad")), None)
    outer = dict(work.stores)
    out = outer.get(value.out) if value is not None else None
    epi = work.epilogue(grad.out, Index((m, n))) if grad is not None else None
    c = choose(kernel, (m, n))
    s0, s1 = work.type(e.inputs[0]).strides
    a = e.attrs
    own = (
        {"SMOOTHING": a.label_smoothing}  # type: ignore[attr-defined]
        if kernel == "cross_entropy"
        else {"MARGIN": a.margin, "DIVISOR": n if a.mean else 1}  # type: ignore[attr-defined]
    )
    constants = {
        "M": m, "C": n, "S0": s0, "S1": s1, "BM": c.BM, "BN": c.BN, "PROGRAMS": c.SPLIT, **own,
        "LOSS": out is not None, "GRAD": epi is not None, "EPILOGUE": source(epi),
    }  # fmt: skip
    loss = work.ref(out) if out is not None else None
    sums = Ref(f".sums{work.eqn.results[0]}", "f32") if loss is not None and c.SPLIT > 1 else None
    written = sums or loss
    first = make(
        kernel, "loss",
        (logits, labels, live, None if sums else loss, sums, arguments(epi)), constants,
        (c.SPLIT,), reads=(logits.name, labels.name, live.name),
        writes=(written.name,) if written else (), epilogues=(epi,),
        scratch=((sums.name, 4 * c.SPLIT),) if sums else (),
    )  # fmt: skip
    if sums is None:
        return [first]
    assert loss is not None
    mean = make(
        "mean_reduce", "reduce", (sums, live, loss),
        {"COUNT": c.SPLIT, "BLOCK": next_power(c.SPLIT)}, (1,),
        reads=(sums.name, live.name), writes=(loss.name,),
    )  # fmt: skip
    return [first, mean]


# ---- without an anchor ----------------------------------------------------------------------


def _pointwise(work: Work) -> Launch:
    """Elementwise code alone. Where all operands lie alike, one index counts their storage."""
    results = [o for _, o in work.stores]
    shape = results[0].type.shape
    inputs = {v for e in work.rest for v in e.inputs if v in work.name}
    full = [work.type(v) for v in inputs if v.type.shape == shape] + [v.type for v in results]
    alike = len({t.layout for t in full}) == 1
    coordinates = any(e.op == "dropout" for e in work.rest)
    flat = alike and not coordinates
    if len(shape) > 4 and not flat:
        raise UnsupportedOpError(f"elementwise code over {len(shape)} dimensions")
    space = (prod(shape), 1, 1, 1) if flat else (*shape, 1, 1, 1, 1)[:4]
    note = f"elementwise {list(shape)}"
    stores = work.stores
    # The body's operands get the layouts that they have outside.
    eqns = [replace(e, inputs=tuple(work.outer.get(v, v) for v in e.inputs)) for e in work.rest]
    epi = write_epilogue(Index(shape, flat), work.name, {}, eqns, stores, note=note)
    return pointwise_launch(epi, space, not flat and results[0].type.layout.order == "nhwc")


def _record(work: Work) -> Launch:
    ring, loss, step, *norm = (work.name[v] for v in work.eqn.inputs)
    ring1, step1 = (work.name[v] for v in work.eqn.results)
    held = Ref(norm[0], "f32") if norm else None
    args = (Ref(ring1, "f32"), Ref(loss, "f32"), Ref(step1, "i64"), held)
    size = work.eqn.inputs[0].type.numel
    pairs = ((ring, ring1), (step, step1))
    moved = 2 * (4 + 8)  # a loss and the counter, each read and written
    return make(
        "record_step", "elementwise", args, {"RING": size, "NORM": bool(norm)}, (1,),
        reads=(ring, loss, step, *norm), writes=(ring1, step1), starts_as=pairs, bytes=moved,
        num_warps=1,
    )  # fmt: skip


def _global_norm(eqn: Eqn, name: Callable[[Value], str]) -> list[Step]:
    """Partial sums of squares of each operand into one workspace, and their ordered sum."""
    sizes = [v.type.numel for v in eqn.inputs]
    block = choose("elementwise", (max(sizes),)).BLOCK
    programs = [min(cdiv(n, block), PROCESSORS) for n in sizes]
    out, work = name(eqn.out), Ref(f".squares{eqn.out}", "f32")
    steps: list[Step] = []
    for k, v in enumerate(eqn.inputs):
        constants = {
            "N": sizes[k], "FIRST": sum(programs[:k]), "PROGRAMS": programs[k], "BLOCK": block
        }  # fmt: skip
        scratch = ((work.name, 4 * sum(programs)),) if k == 0 else ()
        steps.append(
            make(
                "square_sum", "reduce", (Ref(name(v), v.type.dtype.name), work), constants,
                (programs[k],), reads=(name(v),), writes=(work.name,), scratch=scratch,
                flops=2 * sizes[k], bytes=v.type.bytes + 4 * programs[k], where=eqn.where,
            )
        )  # fmt: skip
    count = sum(programs)
    last = make(
        "norm_reduce", "reduce", (work, Ref(out, "f32")),
        {"COUNT": count, "BLOCK": min(1024, next_power(count))}, (1,), reads=(work.name,),
        writes=(out,), flops=count, bytes=4 * count + 4, where=eqn.where,
    )  # fmt: skip
    return [*steps, last]


_FAMILIES: dict[str, Callable[[Work], list[Launch]]] = {
    **CONVS, **LINEARS,
    "cross_entropy": _loss, "cross_entropy_grad": _loss,
    "multi_margin": _loss, "multi_margin_grad": _loss,
    **POOLS, **AUGMENTS,
}  # fmt: skip


def supported(op: str) -> bool:
    """Whether this module can turn the op into launches."""
    known = op in _FAMILIES or op in MOVES or op in ("record_step", "global_norm")
    return known or get_op(op).elementwise
