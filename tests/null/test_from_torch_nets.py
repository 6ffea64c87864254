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
        self.pool, self.drop = nn.AdaptiveAvgPool2d(1), nn.Dropout2d(0.0)
        self.fc = nn.Sequential(
            nn.Linear(channels, 2, bias=False), nn.SiLU(), nn.Linear(2, channels), nn.Hardsigmoid()
        )
        self.register_buffer("keep", torch.tensor(0.9), persistent=False)

    def forward(self, x):
        n, c, _, _ = x.size()
        y = self.fc(self.pool(x).view(n, c)).view(n, c, 1, 1)
        return self.drop(x) * y.expand_as(x) * self.keep


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
        self.deviation = torch.tensor([0.25, 0.2, 0.3])[:, None, None]  # neither one
        self.stem = nn.Conv2d(3, 4, 3, 2, padding=1)
        self.blocks = nn.ModuleList([Inverted(), Inverted()])
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = first = F.leaky_relu(self.stem((x - self.mean) / self.deviation), 0.1)
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
    twin.deviation = twin.deviation.double()
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
    exact.deviation = exact.deviation.double()
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


def test_whole_channels_are_dropped():
    net = gn.from_torch(nn.Sequential(nn.Dropout2d(0.5), nn.Flatten()))
    x = torch.ones(16, 8, 3, 3)
    module = gn.as_torch(net, x.shape, target="cpu")
    y = module(x.requires_grad_()).view(x.shape)
    kept = y[:, :, 0, 0] > 0
    assert torch.equal(y, 2.0 * kept[:, :, None, None].expand(x.shape))
    assert 0.3 < kept.float().mean() < 0.7 and len(kept.unique(dim=0)) > 8
    assert torch.equal(module.eval()(x).view(x.shape), x)


def test_constants_are_no_keys():
    """What torch does not save, we do not: it moves with copies and goes out to ONNX."""
    module = Mobile().eval()
    net = gn.from_torch(module)
    assert not {"deviation", "blocks.0.gate.keep"} & set(net.state_dict())
    assert {"deviation", "blocks.0.gate.keep"} <= {k for k, _ in net.named_buffers()}
    x = torch.rand(SHAPE)
    other = net.copy()
    other.load_state_dict(net.state_dict())
    again = gn.from_onnx(gn.to_onnx(other, None, SHAPE))
    for n in (other, again, gn.as_torch(net, SHAPE, target="cpu").eval().net):
        torch.testing.assert_close(gn.compile(n, SHAPE, target="cpu")(x), module(x).detach())
