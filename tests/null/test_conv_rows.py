"""Which convolutions are made from boxes of images, why not the others, and with which tiles."""

import pytest

from graphnet.errors import ConfigError
from graphnet.ir.graph import Builder
from graphnet.ir.op import get_op
from graphnet.ir.types import NHWC, ROW, Layout, TensorType, bf16, f32
from graphnet.lowering.launch.choice import forced
from graphnet.lowering.launch.config import SHARED_BYTES
from graphnet.lowering.launch.conv_rows import Geometry, Pairs, Rows, of_problem, order
from graphnet.lowering.launch.registry import kernels_for
from graphnet.lowering.launch.variants import Problem
from graphnet.lowering.launch.work import take_apart
from tests.case import attrs
from tests.convs import Row

ROWS, PAIRS = Rows(), Pairs()
BLOCKS = Layout("row", None, 4)


def equation(row, op="conv2d", dtype=bf16, math="bf16", filters="nhwc"):
    graph = row.graph(op, dtype, math, filters)
    return next(e for e in graph.eqns if e.op == op)


def why_not(variant, row, op="conv2d", dtype=bf16, math="bf16", arch=90, filters="nhwc", **layouts):
    work = take_apart(equation(row, op, dtype, math, filters), str)
    moved = {work.anchor.inputs["xw".index(k)]: v for k, v in layouts.items()}
    return variant.accepts(work.eqn, work.layouts | moved, math, arch)


PLAIN = Row(128, 64, 13, 13, 128, (3, 3), padding=(1, 1))
STRIDED = Row(128, 64, 13, 13, 128, (3, 3), stride=2)


@pytest.mark.parametrize("op", ["conv2d", "conv2d_dgrad"])
@pytest.mark.parametrize("variant", [ROWS, PAIRS])
def test_what_is_taken(variant, op):
    for dtype, math in ((bf16, "bf16"), (f32, "tf32"), (f32, "ieee")):
        turned = math == "tf32" and op == "conv2d_dgrad"
        lie = {"filters": "hwcn"} if turned else {}
        assert why_not(variant, PLAIN, op, dtype, math, **lie) is None
        other = why_not(variant, PLAIN, op, dtype, math, filters="nhwc" if turned else "hwcn")
        assert other == f"the filters lie as {{{'nhwc' if turned else 'hwcn'}}}"
    assert why_not(variant, Row(3, 8, 4, 5, 24, (2, 2), dilation=2), op) is None
    grouped = Row(4, 32, 4, 4, 32, (3, 3), groups=2)
    assert (why_not(variant, grouped, op) is None) == (variant is ROWS)


@pytest.mark.parametrize(
    "variant, row, op, changes, why",
    [
        (ROWS, PLAIN, "conv2d", {"arch": 80}, "sm_80 has no tensor descriptors"),
        (ROWS, PLAIN, "conv2d", {"filters": ""}, "the filters lie row-major"),
        (ROWS, PLAIN, "conv2d", {"x": Layout()}, "an image lies row-major"),
        (ROWS, PLAIN, "conv2d", {"x": BLOCKS}, "blocks of 4 x 4 pixels need that stride"),
        (ROWS, STRIDED, "conv2d_dgrad", {}, "every 2 x 2th tap"),
        (PAIRS, STRIDED, "conv2d", {}, "strided"),
        (PAIRS, Row(128, 64, 9, 9, 64, (3, 3), groups=2), "conv2d", {}, "channels of one group"),
        (ROWS, Row(8, 20, 4, 4, 8, (1, 1)), "conv2d", {}, "(20) are no multiple of 8"),
        (ROWS, Row(8, 20, 4, 4, 8, (1, 1)), "conv2d_dgrad", {}, "of a filter (20)"),
        (ROWS, Row(8, 48, 4, 4, 16, (1, 1), groups=4), "conv2d", {}, "of a group (12)"),
    ],
)
def test_what_is_refused_says_why(variant, row, op, changes, why):
    assert why in (why_not(variant, row, op, **changes) or "taken")


def test_a_strided_convolution_and_filters_of_any_number_are_taken_forward():
    assert why_not(ROWS, STRIDED) is None
    assert why_not(ROWS, Row(8, 24, 4, 4, 6, (1, 1))) is None


def alexnet(op, n, c, size, k, taps, pad, stride=1, math="bf16"):
    shape = (n, c, size, size, k, taps, taps, stride, stride, *(pad,) * 4, 1, 1, 1)
    return Problem(op, shape, math)


CONV1 = ("conv2d", 128, 3, 227, 96, 11, 0, 4)
CONV2 = (128, 96, 27, 256, 5, 2)
CONV3, CONV4, CONV5 = ((128, c, 13, k, 3, 1) for c, k in ((256, 384), (384, 384), (384, 256)))


@pytest.mark.parametrize(
    "problem, tile",
    [
        (alexnet(*CONV1), (128, 64, 32, 64, 4, 3)),
        (alexnet("conv2d", *CONV2), (128, 256, 0, 64, 8, 4)),
        *((alexnet("conv2d", *c), (128, 128, 0, 64, 4, 3)) for c in (CONV3, CONV4, CONV5)),
        (alexnet("conv2d_dgrad", *CONV2), (128, 64, 32, 64, 4, 3)),
        *((alexnet("conv2d_dgrad", *c), (128, 128, 0, 64, 4, 3)) for c in (CONV3, CONV4, CONV5)),
    ],
    ids=lambda v: None if isinstance(v, tuple) else f"{v.op} {v.shape[:6]}",
)  # fmt: skip
def test_the_rule_finds_what_an_h100_was_fastest_with(problem, tile):
    c, *others = ROWS.configs(problem)
    assert (c.BM, c.BN, c.BT, c.BK, c.num_warps, c.num_stages) == tile
    assert others and len({c, *others}) == len(others) + 1
    assert all(o.shared_bytes(2) < SHARED_BYTES for o in others)


def test_pairs_are_for_the_gradient_with_few_columns():
    problem = alexnet("conv2d_dgrad", *CONV2)
    assert PAIRS.suits(problem) is None
    c = next(PAIRS.configs(problem))
    assert (c.BM, c.BN, c.BT, c.BK, c.num_warps, c.num_stages) == (256, 128, 0, 64, 8, 4)
    assert "256 columns" in PAIRS.suits(alexnet("conv2d_dgrad", *CONV3))
    assert "gradients" in PAIRS.suits(alexnet("conv2d", *CONV2))
    assert "half empty" in PAIRS.suits(alexnet("conv2d_dgrad", 128, 96, 13, 256, 5, 2))


def test_a_batch_that_leaves_rows_empty_is_for_others():
    assert "62 of 64 rows" in ROWS.suits(alexnet("conv2d", 2, *CONV4[1:]))
    assert ROWS.suits(alexnet("conv2d", *CONV4)) is None
    assert next(ROWS.configs(alexnet("conv2d", 64, *CONV4[1:]))).BM == 64
    assert "64 of 128 rows" in PAIRS.suits(alexnet("conv2d_dgrad", 64, *CONV2[1:]))


def test_the_longest_sums_come_first():
    """A 3 x 3 convolution of 3 x 4 pixels: the inner two meet 9 taps, the corners 4."""
    g = of_problem(Problem("conv2d", (1, 8, 3, 4, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1), "bf16"))
    values = order(g).values
    assert values == (5, 6, 1, 2, 4, 7, 9, 10, 0, 3, 8, 11)
    assert g.depth(8) == 8 * (2 * 9 + 6 * 6 + 4 * 4)
    pairs = of_problem(
        Problem("conv2d", (1, 8, 3, 4, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1), "bf16"), pixels=2
    )
    assert order(pairs).values == (2, 3, 0, 1, 4, 5) and pairs.depth(16) == 16 * (3 + 4) * 3 * 2
    plain = of_problem(Problem("conv2d", (1, 8, 3, 4, 8, 2, 2, 1, 1, 0, 0, 0, 0, 1, 1, 1), "bf16"))
    assert order(plain) is None, "all pixels meet four taps"


def test_blocks_of_pixels_are_a_convolution_of_stride_1():
    g = of_problem(alexnet(*CONV1))
    assert isinstance(g, Geometry)
    assert (g.C, g.H, g.R, g.S, g.SH, g.OH) == (48, 57, 3, 3, 1, 55) and g.span and g.run == 144


# ---- the choice --------------------------------------------------------------------------------


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
        (("conv2d", 128, 256), "rows", "taps", "the rules prefer rows"),
        (("conv2d", 128, 256), "rows", "pairs", "input gradients in bf16"),
        (("conv2d", 2, 256), "taps", "rows", "62 of 64 rows would be empty"),
        (("conv2d", 128, 48, NHWC, 8, 1, 90, 48), "flat", "taps", "group (6) are no multiple"),
        (("conv2d", 128, 256, ROW), "flat", "rows", "row-major"),
        (("conv2d", 128, 3, Layout("row", None, 4), 1, 4), "rows", "flat", "lies in blocks"),
        (("conv2d_dgrad", 128, 64, NHWC, 1, 2), "flat", "rows", "2 x 2th tap"),
        (("conv2d", 128, 256, NHWC, 1, 1, 80), "taps", "rows", "sm_80 has no tensor descriptors"),
        (("conv2d", 128, 16, NHWC, 1, 1, 90, 16), "taps", "rows", "16 columns"),
        (("conv2d_dgrad", 128, 96), "rows", "pairs", "pixels would be half empty"),
    ],
)
def test_the_choice_and_its_reason(about, variant, other, why):
    made = choice(*about)
    assert made.variant.name == variant and why in dict(made.refused)[other]


def test_what_is_forced_is_taken_where_it_can_be():
    with forced("conv2d", variant="taps"):
        assert choice("conv2d", 128, 256).variant.name == "taps"
    with forced("conv2d", variant="rows"):
        assert choice("conv2d", 2, 256).variant.name == "rows"
        assert choice("conv2d", 128, 256, ROW).variant.name == "flat"
    with (
        forced("conv2d", variant="im2col"),
        pytest.raises(ConfigError, match="(?s)no variant 'im2col' of conv2d.*flat, .*pairs, rows"),
    ):
        choice("conv2d", 128, 256)
