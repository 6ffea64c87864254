"""Nets of the usual parts from torch: steps, running statistics and evaluation against float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphnet as gn


class Squeeze(nn.Module):
    """Squeeze and excite: a gate for each channel from its mean over the pixels."""

    def __init__(self, channels):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.fc2(F.silu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


class Inverted(nn.Module):
    """Widen, a convolution by channels, a gate, narrow, and the input added."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.deep = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(True),
        )  # fmt: skip
        self.gate = Squeeze(8)
        self.narrow = nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4))

    def forward(self, x):
        return x + self.narrow(self.gate(self.deep(self.wide(x))))


class Mobile(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6])[:, None, None])
        self.stem = nn.Conv2d(3, 4, 3, 2, padding=1)
        self.blocks = nn.ModuleList([Inverted(), Inverted()])
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = first = F.leaky_relu(self.stem((x - self.mean) / 0.25), 0.1)
        for block in self.blocks:
            x = block(x)
        return self.head(torch.cat([x, first], 1).mean((2, 3)))


SHAPE = (4, 3, 8, 8)


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


@pytest.mark.parametrize("target", [
    "cpu", pytest.param("interpret", marks=pytest.mark.slow)
])  # fmt: skip
def test_three_steps_statistics_and_evaluation(target):
    torch.manual_seed(5)
    module = Mobile()
    net = gn.from_torch(module, torch.zeros(SHAPE))
    assert list(net.state_dict()) == list(module.state_dict())
    twin = module.double().train()
    sgd = torch.optim.SGD(twin.parameters(), 0.05, momentum=0.9)
    step = gn.compile(net, SHAPE, loss=nn.CrossEntropyLoss(), optimizer=sgd, target=target)
    for _ in range(3):
        x, y = torch.rand(SHAPE), torch.randint(5, SHAPE[:1])
        sgd.zero_grad()
        want = F.cross_entropy(twin(x.double()), y)
        want.backward()
        sgd.step()
        assert float(step(x, y)) == pytest.approx(want.item(), rel=1e-5)
    for key, value in net.state_dict().items():
        assert relative(value, twin.state_dict()[key]) < 1e-5, key
    logits = gn.compile(net, SHAPE, target=target)(x)
    assert relative(logits, twin.eval()(x.double())) < 1e-5


def test_bf16_is_as_near_as_torchs_autocast():
    """Gradients of the input by as_torch in bf16: at most 1.5 times autocast's error."""
    torch.manual_seed(6)
    module = Mobile().eval()
    run = gn.as_torch(gn.from_torch(module), SHAPE, target="cpu", precision="bf16").eval()
    exact = copy.deepcopy(module).double()
    errors = []
    for seed in range(3):
        torch.manual_seed(seed)
        x, s = torch.rand(SHAPE), torch.randn(SHAPE[0], 5)

        def gradient(m, x=x, s=s):
            given = x.to(next(m.parameters()).dtype).requires_grad_()
            return torch.autograd.grad(m(given), given, s.to(given.dtype))[0]

        with torch.autocast("cpu", torch.bfloat16):
            theirs = torch.autograd.grad(
                module(given := x.clone().requires_grad_()), given, s.bfloat16()
            )[0]
        want = gradient(exact)
        errors.append((relative(gradient(run), want), relative(theirs, want)))
    ours, theirs = (sum(e) for e in zip(*errors, strict=True))
    assert ours <= 1.5 * theirs, errors
