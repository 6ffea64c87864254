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


@pytest.mark.parametrize("model, options", [
    (gn.models.lenet5, {}),
    (lambda: gn.Sequential(gn.Flatten(), gn.Linear(784, 10)),
     {"clip_norm": 1.0, "accumulate": 4, "nonfinite": "skip"}),
], ids=["fused", "handled"])  # fmt: skip
def test_adam_compiles_without_spills(model, options):
    report = gn.build(
        model(), (128, 1, 28, 28), precision="bf16", loss=gn.CrossEntropyLoss(),
        optimizer=gn.AdamW(weight_decay=0.1), **options,
    )  # fmt: skip
    assert [r.name for r in report.rows if r.spill_bytes] == []
    assert [r.name for r in report.rows if r.float_atomics] == []
