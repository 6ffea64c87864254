"""torch modules as nets of ours: keys, outputs, gradients and steps against torch in float64."""

import functools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphnet as gn

HERE = "test_from_torch.py:"


class Residual(nn.Module):
    """Sums, an activation in place whose input is read again, a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.conv(x)
        self.act(y)
        y = self.conv(y) + y
        y += x
        return y.relu_() * 0.5


class Branches(nn.Module):
    """Concatenation, pools and a norm as functions, parts of channels, sizes that forward reads."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh())
        self.left = nn.Conv2d(2, 4, 1)
        self.right = nn.Conv2d(2, 4, 3, padding=1, groups=2, bias=False)
        self.block = Residual()
        self.head = nn.Linear(48, 5)
        self.scale = nn.Parameter(torch.randn(8, 5))
        self.unused = nn.PReLU()

    def forward(self, x, double=False):
        a, b = torch.chunk(self.stem(x), 2, dim=1)
        y = torch.cat([self.left(a), self.right(b), self.block(torch.cat((a, b), 1))], 1)
        y = F.local_response_norm(F.max_pool2d(F.relu(y), 2), 3, alpha=0.01)
        y = F.dropout(F.avg_pool2d(y, 3, 2, padding=1), 0.0, self.training)
        torch._assert(y.shape[1] == 12, "channels")
        y = self.head(y.view(y.size(0), -1))
        return F.linear(torch.sigmoid(y), self.scale).flatten(1) * (2 if double else 1)


SHAPE = (3, 3, 8, 8)


def pair(kind=Branches):
    torch.manual_seed(1)
    module = kind()
    return module, gn.from_torch(module)


def batch(classes=8):
    g = torch.Generator().manual_seed(2)
    return torch.randn(SHAPE, generator=g), torch.randint(classes, SHAPE[:1], generator=g)


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def test_keys_and_values_are_torchs():
    before = torch.random.get_rng_state()
    torch.manual_seed(0)
    module = Branches()
    state = torch.random.get_rng_state()
    net = gn.from_torch(module)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.random.set_rng_state(before)
    assert list(net.state_dict()) == list(module.state_dict())
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in net.state_dict().items())
    module.load_state_dict(net.state_dict())
    assert module.training and type(net.block.conv) is gn.Conv2d
    assert net.block.conv.place.startswith(HERE)


@pytest.mark.parametrize("target", ["cpu", "interpret"])
def test_outputs_and_gradients(target):
    module, net = pair()
    x, y = batch()
    twin = module.double().eval()
    logits = gn.compile(net, SHAPE, target=target)(x)
    assert relative(logits, twin(x.double())) < 1e-5
    how = {"loss": gn.CrossEntropyLoss(), "grads": True, "target": target}
    loss, grads = gn.compile(net, SHAPE, **how)(x, y)
    want = F.cross_entropy(twin.train()(x.double()), y)
    want.backward()
    assert float(loss) == pytest.approx(want.item(), rel=1e-5)
    read = {k: p.grad for k, p in twin.named_parameters() if p.grad is not None}
    assert set(grads) - set(read) == {"unused.weight"}
    for key, gradient in read.items():
        assert relative(grads[key], gradient) < 1e-5, key


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3, nesterov=True),
    lambda p: torch.optim.AdamW(p, 1e-3, betas=(0.8, 0.99), weight_decay=0.1),
    lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True, eps=1e-4),
])  # fmt: skip
def test_three_steps_with_torchs_own_loss_and_optimizer(make):
    module, net = pair(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 9), nn.Tanh(),
                                             nn.Linear(9, 8)))  # fmt: skip
    twin = module.double()
    loss, optimizer = nn.CrossEntropyLoss(label_smoothing=0.1), make(module.parameters())
    step = gn.compile(net, SHAPE, loss=loss, optimizer=optimizer, target="cpu")
    for _ in range(3):
        x, y = batch()
        optimizer.zero_grad()
        want = loss(twin(x.double()), y)
        want.backward()
        optimizer.step()
        assert float(step(x, y)) == pytest.approx(want.item(), rel=1e-5)
    for key, value in net.state_dict().items():
        assert relative(value, twin.state_dict()[key]) < 1e-5, key


def test_a_partial_and_a_margin_loss():
    _, net = pair(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8)))
    step = gn.compile(
        net, SHAPE, loss=nn.MultiMarginLoss(margin=0.5),
        optimizer=functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9), target="cpu",
    )  # fmt: skip
    assert (step.optimizer.lr, step.optimizer.momentum) == (0.5, 0.9)
    assert step.graph("traced").eqns[-1].attrs.margin == 0.5


OVER = nn.Linear(2, 2)
REFUSED = [
    ({"optimizer": torch.optim.RMSprop(OVER.parameters())}, ["torch's optim", "gn.Adam(lr=...)"]),
    ({"optimizer": torch.optim.SGD([{"params": [OVER.weight]}, {"params": [OVER.bias]}])},
     ["torch's optim", "2 groups", "set_multipliers"]),
    ({"optimizer": torch.optim.SGD([OVER.weight])}, ["has 1 parameters", "p.trainable ="]),
    ({"loss": nn.CrossEntropyLoss(torch.ones(2))}, ["Loss cannot be the loss: weight is not"]),
    ({"loss": nn.MSELoss()}, ["torch's nn", "MSELoss", "gn.CrossEntropyLoss"]),
    ({"loss": F.cross_entropy}, ["loss=gn.CrossEntropyLoss()"]),
]  # fmt: skip


@pytest.mark.parametrize("at", range(len(REFUSED)))
def test_losses_and_optimizers_that_we_do_not_have(at):
    how, parts = REFUSED[at]
    given = {"loss": gn.CrossEntropyLoss(), "optimizer": gn.SGD(), **how}
    with pytest.raises(gn.ConfigError) as caught:
        gn.compile(gn.Sequential(gn.Linear(2, 2)), (2, 2), target="cpu", **given)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_what_cannot_come_in_is_listed_at_once():
    class Bad(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding_mode="reflect")
            self.parts = nn.Sequential(nn.GroupNorm(2, 4), nn.PReLU())

        def forward(self, x):
            return torch.fft.fft(self.parts(self.conv(x))).erfinv()

    with pytest.raises(gn.UnsupportedOpError) as caught:
        gn.from_torch(Bad())
    text = str(caught.value)
    assert "Bad has 5 parts" in text and "gn.as_torch" in text
    for line in (
        r"net\.conv: Conv2d\(.*padding_mode 'reflect'",
        r"net\.parts\.0: GroupNorm\(.*\(test_from_torch.py:\d+\): no such layer; instead: ",
        r"net\.parts\.1: PReLU",
        r"fft\.fft_fft\(\) \(test_from_torch.py:\d+\)",
        r"x\.erfinv\(\)",
    ):
        assert re.search(line, text), line


def test_what_cannot_be_recorded_says_where():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(gn.UnsupportedOpError, match=f"(?s){HERE}.*branch on attributes") as caught:
        gn.from_torch(Branch())
    assert "Branch" in str(caught.value)
    with pytest.raises(gn.ConfigError, match="takes 'y' beside the batch"):
        gn.from_torch(Two())
    with pytest.raises(gn.ConfigError, match=r"gn.from_torch\(module.module\)"):
        gn.from_torch(nn.DataParallel(nn.Linear(2, 2)))
    with pytest.raises(gn.ConfigError, match="not the class Two"):
        gn.from_torch(Two)


class Two(nn.Module):
    def forward(self, x, y):
        return x + y


def test_heads_that_exist_in_training_alone():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return (self.a(x), self.b(x)) if self.training else self.a(x)

    net = gn.from_torch(Heads())
    assert list(net.state_dict()) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert gn.compile(net, (2, 4), target="cpu")(torch.zeros(2, 4)).shape == (2, 2)
    with pytest.raises(gn.ConfigError, match="returns 2 values, and a loss takes one"):
        gn.compile(net, (2, 4), loss=gn.CrossEntropyLoss(), optimizer=gn.SGD(), target="cpu")


def test_modes_dropout_and_frozen_parameters():
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 8)).eval()
    module[2].bias.requires_grad_(False)
    net = gn.from_torch(module, torch.zeros(SHAPE))
    assert net.input_shape == SHAPE[1:] and not net.__dict__["2"].bias.trainable
    assert not module.training
    step = gn.compile(net, SHAPE, loss=gn.CrossEntropyLoss(), grads=True, target="cpu")
    assert step.keys == ("2.weight",)
    assert "dropout" in str(step.graph("traced"))
    assert "dropout" not in str(gn.compile(net, SHAPE, target="cpu").graph("traced"))
    copy = net.copy()
    x, _ = batch()
    assert torch.equal(gn.compile(copy, SHAPE, target="cpu")(x),
                       gn.compile(net, SHAPE, target="cpu")(x))  # fmt: skip


def test_an_example_of_a_wrong_shape_says_so_at_once():
    with pytest.raises(gn.ShapeError, match="192"):
        gn.from_torch(nn.Sequential(nn.Flatten(), nn.Linear(192, 8)), torch.zeros(2, 3, 9, 9))


def test_a_torch_module_on_the_command_line(tmp_path, cli):
    (tmp_path / "theirs.py").write_text(
        "from torch import nn\n"
        "class Checked(nn.Module):\n"
        "    def forward(self, x):\n"
        "        assert x.shape[1] == 2, 'channels'\n"
        "        return x.relu()\n"
        "def net():\n"
        "    made = nn.Sequential(nn.Conv2d(1, 2, 3), Checked(), nn.Flatten(), nn.Linear(72, 3))\n"
        "    made.input_shape = (1, 8, 8)\n"
        "    return made\n"
    )
    code, out, err = cli("inspect", f"{tmp_path}/theirs.py:net", "--batch", 2, "--stage", "traced")
    assert code == 0, err
    assert "conv2d" in out and "%3.weight" in out
