"""Accumulation, clipping and the guard: against torch, and against one large batch."""

import math

import pytest
import torch
from torch import nn

import graphnet as gn
from graphnet.api import lower
from graphnet.report import why_text
from tests.optimizers import CLASSES, MARGIN, WIDTH, Race

LOSS = gn.CrossEntropyLoss()
PLAIN = (gn.SGD(0.1, 0.9, weight_decay=0.01),
         lambda p, lr: torch.optim.SGD(p, lr, 0.9, weight_decay=0.01))  # fmt: skip
ADAM = (gn.AdamW(0.02), lambda p, lr: torch.optim.AdamW(p, lr))


def together(race, sizes):
    """Feeds batches of these rows one by one, and to the twin as one."""
    parts = [race.batch(n) for n in sizes]
    for x, y in parts:
        race.step(x, y)
    return tuple(torch.cat(t) for t in zip(*parts, strict=True))


@pytest.mark.parametrize("target", ["cpu", "interpret"])
@pytest.mark.parametrize("row", [PLAIN, ADAM], ids=["sgd", "adamw"])
def test_micro_batches_are_one_large_batch(row, target):
    """Also with batches that are not full: the mean is over all rows, not over batches."""
    race = Race(*row, target, accumulate=3)
    groups = [(6, 1, 4), (6, 6, 6), (2, 2, 2), (6, 6, 5)][: 2 if target == "interpret" else 4]
    for sizes in groups:
        before = race.net.state_dict()
        batch = together(race, sizes[:2])
        assert all(torch.equal(v, before[k]) for k, v in race.net.state_dict().items())
        last = race.batch(sizes[2])
        race.step(*last)
        race.teach(*(torch.cat(t) for t in zip(batch, last, strict=True)))
        assert race.error() <= 1e-6
    sums = {k: v for k, v in race.step.optimizer.state_dict().items() if "grad_sum" in k}
    assert len(sums) == 2 and all(float(v.abs().max()) == 0 for v in sums.values())
    assert race.step.state.steps == 3 * len(groups)


def torch_clipped(race, x, y, limit):
    race.other.zero_grad()
    nn.functional.multi_margin_loss(race.twin(x.double()), y, margin=MARGIN).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(race.twin.parameters(), limit))
    race.other.step()
    return norm


@pytest.mark.parametrize("target", ["cpu", "interpret"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_clipping_is_torchs(target, accumulate):
    race = Race(*PLAIN, target, clip_norm=0.8, accumulate=accumulate)
    clipped = []
    half = 1 if target == "interpret" else 3
    for at in range(2 * half):
        if at == half:
            race.step.optimizer.clip_norm = 0.5
        x, y = together(race, (6, 4)[:accumulate])
        limit = 0.8 if at < half else 0.5
        clipped.append(torch_clipped(race, x, y, limit) > limit)
        assert race.error() <= 2e-6
    assert any(clipped)
    race.step.optimizer.clip_norm = 1e6  # and no more
    x, y = together(race, (6, 4)[:accumulate])
    race.teach(x, y)
    assert race.error() <= 2e-6


@pytest.mark.parametrize("target", ["cpu", "interpret"])
def test_a_limit_far_below_the_norm_is_kept(target):
    """Gradients of a norm of about 1, cut to a millionth: a step of 1e6 then has the length 1."""
    race = Race(gn.SGD(1e6), lambda p, lr: torch.optim.SGD(p, 1e6), target, clip_norm=1e-6)
    before = race.net.state_dict()
    together(race, (6,))
    moved = torch.cat([(v - before[k]).flatten() for k, v in race.net.state_dict().items()])
    assert float(moved.norm()) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.usefixtures("single_kernels")
def test_the_norm_costs_the_update_fusion_and_inspect_says_how_much():
    def lowered(**options):
        return lower(
            gn.models.lenet5(), (32, 1, 28, 28), target="cuda", loss=LOSS,
            optimizer=gn.SGD(0.1, 0.9), precision="fp32", **options,
        )  # fmt: skip

    def alone(low):
        return [e for e in low.stages.fused.eqns if e.op.endswith("_wgrad")]

    free, summed = lowered(nonfinite=None), lowered(accumulate=4)
    clipped = lowered(clip_norm=1.0)
    assert not alone(free) and not alone(summed) and len(alone(clipped)) == 5
    assert "the norm of all gradients keeps" not in why_text(summed)
    said = why_text(clipped)
    assert "is also read by global_norm" in said
    assert "740 kB more are written and read at each step, at least 0.172 us on an H200" in said
    # What follows the norm is one kernel a parameter.
    joined = [f for f in clipped.stages.fused.eqns if f.body and f.body.eqns[0].op == "clip"]
    assert len(joined) == 10 and {f.body.eqns[-1].op for f in joined} == {"if_finite"}
    for guarded in (lowered(nonfinite="stop"), lowered()):
        assert not alone(guarded) and len(guarded.plan.launches) == len(free.plan.launches)
    assert len(alone(lowered(nonfinite="skip"))) == 5


def test_the_guard_by_the_loss_adds_no_work_on_the_cpu(monkeypatch):
    """Updates stay in place, the gradients of wide layers by rows: a flag is looked at before."""
    from graphnet.lowering.targets import cpu, cpu_update

    monkeypatch.setattr(cpu_update, "WIDE", 16)
    real, calls = cpu.generic, []
    monkeypatch.setattr(cpu, "generic", lambda e: calls.append(e.op) or real(e))

    def tasks(**options):
        calls.clear()
        gn.compile(gn.models.lenet5(), (2, 1, 28, 28), target="cpu", loss=LOSS,
                   optimizer=gn.SGD(0.1, 0.9), **options)  # fmt: skip
        return list(calls)

    free = tasks(nonfinite=None)
    assert free == tasks(nonfinite="stop") == tasks() and "linear_wgrad" not in free
    assert "linear_wgrad" in tasks(nonfinite="skip")  # the norm wants them whole


def bad_batch(race):
    x, y = race.batch()
    x[2, 3] = math.nan
    return x, y


@pytest.mark.parametrize("target", ["cpu", "interpret"])
@pytest.mark.parametrize("row", [PLAIN, ADAM], ids=["sgd", "adamw"])
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_loss_that_is_not_finite_leaves_the_state_alone(row, target, policy):
    race = Race(*row, target, nonfinite=policy)
    race.turn()
    before = {**race.net.state_dict(), **race.step.optimizer.state_dict()}
    assert math.isnan(float(race.step(*bad_batch(race))))
    after = {**race.net.state_dict(), **race.step.optimizer.state_dict()}
    assert {k for k in before if not torch.equal(before[k], after[k])} == {"step"}
    for _ in range(3):  # as if the batch had never been
        race.turn()
        assert race.error() <= 1e-6


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # it is the point
@pytest.mark.parametrize("target", ["cpu", "interpret"])
def test_skip_also_guards_against_a_gradient(target):
    """A finite loss whose gradient overflows: weights of 1e30 behind an activation of 0."""
    net = gn.Sequential(gn.Linear(4, 3), gn.Linear(3, 3))
    net[0].weight.data, net[0].bias.data = torch.zeros(3, 4), torch.zeros(3)
    net[1].weight.data = torch.tensor([[1e30], [2e30], [3e30]]).expand(3, 3)
    x, y = torch.full((2, 4), 1e20), torch.tensor([0, 1])
    step = gn.compile(
        net, (2, 4), target=target, loss=gn.MultiMarginLoss(), optimizer=gn.SGD(0.1),
        nonfinite="skip",
    )  # fmt: skip
    before = net.state_dict()
    assert math.isnan(float(step(x, y)))  # said in the same step, by a loss that is finite
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_bad_micro_batch_spoils_its_group_alone():
    race = Race(*PLAIN, "cpu", accumulate=2, nonfinite="stop")
    race.step(*bad_batch(race))
    before = race.net.state_dict()
    race.step(*race.batch())
    assert all(torch.equal(v, before[k]) for k, v in race.net.state_dict().items())
    for _ in range(2):
        race.teach(*together(race, (6, 3)))
        assert race.error() <= 1e-6


def test_a_group_goes_on_where_it_was_saved():
    whole, second = (Race(*ADAM, "cpu", accumulate=3, clip_norm=1.0) for _ in range(2))
    batches = [whole.batch(n) for n in (6, 6, 2, 6, 5, 6)]
    for k, (x, y) in enumerate(batches):
        whole.step(x, y)
        if k == 3:
            saved = whole.net.state_dict(), whole.step.optimizer.state_dict()
    assert int(saved[1]["pending"]) == 1 and int(saved[1]["pending_rows"]) == 6
    second.net.load_state_dict(saved[0])
    second.step.optimizer.load_state_dict(saved[1])
    for x, y in batches[4:]:
        second.step(x, y)
    for key, value in whole.net.state_dict().items():
        assert torch.equal(value, second.net.state_dict()[key])


def test_bound_data_run_through_both_programs():
    net = gn.Sequential(gn.Linear(WIDTH, CLASSES))
    step = gn.compile(
        net, (4, WIDTH), target="cpu", loss=LOSS, optimizer=gn.SGD(0.1), accumulate=2
    )  # fmt: skip
    step.bind(torch.randn(10, WIDTH), torch.arange(10) % CLASSES)
    before = net.state_dict()["0.weight"]
    assert step.run(1).shape == (1,) and torch.equal(before, net.state_dict()["0.weight"])
    step.run(1)
    assert not torch.equal(before, net.state_dict()["0.weight"])


@pytest.mark.parametrize("options", [
    {"accumulate": 0}, {"accumulate": 1.5}, {"clip_norm": 0}, {"clip_norm": -1.0},
    {"clip_norm": "big"}, {"clip_norm": math.inf}, {"clip_norm": True},
    {"nonfinite": "ignore"}, {"clip_norm": 1.0, "optimizer": None},
])  # fmt: skip
def test_bad_settings_are_refused(options):
    net = gn.Sequential(gn.Linear(WIDTH, CLASSES))
    options = {"optimizer": gn.SGD(0.1)} | options
    with pytest.raises(gn.ConfigError):
        gn.compile(net, (4, WIDTH), target="cpu", loss=LOSS, **options)


def test_the_limit_of_a_step_stays_a_limit():
    """Live, what compiling refuses is refused too: a limit of 0 would stop the training."""
    step = gn.compile(
        gn.Sequential(gn.Linear(WIDTH, CLASSES)), (4, WIDTH), target="cpu", loss=LOSS,
        optimizer=gn.SGD(0.1), clip_norm=1.0,
    )  # fmt: skip
    for bad in (0, 0.0, -1.0, math.inf, math.nan, None, True):
        with pytest.raises(gn.ConfigError, match="clip_norm"):
            step.optimizer.clip_norm = bad
    assert step.optimizer.clip_norm == 1.0


def test_the_command_line_prints_the_price(capsys):
    from graphnet.cli import main

    def said(*words):
        with pytest.raises(SystemExit) as end:
            main(["inspect", "lenet5", "--batch", "32", *words])
        return end.value.code, *capsys.readouterr()

    code, out, _ = said("--train", "--clip-norm", "1", "--optimizer", "adamw", "--why")
    assert code == 0 and "740 kB more are written and read at each step" in out
    code, out, _ = said("--train", "--accumulate", "4", "--why")
    assert code == 0 and "the norm of all gradients" not in out
    for words in (
        ["--clip-norm", "1"], ["--train", "--clip-norm", "0"], ["--optimizer", "adam"],
        ["--train", "--optimizer", "lion"], ["--train", "--nonfinite", "pray"],
    ):  # fmt: skip
        code, out, err = said(*words)
        assert code == 2 and out == "" and err.count("\n") == 1, words


@pytest.mark.parametrize("spec", [
    gn.SGD(0.05), gn.SGD(0.05, 0.9, form="classic"), gn.SGD(0.05, 0.9, nesterov=True, l1=1e-3),
    gn.Adam(0.01), gn.AdamW(0.01, amsgrad=True),
], ids=["sgd", "classic", "nesterov", "adam", "amsgrad"])  # fmt: skip
@pytest.mark.parametrize("stop", [4, 6])
def test_a_run_cut_in_a_group_goes_on_bit_for_bit(spec, stop, tmp_path):
    """Four steps an epoch, groups of three: after 4 and 6 steps, in a group and between two."""
    from graphnet.train import checkpoint
    from graphnet.train.callbacks import Checkpoints, restore
    from graphnet.train.trainer import Callback

    class StopAt(Callback):
        def on_step(self, trainer, loss):
            trainer.stop = trainer.step == stop

    def made():
        torch.manual_seed(4)
        net = gn.Sequential(gn.Flatten(), gn.Linear(9, 6), gn.ReLU(), gn.Dropout(), gn.Linear(6, 3))
        schedule = gn.schedule.one_cycle(0.05, 12)
        return gn.Trainer(
            net, LOSS, spec, schedule, target="cpu", accumulate=3, clip_norm=0.5, nonfinite="skip"
        )

    g = torch.Generator().manual_seed(0)
    data = torch.rand(30, 1, 3, 3, generator=g), torch.randint(0, 3, (30,), generator=g)
    whole, first, second = made(), made(), made()
    whole.fit(data, epochs=3, batch=8)
    first.callbacks = [Checkpoints(tmp_path), StopAt()]
    first.fit(data, epochs=3, batch=8)
    assert first.step == stop and first.program.state.pending == stop % 3
    second.compile((8, 1, 3, 3))
    restore(second, checkpoint.load_latest(tmp_path))
    second.fit(data, epochs=3, batch=8)
    want, got = ({**t.net.state_dict(), **t.state_dict()} for t in (whole, second))
    assert want.keys() == got.keys() and want["step"] == 12
    for key, value in want.items():
        assert torch.equal(value, got[key]), key
