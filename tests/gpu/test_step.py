"""LeNet-5's fused step on the GPU: right, captured as uncaptured, same seed same bits."""

import gc

import pytest
import torch

import graphnet as gn
from graphnet import config
from graphnet.lowering.targets import cuda
from tests.twin import Twins, batch_of, hold

SHAPE = (64, 1, 28, 28)
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


def test_fifty_steps_teacher_forced():
    hold(Twins("cuda", 64, lr=0.05).teacher_forced(50))


def test_fifty_steps_free_running():
    Twins("cuda", 64, lr=0.01).free_running(50)


def trained(precision="fp32", steps=5, capture=True, monkeypatch=None):
    if not capture:
        real = cuda.prepare
        monkeypatch.setattr(cuda, "prepare", lambda p, s: real(p, s, capture=False))
    torch.manual_seed(0)
    net = gn.models.lenet5()
    step = gn.compile(
        net, SHAPE, target="cuda", precision=precision, loss=gn.CrossEntropyLoss(),
        optimizer=gn.SGD(**SGD),
    )  # fmt: skip
    losses = [float(step(*batch_of(k, 64))) for k in range(steps)]
    return losses, net.state_dict()


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_captured_steps_are_bit_equal_to_uncaptured_ones(precision, monkeypatch):
    losses, state = trained(precision)
    again, twin = trained(precision, capture=False, monkeypatch=monkeypatch)
    assert losses == again and all(torch.equal(state[k], twin[k]) for k in state)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_the_same_seed_gives_the_same_bits(precision):
    runs = [trained(precision, steps=20) for _ in range(3)]
    for losses, state in runs[1:]:
        assert losses == runs[0][0]
        assert all(torch.equal(state[k], runs[0][1][k]) for k in state)


def test_every_way_to_run_updates_beside_the_rest_has_the_same_bits():
    """GRAPHNET_STREAMS: one stream, two, and few programs that walk over the second one's tiles."""
    x, y = torch.randn(128, 8, 16, 16), torch.randint(0, 1000, (128,))
    found = {}
    for streams in ("0", "1", "16", "132"):
        torch.manual_seed(0)
        net = gn.Sequential(
            gn.Conv2d(8, 16, 3, padding=1), gn.ReLU(), gn.Flatten(), gn.Linear(4096, 4096),
            gn.ReLU(), gn.Linear(4096, 1000),
        )  # fmt: skip
        with config.override(STREAMS=streams):
            step = gn.compile(
                net, x.shape, target="cuda", precision="bf16", loss=gn.CrossEntropyLoss(),
                optimizer=gn.SGD(**SGD),
            )  # fmt: skip
        assert any(step.plan.streams) == (streams != "0")
        walks = [s.grid for s in step.plan.launches if dict(s.constants).get("PROGRAMS") and
                 s.kernel == "linear_wgrad"]  # fmt: skip
        assert walks == [(int(streams), 1, 1)] * (2 if int(streams) > 1 else 0)
        found[streams] = [float(step(x, y)) for _ in range(3)], net.state_dict()
    losses, state = found["1"]
    for other, values in found.values():
        assert other == losses and all(torch.equal(values[k], state[k]) for k in state)


def test_replay_does_no_work_on_the_host():
    torch.manual_seed(0)
    net = gn.models.lenet5()
    step = gn.compile(net, SHAPE, target="cuda", precision="fp32", loss=gn.CrossEntropyLoss(),
                      optimizer=gn.SGD(**SGD))  # fmt: skip
    x, y = (t.cuda() for t in batch_of(0, 64))
    with torch.cuda.device(0):
        for _ in range(3):
            step(x, y)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")  # a hidden synchronisation raises
        try:
            losses = [step(x, y) for _ in range(5)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(torch.stack(losses)).tolist())


def test_what_a_captured_step_reads_lives_as_long_as_it():
    """Tables of a launch are memory of ours: freed with the calls, it would be someone else's."""
    shape = (128, 64, 9, 9)
    torch.manual_seed(0)
    net = gn.Sequential(
        gn.Conv2d(64, 64, 3, padding=1), gn.ReLU(), gn.Conv2d(64, 64, 3, padding=1), gn.Flatten(),
        gn.Linear(64 * 81, 10),
    )  # fmt: skip
    step = gn.compile(
        net, shape, target="cuda", precision="bf16", loss=gn.CrossEntropyLoss(),
        optimizer=gn.SGD(lr=0.0),
    )  # fmt: skip
    assert step.plan.tables
    x, y = torch.randn(shape, device="cuda"), torch.randint(0, 10, (128,), device="cuda")
    first = float(step(x, y))
    gc.collect()
    held = [torch.full((n,), 2**30, dtype=torch.int32, device="cuda") for n in (64, 512, 4096) * 99]
    assert float(step(x, y)) == first and len(held) == 297
