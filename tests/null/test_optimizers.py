"""Optimizers, penalties and multipliers against torch.optim and the written formulas."""

import pytest
import torch
from torch import nn

import graphnet as gn
from graphnet.api import lower
from tests.optimizers import MARGIN, ROWS, TABLE, WIDTH, Race, many_steps

LOSS = gn.CrossEntropyLoss()


@pytest.mark.parametrize("name", TABLE)
def test_a_hundred_steps_with_a_drop_of_the_rate(name):
    many_steps(name, "cpu")


@pytest.mark.parametrize("name", ["momentum", "classic", "adam_l2", "adamw"])
def test_multipliers_are_torchs_parameter_groups(name):
    spec, make = TABLE[name]
    if name == "classic":  # the formula has no groups: compare with torch's at a constant rate
        spec, make = gn.SGD(0.1, 0.9, weight_decay=0.01, form="classic"), TABLE["momentum"][1]
    race = Race(spec, make, "cpu", multipliers=(2.0, 0.0))
    for _ in range(30):
        race.turn()
        assert race.error() <= 1e-5
    plain = Race(spec, make, "cpu")
    for _ in range(30):
        plain.turn()
    for key, same in (("0.weight", True), ("0.bias", False)):
        a, b = (r.net.state_dict()[key] for r in (race, plain))
        assert torch.equal(a, b) == same


def test_both_forms_of_momentum_agree_until_the_rate_drops_and_then_differ():
    torch_form = Race(*TABLE["momentum"], "cpu")
    classic = Race(*TABLE["classic"], "cpu")

    def distance():
        a, b = (r.net.state_dict()["0.weight"] for r in (torch_form, classic))
        return float((a - b).abs().max() / b.abs().max())

    for _ in range(50):
        torch_form.turn()
        classic.turn()
    assert distance() <= 1e-5
    for race in (torch_form, classic):
        race.drop()
        race.turn()
    # One step on, the classic buffer still moves at the old rate: the forms are 0.9 times nine
    # tenths of an old step apart.
    assert distance() > 1e-3


def test_the_table_can_tell_its_rows_apart():
    ends = {n: many_steps(n, "cpu").net.state_dict()["0.weight"] for n in ("l1", "l2", "adam")}
    ends["elastic"] = many_steps("elastic", "cpu").net.state_dict()["0.weight"]
    names = list(ends)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert float((ends[a] - ends[b]).abs().max()) > 1e-2, (a, b)


def test_what_may_change_between_steps():
    race = Race(*TABLE["adam"], "cpu")
    knobs = race.step.optimizer
    knobs.betas = (0.5, 0.9)
    knobs.weight_decay = 0.1
    for group in race.other.param_groups:
        group["weight_decay"] = 0.1
    assert knobs.betas == (0.5, 0.9)
    for name, value in (
        ("betas", (0.9, 1.0)), ("betas", 0.9), ("betas", (0.9, -0.1)), ("eps", 1e-6), ("l1", 0.1),
        ("lr", -1), ("weight_decay", float("inf")), ("momentum", 0.9),
    ):  # fmt: skip
        with pytest.raises(gn.ConfigError):
            setattr(knobs, name, value)
    sparse = gn.compile(race.net, (2, 7), target="cpu", loss=LOSS, optimizer=gn.SGD(0.1, l1=0.1))
    sparse.optimizer.l1 = 0.2
    with pytest.raises(gn.ConfigError, match="l1 0 is another graph"):
        sparse.optimizer.l1 = 0


@pytest.mark.parametrize("make", [
    lambda: gn.Adam(lr=-1), lambda: gn.Adam(betas=(0.9,)), lambda: gn.Adam(betas=(1.0, 0.9)),
    lambda: gn.Adam(eps=0.0), lambda: gn.Adam(eps=1e-60), lambda: gn.SGD(lr=1e39),
    lambda: gn.SGD(lr=True), lambda: gn.SGD(lr=torch.ones(2)),
    lambda: gn.AdamW(weight_decay=float("nan")), lambda: gn.SGD(l1=-0.1), lambda: gn.SGD(l1="much"),
    lambda: setattr(gn.Parameter(torch.ones(2)), "lr_mult", -1.0),
    lambda: gn.Parameter(torch.ones(2), decay_mult=float("nan")),
    lambda: gn.models.lenet5().set_multipliers("*.biases", lr=2),
])  # fmt: skip
def test_bad_settings_are_refused(make):
    with pytest.raises(gn.ConfigError):
        make()


@pytest.mark.parametrize("name", ["adam", "amsgrad"])
def test_the_state_of_adam_goes_through_its_state_dict(name):
    a = Race(*TABLE[name], "cpu")
    for _ in range(7):
        a.turn()
    b = Race(*TABLE[name], "cpu")
    b.net.load_state_dict(a.net.state_dict())
    saved = a.step.optimizer.state_dict()
    b.step.optimizer.load_state_dict(saved)
    buffers = {k for s in a.other.state.values() for k in s} - {"step"}  # torch's names
    assert {k.split(".")[-1] for k in saved} == buffers | {
        "debias1", "debias2", "lr", "betas", "weight_decay", "step"
    }  # fmt: skip
    if name == "amsgrad":
        plain = Race(*TABLE["adam"], "cpu")
        with pytest.raises(gn.StateDictError, match="unexpected 0.bias.max_exp_avg_sq"):
            plain.step.optimizer.load_state_dict(saved)
        with pytest.raises(gn.ConfigError, match="amsgrad=True is compiled into this step"):
            b.step.optimizer.amsgrad = False
    for _ in range(5):
        x, y = a.batch()
        a.step(x, y)
        b.step(x, y)
    for key, value in a.net.state_dict().items():
        assert torch.equal(value, b.net.state_dict()[key])


def test_an_old_net_starts_adam_afresh():
    """The correction counts Adam's own steps, not those that another optimizer did before."""
    race = Race(*TABLE["adam"], "cpu")
    other = gn.compile(race.net, (2, 7), target="cpu", loss=LOSS, optimizer=gn.SGD(0.1))
    for _ in range(20):
        other(*race.batch(2))
    race.twin.load_state_dict({k: v.double() for k, v in race.net.state_dict().items()})
    race.turn()
    assert race.error() <= 1e-5


@pytest.mark.parametrize("name", ["adam", "dampening"])
def test_a_layer_that_thaws_starts_the_optimizer_afresh(name):
    """As a new one of torch's: else its first steps would be corrected like the thousandth."""
    race = Race(*TABLE[name], "cpu")  # compiled before the other, used behind it
    race.net[0].weight.trainable = False
    head = gn.compile(
        race.net, (2, WIDTH), target="cpu", loss=LOSS, optimizer=TABLE[name][0]
    )  # fmt: skip
    for _ in range(20):
        head(*race.batch(2))
    race.net[0].weight.trainable = True
    race.twin.load_state_dict({k: v.double() for k, v in race.net.state_dict().items()})
    for _ in range(5):
        race.turn()
        assert race.error() <= 1e-5
    race.step = gn.compile(  # nothing joins: it goes on
        race.net, (2, WIDTH), target="cpu", loss=gn.MultiMarginLoss(margin=MARGIN),
        optimizer=TABLE[name][0],
    )  # fmt: skip
    for _ in range(5):
        race.turn(2)
        assert race.error() <= 1e-5


def test_one_form_of_momentum_does_not_go_on_with_the_buffer_of_the_other():
    """It has another sign and scale."""
    a, b = Race(*TABLE["momentum"], "cpu"), Race(*TABLE["classic"], "cpu")
    for _ in range(10):
        a.turn()
    with pytest.raises(gn.StateDictError, match="missing 0.bias.velocity"):
        b.step.optimizer.load_state_dict(a.step.optimizer.state_dict())
    fresh = Race(*TABLE["classic"], "cpu")
    fresh.net.load_state_dict(a.net.state_dict())
    x, y = a.batch()
    options = {"target": "cpu", "loss": gn.MultiMarginLoss(margin=MARGIN)}
    gn.compile(a.net, (ROWS, WIDTH), optimizer=TABLE["classic"][0], **options)(x, y)
    fresh.step(x, y)
    for key, value in fresh.net.state_dict().items():
        assert torch.equal(value, a.net.state_dict()[key])


def test_a_bad_state_loads_nothing():
    a, b = (Race(*TABLE["adam"], "cpu") for _ in range(2))
    a.turn()
    before = b.step.optimizer.state_dict()
    for key, bad in (("lr", -1.0), ("betas", [0.9, 1.0]), ("weight_decay", float("nan"))):
        with pytest.raises(gn.ConfigError):
            b.step.optimizer.load_state_dict(
                a.step.optimizer.state_dict() | {key: torch.tensor(bad)}
            )
        assert all(torch.equal(v, before[k]) for k, v in b.step.optimizer.state_dict().items())


@pytest.mark.parametrize("spec", [gn.SGD(0.1, 0.9, l1=1e-3), gn.Adam(1e-3), gn.AdamW(1e-3)])
def test_wide_layers_by_rows_are_the_op(spec, monkeypatch):
    """A gradient made and used by rows gives what the whole one gives."""
    from graphnet.lowering.targets import cpu_update

    def ends(wide, block):
        monkeypatch.setattr(cpu_update, "WIDE", wide)
        monkeypatch.setattr(cpu_update, "_BUFFER", 40)
        monkeypatch.setattr(cpu_update, "_BLOCK", block)
        race = Race(spec, lambda p, lr: None, "cpu")
        for _ in range(3):
            race.step(*race.batch())
        return race.net.state_dict()

    whole, rows = ends(1 << 20, 1 << 17), ends(16, 8)
    for key in whole:
        torch.testing.assert_close(rows[key], whole[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("spec", [
    gn.SGD(0.1, 0.9), gn.SGD(0.1, l1=0.1), gn.Adam(), gn.AdamW(), gn.AdamW(amsgrad=True),
])  # fmt: skip
def test_every_update_joins_its_weight_gradient(spec):
    options = {"target": "cuda", "loss": LOSS, "optimizer": spec}
    low = lower(gn.models.lenet5(), (32, 1, 28, 28), **options)
    outside = [e.op for e in low.stages.fused.eqns if e.op.endswith(("_update", "_wgrad"))]
    assert outside == []
    inside = [e.op for f in low.stages.fused.eqns if f.body for e in f.body.eqns]
    assert inside.count(spec.op) == 10


def test_frozen_layers_cost_no_weight_gradient():
    net = gn.models.lenet5()
    frozen = [k for k, _ in net.named_parameters() if k.startswith(("0.", "3."))]
    for key, p in net.named_parameters():
        p.trainable = key not in frozen
    before = net.state_dict()
    low = lower(net, (8, 1, 28, 28), target="cuda", loss=LOSS, optimizer=gn.SGD(0.1, 0.9))
    ops = [p.op for e in low.stages.fused.eqns for p in e.plain]
    assert ops.count("conv2d") == 2 and not {"conv2d_wgrad", "conv2d_dgrad"} & set(ops)
    assert sum("wgrad" in s.kernel for s in low.plan.parts) == 3  # the linear layers
    step = gn.compile(net, (8, 1, 28, 28), target="cpu", loss=LOSS, optimizer=gn.SGD(0.1, 0.9))
    step(torch.randn(8, 1, 28, 28), torch.arange(8))
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]) == (key in frozen)


def test_adam_against_torch_on_a_whole_net():
    torch.manual_seed(0)
    net = gn.models.lenet5()
    twin = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84),
        nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip
    twin.load_state_dict(net.state_dict())
    step = gn.compile(net, (8, 1, 28, 28), target="cpu", loss=LOSS, optimizer=gn.AdamW(1e-3))
    other = torch.optim.AdamW(twin.parameters(), 1e-3)
    for _ in range(10):
        x, y = torch.randn(8, 1, 28, 28), torch.randint(0, 10, (8,))
        want = nn.functional.cross_entropy(twin(x), y)
        other.zero_grad()
        want.backward()
        other.step()
        assert float(step(x, y)) == pytest.approx(want.item(), rel=1e-4)
