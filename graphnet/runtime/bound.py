"""A data set on the device, from which `step.run` draws its batches."""

from __future__ import annotations

import torch

from graphnet.errors import DataError, DTypeError, ShapeError


class Bound:
    """A data set on the device and the place in it: a fresh seeded order each epoch."""

    def __init__(
        self, images: torch.Tensor, labels: torch.Tensor, batch: int, seed: int, shuffle: bool
    ) -> None:
        self.images, self.labels, self.batch = images, labels, batch
        self.seed, self.shuffle = seed, shuffle
        self.epoch, self.at = 0, 0
        self._order = self._permutation()

    def _permutation(self) -> torch.Tensor:
        n = self.images.shape[0]
        if not self.shuffle:
            return torch.arange(n, device=self.images.device)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % (1 << 63))
        return torch.randperm(n, generator=generator).to(self.images.device)

    def rows(self) -> torch.Tensor:
        """Which images the next batch holds; the last one of an epoch may be smaller."""
        if self.at >= self.images.shape[0]:
            self.epoch, self.at = self.epoch + 1, 0
            self._order = self._permutation()
        rows = self._order[self.at : self.at + self.batch]
        self.at += self.batch
        return rows

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next batch: images f32, labels i64."""
        rows = self.rows()
        x = self.images[rows]
        if x.dtype == torch.uint8:
            x = x.float() / 255
        return x, self.labels[rows]

    def stored(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """The next batch as it is kept, with its places in the data and its epoch."""
        rows = self.rows()
        return self.images[rows], self.labels[rows], rows, self.epoch


def check_labels(labels: torch.Tensor, classes: int) -> None:
    """DataError naming the first row whose label is outside 0..classes-1."""
    bad = (labels < 0) | (labels >= classes)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise DataError(
            f"row {row} has the label {int(labels[row])}, outside 0..{classes - 1}",
            help=f"the net has {classes} classes",
        )


def check_bound(
    images: torch.Tensor, labels: torch.Tensor, shape: tuple[int, ...], classes: int
) -> None:
    if images.dtype not in (torch.uint8, torch.float32):
        raise DTypeError(f"images have dtype {images.dtype}", help="use torch.uint8 or float32")
    if images.ndim != len(shape) or tuple(images.shape[1:]) != shape[1:]:
        want = ", ".join(map(str, shape[1:]))
        raise ShapeError(f"images of shape {list(images.shape)}, compiled for [N, {want}]")
    if images.shape[0] == 0 or tuple(labels.shape) != (images.shape[0],):
        raise ShapeError(f"{images.shape[0]} images with labels of shape {list(labels.shape)}")
    if classes:
        check_labels(labels.cpu(), classes)
