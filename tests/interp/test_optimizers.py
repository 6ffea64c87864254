"""Every update in a generated epilogue, beside torch.optim; all of them for sm_90."""

import pytest

import graphnet as gn
from graphnet import config
from tests.optimizers import TABLE, many_steps


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with config.override(CACHE_DIR=str(tmp_path_factory.mktemp("cache"))):
        yield


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
