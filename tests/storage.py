"""Nets and comparisons for the tests of how parameters are stored."""

from __future__ import annotations

import torch

import graphnet as gn
from graphnet.ir.types import layout_of_parameter

SHAPE = (3, 2, 5, 5)
CLASSES = 5
LOSS = gn.CrossEntropyLoss()


def small_net() -> gn.Module:
    """Filters of every kind: plain, 1 x 1, one input channel for each group, dilated, one row."""
    return gn.Sequential(
        gn.Conv2d(2, 3, 3, padding=1), gn.ReLU(),
        gn.Conv2d(3, 8, 1), gn.ReLU(),
        gn.Conv2d(8, 8, 3, padding=1, groups=8), gn.ReLU(),
        gn.MaxPool2d(2, 1),
        gn.Conv2d(8, 4, (1, 2), dilation=2), gn.Tanh(),
        gn.Flatten(), gn.Linear(4 * 4 * 2, CLASSES),
    )  # fmt: skip


def batches(count: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(SHAPE, generator=g), torch.randint(0, CLASSES, SHAPE[:1], generator=g))
        for _ in range(count)
    ]


def step_of(net: gn.Module, target: str, optimizer=None, **how):
    optimizer = optimizer or gn.SGD(0.05, momentum=0.9, weight_decay=1e-3)
    return gn.compile(net, SHAPE, target=target, loss=LOSS, optimizer=optimizer, **how)


def everything(net: gn.Module, step) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds."""
    return {**net.state_dict(), **step.optimizer.state_dict()}


def assert_same(a: dict, b: dict) -> None:
    """Equal keys, shapes and bits."""
    assert a.keys() == b.keys()
    for k in a:
        assert a[k].shape == b[k].shape and torch.equal(a[k], b[k]), k


def assert_stored(net: gn.Module, step) -> None:
    """Every parameter, slot and sum lies as its layout says, to each stride."""
    held = {e.name: e.tensor for e in step.state.entries.values() if e.role in ("param", "slot")}
    assert held.keys() >= set(net.state_dict())
    for name, t in held.items():
        shape = tuple(t.shape)
        assert t.stride() == layout_of_parameter(shape).strides(shape), name
