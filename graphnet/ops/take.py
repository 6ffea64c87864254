"""The batch of a step, drawn on the device from a data set that lies there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphnet.errors import DTypeError, ShapeError
from graphnet.ir.op import Attrs, Op, register
from graphnet.ir.types import TensorType, f32, i32, i64

SLOT = 4  # a hyper-parameter stands in 16 bytes: kernels expect pointers that are so aligned
LEVELS = 256  # values of a byte


@dataclass(frozen=True)
class TakeAttrs(Attrs):
    """batch: rows of the result."""

    batch: int = 1


@register
class Take(Op):
    """(x, labels, index, live, epoch, hypers) from images [N, C, H, W], labels [N], orders [R, N],
    place [3], step, table [T, K] and, for bytes that become fp32, levels [C, 256].

    place is (s, c, e): at step s epoch e stood at sample c of its order. Batch follows batch from
    there, the last one of an epoch may be smaller, and the next epoch begins at its first sample:
    so `step` says which epoch it is now and at which sample, `first`, its batch begins. Epoch k
    goes by row k mod R of the orders. The batch has live = min(batch, N - first) rows; row r is the
    image and the label at order[first + r], which is its index; rows behind the last one are zeros,
    their labels and indices 0. A byte v of channel k becomes levels[k, v]: whatever normalization
    made the levels, the values are its own in every bit. hypers [K, 4] is row step mod T of the
    table, each number four times.
    """

    name = "take"
    attrs_type = TakeAttrs
    kernel = "take"
    optional = (2, 3, 4)

    def infer(self, attrs: TakeAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        if len(ins) not in (6, 7):
            raise ShapeError(f"take has 6 or 7 operands, got {len(ins)}")
        images, labels, orders, place, step, table, *levels = ins
        rows = images.shape[:1]
        if len(images.shape) < 2 or labels.shape != rows or orders.shape[1:] != rows:
            raise ShapeError(f"take: {labels} and {orders} are not one for each of {images}")
        if place.shape != (3,) or step.shape != () or len(table.shape) != 2:
            raise ShapeError(f"take: {place}, {step}, {table} are no place, counter and table")
        if any(t.dtype != i64 for t in (labels, orders, place, step)):
            raise DTypeError("take has labels, orders, place and step as i64")
        if levels and (images.dtype.name, levels[0].shape) != ("u8", (images.shape[1], LEVELS)):
            raise ShapeError(f"take: {levels[0]} are no levels of {images}")
        if attrs.batch < 1:
            raise ShapeError(f"take draws at least 1 row, not {attrs.batch}")
        dtype = levels[0].dtype if levels else images.dtype
        scalar = TensorType(i64, ())
        return (
            TensorType(dtype, (attrs.batch, *images.shape[1:])), TensorType(i64, (attrs.batch,)),
            TensorType(i64, (attrs.batch,)), TensorType(i32, ()), scalar,
            TensorType(f32, (table.shape[1], SLOT)),
        )  # fmt: skip

    def reference(self, attrs: TakeAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        images, labels, orders, place, step, table, *levels = args
        start, first, epoch = place.tolist()
        n, batch, done = len(images), attrs.batch, int(step) - start
        if done < (rest := -(-(n - first) // batch)):
            first += done * batch
        else:
            whole, at = divmod(done - rest, -(-n // batch))
            epoch, first = epoch + 1 + whole, at * batch
        rows = orders[epoch % len(orders), first : first + batch]
        live, dead = len(rows), batch - len(rows)
        x = images.index_select(0, rows)
        if levels:
            channel = LEVELS * torch.arange(images.shape[1], device=x.device)
            value = x.flatten(2).long() + channel[:, None]
            x = levels[0].flatten()[value].reshape(x.shape)
        y, hypers = labels[rows], table[int(step) % len(table)]
        if dead:
            x = torch.cat((x, x.new_zeros(dead, *x.shape[1:])))
            y, rows = (torch.cat((t, t.new_zeros(dead))) for t in (y, rows))
        return (
            x, y, rows, torch.tensor(live, dtype=torch.int32, device=x.device),
            torch.tensor(epoch, device=x.device), hypers[:, None].expand(-1, SLOT),
        )  # fmt: skip

    def flops(
        self, attrs: TakeAttrs, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return 0
