"""Rows of the table for the batch that is drawn on the device, written out image by image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphnet.ir.types import DTYPES, TensorType, f32, i64
from graphnet.ops.take import TakeAttrs
from tests.case import Case, Tensors

START = 2**33  # the step of `place`, beyond 32 bits


def _expected(batch: int) -> Callable[..., Any]:
    def run(images: Any, labels: Any, orders: Any, place: Any, step: Any, table: Any,
            *levels: Any) -> Any:  # fmt: skip
        at, cursor, epoch = place.tolist()
        while at < int(step):  # batch by batch
            at, cursor = at + 1, cursor + batch
            if cursor >= len(images):
                epoch, cursor = epoch + 1, 0
        rows = orders[epoch % len(orders)][cursor : cursor + batch].tolist()
        x = torch.zeros(batch, *images.shape[1:], dtype=levels[0].dtype if levels else images.dtype)
        y, index = torch.zeros(2, batch, dtype=torch.int64)
        for r, row in enumerate(rows):
            y[r], index[r] = labels[row], row
            for c in range(images.shape[1]):
                x[r, c] = levels[0][c][images[row, c].long()] if levels else images[row, c]
        live = torch.tensor(len(rows), dtype=torch.int32)
        hypers = torch.stack([table[int(step) % len(table)]] * 4, 1)
        return x, y, index, live, torch.tensor(epoch), hypers

    return run


def _draw(ahead: int, cursor: int) -> Callable[[Case, torch.Generator, torch.dtype], Tensors]:
    def draw(c: Case, g: torch.Generator, dtype: torch.dtype) -> Tensors:
        images, table = c.ins[0], c.ins[5]
        n = images.shape[0]
        values = torch.randint(0, 256, images.shape, generator=g)
        real = lambda *shape: torch.randn(shape, generator=g).to(dtype)
        return [
            values.to(torch.uint8) if images.dtype.name == "u8" else values.to(dtype),
            torch.randint(0, 10, (n,), generator=g),
            torch.stack([torch.randperm(n, generator=g) for _ in range(c.ins[2].shape[0])]),
            torch.tensor([START, cursor, 7]), torch.tensor(START + ahead), real(*table.shape),
            *(real(*t.shape) for t in c.ins[6:]),
        ]  # fmt: skip

    return draw


#   note, images, dtype, batch, levels, orders, steps since the place was written, its sample
ROWS: list[tuple[str, tuple[int, ...], str, int, bool, int, int, int]] = [
    ("bytes", (9, 3, 5, 7), "u8", 4, False, 1, 1, 0),
    ("levels", (9, 3, 5, 7), "u8", 4, True, 1, 0, 3),
    ("last", (11, 1, 9, 8), "u8", 4, True, 2, 2, 0),  # three of four rows
    ("float", (5, 2, 3, 4), "f32", 2, False, 2, 2, 0),  # one of two rows
    ("wide", (6, 1, 40, 41), "u8", 3, True, 1, 1, 0),  # an image takes two programs
    ("vectors", (7, 12), "f32", 3, False, 1, 1, 1),
    ("next", (9, 1, 3, 3), "u8", 4, True, 2, 2, 1),  # the first batch of the next epoch
    ("later", (9, 1, 3, 3), "u8", 4, True, 3, 12, 5),  # the last one of the fourth
    ("small", (3, 1, 3, 3), "u8", 4, True, 2, 5, 0),  # an epoch is one batch, not a full one
]


def take_rows() -> list[Case]:
    out = []
    for note, shape, kind, batch, levels, orders, ahead, cursor in ROWS:
        each, scalar = TensorType(i64, shape[:1]), TensorType(i64, ())
        ins = [
            TensorType(DTYPES[kind], shape), each, TensorType(i64, (orders, *shape[:1])),
            TensorType(i64, (3,)), scalar, TensorType(f32, (8, 3)),
        ]  # fmt: skip
        ins += [TensorType(f32, (shape[1], 256))] if levels else []
        out.append(
            Case("take", tuple(ins), _expected(batch), TakeAttrs(batch), note,
                 _draw(ahead, cursor), exact=True)
        )  # fmt: skip
    return out
