"""Pictures of a run: its curves, and the filters of the first convolution."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from graphnet.train.checkpoint import atomic_write


def _write(path: Path, figure: Any) -> None:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120, bbox_inches="tight")
    atomic_write(path, data.getvalue())


def curves(path: Path, history: Sequence[Mapping[str, Any]], title: str) -> None:
    """Loss and test error over the epochs; error axis from 0, so that progress is not zoomed."""
    from matplotlib.figure import Figure  # no pyplot: no state, no display

    figure = Figure(figsize=(9, 3.6))
    left, right = figure.subplots(1, 2)
    epochs = [m["epoch"] for m in history]
    left.plot(epochs, [m["train_loss"] for m in history], marker="o", label="training")
    if history and "val_loss" in history[0]:
        left.plot(epochs, [m["val_loss"] for m in history], marker="s", label="test")
        error = [100 * (1 - m["val_accuracy"]) for m in history]
        right.plot(epochs, error, marker="s", color="C1", label="test")
        right.annotate(
            f"{error[-1]:.2f} %", (epochs[-1], error[-1]), textcoords="offset points",
            xytext=(0, 8), ha="center",
        )  # fmt: skip
        right.set_ylim(0, max(error) * 1.15 or 1)
    for axes, name in ((left, "loss"), (right, "top-1 error, %")):
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    left.set_yscale("log")
    left.legend()
    figure.suptitle(title)
    _write(path, figure)


def filters(path: Path, weight: torch.Tensor) -> None:
    """The filters f32[O, C, KH, KW] of a convolution, each scaled to its own range."""
    from matplotlib.figure import Figure

    weight = weight.detach().float().cpu()
    if weight.shape[1] != 3:  # colour only where the channels are colours
        weight = weight.mean(1, keepdim=True)
    low, high = weight.amin((1, 2, 3), keepdim=True), weight.amax((1, 2, 3), keepdim=True)
    shown = ((weight - low) / (high - low).clamp_min(1e-12)).permute(0, 2, 3, 1)
    columns = min(16, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(columns * 0.7, rows * 0.7))
    for k, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        if k < len(shown):
            axes.imshow(shown[k].squeeze(-1).numpy(), cmap="gray", interpolation="nearest")
    _write(path, figure)
