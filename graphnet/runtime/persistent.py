"""The training step as one kernel that stays on the GPU for many steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphnet.errors import NumericsError
from graphnet.lowering.persistent import RUN, STEPS, SYNC, TAKEN, Take, fold
from graphnet.runtime.program import RING, TrainStep


class PersistentStep(TrainStep):
    """A `TrainStep` whose launches are the phases of one kernel.

    `step(x, y)` launches it for one step. After `bind`, `run(n)` launches it once for up to 1,024
    steps: it draws its own batches, and the host does nothing in between.

    plan  holds the one launch; `plan.inner` is the plan that it was made of
    """

    def __init__(self, *, plan: Any, prepare: Any, optimizer: Any, **kwargs: Any) -> None:
        device = kwargs["state"].device
        self._prepare = prepare
        self._sync = torch.zeros(2, dtype=torch.int32, device=device)
        self._steps = torch.ones(1, dtype=torch.int32, device=device)
        self._own = {SYNC: self._sync, STEPS: self._steps}
        self._drawn: dict[str, torch.Tensor] = {}

        def single(plan: Any, storage: dict[str, torch.Tensor]) -> Any:
            return prepare(plan, {**storage, **self._own})

        super().__init__(plan=plan, prepare=single, optimizer=optimizer, **kwargs)

    def __call__(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        index: torch.Tensor | None = None,
        epoch: int = 0,
    ) -> torch.Tensor:
        self._unbroken()
        self._steps.fill_(1)
        return super().__call__(x, y, index, epoch)

    def bind(self, images: torch.Tensor, labels: torch.Tensor, **options: Any) -> PersistentStep:
        """As `TrainStep.bind`; compiles the kernel that draws from these data."""
        super().bind(images, labels, **options)
        assert self._bound is not None
        batch = self.shape[0]
        kind = "u8" if images.dtype == torch.uint8 else "f32"
        plan = fold(
            self.plan.inner, programs=self.plan.launches[0].programs,
            take=Take(kind, len(self._bound.images)),
        )  # fmt: skip
        zeros = lambda *shape, dtype: torch.zeros(shape, dtype=dtype, device=self.device)
        tensors = (
            self._bound.images.contiguous(), self._bound.labels,
            zeros(RUN, batch, dtype=torch.int64), zeros(RUN, dtype=torch.int32),
            zeros(RUN, dtype=torch.float32),
        )  # fmt: skip
        self._drawn = dict(zip(TAKEN, tensors, strict=True))
        self._many = self._prepare(plan, {**self._storage, **self._own, **self._drawn})
        return self

    def run(self, n: int, lr: Sequence[float] | None = None) -> torch.Tensor:
        """As `TrainStep.run`, with one launch for up to 1,024 steps."""
        self._ready(n, lr)
        self._unbroken()
        losses = torch.empty(n, device=self.device)
        for first in range(0, n, RUN):
            count = min(RUN, n - first)
            self._draw(count, None if lr is None else lr[first : first + count])
            self._step_with(self._many)
            at = (self.state.steps + torch.arange(count)) % RING
            losses[first : first + count] = self._storage["ring"][at.to(self.device)]
            self.state.steps += count
        if lr is not None and n:
            self.optimizer.lr = float(lr[n - 1])
        self._live = 0  # the kernel left the count of its last batch
        if self.device.type == "cpu":
            self._unbroken()
        return losses

    def _draw(self, count: int, lr: Sequence[float] | None) -> None:
        """Puts the rows, row counts and learning rates of the next steps on the device."""
        assert self._bound is not None
        order = torch.full((count, self.shape[0]), -1, dtype=torch.int64)
        sizes = torch.empty(count, dtype=torch.int32)
        for k in range(count):
            rows = self._bound.rows().cpu()
            order[k, : len(rows)], sizes[k] = rows, len(rows)
        rates = [self.optimizer.lr] * count if lr is None else [float(v) for v in lr]
        self._drawn[".order"][:count].copy_(order, non_blocking=True)
        self._drawn[".counts"][:count].copy_(sizes, non_blocking=True)
        self._drawn[".rates"][:count].copy_(torch.tensor(rates), non_blocking=True)
        self._steps.fill_(count)

    def _unbroken(self) -> None:
        """NumericsError where a barrier of the last launch gave up; waits for that launch."""
        turn = int(self._sync[1])
        if turn:
            phases = self.plan.launches[0].phases
            raise NumericsError(
                f"the persistent kernel's programs lost each other at barrier {turn} (about step "
                f"{turn // phases} of the launch): the state is not to be trusted",
                help="load a checkpoint and compile without persistent=True",
            )
