"""The lecture's demonstrations: how optimizers move, and what dropout does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphnet.frontends.dsl import Sequential
from graphnet.frontends.layers import Dropout, Flatten, Linear, ReLU
from graphnet.frontends.tracing import trace
from graphnet.ir.graph import Builder
from graphnet.ir.types import TensorType, f32
from graphnet.lowering.plan.plan import make_plan
from graphnet.lowering.targets import cpu
from graphnet.ops.evaluate import evaluate
from graphnet.ops.loss import CrossEntropyLoss
from graphnet.ops.update import SGD
from graphnet.train.plots import write_figure

# ---- optimizers ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Surface:
    """A loss over two weights: value and gradient at points [..., 2]; `noise` of the gradient."""

    name: str
    value: Callable[[torch.Tensor], torch.Tensor]
    gradient: Callable[[torch.Tensor], torch.Tensor]
    start: tuple[float, float]
    window: tuple[float, float, float, float]
    lr: float
    noise: float = 0.0


def _scale(*factors: float) -> torch.Tensor:
    return torch.tensor(factors)


SURFACES = (
    Surface(
        "ill-conditioned bowl: x² / 4 + 20 y²",
        lambda p: (p**2 * _scale(0.25, 20.0)).sum(-1), lambda p: 2 * p * _scale(0.25, 20.0),
        (-3.6, 0.9), (-4.2, 2.4, -1.4, 1.4), 0.03,
    ),
    Surface(
        "saddle: x² - y² + y⁴ / 4",
        lambda p: p[..., 0] ** 2 - p[..., 1] ** 2 + p[..., 1] ** 4 / 4,
        lambda p: torch.stack((2 * p[..., 0], -2 * p[..., 1] + p[..., 1] ** 3), -1),
        (-1.8, 0.002), (-2.2, 1.6, -2.2, 2.2), 0.03,
    ),
    Surface(
        "noisy gradients: x² + 4 y², standard deviation 2",
        lambda p: (p**2 * _scale(1.0, 4.0)).sum(-1), lambda p: 2 * p * _scale(1.0, 4.0),
        (-3.4, 1.4), (-4.0, 2.4, -2.0, 2.0), 0.02, 2.0,
    ),
)  # fmt: skip


def optimizers(lr: float) -> dict[str, SGD]:
    """The lecture's three, at one learning rate."""
    return {
        "SGD": SGD(lr=lr),
        "momentum 0.9": SGD(lr=lr, momentum=0.9),
        "Nesterov 0.9": SGD(lr=lr, momentum=0.9, nesterov=True),
    }


def descend(spec: Any, surface: Surface, steps: int, seed: int = 0) -> torch.Tensor:
    """The path [steps + 1, 2] of two weights, moved by the engine's own update op."""
    b = Builder("descent.joint")
    w, g = (b.input(n, TensorType(f32, (2,)), r) for n, r in (("w", "param"), ("g", "data")))
    hypers = {name: b.input(name, TensorType(f32, ()), "hyper") for name in spec.hypers}
    scalars, own = spec.scalars(b, hypers)
    slots = [b.input(f"w.{s}", w.type, "slot", "w") for s in spec.slots]
    outs = b.emit(spec.op, [w, g, *slots, *scalars], spec.attrs())
    for old, new in [*zip((w, *slots), outs, strict=True), *own]:
        assert new is not None
        b.commit(old, new)
    graph = b.build()
    storage = {i.value.name: torch.zeros(i.value.type.shape) for i in graph.inputs}
    for name in spec.hypers:
        storage[name].fill_(getattr(spec, name))
    storage["w"].copy_(torch.tensor(surface.start))
    step = cpu.prepare(make_plan(graph, "cpu"), storage)
    noise = torch.Generator().manual_seed(seed)
    path = [storage["w"].clone()]
    for _ in range(steps):
        drawn = surface.noise * torch.randn(2, generator=noise)
        storage["g"].copy_(surface.gradient(storage["w"]) + drawn)
        step()
        path.append(storage["w"].clone())
    return torch.stack(path)


def demo_optimizers(out: Path, steps: int = 120) -> list[dict[str, Any]]:
    """Draws the trajectories on all surfaces; (surface, optimizer, loss and steps) rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5.2))
    rows = []
    for axes, surface in zip(figure.subplots(1, len(SURFACES)), SURFACES, strict=True):
        left, right, low, high = surface.window
        xs, ys = torch.linspace(left, right, 160), torch.linspace(low, high, 160)
        grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1)
        height = surface.value(grid)
        axes.contour(xs, ys, (height - height.min() + 1e-3).log(), levels=24, cmap="Greys",
                     linewidths=0.6)  # fmt: skip
        least = float(height.min())
        axes.plot(*surface.start, "ks", markersize=6, label="start")
        for name, spec in optimizers(surface.lr).items():
            path = descend(spec, surface, steps)
            axes.plot(path[:, 0], path[:, 1], marker=".", markersize=3, linewidth=1, label=name)
            loss = surface.value(path)
            near = (loss < least + 0.05 * float(loss[0] - least)).nonzero()
            rows.append(
                {"surface": surface.name, "optimizer": name, "loss": float(loss[-1]),
                 "steps_to_95_percent": int(near[0]) if len(near) else None}
            )  # fmt: skip
        axes.set(xlim=(left, right), ylim=(low, high), xlabel="x", ylabel="y")
        axes.set_title(f"{surface.name}\nlearning rate {surface.lr}, {steps} steps", fontsize=10)
        axes.legend(fontsize=8)
    write_figure(out, figure)
    return rows


# ---- dropout ---------------------------------------------------------------------------------


def _net(mode: str, p: float) -> Sequential:
    torch.manual_seed(0)
    return Sequential(
        Flatten(), Linear(64, 48), ReLU(), Dropout(p, mode=mode, name="drop"), Linear(48, 1)
    )


def draws(mode: str, p: float, masks: int) -> tuple[torch.Tensor, float]:
    """The output of a small net for one input under many masks, and its output at test time."""
    net = _net(mode, p)
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    training = trace(net, x.shape, loss=CrossEntropyLoss(), training=True)
    logits = next(e for e in training.eqns if e.op == "cross_entropy").inputs[0]
    training = type(training)(
        training.name, training.inputs, training.eqns, (logits,), training.commits
    )
    values = {k: v.detach() for k, v in net.state_dict().items()}
    fixed = {"labels": torch.zeros(1, dtype=torch.int64), "live": torch.tensor(1),
             "seed": torch.tensor(0)}  # fmt: skip
    said = [
        evaluate(training, {**values, **fixed, "x": x, "step": torch.tensor(k)}, "cpu")[0].item()
        for k in range(masks)
    ]
    zero = torch.tensor(0)
    (test,) = evaluate(trace(net, x.shape), {**values, "x": x, "seed": zero, "step": zero}, "cpu")
    return torch.tensor(said), test.item()


def demo_dropout(out: Path, p: float = 0.5, masks: int = 1000) -> list[dict[str, Any]]:
    """Draws the training outputs beside the test output in both modes; a row for each mode.

    y(x) = E_z[f(x, z)]: at test time the randomness is averaged out. Inverted dropout divides by
    1 - p in training and leaves the test alone; vanilla dropout multiplies at test time.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8))
    rows = []
    both = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, mode in zip(both, ("inverted", "vanilla"), strict=True):
        said, test = draws(mode, p, masks)
        mean, error = float(said.mean()), float(said.std()) / masks**0.5
        axes.hist(said.numpy(), bins=40, color="C0", alpha=0.6, label=f"training, {masks} masks")
        axes.axvline(mean, color="C0", label=f"their mean {mean:.4f} ± {error:.4f}")
        axes.axvline(test, color="C3", linestyle="--", label=f"test time {test:.4f}")
        axes.set_title(f"{mode} dropout, p = {p}", fontsize=10)
        axes.set_xlabel("output for one input")
        axes.margins(y=0.4)  # room for the legend
        axes.xaxis.set_tick_params(labelbottom=True)
        axes.legend(fontsize=8)
        rows.append(
            {"mode": mode, "p": p, "masks": masks, "mean": mean, "standard_error": error,
             "spread": float(said.std()), "test": test}
        )  # fmt: skip
    write_figure(out, figure)
    return rows


def shown(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a table."""
    if not rows:
        return ""
    cells = [list(rows[0])] + [
        [f"{v:.4f}" if isinstance(v, float) else "-" if v is None else str(v) for v in r.values()]
        for r in rows
    ]
    width = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, width, strict=True)).rstrip() for row in cells
    )
