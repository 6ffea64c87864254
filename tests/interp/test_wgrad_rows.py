"""The weight gradient by filter rows against the oracle, at every border."""

import pytest
import torch

import graphnet as gn
from graphnet.lowering.launch.choice import forced
from tests.twin import relative
from tests.wgrads import CASES, hold

pytestmark = pytest.mark.usefixtures("own_cache", "single_kernels")


@pytest.mark.parametrize("row, c", CASES)
def test_it_is_the_oracle(row, c):
    steps = hold(row, c)
    assert len(steps) == (1 if row.wants == "bias" else 2)


def stepped(target, precision, steps=2):
    """Losses and parameters of a small net after a few steps, and the kernels that ran."""
    torch.manual_seed(0)
    net = gn.Sequential(
        gn.Conv2d(3, 16, 8, 4), gn.Tanh(), gn.Conv2d(16, 32, 3, padding=1, groups=2), gn.Tanh(),
        gn.Conv2d(32, 8, 3, padding=1), gn.Tanh(), gn.AvgPool2d(3), gn.Flatten(), gn.Linear(8, 5),
    )  # fmt: skip
    before = {k: v.clone() for k, v in net.state_dict().items()}
    step = gn.compile(
        net, (5, 3, 16, 16), target=target, precision=precision, loss=gn.CrossEntropyLoss(),
        optimizer=gn.SGD(lr=0.1, momentum=0.9, weight_decay=1e-3),
    )  # fmt: skip
    for _ in range(steps):
        step(torch.randn(5, 3, 16, 16), torch.randint(0, 5, (5,)))
    change = {k: v - before[k] for k, v in net.state_dict().items()}
    return change, [s.kernel for s in step.plan.launches if "wgrad" in s.kernel]


FORCED = [
    ("fp32", {"BM": 16, "BN": 16, "BK": 16, "BT": 0, "SWAP": 1, "PROGRAMS": 7}, 2),
    ("bf16", {"BM": 16, "BN": 32, "BK": 16, "BT": 16, "SWAP": 0, "PROGRAMS": 7}, 3),
]


@pytest.mark.parametrize("precision, config, layers", FORCED)
def test_a_step_that_is_made_to_take_it(precision, config, layers):
    """The image's gradient is flat in fp32, where the image does not lie in blocks."""
    with forced("conv2d_wgrad", variant="rows", **config):
        ours, kernels = stepped("interpret", precision)
    assert kernels.count("conv2d_wgrad_rows") == layers
    theirs, _ = stepped("cpu", precision)
    exact, _ = stepped("cpu", "fp32")
    for key, want in exact.items():
        own = relative(theirs[key], want.double())
        assert relative(ours[key], want.double()) <= 2 * own + 2e-6, key
