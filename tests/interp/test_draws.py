"""The kernel that draws a batch: in a run, interpreted; and compiled for sm_90."""

import pytest
import torch

import graphnet as gn
from graphnet.lowering.build.build import build_plan
from graphnet.lowering.plan.plan import make_plan
from graphnet.runtime.bound import Bound, draw_graph
from tests.draws import LOSS, compiled, data, order_of

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_kernel_draws_the_same_batches(precision):
    images, labels = data(7)
    losses = {}
    for target in ("interpret", "cpu"):
        step = compiled(target=target, precision=precision)
        losses[target] = step.bind(images, labels).run(3, lr=[0.1, 0.05, 0.01])
        if target == "interpret":
            drawn = step._storage["x"].clone(), step._storage["labels"].clone(), step._inputs.live
            assert float(step._storage["lr"]) == pytest.approx(0.01)
    most = 1e-5 if precision == "fp32" else 1e-2
    torch.testing.assert_close(losses["interpret"], losses["cpu"], rtol=most, atol=1e-6)
    rows = order_of(6, 7)(1)[:4]
    assert torch.equal(drawn[0], (images[rows].float() / 255).to(drawn[0].dtype)) and drawn[2] == 4
    assert torch.equal(drawn[1], labels[rows])


@pytest.mark.parametrize("shape, augment", [
    ((1, 28, 28), None), ((3, 32, 32), gn.Augment(flip=0.5)),
])  # fmt: skip
def test_it_compiles_without_spills(shape, augment):
    net = gn.Sequential(gn.Flatten(), gn.Linear(shape[0] * shape[1] * shape[2], 10))
    step = gn.compile(
        net, (128, *shape), target="cpu", loss=LOSS, optimizer=gn.SGD(0.1), augment=augment
    )
    levels = None if augment else torch.zeros(shape[0], 256)
    images = torch.empty(60000, *shape, dtype=torch.uint8)
    bound = Bound(images, torch.zeros(60000).long(), 128, torch.arange, levels)
    (row,) = build_plan(make_plan(draw_graph(step, bound, 2), "cuda")).rows
    assert row.kernel == "take" and row.spill_bytes == 0 and row.registers <= 40
