"""Random nets: every target's gradients against torch in float64. `make soak` runs many more."""

import random

import pytest
import torch

import graphnet as gn
from graphnet.api import lower
from graphnet.bench.twin import torch_twin
from graphnet.errors import ShapeError
from graphnet.lowering.plan.plan import make_plan
from tests.twin import relative

COUNT = {"cpu": 25, "interpret": 4}
MANY = {"cpu": 800, "interpret": 100}


def draw(rng: random.Random):
    """(net, input shape): convolutions, activations and pools, then one or two linear layers."""
    while True:
        n, c, h, w = (
            rng.choice([1, 2, 3, 5]),
            rng.choice([1, 2, 3, 8]),
            *rng.choices(range(4, 14), k=2),
        )
        layers, channels = [], c
        for _ in range(rng.randint(1, 3)):
            groups = rng.choice([g for g in (1, 1, 2, 4) if channels % g == 0])
            out = groups * rng.choice([1, 2, 3, 4, 8])
            kernel = (rng.randint(1, 4), rng.randint(1, 4))
            layers.append(
                gn.Conv2d(channels, out, kernel, stride=rng.choice([1, 1, 2, 3]),
                          padding=rng.choice([0, 1, 2]), dilation=rng.choice([1, 1, 2]),
                          groups=groups, bias=rng.random() < 0.8)
            )  # fmt: skip
            channels = out
            layers += rng.choice([[], [gn.ReLU()], [gn.Tanh()], [gn.Sigmoid()]])
            layers += rng.choice([
                [], [gn.MaxPool2d(2)], [gn.MaxPool2d(3, 2)], [gn.MaxPool2d(3, 2, 1)],
                [gn.MaxPool2d(3, 2, ceil_mode=True)], [gn.AvgPool2d(2)],
                [gn.AvgPool2d(3, 2, 1, count_include_pad=False)],
            ])  # fmt: skip
        layers += rng.choice([[], [gn.AdaptiveAvgPool2d(2)]])
        probe = gn.Sequential(*layers, gn.Flatten())
        try:
            features = probe.summary((n, c, h, w)).rows[-1].output[1]
        except ShapeError:
            continue
        layers += [gn.Flatten(), gn.Linear(features, 6)]
        if rng.random() < 0.5:
            layers += [gn.ReLU(), gn.Linear(6, 4)]
        return gn.Sequential(*layers), (n, c, h, w)


@pytest.mark.parametrize("target", ["cpu", "interpret"])
@pytest.mark.parametrize("part", range(3))
def test_random_nets(target, part):
    hold(target, part, COUNT[target])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu", "interpret"])
def test_many_random_nets(target):
    hold(target, 99, MANY[target])


def hold(target, seed, count):
    rng = random.Random(seed)
    for k in range(count):
        torch.manual_seed(1000 * seed + k)
        net, shape = draw(rng)
        twin = torch_twin(net).double()
        x, y = torch.randn(shape), torch.randint(0, 4, shape[:1])
        loss, grads = gn.compile(net, shape, target=target, loss=gn.CrossEntropyLoss(), grads=True)(
            x, y
        )
        want = torch.nn.functional.cross_entropy(twin(x.double()), y)
        want.backward()
        note = f"seed {seed}, net {k}, input {shape}: {net}"
        assert abs(float(loss) - want.item()) <= 1e-5 * max(1.0, want.item()), note
        for key, p in twin.named_parameters():
            if float(p.grad.norm()) > 1e-7:
                assert relative(grads[key], p.grad) <= 2e-5, f"{key}, {note}"
        if target == "cpu":  # every plan for the other targets holds together, too
            step = lower(
                net, shape, target="cuda", precision="bf16", loss=gn.CrossEntropyLoss(),
                optimizer=gn.SGD(momentum=0.9),
            )  # fmt: skip
            assert make_plan(step.stages.fused, "cuda").launches
