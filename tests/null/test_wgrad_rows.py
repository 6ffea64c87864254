"""The weight gradient by filter rows: what it takes, which tiles, and who sums what."""

import pytest

from graphnet.ir.graph import Builder
from graphnet.ir.op import get_op
from graphnet.ir.types import HWCN, NHWC, ROW, Layout, TensorType, bf16, f32
from graphnet.lowering.launch.config import SHARED_BYTES, Config, cdiv
from graphnet.lowering.launch.variants import Problem
from graphnet.lowering.launch.wgrad_rows import LEAST_STEPS, WgradRows, cut, rows_of, tile_size
from tests.case import attrs

ROWS = WgradRows()
BLOCKS = Layout("row", None, 4)


def problem(
    n=128, c=96, h=27, w=27, k=256, r=5, s=5, stride=1, pad=(2, 2, 2, 2), g=1, dtype="bf16"
):
    shape = (n, c, h, w, k, r, s, stride, stride, *pad, 1, 1, g)
    return Problem("conv2d_wgrad", shape, dtype)


ALEXNET = {
    "conv1": problem(c=3, h=227, w=227, k=96, r=11, s=11, stride=4, pad=(0, 0, 0, 0)),
    "conv2": problem(),
    "conv3": problem(c=256, h=13, w=13, k=384, r=3, s=3, pad=(1, 1, 1, 1)),
    "conv4": problem(c=384, h=13, w=13, k=384, r=3, s=3, pad=(1, 1, 1, 1)),
    "conv5": problem(c=384, h=13, w=13, k=256, r=3, s=3, pad=(1, 1, 1, 1)),
}


@pytest.mark.parametrize(
    "layer, swap, tile, stages",
    [
        ("conv1", 0, (128, 128, 16), 4),
        ("conv2", 1, (128, 256, 0), 4),
        ("conv3", 1, (128, 256, 128), 3),
        ("conv4", 1, (128, 256, 128), 3),
        ("conv5", 1, (128, 256, 0), 4),
    ],
)
def test_alexnets_tiles_are_those_that_were_measured_fastest(layer, swap, tile, stages):
    assert ROWS.suits(ALEXNET[layer]) is None
    found = list(ROWS.configs(ALEXNET[layer]))
    c = found[0]
    assert (c.SWAP, (c.BM, c.BN, c.BT), c.num_stages, c.PROGRAMS) == (swap, tile, stages, 132)
    assert (c.BK, c.num_warps) == (64, 8) and len(found) == len(set(found)) > 10
    assert all(c.shared_bytes(2) <= SHARED_BYTES for c in found)


def x_and_dy(x, dy, kernel=(3, 3), stride=1, dtype=bf16, images=4, **more):
    """A weight gradient of an image and a gradient of these channels, and its layouts."""
    b = Builder("g")
    size = 15 if stride == 4 else 8
    made = b.input("x", TensorType(dtype, (images, x[0], size, size)))
    out = (size - kernel[0] + sum(more.get("padding", (0,) * 4)[:2])) // stride + 1
    grad = b.input("dy", TensorType(dtype, (images, dy[0], out, out)))
    a = attrs("conv2d_wgrad", kernel=kernel, stride=(stride,) * 2, **more)
    assert get_op("conv2d_wgrad").infer(a, made.type, grad.type)
    b.emit("conv2d_wgrad", [made, grad], a)
    return b.eqns[-1], {made: x[1], grad: dy[1]}


@pytest.mark.parametrize(
    "given, arch, why",
    [
        (x_and_dy((8, NHWC), (16, NHWC)), 90, None),
        (x_and_dy((8, NHWC), (16, NHWC)), 80, "sm_80 has no tensor descriptors"),
        (x_and_dy((8, ROW), (16, NHWC)), 90, "the image lies row-major"),
        (x_and_dy((8, NHWC), (16, ROW)), 90, "the gradient lies row-major"),
        (x_and_dy((12, NHWC), (16, NHWC)), 90, "12 channels of the image"),
        (x_and_dy((12, NHWC), (16, NHWC), dtype=f32), 90, None),
        (x_and_dy((8, NHWC), (20, NHWC)), 90, "20 channels of the gradient"),
        (x_and_dy((16, NHWC), (32, NHWC), groups=2), 90, None),
        (x_and_dy((16, NHWC), (24, NHWC), groups=2), 90, "12 channels of the gradient"),
        (x_and_dy((3, BLOCKS), (16, NHWC), (7, 7), 4), 90, None),
        (x_and_dy((3, BLOCKS), (16, NHWC), (7, 7), 2), 90, "need that stride"),
    ],
)
def test_what_it_takes(given, arch, why):
    said = ROWS.accepts(*given, "bf16", arch)
    assert said == why if why is None else said is not None and why in said


@pytest.mark.parametrize(
    "x, dy, images, why",
    [
        (HWCN, HWCN, 4, None),
        (NHWC, HWCN, 4, "the image does not lie with its images innermost"),
        (HWCN, ROW, 4, "the gradient does not lie with its images innermost"),
        (HWCN, HWCN, 6, "6 images of the image are no multiple of 16 bytes"),
    ],
)
def test_tf32_wants_the_images_innermost(x, dy, images, why):
    eqn, layouts = x_and_dy((5, x), (7, dy), dtype=f32, images=images)
    said = ROWS.accepts(eqn, layouts, "tf32", 90)
    assert said == why if why is None else said is not None and why in said
    assert ROWS.wants(eqn, layouts, "tf32") == dict.fromkeys(layouts, HWCN)
    assert not ROWS.wants(eqn, layouts, "bf16")


@pytest.mark.parametrize(
    "p, why",
    [
        (problem(n=2), "62 of 64 images of a step would be empty"),
        (problem(n=130), "62 of 192 images"),
        (problem(n=250), None),
        (problem(dtype="ieee"), "turned in registers"),
        (problem(c=96, k=96, g=96), "tiles multiply"),
        (problem(n=130, dtype="tf32"), "30 of 160 images"),
        (problem(n=148, dtype="tf32"), None),
    ],
)
def test_what_it_does_not_suit(p, why):
    said = ROWS.suits(p)
    assert said == why if why is None else said is not None and why in said


GEOMETRIES = [
    *ALEXNET.values(),
    problem(n=70, c=48, g=2, stride=2),
    problem(n=65, c=16, k=24, h=2, w=3, r=2, s=2, pad=(2, 1, 0, 3)),
    problem(n=3, c=16, k=24, h=2, w=2, r=4, s=1, pad=(3, 0, 0, 0)),
    problem(c=512, k=512, h=28, w=28, r=3, s=3),
]


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("p", GEOMETRIES)
@pytest.mark.parametrize("programs", [5, 132, 264])
def test_every_step_is_summed_once_and_programs_finish_together(p, carry, programs):
    r = rows_of(p.sizes, 4 if p.sizes["SH"] == 4 else 0)
    c = Config(128, 128, 64, BT=16, PROGRAMS=programs, num_stages=3)
    plan = cut(r, c, carry)
    kt, xt = tile_size(c)
    across, down = cdiv(r.cols, xt), cdiv(r.k, kt)
    tiles = r.g * r.units * across * down
    assert sorted(slot for slot, *_ in plan.table) == list(range(plan.segments))
    assert len(plan.first) == tiles + 1 and plan.first[-1] == plan.segments
    blocks = cdiv(r.n, c.BK)
    by_slot = {slot: row for slot, *row in plan.table}
    most = 0
    for t in range(tiles):
        unit, part = t // (down * across) % r.units, t // down % across
        offset = unit // r.across * r.dh - r.pt
        whole = carry and unit == r.carrier and part == 0
        reached = [o for o in range(r.oh) if whole or 0 <= o * r.sh + offset < r.h]
        want = [o * r.ow * blocks + i for o in reached for i in range(r.ow * blocks)]
        rows = [by_slot[z] for z in range(plan.first[t], plan.first[t + 1])]
        assert all(tile == t for tile, *_ in rows)
        got = [i for _, first, count in rows for i in range(first, first + count)]
        assert got == want
        assert len(rows) == 1 or min(count for *_, count in rows) >= LEAST_STEPS
        most = max(most, *(count for *_, count in rows))
    assert plan.most == max(b - a for a, b in zip(plan.first, plan.first[1:], strict=False))
    work = sum(count for *_, count in plan.table)
    if tiles * 3 <= programs and work >= 40 * programs:  # parts enough to be even
        assert plan.segments == programs and most <= 1.45 * work / programs
