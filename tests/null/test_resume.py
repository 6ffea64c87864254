"""Stopped anywhere and taken up again, a run over image files ends in the same bits.

Five places (the start, mid-epoch, the end of an epoch, two evaluations) by four optimizers and
recipes, with decode workers and without: 20 runs.
"""

import pytest
import torch
from PIL import Image

import graphnet as gn
from graphnet.train import checkpoint
from graphnet.train.callbacks import Checkpoints, restore
from graphnet.train.data import Batches, load
from graphnet.train.folder import Reading
from graphnet.train.schedule import Plateau, constant
from graphnet.train.trainer import Trainer
from tests.stopping import StopAt, StopInEval

SHAPE = (3, 8, 8)
STEPS = 4  # of an epoch
RECIPES = {
    "plain": (0, lambda: gn.SGD(lr=0.05), {}),
    "nesterov": (2, lambda: gn.SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3), {}),
    "adam": (0, lambda: gn.Adam(lr=0.01, l1=1e-4), {"clip_norm": 0.5}),
    "accumulating": (2, lambda: gn.SGD(lr=0.05, momentum=0.9, form="classic"), {"accumulate": 3}),
}
STOPS = [0, 2, 4, "eval0", "eval1"]

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("images")
    g = torch.Generator().manual_seed(0)
    for split, count in (("train", 11), ("test", 4)):
        for name in ("a", "b"):
            (base / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = torch.randint(0, 256, (10, 10, 3), dtype=torch.uint8, generator=g)
                Image.fromarray(pixels.numpy()).save(base / split / name / f"{k:02d}.png")
    return base


def start(folder, recipe):
    """(trainer, training batches, test batches)."""
    workers, optimizer, handling = RECIPES[recipe]
    torch.manual_seed(3)
    net = gn.Sequential(
        gn.Conv2d(3, 4, 3), gn.BatchNorm2d(4, momentum=None), gn.ReLU(), gn.Flatten(),
        gn.Dropout(0.3), gn.Linear(144, 2),
    )  # fmt: skip
    schedule = Plateau(constant(0.05), patience=0)
    trainer = Trainer(
        net, gn.CrossEntropyLoss(), optimizer(), schedule, target="cpu", seed=5, **handling
    )
    sets = [load(f"imagefolder:{folder}", s, shape=SHAPE, resize=10) for s in ("train", "test")]
    reading = Reading(workers)
    train = Batches(sets[0], 6, seed=5, reading=reading, cut="random", flip=True)
    return trainer, train, Batches(sets[1], 6, shuffle=False, reading=reading)


def final(trainer):
    return {**trainer.net.state_dict(), **trainer.state_dict()}


_whole: dict = {}


def whole(folder, recipe):
    """The run that nobody stopped."""
    if recipe not in _whole:
        trainer, train, test = start(folder, recipe)
        _whole[recipe] = (trainer.fit(train, test, epochs=2, batch=6), final(trainer))
    return _whole[recipe]


def stop_and_go_on(folder, run, recipe, stop):
    history, want = whole(folder, recipe)
    first, train, test = start(folder, recipe)
    first.callbacks = [Checkpoints(run)]
    if isinstance(stop, int):
        first.callbacks.append(StopAt(stop))
        first.stop = stop == 0
        first.fit(train, test, epochs=2, batch=6)
        assert first.step == stop
    else:
        epoch = int(stop[4:])
        first.fit(train, StopInEval(test, first, epoch), epochs=2, batch=6)
        assert first.epoch == epoch and first.step == STEPS * (epoch + 1)
    second, train, test = start(folder, recipe)
    second.compile((6, *SHAPE))
    restore(second, checkpoint.load_latest(run))
    again = second.fit(train, test, epochs=2, batch=6)
    for key, value in final(second).items():
        assert torch.equal(value, want[key]), key
    assert [m["val_loss"] for m in again] == [m["val_loss"] for m in history]
    assert [m["lr"] for m in again] == [m["lr"] for m in history]


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_stopped_run_ends_in_the_same_bits(folder, tmp_path, recipe, stop):
    stop_and_go_on(folder, tmp_path, recipe, stop)
