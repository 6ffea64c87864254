"""Programs on the cpu target, beside their torch twins."""

import subprocess
import sys
import zlib

import pytest
import torch

import graphnet as gn
from graphnet.api import lower
from tests.null.test_dsl import twin

SHAPE = (16, 1, 28, 28)
LOSS = gn.CrossEntropyLoss()
STEP = {"loss": LOSS, "optimizer": gn.SGD(lr=0.1)}
cross_entropy = torch.nn.functional.cross_entropy


def pair(seed=0):
    torch.manual_seed(seed)
    net, other = gn.models.lenet5(), twin()
    other.load_state_dict(net.state_dict())
    return net, other


def compile(net, **options):
    return gn.compile(net, SHAPE, target="cpu", **options)


def batch(n=16):
    return torch.randn(n, 1, 28, 28), torch.randint(0, 10, (n,))


@pytest.mark.parametrize("options", [
    {}, {"momentum": 0.9, "weight_decay": 5e-4}, {"momentum": 0.9, "nesterov": True},
])  # fmt: skip
def test_fifty_steps_follow_torch(options):
    net, other = pair()
    step = compile(net, loss=LOSS, optimizer=gn.SGD(lr=0.01, **options))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.01, **options)
    for at in range(50):
        if at == 25:
            step.optimizer.lr = optimizer.param_groups[0]["lr"] = 0.005
        x, y = batch()
        want = cross_entropy(other(x), y)
        optimizer.zero_grad()
        want.backward()
        optimizer.step()
        assert float(step(x, y)) == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.parametrize("rows", [16, 5, 1])
def test_infer_evaluate_and_gradients(rows):
    net, other = pair()
    x, y = batch(rows)
    full = batch()
    infer, ev = compile(net), compile(net, loss=LOSS)
    g = compile(net, loss=LOSS, grads=True)
    for program in (ev, g):
        program(*full)  # leaves rows behind that a smaller batch must not see
    infer(full[0])
    logits = other(x)
    want = cross_entropy(logits, y)
    want.backward()
    torch.testing.assert_close(infer(x), logits.detach(), rtol=1e-4, atol=1e-5)
    loss, seen = ev(x, y)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen, logits.detach(), rtol=1e-4, atol=1e-5)
    loss, grads = g(x, y)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=1e-6)
    assert list(grads) == [k for k, _ in other.named_parameters()]
    for key, p in other.named_parameters():
        torch.testing.assert_close(grads[key], p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # it is the point
@pytest.mark.parametrize("target", ["cpu", "interpret"])
def test_a_smaller_batch_sees_nothing_of_the_one_before(target):
    """A NaN that stayed in a dead row would be multiplied by its zero gradient: NaN."""
    torch.manual_seed(0)
    net = gn.Sequential(gn.Conv2d(1, 2, 3), gn.Tanh(), gn.Flatten(), gn.Linear(8, 3))
    g = gn.compile(net, (4, 1, 4, 4), target=target, loss=LOSS, grads=True)
    x, y = torch.randn(3, 1, 4, 4), torch.tensor([2, 0, 1])
    want = g(x, y)
    spoilt, _ = g(torch.full((4, 1, 4, 4), float("nan")), torch.tensor([1, 1, 2, 2]))
    assert spoilt.isnan()
    loss, grads = g(x, y)
    assert torch.equal(loss, want[0]) and loss.isfinite()
    for key, value in want[1].items():
        assert torch.equal(grads[key], value) and value.isfinite().all(), key


def test_results_are_fresh_and_losses_distinct():
    net, _ = pair()
    infer = compile(net)
    step = compile(net, loss=LOSS, optimizer=gn.SGD(lr=0.1))
    x, y = batch()
    first = infer(x)
    kept = first.clone()
    losses = [step(x, y) for _ in range(3)]
    infer(x)
    assert torch.equal(first, kept)
    values = [float(v) for v in losses]
    assert values == sorted(values, reverse=True) and len(set(values)) == 3
    assert losses[0].shape == ()


def test_inputs_are_checked():
    net, _ = pair()
    infer, ev = compile(net), compile(net, loss=LOSS)
    x, y = batch()
    for bad, error in (
        (x[:0], gn.ShapeError), (torch.zeros(17, 1, 28, 28), gn.ShapeError),
        (x[0], gn.ShapeError), (x.double(), gn.DTypeError), (x.numpy(), gn.DataError),
        (torch.zeros(2, 1, 27, 28), gn.ShapeError),
    ):  # fmt: skip
        with pytest.raises(error):
            infer(bad)
    with pytest.raises(gn.ShapeError):
        ev(x, y[:3])
    with pytest.raises(gn.DTypeError):
        ev(x, y.float())
    y[3] = 10
    with pytest.raises(gn.DataError, match="row 3 has the label 10, outside 0..9"):
        ev(x, y)
    y[3] = -1
    with pytest.raises(gn.DataError, match="row 3 has the label -1"):
        ev(x, y)


def test_optimizer_view():
    net, _ = pair()
    step = compile(net, loss=LOSS, optimizer=gn.SGD(lr=0.1, momentum=0.9))
    step.optimizer.weight_decay = 0.1
    step.optimizer.momentum = 0.5
    step.optimizer.nesterov = False  # unchanged: fine
    assert (step.optimizer.lr, step.optimizer.momentum) == (0.1, 0.5)
    for name, value in (
        ("nesterov", True), ("form", "classic"), ("momentum", 0), ("lr", -1),
        ("lr", float("nan")), ("lr", "fast"), ("rate", 0.1),
    ):  # fmt: skip
        with pytest.raises(gn.ConfigError):
            setattr(step.optimizer, name, value)
    plain = compile(net, loss=LOSS, optimizer=gn.SGD(lr=0.1))
    with pytest.raises(gn.ConfigError, match="compile again"):
        plain.optimizer.momentum = 0.9


def test_compile_arguments():
    net, _ = pair()
    with pytest.raises(gn.ConfigError, match="auto, fp32, tf32, bf16"):
        compile(net, precision="fp8")
    with pytest.raises(gn.ConfigError, match="auto, cuda"):
        gn.compile(net, SHAPE, target="tpu")
    with pytest.raises(gn.ConfigError, match="needs a loss"):
        compile(net, optimizer=gn.SGD(lr=0.1))
    with pytest.raises(gn.ConfigError, match="exclude"):
        compile(net, loss=LOSS, optimizer=gn.SGD(lr=0.1), grads=True)
    if not torch.cuda.is_available():
        with pytest.raises(gn.BackendUnavailableError, match="gn.build"):
            gn.compile(net, SHAPE, target="cuda")


def test_graph_stages():
    net, _ = pair()
    step = compile(net, loss=LOSS, optimizer=gn.SGD(lr=0.1))
    assert step.graph("traced").name == "lenet5.traced"
    assert "fused" in {e.op for e in step.graph("fused").eqns}
    assert step.plan.graph is not None
    with pytest.raises(gn.ConfigError, match="traced, joint, fused"):
        step.graph("final")


def dropout_net():
    torch.manual_seed(0)
    return gn.Sequential(gn.Dropout(0.5), gn.Flatten(), gn.Linear(12, 3))


def test_dropout_masks_are_the_public_ones():
    net = dropout_net()
    step = gn.compile(net, (4, 3, 2, 2), target="cpu", loss=LOSS, optimizer=gn.SGD(lr=0.1), seed=7)
    x, y = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    for at in range(2):
        mask = torch.from_numpy(gn.random.dropout_mask(7, at, x.shape, 0.5, "drop1"))
        w = net.state_dict()
        kept = torch.where(mask, x * 2, 0.0).flatten(1)
        want = cross_entropy(torch.nn.functional.linear(kept, w["2.weight"], w["2.bias"]), y)
        assert float(step(x, y)) == pytest.approx(float(want), rel=1e-5)


def test_a_shared_dropout_draws_anew_at_each_call():
    torch.manual_seed(0)
    drop = gn.Dropout(0.5)
    net = gn.Sequential(drop, drop, gn.Flatten(), gn.Linear(12, 3))
    streams = [e.attrs.stream for e in lower(net, (4, 3, 2, 2), **STEP).stages.traced.eqns
               if e.op == "dropout"]  # fmt: skip
    assert streams == [zlib.crc32(b"drop1"), zlib.crc32(b"drop1#2")]
    step = gn.compile(net, (4, 3, 2, 2), seed=7, target="cpu", **STEP)
    x, y = torch.rand(4, 3, 2, 2) + 1, torch.tensor([0, 1, 2, 0])
    first, second = (torch.from_numpy(gn.random.dropout_mask(7, 0, x.shape, 0.5, name))
                     for name in ("drop1", "drop1#2"))  # fmt: skip
    assert not torch.equal(first, second)
    w = net.state_dict()
    kept = torch.where(first & second, x * 4, 0.0).flatten(1)
    want = cross_entropy(torch.nn.functional.linear(kept, w["3.weight"], w["3.bias"]), y)
    assert float(step(x, y)) == pytest.approx(float(want), rel=1e-5)


def test_bind_and_run_visit_every_row_once_an_epoch():
    images = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1).expand(10, 3, 2, 2)
    labels = torch.arange(10) % 3

    def losses(seed):
        step = gn.compile(
            dropout_net(), (4, 3, 2, 2), target="cpu", loss=LOSS, optimizer=gn.SGD(lr=0.1)
        )
        step.bind(images.contiguous(), labels, seed=seed)
        return step, step.run(7)

    step, a = losses(1)
    assert a.shape == (7,) and torch.equal(a, losses(1)[1]) and not torch.equal(a, losses(2)[1])
    rows = []
    step.bind(images.contiguous(), labels)
    for _ in range(3):
        x, y = step._bound.next()
        rows += [round(float(v) * 255) for v in x[:, 0, 0, 0]]
    assert sorted(rows) == list(range(10)) and len(y) == 2
    with pytest.raises(gn.DataError):
        step.bind(images.contiguous(), labels + 1)


def test_gradient_check():
    report = gn.check_gradients(gn.models.lenet5(), (2, 1, 28, 28))
    assert report.ok and len(report.rows) == 10
    assert gn.check_gradients(dropout_net(), (4, 3, 2, 2)).ok


def test_a_convolution_that_ends_torch_itself_runs(tmp_path):
    """Channels-last, torch 2.13 ends in a segmentation fault for this one."""
    net = gn.Sequential(
        gn.Conv2d(4, 12, 1), gn.Conv2d(12, 1, (2, 1), stride=2, padding=1, dilation=2),
        gn.Flatten(), gn.Linear(2, 3),
    )  # fmt: skip
    g = gn.compile(net, (5, 4, 2, 1), target="cpu", loss=gn.CrossEntropyLoss(), grads=True)
    for _ in range(20):
        loss, grads = g(torch.randn(5, 4, 2, 1), torch.tensor([0, 1, 2, 0, 1]))
        assert bool(torch.isfinite(loss)) and len(grads) == 6


FAULTS = """
import resource, torch, graphnet as gn
net = gn.models.get("lenet5")
step = gn.compile(net, (128, *net.input_shape), target="cpu", loss=gn.CrossEntropyLoss(),
                  optimizer=gn.SGD(lr=0.01, momentum=0.9))
x, y = torch.randn(128, *net.input_shape), torch.randint(0, 10, (128,))
for _ in range(10):
    step(x, y)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step(x, y)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)
"""


def test_a_warm_step_gets_no_memory_from_the_kernel():
    # In a process of its own: what other tests have freed sets the thresholds of malloc, too.
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100  # pages of 4 kB a step; 2,000 where malloc returns its memory
