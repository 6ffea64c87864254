"""How the steps of a trainer get their batches.

`Resident`: the data lie on the device and the steps draw for themselves, many to a call. `Batched`:
batches come from an iterable, one by one. Which it is shows in nothing but the time: order, losses
and parameters are the same in every bit.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from graphnet.errors import DataError
from graphnet.frontends.dsl import Module
from graphnet.runtime.group import Group
from graphnet.runtime.training import TrainStep
from graphnet.train.data import Batches, Dataset
from graphnet.train.folder import Folder
from graphnet.train.schedule import turn
from graphnet.train.waiting import Waiting

if TYPE_CHECKING:
    from graphnet.train.trainer import Trainer

SHARE = 0.5  # of a GPU's free memory that a data set may take


class ResidentWarning(UserWarning):
    """A data set in memory does not fit on the device beside the step."""


@dataclass(frozen=True)
class Fed:
    """A step that was done: its rows on all ranks and its loss. `again` gives its batch once more,
    as the step took it, and keeps `holds` bytes for that."""

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

    Steps that are summed up, or that several ranks do, are called one by one. On a CPU the images
    must be normalised before, which is done only to small sets.
    """
    if type(train) is not Batches or not isinstance(train.dataset, Dataset):
        return False
    if trainer.handling["accumulate"] > 1 or trainer.group is not None:
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

    @property
    def at_once(self) -> bool:
        """Whether what a step has heard from other ranks is read without waiting for a device."""
        return self.program.device.type == "cpu"

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
        rows = len(x)
        if trainer.group is not None:
            # Reading from a GPU how many there were would wait for it.
            planned = min(self.train.batch, len(self.train.dataset) - place["cursor"])
            rows = self.program.ran.rows_of_all(rows) if self.at_once else planned
        return [Fed(rows, loss, partial(self._again, place))]

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


def batches_of(data: Any, batch: int, *, seed: int, shuffle: bool) -> Any:
    """Whatever is trained on, as an iterable of batches that may be read epoch after epoch."""
    if isinstance(data, tuple | list) and len(data) == 2 and hasattr(data[0], "ndim"):
        data = Dataset.of(*data)
    if isinstance(data, Dataset | Folder):
        return Batches(data, batch, seed=seed, shuffle=shuffle)
    # `iter` of a DataLoader starts its workers, so it is not called to find out.
    if isinstance(data, Iterable) and not isinstance(data, Iterator | str):
        return data
    raise DataError(
        f"{type(data).__name__} cannot be read epoch after epoch",
        help="give a Dataset (graphnet.train.data.load reads one), a pair (images, labels), or "
        "an iterable of (x, y) batches: a torch DataLoader",
    )


def divided(batches: Any, group: Group) -> Batches:
    """Batches of which this rank reads its own rows; DataError where that cannot be."""
    if not isinstance(batches, Batches):
        raise DataError(
            f"several ranks cannot share a {type(batches).__name__}: nobody knows its batches "
            "before they are read",
            help="give a Dataset, a pair (images, labels) or graphnet.train.data.Batches",
        )
    batches.share = group.rank, group.ranks
    return batches


def sample_shape(net: Module, batches: Any) -> tuple[int, ...]:
    """Shape of one sample: what the net declares, else that of the first batch."""
    if net.input_shape is not None:
        return tuple(net.input_shape)
    if isinstance(batches, Batches):  # drawing a batch would move its place
        return tuple(batches.dataset.shape)
    for batch in batches:
        return tuple(pair(batch)[0].shape[1:])
    raise DataError("the data holds no batch")


def pair(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, y) of what an iterable gives as a batch."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        many = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise DataError(
            f"a batch is a {type(batch).__name__}{many}, not a pair (images, labels)",
            help="wrap the loader in an iterable that gives (x, y)",
        )
    return batch[0], batch[1]
