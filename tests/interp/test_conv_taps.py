"""Convolutions tap by tap through masked copies, and every candidate of a small net."""

import pytest
import torch

import graphnet as gn
from graphnet.ir.types import bf16, f32
from tests.configs import hold as hold_configurations
from tests.convs import ROWS, hold

pytestmark = pytest.mark.usefixtures("own_cache", "single_kernels")


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.note.replace(" ", "-"))
def test_every_pass_is_the_oracle(row, dtype):
    for op in row.ops("taps"):
        assert hold(op, row, dtype, "taps") == "taps"


@pytest.mark.parametrize("row", ROWS[1:4:2], ids=lambda r: r.note.replace(" ", "-"))
def test_filters_in_torchs_layout(row):
    for op in row.ops("taps")[:2]:
        assert hold(op, row, f32, "taps", filters="") == "taps"


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_the_rules_configurations_in_front_of_every_epilogue(precision):
    """Bias and relu, the mask of the gradient, the update; what the GPU runs at full size."""
    torch.manual_seed(0)
    net = gn.Sequential(
        gn.Conv2d(3, 16, 3), gn.ReLU(), gn.Conv2d(16, 16, (2, 1), padding=1), gn.ReLU(),
        gn.Conv2d(16, 16, 2), gn.Flatten(), gn.Linear(16 * 2 * 3, 3),
    )  # fmt: skip
    hold_configurations(net, (2, 3, 4, 4), precision, "interpret", 2)
