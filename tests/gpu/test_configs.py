"""Every variant and every likely configuration on the GPU, full size, against the oracle."""

import pytest

import graphnet as gn
from graphnet.ir.types import bf16, f32
from tests.configs import hold
from tests.convs import ROWS
from tests.convs import hold as hold_row

pytestmark = pytest.mark.usefixtures("own_cache")

KEEP = 24  # configurations of a problem, as many as a tuner tries


@pytest.mark.parametrize(
    "dtype, variant", [(d, v) for v in ("taps", "rows", "pairs") for d in (f32, bf16)]
)
@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.note.replace(" ", "-"))
def test_every_variant_is_the_oracle(row, dtype, variant):
    for op in row.ops(variant):
        assert hold_row(op, row, dtype, variant, target="cuda") == variant


@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
@pytest.mark.parametrize("model", ["alexnet", "lenet5"])
def test_every_variant_and_every_likely_configuration(model, precision):
    net = gn.models.get(model)
    hold(net, (128, *net.input_shape), precision, "cuda", KEEP)


@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
@pytest.mark.parametrize("model", ["caffenet", "alexnet_2012", "alexnet_owt"])
def test_the_rules_own_configurations_of_the_other_variants(model, precision):
    net = gn.models.get(model)
    hold(net, (128, *net.input_shape), precision, "cuda", 4)
