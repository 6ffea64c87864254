"""What a newcomer from torch meets first: each error names the thing, the place and a fix."""

import pytest
import torch
from torch import nn

import graphnet as gn

HERE = "test_first_errors.py:"
SHAPE = (2, 3, 20)


class Through(gn.Module):
    """A net whose forward is a function."""

    def __init__(self, function):
        self.function = function

    def forward(self, x):
        return self.function(x)


class Block(gn.Module):
    def __init__(self):
        self.first = gn.Conv2d(3, 8, 3)
        self.second = gn.Conv2d(9, 8, 3)

    def forward(self, x):
        return self.second(self.first(x))


class Blocks(gn.Module):
    def __init__(self):
        self.block = Block()

    def forward(self, x):
        return self.block(x)


def small():
    return gn.Sequential(gn.Flatten(), gn.Linear(60, 10))


def said(function, kind):
    with pytest.raises(kind) as caught:
        function()
    return str(caught.value)


TRACED = [
    (lambda x: torch.einsum("nct->nc", x), gn.UnsupportedOpError,
     ["torch.functional.einsum cannot be traced"]),
    (lambda x: x.mean(), gn.UnsupportedOpError, ["mean over dim=None", "x.mean((2, 3))"]),
    (lambda x: torch.softmax(x, -3), gn.UnsupportedOpError,
     ["[2, 3, 20]", "is the batch", "dim=1"]),
    (lambda x: nn.functional.pad(x, (1, 1), mode="reflect"), gn.UnsupportedOpError, ["reflect"]),
    (lambda x: x.einsum, gn.MissingError, ["has no 'einsum'", "x.reshape"]),
    (lambda x: x**2.5, gn.UnsupportedOpError, ["** of", "with 2.5 cannot be traced"]),
    (lambda x: x if x > 0 else -x, gn.UnsupportedOpError, ["cannot branch on data"]),
    (lambda x: x if x == 0 else -x, gn.UnsupportedOpError, ["cannot branch on data"]),
    (lambda x: x + torch.zeros(SHAPE), gn.ConfigError, ["with torch's Tensor", "gn.Parameter"]),
    (lambda x: torch.zeros(SHAPE) + x, gn.ConfigError, ["with torch's Tensor", "gn.Parameter"]),
    (lambda x: x + [1.0], gn.ConfigError, ["with a list"]),
    (lambda x: x[:, 0:1] + x, gn.ShapeError,
     ["layer 'add1'", "[2, 1, 20] of slice1 test_first_errors.py:", "[2, 3, 20] of the input"]),
    (lambda x: x * gn.relu(x[:, :, :3]), gn.ShapeError,
     ["layer 'mul1'", "[2, 3, 3] of relu1 test_first_errors.py:"]),
    (lambda x: gn.cat([x, x[:, :, :3]], 1), gn.ShapeError, ["layer 'cat1'", "[2,3,3]"]),
    (lambda x: x.reshape(2, 7), gn.ShapeError, ["layer 'reshape1'", "120", "[2, 7] (14)"]),
    # What changes the rows of the batch: an image would depend on its place in it.
    (lambda x: x.reshape(6, 20), gn.ShapeError, ["[6, 20] of [2, 3, 20]", "x.shape[0]"]),
    (lambda x: x.reshape(-1), gn.ShapeError, ["[120] of [2, 3, 20]", "axis 0 is the batch"]),
    (lambda x: gn.flatten(x), gn.ShapeError, ["flatten makes [120]", "gn.flatten(x, 1)"]),
    (lambda x: x.flatten(0, 1), gn.ShapeError, ["flatten makes [6, 20]", "its 2 rows"]),
    (lambda x: x[0:1], gn.ShapeError, ["slice makes [1, 3, 20]", "would become 1"]),
    (lambda x: gn.cat([x, x]), gn.ShapeError, ["cat makes [4, 3, 20]", "would become 4"]),
]  # fmt: skip


@pytest.mark.parametrize("at", range(len(TRACED)))
def test_what_forward_cannot_do(at):
    function, kind, parts = TRACED[at]
    text = said(lambda: gn.compile(Through(function), SHAPE, target="cpu"), kind)
    for part in (*parts, HERE, "help: " if kind is not gn.ShapeError else ""):
        assert part in text


LABELS = torch.zeros(2, dtype=torch.int64)
LOSS = dict(loss=gn.CrossEntropyLoss(), optimizer=gn.SGD(lr=0.1), target="cpu")
CALLS = [
    (lambda: gn.compile(nn.Sequential(), SHAPE), gn.ConfigError,
     ["torch's nn.Sequential", "gn.from_torch(module)", HERE]),
    (lambda: gn.compile(Block, SHAPE), gn.ConfigError, ["the class Block", HERE]),
    (lambda: gn.Sequential(nn.Linear(4, 2)), gn.ConfigError,
     ["item 0 is torch's nn.Linear", "gn.Linear takes the same arguments", HERE]),
    (lambda: gn.Sequential(gn.ReLU), gn.ConfigError, ["the class ReLU", "ReLU(...)", HERE]),
    (lambda: gn.Sequential(torch.relu), gn.ConfigError, ["in the forward of a gn.Module"]),
    (lambda: gn.compile(small(), SHAPE, **LOSS | {"loss": nn.NLLLoss()}), gn.ConfigError,
     ["torch's nn.NLLLoss", "loss=gn.CrossEntropyLoss()", "log_softmax", HERE]),
    (lambda: gn.compile(small(), SHAPE, **LOSS | {"loss": nn.CrossEntropyLoss(reduction="sum")}),
     gn.ConfigError, ["torch's nn.CrossEntropyLoss", "reduction", "gn.CrossEntropyLoss", HERE]),
    (lambda: gn.compile(small(), SHAPE, **LOSS | {"loss": gn.CrossEntropyLoss}), gn.ConfigError,
     ["the class CrossEntropyLoss", "loss=gn.CrossEntropyLoss()", HERE]),
    (lambda: gn.compile(small(), SHAPE, **LOSS | {
        "optimizer": torch.optim.Adam([nn.Parameter(torch.ones(1))])}), gn.ConfigError,
     ["torch's optim.Adam", "1 parameters", "p.trainable = False", HERE]),
    (lambda: gn.SGD(small().parameters(), lr=0.1), gn.ConfigError,
     ["SGD is given a generator in the place of its learning rate", "gn.SGD(lr=0.01)"]),
    (lambda: gn.Adam([{"params": []}]), gn.ConfigError, ["Adam is given a list"]),
    (lambda: gn.GroupNorm9d(3), gn.MissingError, ["graphnet has no 'GroupNorm9d'", "MaxPool2d"]),
    (lambda: gn.Conv2D(3), gn.MissingError, ["did you mean Conv2d?"]),
    (lambda: small().to("cuda"), gn.MissingError, ["Sequential has no 'to'", 'target="cuda"']),
    (lambda: small().train(), gn.MissingError, ["has no 'train'", "with a loss", HERE]),
    (lambda: small().eval(), gn.MissingError, ["has no 'eval'", "infers", HERE]),
    (lambda: small().half(), gn.MissingError, ["has no 'half'", 'precision="bf16"', HERE]),
    (lambda: small().sumary(), gn.MissingError, ["did you mean summary?", HERE]),
    (lambda: gn.compile(small(), 32), gn.ShapeError, ["input shape 32", "(32, 1, 28, 28)"]),
    (lambda: gn.compile(small(), "32"), gn.ShapeError, ["input shape '32'"]),
    (lambda: gn.compile(gn.models.lenet5(), (1, 28, 28)), gn.ShapeError,
     ["the batch is missing", "(32, 1, 28, 28)"]),
    (lambda: gn.compile(gn.Sequential(gn.Conv2d(1, 6, 5)), (1, 28, 28)), gn.ShapeError,
     ["layer 'conv1', net.0", "takes [N, C, H, W], got [1, 28, 28]", "(32, 1, 28, 28)"]),
    (lambda: gn.compile(small(), (2, 28)), gn.ShapeError, ["expects 60 input", "got 28"]),
    (lambda: gn.compile(small(), torch.zeros(SHAPE)), gn.ShapeError,
     ["tensor of shape [2, 3, 20] is no tuple", "x.shape"]),
    (lambda: gn.compile(small(), (2, 3, 30)), gn.ShapeError,
     ["layer 'fc1', net.1", "60 input features, got 90", "in_features=90", HERE]),
    (lambda: gn.compile(small(), SHAPE, **LOSS)(torch.zeros(2, 4, 20), LABELS), gn.ShapeError,
     ["[2, 4, 20], compiled for [N, 3, 20]", "gn.compile(net, (2, 4, 20)"]),
    (lambda: gn.compile(small(), SHAPE, **LOSS)(torch.zeros(SHAPE), torch.zeros(2, 10).long()),
     gn.ShapeError, ["labels of shape [2, 10]", "y.argmax(1)"]),
    (lambda: gn.MSELoss(), gn.MissingError, ["no 'MSELoss'", "its losses: CrossEntropyLoss"]),
    (lambda: gn.compile(nn.Sequential, SHAPE), gn.ConfigError, ["gn.from_torch(Net())", HERE]),
    (lambda: gn.compile(Blocks(), (2, 3, 8, 8)), gn.ShapeError,
     ["layer 'conv2', net.block.second", "9 input channels", "got 8", "Conv2d(8, ", HERE]),
]  # fmt: skip


@pytest.mark.parametrize("at", range(len(CALLS)))
def test_what_torch_has_and_we_do_not(at):
    function, kind, parts = CALLS[at]
    text = said(function, kind)
    for part in parts:
        assert part in text


def test_a_missing_name_is_an_attribute_error_too():
    assert not hasattr(gn, "Conv9d") and not hasattr(small(), "to")
    assert getattr(small(), "nothing", None) is None


def test_a_parameter_of_any_shape_may_be_reshaped():
    """The rule is about rows of the batch: what comes of a parameter alone has none."""

    class Scaled(gn.Module):
        def __init__(self):
            self.scale = gn.Parameter(torch.arange(6.0))

        def forward(self, x):
            return x + gn.relu(self.scale).reshape(2, 3)

    out = gn.compile(Scaled(), (2, 3), target="cpu")(torch.ones(2, 3))
    assert torch.equal(out, 1 + torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize("target", ["cpu", "interpret"])
def test_differences_negatives_and_quotients(target):
    """Forward and the loss's gradient of what is made of sums and products, against torch."""

    def formula(x, relu, tanh):
        return relu((1 - x) / 3 - x * -1.25 - tanh(-x)) - 2

    class Net(gn.Module):
        def __init__(self):
            self.fc0, self.fc = gn.Linear(20, 20), gn.Linear(20, 4)

        def forward(self, x):
            h = formula(self.fc0(x), gn.relu, gn.tanh)
            return self.fc(h - self.fc0(x).sigmoid())

    torch.manual_seed(0)
    net, x, y = Net(), torch.randn(3, 20), torch.tensor([0, 1, 3])
    w = {k: v.double().requires_grad_() for k, v in net.state_dict().items()}
    h0 = nn.functional.linear(x.double(), w["fc0.weight"], w["fc0.bias"])
    h = formula(h0, torch.relu, torch.tanh) - torch.sigmoid(h0)
    want = nn.functional.cross_entropy(nn.functional.linear(h, w["fc.weight"], w["fc.bias"]), y)
    want.backward()
    program = gn.compile(net, (3, 20), loss=gn.CrossEntropyLoss(), grads=True, target=target)
    loss, grads = program(x, y)
    assert float(loss) == pytest.approx(want.item(), rel=1e-5)
    for key, gradient in grads.items():
        torch.testing.assert_close(gradient.double(), w[key].grad, rtol=1e-4, atol=1e-6)
