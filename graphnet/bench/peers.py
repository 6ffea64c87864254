"""What torch offers for the same work: every variant is tried, the best one is the peer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from graphnet.bench.rounds import Run
from graphnet.bench.twin import torch_twin

KINDS = ("eager", "compile")
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
OPTIMIZERS: dict[str, dict[str, bool]] = {
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "plain": {"foreach": False},
}


@dataclass(frozen=True)
class Work:
    """What is timed: a net, one batch on the device, and the update (None: inference)."""

    net: Any
    x: torch.Tensor
    y: torch.Tensor
    sgd: Any = None

    @property
    def training(self) -> bool:
        return self.sgd is not None


@dataclass
class Peer:
    """One variant: `run(n)` does n steps; `failure` says why it could not be built."""

    name: str
    kind: str
    run: Run | None = None
    failure: str = ""


def _sgd(work: Work, module: nn.Module, how: dict[str, bool]) -> torch.optim.SGD:
    s = work.sgd
    return torch.optim.SGD(
        module.parameters(), lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay,
        nesterov=s.nesterov, **how,
    )  # fmt: skip


def _laid_out(net: Any, layout: str) -> nn.Module:
    module: Any = torch_twin(net)
    return module.to(memory_format=LAYOUTS[layout])


def _train(work: Work, layout: str, how: dict[str, bool], wrap: Callable[[Any], Any]) -> Run:
    module = _laid_out(work.net, layout).train()
    x = work.x.contiguous(memory_format=LAYOUTS[layout])
    optimizer = _sgd(work, module, how)
    forward = wrap(lambda x, y: nn.functional.cross_entropy(module(x), y))

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            forward(x, work.y).backward()
            optimizer.step()

    return run


def _infer(work: Work, layout: str, wrap: Callable[[Any], Any]) -> Run:
    module = _laid_out(work.net, layout).eval()
    x = work.x.contiguous(memory_format=LAYOUTS[layout])
    forward = wrap(module)

    @torch.inference_mode()
    def run(steps: int) -> None:
        for _ in range(steps):
            forward(x)

    return run


def _variants(work: Work, kind: str) -> Iterator[tuple[str, Callable[[], Run]]]:
    wrap: Callable[[Any], Any] = torch.compile if kind == "compile" else lambda f: f
    for layout in LAYOUTS:
        if not work.training:
            yield f"{kind} {layout}", partial(_infer, work, layout, wrap)
            continue
        for name, how in OPTIMIZERS.items():
            if kind == "compile" and name != "fused":
                continue  # the compiled part ends at the gradients
            yield f"{kind} {layout} {name}", partial(_train, work, layout, how, wrap)


def peers(work: Work, kinds: tuple[str, ...]) -> list[Peer]:
    """Every variant of the kinds, run once; one that fails is kept with its reason."""
    out = []
    for kind in kinds:
        for name, build in _variants(work, kind):
            peer = Peer(name, kind)
            try:
                peer.run = build()
                peer.run(1)
            except Exception as error:  # a peer's failure is a result, not ours
                peer.run = None
                peer.failure = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
            out.append(peer)
    return out
