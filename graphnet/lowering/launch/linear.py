"""Launches of matrix products: fully connected layers, and what convolutions share with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graphnet.ir.graph import Value
from graphnet.lowering.launch.codegen import Epilogue, Index, Ref
from graphnet.lowering.launch.config import Config, cdiv, choose
from graphnet.lowering.launch.steps import Arg, Launch, arguments, make, source
from graphnet.lowering.launch.work import Work, strides


def tiles(c: Config) -> dict[str, int]:
    return {"BM": c.BM, "BN": c.BN, "BK": c.BK}


def product(
    work: Work, kernel: str, module: str, c: Config, constants: dict[str, Any],
    size: tuple[int, int, int], epi: Epilogue | None, *, operands: tuple[Arg, ...] = (),
    why: str = "",
) -> Launch:  # fmt: skip
    """A launch over tiles of `size`: rows, columns, groups. `operands` in place of pointers."""
    a, b = (work.ref(v) for v in work.anchor.inputs[:2])
    grid = (cdiv(size[0], c.BM), cdiv(size[1], c.BN + c.BT), size[2])
    return make(
        kernel, module, (*(operands or (a, b)), arguments(epi)), constants, grid,
        reads=(a.name, b.name), epilogues=(epi,), num_warps=c.num_warps, num_stages=c.num_stages,
        why=why,
    )  # fmt: skip


# What a weight gradient's kernel has to know, given whether the bias is wanted: its configuration,
# the tiles of rows and columns, and how many columns a row has.
Shape = Callable[[bool], tuple[Config, tuple[int, int], int]]


def weight_gradient(
    work: Work, kernel: str, module: str, constants: dict[str, Any], w: tuple[int, ...],
    groups: int, shape: Shape, block: int = 1, *, operands: tuple[Arg, ...] = (), why: str = "",
) -> list[Launch]:  # fmt: skip
    """The gradient, and the ordered sum of its parts where the reduction is cut.

    w      the weight's shape
    block  of space-to-depth, by which the columns are ordered
    operands  what the kernel takes in place of the pointers to x and dy
    """
    e = work.anchor
    x, dy = (work.ref(v) for v in e.inputs)
    rows, db = w[0], e.outputs[1]
    epi = work.epilogue(e.out, Index(w))
    epi2 = None
    if db is not None:
        epi2 = work.epilogue(db, Index(db.type.shape), widen=True)
    if epi is None:  # the weight is frozen, its bias is not
        return [_channel_sum(work, dy)]
    has_bias = epi2 is not None
    c, grid, columns = shape(has_bias)
    constants |= {**tiles(c), "SPLIT": c.SPLIT, "HAS_BIAS": has_bias}
    constants["PRECISION"] = e.attrs.math  # type: ignore[attr-defined]
    options: dict[str, Any] = {"num_warps": c.num_warps, "num_stages": c.num_stages, "why": why}
    operands = operands or (x, dy)
    whole = (*grid, groups * c.SPLIT)
    if c.SPLIT == 1:
        constants |= {"EPILOGUE": source(epi), "EPILOGUE2": source(epi2)}
        return [
            make(
                kernel, module, (*operands, None, arguments(epi), arguments(epi2)), constants,
                whole, reads=(x.name, dy.name), epilogues=(epi, epi2), **options,
            )
        ]  # fmt: skip
    parts = Ref(f".parts{work.eqn.results[0]}", "f32")
    constants |= {"EPILOGUE": None, "EPILOGUE2": None}
    first_pass = make(
        kernel, module, (*operands, parts, None, None), constants, whole, reads=(x.name, dy.name),
        writes=(parts.name,), scratch=((parts.name, c.SPLIT * rows * columns * 4),), **options,
    )  # fmt: skip
    r = choose("split_reduce", (rows * columns,))
    filters = (*w[1:], 1, 1)[:3]  # a linear weight [K, C] is a filter of size 1 x 1
    reduce = {
        "SPLIT": c.SPLIT, "K": rows, "CG": filters[0], "R": filters[1], "S": filters[2],
        "B": block, "HAS_BIAS": has_bias, "BLOCK": r.BLOCK, "EPILOGUE": source(epi),
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
        "M": m, "N": n, "K": k, "AS0": a[0], "AS1": a[1], "BS0": b[0], "BS1": b[1], **tiles(c),
        "PRECISION": math, "EPILOGUE": source(epi),
    }  # fmt: skip
    return [product(work, "matmul", "gemm", c, constants, (m, n, 1), epi)]


def _linear(work: Work) -> list[Launch]:
    inputs = work.anchor.inputs
    return _matmul(work, True, inputs[2] if len(inputs) > 2 else None)


def _linear_dgrad(work: Work) -> list[Launch]:
    return _matmul(work, False, None)


def _linear_wgrad(work: Work) -> list[Launch]:
    x, dy = work.anchor.inputs
    (n, c), k = x.type.shape, dy.type.shape[1]
    math = work.anchor.attrs.math  # type: ignore[attr-defined]
    constants = {
        "N": n, "C": c, "K": k, **strides("X", work.type(x)), **strides("D", work.type(dy)),
    }  # fmt: skip

    def shape(has_bias: bool) -> tuple[Config, tuple[int, int], int]:
        config = choose("linear_wgrad", (k, c + has_bias, n, 1), math, work.held)
        return config, (cdiv(k, config.BM), cdiv(c + has_bias, config.BN)), c + has_bias

    w = work.anchor.out.type.shape
    return weight_gradient(work, "linear_wgrad", "gemm", constants, w, 1, shape)


LINEARS: dict[str, Callable[[Work], list[Launch]]] = {
    "linear": _linear, "linear_dgrad": _linear_dgrad, "linear_wgrad": _linear_wgrad,
}  # fmt: skip
