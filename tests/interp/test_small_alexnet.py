"""A cut-down AlexNet with production tiles: every variant and layout, in fp32 and in bf16."""

import pytest
import torch

import graphnet as gn
from graphnet import config
from graphnet.api import lower
from graphnet.bench.twin import torch_twin
from graphnet.ir.text import parse
from graphnet.lowering.launch.choice import forced
from tests.kinds import CONVS, WGRADS
from tests.twin import relative

pytestmark = pytest.mark.usefixtures("single_kernels")

SHAPE = (3, 3, 47, 47)
NORMS = {"maxpool2d_lrn_chunks", "lrn_grad_chunks", "maxpool2d_grad_chunks"}
KERNELS = {"conv2d_taps", "conv2d_wgrad_taps"} | NORMS


def small(groups=1, stride=4, kernel=11):
    return gn.Sequential(
        gn.Conv2d(3, 24, kernel, stride), gn.ReLU(), gn.MaxPool2d(3, 2),
        gn.LocalResponseNorm(5, k=2.0),
        gn.Conv2d(24, 48, 5, padding=2, groups=groups), gn.ReLU(), gn.Conv2d(48, 16, 3, padding=1),
        gn.ReLU(), gn.Flatten(), gn.Linear(16 * 16, 32), gn.ReLU(), gn.Dropout(0.5),
        gn.Linear(32, 10),
    )  # fmt: skip


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=g), torch.randint(0, 10, SHAPE[:1], generator=g)


def gradients(net, target, precision):
    x, y = batch()
    program = gn.compile(
        net, SHAPE, target=target, precision=precision, loss=gn.CrossEntropyLoss(), grads=True
    )
    return program(x, y), {s.kernel for s in program.plan.launches}


@pytest.mark.parametrize("groups, split", [(1, 1), (3, 4)])
def test_fp32_against_torch(groups, split):
    torch.manual_seed(0)
    net = small(groups)
    for m in net.modules():
        if isinstance(m, gn.Dropout):
            m.p = 0.0
    taken = forced(*WGRADS, SPLIT=split), forced(*CONVS, variant="taps")
    with config.override(DISABLE="regions"), taken[0], taken[1]:
        (loss, grads), kernels = gradients(net, "interpret", "fp32")
    assert kernels >= KERNELS and "space_to_depth" not in kernels
    twin, (x, y) = torch_twin(net).double(), batch()
    want = torch.nn.functional.cross_entropy(twin(x.double()), y)
    want.backward()
    assert float(loss) == pytest.approx(want.item(), rel=1e-6)
    for key, p in twin.named_parameters():
        assert relative(grads[key], p.grad) <= 2e-6, key


@pytest.mark.parametrize("stride, kernel, groups", [(4, 11, 1), (4, 5, 3)])
def test_bf16_through_blocks_of_pixels(stride, kernel, groups):
    """bf16 rounds differently in every kernel: the cpu target's own error is the measure."""
    torch.manual_seed(1)
    net = gn.Sequential(
        gn.Conv2d(3, 24, kernel, stride), gn.Tanh(), gn.LocalResponseNorm(5, k=2.0),
        gn.Conv2d(24, 48, 5, padding=2, groups=groups), gn.Tanh(), gn.AvgPool2d(3), gn.Flatten(),
        gn.Linear(48 * 9, 10),
    )  # fmt: skip
    with forced(*CONVS, variant="taps"):
        (loss, grads), kernels = gradients(net, "interpret", "bf16")
    assert kernels >= {"space_to_depth", "conv2d_taps", "conv2d_wgrad_taps"}
    (other, theirs), _ = gradients(net, "cpu", "bf16")
    (exact, wanted), _ = gradients(net, "cpu", "fp32")
    assert abs(float(loss) - float(exact)) <= 2 * abs(float(other) - float(exact)) + 2e-3
    for key in grads:
        ours, its = (
            relative(grads[key], wanted[key].double()),
            relative(theirs[key], wanted[key].double()),
        )
        assert ours <= 2 * its + 2e-3, (key, ours, its)


def test_weight_copies_follow_their_parameters_in_every_layout():
    """After steps the copies in use are those that a fresh program makes of the parameters."""
    torch.manual_seed(2)
    net = small()
    common = {"target": "interpret", "precision": "bf16"}
    step = gn.compile(
        net, SHAPE, loss=gn.CrossEntropyLoss(), optimizer=gn.SGD(lr=0.05, momentum=0.9), **common
    )
    layouts = {str(i.value.type.layout) for i in step.plan.graph.inputs if i.role == "derived"}
    assert layouts == {"s2d4", "nhwc", ""}
    for k in range(2):
        step(*batch(k))
    x, _ = batch(9)
    logits = gn.compile(net, SHAPE, **common)(x)
    fresh = small()
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(logits, gn.compile(fresh, SHAPE, **common)(x))


def test_gpu_and_cpu_share_one_state_though_their_copies_lie_differently():
    torch.manual_seed(3)
    net = small()
    sgd = {"loss": gn.CrossEntropyLoss(), "optimizer": gn.SGD(lr=0.05)}
    step = gn.compile(net, SHAPE, target="interpret", precision="bf16", **sgd)
    infer = gn.compile(net, SHAPE, target="cpu", precision="bf16")
    x, y = batch()
    before = infer(x)
    step(x, y)
    after = infer(x)
    fresh = small()
    fresh.load_state_dict(net.state_dict())
    want = gn.compile(fresh, SHAPE, target="cpu", precision="bf16")(x)
    assert torch.equal(after, want) and not torch.equal(before, after)


def test_the_layout_pass_prints_its_choices_and_they_parse():
    low = lower(small(), SHAPE, target="cuda", precision="bf16", loss=gn.CrossEntropyLoss(),
                optimizer=gn.SGD(momentum=0.9))  # fmt: skip
    text = str(low.stages.fused)
    assert "{s2d4}" in text and "{nhwc}" in text
    assert parse(text) == low.stages.fused


def test_updates_of_wide_layers_run_beside_the_convolutions():
    net = gn.models.alexnet()
    low = lower(net, (128, 3, 227, 227), target="cuda", precision="bf16",
                loss=gn.CrossEntropyLoss(), optimizer=gn.SGD(momentum=0.9))  # fmt: skip
    plan = low.plan
    beside = [s for s, n in zip(plan.steps, plan.streams, strict=True) if n == 1]
    assert [s.where.layers[0] for s in beside] == ["fc7", "fc8", "fc6"]
    assert {s.kernel for s in beside} == {"linear_wgrad"}
    at = plan.steps.index(beside[-1])
    behind = [s for s, n in zip(plan.steps[at:], plan.streams[at:], strict=True) if n == 0]
    assert sum("conv" in s.kernel for s in behind) >= 8


def test_a_strided_first_layer_in_front_of_a_flatten_stays_row_major():
    """Its gradient leaves a flatten, so no kernel could read it by blocks."""
    torch.manual_seed(0)
    net = gn.Sequential(gn.Conv2d(3, 16, 7, stride=4), gn.ReLU(), gn.Flatten(), gn.Linear(256, 5))
    step = gn.compile(
        net, (2, 3, 19, 19), target="interpret", precision="bf16", loss=gn.CrossEntropyLoss(),
        optimizer=gn.SGD(lr=0.1),
    )  # fmt: skip
    assert "s2d4" not in str(step.graph("fused"))
    x, y = torch.randn(2, 3, 19, 19), torch.tensor([1, 4])
    assert float(step(x, y)) > float(step(x, y))
