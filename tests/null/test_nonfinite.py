"""NaN and inf put into the input, each parameter, the loss and gradients of several layers: found
in the same step, the layer named, the state untouched, stopped or skipped as asked."""

import math
import weakref
from typing import ClassVar

import pytest
import torch

import graphnet as gn
from graphnet.train import losses
from graphnet.train.data import Batches as Data
from graphnet.train.data import Dataset
from graphnet.train.trainer import Callback

LAYERS = ("conv1", "conv2", "fc1", "fc2")
SHAPE = (1, 9, 9)
BAD = {"NaN": math.nan, "inf": math.inf, "minus": -math.inf}


def net():
    torch.manual_seed(2)
    return gn.Sequential(
        gn.Conv2d(1, 3, 3), gn.ReLU(), gn.MaxPool2d(2), gn.Conv2d(3, 4, 2), gn.Tanh(),
        gn.Flatten(), gn.Linear(16, 6), gn.ReLU(), gn.Linear(6, 4),
    )  # fmt: skip


class Batches(list):
    """Four batches of four; those in `bad` are spoilt by the case when they are reached."""

    def __init__(self, spoil=None, at=()):
        g = torch.Generator().manual_seed(0)
        super().__init__(
            (torch.rand(4, *SHAPE, generator=g), torch.randint(0, 4, (4,), generator=g))
            for _ in range(4)
        )
        for k in at:
            spoil(self[k][0])


class Watch(Callback):
    """Spoils the net before the third step and keeps what was seen."""

    def __init__(self, spoil=None):
        self.spoil, self.found, self.before = spoil, [], None

    def on_step(self, trainer, loss):
        if trainer.step == 2 and self.spoil:
            self.spoil(trainer.net)
        if trainer.step == 2:
            self.before = trainer.net.state_dict()

    def on_skip(self, trainer, step, finding):
        self.found.append((step, finding))


def trainer(model, policy, watch, **options):
    return gn.Trainer(
        model, gn.CrossEntropyLoss(), gn.SGD(0.05, momentum=0.9), callbacks=[watch], target="cpu",
        nonfinite=policy, **options,
    )  # fmt: skip


def put(tensor, value, at=0):
    changed = tensor.clone(memory_format=torch.contiguous_format)
    changed.view(-1)[at] = value
    return changed


def same(a, b):
    return all(torch.equal(torch.nan_to_num(v), torch.nan_to_num(b[k])) for k, v in a.items())


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("row", [0, 1, 3])
def test_in_the_input(policy, value, row):
    def spoil(x):
        x[row, 0, 4, 4] = BAD[value]

    watch = Watch()
    t = trainer(net(), policy, watch)
    said = f"holds {'NaN' if value == 'NaN' else 'inf'} in row {row} of the batch"
    if policy == "stop":
        with pytest.raises(gn.NumericsError, match=f"at step 2: the input {said}"):
            t.fit(Batches(spoil, [2]), epochs=1, batch=4)
        assert same(t.net.state_dict(), watch.before)
        return
    (history,) = t.fit(Batches(spoil, [2]), epochs=1, batch=4)
    ((step, finding),) = watch.found
    assert step == 2 and said in str(finding) and history["skipped"] == 1
    # The run is that of the other three batches.
    other = trainer(net(), policy, Watch())
    (short,) = other.fit([b for k, b in enumerate(Batches()) if k != 2], epochs=1, batch=4)
    assert same(t.net.state_dict(), other.net.state_dict())
    assert history["train_loss"] == pytest.approx(short["train_loss"], rel=1e-12)


KEYS = {"0.weight": "conv1", "0.bias": "conv1", "3.weight": "conv2", "3.bias": "conv2",
        "6.weight": "fc1", "6.bias": "fc1", "8.weight": "fc2", "8.bias": "fc2"}  # fmt: skip


# An infinite weight may be silent behind a relu or a tanh; in the last layer it is not.
SPOILT = [*((k, "NaN") for k in KEYS), ("8.weight", "inf"), ("8.bias", "inf")]


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("key, value", SPOILT)
def test_in_a_parameter(policy, key, value):
    def spoil(model):
        p = dict(model.named_parameters())[key]
        p.data = put(p.data, BAD[value])

    watch = Watch(spoil)
    t = trainer(net(), policy, watch)
    if policy == "stop":
        said = f"at step 2: the parameter {key} held {value}"
        with pytest.raises(gn.NumericsError, match=said) as e:
            t.fit(Batches(), epochs=1, batch=4)
        assert e.value.layer == KEYS[key]
    else:
        t.fit(Batches(), epochs=1, batch=4)
        assert [(step, f.layer) for step, f in watch.found] == [(2, KEYS[key]), (3, KEYS[key])]
    assert same(t.net.state_dict(), watch.before)


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("layer", [1, 3])
def test_in_the_result_of_a_layer(policy, layer):
    """Finite parameters whose products overflow."""

    def spoil(model):
        for p, value in ((model[6].bias, 1e30), (model[8].weight, 1e30)):
            p.data = torch.full_like(p.data, value)
        if layer == 1:  # already in the second convolution, before its tanh: +inf - inf
            model[0].bias.data = torch.full_like(model[0].bias.data, 3e38)
            w = torch.full_like(model[3].weight.data, 3.0)
            w[:, 1:] = -3.0
            model[3].weight.data = w

    watch = Watch(spoil)
    t = trainer(net(), policy, watch)
    name = LAYERS[layer]
    if policy == "stop":
        with pytest.raises(gn.NumericsError, match="the result of .* is the first to hold") as e:
            t.fit(Batches(), epochs=1, batch=4)
        assert e.value.layer == name and "test_nonfinite.py:" in e.value.where
    else:
        t.fit(Batches(), epochs=1, batch=4)
        assert [(s, f.layer) for s, f in watch.found] == [(2, name), (3, name)]
    assert same(t.net.state_dict(), watch.before)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_in_the_loss(policy):
    """Finite logits, 6e38 apart."""

    def spoil(model):
        model[8].weight.data = torch.zeros_like(model[8].weight.data)
        model[8].bias.data = torch.tensor([3e38, -3e38, -3e38, -3e38])

    watch = Watch(spoil)
    t = trainer(net(), policy, watch)
    if policy == "stop":
        with pytest.raises(gn.NumericsError, match="'loss'.*the loss is inf at step 2"):
            t.fit(Batches(), epochs=1, batch=4)
    else:
        t.fit(Batches(), epochs=1, batch=4)
        assert {f.layer for _, f in watch.found} == {"loss"}
    assert same(t.net.state_dict(), watch.before)


@pytest.fixture
def late(monkeypatch):
    """Losses are read as from a GPU: several together, after later steps have run."""
    monkeypatch.setattr(losses.Losses, "at_once", False)


class Loader(Batches):
    """As a DataLoader: no place in it can be asked for, so its batches are kept."""


def data_set(spoil, row):
    images = torch.cat([x for x, _ in Batches()])
    spoil(images[row : row + 1])
    return images, torch.cat([y for _, y in Batches()])


@pytest.mark.parametrize("kind", ["loader", "data set"])
@pytest.mark.parametrize("at", [0, 2, 3])
def test_read_late_a_bad_batch_is_read_again(late, kind, at):
    """Later steps were fine and have overwritten it."""

    def spoil(x):
        x[0, 0, 4, 4] = math.nan

    t = trainer(net(), "stop", Watch())
    data = Loader(spoil, [at])
    if kind == "data set":
        order = Data(Dataset.of(*data_set(lambda x: None, 0)), 4, seed=0)
        row = int([rows for _ in order for rows in [order.rows]][at][0])
        data = data_set(spoil, row)
    with pytest.raises(gn.NumericsError, match=f"at step {at}: the input holds NaN in row 0 of"):
        t.fit(data, epochs=1, batch=4)


@pytest.mark.parametrize("key", ["3.bias", "8.weight"])
def test_read_late_a_bad_parameter_is_still_there(late, key):
    """No step behind it is finite, so none has changed anything."""

    def spoil(model):
        p = dict(model.named_parameters())[key]
        p.data = put(p.data, math.nan)

    watch = Watch(spoil)
    t = trainer(net(), "stop", watch)
    with pytest.raises(gn.NumericsError, match=f"at step 2: the parameter {key} held NaN") as e:
        t.fit(Batches(), epochs=1, batch=4)
    assert e.value.layer == KEYS[key] and same(t.net.state_dict(), watch.before)
    watch = Watch(spoil)
    t = trainer(net(), "skip", watch)
    many = Batches()
    many *= 20
    with pytest.raises(gn.NumericsError, match="50 steps in a row.*parameter") as e:
        t.fit(many, epochs=1, batch=4)
    assert e.value.layer == KEYS[key] and watch.found[0] == (2, None)


def test_read_late_batches_are_kept_up_to_a_bound(late, monkeypatch):
    monkeypatch.setattr(losses, "HELD", 2 * Batches()[0][0].nbytes)
    monkeypatch.setattr(losses, "EVERY_S", 1e9)
    fetched = []

    class Count(Callback):
        def on_losses(self, trainer, values):
            fetched.append(len(values))

    trainer(net(), "stop", Count()).fit(Loader() * 2, epochs=1, batch=4)
    assert fetched == [2, 2, 2, 2]


def test_batches_whose_losses_are_known_are_not_kept():
    class Fresh:
        made: ClassVar[list] = []

        def __iter__(self):
            for _ in range(6):
                x = torch.rand(4, *SHAPE)
                self.made.append(weakref.ref(x))
                yield x, torch.zeros(4, dtype=torch.int64)

    class Alive(Callback):
        most = 0

        def on_step(self, trainer, loss):
            self.most = max(self.most, sum(r() is not None for r in Fresh.made))

    watch = Alive()
    trainer(net(), "stop", watch).fit(Fresh(), epochs=1, batch=4)
    assert len(Fresh.made) >= 6 and watch.most <= 3


def deep():
    torch.manual_seed(0)
    return gn.Sequential(gn.Flatten(), *(gn.Linear(81 if k == 0 else 5, 5) for k in range(5)))


def overflow(k):
    """Makes the gradient of fc{k}'s weight overflow, and nothing before it: its input is 1e20, its
    output 0, and the layer behind multiplies the gradient by 1e30."""

    def spoil(model):
        layer, behind = model[k], model[k + 1]
        layer.weight.data = torch.zeros_like(layer.weight.data)
        layer.bias.data = torch.zeros_like(layer.bias.data)
        behind.weight.data = 1e30 * torch.arange(1.0, 26).reshape(5, 5)
        model[k - 1].bias.data = torch.full_like(model[k - 1].bias.data, 1e20)

    return spoil


@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}, {"accumulate": 1}])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_in_the_gradient_of_a_layer(k, options):
    """The loss is finite: the norm says it in the same step, before anything is updated."""
    watch = Watch(overflow(k))
    t = trainer(deep(), "skip", watch, **options)
    t.fit(Batches(), epochs=1, batch=4)
    assert [(s, f.layer) for s, f in watch.found] == [(2, f"fc{k}"), (3, f"fc{k}")]
    assert "the gradient of linear_wgrad is the first to hold" in watch.found[0][1].what
    assert same(t.net.state_dict(), watch.before)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_stopping_by_the_loss_names_the_layer_one_step_later(k):
    """ "stop" forms no norm and costs nothing: the gradient is seen in the parameter it spoilt.
    With clipping there is a norm, and it is seen in the same step."""
    t = trainer(deep(), "stop", Watch(overflow(k)))
    with pytest.raises(gn.NumericsError, match=f"at step 3: the parameter {k}.weight") as e:
        t.fit(Batches(), epochs=1, batch=4)
    assert e.value.layer == f"fc{k}"
    t = trainer(deep(), "stop", Watch(overflow(k)), clip_norm=1.0)
    with pytest.raises(gn.NumericsError, match="at step 2: the gradient of linear_wgrad"):
        t.fit(Batches(), epochs=1, batch=4)


def test_accumulating_and_low_precision_name_their_layer_too():
    def spoil(model):
        model[3].bias.data = put(model[3].bias.data, math.nan)

    for options in ({"accumulate": 2}, {"accumulate": 3}, {"precision": "bf16"}):
        t = trainer(net(), "stop", Watch(spoil), **options)
        with pytest.raises(gn.NumericsError, match="parameter 3.bias") as e:
            t.fit(Batches(), epochs=1, batch=4)
        assert e.value.layer == "conv2"


def test_a_run_that_only_skips_ends():
    def spoil(model):
        model[8].bias.data = put(model[8].bias.data, math.nan)

    t = trainer(net(), "skip", Watch(spoil))
    with pytest.raises(gn.NumericsError, match="none of the 4 steps of epoch 2 was finite"):
        t.fit(Batches(), epochs=20, batch=4)
    assert t.step == 8
    many = Batches()
    many *= 20
    t = trainer(net(), "skip", Watch(spoil))
    with pytest.raises(gn.NumericsError, match="50 steps in a row were not finite"):
        t.fit(many, epochs=1, batch=4)
    assert t.step == 52
