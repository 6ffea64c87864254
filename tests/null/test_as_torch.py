"""Nets of ours as torch modules: outputs, gradients and whole loops of torch's against torch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphnet as gn

SHAPE = (6, 2, 8, 8)


class Twin(nn.Module):
    """A residual net with shared and frozen parameters, in torch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.norm = nn.LocalResponseNorm(3, alpha=0.1)
        self.pool = nn.MaxPool2d(2)
        self.fc1, self.fc2 = nn.Linear(64, 5), nn.Linear(64, 3)
        self.again = self.fc1
        self.unused = nn.Linear(1, 1)

    def trunk(self, x):
        x = torch.tanh(self.conv(x))
        x = self.pool(self.norm(self.block(x) + x)).flatten(1)
        return x

    def forward(self, x):
        x = self.trunk(x)
        return self.fc1(x) * 0.5 + self.again(x)


class TwoHeads(Twin):
    def forward(self, x):
        x = self.trunk(x)
        return self.fc1(x), self.fc2(x)


def both(kind=Twin, **how):
    torch.manual_seed(3)
    twin = kind()
    module = gn.as_torch(gn.from_torch(twin), SHAPE, **{"target": "cpu", **how})
    return twin.double(), module


def batch(rows=SHAPE[0], seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, *SHAPE[1:], generator=g)
    return x, torch.randint(5, (rows,), generator=g)


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


@pytest.mark.parametrize(("target", "rows"), [("cpu", 6), ("cpu", 4), ("interpret", 4)])
def test_gradients_of_the_input_and_of_every_parameter(target, rows):
    """Seeds of each output, by torch.autograd.grad, in training and in evaluation."""
    twin, module = both(TwoHeads, target=target)
    assert list(module.state_dict()) == list(twin.state_dict())
    x = batch(rows)[0].requires_grad_()
    xd = x.detach().double().requires_grad_()
    mine, theirs = module(x), twin(xd)
    names = [n for n, _ in twin.named_parameters()]
    g = torch.Generator().manual_seed(1)
    seeds = [torch.randn(y.shape, generator=g, dtype=torch.float64) for y in theirs]
    for k in (0, 1):
        assert relative(mine[k], theirs[k]) < 1e-5
        got = torch.autograd.grad(
            mine[k], [x, *module.parameters()], seeds[k].float(), retain_graph=True,
            allow_unused=True,
        )  # fmt: skip
        want = torch.autograd.grad(
            theirs[k], [xd, *twin.parameters()], seeds[k], retain_graph=True, allow_unused=True
        )
        for name, a, b in zip(["x", *names], got, want, strict=True):
            if b is not None:
                assert a.shape == b.shape and relative(a, b) < 1e-5, name
            else:
                assert a is None or not a.any(), name
        assert got[1 + names.index("unused.weight")] is None
    assert all(p.dtype == torch.float32 for p in module.parameters())


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "fused": lambda p: torch.optim.AdamW(p, 2e-3, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_twenty_steps_of_a_loop_of_torchs(name):
    """Losses of 20 steps, with rates of 0.05 (SGD) and 0.002 (AdamW), to 1e-4 of plain torch's."""
    twin, module = both()
    optimizers = [OPTIMIZERS[name](m.parameters()) for m in (module, twin)]
    for k in range(20):
        x, y = batch(6 if k % 3 else 4, seed=k)
        losses = []
        for m, optimizer, given in zip((module, twin), optimizers, (x, x.double()), strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(m(given), y, label_smoothing=0.1)
            loss.backward()
            nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-4), k
    module.eval(), twin.eval()
    x, _ = batch()
    with torch.no_grad():
        assert relative(module(x), twin(x.double())) < 1e-4
    trained = module.net.state_dict()
    assert all(torch.equal(v, trained[k]) for k, v in module.state_dict().items())
    assert torch.equal(gn.compile(module.net, SHAPE, target="cpu")(x), module(x).detach())


def test_bf16_copies_follow_an_optimizer_that_leaves_no_trace():
    """A fused optimizer moves parameters without their version: every forward sees it."""
    _, module = both(precision="bf16")
    optimizer = torch.optim.SGD(module.parameters(), 0.5, fused=True)
    x, y = batch()
    first = F.cross_entropy(module(x), y)
    first.backward()
    optimizer.step()
    assert F.cross_entropy(module(x), y) < first - 0.05
    optimizer.step()
    module.eval()
    with torch.no_grad():
        after = module(x)
        assert torch.equal(after, gn.compile(module.net.copy(), SHAPE, target="cpu",
                                             precision="bf16")(x))  # fmt: skip
        module.conv.weight.mul_(0.5)
        assert not torch.equal(module(x), after)
        module.load_state_dict({k: torch.zeros_like(v) for k, v in module.state_dict().items()})
        assert not module(x).any()


def test_what_needs_no_gradient_gets_none():
    _, module = both()
    module.conv.weight.requires_grad_(False)
    x, y = batch()
    F.cross_entropy(module(x), y).backward()
    assert module.conv.weight.grad is None and module.conv.bias.grad is not None
    assert module.fc2.weight.grad is None  # it is not read
    backward = module.passes()[1]
    assert "conv.weight" not in backward.keys and "x" not in backward.keys
    with torch.no_grad():
        assert not module(x).requires_grad
    module.requires_grad_(False)
    assert not module(x).requires_grad
    module.eval()
    grad = torch.autograd.grad(module(x.requires_grad_()).sum(), x)[0]
    assert grad.shape == x.shape and grad.abs().sum() > 0


def test_dropout_draws_one_mask_for_both_passes_and_another_for_each_call():
    net = gn.Sequential(gn.Flatten(), gn.Dropout(0.5))
    module = gn.as_torch(net, (4, 50), target="cpu")
    x = torch.ones(4, 50, requires_grad=True)
    masks = []
    for _ in range(2):
        y = module(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(dx, y.detach())
        masks.append(dx)
    assert not torch.equal(*masks) and 0.3 < (masks[0] > 0).float().mean() < 0.7
    module.eval()
    assert torch.equal(module(x), x)


def test_an_earlier_call_has_no_backward_pass():
    _, module = both()
    x, _ = batch()
    first, second = module(x), module(x)
    second.sum().backward()
    with pytest.raises(gn.GraphError, match="a later call has taken its buffers"):
        first.sum().backward()
    held = module(x)
    module.eval()
    with torch.no_grad():
        module(x)  # inference has buffers of its own
    held.sum().backward()
    again = module.train()(x).sum()
    with torch.no_grad():
        module.conv.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        again.backward()


def test_it_is_a_module_among_others():
    twin, module = both()
    whole = nn.Sequential(nn.Conv2d(1, 2, 1), module, nn.Linear(5, 3))
    other = copy.deepcopy(whole)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(whole(x), other(x))
    with torch.no_grad():
        other[1].conv.bias.add_(1.0)
    assert not torch.equal(whole(x), other(x)) and other[1].net is not module.net
    whole.to("cpu").float()
    with pytest.raises(gn.ConfigError, match="run on cpu with fp32"):
        whole.half()
    with torch.autocast("cpu", torch.bfloat16):
        whole(x).sum().backward()
    assert whole[0].weight.grad.abs().sum() > 0


def test_what_it_refuses():
    twin, module = both()
    with pytest.raises(gn.ConfigError, match="from_torch"):
        gn.as_torch(twin, SHAPE)
    with pytest.raises(gn.ShapeError, match="7 rows, compiled for 1 to 6"):
        module(torch.zeros(7, *SHAPE[1:]))
    with pytest.raises(gn.DTypeError, match="x.float"):
        module(torch.zeros(SHAPE, dtype=torch.float64))
    with pytest.raises(gn.ShapeError, match="192"):
        gn.as_torch(gn.Sequential(gn.Flatten(), gn.Linear(192, 2)), (2, 191))
