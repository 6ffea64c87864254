"""In inference on the cpu target convolutions take up the normalization behind them."""

import copy

import torch
from torch import nn

import graphnet as gn
from graphnet.lowering.targets import cpu

SHAPE = (3, 2, 6, 6)


class Net(nn.Module):
    """Behind a convolution with a bias, without one, by fixed statistics, and behind nothing."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(2)
        self.one, self.bn1 = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.two = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(4, affine=False)
        self.three, self.bn3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = torch.relu(self.bn1(self.one(self.first(x))))
        x = torch.relu(self.bn2(self.two(x)) + x)
        y = self.three(x)
        return self.fc((self.bn3(y) + y).mean((2, 3)))  # read twice: it stays


def test_convolutions_follow_what_they_were_folded_from(monkeypatch):
    torch.manual_seed(0)
    twin = Net()
    net = gn.from_torch(twin)
    for m in net.modules():  # else every step moves the statistics, which shows
        m.frozen = True
    x, y = torch.randn(SHAPE), torch.tensor([0, 4, 1])
    infer = gn.compile(net, SHAPE, target="cpu")

    @torch.no_grad()
    def agree(program=infer):
        twin.load_state_dict(net.state_dict())
        want = copy.deepcopy(twin).double().eval()(x.double())
        assert float((program(x) - want).norm() / want.norm()) < 1e-6

    agree()
    # Updates of SGD, in one call of torch's, leave no trace in a tensor's version.
    sgd = gn.SGD(lr=0.3)
    step = gn.compile(net, SHAPE, target="cpu", loss=gn.CrossEntropyLoss(), optimizer=sgd)
    for _ in range(2):
        before = infer(x)
        step(x, y)
        assert not torch.allclose(infer(x), before)
        agree()
    net.one.weight.data.mul_(2.0)
    agree()
    net.load_state_dict({k: torch.rand(v.shape) + 0.5 if v.is_floating_point() else v
                         for k, v in net.state_dict().items()})  # fmt: skip
    agree()
    module = gn.as_torch(net, SHAPE, target="cpu")
    optimizer = torch.optim.AdamW(module.parameters(), 0.1, fused=True)
    nn.functional.cross_entropy(module(x), y).backward()
    optimizer.step()
    agree(module.eval())
    agree()
    with torch.inference_mode():
        agree()
        agree(gn.compile(net.copy(), SHAPE, target="cpu"))  # its tensors count no changes
    monkeypatch.setenv("GRAPHNET_CHECK", "1")
    agree(gn.compile(net, SHAPE, target="cpu"))


def test_which_normalizations_are_passes_of_their_own():
    net = gn.from_torch(Net())
    programs = [gn.compile(net, SHAPE, target="cpu")]
    programs += [gn.compile(net, SHAPE, target="cpu", precision="bf16")]
    for p in net.modules():
        if isinstance(p, gn.BatchNorm2d):
            p.frozen = True
    programs += [gn.compile(net, SHAPE, target="cpu", loss=gn.CrossEntropyLoss(),
                            optimizer=gn.SGD(lr=0.1))]  # fmt: skip
    counts = []
    for program in programs:
        tasks = []
        cpu.prepare(program.plan, program._storage, around=lambda t, c, to=tasks: to.append(t) or c)
        counts.append(sum(t.eqns[0].op == "normalize" for t in tasks if t.eqns))
    assert counts[0] == 2  # the first, and the one whose operand is read twice
    assert counts[1] == 4 and counts[2] >= 4
