"""Augmentation by name, what it has to know of the data, and a sheet to look at it.

    gn.Augment(crop=True, flip=0.5)    in Python
    crop,flip=0.5,scale=0.9:1.1        on the command line; a name of `PRESETS` may come first
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graphnet import disk
from graphnet.errors import CheckpointError, ConfigError, DataError
from graphnet.ops.augment import Augment
from graphnet.train.checkpoint import atomic_write
from graphnet.train.plots import write_figure

PRESETS: dict[str, dict[str, Any]] = {
    # Written characters: no mirror, small changes of shape.
    "digits": {"rotate": 10.0, "scale": (0.9, 1.1), "stretch": 1.1, "shear": 8.0,
               "translate": 0.06},
    # Small photographs: a crop out of a border of zeros.
    "cifar": {"crop": True, "pad": 4, "flip": 0.5},
    # The recipe of AlexNet; with resize=256 the crop has room.
    "photos": {"crop": True, "flip": 0.5, "brightness": 0.1, "contrast": 0.2, "pca": 0.1},
}  # fmt: skip
FILE = "augment.json"
_OF_DATA = ("mean", "std", "components", "stored", "source", "size", "seen", "stream")
SETTINGS = tuple(f.name for f in fields(Augment) if f.name not in _OF_DATA)
_SWITCHES = {"crop": True, "flip": 0.5}  # what a name alone stands for
_SAMPLE = 2000  # image files whose pixels make the principal components


def parse(text: str) -> Augment:
    """The augmentation that a text names; ConfigError lists what there is."""
    given: dict[str, Any] = {}
    for at, part in enumerate(p.strip() for p in text.split(",")):
        name, equals, value = part.partition("=")
        if at == 0 and part in PRESETS:
            given |= PRESETS[part]
        elif name not in SETTINGS or (not equals and name not in _SWITCHES):
            raise ConfigError(
                f"unknown augmentation {part!r}",
                help=f"a preset ({', '.join(PRESETS)}), then NAME=VALUE: {', '.join(SETTINGS)}",
            )
        else:
            given[name] = _value(name, value) if equals else _SWITCHES[name]
    return Augment(**given)


def _value(name: str, text: str) -> Any:
    try:
        if name == "border":
            return text
        if name == "crop":
            return {"true": True, "false": False}[text.lower()]
        if name == "scale":
            return tuple(float(v) for v in text.split(":"))
        return int(text) if name == "pad" else float(text)
    except (KeyError, ValueError):
        what = {"crop": "true or false", "scale": "LEAST:MOST", "pad": "a whole number"}
        raise ConfigError(
            f"augment: {name}={text!r}", help=f"{name} takes {what.get(name, 'a number')}"
        ) from None


# ---- what it has to know of the data --------------------------------------------------------


def known(augment: Augment, data: Any) -> Augment:
    """The augmentation with the data's mean, std, shape, type and, for `pca`, components."""
    if augment.stored:
        return augment
    kind = getattr(getattr(data, "images", None), "dtype", torch.uint8)
    source = "f32" if kind == torch.float32 else "u8"
    found = replace(
        augment, mean=tuple(data.mean), std=tuple(data.std), stored=tuple(data.stored),
        source=source, seen=(getattr(data, "seen", None) or ())[1:],
    )  # fmt: skip
    return replace(found, components=principal(data)) if augment.pca else found


def idle(augment: Augment, data: Any) -> str | None:
    """What of it can do nothing with these data, for people; or None."""
    kept = getattr(data, "seen", None) or data.stored
    if not augment.crop or augment.pad or tuple(kept) != tuple(data.shape):
        return None
    size = "x".join(map(str, data.shape[1:]))
    return (
        f"augment: the crop has no room, images of {size} for a net that takes {size}: keep image "
        "files larger (--resize), or pad=PIXELS"
    )


def principal(data: Any) -> tuple[float, ...]:
    """[C, C] by rows: column k is the k-th principal component of the pixels' colours, times the
    standard deviation along it. Values lie in [0, 1].

    Of all images in memory; of image files, of at most 2,000 that lie evenly in their order.
    """
    count = len(data) if hasattr(data, "images") else min(len(data), _SAMPLE)
    rows = np.linspace(0, len(data) - 1, count).astype(np.int64)
    channels = data.shape[0]
    sums, products, pixels = np.zeros(channels), np.zeros((channels, channels)), 0
    at_once = max(1, (1 << 22) // int(np.prod(data.stored)))  # their float64 takes 32 MiB
    for first in range(0, count, at_once):
        x = data.read(rows[first : first + at_once])
        v = x.double().div_(255) if x.dtype == torch.uint8 else x.double()
        flat = v.transpose(0, 1).reshape(channels, -1).numpy()
        sums, products = sums + flat.sum(1), products + flat @ flat.T
        pixels += flat.shape[1]
    mean = sums / max(pixels, 1)
    variances, vectors = np.linalg.eigh(products / max(pixels, 1) - np.outer(mean, mean))
    # Largest first, and each with its largest entry positive: else the sign is the library's.
    vectors = vectors[:, ::-1] * np.sqrt(np.clip(variances[::-1], 0, None))
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0)
    vectors = vectors * np.where(largest < 0, -1.0, 1.0)
    return tuple(round(float(v), 9) for v in vectors.flatten())


def save(run: Path, augment: Augment) -> None:
    """Keeps it in a run folder: the components are of the data as they were at the start."""
    about = {k: v for k, v in asdict(augment).items() if k != "stream"}
    atomic_write(run / FILE, (json.dumps(about, indent=1) + "\n").encode())


def stored(run: Path) -> Augment:
    """The augmentation that a run was started with."""
    try:
        return Augment(**json.loads(disk.read(run / FILE, 1 << 20)))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot read {run / FILE}: {why}") from None


# ---- looking at it --------------------------------------------------------------------------


def drawn(augment: Augment, data: Any, rows: Sequence[int], epoch: int, seed: int) -> torch.Tensor:
    """f32[N, C, H, W] in [0, 1]: what the net would see of some images, before normalising."""
    from graphnet.ir.op import get_op

    a = known(augment, data).sized((len(rows), *data.shape))
    scalars = (torch.tensor(v, dtype=torch.int64) for v in (epoch, seed))
    x = data.read(rows)
    (y,) = get_op("augment").cpu(a, x, torch.tensor(list(rows)), *scalars)
    mean, std = (
        torch.tensor(a.per_channel(n, y.shape[1])).view(1, -1, 1, 1) for n in ("mean", "std")
    )
    return (y.float() * std + mean).clamp(0, 1)


def sheet(
    path: Path, augment: Augment, data: Any, *, images: int = 8, draws: int = 10, seed: int = 0
) -> int:
    """A contact sheet: each row an image as it is stored, then what each epoch sees of it.

    The number of images in it: fewer where the data has fewer, or files that are no image.
    """
    from matplotlib.figure import Figure

    rows = np.unique(np.linspace(0, len(data) - 1, images).astype(np.int64)).tolist()
    x = data.read(rows)
    rows = [r for r in rows if r not in getattr(data, "quarantined", ())]
    if not rows:
        raise DataError(f"of the {images} files of {data.name} to be shown, none is an image")
    plain = x.float() / 255 if x.dtype == torch.uint8 else x.clamp(0, 1)
    a = known(augment, data)
    columns = [plain, *(drawn(a, data, rows, epoch, seed) for epoch in range(draws))]
    figure = Figure(figsize=((draws + 1) * 0.95, len(rows) * 0.95 + 0.5))
    grid = figure.subplots(len(rows), draws + 1, squeeze=False)
    for k, line in enumerate(grid):
        for j, axes in enumerate(line):
            pixels = columns[j][k].permute(1, 2, 0).numpy()
            axes.imshow(pixels if pixels.shape[2] == 3 else pixels[:, :, 0], cmap="gray", vmin=0,
                        vmax=1, interpolation="nearest")  # fmt: skip
            axes.set_xticks([])
            axes.set_yticks([])
            if k == 0:
                axes.set_title("stored" if j == 0 else f"epoch {j}", fontsize=8)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.94, 0.06, 0.06)
    write_figure(path, figure)
    return len(rows)
