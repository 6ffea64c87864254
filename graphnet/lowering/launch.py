"""An equation becomes launches: which kernel, which operands, which numbers.

One function per kernel family; `launches` is the entry. Everything that a kernel needs to know
about its operands, strides included, becomes a constexpr here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

from graphnet.errors import UnsupportedOpError
from graphnet.ir.graph import Eqn, Value
from graphnet.ir.op import get_op
from graphnet.lowering.codegen import Epilogue, Index, Ref, write_epilogue
from graphnet.lowering.cost import with_costs
from graphnet.lowering.launch_pool import POOLS
from graphnet.lowering.moves import MOVES, pointwise_launch, run_move
from graphnet.lowering.steps import Launch, Step, arguments, make, source
from graphnet.lowering.tuning import Config, cdiv, choose, next_power
from graphnet.lowering.work import Work, strides, take_apart


def launches(eqn: Eqn, name: Callable[[Value], str] = str) -> list[Step]:
    """The steps that compute an equation; none for a view. `name` gives each value's buffer."""
    if eqn.op in MOVES:
        return run_move(eqn, name)
    _check_layouts(eqn)
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
        if v.type.layout.flat is not None or v.type.layout.s2d:
            raise UnsupportedOpError(f"no kernel takes the layout of {v}: {v.type}")


# ---- convolution ----------------------------------------------------------------------------


def _geometry(x: tuple[int, ...], w: tuple[int, ...], y: tuple[int, ...], a: Any) -> dict[str, int]:
    t, _, le, _ = a.padding
    return {
        "N": x[0], "C": x[1], "H": x[2], "W": x[3], "K": y[1], "OH": y[2], "OW": y[3],
        "R": w[2], "S": w[3], "SH": a.stride[0], "SW": a.stride[1], "PT": t, "PL": le,
        "DH": a.dilation[0], "DW": a.dilation[1], "G": a.groups,
    }  # fmt: skip


def _tiles(c: Config) -> dict[str, int]:
    return {"BM": c.BM, "BN": c.BN, "BK": c.BK}


def _conv2d(work: Work) -> list[Launch]:
    e, a = work.anchor, work.anchor.attrs
    x, w, y = (v.type.shape for v in (*e.inputs[:2], e.out))
    g, math = a.groups, a.math  # type: ignore[attr-defined]
    m, n = y[0] * y[2] * y[3], y[1] // g
    c = choose("conv2d", (m, n, prod(w[1:]), g), math)
    bias = e.inputs[2] if len(e.inputs) > 2 else None
    epi = work.epilogue(e.out, Index(y), bias=bias)
    constants = {
        **_geometry(x, w, y, a),
        **strides("X", work.type(e.inputs[0])), **strides("W", work.type(e.inputs[1])),
        **_tiles(c), "PRECISION": math, "EPILOGUE": source(epi),
    }  # fmt: skip
    return [_product(work, "conv2d_forward", "conv", c, constants, (m, n, g), epi)]


def _product(
    work: Work, kernel: str, module: str, c: Config, constants: dict[str, Any],
    size: tuple[int, int, int], epi: Epilogue | None,
) -> Launch:  # fmt: skip
    a, b = (work.ref(v) for v in work.anchor.inputs[:2])
    grid = (cdiv(size[0], c.BM), cdiv(size[1], c.BN), size[2])
    return make(
        kernel, module, (a, b, arguments(epi)), constants, grid, reads=(a.name, b.name),
        epilogues=(epi,), num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def _conv2d_dgrad(work: Work) -> list[Launch]:
    e, a = work.anchor, work.anchor.attrs
    dy, w, x = (v.type.shape for v in (*e.inputs, e.out))
    g, math = a.groups, a.math  # type: ignore[attr-defined]
    m, n, k = x[0] * x[2] * x[3], x[1] // g, dy[1] // g * w[2] * w[3]
    c = choose("conv2d_dgrad", (m, n, k, g), math)
    epi = work.epilogue(e.out, Index(x))
    constants = {
        **_geometry(x, w, dy, a),
        **strides("D", work.type(e.inputs[0])), **strides("W", work.type(e.inputs[1])),
        **_tiles(c), "PRECISION": math, "EPILOGUE": source(epi),
    }  # fmt: skip
    return [_product(work, "conv2d_dgrad", "conv", c, constants, (m, n, g), epi)]


def _conv2d_wgrad(work: Work) -> list[Launch]:
    e, a = work.anchor, work.anchor.attrs
    x, dy = (v.type.shape for v in e.inputs)
    w, g = e.out.type.shape, a.groups  # type: ignore[attr-defined]
    constants = {
        **_geometry(x, w, dy, a),
        **strides("X", work.type(e.inputs[0])), **strides("D", work.type(e.inputs[1])),
    }  # fmt: skip
    pixels = dy[0] * dy[2] * dy[3]
    return _wgrad(work, "conv2d_wgrad", "conv", constants, w, pixels, g)


def _wgrad(
    work: Work, kernel: str, module: str, constants: dict[str, Any], w: tuple[int, ...],
    reduced: int, groups: int,
) -> list[Launch]:  # fmt: skip
    """The gradient, and the ordered sum of its parts where the reduction is cut."""
    e = work.anchor
    x, dy = (work.ref(v) for v in e.inputs)
    rows, columns = w[0], prod(w[1:])
    db = e.outputs[1]
    epi = work.epilogue(e.out, Index(w))
    epi2 = None
    if db is not None:
        epi2 = work.epilogue(db, Index(db.type.shape), widen=True)
    if epi is None:  # the weight is frozen, its bias is not
        return [_channel_sum(work, dy)]
    has_bias = epi2 is not None
    columns += has_bias
    math = e.attrs.math  # type: ignore[attr-defined]
    c = choose(kernel, (rows // groups, columns, reduced, groups), math)
    constants |= {**_tiles(c), "SPLIT": c.SPLIT, "HAS_BIAS": has_bias, "PRECISION": math}
    per_group = cdiv(rows // groups, c.BM), cdiv(columns, c.BN)
    grid = (*per_group, groups * c.SPLIT)
    options: dict[str, Any] = {"num_warps": c.num_warps, "num_stages": c.num_stages}
    if c.SPLIT == 1:
        constants |= {"EPILOGUE": source(epi), "EPILOGUE2": source(epi2)}
        return [
            make(
                kernel, module, (x, dy, None, arguments(epi), arguments(epi2)), constants, grid,
                reads=(x.name, dy.name), epilogues=(epi, epi2), **options,
            )
        ]  # fmt: skip
    parts = Ref(f".parts{work.eqn.results[0]}", "f32")
    constants |= {"EPILOGUE": None, "EPILOGUE2": None}
    first_pass = make(
        kernel, module, (x, dy, parts, None, None), constants, grid, reads=(x.name, dy.name),
        writes=(parts.name,), scratch=((parts.name, c.SPLIT * rows * columns * 4),), **options,
    )  # fmt: skip
    r = choose("split_reduce", (rows * columns,))
    shape = (*w[1:], 1, 1)[:3]
    # A linear weight [K, C] is a filter of size 1 x 1.
    reduce = {
        "SPLIT": c.SPLIT, "K": rows, "CG": shape[0], "R": shape[1], "S": shape[2],
        "HAS_BIAS": has_bias, "BLOCK": r.BLOCK, "EPILOGUE": source(epi),
        "EPILOGUE2": source(epi2),
    }  # fmt: skip
    second = make(
        "split_reduce", "reduce", (parts, arguments(epi), arguments(epi2)), reduce,
        (cdiv(rows * columns, r.BLOCK),), reads=(parts.name,), epilogues=(epi, epi2),
    )  # fmt: skip
    return [first_pass, second]


def _channel_sum(work: Work, dy: Ref) -> Launch:
    """The bias gradient alone."""
    bias, type = work.anchor.outputs[1], work.type(work.anchor.inputs[1])
    assert bias is not None
    n, c, h, w = (*type.shape, 1, 1)[:4]
    strides = (*type.strides, 0, 0)[:4]
    block = choose("channel_sum", (n * h * w,)).BLOCK
    epi = work.epilogue(bias, Index(bias.type.shape))
    constants = {
        "N": n, "C": c, "H": h, "W": w, **{f"XS{d}": s for d, s in enumerate(strides)},
        "BLOCK": block, "EPILOGUE": source(epi),
    }  # fmt: skip
    return make(
        "channel_sum", "reduce", (dy, arguments(epi)), constants, (c,), reads=(dy.name,),
        epilogues=(epi,),
    )  # fmt: skip


# ---- fully connected ------------------------------------------------------------------------


def _matmul(work: Work, transposed: bool, bias: Value | None) -> list[Launch]:
    e = work.anchor
    m, n = e.out.type.shape
    k = e.inputs[0].type.shape[1]
    math = e.attrs.math  # type: ignore[attr-defined]
    c = choose(e.op, (m, n, k, 1), math)
    epi = work.epilogue(e.out, Index((m, n)), bias=bias)
    a, b = (work.type(v).strides for v in e.inputs[:2])
    b = (b[1], b[0]) if transposed else b
    constants = {
        "M": m, "N": n, "K": k, "AS0": a[0], "AS1": a[1], "BS0": b[0], "BS1": b[1], **_tiles(c),
        "PRECISION": math, "EPILOGUE": source(epi),
    }  # fmt: skip
    return [_product(work, "matmul", "gemm", c, constants, (m, n, 1), epi)]


def _linear(work: Work) -> list[Launch]:
    inputs = work.anchor.inputs
    return _matmul(work, True, inputs[2] if len(inputs) > 2 else None)


def _linear_dgrad(work: Work) -> list[Launch]:
    return _matmul(work, False, None)


def _linear_wgrad(work: Work) -> list[Launch]:
    x, dy = work.anchor.inputs
    n, c = x.type.shape
    constants = {
        "N": n, "C": c, "K": dy.type.shape[1],
        **strides("X", work.type(x)), **strides("D", work.type(dy)),
    }  # fmt: skip
    w = work.anchor.out.type.shape
    return _wgrad(work, "linear_wgrad", "gemm", constants, w, n, 1)


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
        else {"MARGIN": a.margin}  # type: ignore[attr-defined]
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
    ring, loss, step = (work.name[v] for v in work.eqn.inputs)
    ring1, step1 = (work.name[v] for v in work.eqn.results)
    args = (Ref(ring1, "f32"), Ref(loss, "f32"), Ref(step1, "i64"))
    size = work.eqn.inputs[0].type.numel
    pairs = ((ring, ring1), (step, step1))
    moved = 2 * (4 + 8)  # a loss and the counter, each read and written
    return make(
        "record_step", "elementwise", args, {"RING": size}, (1,),
        reads=(ring, loss, step), writes=(ring1, step1), starts_as=pairs, bytes=moved, num_warps=1,
    )  # fmt: skip


_FAMILIES: dict[str, Callable[[Work], list[Launch]]] = {
    "conv2d": _conv2d, "conv2d_dgrad": _conv2d_dgrad, "conv2d_wgrad": _conv2d_wgrad,
    "linear": _linear, "linear_dgrad": _linear_dgrad, "linear_wgrad": _linear_wgrad,
    "cross_entropy": _loss, "cross_entropy_grad": _loss,
    "multi_margin": _loss, "multi_margin_grad": _loss,
    **POOLS,
}  # fmt: skip


def supported(op: str) -> bool:
    """Whether this module can turn the op into launches."""
    return op in _FAMILIES or op in MOVES or op == "record_step" or get_op(op).elementwise
