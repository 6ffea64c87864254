"""The numbers of a step that may change between steps: fp32 scalars on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphnet.ops.take import SLOT


class Hypers:
    """Learning rate, momentum and their kin, in one small tensor on the device; and on the host
    what stands there, so that a number that has not changed costs nothing.

    tensor  f32[K, 4]: each number starts a slot of 16 bytes, the alignment that kernels expect
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.at = {name: k for k, name in enumerate(names)}
        self.tensor = torch.zeros(len(names), SLOT, device=device)
        self.values = [0.0] * len(names)
        self._rows = list(self.tensor)

    def __contains__(self, name: object) -> bool:
        return name in self.at

    def scalar(self, name: str) -> torch.Tensor:
        """The device's scalar, a view."""
        return self.tensor[self.at[name], 0]

    def set(self, name: str, value: float) -> None:
        """Writes a number to the device where another one stands there."""
        at = self.at[name]
        if self.values[at] != value:
            self.values[at] = value
            self._rows[at].fill_(value)
