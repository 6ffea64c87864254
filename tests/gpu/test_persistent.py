"""The persistent LeNet-5 step on the GPU: the bits of the captured graph, and its time."""

import time

import pytest
import torch

import graphnet as gn

SHAPE = (128, 1, 28, 28)
STEPS = 20
RERUNS = 100


def bound(persistent, precision="fp32"):
    torch.manual_seed(0)
    net = gn.models.lenet5()
    step = gn.compile(
        net, SHAPE, target="cuda", precision=precision, loss=gn.CrossEntropyLoss(), seed=3,
        optimizer=gn.SGD(lr=0.05, momentum=0.9, weight_decay=5e-4), persistent=persistent,
    )  # fmt: skip
    g = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (3000, 1, 28, 28), dtype=torch.uint8, generator=g)
    y = torch.randint(0, 10, (3000,), generator=g)
    return net, step.bind(x, y, seed=5)


def trained(persistent, precision="fp32"):
    net, step = bound(persistent, precision)
    losses = step.run(STEPS).cpu()
    return losses, {k: v.cpu() for k, v in net.state_dict().items()}


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_hundred_reruns_have_the_bits_of_the_graph(precision):
    losses, state = trained(False, precision)
    for rerun in range(RERUNS if precision == "fp32" else 10):
        again, other = trained(True, precision)
        assert torch.equal(again, losses), rerun
        assert all(torch.equal(other[k], state[k]) for k in state), rerun


def test_its_time_beside_the_graph(capsys):
    steps = {one: bound(one)[1] for one in (False, True)}
    us = {False: [], True: []}
    for _ in range(7):
        for one, step in steps.items():
            step.run(10)
            torch.cuda.synchronize()
            began = time.perf_counter()
            step.run(1000)
            torch.cuda.synchronize()
            us[one].append(1e3 * (time.perf_counter() - began))
    graph, kernel = (sorted(us[one])[3] for one in (False, True))
    with capsys.disabled():
        print(f"\nlenet5 b128 fp32: graph {graph:.1f} us a step, persistent {kernel:.1f} us")
