"""Initial values, dropout on both sides, and the losses that people write, against torch."""

import math

import pytest
import torch
from torch import nn

import graphnet as gn

LOSS = gn.CrossEntropyLoss()


def net():
    return gn.Sequential(
        gn.Conv2d(3, 40, 5), gn.ReLU(), gn.Conv2d(40, 60, 3), gn.Flatten(), gn.Linear(240, 50)
    )


def twin():
    return nn.Sequential(
        nn.Conv2d(3, 40, 5), nn.ReLU(), nn.Conv2d(40, 60, 3), nn.Flatten(), nn.Linear(240, 50)
    )


def test_default_is_what_torch_draws():
    torch.manual_seed(7)
    other = twin()
    made = gn.init.default_(net(), seed=7)
    for key, value in other.state_dict().items():
        assert torch.equal(made.state_dict()[key], value), key


@pytest.mark.parametrize("ours, std", [
    (gn.init.normal_, lambda w: 0.01),
    (lambda n, seed: gn.init.normal_(n, 0.0, 0.3, seed=seed), lambda w: 0.3),
    (gn.init.kaiming_normal_, lambda w: math.sqrt(2 / w[0].numel())),
    (lambda n, seed: gn.init.kaiming_normal_(n, "fan_out", seed=seed),
     lambda w: math.sqrt(2 / (w.shape[0] * w[0, 0].numel()))),
    (gn.init.xavier_uniform_,
     lambda w: math.sqrt(2 / (w[0].numel() + w.shape[0] * w[0, 0].numel()))),
])  # fmt: skip
def test_spread_of_the_weights(ours, std):
    a, b, c = (ours(net(), seed=s).state_dict() for s in (1, 1, 2))
    for key, w in a.items():
        assert torch.equal(w, b[key])
        if key.endswith("weight"):
            assert not torch.equal(w, c[key])
            assert float(w.std()) == pytest.approx(std(w), rel=0.05), key
            assert abs(float(w.mean())) < 0.05 * std(w) + 4 * std(w) / math.sqrt(w.numel())
        else:
            assert float(w.abs().max()) == 0


def test_biases_by_layer():
    made = gn.init.normal_(net(), bias={"conv2": 0.1, "fc*": -1.0}, seed=0).state_dict()
    values = [float(made[k].unique()) for k in made if k.endswith("bias")]
    assert values == [0.0, pytest.approx(0.1), -1.0]
    small = gn.Sequential(gn.Conv2d(3, 4, 3, name="conv1"), gn.Conv2d(4, 4, 3, name="conv2"))
    bvlc = gn.init.by_name("gaussian", small, seed=0).state_dict()
    assert float(bvlc["0.bias"].max()) == 0 and float(bvlc["1.bias"].min()) == pytest.approx(0.1)
    with pytest.raises(gn.ConfigError, match="torch, gaussian, he, xavier"):
        gn.init.by_name("zeros", small)
    with pytest.raises(gn.ConfigError):
        gn.init.kaiming_normal_(small, "fan")


def test_compiled_programs_see_new_values():
    made = net()
    infer = gn.compile(made, (2, 3, 8, 8), target="cpu")
    x = torch.randn(2, 3, 8, 8)
    before = infer(x)
    gn.init.kaiming_normal_(made, seed=3)
    other = twin()
    other.load_state_dict(made.state_dict())
    torch.testing.assert_close(infer(x), other(x).detach(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(infer(x), before)


@pytest.mark.parametrize("target", ["cpu", "interpret"])
@pytest.mark.parametrize("mode", ["inverted", "vanilla"])
def test_dropout_in_training_and_at_test_time(mode, target):
    """The layer is x -> drop(x) I: logits are its output, and the gradient is its mask."""
    p, rows = 0.25, 8
    layer = gn.Linear(120, 120, bias=False)
    model = gn.Sequential(gn.Dropout(p, mode=mode), layer)
    layer.weight.data = torch.eye(120)
    x = torch.rand(rows, 120) + 0.5
    infer = gn.compile(model, (rows, 120), target=target)
    factor = 1.0 if mode == "inverted" else 1 - p
    torch.testing.assert_close(infer(x), x * factor)
    # With a hinge that never ends, d loss / d weight is dlogits^T drop(x): row 0 is the label's.
    g = gn.compile(
        model, (rows, 120), target=target, seed=5, grads=True,
        loss=gn.MulticlassHingeLoss(margin=1e4),
    )  # fmt: skip
    y = torch.zeros(rows, dtype=torch.int64)
    _, grads = g(x, y)
    kept = torch.from_numpy(gn.random.dropout_mask(5, 0, (rows, 120), p, "drop1"))
    dropped = torch.where(kept, x / (1 - p) if mode == "inverted" else x, 0.0)
    torch.testing.assert_close(grads["1.weight"][3], dropped.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads["1.weight"][0], -119 * dropped.mean(0), rtol=1e-5, atol=1e-3)
    # On the average training sees what testing sees.
    assert float(dropped.mean()) == pytest.approx(float(infer(x).mean()), rel=0.06)


@pytest.mark.parametrize("make, says", [
    (lambda: gn.CrossEntropyLoss(torch.ones(3)), "weight is not implemented but for None"),
    (lambda: gn.CrossEntropyLoss(ignore_index=0), "ignore_index is not implemented but for -100"),
    (lambda: gn.CrossEntropyLoss(reduction="sum"), "losses are means over the rows"),
    (lambda: gn.MultiMarginLoss(2), "p is not implemented but for 1"),
    (lambda: gn.MultiMarginLoss(weight=torch.ones(3)), "weight"),
    (lambda: gn.CrossEntropyLoss(label_smoothing=1.5), r"not in \[0, 1\]"),
    (lambda: gn.CrossEntropyLoss(label_smoothing="some"), "a number, not 'some'"),
    (lambda: gn.MultiMarginLoss(margin=math.nan), "margin=nan is not a finite number"),
    (lambda: gn.MulticlassHingeLoss(margin=math.inf), "margin=inf"),
    (lambda: gn.Dropout(1.0), r"not in \[0, 1\)"),
    (lambda: gn.Dropout("half"), "p is a number, not 'half'"),
    (lambda: gn.init.normal_(net(), std=-1.0), "std=-1.0"),
    (lambda: gn.init.kaiming_normal_(net(), bias="small"), "bias is a number"),
])  # fmt: skip
def test_bad_settings_are_refused(make, says):
    with pytest.raises(gn.GraphnetError, match=says):
        make()


@pytest.mark.parametrize("target", ["cpu", "interpret"])
def test_a_label_that_is_no_class_is_refused(target):
    """Also torch's -100, which its losses leave out."""
    ev = gn.compile(gn.Sequential(gn.Linear(6, 5)), (3, 6), target=target, loss=LOSS)
    for bad in (-100, -1, 5):
        with pytest.raises(gn.DataError):
            ev(torch.randn(3, 6), torch.tensor([0, bad, 4]))


def test_dropping_nothing_is_the_identity():
    x = torch.randn(4, 6)
    for mode in ("inverted", "vanilla"):
        layer = gn.Linear(6, 5)
        model = gn.Sequential(gn.Dropout(0.0, mode=mode), layer)
        step = gn.compile(model, (4, 6), target="cpu", loss=LOSS, grads=True)
        assert "dropout" not in str(step.graph("joint"))
        plain = gn.compile(gn.Sequential(layer), (4, 6), target="cpu", loss=LOSS)
        y = torch.arange(4)
        assert float(step(x, y)[0]) == pytest.approx(float(plain(x, y)[0]), rel=1e-6)


@pytest.mark.parametrize("loss, formula", [
    (gn.CrossEntropyLoss(label_smoothing=1.0),
     lambda z, y: nn.functional.cross_entropy(z, y, label_smoothing=1.0)),
    (gn.CrossEntropyLoss(label_smoothing=0.1),
     lambda z, y: nn.functional.cross_entropy(z, y, label_smoothing=0.1)),
    (gn.MultiMarginLoss(), nn.functional.multi_margin_loss),
    (gn.MulticlassHingeLoss(), lambda z, y: 5 * nn.functional.multi_margin_loss(z, y)),
], ids=["uniform", "smoothing", "margin", "hinge"])  # fmt: skip
@pytest.mark.parametrize("target", ["cpu", "interpret"])
def test_losses_and_their_gradients(loss, formula, target):
    torch.manual_seed(0)
    model = gn.Sequential(gn.Linear(6, 5))
    other = nn.Linear(6, 5)
    other.load_state_dict({k[2:]: v for k, v in model.state_dict().items()})
    x, y = 3 * torch.randn(7, 6), torch.randint(0, 5, (7,))
    value, grads = gn.compile(model, (9, 6), target=target, loss=loss, grads=True)(x, y)
    want = formula(other(x), y)
    want.backward()
    assert float(value) == pytest.approx(float(want.detach()), rel=1e-5)
    for key, p in other.named_parameters():
        torch.testing.assert_close(grads[f"0.{key}"], p.grad, rtol=1e-5, atol=1e-6)
