"""Boxes of images, fetched by tensor descriptors: right beside the masked copies, chosen for a
reason, and without a spill."""

import pytest
import torch

import graphnet as gn
from graphnet import config
from graphnet.api import lower
from graphnet.errors import ConfigError
from graphnet.ir.graph import Builder
from graphnet.ir.op import get_op
from graphnet.ir.types import NHWC, ROW, Layout, TensorType, bf16, f32
from graphnet.lowering.build.build import compile_launches
from graphnet.lowering.launch.choice import forced
from graphnet.lowering.launch.config import SHARED_BYTES
from graphnet.lowering.launch.registry import kernels_for
from graphnet.lowering.launch.work import take_apart
from tests.case import attrs
from tests.configs import hold as hold_configurations
from tests.convs import ROWS, hold
from tests.kinds import CONVS

OPS = ("conv2d_dgrad", "conv2d", "conv2d_wgrad")  # the first for stride 1 alone


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with config.override(CACHE_DIR=str(tmp_path_factory.mktemp("cache"))):
        yield


@pytest.mark.parametrize("dtype, variant", [(f32, "boxes"), (bf16, "boxes"), (bf16, "taps")])
@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.note.replace(" ", "-"))
def test_every_variant_is_the_oracle(row, dtype, variant):
    for op in OPS[row.stride > 1 :]:
        assert hold(op, row, dtype, variant) == variant


@pytest.mark.parametrize("row", ROWS[1:4:2], ids=lambda r: r.note.replace(" ", "-"))
def test_filters_in_torchs_layout_come_by_pointer(row):
    for op in OPS[:2]:
        assert hold(op, row, f32, "boxes", filters="") == "boxes"


def choice(op, n, c, layout=NHWC, groups=1, stride=1, arch=90, k=64):
    """What is chosen for one convolution of 13 x 13 pixels whose operands lie in `layout`."""
    b = Builder("g")
    blocks = layout.s2d
    x = TensorType(bf16, (n, c, 13, 13), layout)
    w = TensorType(bf16, (k, c // groups, 3, 3), layout if blocks else NHWC)
    at = {"stride": (stride,) * 2, "groups": groups, "math": "bf16"}
    y = get_op("conv2d").infer(attrs("conv2d", **at), x, w)[0].with_layout(NHWC)
    if op == "conv2d":
        ins = (("x", x), ("w", w))
    elif op == "conv2d_dgrad":
        ins, at = (("y", y), ("w", w)), at | {"input_size": (13, 13)}
    else:
        ins, at = (("x", x), ("y", y)), at | {"kernel": (3, 3)}
    b.emit(op, [b.input(name, t) for name, t in ins], attrs(op, **at))
    return kernels_for("cuda", arch=arch).choose(take_apart(b.eqns[-1], str))


@pytest.mark.parametrize(
    "about, variant, other, why",
    [
        (("conv2d", 128, 256), "boxes", "taps", "the rules prefer boxes"),
        (("conv2d", 2, 256), "taps", "boxes", "62 of 64 rows would be empty"),
        (("conv2d", 128, 48, NHWC, 6, 1, 90, 48), "taps", "boxes", "group (8) are no multiple"),
        (("conv2d", 128, 48, NHWC, 8, 1, 90, 48), "flat", "taps", "group (6) are no multiple"),
        (("conv2d", 128, 256, ROW), "flat", "boxes", "row-major"),
        (("conv2d", 128, 3, Layout("row", None, 4), 1, 4), "taps", "boxes", "blocks of 4 x 4"),
        (("conv2d_dgrad", 128, 64, NHWC, 1, 2), "flat", "taps", "2 x 2th tap"),
        (("conv2d", 128, 256, NHWC, 1, 1, 80), "taps", "boxes", "sm_80 has no tensor descriptors"),
        (("conv2d", 128, 16, NHWC, 1, 1, 90, 16), "taps", "boxes", "16 columns"),
    ],
)
def test_the_choice_and_its_reason(about, variant, other, why):
    made = choice(*about)
    assert made.variant.name == variant and why in dict(made.refused)[other]


def test_what_is_forced_is_taken_where_it_can_be():
    with forced("conv2d", variant="taps"):
        assert choice("conv2d", 128, 256).variant.name == "taps"
    with forced("conv2d", variant="boxes"):
        assert choice("conv2d", 2, 256).variant.name == "boxes"
        assert choice("conv2d", 128, 256, ROW).variant.name == "flat"
    with (
        forced("conv2d", variant="im2col"),
        pytest.raises(ConfigError, match="(?s)no variant 'im2col' of conv2d.*boxes, flat"),
    ):
        choice("conv2d", 128, 256)


def step(model, variant, precision="bf16"):
    net = gn.models.get(model)
    with forced(*CONVS, variant=variant):
        low = lower(
            net, (128, *net.input_shape), target="cuda", precision=precision,
            loss=gn.CrossEntropyLoss(), optimizer=gn.SGD(momentum=0.9, weight_decay=5e-4),
        )  # fmt: skip
    return [s for s in low.plan.launches if s.kernel.startswith("conv")]


def test_boxes_of_images_multiply_less_than_masked_taps():
    for a, b in zip(step("alexnet", "taps"), step("alexnet", "boxes"), strict=True):
        if "conv1" not in a.where.layers:
            assert b.kernel.endswith("tma") and b.padded < 0.92 * a.padded, b


def hold_binaries(launches, precision="bf16"):
    for s, (_, binary) in zip(launches, compile_launches(launches)[0], strict=True):
        assert binary["spill_bytes"] == 0 < binary["tma"], s
        assert (binary["wgmma"] > 0) == (precision != "fp32"), s
        assert precision != "bf16" or binary["cp_async"] == 0, s
        assert binary["shared_bytes"] <= SHARED_BYTES, s


def boxed(model, precision="bf16"):
    return [s for s in step(model, "boxes", precision) if s.kernel.endswith("tma")]


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
    hold_configurations(net, (2, 3, 4, 4), precision, "interpret", 4)
