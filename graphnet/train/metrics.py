"""Metrics of classification: top-k error, confusion matrix, a mean that does not wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphnet.errors import ShapeError


def _check(logits: torch.Tensor, labels: torch.Tensor) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ShapeError(
            f"logits of shape {list(logits.shape)} with labels of shape {list(labels.shape)}",
            help="logits are [N, classes] and labels [N]",
        )


def topk_wrong(logits: torch.Tensor, labels: torch.Tensor, k: int = 1) -> torch.Tensor:
    """How many rows do not have their label among the k largest logits; stays on the device.

    A row whose label has a NaN logit is wrong. A tie counts for the lower class number, as in
    argmax, so a net that says the same of every class is not right everywhere.
    """
    _check(logits, labels)
    if not 1 <= k <= logits.shape[1]:
        raise ShapeError(f"top-{k} of {logits.shape[1]} classes")
    labels = labels.to(logits.device)[:, None]
    own = logits.gather(1, labels)
    before = torch.arange(logits.shape[1], device=logits.device)[None] < labels
    ahead = (logits > own) | ((logits == own) & before)
    return ((ahead.sum(1) >= k) | own[:, 0].isnan()).sum()


def topk_error(
    logits: torch.Tensor, labels: torch.Tensor, ks: Sequence[int] = (1,)
) -> dict[int, float]:
    """{k: share of the rows, 0 to 1, without their label among the k largest logits}."""
    if not len(labels):
        raise ShapeError("the error of 0 rows is not defined")
    return {k: int(topk_wrong(logits, labels, k)) / len(labels) for k in ks}


def confusion_matrix(predicted: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """int64[classes, classes]: row = label, column = prediction; both are int[N]."""
    if predicted.ndim != 1 or predicted.shape != labels.shape:
        raise ShapeError(
            f"predictions of shape {list(predicted.shape)}, labels {list(labels.shape)}",
            help="pass logits.argmax(1)",
        )
    both = torch.stack([labels.cpu().long(), predicted.cpu().long()])
    if both.numel() and (int(both.min()) < 0 or int(both.max()) >= classes):
        raise ShapeError(
            f"class numbers from {int(both.min())} to {int(both.max())} with {classes} classes"
        )
    cells = torch.bincount(both[0] * classes + both[1], minlength=classes * classes)
    return cells.reshape(classes, classes)


class RunningMean:
    """A weighted mean of losses. `add` never waits for the device; `value` does, once."""

    def __init__(self) -> None:
        self._total: torch.Tensor | float = 0.0
        self._weight = 0.0

    def add(self, value: torch.Tensor | float, weight: float = 1.0) -> None:
        """Counts `value` `weight` times. A tensor is read now, so its memory may be reused."""
        if isinstance(value, torch.Tensor):
            value = value.detach().double()
        self._total = self._total + value * weight
        self._weight += weight

    def value(self) -> float:
        """The mean so far; NaN where nothing was added."""
        return float(self._total) / self._weight if self._weight else float("nan")
