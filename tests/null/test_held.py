"""nonfinite="auto", the default: a step that is not finite raises, at once or later as on a GPU.

Until then it holds back the steps behind it."""

import math

import pytest
import torch

import graphnet as gn
from graphnet.runtime import held

LOSS = gn.CrossEntropyLoss()
TARGETS = ("cpu", "interpret")
OPTIMIZERS = {
    "sgd": gn.SGD(0.1, momentum=0.9), "dampened": gn.SGD(0.1, momentum=0.9, dampening=0.5),
    "adam": gn.Adam(0.01),
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # it is the point


def net():
    torch.manual_seed(2)
    return gn.Sequential(
        gn.Conv2d(1, 2, 3), gn.ReLU(), gn.Dropout(0.3), gn.Flatten(), gn.Linear(8, 3)
    )


def compiled(model, target="cpu", optimizer="sgd", **options):
    return gn.compile(
        model, (4, 1, 4, 4), target=target, loss=LOSS, optimizer=OPTIMIZERS[optimizer], **options
    )


def batch(k):
    g = torch.Generator().manual_seed(k)
    return torch.rand(4, 1, 4, 4, generator=g), torch.randint(0, 3, (4,), generator=g)


def bad(k=0):
    x, y = batch(k)
    x[2, 0, 1, 1] = math.nan
    return x, y


def everything(model, step):
    return {**model.state_dict(), **step.optimizer.state_dict()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Slow:
    """Copies from a GPU that have not arrived for as long as `late` says."""

    def __init__(self, number, late):
        self.number, self.late, self.left, self.copy = number, late, 0, 0.0

    def ask(self):
        self.copy, self.left = float(self.number), self.late

    def arrived(self):
        self.left -= 1
        return self.copy if self.left < 0 else None


@pytest.fixture
def late(monkeypatch):
    """A step whose flag arrives some calls later."""
    monkeypatch.setattr(held, "EVERY_S", 0.0)

    def make(model, calls=1, **options):
        step = compiled(model, **options)
        step.state.held.copies = Slow(step.state.held.count, calls)
        return step

    return make


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_is_not_finite_raises_and_leaves_no_trace(target, optimizer):
    nets = net(), net()
    steps = [compiled(n, target, optimizer) for n in nets]
    for k in range(2):
        assert float(steps[0](*batch(k))) == float(steps[1](*batch(k)))
    before = everything(nets[0], steps[0])
    for _ in range(2):
        with pytest.raises(gn.NumericsError, match=r"nan at step 2: .* NaN in row 2 of the batch"):
            steps[0](*bad())
    assert same(everything(nets[0], steps[0]), before)
    for k in range(2, 4):  # as if the batch had never been, dropout's masks included
        assert float(steps[0](*batch(k))) == float(steps[1](*batch(k)))
    assert same(everything(nets[0], steps[0]), everything(nets[1], steps[1]))


def test_the_layer_is_named_with_its_path_and_its_line():
    model = net()
    step = compiled(model)
    model[4].bias.data = torch.tensor([1.0, math.inf, 1.0])
    with pytest.raises(gn.NumericsError, match="the parameter 4.bias held inf") as e:
        step(*batch(0))
    assert e.value.layer == "fc1" and e.value.path == "4" and "test_held.py:" in e.value.where


def test_with_clipping_a_gradient_that_is_not_finite_raises_too():
    model = gn.Sequential(gn.Linear(4, 3), gn.Linear(3, 3))
    model[0].weight.data, model[0].bias.data = torch.zeros(3, 4), torch.zeros(3)
    model[1].weight.data = torch.tensor([[1e30], [2e30], [3e30]]).expand(3, 3)
    step = gn.compile(
        model, (2, 4), target="cpu", loss=gn.MultiMarginLoss(), optimizer=gn.SGD(0.1),
        clip_norm=1.0,
    )  # fmt: skip
    before = everything(model, step)
    with pytest.raises(gn.NumericsError, match="nan at step 0: the gradient of linear_wgrad"):
        step(torch.full((2, 4), 1e20), torch.tensor([0, 1]))
    assert same(everything(model, step), before)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_later_steps_change_nothing_until_the_flag_has_arrived(late, target, calls):
    nets = net(), net()
    step, twin = late(nets[0], calls, target=target), compiled(nets[1], target)
    for k in range(3):
        assert float(step(*batch(k))) == float(twin(*batch(k)))
    before = everything(nets[1], twin)
    losses = [step(*bad())]
    with pytest.raises(gn.NumericsError, match=r"nan at step 3 \(\d more ha.* run since, changing"):
        for k in range(20):
            losses.append(step(*batch(k)))
    assert same(everything(nets[0], step), before)
    assert len(losses) >= calls and math.isnan(losses[0])
    assert all(map(math.isfinite, losses[1:]))  # each in a place of its own in the ring
    for k in range(3, 6):
        assert float(step(*batch(k))) == float(twin(*batch(k)))
    assert same(everything(nets[0], step), everything(nets[1], twin))


@pytest.mark.parametrize("shuffle", [False, True])
def test_run_raises_and_goes_on_behind_the_bad_batch(late, shuffle):
    """The same bits whether the flag arrives at once or after further steps have run."""
    g = torch.Generator().manual_seed(0)
    images, labels = torch.rand(18, 1, 4, 4, generator=g), torch.randint(0, 3, (18,), generator=g)
    images[5] = math.nan
    nets, rates = (net(), net()), [0.1 / (k + 1) for k in range(12)]
    steps = [s.bind(images, labels, shuffle=shuffle) for s in (late(nets[0]), compiled(nets[1]))]
    raised = []
    for step in steps:
        with pytest.raises(gn.NumericsError, match="the input holds NaN in row") as e:
            step.run(12, lr=rates)
        raised.append((str(e.value).partition(":")[0].partition(" (")[0], step.state.steps))
    assert raised[0] == raised[1]
    left = 5 - steps[0].state.steps - 1  # to the end of the epoch, without the bad batch
    assert torch.equal(steps[0].run(left), steps[1].run(left))
    for step in steps:
        with pytest.raises(gn.NumericsError, match="the input holds NaN"):
            step.run(30)  # in the next epoch
    assert same(everything(nets[0], steps[0]), everything(nets[1], steps[1]))


@pytest.mark.parametrize("how", ["net", "optimizer"])
def test_loading_lets_it_run_again(late, how):
    nets = net(), net()
    step, twin = late(nets[0], 10), compiled(nets[1])
    for s in (step, twin):
        s(*batch(0))
    step(*bad())
    step(*batch(1))
    saved = step.optimizer.state_dict()
    assert int(saved["step"]) == 1  # those that are held back are not done
    if how == "net":
        nets[0].load_state_dict(nets[1].state_dict())
    else:
        step.optimizer.load_state_dict(saved)
    for k in range(1, 4):
        assert float(step(*batch(k))) == float(twin(*batch(k)))
    assert same(everything(nets[0], step), everything(nets[1], twin))


def test_another_program_of_the_net_hears_of_it_first(late):
    model = net()
    step = late(model, 10)
    free = compiled(model, nonfinite=None)
    before = model.state_dict()
    step(*bad())
    with pytest.raises(gn.NumericsError, match="nan at step 0"):
        free(*batch(0))
    assert same(model.state_dict(), before)
    assert math.isfinite(float(free(*batch(0)))) and free.state.steps == 1


@pytest.mark.parametrize("options", [{"nonfinite": None}, {"accumulate": 2}])
def test_without_a_guard_the_weights_are_lost(options):
    model = net()
    step = compiled(model, **options)
    for _ in range(2):
        assert math.isnan(step(*bad()))
    assert any(map(torch.isnan, (p.sum() for p in model.state_dict().values())))


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_guard_costs_no_launch(precision, optimizer):
    from graphnet.api import lower

    def launches(nonfinite):
        low = lower(
            gn.models.lenet5(), (4, 1, 28, 28), target="cuda", precision=precision, loss=LOSS,
            optimizer=OPTIMIZERS[optimizer], nonfinite=nonfinite,
        )  # fmt: skip
        return sorted(s.kernel for s in low.plan.parts)

    # Dampening keeps whether a step was done: 1 from the first on, unless that one is held back.
    own = ["elementwise"] * (optimizer == "dampened")
    assert launches("auto") == sorted(launches(None) + own)


def test_a_copy_is_asked_for_at_most_every_so_often(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(held.time, "perf_counter", lambda: now[0])
    count = torch.zeros(())
    copies = Slow(count, 0)
    asked = []
    monkeypatch.setattr(copies, "ask", lambda ask=copies.ask: asked.append(now[0]) or ask())
    flag = held.Held(count, copies)
    for k in range(1, 101):
        now[0] = k / 1000
        assert flag.heard(k)[0] == 0 and flag.behind
    assert 5 <= len(asked) <= 0.1 / held.EVERY_S
    count.fill_(3)
    assert flag.heard(100, wait=True) == (3, 100) and not flag.behind
