"""A trainer whose data lie on the device: the bits of one that is given batches."""

import math
import warnings

import pytest
import torch

import graphnet as gn
from graphnet.errors import NumericsError
from graphnet.runtime import bound as bounds
from graphnet.train import checkpoint, feeding
from graphnet.train.callbacks import Checkpoints, restore
from graphnet.train.data import Batches, Dataset
from graphnet.train.feeding import Batched, Resident, ResidentWarning
from graphnet.train.losses import Losses
from graphnet.train.trainer import Callback, Trainer
from tests.recorded import recorded

MEAN, STD = (0.3, 0.6), (0.2, 0.4)


def data(kind="u8", n=45):
    g = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (n, 2, 8, 8), generator=g).to(torch.uint8)
    images = images if kind == "u8" else images.float() / 255
    return Dataset(images, torch.randint(0, 5, (n,), generator=g), mean=MEAN, std=STD)


def trainer(schedule=None, augment=None, callbacks=(), **how):
    torch.manual_seed(3)
    net = gn.Sequential(
        gn.Conv2d(2, 4, 3), gn.ReLU(), gn.MaxPool2d(2), gn.Flatten(), gn.Dropout(0.3),
        gn.Linear(36, 5),
    )  # fmt: skip
    return Trainer(
        net, gn.CrossEntropyLoss(), gn.SGD(lr=0.1, momentum=0.9, weight_decay=1e-3), schedule,
        callbacks, target="cpu", seed=5, augment=augment, **how,
    )  # fmt: skip


def fit(t, train=None, epochs=3):
    return t.fit(train or data(), data(n=20), epochs=epochs, batch=4)


def final(t):
    return {**t.net.state_dict(), **t.state_dict()}


def like(one, two):
    a, b = final(one), final(two)
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Steps recorded, 8 to a graph at most, and losses read later."""
    monkeypatch.setattr(bounds, "SIZES", (8, 4, 1))
    monkeypatch.setattr(feeding, "together", lambda program: True)
    monkeypatch.setattr(Losses, "at_once", False)
    with recorded(monkeypatch) as counts:
        yield counts


def batched(monkeypatch, *args, **how):
    """What the same trainer comes to, batch by batch."""
    train = how.pop("train", None)
    with monkeypatch.context() as m:
        m.setattr(feeding, "resident", lambda *_: False)
        t = trainer(*args, **how)
        return t, fit(t, train)


SCHEDULES = {
    "none": lambda: None,
    "cosine": lambda: gn.schedule.cosine(0.1, 36, 4),
    "turning": lambda: gn.schedule.one_cycle(0.1, 36, momentum=(0.8, 0.95)),
    "plateau": lambda: gn.schedule.Plateau(gn.schedule.constant(0.1), patience=0, threshold=0.5),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", ["u8", "f32"])
def test_a_resident_run_has_the_bits_of_a_batched_one(name, kind, as_on_a_gpu, monkeypatch):
    a, history = batched(monkeypatch, SCHEDULES[name](), train=data(kind))
    before = sum(as_on_a_gpu.values())
    b = trainer(SCHEDULES[name]())
    again = fit(b, data(kind))
    like(a, b)
    for one, two in zip(history, again, strict=True):
        timed = ("seconds", "images_per_s")
        assert {k: v for k, v in one.items() if k not in timed} == {
            k: v for k, v in two.items() if k not in timed
        }
    # 12 steps an epoch: 8, and 4; what is left over are the evaluations, 5 batches an epoch.
    assert sum(as_on_a_gpu.values()) - before == 3 * (2 + 5) and as_on_a_gpu[8] == 3


def test_bytes_become_levels_on_a_gpu():
    d = data()
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 2, 16, 16)
    assert torch.equal(d.levels(), d.normalised(every).reshape(2, 256))


def test_augmentation_draws_by_the_place_in_the_data(as_on_a_gpu, monkeypatch):
    how = {"augment": gn.Augment(rotate=20.0, flip=0.5)}
    a, _ = batched(monkeypatch, **how)
    b = trainer(**how)
    fit(b)
    like(a, b)
    assert as_on_a_gpu[8] == 3


class Stopping:
    """A schedule that asks for a stop, as a signal would, at a step."""

    def __init__(self, step):
        self.step, self.trainer = step, None

    def __call__(self, step):
        if step == self.step:
            self.trainer.stop = True
        return 0.1 / (1 + step)


@pytest.mark.parametrize("step, stops", [(0, 8), (9, 12), (13, 20), (33, 36)])
def test_a_stop_saves_behind_a_call_and_goes_on_bit_for_bit(step, stops, as_on_a_gpu, monkeypatch,
                                                            tmp_path):  # fmt: skip
    rate = lambda step: 0.1 / (1 + step)
    whole, _ = batched(monkeypatch, rate)
    schedule = Stopping(step)
    first = schedule.trainer = trainer(schedule, callbacks=[Checkpoints(tmp_path)])
    fit(first)
    assert first.step == stops
    second = trainer(rate)
    second.compile((4, 2, 8, 8))
    restore(second, checkpoint.load_latest(tmp_path))
    fit(second)
    like(whole, second)


def test_a_callback_behind_each_step_gets_each_step(as_on_a_gpu):
    class Each(Callback):
        def __init__(self):
            self.losses = []

        def on_step(self, trainer, loss):
            self.losses.append((trainer.step, float(loss)))

    each = Each()
    t = trainer(callbacks=[each])
    fit(t, epochs=1)
    assert [s for s, _ in each.losses] == list(range(1, 13)) and set(as_on_a_gpu) == {1}


def test_a_loss_that_is_not_finite_is_found_behind_its_call(as_on_a_gpu):
    bad = data("f32")
    row = int(Batches(bad, 4, seed=5).order(0)[4 * 5])  # of step 5
    bad.images[row, 0, 0, 0] = math.nan
    t = trainer(nonfinite="stop")
    with pytest.raises(NumericsError, match="at step 5: the input holds NaN in row 0"):
        fit(t, bad)
    skipping = trainer(nonfinite="skip")
    history = fit(skipping, bad)
    assert [m["skipped"] for m in history] == [1, 1, 1]


def test_data_that_do_not_fit_are_sent_and_that_is_said_once(monkeypatch):
    class Gpu:
        device = torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8000, 80000))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 500)
    batches = Batches(data(), 4)
    assert 45 * 128 > 4000  # of the images alone
    t = trainer()
    with pytest.warns(ResidentWarning, match="tensors: 0.0 GiB of data, 0.0 GiB are free"):
        assert not feeding.resident(t, Gpu(), batches)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80000, 80000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert feeding.resident(t, Gpu(), batches)
        assert not feeding.resident(trainer(accumulate=2), Gpu(), batches)
        assert not feeding.resident(t, Gpu(), [(torch.zeros(4, 2, 8, 8), torch.zeros(4))])


def test_which_way_data_go():
    t = trainer()
    step = t.compile((4, 2, 8, 8))
    batches = Batches(data(), 4)
    assert type(feeding.feeding(t, step, batches)) is Resident
    assert type(feeding.feeding(t, step, list(batches))) is Batched
