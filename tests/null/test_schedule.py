"""Schedules beside torch.optim.lr_scheduler, step by step; none of them recompiles anything."""

import math
import warnings

import pytest
import torch

import graphnet as gn
from graphnet.train import checkpoint
from graphnet.train.callbacks import Checkpoints, restore
from graphnet.train.schedule import NAMES, Plateau, by_name, turn
from graphnet.train.trainer import Callback

S = gn.schedule
T = torch.optim.lr_scheduler
N = 60


def torchs(make, lr=0.1, momentum=0.9):
    """(rates, momenta) that torch uses at each of N steps."""
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr, momentum)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside of SequentialLR
        scheduler = make(sgd)
        for _ in range(N):
            rates.append((sgd.param_groups[0]["lr"], sgd.param_groups[0]["momentum"]))
            sgd.step()
            scheduler.step()
    return zip(*rates, strict=True)


def chained(then, steps, start):
    return lambda o: T.SequentialLR(
        o, [T.LinearLR(o, start, total_iters=steps), then(o)], milestones=[steps]
    )


@pytest.mark.parametrize("ours, theirs", [
    (S.constant(0.1), lambda o: T.ConstantLR(o, 1.0)),
    (S.step(0.1, 13, 0.3), lambda o: T.StepLR(o, 13, 0.3)),
    (S.multistep(0.1, [7, 20, 41]), lambda o: T.MultiStepLR(o, [7, 20, 41])),
    (S.exponential(0.1, 0.93), lambda o: T.ExponentialLR(o, 0.93)),
    (S.cosine(0.1, N, final=0.01), lambda o: T.CosineAnnealingLR(o, N, 0.01)),
    (S.warmup(S.step(0.1, 9), 11, 0.2), chained(lambda o: T.StepLR(o, 9), 11, 0.2)),
    (S.warmup(S.cosine(0.1, N - 8), 8), chained(lambda o: T.CosineAnnealingLR(o, N - 8), 8, 0.1)),
    (S.one_cycle(0.1, N), lambda o: T.OneCycleLR(o, 0.1, N, cycle_momentum=False)),
    (S.one_cycle(0.1, N, up=0.45, div=9, final_div=50),
     lambda o: T.OneCycleLR(o, 0.1, N, pct_start=0.45, div_factor=9, final_div_factor=50,
                            cycle_momentum=False)),
], ids=lambda v: getattr(v, "__qualname__", "").split(".")[0])  # fmt: skip
def test_every_rate_is_torchs(ours, theirs):
    rates, _ = torchs(theirs)
    assert [ours(at) for at in range(N)] == pytest.approx(list(rates), rel=1e-12)


def test_one_cycle_turns_the_momentum_the_other_way():
    ours = S.one_cycle(0.1, N, momentum=(0.85, 0.95))
    rates, momenta = torchs(lambda o: T.OneCycleLR(o, 0.1, N))
    assert [ours(at)["lr"] for at in range(N)] == pytest.approx(list(rates), rel=1e-12)
    assert [ours(at)["momentum"] for at in range(N)] == pytest.approx(list(momenta), rel=1e-12)


@pytest.mark.parametrize("options", [
    {}, {"patience": 3, "factor": 0.5}, {"patience": 0, "cooldown": 4}, {"threshold": 0.1},
    {"patience": 1, "least": 1e-3},
])  # fmt: skip
def test_plateau_is_torchs(options):
    draw = torch.Generator().manual_seed(len(options))
    losses = (torch.rand(80, generator=draw) * 0.5 + 1 / (1 + torch.arange(80) / 5)).tolist()
    losses[40] = math.nan
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
    named = {"least": "min_lr"}
    other = T.ReduceLROnPlateau(sgd, eps=0, **{named.get(k, k): v for k, v in options.items()})
    ours, fresh = (Plateau(S.constant(0.1), **options) for _ in range(2))
    seen = set()
    for at, loss in enumerate(losses):
        fresh.load_state(ours.state())  # nothing else is remembered
        ours = Plateau(S.constant(0.1), **options)
        ours.load_state(fresh.state())
        ours.observe(loss)
        other.step(loss)
        assert ours(at) == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-12), at
        seen.add(ours(at))
    assert len(seen) > 1  # the rate did fall


@pytest.mark.parametrize("make", [
    lambda: S.exponential(0.1, 0), lambda: S.warmup(S.constant(0.1), 0),
    lambda: S.warmup(S.constant(0.1), 5, 1.5), lambda: S.one_cycle(0.1, 2),
    lambda: S.one_cycle(0.1, 100, up=1.0), lambda: S.one_cycle(0.0, 100),
    lambda: Plateau(S.constant(0.1), factor=1.0), lambda: Plateau(S.constant(0.1), patience=-1),
    lambda: by_name("zigzag", 0.1, 10),
    lambda: S.step("fast", 3), lambda: S.step(0.1, None), lambda: S.constant(1e39),
    lambda: S.multistep(0.1, [-3, 5]), lambda: S.multistep(0.1, 5), lambda: S.multistep(0.1, "ab"),
    lambda: S.multistep(0.1, [math.nan]), lambda: S.cosine(0.1, 10, "few"),
    lambda: S.cosine(0.1, 10, final=0.2), lambda: S.warmup(0.1, 5), lambda: Plateau(0.1),
    # Nobody would tell it of the losses.
    lambda: S.warmup(Plateau(S.constant(0.1)), 5),
    lambda: S.one_cycle(0.1, 10, momentum=0.9), lambda: S.one_cycle(0.1, 10, momentum=(0.0, 0.9)),
    lambda: S.one_cycle(0.1, 10, momentum=(0.9, 0.8)),
    lambda: gn.Trainer(net(), gn.CrossEntropyLoss(), gn.SGD(0.1), 0.1),
])  # fmt: skip
def test_bad_settings_are_refused(make):
    with pytest.raises(gn.ConfigError):
        make()


@pytest.mark.parametrize("name", NAMES)
def test_behind_the_end_a_schedule_stays_or_goes_on_falling(name):
    rate = by_name(name, 0.1, N)
    late = [rate(at) for at in (N - 1, N, N + 1, 3 * N, 50 * N)]
    late = [v["lr"] if isinstance(v, dict) else v for v in late]
    assert all(0 <= b <= a for a, b in zip(late, late[1:], strict=False))


def net():
    torch.manual_seed(3)
    return gn.Sequential(gn.Flatten(), gn.Linear(9, 4))


def data():
    g = torch.Generator().manual_seed(0)
    return torch.rand(32, 1, 3, 3, generator=g), torch.randint(0, 4, (32,), generator=g)


@pytest.mark.parametrize("target", ["cpu", "interpret"])
def test_whole_schedules_recompile_nothing(target, monkeypatch):
    """One program under every schedule from end to end; whatever could compile is counted."""
    step = gn.compile(
        net(), (4, 1, 3, 3), target=target, loss=gn.CrossEntropyLoss(),
        optimizer=gn.SGD(0.1, momentum=0.9),
    )  # fmt: skip
    built = []
    for name in (
        "lowering.plan.plan.make_plan", "lowering.launch.files.load", "passes.pipeline.run",
        f"lowering.targets.{target}.prepare",
    ):  # fmt: skip
        monkeypatch.setattr(f"graphnet.{name}", lambda *a, name=name, **k: built.append(name))
    x, y = (t[:4] for t in data())
    total, rates = 4 if target == "interpret" else 40, set()
    for name in NAMES:
        schedule = by_name(name, 0.1, total)
        for at in range(total):
            turn(step.optimizer, schedule(at))
            assert math.isfinite(float(step(x, y)))
            rates.add(step.optimizer.lr)
            if name == "plateau":
                schedule.observe(1.0)
    assert built == [] and len(rates) > total
    monkeypatch.undo()


def test_step_k_of_a_trainer_has_the_rate_of_k(tmp_path):
    """From 0 on, across epochs, and where a run is taken up again."""

    class Rates(Callback):
        def on_step(self, trainer, loss):
            seen.append((trainer.step - 1, trainer.program.optimizer.lr))

    seen = []
    rate = lambda k: 0.1 / (1 + k)
    how = {"target": "cpu", "seed": 1}
    first = gn.Trainer(net(), gn.CrossEntropyLoss(), gn.SGD(9.0), rate, [Rates()], **how)
    before = first.net.state_dict()
    first.callbacks.append(Checkpoints(tmp_path))
    first.fit(data(), epochs=1, batch=16)
    second = gn.Trainer(net(), gn.CrossEntropyLoss(), gn.SGD(9.0), rate, [Rates()], **how)
    second.compile((16, 1, 3, 3))
    restore(second, checkpoint.load_latest(tmp_path))
    second.fit(data(), epochs=2, batch=16)
    assert seen == [(k, pytest.approx(rate(k))) for k in range(4)]

    # And the update itself has it: of the first step, against torch's gradient.
    alone = gn.Trainer(net(), gn.CrossEntropyLoss(), gn.SGD(9.0), rate, **how)
    x, y = (t[:16] for t in data())
    w, b = (v.clone().requires_grad_() for v in before.values())
    logits = torch.nn.functional.linear(x.flatten(1), w, b)
    torch.nn.functional.cross_entropy(logits, y).backward()
    alone.fit((x, y), epochs=1, batch=16)
    for p, moved in zip((w, b), alone.net.state_dict().values(), strict=True):
        torch.testing.assert_close(moved, (p - rate(0) * p.grad).detach(), rtol=0, atol=1e-6)


def trainer():
    plateau = Plateau(S.warmup(S.constant(0.1), 5), patience=1, threshold=0.9)
    return gn.Trainer(
        net(), gn.CrossEntropyLoss(), gn.SGD(0.1), plateau, target="cpu", seed=1
    )  # fmt: skip


def test_the_trainer_feeds_the_plateau_and_a_checkpoint_keeps_it(tmp_path):
    whole = trainer()
    history = whole.fit(data(), data(), epochs=7, batch=8)
    rates = [m["lr"] for m in history]
    assert rates[1] == pytest.approx(0.1) and rates[-1] < 0.02 and len(set(rates)) >= 3
    first = trainer()
    first.callbacks = [Checkpoints(tmp_path)]
    first.fit(data(), data(), epochs=3, batch=8)
    second = trainer()
    second.compile((8, 1, 3, 3))
    restore(second, checkpoint.load_latest(tmp_path))
    again = second.fit(data(), data(), epochs=7, batch=8)
    assert [m["lr"] for m in again] == rates
    for key, value in whole.net.state_dict().items():
        assert torch.equal(value, second.net.state_dict()[key])
