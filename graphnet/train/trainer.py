"""The training loop: epochs of compiled steps, a schedule between them, evaluation after them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from graphnet.api import compile
from graphnet.errors import ConfigError, DataError, NumericsError, StateDictError
from graphnet.frontends.dsl import Module
from graphnet.runtime.program import Evaluate, TrainStep
from graphnet.train.schedule import Schedule

_DRAIN = 1024  # losses fetched at a time; the device keeps 4,096


class Callback:
    """Hooks of a Trainer; override what is needed. `trainer.stop = True` ends after the step."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, programs compiled."""

    def on_step(self, trainer: Trainer, loss: torch.Tensor) -> None:
        """After each step; reading the loss waits for the device."""

    def on_epoch(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """After each epoch and its evaluation: the place for checkpoints."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, also when an error ended the run."""


class Trainer:
    """Trains a net: `Trainer(net, gn.CrossEntropyLoss(), gn.SGD(0.01)).fit(train, val, epochs=3)`.

    schedule   step -> lr, see graphnet.train.schedule; None leaves the optimizer's lr alone
    callbacks  `Callback` objects, called in order
    epoch, step, history: epochs and steps done, and one metrics dict per epoch
    """

    def __init__(
        self,
        net: Module,
        loss: Any,
        optimizer: Any,
        schedule: Schedule | None = None,
        callbacks: Sequence[Callback] = (),
        *,
        target: str = "auto",
        precision: str = "fp32",
        seed: int = 0,
    ) -> None:
        self.net, self.loss, self.optimizer = net, loss, optimizer
        self.schedule, self.callbacks = schedule, list(callbacks)
        self.target, self.precision, self.seed = target, precision, seed
        self.epoch, self.step, self.stop = 0, 0, False
        self.history: list[dict[str, float]] = []
        self.program: TrainStep | None = None
        self.evaluation: Evaluate | None = None

    def compile(self, shape: Sequence[int]) -> TrainStep:
        """Compiles the step and the evaluation for `shape`, batch first. `fit` does it if needed;
        call it before `load_state_dict` to resume."""
        if self.program is None or self.program.shape != tuple(shape):
            common = {"target": self.target, "precision": self.precision, "loss": self.loss}
            step = compile(self.net, shape, seed=self.seed, optimizer=self.optimizer, **common)
            evaluation = compile(self.net, shape, **common)
            assert isinstance(step, TrainStep) and isinstance(evaluation, Evaluate)
            self.program, self.evaluation = step, evaluation
        return self.program

    def fit(
        self, train: Any, val: Any = None, epochs: int = 1, batch: int = 128
    ) -> list[dict[str, float]]:
        """Trains until `epochs` epochs are done in all and returns their metrics.

        train, val  a Dataset, a pair (images f32[N,C,H,W], labels), or an iterable of batches
                    that may have `set_epoch(epoch)`
        A resumed trainer goes on behind its last whole epoch. NumericsError when the loss is
        not finite.
        """
        if not isinstance(epochs, int) or epochs < 0:
            raise ConfigError(f"epochs is a number of at least 0, not {epochs!r}")
        if not isinstance(batch, int) or batch < 1:
            raise ConfigError(f"batch is a positive int, not {batch!r}")
        train = self._batches(train, batch, shuffle=True)
        val = None if val is None else self._batches(val, batch, shuffle=False)
        step = self.compile((batch, *_sample_shape(self.net, train)))
        self.stop = False
        try:
            for c in self.callbacks:
                c.on_start(self)
            while self.epoch < epochs and not self.stop:
                metrics = self._epoch(step, train)
                if metrics is None:
                    break
                if val is not None:
                    loss, accuracy = self.evaluate(val)
                    metrics |= {"val_loss": loss, "val_accuracy": accuracy}
                self.epoch += 1
                self.history.append(metrics)
                for c in self.callbacks:
                    c.on_epoch(self, metrics)
        finally:
            for c in self.callbacks:
                c.on_end(self)
        return self.history

    def _epoch(self, program: TrainStep, train: Any) -> dict[str, float] | None:
        """One pass over the data: its metrics, or None where a callback stopped it midway."""
        if hasattr(train, "set_epoch"):
            train.set_epoch(self.epoch)
        start, rows, total = time.perf_counter(), 0, 0.0
        pending: list[tuple[int, torch.Tensor]] = []
        for x, y in train:
            if self.stop:
                return None
            if self.schedule is not None:
                program.optimizer.lr = self.schedule(self.step)
            loss = program(x, y)
            self.step += 1
            rows += len(x)
            pending.append((len(x), loss))
            if len(pending) == _DRAIN:
                total += self._drain(pending)
            for c in self.callbacks:
                c.on_step(self, loss)
        total += self._drain(pending)
        if not rows:
            raise DataError("the training data holds no batch")
        seconds = time.perf_counter() - start
        return {
            "epoch": self.epoch + 1, "step": self.step, "lr": program.optimizer.lr,
            "train_loss": total / rows, "seconds": seconds, "images_per_s": rows / seconds,
        }  # fmt: skip

    def _drain(self, pending: list[tuple[int, torch.Tensor]]) -> float:
        """Sum of rows * loss; empties the list."""
        if not pending:
            return 0.0
        losses = torch.stack([loss for _, loss in pending]).double().cpu().tolist()
        first = self.step - len(pending)
        for at, value in enumerate(losses):
            if not math.isfinite(value):
                raise NumericsError(
                    f"the loss is {value} at step {first + at}", help="lower the learning rate"
                )
        total = sum(n * v for (n, _), v in zip(pending, losses, strict=True))
        pending.clear()
        return total

    def evaluate(self, val: Any, batch: int = 128) -> tuple[float, float]:
        """(mean loss, accuracy between 0 and 1) over a data set, by the evaluation program."""
        val = self._batches(val, batch, shuffle=False)
        if self.evaluation is None:
            self.compile((batch, *_sample_shape(self.net, val)))
        assert self.evaluation is not None
        rows, total, right = 0, 0.0, 0
        for x, y in val:
            loss, logits = self.evaluation(x, y)
            rows += len(x)
            total += len(x) * float(loss)
            right += int((logits.argmax(1).cpu() == y.cpu()).sum())
        if not rows:
            raise DataError("the evaluation data holds no batch")
        return total / rows, right / rows

    def _batches(self, data: Any, batch: int, *, shuffle: bool) -> Any:
        from graphnet.train.data import Batches, Dataset

        if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], torch.Tensor):
            data = Dataset(*data)
        if isinstance(data, Dataset):
            return Batches(data, batch, seed=self.seed, shuffle=shuffle)
        if isinstance(data, Iterable) and iter(data) is not data:
            return data
        raise DataError(
            f"{type(data).__name__} cannot be read epoch after epoch",
            help="give a Dataset, a pair (images, labels) or an iterable of (x, y) batches",
        )

    # ---- resuming ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Optimizer state and progress; the net's own state_dict is saved beside it."""
        if self.program is None:
            raise StateDictError("the trainer has no state yet", help="trainer.compile(shape)")
        out = {f"optimizer.{k}": v for k, v in self.program.optimizer.state_dict().items()}
        return out | {"epoch": torch.tensor(self.epoch), "step": torch.tensor(self.step)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `state_dict`; call `compile(shape)` first."""
        if self.program is None:
            raise StateDictError("the step is not compiled", help="trainer.compile(shape)")
        if missing := {"epoch", "step"} - set(state):
            raise StateDictError(f"trainer state lacks {', '.join(sorted(missing))}")
        prefix = "optimizer."
        self.program.optimizer.load_state_dict(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        )
        self.epoch, self.step = int(state["epoch"]), int(state["step"])


def _sample_shape(net: Module, batches: Any) -> tuple[int, ...]:
    """Shape of one sample: what the net declares, else that of the first batch."""
    if net.input_shape is not None:
        return tuple(net.input_shape)
    for x, _ in batches:
        return tuple(x.shape[1:])
    raise DataError("the data holds no batch")
