"""Pictures of a run: its curves, and the filters of the first convolution."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from graphnet.errors import ConfigError
from graphnet.train.checkpoint import atomic_write


def write_figure(path: Path, figure: Any) -> None:
    """Writes a picture whole or not at all, in the format of its name's end."""
    data = io.BytesIO()
    kind = path.suffix.lower()[1:] or "png"
    if kind not in (known := figure.canvas.get_supported_filetypes()):
        raise ConfigError(f"{path}: no picture ends in .{kind}", help=f"one of {', '.join(known)}")
    with warnings.catch_warnings():  # a name in letters that the font lacks: it draws boxes
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(data, format=kind, dpi=120, bbox_inches="tight")
    atomic_write(path, data.getvalue())


def curves(path: Path, history: Sequence[Mapping[str, Any]], title: str) -> None:
    """Loss and test error over the epochs; error axis from 0, so that progress is not zoomed."""
    from matplotlib.figure import Figure  # no pyplot: no state, no display
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """Writes 0.3 instead of 3 x 10^-1, at the ticks that LogFormatter chooses."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    figure = Figure(figsize=(9, 3.6), layout="constrained")
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
        right.margins(x=0.09)  # room for the figure
        right.set_ylim(0, max(error) * 1.15 or 1)
    for axes, name in ((left, "loss"), (right, "top-1 error, %")):
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if all(m[k] > 0 for m in history for k in ("train_loss", "val_loss") if k in m):
        left.set_yscale("log")  # a hinge may reach 0
        left.yaxis.set_major_formatter(Plain())
        left.yaxis.set_minor_formatter(Plain())
    left.legend()
    figure.suptitle(title, parse_math=False)  # a path may hold two dollar signs
    write_figure(path, figure)


def filters(path: Path, weight: torch.Tensor) -> None:
    """The filters f32[O, C, KH, KW] of a convolution, each scaled to its own range."""
    from matplotlib.figure import Figure

    weight = weight.detach().float().cpu()
    count, channels, *size = weight.shape
    if channels != 3:  # colour only where the channels are colours
        weight = weight.mean(1, keepdim=True)
    low, high = weight.amin((1, 2, 3), keepdim=True), weight.amax((1, 2, 3), keepdim=True)
    shown = ((weight - low) / (high - low).clamp_min(1e-12)).permute(0, 2, 3, 1)
    columns = min(16, len(shown))
    rows = -(-len(shown) // columns)
    cell = 0.7 if count > 16 else 1.1
    figure = Figure(figsize=(max(columns * cell, 4), rows * cell + 0.5))
    shape = f"{count} filter{'s' * (count > 1)} of {size[0]}x{size[1]}"
    mean = "" if channels in (1, 3) else f", the mean of {channels} channels"
    figure.suptitle(f"first convolution: {shape}{mean}, each in its own range", fontsize=10)
    _sheet(figure, columns, rows, [image.squeeze(-1).numpy() for image in shown])
    write_figure(path, figure)


def _sheet(
    figure: Any, columns: int, rows: int, images: Sequence[Any], texts: Sequence[str] = ()
) -> None:
    """Images in rows, each with a text above it, in one system of axes: 48 of them take four times
    as long to lay out as all the rest of a run's pictures."""
    axes = figure.add_axes((0, 0, 1, 1 - 0.4 / figure.get_figheight()))
    axes.axis("off")
    room = 0.55 if texts else 0.0  # above an image, in images
    for k, image in enumerate(images):
        x, y = k % columns, (k // columns) * (1 + room)
        h, w = (side / max(image.shape[:2]) for side in image.shape[:2])
        where = (x + 0.5 - 0.45 * w, x + 0.5 + 0.45 * w, y + room + 0.9 * h, y + room)
        axes.imshow(image, cmap="gray", interpolation="nearest", extent=where)
        if texts:
            axes.text(x + 0.5, y + room - 0.04, texts[k], fontsize=7, parse_math=False,
                      ha="center", va="bottom")  # fmt: skip
    axes.set(xlim=(0, columns), ylim=(rows * (1 + room), 0), aspect="equal")


def _shown(image: torch.Tensor) -> Any:
    """An image f32[C, H, W] as matplotlib draws it, stretched to its own range."""
    image = image.detach().float().cpu()
    low, high = image.min(), image.max()
    image = ((image - low) / (high - low).clamp_min(1e-12)).permute(1, 2, 0)
    return image.numpy() if image.shape[2] == 3 else image.mean(2).numpy()


def _name(name: str, most: int = 40) -> str:
    """A class name as a label: of any bytes, on one line, no longer than `most`."""
    name = " ".join(name.encode(errors="replace").decode().split())
    return name if len(name) <= most else f"{name[: most - 1]}…"


def misclassified(
    path: Path, rows: Sequence[tuple[float, torch.Tensor, int, int]], names: Sequence[str]
) -> None:
    """A contact sheet of mistakes (probability, image, label, answer), the surest first."""
    from matplotlib.figure import Figure

    columns = 8
    lines = max(1, -(-len(rows) // columns))
    figure = Figure(figsize=(columns * 1.15, lines * 1.78 + 0.5))
    texts = [
        f"{_name(names[label], 16)}\nnot {_name(names[answer], 16)}\n{p:.0%} sure"
        for p, _, label, answer in rows
    ]
    _sheet(figure, columns, lines, [_shown(image) for _, image, _, _ in rows], texts)
    title = f"the {len(rows)} surest mistakes" if rows else "no mistakes"
    figure.suptitle(f"{title} (label, not answer)", fontsize=10)
    write_figure(path, figure)


def confusion(path: Path, counts: torch.Tensor, names: Sequence[str]) -> None:
    """How often a label (row) was answered with a class (column), in percent of the label."""
    from matplotlib.figure import Figure

    n = len(counts)
    share = 100 * counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
    size = max(4.0, min(14.0, 0.45 * n))
    figure = Figure(figsize=(size + 1, size))
    axes = figure.subplots()
    drawn = axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=100)
    if n <= 30:
        names = [_name(name) for name in names]
        turn = 90 if max(map(len, names)) > 3 else 0
        axes.set_xticks(range(n), names, rotation=turn, parse_math=False)
        axes.set_yticks(range(n), names, parse_math=False)
        for i in range(n):
            for j in range(n):
                if counts[i, j]:
                    dark = "white" if share[i, j] > 50 else "black"
                    axes.text(j, i, f"{share[i, j]:.0f}" if share[i, j] >= 0.5 else "·",
                              ha="center", va="center", fontsize=7, color=dark)  # fmt: skip
    axes.set_xlabel("answer")
    axes.set_ylabel("label")
    wrong = int(counts.sum() - counts.diag().sum())
    axes.set_title(f"percent of each label; {wrong} of {int(counts.sum())} wrong", fontsize=10)
    figure.colorbar(drawn, ax=axes, fraction=0.046)
    write_figure(path, figure)
