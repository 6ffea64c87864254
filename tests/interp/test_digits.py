"""LeNet-5 on real digits, held against its float64 twin on the cpu and the interpret target."""

from contextlib import ExitStack

import pytest
import torch

from graphnet.lowering.launch.choice import forced
from graphnet.ops.linear import Linear
from tests.case import attrs
from tests.kinds import PRODUCTS, WGRADS
from tests.twin import Twins, hold

STEPS = 50
ROWS = {"cpu": 64, "interpret": 8}
large = pytest.mark.usefixtures("large_tiles")
# What takes the interpreter half a minute, or minutes, belongs to the soak.
soaked = pytest.mark.parametrize(
    "target", ["cpu", pytest.param("interpret", marks=pytest.mark.slow)]
)


@pytest.fixture
def large_tiles():
    """The interpreter's time is per operation: few large tiles. Other tests run the real ones."""
    with ExitStack() as stack:
        stack.enter_context(forced(*PRODUCTS, BM=2048, BN=256, BK=512))
        stack.enter_context(forced(*WGRADS, BM=256, BN=512, BK=1024, SPLIT=1))
        stack.enter_context(forced("maxpool2d", "maxpool2d_grad", BLOCK=65536))
        yield


@soaked
@large
def test_fifty_steps_teacher_forced(target):
    rows = Twins(target, ROWS[target], lr=0.05).teacher_forced(STEPS)
    hold(rows)


@soaked
@large
def test_fifty_steps_free_running(target):
    Twins(target, ROWS[target], lr=0.01).free_running(STEPS)


@soaked
@large
def test_a_planted_error_of_one_percent_in_one_gradient_is_seen(target, monkeypatch):
    honest = Linear.vjp

    def planted(self, b, eqn, cotangents, needs):
        dx, dw, *rest = honest(self, b, eqn, cotangents, needs)
        if "fc2" in eqn.where.layers:
            wrong = attrs("full", shape=dw.type.shape, value=1.01)
            dw = b.one("mul", dw, b.one("full", attrs=wrong))
        return (dx, dw, *rest)

    monkeypatch.setattr(Linear, "vjp", planted)
    rows = Twins(target, 4, lr=0.05).teacher_forced(2)
    assert all(5e-3 < r.gradient < 2e-2 for r in rows), rows
    with pytest.raises(AssertionError):
        hold(rows)


@soaked
@large
def test_a_dropped_weight_decay_is_seen(target):
    with pytest.raises(AssertionError):
        hold(Twins(target, 2, lr=0.05, decay=0.0).teacher_forced(1))


def test_a_dropped_weight_decay_is_seen_in_a_free_run():
    with pytest.raises(AssertionError):
        Twins("cpu", ROWS["cpu"], lr=0.01, decay=0.0).free_running(STEPS)


def test_the_kernels_as_they_are_tuned():
    """One step with production tiles: interpret and cpu target agree on every parameter."""
    after = []
    for target in ("cpu", "interpret"):
        twins = Twins(target, 3, lr=0.05)
        twins.step(*_batch(3))
        after.append(twins.net.state_dict())
    for key in after[0]:
        torch.testing.assert_close(after[1][key], after[0][key], rtol=1e-5, atol=1e-6, msg=key)


def _batch(rows):
    g = torch.Generator().manual_seed(1)
    return torch.randn(rows, 1, 28, 28, generator=g), torch.randint(0, 10, (rows,), generator=g)


@soaked
@large
def test_same_seed_same_bits_and_a_schedule_compiles_nothing(target, monkeypatch):
    runs = []
    for _ in range(2):
        twins = Twins(target, 2, lr=0.05)
        with monkeypatch.context() as m:
            m.setattr("graphnet.lowering.plan.plan.make_plan", None)  # a recompile would need it
            for at in range(2):
                twins.step.optimizer.lr = 0.05 / (at + 1)
                twins.step(*_batch(2))
        runs.append(twins.net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(r.values() for r in runs), strict=True))
