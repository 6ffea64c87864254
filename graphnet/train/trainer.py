"""The training loop: epochs of compiled steps, a schedule between them, evaluation after them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from graphnet.api import _resolve, compile_together
from graphnet.errors import ConfigError, DataError, NumericsError, StateDictError
from graphnet.frontends.arguments import check_ranks, check_share
from graphnet.frontends.dsl import Module
from graphnet.ops.augment import Augment
from graphnet.passes.precision import resolve
from graphnet.runtime.diagnose import Finding
from graphnet.runtime.group import Group, group_of, share_buffers
from graphnet.runtime.program import Evaluate
from graphnet.runtime.training import TrainStep
from graphnet.train.feeding import Batched, batches_of, divided, feeding, pair, sample_shape
from graphnet.train.losses import Losses
from graphnet.train.metrics import RunningMean, topk_wrong
from graphnet.train.rundir import finite
from graphnet.train.schedule import Schedule

LISTEN = 16  # steps between two looks whether a rank stops, where looking waits for a GPU


@dataclass
class Partial:
    """An epoch that is under way: what a run that is taken up again must know of it."""

    batches: int = 0
    rows: int = 0
    loss: float = 0.0  # sum of rows * loss
    seconds: float = 0.0
    trained: bool = False  # only the evaluation is left
    skipped: int = 0  # steps that were not finite, and their rows
    skipped_rows: int = 0


class Callback:
    """Hooks of a Trainer; override what is needed. `trainer.stop = True` ends after the step."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, programs compiled."""

    def on_step(self, trainer: Trainer, loss: torch.Tensor) -> None:
        """After each step; reading the loss waits for the device. With a callback that does
        something here, each step is a call of its own, also where the data lie on a GPU."""

    def on_losses(self, trainer: Trainer, losses: Sequence[float]) -> None:
        """The losses of the latest steps, fetched together about twice a second."""

    def on_skip(self, trainer: Trainer, step: int, finding: Finding | None) -> None:
        """A step that was not finite was left out (`nonfinite="skip"`), and what was found."""

    def on_epoch(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """After each epoch and its evaluation: the place for checkpoints."""

    def on_stop(self, trainer: Trainer) -> None:
        """Stopped between two steps or in an evaluation: the place to save."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, also when an error ended the run."""


class Trainer:
    """Trains a net: `Trainer(net, gn.CrossEntropyLoss(), gn.SGD(0.01)).fit(train, val, epochs=3)`.

    schedule   step -> lr, see graphnet.train.schedule; None leaves the optimizer's lr alone. One
               with `observe(loss)` hears the validation loss (else the training loss) of each epoch
    callbacks  `Callback` objects, called in order
    accumulate, clip_norm  as for gn.compile. Epochs do not end a group of batches, and gradients
               of one that is not full when training ends are kept, not applied
    nonfinite  "stop": a step whose loss is not finite leaves the state as it was and raises
               NumericsError, which names the layer; "skip": it is left out, as is one whose
               gradients are not finite (which costs the update fusion), and 50 in a row raise. A
               GPU's losses are read about twice a second, so later steps may have run by then
    target, precision  as for gn.compile; `trainer.precision` is what "auto" became
    augment    a `gn.Augment`, drawn anew for each image in each epoch; the evaluation sees images
               as they are. Batches of a DataLoader are then what is stored: uint8, not normalised
    group      several processes train together, as for gn.compile. `batch` is that of all ranks,
               the data are the same on each, in memory or as image files, and so is the net.
               Metrics are those of all. Each rank has callbacks of its own; all end at the same
               step, where one of them sets `stop`
    sync_bn    as for gn.compile; without it the running statistics of rank 0 are evaluated and kept
    towers     as for gn.compile: two ranks, each of which reads all rows and holds half of the net
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
        augment: Augment | None = None,
        target: str = "auto",
        precision: str = "auto",
        seed: int = 0,
        accumulate: int = 1,
        clip_norm: float | None = None,
        nonfinite: str = "stop",
        group: Any = None,
        sync_bn: bool = False,
        towers: bool = False,
    ) -> None:
        self.handling: dict[str, Any] = {
            "accumulate": accumulate, "clip_norm": clip_norm, "nonfinite": nonfinite,
            "sync_bn": sync_bn,
        }  # fmt: skip
        self.sync_bn, self.towers = sync_bn, towers
        self.nonfinite = nonfinite
        if schedule is not None and not callable(schedule):
            raise ConfigError(
                f"{schedule!r} is no schedule", help="a function of the step: gn.schedule.step(...)"
            )
        self.net, self.loss, self.optimizer = net, loss, optimizer
        self.schedule: Any = schedule
        self.callbacks, self.augment = list(callbacks), augment
        self.target, self.seed = target, seed
        self.precision = resolve(precision, _resolve(target))
        self.group = group_of(group)
        if towers:
            check_ranks(1 if self.group is None else self.group.ranks, optimizer, False, True)
        self.epoch, self.step, self.stop = 0, 0, False
        self._told = False  # that a rank stops, as all ranks have heard it at the same step
        self.waited: str | None = None  # what the steps of the epoch waited for, if they did
        self.heard = 0  # steps whose losses `on_losses` has told
        self.history: list[dict[str, float]] = []
        self.partial: Partial | None = None
        self.data: Any = None
        self._data_state: Mapping[str, Any] | None = None
        self.program: TrainStep | None = None
        self._shape: tuple[int, ...] = ()
        self.evaluation: Evaluate | None = None

    def compile(self, shape: Sequence[int]) -> TrainStep:
        """Compiles the step and the evaluation for `shape`, the batch of all ranks first. `fit`
        does it if needed; call it before `load_state_dict` to resume."""
        if self.program is None or self._shape != tuple(shape):
            common = {"target": self.target, "precision": self.precision, "loss": self.loss}
            training = {"optimizer": self.optimizer, "augment": self.augment, **self.handling}
            own = tuple(shape)
            if self.towers and self.group is not None:
                common |= {"ranks": self.group.ranks, "towers": True}
            elif self.group is not None:
                own = (-(-shape[0] // self.group.ranks), *shape[1:])
                training |= {"ranks": self.group.ranks, "global_batch": shape[0]}
            ways = [common | training, common]
            step, evaluation = compile_together(
                self.net, own, ways, seed=self.seed, group=self.group
            )  # fmt: skip
            assert isinstance(step, TrainStep) and isinstance(evaluation, Evaluate)
            self.program, self.evaluation, self._shape = step, evaluation, tuple(shape)
        return self.program

    def fit(
        self, train: Any, val: Any = None, epochs: int = 1, batch: int = 128
    ) -> list[dict[str, float]]:
        """Trains until `epochs` epochs are done in all and returns their metrics.

        train, val  a Dataset or a Folder, a pair (images [N,C,H,W], labels) of tensors or arrays,
                    or an iterable of batches (a torch DataLoader) that may have `set_epoch(epoch)`
        A resumed trainer goes on behind its last whole epoch. NumericsError when the loss is
        not finite.
        """
        if not isinstance(epochs, int) or epochs < 0:
            raise ConfigError(f"epochs is a number of at least 0, not {epochs!r}")
        if not isinstance(batch, int) or batch < 1:
            raise ConfigError(f"batch is a positive int, not {batch!r}")
        train = self._batches(train, batch)
        if self.sharing is not None:
            check_share(min(batch, len(train.dataset)), batch, self.sharing.ranks)
        val = None if val is None else self._batches(val, batch, shuffle=False)
        self._prepare_augment(train)
        step = self.compile((batch, *sample_shape(self.net, train)))
        self._place(train)
        losses, feed = Losses(self, step), feeding(self, step, train)
        try:
            for c in self.callbacks:
                c.on_start(self)
            while self.epoch < epochs and not self.ending:
                metrics = self._epoch(step, feed, val, losses)
                if metrics is None:
                    break
                self.epoch, self.partial = self.epoch + 1, None
                self.history.append(metrics)
                if hasattr(self.schedule, "observe"):
                    self.schedule.observe(metrics.get("val_loss", metrics["train_loss"]))
                for c in self.callbacks:
                    c.on_epoch(self, metrics)
            if self.ending:
                for c in self.callbacks:
                    c.on_stop(self)
        finally:
            for c in self.callbacks:
                c.on_end(self)
            self.stop = self._told = False
        return self.history

    @property
    def ending(self) -> bool:
        """Whether training ends behind this step: `stop`, and with several ranks once all of them
        have heard that one of them has set it."""
        return self.stop if self.group is None else self._told

    @property
    def sharing(self) -> Group | None:
        """The ranks that share the rows of a batch; None where each has all of them."""
        return None if self.towers else self.group

    def _batches(self, data: Any, batch: int, *, shuffle: bool = True) -> Any:
        made = batches_of(data, batch, seed=self.seed, shuffle=shuffle)
        return made if self.sharing is None else divided(made, self.sharing)

    def _prepare_augment(self, train: Any) -> None:
        """Tells the augmentation about the data, and the data to come as they are stored."""
        from graphnet.train.augment import known
        from graphnet.train.data import Batches

        if isinstance(train, Batches):
            train.raw = self.augment is not None
            if self.augment is not None:
                self.augment = known(self.augment, train.dataset)

    def _place(self, train: Any) -> None:
        """Puts the data where a loaded `progress` left them."""
        self.data = train
        if self._data_state is not None and hasattr(train, "load_state"):
            train.load_state(self._data_state)
        self._data_state = None

    def _epoch(
        self, program: TrainStep, feed: Batched, val: Any, losses: Losses
    ) -> dict[str, float] | None:
        """The rest of the epoch and its evaluation: its metrics, None where it was stopped."""
        now = self.partial = self.partial or Partial()
        if not now.trained:
            self._train(feed, now, losses)
        if not now.trained:
            return None
        metrics = {
            "epoch": self.epoch + 1, "step": self.step, "lr": program.optimizer.lr,
            "train_loss": now.loss / (now.rows - now.skipped_rows), "seconds": now.seconds,
            "images_per_s": now.rows / now.seconds,
        }  # fmt: skip
        metrics |= {"skipped": now.skipped} if now.skipped else {}
        if val is not None:
            found = self._evaluate(val, interruptible=True)
            if found is None:
                return None
            metrics |= {"val_loss": found[0], "val_accuracy": found[1]}
        return metrics

    def _train(self, feed: Batched, now: Partial, losses: Losses) -> None:
        """Trains to the end of the epoch, or until stopped."""
        feed.begin(self.epoch, now.batches)
        listening = [c for c in self.callbacks if _hears_steps(c)]
        start, before = time.perf_counter(), now.rows
        # The stop is asked for before a batch is fetched: one that is fetched counts as trained.
        while not self.ending:
            if self.group is not None:
                self.group.stopping = self.stop
            done = feed.steps()
            if not done:
                now.trained = True
                break
            for fed in done:
                self.step += 1
                now.batches += 1
                now.rows += fed.rows
                losses.add(now, fed.rows, fed.loss, fed.again, holds=fed.holds)
                for c in listening:
                    c.on_step(self, fed.loss)
            if self.group is not None and (feed.at_once or self.step % LISTEN == 0):
                self._told = feed.program.ran.stop_told
        if feed.ended(self.epoch):
            now.trained = True  # stopped behind the last batch, before the end was asked for
        losses.fetch(now)
        self.waited = feed.waited(now.rows - before)
        now.seconds += time.perf_counter() - start
        if now.trained and not now.rows:
            raise DataError("the training data holds no batch")
        if now.trained and now.rows == now.skipped_rows:
            raise NumericsError(
                f"none of the {now.skipped} steps of epoch {self.epoch + 1} was finite",
                help="lower the learning rate, or clip the gradients (clip_norm)",
            )

    @property
    def stepwise(self) -> bool:
        """Whether a callback wants to be called behind each step, before the next one."""
        return any(map(_hears_steps, self.callbacks))

    def evaluate(self, val: Any, batch: int = 128) -> tuple[float, float]:
        """(mean loss, accuracy between 0 and 1) over a data set, by the evaluation program."""
        val = self._batches(val, batch, shuffle=False)
        if self.evaluation is None:
            self.compile((batch, *sample_shape(self.net, val)))
        found = self._evaluate(val, interruptible=False)
        assert found is not None
        return found

    def _evaluate(self, val: Any, *, interruptible: bool) -> tuple[float, float] | None:
        assert self.evaluation is not None
        rows, mean, group = 0, RunningMean(), self.sharing
        if group is not None and not self.sync_bn:
            share_buffers(group, self.net)
        wrong = torch.zeros((), dtype=torch.int64, device=self.evaluation.device)
        if hasattr(val, "set_epoch"):
            val.set_epoch(0)
        for batch in val:
            if interruptible and self._stops():
                return None
            x, y = pair(batch)
            if group is not None and not len(x):
                continue
            loss, logits = self.evaluation(x, y)
            rows += len(x)
            mean.add(loss, len(x))
            wrong += topk_wrong(logits, y)
        found, missed = mean.value(), int(wrong)
        if group is not None:
            total = group.total([rows, found * rows if rows else 0.0, missed])
            rows, missed = int(total[0]), int(total[2])
            found = total[1] / max(rows, 1)
        if not rows:
            raise DataError("the evaluation data holds no batch")
        return found, 1 - missed / rows

    def _stops(self) -> bool:
        """Whether an evaluation ends here, on all ranks."""
        if self.group is not None:
            self._told = self.group.any(self.stop)
        return self.ending

    # ---- resuming ---------------------------------------------------------------------------

    def progress(self) -> dict[str, Any]:
        """As JSON: what `state_dict` does not hold - the epoch under way, place in the data."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "history": finite(self.history),
            "partial": None if self.partial is None else asdict(self.partial),
            "data": self.data.state() if hasattr(self.data, "state") else None,
            "schedule": self.schedule.state() if hasattr(self.schedule, "state") else None,
        }

    def load_progress(self, progress: Mapping[str, Any]) -> None:
        """The inverse of `progress`; the next `fit` goes on exactly there."""
        self.epoch, self.step = progress["epoch"], progress["step"]
        self.history = [
            {k: math.nan if v is None else v for k, v in row.items()} for row in progress["history"]
        ]
        self.partial = None if progress["partial"] is None else Partial(**progress["partial"])
        self._data_state = progress["data"]
        learned = progress.get("schedule")
        if learned is not None and hasattr(self.schedule, "load_state"):
            self.schedule.load_state(learned)

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


def _hears_steps(c: Callback) -> bool:
    """Whether a callback does something behind each step."""
    return getattr(type(c), "on_step", None) is not Callback.on_step or "on_step" in vars(c)
