"""Sums that no anchor holds: the norm of all gradients and the gradient of a broadcast operand,
each cut into parts that a second launch adds in order, and softmax, whose rows fit in registers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from graphnet.errors import UnsupportedOpError
from graphnet.ir.graph import Eqn, Value
from graphnet.lowering.launch.choice import adjusted
from graphnet.lowering.launch.codegen import Ref
from graphnet.lowering.launch.config import PROCESSORS, cdiv, next_power
from graphnet.lowering.launch.pool import by_block
from graphnet.lowering.launch.steps import Step, make
from graphnet.lowering.launch.sync_batch_norm import gather_stats
from graphnet.ops.reduce import aligned

Name = Callable[[Value], str]
TILE = 2048  # elements a program adds at once


def global_norm(eqn: Eqn, name: Name) -> list[Step]:
    """Partial sums of squares of each operand into one workspace, and their ordered sum."""
    sizes = [v.type.numel for v in eqn.inputs]
    block = adjusted("elementwise", by_block(max(sizes))).BLOCK
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


def sum_to(eqn: Eqn, name: Name) -> list[Step]:
    """The sum over the axes along which the result is 1: tiles of summed by kept elements."""
    x, out = eqn.inputs[0], eqn.out
    rank = len(x.type.shape)
    if rank > 4:
        raise UnsupportedOpError(
            f"sum_to over the {rank} dimensions of {x.type}: kernels index at most 4",
            **eqn.where.located, help="flatten the tensor to 4 dimensions or fewer",
        )  # fmt: skip
    shape = (*x.type.shape, 1, 1, 1, 1)[:4]
    steps = (*x.type.strides, 0, 0, 0, 0)[:4]
    kept = (*aligned(out.type.shape, rank), 1, 1, 1, 1)[:4]
    summed = tuple(1 if k > 1 else s for k, s in zip(kept, shape, strict=True))
    count, terms = prod(kept), prod(summed)
    bo = min(64, next_power(count))
    br = min(TILE // bo, next_power(terms))
    parts = min(cdiv(terms, br), max(1, 2 * PROCESSORS // cdiv(count, bo)))
    sizes = {f"{k}{d}": v for k, sh in (("K", kept), ("R", summed)) for d, v in enumerate(sh)}
    constants = {
        **sizes, **{f"S{d}": s for d, s in enumerate(steps)}, "PARTS": parts, "BO": bo, "BR": br
    }  # fmt: skip
    source, target = Ref(name(x), x.type.dtype.name), Ref(name(out), out.type.dtype.name)
    work = Ref(f".sums{out}", "f32") if parts > 1 else target
    scratch = ((work.name, 4 * parts * count),) if parts > 1 else ()
    first = make(
        "axis_sum", "reduce", (source, work), constants, (cdiv(count, bo), parts),
        reads=(source.name,), writes=(work.name,), scratch=scratch, flops=x.type.numel,
        bytes=x.type.bytes + 4 * parts * count, where=eqn.where,
    )  # fmt: skip
    if parts == 1:
        return [first]
    block = min(256, next_power(count))
    last = make(
        "ordered_sum", "reduce", (work, target), {"PARTS": parts, "COUNT": count, "BLOCK": block},
        (cdiv(count, block),), reads=(work.name,), writes=(target.name,), flops=parts * count,
        bytes=4 * (parts + 1) * count, where=eqn.where,
    )  # fmt: skip
    return [first, last]


MOST_IN_ROW = 4096


def softmax(eqn: Eqn, name: Name) -> list[Step]:
    """softmax, log_softmax and their gradients: rows along an axis, as many as the others have
    elements."""
    out = eqn.out.type
    axis = eqn.attrs.axis  # type: ignore[attr-defined]
    order = [0, axis, *(d for d in range(1, len(out.shape)) if d != axis)]
    n, length, h, w = (*(out.shape[d] for d in order), 1, 1)[:4]
    if length > MOST_IN_ROW:
        raise UnsupportedOpError(
            f"{eqn.op} over {length} elements: a row is kept in registers, at most {MOST_IN_ROW}",
            **eqn.where.located,
            help="target='cpu' runs every op on torch's kernels",
        )  # fmt: skip
    bc = next_power(length)
    bp = max(1, min(TILE // bc, next_power(n * h * w)))
    pixels = n * h * w
    constants: dict[str, Any] = {"C": length, "H": h, "W": w, "PIXELS": pixels}
    values = (*eqn.inputs, eqn.out)
    for prefix, v in zip("XY" if len(values) == 2 else "YDX", values, strict=True):
        steps = (*(v.type.strides[k] for k in order), 0, 0)[:4]
        constants |= {f"{prefix}S{d}": s for d, s in enumerate(steps)}
    constants |= {"LOG": eqn.op.startswith("log"), "BP": bp, "BC": bc}
    refs = tuple(Ref(name(v), v.type.dtype.name) for v in values)
    return [
        make(
            eqn.op.removeprefix("log_"), "softmax", refs, constants, (cdiv(pixels, bp),),
            reads=tuple(r.name for r in refs[:-1]), writes=(refs[-1].name,),
            flops=4 * out.numel, bytes=sum(v.type.bytes for v in values), where=eqn.where,
        )
    ]  # fmt: skip


SUMS: Mapping[str, Callable[[Eqn, Name], list[Step]]] = {
    "global_norm": global_norm, "sum_to": sum_to, "batch_norm_gather_stats": gather_stats,
    **dict.fromkeys(
        ("softmax", "softmax_grad", "log_softmax", "log_softmax_grad"), softmax
    ),
}  # fmt: skip
