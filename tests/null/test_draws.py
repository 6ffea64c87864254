"""Steps that draw their own batches: `run(n)` is n calls in every bit, and what the host does."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import graphnet as gn
from graphnet.runtime import bound as bounds
from graphnet.runtime.bound import Bound
from tests.draws import LOSS, WAYS, called, compiled, data, order_of, run_beside_calls, same
from tests.recorded import recorded


@pytest.mark.parametrize("way, rates, graphs", [
    *((way, True, True) for way in WAYS), ("bytes", False, True), ("summed", False, True),
    ("bytes", True, False), ("drawn", True, False), ("bf16", False, False),
])  # fmt: skip
def test_a_run_is_its_calls_in_every_bit(way, rates, graphs, monkeypatch):
    monkeypatch.setattr(bounds, "SIZES", (8, 4, 1))
    with recorded(monkeypatch) if graphs else nullcontext():
        step, got, twin, want = run_beside_calls(way, rates=rates)
    assert torch.equal(got, want)
    same(step, twin)
    assert step._inputs.live == twin._inputs.live


def test_calls_between_runs_and_other_settings_are_seen():
    images, labels = data()
    want, step = compiled(), compiled()
    step.bind(images, labels)
    order = order_of(6, 23)
    a = [step.run(2), step(images[:4].float() / 255, labels[:4])[None].clone()]
    step.optimizer.lr = 0.02
    a.append(step.run(5))
    b = [called(want, images, labels, 2), want(images[:4].float() / 255, labels[:4])[None].clone()]
    want.optimizer.lr = 0.02
    rest = [*order(0).split(4)[2:], order(1)[:4]]
    b.append(torch.stack([want(images[r].float() / 255, labels[r]).clone() for r in rest]))
    assert torch.equal(torch.cat(a), torch.cat(b))
    same(step, want)


class Ops(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))


def test_the_host_work_of_a_thousand_steps_is_counted(monkeypatch):
    """Batches of 128 out of MNIST's 60,000: 469 steps an epoch."""
    images, labels = torch.zeros(60000, 1, 2, 2, dtype=torch.uint8), torch.zeros(60000).long()
    with recorded(monkeypatch, idle=True) as replays:
        net = gn.Sequential(gn.Flatten(), gn.Linear(4, 3))
        step = gn.compile(
            net, (128, 1, 2, 2), target="cpu", loss=LOSS, optimizer=gn.SGD(lr=0.1, momentum=0.9)
        )
        step.bind(images, labels)
        rates = torch.rand(1000).tolist()
        with Ops() as ops:
            step.run(1000, lr=rates)
    assert replays == {64: 15, 16: 2, 4: 2}  # 19 for 1,000 steps
    # The table, the place, the orders of three epochs, and the losses out of their ring.
    assert ops.names["aten::copy_"] <= 1 + 1 + 3 + 1 + 1  # one more writes the rates into the table
    assert sum(ops.names.values()) < 60, ops.names


def test_a_place_is_where_its_batches_are():
    """Against a walk, batch by batch; also from a sample that begins no batch."""
    images, labels = data(11)
    for at, steps in ((0, 0), (0, 3), (3, 2), (10, 1), (5, 40)):
        bound = Bound(images, labels, 4, None)
        bound.at, epoch, place, live = at, 0, at, 0
        for _ in range(steps):
            live = min(4, 11 - place)
            last, place = epoch, place + live
            epoch, place = (epoch + 1, 0) if place == 11 else (epoch, place)
        bound.advance(steps)
        assert (bound.epoch, bound.at) == (epoch, place)
        assert not steps or bound.latest == (last, live)
        assert bound.left == -(-(11 - place) // 4) and bound.batches == 3


def test_bad_rates_and_sizes_are_refused():
    images, labels = data()
    step = compiled()
    with pytest.raises(gn.ConfigError, match="bind"):
        step.run(1)
    step.bind(images, labels)
    before = step.optimizer.state_dict()
    for rates in ([0.1, -1.0], [0.1, float("nan")], [1e39, 0.1]):
        with pytest.raises(gn.ConfigError, match="lr"):
            step.run(2, lr=rates)
    with pytest.raises(gn.ConfigError, match="2 learning rates for 3 steps"):
        step.run(3, lr=[0.1, 0.1])
    with pytest.raises(gn.ConfigError, match="number of steps"):
        step.run(-1)
    after = step.optimizer.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert step.run(0).shape == (0,)
