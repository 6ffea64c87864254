"""The forward and the backward pass as programs of their own, for a loss that is not ours.

    forward(x) -> results         keeps in its buffers what the backward pass reads
    backward(cotangents) -> gradients of the latest forward call
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphnet.errors import ShapeError
from graphnet.passes.autodiff import cotangent
from graphnet.runtime.inputs import copy_rows
from graphnet.runtime.program import Program, taking_turns


class Forward(Program):
    """forward(x) -> results, with as many rows as x. Each call draws other dropout masks.

    results  how many values the net returns
    calls    how often it was called: a backward pass belongs to the latest call
    """

    def __init__(self, *, results: int, **kwargs: Any) -> None:
        self.results, self.calls, self.rows = results, 0, 0
        super().__init__(**kwargs)

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """Inputs and what is kept, by name: storage that the backward pass reads."""
        return self._storage

    @property
    def rest(self) -> Callable[[], None]:
        """What runs the backward pass, where this program holds both."""
        return self._run.rest  # type: ignore[attr-defined, no-any-return]

    @taking_turns
    def __call__(self, x: torch.Tensor, mask: int = 0) -> tuple[torch.Tensor, ...]:
        """mask: which dropout masks are drawn, one of a sequence."""
        self.rows = self._feed(x)
        self.calls += 1
        if "step" in self._storage:
            self._storage["step"].fill_(mask)
        # Copies of parameters are made again: what moved these may have left no trace.
        self.state.stale = True
        self._step()
        return tuple(self._result(k, self.rows) for k in range(self.results))


class Backward(Program):
    """backward(cotangents, rows) -> gradients, in the order of `keys`.

    keys  names of inputs of the graph; the gradient of x has as many rows as x had
    """

    def __init__(self, *, keys: Sequence[str], forward: Forward, **kwargs: Any) -> None:
        self.keys, self.forward = tuple(keys), forward
        super().__init__(shared=forward.buffers, **kwargs)

    @taking_turns
    def __call__(self, cotangents: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        traced, rows = self.stages.traced, self.forward.rows
        for k, (v, given) in enumerate(zip(traced.returns, cotangents, strict=True)):
            name = cotangent(k)
            if tuple(given.shape) != (rows, *v.type.shape[1:]):
                raise ShapeError(f"a cotangent of shape {list(given.shape)} for {rows} rows of {v}")
            if name in self._storage:
                copy_rows(given, self._storage[name])
        self._step()
        out = {}
        for k, key in enumerate(self.keys):
            made = self._storage[self._returns[k - len(self.keys)]]  # results may stand before
            made = made[:rows] if key == "x" else made
            out[key] = made.clone(memory_format=torch.preserve_format)
        return out
