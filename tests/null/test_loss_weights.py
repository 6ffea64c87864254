"""Nets whose forward returns several logits in training: the loss is their weighted sum."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphnet as gn
from graphnet.bench.twin import torch_twin

SHAPE = (4, 3, 8, 8)


def heads(lib):
    """A net with an auxiliary head, in ours or in torch's words."""

    class Net(lib.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = lib.Conv2d(3, 4, 3), lib.Conv2d(4, 6, 3)
            self.aux = lib.Linear(4, 5)
            self.fc = lib.Linear(6, 5)

        def forward(self, x):
            x = torch.relu(self.conv1(x))
            logits = self.fc(torch.relu(self.conv2(x)).mean((2, 3)))
            return (logits, self.aux(x.mean((2, 3)))) if self.training else logits

    return Net()


@pytest.mark.parametrize(("target", "given", "rows"), [
    ("cpu", "ours", 4), ("cpu", "torch", 3), ("interpret", "ours", 3)
])  # fmt: skip
def test_three_steps_are_torchs(target, given, rows):
    torch.manual_seed(0)
    twin = heads(nn)
    net = gn.from_torch(twin) if given == "torch" else heads(gn)
    net.load_state_dict(twin.state_dict())
    net.loss_weights = (1.0, 0.3)
    twin = twin.double()
    sgd = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    loss = gn.CrossEntropyLoss(label_smoothing=0.1)
    step = gn.compile(net, SHAPE, target=target, loss=loss, optimizer=gn.SGD(lr=0.1, momentum=0.9))
    for _ in range(3):
        x, y = torch.randn(rows, *SHAPE[1:]), torch.randint(5, (rows,))
        sgd.zero_grad()
        terms = [F.cross_entropy(z, y, label_smoothing=0.1) for z in twin(x.double())]
        want = terms[0] + 0.3 * terms[1]
        want.backward()
        sgd.step()
        assert float(step(x, y)) == pytest.approx(want.item(), rel=1e-5)
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value.double(), twin.state_dict()[key], rtol=1e-4, atol=1e-6)
    value, logits = gn.compile(net, SHAPE, target=target, loss=loss)(x, y)  # without the other head
    exact = twin.eval()(x.double())
    assert torch.allclose(logits.double(), exact, atol=1e-5)
    assert float(value) == pytest.approx(F.cross_entropy(exact, y, label_smoothing=0.1).item())


def test_what_it_refuses():
    net, how = heads(gn), {"loss": gn.CrossEntropyLoss(), "grads": True, "target": "cpu"}
    with pytest.raises(gn.ConfigError, match="returns 2 values, and a loss takes one") as caught:
        gn.compile(net, SHAPE, **how)
    assert "net.loss_weights = (1.0, 0.3)" in str(caught.value)
    net.loss_weights = (1.0, 0.3, 0.3)
    with pytest.raises(gn.ConfigError, match="returns 2 values, and loss_weights is"):
        gn.compile(net, SHAPE, **how)
    with pytest.raises(gn.MissingError, match="the mode is that of the program"):
        net.training  # noqa: B018


def test_the_heads_of_googlenet():
    """Counts and keys are torchvision's; the gradients of a head are those of its twin."""
    net = gn.models.googlenet(aux_logits=True)
    assert sum(p.numel() for p in net.parameters()) == 13_004_888
    keys = list(net.state_dict())
    at = keys.index("inception5b.branch4.1.bn.num_batches_tracked")
    norm = [f"bn.{k}" for k in ("weight", "bias", "running_mean", "running_var")]
    inner = ["conv.conv.weight", *(f"conv.{k}" for k in norm), "conv.bn.num_batches_tracked"]
    inner += [f"{fc}.{k}" for fc in ("fc1", "fc2") for k in ("weight", "bias")]
    assert keys[at + 1 :] == [*(f"aux1.{k}" for k in inner), *(f"aux2.{k}" for k in inner),
                              "fc.weight", "fc.bias"]  # fmt: skip
    assert net.loss_weights == (1.0, 0.3, 0.3)
    plain = gn.models.googlenet(num_classes=3).state_dict()
    assert [k for k in keys if not k.startswith("aux")] == list(plain)
    with_heads = gn.trace(net, (1, 3, 64, 64), training=True)
    assert [v.type.shape for v in with_heads.returns] == [(1, 1000)] * 3
    assert len(gn.trace(net, (1, 3, 64, 64)).returns) == 1


@pytest.mark.slow
def test_googlenet_with_heads_trains_as_torch():
    """Gradients are as near to float64 as those of the twin in fp32."""
    torch.manual_seed(0)
    net = gn.models.googlenet(num_classes=7, dropout=0.0, aux_logits=True, dropout_aux=0.0)
    shape, y = (4, 3, 64, 64), torch.tensor([1, 5, 0, 3])
    x, twin = torch.randn(shape), torch_twin(net)
    exact = copy.deepcopy(twin).double()
    loss, got = gn.compile(net, shape, target="cpu", loss=gn.CrossEntropyLoss(), grads=True)(x, y)
    losses = []
    for m in (twin, exact):
        a, b, c = m.train()(x.to(next(m.parameters()).dtype))
        terms = [F.cross_entropy(z, y) for z in (a, b, c)]
        losses.append(terms[0] + 0.3 * (terms[1] + terms[2]))
        losses[-1].backward()
    assert float(loss) == pytest.approx(float(losses[1].detach()), rel=1e-5)
    off = lambda g, p: float((g.double() - p.grad).norm() / p.grad.norm().clamp(min=1e-12))
    theirs = dict(twin.named_parameters())
    pairs = [(off(got[k], p), off(theirs[k].grad, p)) for k, p in exact.named_parameters()]
    a, b = torch.tensor(pairs).median(0).values  # a value that crosses 0 moves single gradients
    assert a <= 2 * b < 1e-4
