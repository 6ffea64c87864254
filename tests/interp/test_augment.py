"""The augmentation's kernel in a whole step: what it is fused with, how its result lies, and that
its code for a GPU spills nothing."""

from dataclasses import replace

import pytest
import torch

import graphnet as gn
from graphnet import api, config
from graphnet.lowering.build.build import build_plan
from tests.cases_augment import COMPONENTS

pytestmark = pytest.mark.usefixtures("own_cache")

PHOTOS = {
    "crop": True, "flip": 0.5, "brightness": 0.1, "contrast": 0.2, "pca": 0.1,
    "components": COMPONENTS, "mean": (0.4, 0.5, 0.6), "std": (0.2,),
}  # fmt: skip
WARP = {"rotate": 15.0, "scale": (0.9, 1.2), "shear": 5.0, "stretch": 1.1, "lens": 0.1,
        "translate": 0.05}  # fmt: skip
HOW = {"loss": gn.CrossEntropyLoss(), "optimizer": gn.SGD(lr=0.01, momentum=0.9)}


def first(low):
    """The equation that augments, and its launch."""
    eqn = next(
        e for e in low.stages.fused.eqns
        if "augment" in {p.op for p in (e.body.eqns if e.body else (e,))}
    )  # fmt: skip
    return eqn, next(s for s in low.plan.launches if s.kernel == "augment")


def strided():
    torch.manual_seed(0)
    return gn.Sequential(
        gn.Conv2d(3, 16, 7, stride=4), gn.ReLU(), gn.MaxPool2d(2), gn.Flatten(), gn.Linear(64, 10)
    )


def test_cast_and_blocks_are_written_by_the_same_kernel(monkeypatch):
    """19 pixels in blocks of 4: what the layout pads with has to be zero in every step."""
    a = gn.Augment(stored=(3, 22, 24), **PHOTOS, **WARP)
    shape = (4, 3, 19, 19)
    low = api.lower(strided(), shape, target="interpret", precision="bf16", augment=a, **HOW)
    assert str(first(low)[0].out.type) == "bf16[4,3,19,19]"  # the first stage of a region reads it
    monkeypatch.setenv("GRAPHNET_DISABLE", "regions")
    low = api.lower(strided(), shape, target="interpret", precision="bf16", augment=a, **HOW)
    eqn, launch = first(low)
    assert str(eqn.out.type) == "bf16[4,3,19,19]{s2d4}" and eqn.op == "fused"
    assert dict(launch.constants)["PH"] == 20 and "space_to_depth" not in {
        s.kernel for s in low.plan.launches
    }
    g = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (4, 3, 22, 24), generator=g).to(torch.uint8)
    with config.override(CHECK="1"):  # each launch against its reference, the last row dead
        step = gn.compile(
            strided(), shape, target="interpret", precision="bf16", augment=a, seed=9, **HOW
        )
        for epoch in (0, 1):
            step(x[:3], torch.tensor([1, 2, 3]), torch.tensor([5, 0, 77]), epoch)


def test_interpreter_and_cpu_draw_the_same():
    a = gn.Augment(stored=(3, 22, 24), **PHOTOS, **WARP)
    g = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (4, 3, 22, 24), generator=g).to(torch.uint8)
    y, index = torch.tensor([1, 2, 3, 0]), torch.tensor([5, 2**40, 77, 0])
    losses = []
    for target in ("cpu", "interpret"):
        step = gn.compile(strided(), (4, 3, 19, 19), target=target, augment=a, seed=9, **HOW)
        losses.append([float(step(x, y, index, epoch)) for epoch in (0, 1, 2)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("net, shape, precision, a", [
    pytest.param("lenet5", (128, 1, 28, 28), "fp32", gn.Augment(**WARP), marks=pytest.mark.slow),
    ("alexnet", (128, 3, 227, 227), "bf16", gn.Augment(stored=(3, 256, 256), **PHOTOS, **WARP)),
    ("alexnet", (128, 3, 227, 227), "bf16",
     gn.Augment(stored=(3, 32, 32), seen=(256, 256), **PHOTOS, **WARP)),
])  # fmt: skip
def test_it_compiles_for_sm_90_without_spills(net, shape, precision, a):
    made = getattr(gn.models, net)()
    low = api.lower(made, shape, target="cuda", precision=precision, augment=a, **HOW)
    (row,) = build_plan(replace(low.plan, steps=(first(low)[1],))).rows
    assert row.spill_bytes == 0 and row.registers <= 128 and row.float_atomics == 0
