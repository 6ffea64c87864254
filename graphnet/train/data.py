"""Data sets: `load("digits", "train")`, and the batches of an epoch.

    mnist:DIR        the IDX files, .gz or unpacked
    cifar10:PATH     the binary version (a folder, or its .tar.gz), or an image folder
    digits           scikit-learn's 8x8 digits, upscaled to 28x28
    synthetic        seeded random classes, any shape
    imagefolder:DIR  DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg (or val)

The readers stand in readers.py; here is what they give, and how it is cut into batches. Image
folders are decoded while they are read: folder.py.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from graphnet.errors import ConfigError, DataError
from graphnet.train.folder import MAX_BAD, Folder, Reading, Window, normalised

SPECS = ("mnist:DIR", "cifar10:PATH", "digits", "synthetic", "imagefolder:DIR")
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

    @property
    def stored(self) -> tuple[int, ...]:
        """(C, H, W) as it is kept: no crops are cut from images in memory."""
        return self.shape

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        """Rows of `images` as the net sees them."""
        return normalised(images, self.mean, self.std)

    def levels(self) -> torch.Tensor:
        """f32[C, 256]: what a net reads for each byte of a channel."""
        channels = self.shape[0]
        every = torch.arange(256, dtype=torch.uint8).expand(1, channels, 256)
        return self.normalised(every[..., None])[0, :, :, 0]

    def read(self, rows: Sequence[int], workers: int = 0) -> torch.Tensor:
        """The images of some rows, as they are stored."""
        return self.images[torch.as_tensor(rows)]

    @classmethod
    def of(cls, images: Any, labels: Any) -> Dataset:
        """Of tensors or NumPy arrays; labels of any integer type."""
        images, labels = _tensor(images, "images"), _tensor(labels, "labels")
        if not (labels.dtype.is_floating_point or labels.dtype == torch.bool):
            labels = labels.long()
        return cls(images, labels)


def _tensor(value: Any, what: str) -> torch.Tensor:
    """What torch cannot take as it is, in NumPy's hands: another byte order, negative strides."""
    try:
        if isinstance(value, np.ndarray):
            value = value.astype(value.dtype.newbyteorder("="), copy=False)
            if any(s < 0 for s in value.strides):
                value = value.copy()
        with warnings.catch_warnings():  # an array that is only read may be read-only
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{what} of {type(value).__name__} are no numbers that a tensor holds: {error}",
            help="give arrays or tensors: uint8 or float32 images, integer labels",
        ) from None


class ClassesWarning(UserWarning):
    """A net that was trained before has another number of outputs than the data have classes."""


def check_classes(
    data: Dataset | Folder,
    outputs: int,
    *,
    old: bool = False,
    fix: Callable[[int], str] = lambda n: f"its last layer needs {n}",
    **located: Any,
) -> None:
    """DataError where a net does not have one output for each class of the data.

    old      the net is trained already: outputs that stand for no class are named in a warning
    fix      how its outputs are made so many; `located` is its last layer
    """
    least, most = int(data.labels.min()), int(data.labels.max())
    named = len(data.classes)
    if least < 0 or most >= outputs:
        raise DataError(
            f"{data.name} has labels from {least} to {most}, the net has {outputs} outputs",
            help=fix(named or most + 1) if least >= 0 else "labels begin at 0", **located,
        )  # fmt: skip
    if not named or named == outputs:
        return
    text = f"{data.name} has {named} classes, the net has {outputs} outputs"
    if not old:
        raise DataError(text, help=fix(named), **located)
    warnings.warn(f"{text}: those from {named} on stand for nothing", ClassesWarning, stacklevel=3)


def load(
    spec: str,
    split: str,
    *,
    shape: Sequence[int] | None = None,
    resize: int | None = None,
    max_bad: float = MAX_BAD,
    cache: bool = True,
    own: bool = False,
) -> Dataset | Folder:
    """Reads a data set.

    spec     one of `SPECS`
    split    "train" or "test"
    shape    (C, H, W): what synthetic makes and images in files are brought to; another set must
             have it
    resize   images in files are kept as resize x resize, and `shape` is cut from that
    max_bad  share of the image files that may be unreadable
    cache    keep decoded image files on disk
    own      leave images in files that are smaller as they are, for a net that augments
    DataError for an unknown spec, and for files that are missing, damaged or do not fit.
    """
    from graphnet.train import readers

    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}", help=f"one of {', '.join(SPLITS)}")
    kind, colon, path = spec.partition(":")
    data: Dataset | Folder
    if kind in ("mnist", "cifar10", "imagefolder"):
        if not path:
            what = "PATH" if kind == "cifar10" else "DIR"
            raise DataError(f"data {spec!r} names no folder", help=f"use {kind}:{what}")
        path = os.path.expanduser(path)  # no shell does it behind a colon
        if kind == "mnist":
            data = readers.mnist(path, split)
        else:
            read = readers.cifar10 if kind == "cifar10" else readers.imagefolder
            how: dict[str, Any] = {"max_bad": max_bad, "cache": cache, "own": own}
            data = read(path, split, shape, resize=resize, **how)
    elif kind in ("digits", "synthetic") and not colon:
        data = readers.digits(split) if kind == "digits" else readers.synthetic(split, shape)
    else:
        raise DataError(f"unknown data {spec!r}", help=f"one of {', '.join(SPECS)}")
    if resize is not None and not isinstance(data, Folder):
        raise DataError(f"{spec} is not resized", help="resize is for images in files")
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


def crops(
    n: int, seed: int, epoch: int, stored: Sequence[int], shape: Sequence[int], flip: bool
) -> Callable[[np.ndarray], list[Window]]:
    """rows -> where each is cut in this epoch, and whether it is mirrored: by seed, epoch, row."""
    key = np.array([seed % (1 << 64), epoch], dtype=np.uint64)
    # The counter starts far behind what `permutation` draws under the same key.
    words = np.random.Philox(key=key, counter=[0, 0, 0, 1]).random_raw(n)

    def place(shift: int, room: int) -> np.ndarray:
        sixteen = (words >> np.uint64(shift)) & np.uint64(0xFFFF)
        return (sixteen * np.uint64(room + 1) >> np.uint64(16)).astype(np.int64)

    tops, lefts = place(0, stored[1] - shape[1]), place(16, stored[2] - shape[2])
    mirrored = (words >> np.uint64(63)).astype(bool) & flip
    return lambda rows: list(
        zip(tops[rows].tolist(), lefts[rows].tolist(), mirrored[rows].tolist(), strict=True)
    )


def share_of(batch: int, rank: int, ranks: int) -> slice:
    """The rows of a rank in a batch of so many: the ranks fill up one after the other."""
    most = -(-batch // ranks)
    return slice(rank * most, min((rank + 1) * most, batch))


class Batches:
    """The batches (x f32 normalised NCHW, y i64) of a data set, one epoch per iteration.

    The order depends on seed and epoch alone. The last batch may be smaller. After a whole
    iteration comes the next epoch; one that was left early starts over. `state()` between two
    batches tells what is left, and `load_state` makes the next iteration begin there.

    reading  worker processes, batches ahead, pinned memory: for image files
    cut      "centre", or "random" by seed, epoch and row: where images that are stored larger than
             the net's input are cut
    flip     with "random": mirror half of them
    raw      x is what is stored, as it is: whole uint8 images, for a net that begins with its own
             augmentation
    rows     of the data set, in the batch that was given last
    cursor   samples of this epoch that were taken, by all ranks
    share    (rank, ranks): x and y are the rows of one rank, none where the last batch has too few
    """

    def __init__(
        self,
        dataset: Dataset | Folder,
        batch: int,
        seed: int = 0,
        shuffle: bool = True,
        *,
        reading: Reading = Reading(),  # noqa: B008 - immutable
        cut: str = "centre",
        flip: bool = False,
        raw: bool = False,
    ) -> None:
        if not isinstance(batch, int) or batch < 1:
            raise ConfigError(f"batch is a positive int, not {batch!r}")
        if cut not in ("centre", "random"):
            raise ConfigError(f"cut is centre or random, not {cut!r}")
        self.dataset, self.batch, self.seed, self.shuffle = dataset, batch, seed, shuffle
        self.reading, self.cut, self.flip, self.raw = reading, cut, flip, raw
        self.epoch, self.cursor, self.share = 0, 0, (0, 1)
        self._start = 0  # where an iteration of this epoch begins: not 0 only when resuming
        self._ready: torch.Tensor | None = None
        self.rows = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        """Batches in a whole epoch; quarantined files can make it a little shorter."""
        return -(-len(self.dataset) // self.batch)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is that epoch; the place in it is kept if it was loaded."""
        if epoch != self.epoch:
            self._start = 0
        self.epoch, self.cursor = epoch, self._start

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        data, epoch = self.dataset, self.epoch
        order = self.order(epoch)
        read = self._memory if isinstance(data, Dataset) else self._files
        for x, self.rows, self.cursor in read(data, order, epoch):
            yield x.pin_memory() if self.reading.pin else x, data.labels[self.rows]
        self.end()

    def order(self, epoch: int) -> torch.Tensor:
        """i64[N]: the rows of the data set as an epoch goes through them."""
        n = len(self.dataset)
        return permutation(n, self.seed, epoch) if self.shuffle else torch.arange(n)

    def end(self) -> None:
        """The epoch is over: the place is the beginning of the next."""
        self.epoch, self._start, self.cursor = self.epoch + 1, 0, 0

    @property
    def ready(self) -> torch.Tensor | None:
        """All images as the net sees them, of a data set in memory that is small enough."""
        data = self.dataset
        if self._ready is None and not self.raw and isinstance(data, Dataset):
            if data.images.numel() * 4 <= _NORMALISE_AT_ONCE:
                self._ready = data.normalised(data.images)
        return self._ready

    def _memory(self, data: Any, order: torch.Tensor, epoch: int) -> Iterator[Any]:
        ready, own = self.ready, share_of(self.batch, *self.share)
        for at in range(self._start, len(order), self.batch):
            whole = order[at : at + self.batch]
            rows = whole[own]
            if ready is not None:
                x = ready[rows]
            else:
                x = data.images[rows] if self.raw else data.normalised(data.images[rows])
            yield x, rows, at + len(whole)

    def _files(self, data: Any, order: torch.Tensor, epoch: int) -> Iterator[Any]:
        where = None if self.raw else self._windows(data, epoch)
        args = (order.numpy(), self._start, self.batch, self.reading, where)
        yield from data.stream(*args, normalise=not self.raw, share=self.share)

    def _windows(self, data: Any, epoch: int) -> Callable[[np.ndarray], list[Window]]:
        """rows -> where each is cut."""
        stored, shape = data.stored, data.shape
        if self.cut == "random":
            return crops(len(data), self.seed, epoch, stored, shape, self.flip)
        top, left = ((s - n) // 2 for s, n in zip(stored[1:], shape[1:], strict=True))
        return lambda rows: [(top, left, False)] * len(rows)

    def state(self) -> dict[str, Any]:
        """Where the iteration stands, as JSON: epoch, samples taken, and what the order needs."""
        done = self.cursor >= len(self.dataset)
        return {
            "epoch": self.epoch + done,
            "cursor": 0 if done else self.cursor,
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
        self.epoch, self._start, self.cursor = epoch, cursor, cursor
