"""Pool and normalization in one kernel of pixels by channels: against the unfused graph and the
float64 oracle."""

import pytest
import torch

import graphnet as gn
from graphnet.api import lower
from graphnet.lowering.launch.choice import forced
from graphnet.lowering.targets import interpret
from graphnet.ops.evaluate import evaluate_step, to_double
from tests.kinds import NORMS

pytestmark = pytest.mark.usefixtures("single_kernels")

POOL_OPS = ("maxpool2d", "maxpool2d_grad")
FUSED = {
    "pool,norm": ("maxpool2d_lrn", "lrn_grad_maxpool2d_grad"),
    "norm,pool": ("lrn_maxpool2d", "maxpool2d_grad_lrn_grad"),
}


@pytest.fixture(autouse=True)
def these_kernels():
    """They are those for layouts and windows that kernels of 8 channels a thread do not take."""
    with forced(*NORMS, variant="pixels"), forced(*POOL_OPS, variant="elements"):
        yield


def net_of(order, size, pool, channels=8, groups=1, norm_groups=1, **norm):
    lrn = gn.LocalResponseNorm(size, groups=norm_groups, **norm)
    layers = {"pool": gn.MaxPool2d(**pool), "norm": lrn}
    return gn.Sequential(
        gn.Conv2d(4, channels, 3, padding=1, groups=groups), gn.ReLU(),
        *(layers[k] for k in order.split(",")),
        gn.Conv2d(channels, 3, 1), gn.AdaptiveAvgPool2d(1), gn.Flatten(),
    )  # fmt: skip


def errors(net, shape, x, disabled="", **kw):
    """(worst relative error of loss and gradients against the oracle, kernels)."""
    with gn.config.override(DISABLE=f"{disabled},regions,groups"):
        low = lower(net, shape, target="interpret", loss=gn.CrossEntropyLoss(), grads=True)
    plan = low.plan
    storage = {i.value.name: torch.zeros(i.value.type.shape, dtype=i.value.type.dtype.torch)
               for i in plan.graph.inputs}  # fmt: skip
    for k, p in net.named_parameters():
        storage[k] = p.data.clone()
    storage["x"].copy_(x)
    storage["labels"].copy_(torch.arange(shape[0]) % 3)
    storage["live"].fill_(shape[0])
    wanted, _ = evaluate_step(low.stages.traced and low.stages.joint, to_double(storage))
    for v in plan.graph.returns:
        storage[v.name] = torch.full(v.type.shape, float("nan"))
    interpret.prepare(plan, storage, poison=True)()
    worst = 0.0
    for v, want in zip(plan.graph.returns, wanted, strict=True):
        got = storage[v.name].double()
        worst = max(worst, float((got - want).norm() / want.norm().clamp_min(1e-12)))
    return worst, [s.kernel for s in plan.launches]


POOLS = [
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 2, "stride": 3},  # pixels that no window holds
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0)},
]
CAP = 1e-6


@pytest.mark.parametrize("order", FUSED)
@pytest.mark.parametrize(
    "pool, size",
    [*((pool, 5) for pool in POOLS), (POOLS[2], 4)],
    ids=lambda p: "-".join(f"{v}" for v in p.values()) if isinstance(p, dict) else str(p),
)
def test_fused_is_unfused_and_the_oracle(order, pool, size):
    torch.manual_seed(0)
    net = net_of(order, size, pool, alpha=0.5, k=1.5)
    x = torch.randn(2, 4, 9, 8)
    got, kernels = errors(net, (2, 4, 9, 8), x)
    assert set(FUSED[order]) <= set(kernels), kernels
    apart, names = errors(net, (2, 4, 9, 8), x, "fuse_epilogues")
    assert {"lrn", "lrn_grad", "maxpool2d", "maxpool2d_grad"} <= set(names)
    assert got <= CAP and apart <= CAP, (got, apart)


@pytest.mark.parametrize("order", FUSED)
@pytest.mark.parametrize("rows, pixels, programs", [(1, 8, 1), (2, 4, 3), (5, 16, 2), (8, 64, 7)])
def test_every_tile_gives_the_same(order, rows, pixels, programs):
    torch.manual_seed(1)
    norm = {"alpha": 0.2, "k": 2.0, "alpha_mode": "sum"}
    channels, groups = (12, 2) if rows == 2 else (11, 1)
    net = net_of(order, 5, POOLS[0], channels=channels, norm_groups=groups, **norm)
    x = torch.randn(3, 4, 9, 7)
    with forced(*NORMS, BM=pixels, BK=rows, SPLIT=programs):
        got, _ = errors(net, (3, 4, 9, 7), x)
    assert got <= CAP


@pytest.mark.parametrize("order", FUSED)
def test_ties_go_to_the_first_and_groups_are_kept_apart(order):
    torch.manual_seed(2)
    net = net_of(order, 5, POOLS[0], groups=2, alpha=0.3)
    x = torch.randint(-1, 2, (2, 4, 8, 8)).float()  # many equal maxima
    with torch.no_grad():
        w = next(p for k, p in net.named_parameters() if k == "0.weight").data
        w.copy_(torch.randint(-1, 2, w.shape))
    got, _ = errors(net, (2, 4, 8, 8), x)
    assert got <= CAP


@pytest.mark.parametrize("beta", [0.5, 0.75, 1.0])
def test_other_powers(beta):
    torch.manual_seed(3)
    net = net_of("pool,norm", 3, POOLS[3], alpha=0.4, beta=beta, k=1.0)
    assert errors(net, (2, 4, 6, 6), torch.randn(2, 4, 6, 6))[0] <= CAP


def test_inference_keeps_no_pooled_image():
    torch.manual_seed(4)
    net = net_of("pool,norm", 5, POOLS[0], alpha=0.3)
    x = torch.randn(2, 4, 9, 9)
    infer = gn.compile(net, (2, 4, 9, 9), target="interpret")
    assert "maxpool2d_lrn" in [s.kernel for s in infer.plan.launches]
    torch.testing.assert_close(infer(x), gn.compile(net, (2, 4, 9, 9), target="cpu")(x),
                               rtol=1e-5, atol=1e-6)  # fmt: skip


def test_a_normalised_image_that_is_read_elsewhere_is_not_fused_away():
    class Both(gn.Module):
        def __init__(self):
            self.norm, self.pool = gn.LocalResponseNorm(5), gn.MaxPool2d(2)
            self.fc = gn.Linear(4 * 36 + 4 * 9, 3)

        def forward(self, x):
            y = self.norm(x)
            return self.fc(gn.cat([gn.flatten(y, 1), gn.flatten(self.pool(y), 1)], 1))

    low = lower(Both(), (2, 4, 6, 6), target="cuda")
    assert {"lrn", "maxpool2d"} <= {s.kernel for s in low.plan.launches}
    why = [
        w for (rule, _), w in low.stages.log.refusals.items() if rule.startswith("maxpool2d(lrn")
    ]
    assert why and "read" in why[0]


def test_the_convolutions_image_is_dead_behind_relu_and_pool():
    low = lower(gn.models.alexnet(), (2, 3, 227, 227), target="cuda", precision="fp32",
                loss=gn.CrossEntropyLoss(), optimizer=gn.SGD(momentum=0.9))  # fmt: skip
    first = next(s for s in low.plan.launches if s.kernel.startswith("conv2d_forward"))
    image = first.writes[0]
    readers = [s.kernel for s in low.plan.launches if image in s.reads]
    assert readers == ["maxpool2d_lrn"]
