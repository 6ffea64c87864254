"""How the steps of a trainer get their batches.

`Resident`: the data lie on the device and the steps draw for themselves, many to a call. `Batched`:
batches come from an iterable, one by one. Which it is shows in nothing but the time: order, losses
and parameters are the same in every bit.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from graphnet.errors import DataError
from graphnet.runtime.training import TrainStep
from graphnet.train.data import Batches, Dataset
from graphnet.train.schedule import turn
from graphnet.train.waiting import Waiting

if TYPE_CHECKING:
    from graphnet.train.trainer import Trainer

SHARE = 0.5  # of a GPU's free memory that a data set may take


class ResidentWarning(UserWarning):
    """A data set in memory does not fit on the device beside the step."""


@dataclass(frozen=True)
class Fed:
    """A step that was done: its rows and its loss. `again` gives its batch once more, as the step
    took it, and keeps `holds` bytes for that."""

    rows: int
    loss: torch.Tensor
    again: Callable[[], Sequence[Any]]
    holds: int = 0


def feeding(trainer: Trainer, program: TrainStep, train: Any) -> Batched:
    """How `train` reaches the program."""
    if resident(trainer, program, train):
        return Resident(trainer, program, train)
    return Batched(trainer, program, train)


def resident(trainer: Trainer, program: TrainStep, train: Any) -> bool:
    """Whether the data can lie on the device: a data set in memory, of which there is room for.

    Steps that are summed up are called one by one. On a CPU the images must be normalised before,
    which is done only to small sets.
    """
    if type(train) is not Batches or not isinstance(train.dataset, Dataset):
        return False
    if trainer.handling["accumulate"] > 1:
        return False
    data, device = train.dataset, program.device
    if device.type == "cpu":
        return train.raw or train.ready is not None
    orders = 8 * len(data) * 4  # labels, two orders, and what is under way
    needed = data.images.numel() * data.images.element_size() + orders
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if needed <= SHARE * free:
        return True
    warnings.warn(
        f"{data.name}: {needed / 2**30:.1f} GiB of data, {free / 2**30:.1f} GiB are free on the "
        "device: batches are sent there one by one",
        ResidentWarning,
        stacklevel=2,
    )
    return False


def together(program: TrainStep) -> bool:
    """Whether several steps are one call: not on a CPU, where each loss is read at once."""
    return program.device.type != "cpu"


class Batched:
    """Batches of an iterable, each given to the step."""

    def __init__(self, trainer: Trainer, program: TrainStep, train: Any) -> None:
        self.trainer, self.program, self.train = trainer, program, train
        self._batches: Iterator[Any] = iter(())
        self._waiting, self._decoded = Waiting(program.device), 0

    def begin(self, epoch: int, done: int) -> None:
        """Goes to the beginning of an epoch, or to where its batches have been `done` so far."""
        if hasattr(self.train, "set_epoch"):
            self.train.set_epoch(epoch)
        self._batches = iter(self.train)
        if not hasattr(self.train, "state"):  # deterministic by its epoch, or not to be resumed
            self._batches = itertools.islice(self._batches, done, None)
        self._waiting, self._decoded = Waiting(self.program.device), self._decoded_by_now()

    def _decoded_by_now(self) -> int:
        return getattr(getattr(self.train, "dataset", None), "decoded", 0)

    def waited(self, rows: int) -> str | None:
        """Behind the last step, the device done: what the steps of so many rows waited for, where
        it is worth saying."""
        self._waiting.finish()
        return self._waiting.told(self._decoded_by_now() - self._decoded, rows)

    def steps(self) -> list[Fed]:
        """Does the next steps, one or more; none at the end of the epoch. A batch that is fetched
        is trained on."""
        place = self.train.state() if hasattr(self.train, "state") else None
        with self._waiting.fetch():
            batch = next(self._batches, None)
        if batch is None:
            return []
        x, y = pair(batch)
        trainer = self.trainer
        if trainer.schedule is not None:
            turn(self.program.optimizer, trainer.schedule(trainer.step))
        taken = (x, y, *self._drawn_by(self.train))
        with self._waiting.step():
            loss = self.program(*taken)
        if place is None:
            return [Fed(len(x), loss, partial(tuple, taken), x.nbytes)]
        return [Fed(len(x), loss, partial(self._again, place))]

    def ended(self, epoch: int) -> bool:
        """Whether nothing of the epoch is left, where that is known before it is asked for."""
        return hasattr(self.train, "state") and self.train.state()["epoch"] > epoch

    def _drawn_by(self, train: Any) -> tuple[Any, ...]:
        """What the augmentation of the batch at hand draws by."""
        if self.trainer.augment is None or not hasattr(train, "rows"):
            return ()
        return train.rows, self.trainer.epoch

    def _again(self, place: Mapping[str, Any]) -> tuple[Any, ...]:
        """The batch that a data set gave at a place, as a step takes it."""
        other = copy.copy(self.train)  # the iteration under way keeps its own place
        other.load_state(place)
        x, y = next(iter(other))
        return x, y, *self._drawn_by(other)


class Resident(Batched):
    """The data lie on the device, and each step draws its batch.

    On a GPU several steps are one call, up to as many as its largest graph has, and none beyond the
    end of an epoch; one at a time where a callback wants to be called behind each. On a CPU losses
    are read step by step, so each is a call of its own there.
    """

    def __init__(self, trainer: Trainer, program: TrainStep, train: Batches) -> None:
        super().__init__(trainer, program, train)
        data = train.dataset
        assert isinstance(data, Dataset)
        images, levels = data.images, None
        if not train.raw and program.device.type == "cpu":
            assert train.ready is not None
            images = train.ready
        elif not train.raw and images.dtype == torch.uint8:
            levels = data.levels()
        elif not train.raw:
            images = data.normalised(images)
        order = train.order if train.shuffle else None
        self.bound = program._bind(images, data.labels, order, levels)
        self.most = 1
        if together(program) and not trainer.stepwise:
            assert program._draws is not None
            self.most = program._draws.sizes[0]

    def waited(self, rows: int) -> str | None:
        """Nothing: what a step reads lies there."""
        return None

    def begin(self, epoch: int, done: int) -> None:
        self.train.set_epoch(epoch)
        self.bound.epoch, self.bound.at = epoch, self.train.cursor

    def steps(self) -> list[Fed]:
        trainer, bound, train = self.trainer, self.bound, self.train
        if bound.epoch > trainer.epoch:
            train.end()
            return []
        n = min(self.most, bound.left)
        state, at, optimizer = train.state(), bound.at, self.program.optimizer
        if trainer.schedule is None:
            table = optimizer.rates(n, None)
        else:
            turns = [trainer.schedule(trainer.step + k) for k in range(n)]
            table = optimizer.turned([t if isinstance(t, dict) else {"lr": t} for t in turns])
        out = []
        for loss in self.program.ahead(table):
            rows = min(bound.batch, len(bound) - at)
            place = {**state, "cursor": at}
            out.append(Fed(rows, loss, partial(self._again, place)))
            at += rows
        train.cursor = at
        if self.most > 1 and 2 * at > len(bound):
            bound.ordered(trainer.epoch + 1)  # made while the device has enough to do
        return out


def pair(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, y) of what an iterable gives as a batch."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        many = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise DataError(
            f"a batch is a {type(batch).__name__}{many}, not a pair (images, labels)",
            help="wrap the loader in an iterable that gives (x, y)",
        )
    return batch[0], batch[1]
