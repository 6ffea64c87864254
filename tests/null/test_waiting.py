"""What a run says that its steps waited for."""

import re
import time

import pytest
import torch

import graphnet as gn
from graphnet.train import waiting
from graphnet.train.callbacks import Progress
from graphnet.train.waiting import Waiting

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Clock:
    """Events of a device whose work ends when it is told."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Clock.now

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


@pytest.mark.parametrize("kept", [1024, 4])
def test_on_a_gpu_the_time_between_steps_counts(kept, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(waiting, "KEPT", kept)
    w = Waiting(GPU)
    Clock.now = 0.0
    for k in range(12):
        with w.step():
            Clock.now += 3.0
        Clock.now += 1.0 if k % 2 else 0.25
    w.finish()
    assert w.idle == pytest.approx(6 * 0.25 + 5 * 1.0)


@pytest.mark.parametrize("idle, fetching, decoded, says", [
    (0.9, 5.0, 100, None), (2.0, 1.5, 90, "20% .* image files to be decoded"),
    (2.0, 1.5, 10, "batches to be read"), (5.0, 1.0, 0, "50% .* the host"),
])  # fmt: skip
def test_what_is_said(idle, fetching, decoded, says):
    w = Waiting(CPU)
    w.seconds, w.idle, w.fetching = 10.0, idle, fetching
    told = w.told(decoded, 100)
    assert told is None if says is None else re.search(says, told)


def test_a_run_with_slow_batches_says_so(capsys):
    class Slow:
        def __iter__(self):
            for _ in range(4):
                time.sleep(0.05)
                yield torch.rand(4, 1, 4, 4), torch.zeros(4, dtype=torch.int64)

    net = gn.Sequential(gn.Flatten(), gn.Linear(16, 3))
    trainer = gn.Trainer(
        net, gn.CrossEntropyLoss(), gn.SGD(0.1), callbacks=[Progress(1, 4, 16)], target="cpu"
    )
    trainer.fit(Slow(), epochs=1, batch=4)
    assert "% of the time the step waited for batches to be read" in capsys.readouterr().err
