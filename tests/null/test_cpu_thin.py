"""Convolutions of few channels on the cpu target, against torch in float64."""

import copy

import pytest
import torch
from torch import nn

import graphnet as gn
from graphnet.lowering.targets import cpu_thin

N = cpu_thin._BATCH

# (channels, rows, columns), and the layers: each case has a first layer that `PooledConv` runs.
# The other convolution has fewer than 16 input channels.
CASES = {
    "lenet": ((1, 14, 14), (nn.Conv2d(1, 4, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
                            nn.Conv2d(4, 6, 3), nn.ReLU())),
    "no relu": ((1, 12, 13), (nn.Conv2d(1, 5, 3), nn.MaxPool2d(2), nn.Conv2d(5, 3, 3, padding=2))),
    "no bias": ((3, 17, 15), (nn.Conv2d(3, 7, 3, bias=False), nn.ReLU(), nn.MaxPool2d((1, 3)),
                              nn.Conv2d(7, 4, (3, 1), stride=(2, 1), bias=False))),
    "strides": ((4, 20, 23), (nn.Conv2d(4, 3, (3, 4), stride=(2, 3), padding=(1, 2)),
                              nn.MaxPool2d((3, 1)), nn.Tanh(),
                              nn.Conv2d(3, 2, 2, stride=(1, 2), padding=1))),
    "one column": ((2, 9, 7), (nn.Conv2d(2, 3, 7), nn.MaxPool2d((2, 1)), nn.ReLU(),
                               nn.Conv2d(3, 2, 1, stride=3))),
}  # fmt: skip


def both(shape, layers):
    """(the net's gradients program on the cpu target, its float64 twin)."""
    torch.manual_seed(0)
    layers = copy.deepcopy(layers)
    for layer in layers:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    size = nn.Sequential(*layers)(torch.zeros(1, *shape)).numel()
    twin = nn.Sequential(*layers, nn.Flatten(), nn.Linear(size, 3))
    how = {"target": "cpu", "precision": "fp32", "loss": gn.CrossEntropyLoss(), "grads": True}
    return gn.compile(gn.from_torch(twin), (N, *shape), **how), twin.double()


def wanted(twin, x, y):
    twin.zero_grad()
    loss = nn.functional.cross_entropy(twin(x.double()), y)
    loss.backward()
    return loss.detach(), {k: p.grad for k, p in twin.named_parameters()}


def apart(got, want):
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(name, monkeypatch):
    ran = set()
    for kind in ("forward", "backward"):
        plain = getattr(cpu_thin.PooledConv, kind)
        monkeypatch.setattr(
            cpu_thin.PooledConv, kind,
            lambda *args, plain=plain, kind=kind: ran.add(kind) or plain(*args),
        )  # fmt: skip
    plain = cpu_thin.input_gradient
    monkeypatch.setattr(cpu_thin, "input_gradient", lambda e: ran.add("input") or plain(e))
    program, twin = both(*CASES[name])
    assert ran == {"forward", "backward", "input"}
    g = torch.Generator().manual_seed(1)
    for rows in (N, 5):  # whole, and a last batch
        x = torch.randn(rows, *CASES[name][0], generator=g)
        y = torch.randint(0, 3, (rows,), generator=g)
        x[:2, :, :6] = 0.0  # where all pixels of a window tie
        loss, grads = program(x, y)
        want, gradients = wanted(twin, x, y)
        assert apart(loss, want) < 1e-6
        assert max(apart(grads[k], want) for k, want in gradients.items()) < 5e-6
        again = program(x, y)[1]
        assert all(torch.equal(again[k], grad) for k, grad in grads.items())


def test_a_tie_goes_to_the_first_pixel():
    twin = nn.Sequential(nn.Conv2d(2, 1, 1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1, 2))
    nn.init.ones_(twin[0].weight)
    how = {"target": "cpu", "loss": gn.CrossEntropyLoss(), "grads": True}
    program = gn.compile(gn.from_torch(twin), (N, 2, 2, 2), **how)
    x, y = torch.zeros(N, 2, 2, 2), torch.zeros(N, dtype=torch.long)
    x[:, 0, 0, 1] = x[:, 1, 1, 0] = 1.0  # both pixels give 1, by another channel
    got = program(x, y)[1]["0.weight"]
    assert apart(got, wanted(twin.double(), x, y)[1]["0.weight"]) < 1e-6
    assert got[0, 0] != 0 and got[0, 1] == 0


def test_a_value_that_is_not_finite_stays_visible():
    program, _ = both(*CASES["lenet"])
    x = torch.randn(N, *CASES["lenet"][0])
    x[3, 0, 7, 7] = float("nan")
    loss, grads = program(x, torch.zeros(N, dtype=torch.long))
    assert not loss.isfinite() and all(not g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("batch", [1, N])
def test_small_batches_have_no_columns(batch, monkeypatch):
    calls = []
    plain = cpu_thin.PooledConv.forward
    monkeypatch.setattr(
        cpu_thin.PooledConv, "forward", lambda self: calls.append(self) or plain(self)
    )
    net = gn.Sequential(gn.Conv2d(1, 2, 3), gn.MaxPool2d(2))
    x = torch.randn(batch, 1, 8, 8)
    got = gn.compile(net, x.shape, target="cpu", precision="fp32")(x)
    conv = net[0]
    want = torch.nn.functional.max_pool2d(torch.conv2d(x, conv.weight.data, conv.bias.data), 2)
    assert torch.allclose(got, want, 1e-5, 1e-6) and bool(calls) == (batch == N)
