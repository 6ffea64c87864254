"""What a program is called with: checked, and copied to where the step reads it.

This runs for every batch while a GPU waits for it, so what nearly every call has (a whole batch of
the right kind) is asked for first and in few words, and nothing is written that stands there.
"""

from __future__ import annotations

import torch

from graphnet.errors import ConfigError, DataError, DTypeError, ShapeError
from graphnet.ir.graph import Graph
from graphnet.runtime.bound import check_labels
from graphnet.runtime.upload import Upload


class Inputs:
    """The batch of a program: `x`, and `labels`, `live`, `index` and `epoch` where it reads them.

    storage  where the step reads them, by name; `x` may be rounded to bf16 there
    takes    the element type of the batch as it is called
    classes  width of the logits, 0 where no loss reads labels
    least    rows that a batch needs: 2 where statistics would have one value for a channel
    empty    whether it may have none, since other ranks have some
    live, epoch  what the step was told last
    """

    def __init__(
        self, storage: dict[str, torch.Tensor], takes: torch.dtype, classes: int, least: int = 1,
        empty: bool = False,
    ) -> None:  # fmt: skip
        self.fewest = 0 if empty else 1
        self.x, self.takes, self.classes, self.least = storage["x"], takes, classes, least
        self.labels, self.index = storage.get("labels"), storage.get("index")
        self._live, self._epoch = storage.get("live"), storage.get("epoch")
        self.whole, self.device = self.x.shape, self.x.device
        self.live = self.epoch = 0
        self._upload: Upload | None = None

    def feed(
        self, x: torch.Tensor, y: torch.Tensor | None, index: torch.Tensor | None, epoch: int,
        first: int,
    ) -> int:  # fmt: skip
        """Copies a batch in and returns its rows. `index` and `epoch` are what an augmentation
        draws by; without them the rows count from `first`, so that none comes twice."""
        rows = self._check_x(x)
        if y is not None:
            self._check_y(y, rows)
        if self.index is not None:
            if index is None:
                index = torch.arange(first, first + rows)
            if index.dtype != torch.int64 or tuple(index.shape) != (rows,):
                raise ShapeError(f"index {index.dtype}{list(index.shape)} for {rows} rows")
            copy_rows(index, self.index)
            if epoch != self.epoch and self._epoch is not None:
                self._epoch.fill_(epoch)
                self.epoch = epoch
        elif index is not None:
            raise ConfigError(
                "this program draws nothing by index", help="compile it with augment="
            )
        if x.is_cuda or not self.x.is_cuda:
            copy_rows(x, self.x)
        else:
            self._upload = self._upload or Upload(self.x, self.takes)
            copy_rows(self._upload.send(x.detach()), self.x)
            self._upload.taken()
        if y is not None and self.labels is not None:
            copy_rows(y, self.labels)
        if rows != self.live:
            self.live = rows
            if self._live is not None:
                self._live.fill_(rows)
        return rows

    def drawn(self, epoch: int, live: int) -> None:
        """Says that the device has drawn a batch by itself: what it has written."""
        self.epoch, self.live = epoch, live

    def _check_x(self, x: torch.Tensor) -> int:
        whole = self.whole
        if not isinstance(x, torch.Tensor):
            raise DataError(
                f"the input is a {type(x).__name__}", help="give a torch tensor: torch.as_tensor(x)"
            )
        if x.dtype is not self.takes:
            raise DTypeError(
                f"the input has dtype {x.dtype}, not {self.takes}",
                help="x.float()" if self.takes == torch.float32 else "images as they are stored",
            )
        if x.shape != whole:
            if x.ndim != len(whole) or x.shape[1:] != whole[1:]:
                want = ", ".join(map(str, whole[1:]))
                raise ShapeError(
                    f"the input has shape {list(x.shape)}, compiled for [N, {want}]",
                    help=f"compile for this shape: gn.compile(net, {tuple(x.shape)}, ...)"
                    if x.ndim == len(whole) else f"give the batch first: (32, {want})",
                )
            if not self.fewest <= x.shape[0] <= whole[0]:
                raise ShapeError(
                    f"a batch of {x.shape[0]} rows, compiled for {self.fewest} to {whole[0]}",
                    help="split the batch, or compile for a larger one",
                )
            if 0 < x.shape[0] < self.least:
                raise one_value()
        self._check_device("input", x)
        return x.shape[0]

    def _check_y(self, y: torch.Tensor, rows: int) -> None:
        if not isinstance(y, torch.Tensor):
            raise DataError(
                f"the labels are a {type(y).__name__}",
                help="give a torch tensor: torch.as_tensor(y)",
            )
        kind = y.dtype
        if kind.is_floating_point or kind.is_complex or kind is torch.bool:
            raise DTypeError(f"the labels have dtype {kind}, not torch.int64", help="y.long()")
        if y.shape != (rows,):
            raise ShapeError(
                f"labels of shape {list(y.shape)} for {rows} rows; wanted [{rows}]",
                help="one class number for each image"
                + ("; of one-hot rows: y.argmax(1)" if y.ndim == 2 else ""),
            )
        self._check_device("labels", y)
        # Labels on the GPU are not checked: that would wait for the device at every step.
        if rows and not y.is_cuda and self.classes:
            check_labels(y, self.classes)

    def _check_device(self, what: str, t: torch.Tensor) -> None:
        here = t.device
        if here.type != "cpu" and here != self.device:
            raise DataError(
                f"the {what} lies on {here}, the program runs on {self.device}",
                help="move it: .cpu()" if self.device.type == "cpu" else f".to('{self.device}')",
            )


def copy_rows(source: torch.Tensor, into: torch.Tensor) -> None:
    """Copies the live rows; the others become zeros."""
    if source.requires_grad:
        source = source.detach()
    rows = source.shape[0]
    if rows == into.shape[0]:
        into.copy_(source, non_blocking=True)
    else:
        into[:rows].copy_(source, non_blocking=True)
        into[rows:].zero_()


def one_value() -> ShapeError:
    """What a batch of one row is where batch normalization has one pixel for each row."""
    return ShapeError(
        "a batch of 1 row: batch normalization needs more than one value for each channel in "
        "training", help="drop the last batch, choose another batch size, or bn.frozen = True",
    )  # fmt: skip


def least_rows(traced: Graph) -> int:
    """2 where batch normalization has one value for each row in a channel, else 1."""
    norms = [e.inputs[0].type for e in traced.eqns if e.op == "batch_norm"]
    return 2 if any(t.numel == t.shape[0] * t.shape[1] for t in norms) else 1


def classes_of(traced: Graph) -> int:
    """Width of the logits that the loss reads, 0 without a loss."""
    for e in traced.eqns:
        if any(v.name == "labels" for v in e.inputs):
            return e.inputs[0].type.shape[-1]
    return 0
