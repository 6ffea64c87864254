"""Regions: stages of one launch, each against the reference in float64 over outputs of NaN bits."""

import pytest

import graphnet as gn
from graphnet.api import lower
from graphnet.frontends.tracing import trace
from graphnet.lowering.launch.choice import forced
from graphnet.lowering.tune.proof import checked, computed
from graphnet.passes.templates import members_of

LOSS = gn.CrossEntropyLoss()
GPU = {"BM": 1, "BLOCK": 256}  # as on a GPU: an image a program, a column a thread


def lowered(net, shape, **how):
    return lower(net, shape, target="interpret", **{"loss": LOSS, "grads": True, **how})


def regions(low):
    """(anchors, what is wrong) of each region of a lowered net, run alone."""
    return [
        ("+".join(m.plain[0].op for m in members_of(e)), checked(low.plan, e, steps))
        for e, steps in computed(low)
        if len(members_of(e)) > 1
    ]


def net(layers, shape):
    """The layers with a head of three classes."""
    features = trace(gn.Sequential(*layers, gn.Flatten()), shape).returns[0].type.shape[1]
    return gn.Sequential(*layers, gn.Flatten(), gn.Linear(features, 3))


FORWARD = {
    "odd sizes": ((3, 2, 11, 9), lambda: [gn.Conv2d(2, 5, 3), gn.ReLU(), gn.MaxPool2d(2)]),
    "one channel, one image": ((1, 1, 6, 6), lambda: [gn.Conv2d(1, 1, 1), gn.MaxPool2d(2)]),
    "stride and padding": (
        (2, 3, 12, 13),
        lambda: [gn.Conv2d(3, 4, (3, 5), stride=(2, 3), padding=(2, 1)), gn.Tanh(),
                 gn.MaxPool2d(2)],
    ),
    "dilation": (
        (2, 2, 10, 10),
        lambda: [gn.Conv2d(2, 3, 3, dilation=(1, 2)), gn.ReLU(), gn.MaxPool2d(2)],
    ),
    "windows that overlap": (
        (2, 2, 12, 12),
        lambda: [gn.Conv2d(2, 9, 3, padding=1), gn.ReLU(), gn.MaxPool2d(3, 2, padding=1)],
    ),
    "windows that leave the image": (
        (2, 2, 12, 12),
        lambda: [gn.Conv2d(2, 3, 4), gn.ReLU(), gn.MaxPool2d(3, 2, ceil_mode=True)],
    ),
    "means": (
        (2, 1, 12, 12),
        lambda: [gn.Conv2d(1, 3, 3, padding=1), gn.Tanh(), gn.AvgPool2d(2),
                 gn.Conv2d(3, 4, 3), gn.Sigmoid(), gn.AvgPool2d(2)],
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
    "three stages": (
        (2, 1, 16, 16),
        lambda: [gn.Conv2d(1, 2, 3), gn.ReLU(), gn.MaxPool2d(2), gn.Conv2d(2, 3, 3), gn.Tanh(),
                 gn.Conv2d(3, 4, 3, padding=1), gn.ReLU(), gn.MaxPool2d(2)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORWARD)
def test_forward_stages(name):
    shape, layers = FORWARD[name]
    found = regions(lowered(net(layers(), shape), shape))
    assert found and found[0][0].startswith("conv2d") and not [why for _, why in found if why]


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_program_an_image(precision):
    """As on a GPU, with a batch that is no multiple of the images of a program."""
    with forced("region", **{**GPU, "BM": 2}):
        low = lowered(gn.models.lenet5(), (3, 1, 28, 28), precision=precision)
    first = low.plan.launches[0 if precision != "tf32" else 1]
    assert first.kernel == "region" and first.grid == (2, 1, 1)
    with forced("region", **{**GPU, "BM": 2}):
        assert not [why for _, why in regions(low) if why]
