"""What each rank holds one part of: parameters, buffers and slots of a net in two towers.

The net itself keeps whole tensors. A rank's program works on its part of them, along axis 0: on a
CPU a view of the whole one, elsewhere a tensor of its own. So the other parts of the whole tensor
fall behind with the first step. `gather` brings the parts of all ranks together; it runs before
anything reads what is whole, and all ranks have to come to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from graphnet.runtime.group import Group
    from graphnet.runtime.state import Cell


class Parts:
    """This rank's parts of the cells of a net on one device.

    group    the ranks; that of the program that came last
    current  whether the parts are what the whole cells are, or newer
    """

    def __init__(self, make: Callable[[Cell, slice, torch.device], Cell]) -> None:
        self.group: Group | None = None
        self.current = False
        self._make = make
        self._held: dict[str, tuple[Cell, slice, Cell]] = {}  # whole cell, where, part

    def of(
        self, name: str, whole: Cell, parts: int, device: torch.device
    ) -> tuple[Cell, slice]:  # fmt: skip
        """The part of a cell that is this rank's, and what it is of axis 0."""
        assert self.group is not None
        have = self._held.get(name)
        if have is None or have[0] is not whole:
            size = whole.live.shape[0] // parts
            at = slice(self.group.rank * size, (self.group.rank + 1) * size)
            have = self._held[name] = (whole, at, self._make(whole, at, device))
            self.current = False
        return have[2], have[1]

    def spread(self) -> bool:
        """The parts become what the whole cells are; whether they were not."""
        if self.current:
            return False
        for whole, at, part in self._held.values():
            _copied(whole.live[at], part.live)
        self.current = True
        return True

    def changed(self, cell: Cell) -> None:
        """Says that a whole cell was written."""
        for whole, at, part in self._held.values():
            if whole is cell:
                _copied(whole.live[at], part.live)

    def gather(self) -> None:
        """The whole cells become what the parts of all ranks are. All ranks meet here."""
        assert self.group is not None
        with torch.no_grad():
            for whole, _, part in self._held.values():
                whole.live.copy_(torch.cat(self.group.gather(part.live)))
                whole.touched()


def _copied(source: torch.Tensor, into: torch.Tensor) -> None:
    if source.data_ptr() != into.data_ptr():
        into.copy_(source.detach())
