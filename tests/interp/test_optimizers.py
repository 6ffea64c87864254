"""Every update in a generated epilogue, beside torch.optim; all of them for sm_90."""

import pytest
import torch

import graphnet as gn
from tests.optimizers import TABLE, many_steps

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("steps", [4, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TABLE)
def test_many_steps_with_a_drop_of_the_rate(name, steps):
    race = many_steps(name, "interpret", steps)
    assert any("wgrad" in s.kernel for s in race.step.plan.launches)
    assert not any("_update" in s.kernel for s in race.step.plan.launches)


def layer(outputs):
    return lambda: gn.Sequential(gn.Flatten(), gn.Linear(784, outputs))


@pytest.mark.parametrize("model, amsgrad, options", [
    (gn.models.lenet5, False, {"precision": "bf16"}),
    (layer(10), False,
     {"precision": "bf16", "clip_norm": 1.0, "accumulate": 4, "nonfinite": "skip"}),
    # A whole tile of 64 x 64, and beside it what Adam reads: one tensor more, and two.
    pytest.param(layer(84), True, {"precision": "bf16"}, marks=pytest.mark.slow),
    (layer(84), True, {"accumulate": 2}),
], ids=["fused", "handled", "amsgrad", "amsgrad_summed"])  # fmt: skip
def test_adam_compiles_without_spills(model, amsgrad, options):
    report = gn.build(
        model(), (128, 1, 28, 28), loss=gn.CrossEntropyLoss(),
        optimizer=gn.AdamW(weight_decay=0.1, amsgrad=amsgrad), **options,
    )  # fmt: skip
    assert [r.name for r in report.rows if r.spill_bytes] == []
    assert [r.name for r in report.rows if r.float_atomics] == []


@pytest.mark.parametrize("optimizer", [gn.Adam(0.01, amsgrad=True), gn.AdamW(0.01)])
def test_in_bf16_the_update_is_torchs_on_our_gradients(optimizer):
    """Beside an exact twin a parameter may be far off: Adam's first step is lr sign(g), and where a
    gradient is below the rounding of bf16, the rounding decides the sign. What must hold is the
    update of the gradients that the program has."""
    torch.manual_seed(0)
    net = gn.Sequential(gn.Conv2d(1, 4, 3), gn.Tanh(), gn.Flatten(), gn.Linear(64, 3))
    how = {"target": "interpret", "precision": "bf16", "loss": gn.CrossEntropyLoss()}
    step = gn.compile(net, (4, 1, 6, 6), optimizer=optimizer, **how)
    grads = gn.compile(net, (4, 1, 6, 6), grads=True, **how)
    twin = {k: v.double().requires_grad_() for k, v in net.state_dict().items()}
    amsgrad = optimizer.amsgrad
    kind = torch.optim.Adam if amsgrad else torch.optim.AdamW
    decay = optimizer.weight_decay
    other = kind(twin.values(), lr=0.01, amsgrad=amsgrad, weight_decay=decay)
    for _ in range(2):
        x, y = torch.randn(4, 1, 6, 6), torch.randint(0, 3, (4,))
        for key, g in grads(x, y)[1].items():
            twin[key].grad = g.double()
        step(x, y)
        other.step()
    for key, value in net.state_dict().items():
        assert float((value.double() - twin[key].detach()).abs().max()) <= 1e-4 * 0.01, key
