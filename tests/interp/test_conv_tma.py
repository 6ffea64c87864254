"""Boxes of images, fetched by tensor descriptors: right beside the masked copies, chosen for a
reason, and without a spill."""

import pytest
import torch

import graphnet as gn
from graphnet import config
from graphnet.api import lower
from graphnet.errors import ConfigError
from graphnet.ir.types import NHWC, Layout, TensorType, bf16, f32
from graphnet.lowering.build.build import compile_launches
from graphnet.lowering.launch.config import SHARED_BYTES, TAPS, forced
from graphnet.lowering.launch.cost import padded_flops
from graphnet.lowering.launch.loaders import choose_loader
from tests.configs import hold as hold_configurations
from tests.convs import ROWS, hold

OPS = ("conv2d_dgrad", "conv2d", "conv2d_wgrad")  # the first for stride 1 alone


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with config.override(CACHE_DIR=str(tmp_path_factory.mktemp("cache"))):
        yield


@pytest.mark.parametrize("dtype, loader", [(f32, "tma"), (bf16, "tma"), (bf16, "taps")])
@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.note.replace(" ", "-"))
def test_every_loader_is_the_oracle(row, dtype, loader):
    for op in OPS[row.stride > 1 :]:
        kernel = hold(op, row, dtype, loader)
        assert kernel.endswith(loader), kernel


@pytest.mark.parametrize("row", ROWS[1:4:2], ids=lambda r: r.note.replace(" ", "-"))
def test_filters_in_torchs_layout_come_by_pointer(row):
    for op in OPS[:2]:
        assert hold(op, row, f32, "tma", filters="") == "conv2d_tma"


def image(n, c, layout=NHWC):
    return TensorType(bf16, (n, c, 13, 13), layout)


ROWMAJOR, BLOCKS = Layout(), Layout("row", None, 4)


@pytest.mark.parametrize(
    "op, images, groups, stride, wanted, loader, why",
    [
        ("conv2d", [image(128, 256)], 1, (1, 1), "", "taps", "not measured"),
        ("conv2d", [image(128, 256)], 1, (1, 1), "tma", "tma", "asked for"),
        ("conv2d", [image(2, 256)], 1, (1, 1), "", "taps", "62 of 64 rows would be empty"),
        ("conv2d", [image(2, 256)], 1, (1, 1), "tma", "tma", "asked for"),
        ("conv2d", [image(128, 48)], 6, (1, 1), "tma", "taps", "of a group (8) are no multiple"),
        ("conv2d", [image(128, 48)], 8, (1, 1), "tma", "flat", "of a group (6) are no multiple"),
        ("conv2d", [image(128, 256, ROWMAJOR)], 1, (1, 1), "tma", "flat", "row-major"),
        ("conv2d", [image(128, 3, BLOCKS)], 1, (4, 4), "tma", "taps", "blocks of 4 x 4 pixels"),
        ("conv2d_dgrad", [image(128, 64)], 1, (2, 2), "tma", "flat", "2 x 2th tap"),
        ("conv2d_wgrad", [image(128, 24), image(128, 8)], 1, (2, 2), "tma", "tma", "asked for"),
    ],
)
def test_the_choice_and_its_reason(op, images, groups, stride, wanted, loader, why):
    choice = choose_loader(op, tuple(images), groups, stride, wanted)
    assert choice.loader == loader and why in choice.why


def test_an_unknown_loader_is_refused():
    with pytest.raises(ConfigError, match="no loader 'im2col'"):
        choose_loader("conv2d", (image(1, 8),), 1, wanted="im2col")


def step(model, loader, precision="bf16"):
    net = gn.models.get(model)
    with forced(*TAPS, loader=loader):
        low = lower(
            net, (128, *net.input_shape), target="cuda", precision=precision,
            loss=gn.CrossEntropyLoss(), optimizer=gn.SGD(momentum=0.9, weight_decay=5e-4),
        )  # fmt: skip
    return [s for s in low.plan.launches if s.kernel.startswith("conv")]


def test_boxes_of_images_multiply_less_than_masked_taps():
    for a, b in zip(step("alexnet", "taps"), step("alexnet", "tma"), strict=True):
        if "conv1" not in a.where.layers:
            assert b.kernel.endswith("tma") and padded_flops(b) < 0.92 * padded_flops(a), b


def hold_binaries(launches, precision="bf16"):
    for s, (_, binary) in zip(launches, compile_launches(launches)[0], strict=True):
        assert binary["spill_bytes"] == 0 < binary["tma"], s
        assert (binary["wgmma"] > 0) == (precision != "fp32"), s
        assert precision != "bf16" or binary["cp_async"] == 0, s
        assert binary["shared_bytes"] <= SHARED_BYTES, s


def boxed(model, precision="bf16"):
    return [s for s in step(model, "tma", precision) if s.kernel.endswith("tma")]


def test_two_layers_of_alexnet_on_sm_90():
    """Two accumulators and one, three passes each, with the mask's epilogue."""
    launches = [s for s in boxed("alexnet") if {"conv2", "conv4"} & set(s.where.layers)]
    assert len(launches) == 6
    hold_binaries(launches)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["alexnet", "alexnet_2012", "caffenet", "alexnet_owt"])
@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
def test_every_convolution_of_every_variant_on_sm_90(model, precision):
    launches = boxed(model, precision)
    assert len(launches) == 4 + 4 + 4
    hold_binaries(launches, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_rules_configurations_in_front_of_every_epilogue(precision):
    """Bias and relu, the mask of the gradient, the update; what the GPU runs at full size."""
    torch.manual_seed(0)
    net = gn.Sequential(
        gn.Conv2d(3, 16, 3), gn.ReLU(), gn.Conv2d(16, 16, (2, 1), padding=1), gn.ReLU(),
        gn.Conv2d(16, 16, 2), gn.Flatten(), gn.Linear(16 * 2 * 3, 3),
    )  # fmt: skip
    hold_configurations(net, (2, 3, 4, 4), precision, "interpret", "tma", 1)
