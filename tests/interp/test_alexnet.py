"""AlexNet at full size, batch 2, fp32: interpreted kernels and the cpu target against torch in
float64, with dropout's own masks. Gradients, then two steps with a strong weight decay.

All belong to the soak. Every test run has a cut-down net with production tiles.
"""

from contextlib import ExitStack

import pytest
import torch
from torch import nn

import graphnet as gn
from graphnet.api import lower
from graphnet.bench.parity import without_dropout
from graphnet.bench.twin import torch_twin
from graphnet.lowering.launch.choice import forced
from tests.kinds import NORMS, PRODUCTS, WGRADS
from tests.twin import relative

LR, MOMENTUM, DECAY, SEED = 0.01, 0.9, 0.05, 7
RATE = float(torch.tensor(LR))  # as the device holds it
CAP = 1e-5
# Two maxima of a window, or a preactivation and 0, may be closer than fp32 rounding; then a
# gradient goes elsewhere. That happens with some inputs, an error in the engine with all.
FLIP = 2e-2
SEEDS = 3


class Flipped(AssertionError):
    """More than rounding, less than a flip can do."""


def hold(got, want, what):
    error = relative(got, want)
    if error > CAP:
        raise (Flipped if error <= FLIP else AssertionError)(f"{what}: {error:.1e}")


@pytest.fixture
def large_tiles():
    """The interpreter's time is per operation: few large tiles."""
    with ExitStack() as stack:
        stack.enter_context(forced(*PRODUCTS, BM=1024, BN=512, BK=512, SPLIT=1))
        stack.enter_context(forced(*WGRADS, BM=512, BN=1024, BK=2048, SPLIT=1))
        stack.enter_context(forced("linear", "linear_dgrad", BM=16, BN=512, BK=2048))
        stack.enter_context(forced(*NORMS, BM=2048, BK=64, SPLIT=2, BLOCK=1 << 14))
        stack.enter_context(forced("maxpool2d", "maxpool2d_grad", "elementwise", BLOCK=1 << 17))
        stack.enter_context(forced("split_reduce", BLOCK=1 << 17))
        yield


class FixedDropout(nn.Module):
    """Inverted dropout with the masks that graphnet draws at a step."""

    def __init__(self, name, p):
        super().__init__()
        self.name, self.p, self.step = name, p, 0

    def forward(self, x):
        keep = gn.random.dropout_mask(SEED, self.step, tuple(x.shape), self.p, self.name)
        return x * torch.as_tensor(keep) / (1 - self.p)


class Twin:
    """The net in torch, float64, and torch's own SGD."""

    def __init__(self, net, shape, dropout):
        self.module = torch_twin(net).double()
        self.drops = []
        stages = lower(net, shape, target="cpu", loss=gn.CrossEntropyLoss(), grads=True).stages
        drawn = (e.where.layers[0] for e in stages.traced.eqns if e.op == "dropout")
        for name, child in list(self.module.named_modules()):
            if isinstance(child, nn.Dropout) and dropout:
                drop = FixedDropout(next(drawn), child.p)  # by its display name, in order
                self.module.set_submodule(name, drop)
                self.drops.append(drop)
        self.sgd = torch.optim.SGD(
            self.module.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY
        )

    def loss(self, x, y, step=0):
        for d in self.drops:
            d.step = step
        self.sgd.zero_grad()
        loss = nn.functional.cross_entropy(self.module(x.double()), y)
        loss.backward()
        return loss.item()

    def momentum(self, key):
        p = dict(self.module.named_parameters())[key]
        return self.sgd.state[p]["momentum_buffer"]


def made(model, dropout, seed=0):
    torch.manual_seed(seed)
    net = gn.models.get(model)
    net = net if dropout else without_dropout(net)
    shape = (2, *net.input_shape)
    return net, shape, torch.randn(shape), torch.tensor([3, 977])


def check(model, dropout, target, **kw):
    """Raises AssertionError where the target leaves the twin, for each of SEEDS inputs."""
    for seed in range(SEEDS):
        try:
            return check_one(model, dropout, target, seed, **kw)
        except Flipped:
            if seed == SEEDS - 1:
                raise


def check_one(model, dropout, target, seed, *, decay=DECAY, planted=0.0, steps=2):
    net, shape, x, y = made(model, dropout, seed)
    twin = Twin(net, shape, dropout)
    common = {"target": target, "loss": gn.CrossEntropyLoss(), "seed": SEED}
    loss, grads = gn.compile(net, shape, grads=True, **common)(x, y)
    want = twin.loss(x, y)
    assert abs(float(loss) - want) <= 1e-5 * want
    named = list(twin.module.named_parameters())
    grads[named[0][0]] *= 1 + planted
    for key, p in named:
        hold(grads[key], p.grad, f"gradient of {key}")
    del grads
    step = gn.compile(
        net, shape, optimizer=gn.SGD(lr=LR, momentum=MOMENTUM, weight_decay=decay), **common
    )
    for k in range(steps):
        before = net.state_dict()
        got = float(step(x, y))
        want = twin.loss(x, y, k)
        twin.sgd.step()
        assert abs(got - want) <= 1e-5 * want
        held = step.optimizer.state_dict()
        for key, p in net.named_parameters():
            v = held[f"{key}.momentum_buffer"]
            hold(v, twin.momentum(key), f"momentum of {key}, step {k}")
            update = before[key].double() - RATE * v.double()
            # Of the larger of old and new: where they cancel, the product's own rounding shows.
            near = torch.maximum(update.abs().float(), before[key].abs())
            ulp = (torch.nextafter(near, torch.full_like(near, torch.inf)) - near).double()
            assert bool(((p.data.double() - update).abs() <= 2 * ulp).all()), f"{key}, step {k}"


@pytest.mark.slow
def test_full_size_in_the_interpreter(large_tiles):
    check("alexnet", True, "interpret")


@pytest.mark.slow
def test_full_size_on_the_cpu():
    check("alexnet", True, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["interpret", "cpu"])
@pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "plain"])
@pytest.mark.parametrize("model", ["alexnet", "alexnet_2012", "caffenet", "alexnet_owt"])
def test_every_variant_at_full_size(model, dropout, target, large_tiles):
    check(model, dropout, target)


@pytest.mark.slow
def test_planted_errors_are_found(large_tiles):
    with pytest.raises(AssertionError, match="gradient of conv1.weight"):
        check("alexnet", False, "cpu", planted=0.01)
    with pytest.raises(AssertionError, match="momentum of"):
        check("alexnet", False, "cpu", decay=0.0)
