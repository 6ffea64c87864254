"""Data sets: `load("digits", "train")`, and the batches of an epoch.

    mnist:DIR        the IDX files, .gz or unpacked
    digits           scikit-learn's 8x8 digits, upscaled to 28x28
    synthetic        seeded random classes, any shape
    imagefolder:DIR  DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg (or val)

The readers stand in readers.py; here is what they give, and how it is cut into batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from graphnet.errors import ConfigError, DataError

SPECS = ("mnist:DIR", "digits", "synthetic", "imagefolder:DIR")
SPLITS = ("train", "test")
_NORMALISE_AT_ONCE = 512 << 20  # bytes of fp32 up to which a whole set is normalised up front


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images with labels, in memory.

    images     uint8 (read as value / 255) or float32, [N, C, H, W]
    labels     int64 [N]
    classes    names of the classes; empty where they are not known
    mean, std  per channel, of the values in [0, 1]; batches hold (value - mean) / std
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: Sequence[str] = ()
    name: str = "tensors"
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype not in (torch.uint8, torch.float32) or images.ndim != 4:
            raise DataError(
                f"{self.name}: images are {images.dtype} of shape {list(images.shape)}",
                help="use uint8 or float32, [N, C, H, W]",
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DataError(
                f"{self.name}: {len(images)} images with labels {labels.dtype} of shape "
                f"{list(labels.shape)}",
                help="labels are int64, one for each image",
            )
        if not len(images):
            raise DataError(f"{self.name}: the data set is empty")
        for what in ("mean", "std"):
            if len(getattr(self, what)) not in (1, images.shape[1]):
                raise DataError(
                    f"{self.name}: {len(getattr(self, what))} values of {what} for "
                    f"{images.shape[1]} channels"
                )
        if not all(s > 0 for s in self.std):
            raise DataError(f"{self.name}: std {tuple(self.std)} has a value that is not positive")
        if self.classes and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            raise DataError(
                f"{self.name}: labels from {int(labels.min())} to {int(labels.max())} with "
                f"{len(self.classes)} classes"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image."""
        return tuple(self.images.shape[1:])

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        """Rows of `images` as the net sees them: float32, (value - mean) / std."""
        x = images.float().div_(255) if images.dtype == torch.uint8 else images.clone()
        mean, std = (torch.tensor(v).reshape(1, -1, 1, 1) for v in (self.mean, self.std))
        return x.sub_(mean).div_(std)


def load(spec: str, split: str, *, shape: Sequence[int] | None = None) -> Dataset:
    """Reads a data set.

    spec   one of `SPECS`
    split  "train" or "test"
    shape  (C, H, W): what synthetic makes and imagefolder resizes to; another set must have it
    DataError for an unknown spec, and for files that are missing, damaged or do not fit.
    """
    from graphnet.train import readers

    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}", help=f"one of {', '.join(SPLITS)}")
    kind, colon, folder = spec.partition(":")
    usage = f"one of {', '.join(SPECS)}"
    if kind in ("mnist", "imagefolder"):
        if not folder:
            raise DataError(f"data {spec!r} names no folder", help=f"use {kind}:DIR")
        if kind == "imagefolder":
            return readers.imagefolder(folder, split, shape)
        data = readers.mnist(folder, split)
    elif kind in ("digits", "synthetic") and not colon:
        data = readers.digits(split) if kind == "digits" else readers.synthetic(split, shape)
    else:
        raise DataError(f"unknown data {spec!r}", help=usage)
    if shape is not None and tuple(shape) != data.shape:
        raise DataError(
            f"the images of {spec} are {'x'.join(map(str, data.shape))}, "
            f"the net takes {'x'.join(map(str, shape))}",
            help="use data of that size, or imagefolder:DIR, which resizes",
        )
    return data


def permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of the n samples in an epoch: the same for ever, on every machine."""
    # NumPy keeps the raw stream of a bit generator fixed, but may change Generator.permutation.
    # A list would pass a large seed through float64, where neighbours are one.
    key = np.array([seed % (1 << 64), epoch], dtype=np.uint64)
    raw = np.random.Philox(key=key).random_raw(n)
    return torch.from_numpy(np.argsort(raw, kind="stable"))


class Batches:
    """The batches (x f32 normalised NCHW, y i64) of a Dataset, one epoch per iteration.

    The order depends on seed and epoch alone. The last batch may be smaller. After a whole
    iteration comes the next epoch; one that was left early starts over. `state()` between two
    batches tells what is left, and `load_state` makes the next iteration begin there.
    """

    def __init__(self, dataset: Dataset, batch: int, seed: int = 0, shuffle: bool = True) -> None:
        if not isinstance(batch, int) or batch < 1:
            raise ConfigError(f"batch is a positive int, not {batch!r}")
        self.dataset, self.batch, self.seed, self.shuffle = dataset, batch, seed, shuffle
        self.epoch, self._cursor = 0, 0
        self._start = 0  # where an iteration of this epoch begins: not 0 only when resuming
        self._ready: torch.Tensor | None = None

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return -(-len(self.dataset) // self.batch)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is that epoch; the place in it is kept if it was loaded."""
        if epoch != self.epoch:
            self._start = 0
        self.epoch, self._cursor = epoch, self._start

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        data, n, epoch = self.dataset, len(self.dataset), self.epoch
        if self._ready is None and data.images.numel() * 4 <= _NORMALISE_AT_ONCE:
            self._ready = data.normalised(data.images)
        order = permutation(n, self.seed, epoch) if self.shuffle else torch.arange(n)
        for at in range(self._start, n, self.batch):
            rows = order[at : at + self.batch]
            self._cursor = min(at + self.batch, n)
            whole = self._ready
            x = data.normalised(data.images[rows]) if whole is None else whole[rows]
            yield x, data.labels[rows]
        self.epoch, self._start, self._cursor = epoch + 1, 0, 0

    def state(self) -> dict[str, Any]:
        """Where the iteration stands, as JSON: epoch, samples taken, and what the order needs."""
        done = self._cursor >= len(self.dataset)
        return {
            "epoch": self.epoch + done,
            "cursor": 0 if done else self._cursor,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "samples": len(self.dataset),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes to the place of a `state()`; DataError where it is of another order or set."""
        mine = self.state()
        if missing := set(mine) - set(state):
            raise DataError(f"the state of the data lacks {', '.join(sorted(missing))}")
        for key in ("seed", "shuffle", "samples"):
            if state[key] != mine[key]:
                raise DataError(
                    f"the state was saved with {key} {state[key]!r}, this data has {mine[key]!r}",
                    help="resume with the data and the seed of the run",
                )
        epoch, cursor = state["epoch"], state["cursor"]
        if not (isinstance(epoch, int) and isinstance(cursor, int) and epoch >= 0) or not (
            0 <= cursor < len(self.dataset)
        ):
            raise DataError(f"epoch {epoch!r} with cursor {cursor!r} is no place in the data")
        self.epoch, self._start, self._cursor = epoch, cursor, cursor
