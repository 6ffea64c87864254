"""The training step: a program with an optimizer, called with batches or run over bound data."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphnet.errors import ConfigError, NumericsError
from graphnet.runtime.bound import TABLE, Bound, Draws, Order, check_bound
from graphnet.runtime.inputs import one_value
from graphnet.runtime.optim import Optimizer
from graphnet.runtime.program import Program, taking_turns
from graphnet.runtime.state import Entry

RING = 4096  # losses kept on the device; as in passes/autodiff
_OURS = ("ring", "step", "held")  # counters that belong to the step, whatever its optimizer


class TrainStep(Program):
    """step(x, y) -> loss before the update, the mean over the rows, still on the device.

    Each loss is a tensor of its own, overwritten 4,096 steps later; only float() synchronises.
    With `nonfinite="auto"` a loss that is not finite raises NumericsError and leaves the state as
    it was: at once on the CPU; on a GPU in a later call, and the steps between change nothing.
    optimizer  the live view: set `lr`, `momentum`, `weight_decay` ... between steps

    A step that augments draws for each row by `index`, int64[N], its place in the data, and the
    epoch; without an index no place comes twice.
    """

    counts: tuple[str, ...] = ()  # numbers of the state that its optimizer saves

    def __init__(
        self,
        *,
        optimizer: Any,
        knobs: dict[str, float] | None = None,
        net: Any = None,
        **kwargs: Any,
    ) -> None:
        """net: a weak reference to the net, whose attribute paths errors name."""
        super().__init__(**kwargs)
        self._net = net
        self._itself = weakref.ref(self)
        self._sticky = "held" in self._storage
        if self._sticky:
            self.state.hold(self._storage["held"])
        own = [e for e in self._entries if e.role in ("slot", "counter") and e.name not in _OURS]
        self._unmet: Sequence[Entry] = own
        self.optimizer = Optimizer(
            optimizer, self._hypers, own, self.state, knobs, self.counts
        )  # fmt: skip
        self._bound: Bound | None = None
        self._draws: Draws | None = None

    def _step_with(self, run: Callable[[], None]) -> None:
        self._join()
        super()._step_with(run)

    def look(self) -> None:
        """After steps: NumericsError if it is known by now that one of them was not finite."""
        if self._sticky:
            assert self.state.held is not None
            self.state.held.program = self._itself
            self._hear()

    def _take_over(self) -> None:
        """Before a step that looks at no flag: hears of the steps of another program, which must
        not be held back any more."""
        if not self._sticky and self.state.held is not None and self.state.held.behind:
            self._hear(wait=True)

    def _hear(self, *, wait: bool = False) -> None:
        """NumericsError once it is known that a step was not finite. The step counts as not done,
        nor do those behind it, and the next call starts from the state before it."""
        state = self.state
        assert state.held is not None
        held, steps = state.held.heard(state.steps, wait=wait)
        if not held:
            return
        from graphnet.runtime.diagnose import first_nonfinite, not_finite

        first = steps - held
        text = f"the loss is {float(self._storage['ring'][first % RING])} at step {first}"
        if since := state.steps - first - 1:
            text += f" ({since} more {'has' if since == 1 else 'have'} run since, changing nothing)"
        ran = state.held.program()
        error = not_finite(text, None if ran is None else first_nonfinite(ran))
        state.done = first
        if self._draws is not None:
            self._draws.back_to(first)
        net = self._net() if self._net is not None else None
        with net.locating() if net is not None else contextlib.nullcontext():
            raise error

    def _join(self) -> None:
        """Before the first step: clears the state of an optimizer that counts its steps where a
        parameter joins it (a layer thaws). All slots share one count, so a new slot would be
        corrected for its start as an old one is."""
        if not self._unmet:
            return
        spec, stepped = self.optimizer.spec, self.state.stepped
        counters = [e for e in self._unmet if e.role == "counter"]
        slots = [e for e in self._unmet if e.name in {f"{e.of}.{s}" for s in spec.slots}]
        new = [e for e in slots if e.name not in stepped]
        if new and any(e.name in stepped for e in counters):
            for e in (*counters, *slots):
                e.cell.clear()
        stepped.update(e.name for e in (*counters, *slots))
        self._unmet = ()

    @property
    def ran(self) -> Program:
        """The program whose buffers hold the latest step."""
        return self

    @taking_turns
    def __call__(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        index: torch.Tensor | None = None,
        epoch: int = 0,
    ) -> torch.Tensor:
        self._take_over()
        self._feed(x, y, index, epoch)
        self._step()
        loss = self._counted()
        self.look()
        return loss

    def _counted(self) -> torch.Tensor:
        """Counts the step that was just launched; its loss, in the ring."""
        at = self.state.steps % RING
        self.state.steps += 1
        return self._storage["ring"][at]

    def bind(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        shuffle: bool = True,
        seed: int | None = None,
    ) -> TrainStep:
        """Puts a data set on the device for `run`; returns the step.

        images  u8[N, C, H, W], read as value / 255, or f32 as they are
        labels  integers [N]
        seed    of the order of each epoch; the step's own seed by default
        """
        check_bound(images, labels, self.shape, self.classes)
        if images.shape[0] % self.global_batch == 1 and self._inputs.least > 1:
            raise one_value()
        seed, n = self.seed if seed is None else seed, images.shape[0]

        def order(epoch: int) -> torch.Tensor:
            g = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
            return torch.randperm(n, generator=g)

        self._bind(images, labels, order if shuffle else None)
        return self

    @taking_turns
    def _bind(
        self, images: torch.Tensor, labels: torch.Tensor, order: Order | None,
        levels: torch.Tensor | None = None,
    ) -> Bound:  # fmt: skip
        """Puts data on the device. `levels` f32[C, 256] are what a net without augmentation reads
        for the bytes of each channel: value / 255 by default."""
        inputs = self._inputs
        if images.dtype == torch.uint8 and inputs.takes == torch.float32 and levels is None:
            levels = (torch.arange(256).float() / 255).expand(images.shape[1], 256)
        here = lambda t: t.detach().to(self.device).contiguous()
        as_read = lambda t: here(t.to(inputs.x.dtype) if t.dtype == torch.float32 else t)
        bound = self._bound = Bound(
            as_read(images), here(labels.to(torch.int64)), self.global_batch, order,
            None if levels is None else as_read(levels),
        )  # fmt: skip
        self._draws = self._drawing(bound)
        return bound

    def _drawing(self, bound: Bound) -> Draws | None:
        """What runs steps over the data; None where each is called, as with several ranks."""
        return Draws(self, bound) if self.group is None else None

    def run(self, n: int, lr: Sequence[float] | None = None) -> torch.Tensor:
        """n steps over the bound data, epoch after epoch; their n losses, on the device.

        lr  a learning rate for each step; the optimizer's own by default

        The last batch of an epoch may be smaller. The next call goes on where this one stopped.
        Losses, parameters and order are those of n calls, in every bit. On a GPU the host does no
        work for each step: it replays graphs of up to 64 steps, and sends an order for each epoch
        and a table of learning rates for each 1,024 steps.
        """
        self._ready(n, lr)
        losses = torch.empty(n, device=self.device)
        for at in range(0, n, TABLE):
            to = min(n, at + TABLE)
            with self.state.lock:
                if self._draws is None:
                    self._call(losses[at:to], None if lr is None else lr[at:to])
                else:
                    mine = None if lr is None else lr[at:to]
                    self._ahead(self.optimizer.rates(to - at, mine))
                    self._copy_losses(losses[at:to])
        return losses

    def _ahead(self, table: torch.Tensor) -> None:
        """Steps over the bound data, of which each draws its batch: one for each row of f32[n, K],
        the device's numbers."""
        draws = self._draws
        assert draws is not None and len(table) <= TABLE
        draws.send(table)
        self._take_over()
        try:
            self._step_with(functools.partial(draws.go, len(table)))
        except NumericsError:  # somewhere between: the numbers become those of the end
            self._hypers.tensor.copy_(table[-1][:, None])
            raise
        finally:
            self._inputs.drawn(*draws.bound.latest)
            self.optimizer.arrived(table[-1])

    @taking_turns
    def ahead(self, table: torch.Tensor) -> list[torch.Tensor]:
        """Steps over bound data, one for each row of f32[n, K] (`optimizer.rates` or `turned`); the
        loss of each, as a call gives it."""
        self._ahead(table)
        return [loss for part in self._latest(len(table)) for loss in part.unbind()]

    def _latest(self, n: int) -> list[torch.Tensor]:
        """The losses of the latest n steps, up to 4,096 of them, as parts of the ring."""
        ring = self._storage["ring"]
        first = (self.state.steps - n) % RING
        parts = ring[first : first + n], ring[: max(0, first + n - RING)]
        return [part for part in parts if len(part)]

    def _copy_losses(self, into: torch.Tensor) -> None:
        """Copies the losses of the latest steps out of the ring."""
        at = 0
        for part in self._latest(len(into)):
            into[at : at + len(part)].copy_(part)
            at += len(part)

    def _call(self, losses: torch.Tensor, lr: Sequence[float] | None) -> None:
        """The same steps, call by call."""
        bound = self._bound
        assert bound is not None
        for k in range(len(losses)):
            if lr is not None:
                self.optimizer.lr = float(lr[k])
            batch = bound.stored() if "index" in self._storage else bound.next()
            losses[k].copy_(self(*map(self._own, batch)))

    def _own(self, part: Any) -> Any:
        """This rank's rows of a part of a global batch."""
        if self.group is None or not isinstance(part, torch.Tensor):
            return part
        most = min(self._rows_before + self.shape[0], self.global_batch)
        return part[self._rows_before : most]

    def _ready(self, n: int, lr: Sequence[float] | None) -> None:
        """ConfigError unless data are bound and the arguments of `run` sound."""
        if self._bound is None:
            raise ConfigError("run without data", help="step.bind(images, labels) first")
        if not isinstance(n, int) or n < 0:
            raise ConfigError(f"run takes a number of steps, not {n!r}")
        if lr is not None and len(lr) != n:
            raise ConfigError(f"{len(lr)} learning rates for {n} steps", help="one for each step")
