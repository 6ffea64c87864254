"""Regions: stages of one launch, each against the reference in float64 over outputs of NaN bits."""

import random

import pytest
import torch

import graphnet as gn
from graphnet import config
from graphnet.api import lower
from graphnet.bench.twin import torch_twin
from graphnet.errors import ShapeError
from graphnet.frontends.tracing import trace
from graphnet.ir.text import parse
from graphnet.lowering.launch.choice import forced
from graphnet.lowering.launch.registry import kernels_for
from graphnet.lowering.tune.proof import checked, computed
from graphnet.passes.regions import regions as formed
from graphnet.passes.rewrite import Log
from graphnet.passes.templates import members_of
from tests.twin import relative

LOSS = gn.CrossEntropyLoss()
GPU = {"BM": 2, "BLOCK": 256}  # a column a thread, two images a program


def lowered(net, shape, **how):
    how = {"target": "interpret", "loss": LOSS, "grads": True, **how}
    return lower(net, shape, **how)


def ops(eqn):
    return [m.plain[0].op for m in members_of(eqn)]


def regions(low):
    """The regions of a lowered net, what their members are."""
    return [ops(e) for e in low.stages.fused.eqns if len(members_of(e)) > 1]


def wrong(low):
    """What is wrong with each region, run alone."""
    found = [checked(low.plan, e, s) for e, s in computed(low) if len(members_of(e)) > 1]
    return [why for why in found if why]


def net(layers, shape):
    """The layers with a head of three classes."""
    features = trace(gn.Sequential(*layers, gn.Flatten()), shape).returns[0].type.shape[1]
    return gn.Sequential(*layers, gn.Flatten(), gn.Linear(features, 3))


def small(act=gn.ReLU, pool=gn.MaxPool2d, classes=3):
    return gn.Sequential(
        gn.Conv2d(1, 3, 3, padding=1), act(), pool(2), gn.Conv2d(3, 5, 3), act(), pool(2),
        gn.Flatten(), gn.Linear(20, classes),
    ), (3, 1, 12, 12)  # fmt: skip


# ---- each stage ------------------------------------------------------------------------------

CASES = {
    "odd sizes": ((3, 2, 11, 9), lambda: [gn.Conv2d(2, 5, 3), gn.ReLU(), gn.MaxPool2d(2)]),
    "one channel, one image": ((1, 1, 6, 6), lambda: [gn.Conv2d(1, 1, 1), gn.MaxPool2d(2)]),
    "stride and padding": (
        (2, 3, 12, 13),
        lambda: [gn.Conv2d(3, 4, (3, 5), stride=(2, 3), padding=(2, 1)), gn.Tanh(),
                 gn.MaxPool2d(2)],
    ),
    "stride and padding of the input gradient": (
        (2, 1, 11, 13),
        lambda: [gn.Conv2d(1, 2, 1), gn.Tanh(), gn.AvgPool2d(1),
                 gn.Conv2d(2, 4, (3, 2), stride=(2, 3), padding=(2, 1)), gn.MaxPool2d(2)],
    ),
    "dilation": (
        (2, 1, 14, 14),
        lambda: [gn.Conv2d(1, 3, 3), gn.ReLU(), gn.MaxPool2d(2),
                 gn.Conv2d(3, 2, 2, dilation=(1, 2)), gn.ReLU(), gn.MaxPool2d(2)],
    ),
    "windows that overlap": (
        (2, 2, 12, 12),
        lambda: [gn.Conv2d(2, 9, 3, padding=1), gn.ReLU(), gn.MaxPool2d(3, 2, padding=1)],
    ),
    "windows that leave the image": (
        (2, 2, 12, 12),
        lambda: [gn.Conv2d(2, 3, 4), gn.ReLU(), gn.MaxPool2d(3, 2, ceil_mode=True)],
    ),
    "means of what is not padding": (
        (2, 1, 9, 9),
        lambda: [gn.Conv2d(1, 3, 3, padding=1),
                 gn.AvgPool2d(3, 2, padding=1, count_include_pad=False)],
    ),
    "dropout": (
        (2, 1, 10, 10),
        lambda: [gn.Conv2d(1, 3, 3), gn.ReLU(), gn.MaxPool2d(2), gn.Dropout(0.5),
                 gn.Conv2d(3, 2, 3), gn.ReLU()],
    ),
    "no pool, no bias": (
        (2, 1, 16, 16),
        lambda: [gn.Conv2d(1, 2, 3, bias=False), gn.ReLU(), gn.MaxPool2d(2), gn.Conv2d(2, 3, 3),
                 gn.Tanh(), gn.Conv2d(3, 4, 3, padding=1), gn.ReLU(), gn.MaxPool2d(2)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_stages(name):
    shape, layers = CASES[name]
    low = lowered(net(layers(), shape), shape)
    assert {"conv2d"} <= {ops[0] for ops in regions(low)} and not wrong(low)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_as_on_a_gpu(precision):
    """Two images a program, of a batch that is no multiple; updates follow in a second pass."""
    with forced("region", **GPU):
        model, shape = small()
        low = lowered(model, shape, precision=precision, grads=False,
                      optimizer=gn.Adam(0.1, weight_decay=0.1))  # fmt: skip
        assert [s.grid[0] for s in low.plan.launches if s.kernel == "region"] == [2, 2]
        assert not wrong(low)


def test_means_and_sigmoids():
    assert not wrong(lowered(*small(gn.Sigmoid, gn.AvgPool2d)))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("model", ["lenet5", "caffe_lenet"])
def test_whole_nets(model, precision):
    with forced("region", BM=1, BLOCK=256):
        model = getattr(gn.models, model)()
        assert not wrong(lowered(model, (3, 1, 28, 28), precision=precision))


def test_of_equal_values_the_first_is_the_maximum():
    """Small integers, so that sums are exact and windows tie: gradients are torch's own."""
    model, shape = small(act=gn.ReLU)
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.copy_(torch.randint(-1, 2, p.shape))
    x, y = torch.randint(-1, 2, shape).float(), torch.tensor([0, 2, 1])
    _, grads = gn.compile(model, shape, target="interpret", loss=LOSS, grads=True)(x, y)
    twin = torch_twin(model).double()
    torch.nn.functional.cross_entropy(twin(x.double()), y).backward()
    for key, p in twin.named_parameters():
        assert relative(grads[key], p.grad) <= 1e-6, key


# ---- random nets -----------------------------------------------------------------------------


def draw(rng):
    """(net, shape) of one or two small convolutions, most of them with a pool."""
    while True:
        shape = rng.randint(1, 3), rng.randint(1, 3), rng.randint(5, 12), rng.randint(5, 12)
        layers, channels = [], shape[1]
        for _ in range(rng.randint(1, 2)):
            out = rng.randint(1, 9)
            kernel = (rng.randint(1, 4), rng.randint(1, 4))
            layers.append(
                gn.Conv2d(channels, out, kernel, stride=rng.choice([1, 1, 1, 2]),
                          padding=rng.choice([0, 1, 2]), bias=rng.random() < 0.8)
            )  # fmt: skip
            channels = out
            layers += rng.choice([[], [gn.ReLU()], [gn.ReLU()], [gn.Tanh()], [gn.Sigmoid()]])
            layers += rng.choice([
                [], [gn.MaxPool2d(2)], [gn.MaxPool2d(2)], [gn.MaxPool2d(3, 2, 1)],
                [gn.MaxPool2d(3, 2, ceil_mode=True)], [gn.AvgPool2d(2)], [gn.AvgPool2d((2, 1))],
            ])  # fmt: skip
        try:
            return net(layers, shape), shape
        except ShapeError:
            continue


def hold(seed, count):
    """Loss and gradients of random nets against torch in float64; how many regions they had."""
    rng, joined = random.Random(seed), 0
    for k in range(count):
        torch.manual_seed(1000 * seed + k)
        model, shape = draw(rng)
        x, y = torch.randn(shape), torch.randint(0, 3, shape[:1])
        g = gn.compile(model, shape, target="interpret", loss=LOSS, grads=True)
        loss, grads = g(x, y)
        twin = torch_twin(model).double()
        want = torch.nn.functional.cross_entropy(twin(x.double()), y)
        want.backward()
        note = f"seed {seed}, net {k}, input {shape}: {model}"
        assert abs(float(loss) - want.item()) <= 1e-5 * max(1.0, want.item()), note
        for key, p in twin.named_parameters():
            assert relative(grads[key], p.grad) <= 1e-5, f"{note}\n{key}"
        joined += sum(s.kernel == "region" for s in g.plan.launches)
    return joined


def test_random_nets():
    assert hold(0, 20) > 10


@pytest.mark.slow
def test_many_random_nets():
    assert hold(1, 200) > 100


# ---- the pass --------------------------------------------------------------------------------

HEAD = """graph g(%x: f32[4,1,8,8] data, %w: f32[6,1,3,3] param, %b: f32[6] param,
    %v: f32[8,6,2,2] param) {
    """
CONV = "%0: f32[4,6,6,6] = fused(%x, %w, %b) { %a = conv2d(%x, %w, %b); %c = relu(%a); yield %c }"
POOL = "%1: f32[4,6,3,3], %2: u8[4,6,3,3] = maxpool2d(%0) {kernel=(2,2), stride=(2,2)}"
NEXT = "%3: f32[4,8,2,2] = conv2d(%1, %v)"


def after(*lines, kernels=True, log=None):
    graph = parse(HEAD + "\n".join(lines) + "}")
    return formed(graph, kernels_for("cuda") if kernels else None, log or Log())


def test_a_chain_becomes_one_equation_and_keeps_what_is_read_elsewhere():
    want = (
        "%1: f32[4,6,3,3], %2: u8[4,6,3,3], %3: f32[4,8,2,2] = fused(%x, %w, %b, %v) {"
        " %a = conv2d(%x, %w, %b); %b_ = relu(%a);"
        " %c, %d = maxpool2d(%b_) {kernel=(2,2), stride=(2,2)}; %e = conv2d(%c, %v);"
        " yield %c, %d, %e }"
    )
    got = after(CONV, POOL, NEXT, "return %3, %2, %1")
    assert str(parse(str(got))) == str(parse(HEAD + want + " return %3, %2, %1 }"))


def test_a_target_without_kernels_keeps_its_graph():
    lines = CONV, POOL, "return %1, %2"
    assert str(after(*lines, kernels=False)) == str(parse(HEAD + "\n".join(lines) + "}"))
    low = lower(*small(), target="cpu", loss=LOSS, grads=True)
    assert not regions(low)


@pytest.mark.parametrize("layers, shape, why", [
    ([gn.Conv2d(2, 4, 3, groups=2), gn.MaxPool2d(2)], (2, 2, 8, 8), "2 groups has no stage"),
    ([gn.Conv2d(1, 65, 3), gn.MaxPool2d(2)], (2, 1, 8, 8), "65 channels are a matrix product"),
    ([gn.Conv2d(1, 2, 3), gn.MaxPool2d(2, dilation=2)], (2, 1, 9, 9), "dilated by 2 x 2"),
    ([gn.Conv2d(1, 2, 3), gn.MaxPool2d(4)], (2, 1, 10, 10), "4 x 4 has more pixels"),
    ([gn.Conv2d(1, 2, 3), gn.Tanh(), gn.AvgPool2d(3, 2)], (2, 1, 9, 9), "are no tiles of it"),
    ([gn.Conv2d(3, 64, 11, padding=5), gn.MaxPool2d(2)], (128, 3, 112, 112), "would take about"),
])  # fmt: skip
def test_a_refusal_is_a_sentence(layers, shape, why):
    low = lower(net(layers, shape), shape, target="cuda", loss=LOSS, grads=True)
    assert why in "; ".join(low.stages.log.refusals.values())


@pytest.mark.parametrize("name", ["regions", "in_stages"])
def test_it_can_be_left_out(name):
    with config.override(DISABLE=f"{name},row_blocks"):
        assert not regions(lowered(*small()))


@pytest.mark.parametrize("model, precision, most", [
    (gn.models.lenet5, "fp32", 6), (gn.models.lenet5, "tf32", 6), (gn.models.lenet5, "bf16", 4),
    (lambda: gn.models.lenet5(activation="tanh", pool="avg"), "fp32", 6),
    (gn.models.caffe_lenet, "fp32", 7),
])  # fmt: skip
def test_launches_of_a_step(model, precision, most):
    low = lower(model(), (128, 1, 28, 28), target="cuda", precision=precision, loss=LOSS,
                optimizer=gn.SGD(0.1, momentum=0.9))  # fmt: skip
    assert len(low.plan.launches) <= most and len(regions(low)) == 3


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_large_nets_have_no_regions(precision):
    low = lower(gn.models.alexnet(), (128, 3, 227, 227), target="cuda", precision=precision,
                loss=LOSS, optimizer=gn.SGD(0.1, momentum=0.9))  # fmt: skip
    assert not regions(low)


class Branches(gn.Module):
    """Two chains side by side: each is a region of its own, forward and backward."""

    def __init__(self):
        super().__init__()
        for name, k in (("a", 3), ("b", 2)):
            setattr(self, name, gn.Sequential(gn.Conv2d(1, k, 3), gn.ReLU(), gn.MaxPool2d(2)))
        self.fc = gn.Linear(5 * 9, 3)

    def forward(self, x):
        return self.fc(torch.cat([self.a(x), self.b(x)], 1).flatten(1))


def test_regions_of_one_step_share_no_workspace():
    """Values inside are called alike in both, and their sums once met in one buffer."""
    torch.manual_seed(0)
    net, shape = Branches(), (3, 1, 8, 8)
    low = lowered(net, shape)
    backward = [o for o in regions(low) if "conv2d_wgrad" in o]
    held = [name for s in low.plan.parts for name, _ in s.scratch if ".parts" in name]
    assert len(backward) == 2 and len(set(held)) == len(held) == 2
    x, y = torch.rand(shape), torch.tensor([0, 1, 2])
    (_, got), (_, want) = (
        gn.compile(net, shape, target=t, loss=LOSS, grads=True)(x, y) for t in ("interpret", "cpu")
    )
    for key, g in want.items():
        torch.testing.assert_close(got[key], g, rtol=1e-4, atol=1e-6)
