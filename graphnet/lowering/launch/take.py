"""The launch that draws a batch from a data set on the device."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from graphnet.ir.graph import Eqn, Value
from graphnet.lowering.launch.choice import adjusted
from graphnet.lowering.launch.codegen import Ref
from graphnet.lowering.launch.config import cdiv
from graphnet.lowering.launch.pool import by_block
from graphnet.lowering.launch.steps import Launch, make
from graphnet.ops.take import LEVELS, SLOT


def take(eqn: Eqn, name: Callable[[Value], str]) -> Launch:
    """What it reads of the data set are the rows of one batch."""
    images, labels, orders, place, step, table, *levels = eqn.inputs
    x, y, index, live, epoch, hypers = eqn.outputs
    batch = eqn.out.type.shape[0]
    count, channels, *pixels = images.type.shape
    each = channels * prod(pixels)
    block = adjusted("elementwise", by_block(each)).BLOCK
    constants = {
        "N": count, "BATCH": batch, "C": channels, "HW": prod(pixels),
        "ORDERS": orders.type.shape[0], "ROWS": table.type.shape[0], "K": table.type.shape[1],
        "SLOT": SLOT, "LEVELS": LEVELS if levels else 0, "INDEX": index is not None,
        "LIVE": live is not None, "EPOCH": epoch is not None, "BLOCK": block,
    }  # fmt: skip
    ref = lambda v: None if v is None else Ref(name(v), v.type.dtype.name)
    source = [images, labels, orders, place, step, table, levels[0] if levels else None]
    written = sum(v.type.bytes for v in eqn.results)
    moved = batch * (each * images.type.dtype.itemsize + 16) + written
    return make(
        "take", "take", tuple(ref(v) for v in (*source, x, y, index, live, epoch, hypers)),
        constants, (batch * cdiv(each, block),), reads=tuple(name(v) for v in eqn.inputs),
        writes=tuple(name(v) for v in eqn.results), bytes=moved, where=eqn.where,
    )  # fmt: skip
