"""The kernels' targets and the cpu target share one State: each goes on where the other stopped."""

import pytest
import torch

import graphnet as gn
from graphnet import config
from graphnet.ir.text import parse
from graphnet.lowering.plan.plan import make_plan
from graphnet.lowering.targets import interpret
from tests.storage import (
    SHAPE,
    assert_same,
    assert_stored,
    batches,
    everything,
    small_net,
    step_of,
)

pytestmark = pytest.mark.usefixtures("own_cache")

WAYS = {
    "sgd": ({}, gn.SGD(0.05, momentum=0.9, weight_decay=1e-3)),
    "adam": ({"nonfinite": "skip"}, gn.Adam(0.01)),
    "clip": ({"clip_norm": 0.3}, gn.SGD(0.05, momentum=0.9)),
    "accumulate": ({"accumulate": 2}, gn.AdamW(0.01)),
}


@pytest.mark.parametrize(
    "way, targets",
    [*((way, ("interpret", "cpu")) for way in WAYS), ("adam", ("cpu", "interpret"))],
)
def test_one_target_goes_on_where_another_stopped(way, targets):
    """Nothing changes at the handover, and what follows is what a fresh net makes of the saved
    state. A group of two calls is cut in its middle."""
    how, optimizer = WAYS[way]
    net = small_net()
    *data, (x, y) = batches(4 if "accumulate" in how else 3)
    first = step_of(net, targets[0], optimizer, **how)
    for batch in data:
        first(*batch)
    before = everything(net, first)
    second = step_of(net, targets[1], optimizer, **how)
    assert second.state is first.state
    assert_same(before, everything(net, second))
    slots = [k for k in before if k.endswith((".momentum_buffer", ".exp_avg"))]
    assert slots and all(float(before[k].norm()) > 0 for k in slots)

    fresh = small_net()
    alone = step_of(fresh, targets[1], optimizer, **how)
    fresh.load_state_dict({k: before[k] for k in fresh.state_dict()})
    alone.optimizer.load_state_dict({k: v for k, v in before.items() if k not in net.state_dict()})
    assert torch.equal(second(x, y), alone(x, y))
    after = everything(net, second)
    assert_same(after, everything(fresh, alone))
    assert not torch.equal(after["0.weight"], before["0.weight"])
    assert_same(after, everything(net, first))  # the first one's State, too
    assert_stored(net, second)


def test_both_targets_learn_the_same():
    """Turn by turn on one State, beside cpu alone."""
    net = small_net()
    other = net.copy()
    turns = [step_of(net, t) for t in ("interpret", "cpu")]
    alone = step_of(other, "cpu")
    for k, (x, y) in enumerate(batches(2)):
        torch.testing.assert_close(turns[k % 2](x, y), alone(x, y), rtol=1e-4, atol=1e-5)
    mine, theirs = everything(net, turns[0]), everything(other, alone)
    for key in theirs:
        torch.testing.assert_close(mine[key], theirs[key], rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_inference_sees_steps_of_the_other_target(precision):
    net = small_net()
    (x, y), *_ = batches(1)
    kernels = gn.compile(net, SHAPE, target="interpret", precision=precision)
    plain = gn.compile(net, SHAPE, target="cpu")
    step = step_of(net, "cpu")
    close = {"fp32": 1e-5, "bf16": 0.05}[precision]
    torch.testing.assert_close(kernels(x), plain(x), rtol=close, atol=close)
    before = kernels(x)
    step(x, y)
    assert not torch.equal(before, kernels(x))
    torch.testing.assert_close(kernels(x), plain(x), rtol=close, atol=close)


def test_without_the_layout_pass_state_is_stored_alike():
    net = small_net()
    other = net.copy()
    with config.override(DISABLE="layout"):
        plain = step_of(net, "interpret", clip_norm=0.3)
    chosen = step_of(other, "interpret", clip_norm=0.3)
    for x, y in batches(1):
        plain(x, y), chosen(x, y)
    assert_stored(net, plain)
    for key, t in other.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], t, rtol=1e-4, atol=1e-5, msg=key)


GRAPH = """graph g(%x: f32[2,3,2,2] data, %a: f32[2,3,2,2]{nhwc} param, %b: f32[2,3,2,2] slot) {
  %y: f32[2,3,2,2] = add(%a, %x)
  commit %a = %y, %b = %a
  return %y }"""


@pytest.mark.parametrize("given", ["as typed", "row-major"])
def test_a_value_that_lies_otherwise_is_laid_out_for_the_state(given):
    """%y is returned row-major and replaces channels-last state; %b gets what %a was."""
    graph = parse(GRAPH)
    x, a = torch.randn(2, 2, 3, 2, 2)
    held = graph.input("a").value.type.layout.zeros((2, 3, 2, 2), torch.float32).copy_(a)
    storage = {
        "x": x, "a": held if given == "as typed" else a.clone(), "b": torch.zeros(2, 3, 2, 2),
        "y": torch.full((2, 3, 2, 2), float("nan")),
    }  # fmt: skip
    interpret.prepare(make_plan(graph, "interpret"), storage, poison=True)()
    assert torch.equal(storage["y"], a + x) and torch.equal(storage["a"], a + x)
    assert torch.equal(storage["b"], a)
