"""Data movement: views, slices, concatenation, layout changes. Strided copies, no arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd, prod
from typing import Any

from graphnet.errors import UnsupportedOpError
from graphnet.ir.graph import Eqn, Value, Where
from graphnet.ir.types import ROW, TensorType
from graphnet.lowering.launch.choice import adjusted
from graphnet.lowering.launch.codegen import Epilogue, Index, Ref, Writer
from graphnet.lowering.launch.config import Config, cdiv, tile
from graphnet.lowering.launch.pool import by_block
from graphnet.lowering.launch.steps import Fill, Launch, Step, arguments, make, source
from graphnet.lowering.launch.work import strides

MOVES = ("reshape", "full", "slice", "slice_grad", "concat", "pad", "relayout")
PACKED = 128  # vectors a program of space-to-depth writes, one a thread
Name = Callable[[Value], str]


def is_view(eqn: Eqn) -> bool:
    """A reshape between row-major values, or a relayout to the same layout: the same memory."""
    if eqn.op not in ("reshape", "relayout"):
        return False
    a, b = eqn.inputs[0].type, eqn.out.type
    return a.layout == b.layout and (a.layout.is_default or a.shape == b.shape)


def pack(x: Value, read: str, out: Value, write: str, epi: Epilogue | None, where: Where) -> Launch:
    """Space-to-depth of an image, with what `epi` makes of each element."""
    layout = out.type.layout
    n, c, h, w = out.type.shape
    per_block = c * layout.s2d**2
    wide = gcd(per_block, 16)  # elements a thread: 32 bytes of bf16
    vectors = layout.numel(out.type.shape) // wide
    constants = {
        "N": n, "C": c, "H": h, "W": w, **strides("X", x.type), "B": layout.s2d, "V": wide,
        "BLOCK": PACKED, "EPILOGUE": source(epi),
    }  # fmt: skip
    refs = (Ref(read, x.type.dtype.name), Ref(write, out.type.dtype.name))
    return make(
        "space_to_depth", "pack", (*refs, arguments(epi)), constants, (cdiv(vectors, PACKED),),
        reads=(read,), writes=(write,), epilogues=(epi,), bytes=x.type.bytes + out.type.bytes,
        where=where,
    )  # fmt: skip


def turns(a: TensorType, b: TensorType) -> bool:
    """Whether two orders of one tensor are a matrix of one row an image, and its transpose."""
    if b.layout.order != "hwcn" or a.layout.order == "hwcn":
        return False
    return a.layout.stored(a.shape) == (b.shape[0], *b.layout.stored(b.shape)[:-1])


def _transpose(eqn: Eqn, name: Name) -> Launch:
    a, b = eqn.inputs[0].type, eqn.out.type
    rows = a.shape[0]
    columns = a.layout.numel(a.shape) // rows
    c = adjusted("transpose", Config(tile(rows, 128), tile(columns, 32)))
    constants = {"ROWS": rows, "COLS": columns, "BM": c.BM, "BN": c.BN}
    refs = (Ref(name(eqn.inputs[0]), a.dtype.name), Ref(name(eqn.out), b.dtype.name))
    return make(
        "transpose", "pack", refs, constants, (cdiv(columns, c.BN), cdiv(rows, c.BM)),
        reads=(refs[0].name,), writes=(refs[1].name,), num_warps=c.num_warps,
        bytes=a.bytes + b.bytes, where=eqn.where,
    )  # fmt: skip


def run_move(eqn: Eqn, name: Name) -> list[Step]:
    """The steps of one of MOVES."""
    if is_view(eqn):
        return []
    if eqn.op == "relayout" and turns(eqn.inputs[0].type, eqn.out.type):
        return [_transpose(eqn, name)]
    if eqn.out.type.layout.s2d:
        (x,) = eqn.inputs
        return [pack(x, name(x), eqn.out, name(eqn.out), None, eqn.where)]
    if eqn.op == "full":
        return [Fill(name(eqn.out), eqn.attrs.value)]  # type: ignore[attr-defined]
    out, into = eqn.out.type, name(eqn.out)
    if eqn.op == "relayout":
        return [_copy(eqn, name(eqn.inputs[0]), into, eqn.inputs[0].type, out, out.shape)]
    if eqn.op == "reshape":
        raise UnsupportedOpError(
            f"reshape {eqn.inputs[0].type} to {out} is no view", **eqn.where.located,
            help="relayout to row-major first",
        )  # fmt: skip
    if eqn.op == "pad":
        a, x = eqn.attrs, eqn.inputs[0]
        first = sum(b * s for b, s in zip(a.before, out.strides, strict=True))  # type: ignore[attr-defined]
        copy = _copy(eqn, name(x), into, x.type, out, x.type.shape, target=first)
        return [Fill(into, a.value), copy]  # type: ignore[attr-defined]
    axis = eqn.attrs.axis  # type: ignore[attr-defined]
    if eqn.op == "concat":
        steps, start = [], 0
        for v in eqn.inputs:
            origin = start * out.strides[axis]
            steps.append(_copy(eqn, name(v), into, v.type, out, v.type.shape, target=origin))
            start += v.type.shape[axis]
        return list(steps)
    source = eqn.inputs[0].type
    start = eqn.attrs.start  # type: ignore[attr-defined]
    if eqn.op == "slice":
        origin = start * source.strides[axis]
        return [_copy(eqn, name(eqn.inputs[0]), into, source, out, out.shape, source=origin)]
    origin = start * out.strides[axis]
    copy = _copy(eqn, name(eqn.inputs[0]), into, source, out, source.shape, target=origin)
    return [Fill(into, 0.0), copy]


def _copy(
    eqn: Eqn, read: str, write: str, a: TensorType, b: TensorType, shape: tuple[int, ...],
    *, source: int = 0, target: int = 0,
) -> Launch:  # fmt: skip
    """b[target + ...] = a[source + ...] over `shape`, each side with its own strides."""
    if len(shape) > 4:
        if a.layout != ROW or b.layout != ROW:
            raise UnsupportedOpError(
                f"{eqn.op} over {len(shape)} dimensions from {a} to {b}: at most 4 in a layout",
                **eqn.where.located, help="relayout to row-major first",
            )  # fmt: skip
        a, b, shape = _merged(eqn, a, b, shape)
    w = Writer(Index(shape), {})
    pointer = w.pointer(read, a)
    w.reads.append(read)
    zero = "0.0" if a.dtype.is_float else "0"
    value = w.let(f"tl.load({pointer} + {w.at(a, source)}, mask=mask, other={zero})")
    w.store(value, write, b, target)
    epi = w.finish(f"{eqn.op} {a} -> {b}")
    return pointwise_launch(
        epi, (*shape, 1, 1, 1, 1)[:4], b.layout.order == "nhwc", where=eqn.where,
        bytes=prod(shape) * 2 * a.dtype.itemsize,
    )  # fmt: skip


def pointwise_launch(
    epi: Epilogue, space: tuple[int, ...], nhwc: bool = False, **rest: Any
) -> Launch:
    """The `elementwise` kernel over an index space of four axes."""
    c = adjusted("elementwise", by_block(prod(space)))
    constants: dict[str, Any] = {f"D{d}": s for d, s in enumerate(space)}
    constants |= {"NHWC": nhwc, "BLOCK": c.BLOCK, "EPILOGUE": epi.source}
    return make(
        "elementwise", "elementwise", (epi.args,), constants, (-(-prod(space) // c.BLOCK),),
        epilogues=(epi,), num_warps=c.num_warps, **rest,
    )  # fmt: skip


def _merged(
    eqn: Eqn, a: TensorType, b: TensorType, shape: tuple[int, ...]
) -> tuple[TensorType, TensorType, tuple[int, ...]]:
    """Row-major operands with equal inner axes joined, until four dimensions are left."""
    sa, sb, s = list(a.shape), list(b.shape), list(shape)
    at = len(s) - 2
    while len(s) > 4 and at >= 0:
        if sa[at + 1] == sb[at + 1] == s[at + 1]:
            for sizes in (sa, sb, s):
                sizes[at : at + 2] = [sizes[at] * sizes[at + 1]]
        at -= 1
    if len(s) > 4:
        raise UnsupportedOpError(
            f"{eqn.op} from {a} to {b}: axes of equal size are joined, and {len(s)} are left where"
            " a kernel indexes 4", **eqn.where.located, help="merge dimensions by a reshape first",
        )  # fmt: skip
    return a.with_shape(tuple(sa)), b.with_shape(tuple(sb)), tuple(s)
