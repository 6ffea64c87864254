"""Rows of the table for augmentation, and each transform written out for one pixel at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from graphnet.ir.types import DTYPES, TensorType, i64
from graphnet.ops.augment import Augment
from tests.case import Case, Tensors
from tests.philox import philox_scalar

SEED, EPOCH, FAR = -12345678901, 3, 2**33 + 7
COMPONENTS = (0.3, 0.1, 0.01, 0.2, -0.2, 0.1, 0.1, 0.05, 0.2)


def words_of(a: Augment, index: int, epoch: int, seed: int) -> list[int]:
    """The sixteen random words of a sample."""
    key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    return [
        w for k in range(4)
        for w in philox_scalar([k, index & 0xFFFFFFFF, epoch, a.stream], key)
    ]  # fmt: skip


def one_image(a: Augment, image: Any, index: int, epoch: int, seed: int) -> list:
    """[C][H][W] of an image f64[C, h, w] with values in [0, 1], as the lecture's formulas say."""
    words = words_of(a, index, epoch, seed)
    unit = [(w >> 8) / 2**24 for w in words]
    sign = [2 * u - 1 for u in unit]
    channels, high, wide = image.shape
    height, width = a.size

    # Where the window lies.
    tall, broad = a.seen or (high, wide)  # the image as it is seen
    spare_down, spare_across = tall + 2 * a.pad - height, broad + 2 * a.pad - width
    top, left = spare_down // 2, spare_across // 2
    if a.crop:
        top = ((words[1] >> 16) * (spare_down + 1) >> 16) - a.pad
        left = ((words[2] >> 16) * (spare_across + 1) >> 16) - a.pad
    down = top + height / 2 + sign[8] * a.translate * height
    across = left + width / 2 + sign[9] * a.translate * width

    # What happened to the picture, first to last: magnified, sheared, turned. Undone backwards.
    least, most = a.scale
    zoom = math.exp(math.log(least) + unit[3] * (math.log(most) - math.log(least)))
    aspect = a.stretch ** sign[4]
    zoom_x, zoom_y = zoom * math.sqrt(aspect), zoom / math.sqrt(aspect)
    angle, slope = math.radians(sign[5] * a.rotate), sign[6] * math.tan(math.radians(a.shear))
    bend, corner = sign[7] * a.lens, math.hypot(width / 2, height / 2)

    def stored(c: int, i: int, j: int) -> float:
        if a.border == "edge" or a.seen:
            i, j = min(max(i, 0), high - 1), min(max(j, 0), wide - 1)
        inside = 0 <= i < high and 0 <= j < wide
        return float(image[c, i, j]) if inside else 0.0

    def between(c: int, y: float, x: float) -> float:
        if not a.seen:
            return linear(c, y, x)
        out = [max(0.0, -at, at - (n - 1)) for at, n in ((y, tall), (x, broad))]
        part = 1.0 if a.border == "edge" else math.prod(max(0.0, 1 - d) for d in out)
        return part * linear(c, (y + 0.5) * high / tall - 0.5, (x + 0.5) * wide / broad - 0.5)

    def linear(c: int, y: float, x: float) -> float:
        i, j = math.floor(y), math.floor(x)
        above = stored(c, i, j) * (j + 1 - x) + stored(c, i, j + 1) * (x - j)
        below = stored(c, i + 1, j) * (j + 1 - x) + stored(c, i + 1, j + 1) * (x - j)
        return above * (i + 1 - y) + below * (y - i)

    normal = []
    for k in (12, 14):
        length = math.sqrt(-2 * math.log(1 - unit[k]))
        normal += [length * math.cos(2 * math.pi * unit[k + 1]),
                   length * math.sin(2 * math.pi * unit[k + 1])]  # fmt: skip

    def pixel(c: int, i: int, j: int) -> float:
        x, y = j + 0.5 - width / 2, i + 0.5 - height / 2
        if (words[0] >> 8) < int(a.flip * 2**24):
            x = -x
        radius = math.hypot(x, y) / corner
        x, y = x * (1 + bend * radius**2), y * (1 + bend * radius**2)
        x, y = (math.cos(-angle) * x - math.sin(-angle) * y,
                math.sin(-angle) * x + math.cos(-angle) * y)  # fmt: skip
        x = (x - slope * y) / zoom_x
        y = y / zoom_y
        value = between(c, down + y - 0.5, across + x - 0.5)
        mean, std = (v[c if len(v) > 1 else 0] for v in (a.mean, a.std))
        value = (value - mean) * (1 + sign[11] * a.contrast) + sign[10] * a.brightness
        if a.pca:
            row = a.components[c * channels : (c + 1) * channels]
            value += a.pca * sum(p * n for p, n in zip(row, normal, strict=False))
        return value / std

    rows, columns = range(height), range(width)
    return [[[pixel(c, i, j) for j in columns] for i in rows] for c in range(channels)]


def expected(a: Augment) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor, index: torch.Tensor, epoch: torch.Tensor, seed: torch.Tensor) -> Any:
        images = x.double() / 255 if a.source == "u8" else x.double()
        rows = zip(images, index.tolist(), strict=True)
        out = [one_image(a, image, k, int(epoch), int(seed)) for image, k in rows]
        return torch.tensor(out, dtype=torch.float64)

    return run


def _draw(c: Case, g: torch.Generator, dtype: torch.dtype) -> Tensors:
    """Bytes, or the same values in [0, 1]; places in a data set beyond 32 bits."""
    kind, index = c.ins[0], c.ins[1]
    x = torch.randint(0, 256, kind.shape, generator=g)
    images = x.to(torch.uint8) if kind.dtype.name == "u8" else (x / 255).to(dtype)
    places = FAR + 3 * torch.arange(index.shape[0])
    return [images, places, torch.tensor(EPOCH), torch.tensor(SEED)]


ROWS: list[tuple[str, tuple[int, ...], tuple[int, int], dict[str, Any]]] = [
    ("plain", (2, 1, 7, 6), (7, 6), {}),
    ("centre", (2, 3, 9, 8), (6, 6), {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}),
    ("flip", (5, 1, 6, 7), (6, 7), {"flip": 0.5}),
    ("crop", (4, 3, 9, 8), (6, 5), {"crop": True, "flip": 0.5}),
    ("pad", (4, 1, 6, 7), (6, 7), {"crop": True, "pad": 2}),
    ("scale", (3, 1, 8, 7), (8, 7), {"scale": (0.7, 1.4)}),
    ("stretch", (3, 1, 8, 7), (8, 7), {"stretch": 1.5}),
    ("rotate", (3, 1, 8, 7), (8, 7), {"rotate": 180.0}),
    ("shear", (3, 1, 8, 7), (8, 7), {"shear": 30.0}),
    ("translate", (3, 1, 8, 7), (8, 7), {"translate": 0.3}),
    ("lens", (3, 1, 8, 7), (8, 7), {"lens": 0.4}),
    ("edge", (3, 1, 8, 7), (8, 7), {"rotate": 40.0, "border": "edge"}),
    ("brightness", (3, 3, 4, 5), (4, 5), {"brightness": 0.4}),
    ("contrast", (3, 3, 4, 5), (4, 5), {"contrast": 0.5, "mean": (0.5,), "std": (0.25,)}),
    ("pca", (3, 3, 4, 5), (4, 5), {"pca": 0.5, "components": COMPONENTS}),
    ("float", (3, 1, 8, 7), (8, 7), {"source": "f32", "rotate": 20.0, "mean": (0.5,)}),
    ("resize", (3, 3, 4, 3), (9, 8), {"seen": (9, 8)}),
    ("shrink", (3, 1, 9, 8), (5, 4), {"seen": (5, 6), "border": "edge", "flip": 0.5}),
    ("resize and warp", (3, 1, 5, 4), (7, 6),
     {"seen": (10, 9), "crop": True, "rotate": 20.0, "translate": 0.3, "scale": (0.8, 1.2)}),
    ("mixture", (3, 3, 9, 8), (7, 6),
     {"crop": True, "flip": 0.5, "scale": (0.8, 1.2), "stretch": 1.2, "rotate": 15.0,
      "shear": 10.0, "translate": 0.1, "lens": 0.1, "brightness": 0.1, "contrast": 0.2,
      "pca": 0.1, "components": COMPONENTS, "mean": (0.5,), "std": (0.25,)}),
]  # fmt: skip


def augment_rows() -> list[Case]:
    scalar = TensorType(i64, ())
    rows = []
    for note, shape, size, kw in ROWS:
        a = Augment(**kw, stored=shape[1:], size=size)
        ins = (TensorType(DTYPES[a.source], shape), TensorType(i64, shape[:1]), scalar, scalar)
        rows.append(Case("augment", ins, expected(a), a, note, _draw))
    return rows
