"""Boxes of images for weight gradients, and masked copies for all passes: right, and without a
spill."""

import pytest
import torch

import graphnet as gn
from graphnet import config
from graphnet.api import lower
from graphnet.ir.types import bf16, f32
from graphnet.lowering.build.build import compile_launches
from graphnet.lowering.launch.choice import forced
from graphnet.lowering.launch.config import SHARED_BYTES
from tests.configs import hold as hold_configurations
from tests.convs import ROWS, hold
from tests.kinds import convs_of


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with config.override(CACHE_DIR=str(tmp_path_factory.mktemp("cache"))):
        yield


@pytest.mark.parametrize("dtype, variant", [(f32, "boxes"), (bf16, "boxes"), (bf16, "taps")])
@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.note.replace(" ", "-"))
def test_every_variant_is_the_oracle(row, dtype, variant):
    for op in row.ops(variant):
        assert hold(op, row, dtype, variant) == variant


def step(model, variant, precision="bf16"):
    net = gn.models.get(model)
    with forced(*convs_of(variant), variant=variant):
        low = lower(
            net, (128, *net.input_shape), target="cuda", precision=precision,
            loss=gn.CrossEntropyLoss(), optimizer=gn.SGD(momentum=0.9, weight_decay=5e-4),
        )  # fmt: skip
    return [s for s in low.plan.launches if s.kernel.startswith("conv")]


def test_boxes_of_images_multiply_less_than_masked_taps():
    pairs = zip(step("alexnet", "taps"), step("alexnet", "boxes"), strict=True)
    held = [(a, b) for a, b in pairs if b.kernel.endswith("tma")]
    assert len(held) == 4
    for a, b in held:
        assert b.padded < 0.92 * a.padded, b


def hold_binaries(launches, precision="bf16"):
    for s, (_, binary) in zip(launches, compile_launches(launches)[0], strict=True):
        assert binary["spill_bytes"] == 0 < binary["tma"], s
        assert (binary["wgmma"] > 0) == (precision != "fp32"), s
        assert precision != "bf16" or binary["cp_async"] == 0, s
        assert binary["shared_bytes"] <= SHARED_BYTES, s


def boxed(model, precision="bf16"):
    return [s for s in step(model, "boxes", precision) if s.kernel.endswith("tma")]


def test_two_layers_of_alexnet_on_sm_90():
    """Two accumulators and one."""
    launches = [s for s in boxed("alexnet") if {"conv2", "conv4"} & set(s.where.layers)]
    assert len(launches) == 2
    hold_binaries(launches)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["alexnet", "alexnet_2012", "caffenet", "alexnet_owt"])
@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
def test_every_convolution_of_every_variant_on_sm_90(model, precision):
    launches = boxed(model, precision)
    assert len(launches) == 4
    hold_binaries(launches, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_rules_configurations_in_front_of_every_epilogue(precision):
    """Bias and relu, the mask of the gradient, the update; what the GPU runs at full size."""
    torch.manual_seed(0)
    net = gn.Sequential(
        gn.Conv2d(3, 16, 3), gn.ReLU(), gn.Conv2d(16, 16, (2, 1), padding=1), gn.ReLU(),
        gn.Conv2d(16, 16, 2), gn.Flatten(), gn.Linear(16 * 2 * 3, 3),
    )  # fmt: skip
    hold_configurations(net, (2, 3, 4, 4), precision, "interpret", 4)
