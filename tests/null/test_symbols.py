"""Symbols behave like tensors: one function runs on both, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

import graphnet as gn

SHAPE = (4, 6, 5, 5)


class Both(gn.Module):
    """A function of the image and three parameters, which `torch_of` gives to torch."""

    def __init__(self, function):
        g = torch.Generator().manual_seed(1)
        draw = lambda *s: gn.Parameter(torch.rand(*s, generator=g) + 0.5)
        self.function = function
        self.scale, self.row, self.weight = draw(6, 1, 1), draw(6), draw(6, 6, 3, 3)
        self.fc = gn.Linear(6, 3)

    def forward(self, x):
        y = self.function(x, self.scale, self.row, self.weight)
        return self.fc(y.mean((2, 3)) if y.ndim == 4 else y)


FUNCTIONS = [
    lambda x, s, r, w: (x * s - s) / (s + 2.0) + 1 - x / 3,
    lambda x, s, r, w: 2 / (1 + torch.exp(-x)) - s * torch.relu(-x) + abs(x),
    lambda x, s, r, w: torch.relu(x).add(F.silu(x), alpha=0.5).mul(s).sub(1),
    lambda x, s, r, w: F.leaky_relu(x, 0.2) + F.gelu(x, approximate="tanh") + F.hardswish(x),
    lambda x, s, r, w: torch.cat([F.relu6(x * 5), x.tanh()], 1)[:, 3:9] * x.sigmoid(),
    lambda x, s, r, w: F.conv2d(F.pad(x, (1, 1, 0, 2)), w, r, padding=(1, 0)).clamp(-1, 20),
    lambda x, s, r, w: x.mean((2, 3)) * r + torch.flatten(F.adaptive_avg_pool2d(x, 1), 1) - r,
    lambda x, s, r, w: x * torch.sigmoid(x.mean((2, 3), keepdim=True) * s).expand_as(x)
        + torch.cat([x, x.mean((2, 3), keepdim=True).expand(-1, -1, 5, 5)], 1)[:, 3:9].softmax(1),
    lambda x, s, r, w: F.log_softmax(F.max_pool2d(x, 2).view(x.size(0), 6, 2, 2), dim=1),
    lambda x, s, r, w: F.relu(x.mean(dim=[-1, -2]), inplace=True).reshape(4, -1).neg() / r,
    lambda x, s, r, w: s / (x * x + 1).sqrt() - (1 - x),
    lambda x, s, r, w: x.softmax(-1) * F.log_softmax(x.flatten(2), dim=2).view(x.shape) * s,
    lambda x, s, r, w: F.softmax(x.view(4, 2, 3, 5, 5), 2).view(x.shape) * F.softmax(x, 1) * s,
    lambda x, s, r, w: F.adaptive_max_pool2d(x * s, 1).flatten(1),
    lambda x, s, r, w: x.mean(-1).mean(-1) + x.mean(1, keepdim=True).view(4, -1)[:, :6] * r,
    lambda x, s, r, w: x.amax((2, 3)) ** 2 + torch.square(x).sum((-2, -1)) - x.mean(2).sum(2) ** 3,
    lambda x, s, r, w: (x * x + 1).rsqrt() + (x * x + 2) ** -1 + (abs(x) + 1).pow(0.5) * s,
    lambda x, s, r, w: F.hardsigmoid(x * 5).unflatten(1, (2, 3)).view_as(x) * s,
    lambda x, s, r, w: x.mean((2, 3)).unsqueeze(-1).unsqueeze(-1).squeeze(3).squeeze() * r,
    lambda x, s, r, w: F.adaptive_max_pool2d(torch.relu(F.pad(x, (9, 9, 9, 9), value=2.0)), 1) * s,
]  # fmt: skip


@pytest.mark.parametrize("at", range(len(FUNCTIONS)))
def test_a_function_of_tensors_can_be_traced(at):
    net = Both(FUNCTIONS[at])
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(SHAPE, generator=g), torch.tensor([0, 2, 1, 1])
    p = {k: v.double().requires_grad_() for k, v in net.state_dict().items()}
    out = FUNCTIONS[at](x.double(), p["scale"], p["row"], p["weight"])
    out = out.mean((2, 3)) if out.ndim == 4 else out
    logits = F.linear(out, p["fc.weight"], p["fc.bias"])
    want = torch.autograd.grad(F.cross_entropy(logits, y), list(p.values()), allow_unused=True)

    infer = gn.compile(net, SHAPE, target="cpu")
    assert torch.allclose(infer(x).double(), logits.detach(), rtol=1e-5, atol=1e-6)
    program = gn.compile(net, SHAPE, target="cpu", loss=gn.CrossEntropyLoss(), grads=True)
    loss, grads = program(x, y)
    for key, w in zip(p, want, strict=True):
        w = torch.zeros(()) if w is None else w
        assert (grads[key] - w).norm() <= 1e-5 * max(float(w.norm()), 0.1), key


def test_in_place_is_seen_by_who_holds_the_value():
    def forward(x, s, r, w):
        F.relu_(x)
        return x

    x = torch.randn(SHAPE)
    net = Both(forward)
    plain = Both(lambda x, s, r, w: torch.relu(x))
    plain.load_state_dict(net.state_dict())
    a, b = (gn.compile(n, SHAPE, target="cpu") for n in (net, plain))
    assert torch.equal(a(x), b(x))

