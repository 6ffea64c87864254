"""Kernels whose threads hold 8 channels each, against the float64 oracle over poisoned memory."""

import pytest
import torch

import graphnet as gn
from graphnet.api import lower
from graphnet.ir.graph import Builder
from graphnet.ir.types import TensorType, bf16, f32
from graphnet.lowering.launch import chunks, pool_tiles
from graphnet.lowering.launch.choice import forced
from graphnet.lowering.launch.codegen import Ref
from graphnet.lowering.launch.config import Config
from graphnet.lowering.launch.equation import launches
from graphnet.lowering.launch.registry import kernels_for
from graphnet.lowering.launch.work import take_apart
from graphnet.lowering.targets.interpret import interpreted
from graphnet.lowering.tune.alone import Alone
from graphnet.lowering.watch import oracle
from tests.case import attrs
from tests.kinds import NORMS

pytestmark = pytest.mark.usefixtures("single_kernels")

ONE, PAIR, TWO = chunks.Chunks(), chunks.PoolThenNorm(), chunks.TwoPass()
TILES, GRAD_TILES = pool_tiles.PoolTiles(), pool_tiles.PoolGradTiles()
SMALL = Config(BLOCK=64, num_warps=2)
TILE = Config(BM=16, BN=16)


def work_of(eqn):
    return take_apart(eqn, lambda v: v.name)


def accepts(variant, eqn):
    return variant.accepts(eqn, work_of(eqn).layouts, "bf16", 90)


def hold(graph, eqn, variant, config=SMALL, edit=None):
    """The launches are right, and give the same bits twice. `edit` changes floating operands."""
    assert accepts(variant, eqn) is None
    return prove(graph, eqn, variant.launch(work_of(eqn), config), edit)


def prove(graph, eqn, steps, edit=None):
    alone = Alone(graph, eqn, "interpret")
    if edit is not None:
        alone.operands = {v: edit(t) if t.is_floating_point() and t.dim() == 4 else t
                          for v, t in alone.operands.items()}  # fmt: skip
        alone.want = oracle(eqn, alone.operands)
    refs = [Ref(v.name, v.type.dtype.name) for v in eqn.results]
    with interpreted():
        run, tensor = alone.prepare(steps)
        assert (why := alone.verdict(run, tensor)) is None, why
        first = [tensor(r).clone() for r in refs]
        alone.fill(tensor)
        run()
    for r, before in zip(refs, first, strict=True):
        assert torch.equal(tensor(r).view(torch.uint8), before.view(torch.uint8))
    return steps


def last(b, name, type):
    """An operand that lies channels-last."""
    return b.one("relayout", b.input(name, type), attrs=attrs("relayout", layout="nhwc"))


def alone_graph(op, shape, dtype=f32, rows=False, **a):
    """One op of channels-last operands; (graph, its equation). `rows`: a pool's gradient has its
    dy row-major."""
    b = Builder("g")
    x = TensorType(dtype, shape)
    if op == "maxpool2d_grad":
        ins = [last(b, "image", x)]
        pooled, index = b.emit("maxpool2d", ins, attrs("maxpool2d", **a))
        small = TensorType(dtype, pooled.type.shape)
        dy = b.input("dy", small) if rows else last(b, "dy", small)
        index = b.one("relayout", index, attrs=attrs("relayout", layout="nhwc"))
        out = b.emit(op, [dy, index], attrs(op, **a, input_size=shape[2:]))
    else:
        ins = [last(b, "x", x)] + ([last(b, "dy", x)] if op == "lrn_grad" else [])
        out = b.emit(op, ins, attrs(op, **a))
        if op == "maxpool2d" and not rows:
            out = [b.one("relayout", v, attrs=attrs("relayout", layout="nhwc")) for v in out]
    graph = b.build(*out)
    return graph, next(e for e in graph.eqns if e.op == op)


WINDOWS = [
    {"size": 5, "alpha": 0.5, "k": 1.5},
    {"size": 5, "alpha": 0.5, "k": 0.0},  # a scale of 0 beyond the border
    {"size": 4, "alpha": 0.5, "k": 1.0, "beta": 1.0},  # further below than above
    {"size": 8, "alpha": 0.3, "k": 2.0, "alpha_mode": "sum"},
    {"size": 2, "alpha": 0.3}, {"size": 1, "alpha": 0.3},
]  # fmt: skip


@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize("norm", WINDOWS, ids=lambda n: f"{n['size']}")
@pytest.mark.parametrize("shape", [(2, 8, 3, 5), (1, 24, 5, 3), (1, 96, 2, 3)])
def test_norms(shape, norm, dtype):
    for op in ("lrn", "lrn_grad"):
        hold(*alone_graph(op, shape, dtype, **norm), ONE)


POOLS = [
    {"kernel": (3, 3), "stride": (2, 2)},
    {"kernel": (3, 3), "stride": (2, 2), "ceil_mode": True},
    {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1, 1, 1)},
    {"kernel": (2, 2), "stride": (2, 2)},
    {"kernel": (2, 2), "stride": (3, 3)},  # pixels that no window holds
    {"kernel": (3, 2), "stride": (2, 1), "padding": (1, 0, 0, 1)},
]
SHAPES = [(2, 8, 7, 8), (1, 24, 6, 5), (1, 96, 3, 5)]


@pytest.mark.parametrize("pool", POOLS, ids=lambda p: "-".join(str(v) for v in p.values()))
@pytest.mark.parametrize("shape, dtype", [*zip(SHAPES, (f32, bf16, f32), strict=True)])
def test_pools(shape, pool, dtype):
    hold(*alone_graph("maxpool2d_grad", shape, dtype, **pool), ONE)
    hold(*alone_graph("maxpool2d", shape, dtype, rows=True, **pool), TILES, TILE)
    hold(*alone_graph("maxpool2d_grad", shape, dtype, rows=True, **pool), GRAD_TILES, TILE)


def step(*layers, channels=24, size=11, dtype="fp32", grads=True):
    """The fused graph of a net with `layers` between two convolutions."""
    net = gn.Sequential(
        gn.Conv2d(8, channels, 3, padding=1), *layers, gn.Conv2d(channels, 3, 1),
        gn.AdaptiveAvgPool2d(1), gn.Flatten(),
    )  # fmt: skip
    how = {"loss": gn.CrossEntropyLoss(), "grads": True} if grads else {}
    shape = (2, 8, size, size - 2)
    return lower(net, shape, target="interpret", precision=dtype, **how).stages.fused


def region(graph, ops):
    return next(e for e in graph.eqns if "+".join(a.op for a in work_of(e).anchors) == ops)


FORWARD, BACKWARD = PAIR.ops[0], TWO.ops[0]
BUILT = [
    {"kernel_size": 3, "stride": 2}, {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    {"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": 2, "stride": 2},
    {"kernel_size": 2, "stride": 3},
]  # fmt: skip
NORM = {"alpha": 0.5, "k": 1.5}


@pytest.mark.parametrize("pool", BUILT, ids=lambda p: "-".join(map(str, p.values())))
def test_regions(pool):
    layers = gn.ReLU(), gn.MaxPool2d(**pool), gn.LocalResponseNorm(5, **NORM)
    graph = step(*layers, dtype="bf16" if pool["kernel_size"] == 3 else "fp32")
    hold(graph, region(graph, FORWARD), PAIR)
    backward = region(graph, BACKWARD)
    assert any(e.op == "relu_grad" for e in backward.body.eqns)  # the mask lies between the two
    first, second = hold(graph, backward, TWO)
    ((scratch, size),) = first.scratch
    assert scratch in first.writes and scratch in second.reads
    moved = sum(v.type.bytes for v in {*backward.inputs, *backward.results})
    assert first.bytes + second.bytes == moved  # the workspace stays in cache


@pytest.mark.parametrize("pool", BUILT[1:4:2], ids=lambda p: "-".join(map(str, p.values())))
def test_a_normalization_in_front_of_the_pool(pool):
    graph = step(gn.ReLU(), gn.LocalResponseNorm(5, **NORM), gn.MaxPool2d(**pool))
    backward = region(graph, TWO.ops[1])
    first, second = hold(graph, backward, TWO)
    assert first.kernel == "maxpool2d_grad_chunks" and second.kernel == "lrn_grad_chunks"


def test_a_workspace_beyond_the_cache_is_traffic():
    net = gn.Sequential(
        gn.Conv2d(8, 64, 1), gn.MaxPool2d(2), gn.LocalResponseNorm(5), gn.Conv2d(64, 8, 1),
        gn.AdaptiveAvgPool2d(1), gn.Flatten(),
    )  # fmt: skip
    counted = {}
    for n in (64, 16384):
        plan = lower(net, (n, 8, 14, 14), target="cuda", precision="bf16",
                     loss=gn.CrossEntropyLoss(), grads=True).plan  # fmt: skip
        first = next(s for s in plan.launches if s.kernel == "lrn_grad_chunks")
        ((_, held),) = first.scratch
        counted[n] = first.bytes / held
    assert counted[16384] == counted[64] + 1


@pytest.mark.parametrize("channels, block", [(8, 16), (96, 16), (96, 8), (256, 64)])
def test_programs_of_whole_pixels(channels, block):
    """Also where a pixel has more chunks than a program was to hold."""
    layers = gn.MaxPool2d(3, 2), gn.LocalResponseNorm(4, **NORM)
    graph = step(*layers, channels=channels, size=7)
    (launch,) = hold(graph, region(graph, FORWARD), PAIR, Config(BLOCK=block, num_warps=1))
    constants = dict(launch.constants)
    assert constants["TILE"] * (channels // 8) <= constants["BLOCK"]


def test_inference_keeps_the_pooled_image_in_a_workspace():
    graph = step(gn.MaxPool2d(3, 2), gn.LocalResponseNorm(5, **NORM), grads=False)
    (launch,) = hold(graph, region(graph, FORWARD), PAIR)
    assert launch.scratch


def test_a_pool_between_channels_last_images_and_its_gradient():
    graph = step(gn.ReLU(), gn.MaxPool2d(3, 2))
    for op in ("maxpool2d", "maxpool2d_grad"):
        (launch,) = hold(graph, region(graph, op), ONE)
        assert dict(launch.constants)["FLAT"]


def test_coordinates_are_logical_where_code_needs_them():
    """A dropout mask is drawn by the logical index, whatever the kernel walks over."""
    graph = step(gn.LocalResponseNorm(5, **NORM), gn.Dropout(0.5))
    eqn = region(graph, "lrn")
    assert any(e.op == "dropout" for e in eqn.body.eqns)
    (launch,) = hold(graph, eqn, ONE)
    assert not dict(launch.constants)["FLAT"]


def with_nan(t):
    """Small integers, many of them equal, and a few NaN."""
    out = (t * 2).round()
    out.view(-1)[5::61] = float("nan")
    return out


def test_nan_wins_and_the_first_of_equals():
    for op, variant, config in (("maxpool2d", ONE, SMALL), (FORWARD, PAIR, SMALL)):
        norm = [gn.LocalResponseNorm(5, **NORM)] if op == FORWARD else []
        graph = step(gn.MaxPool2d(3, 2), *norm, size=9)
        hold(graph, region(graph, op), variant, config, with_nan)
    graph, eqn = alone_graph("maxpool2d", (2, 16, 7, 7), rows=True, kernel=(3, 3), stride=(2, 2))
    hold(graph, eqn, TILES, TILE, with_nan)
    for op in ("lrn", "lrn_grad"):
        hold(*alone_graph(op, (1, 24, 4, 4), size=5, **NORM), ONE, SMALL, with_nan)


@pytest.mark.parametrize("channels, block, size", [(3, 4, 11), (2, 4, 8), (3, 2, 7), (1, 3, 7)])
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_space_to_depth(channels, block, size, dtype):
    b = Builder("g")
    x = b.input("x", TensorType(dtype, (3, channels, size, size + 1)))
    packed = b.one("relayout", x, attrs=attrs("relayout", layout=f"s2d{block}"))
    graph = b.build(packed)
    eqn = next(e for e in graph.eqns if e.out.type.layout.s2d)
    (launch,) = prove(graph, eqn, launches(eqn, lambda v: v.name, kernels_for("interpret")))
    assert dict(launch.constants)["V"] == {48: 16, 32: 16, 12: 4, 9: 1}[channels * block**2]


# ---- in a net ----------------------------------------------------------------------------------


def small():
    """A cut-down AlexNet: both regions, and a last pool in front of a flatten."""
    torch.manual_seed(7)
    return gn.Sequential(
        gn.Conv2d(3, 16, 3, padding=1), gn.ReLU(), gn.MaxPool2d(3, 2),
        gn.LocalResponseNorm(5, k=2.0),
        gn.Conv2d(16, 24, 3, padding=1), gn.ReLU(), gn.LocalResponseNorm(3), gn.MaxPool2d(2),
        gn.Conv2d(24, 16, 1), gn.MaxPool2d(3, 2), gn.ReLU(), gn.Flatten(), gn.Linear(64, 5),
    )  # fmt: skip


def gradients(target):
    x = torch.randn(2, 3, 23, 23, generator=torch.Generator().manual_seed(1))
    step = gn.compile(small(), x.shape, target=target, loss=gn.CrossEntropyLoss(), grads=True)
    (_, grads) = step(x, torch.tensor([1, 3]))
    return grads, {s.kernel for s in step.plan.launches} if target == "interpret" else set()


@pytest.mark.parametrize("older", [False, True])
def test_every_variant_in_a_net(older):
    """By the rules, and with the kernels forced that they prefer these to."""
    norms = {"variant": "pixels"} if older else {}
    pools = {"variant": "elements"} if older else {}
    with forced(*NORMS, **norms), forced("maxpool2d", "maxpool2d_grad", **pools):
        got, kernels = gradients("interpret")
    ours = {"maxpool2d_lrn_chunks", "lrn_grad_chunks", "maxpool2d_grad_chunks", "maxpool2d_tiles",
            "maxpool2d_grad_tiles"}  # fmt: skip
    assert kernels & ours == (set() if older else ours)
    want, _ = gradients("cpu")
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=2e-5, atol=2e-6, msg=key)


# ---- what is refused ---------------------------------------------------------------------------


def refused(variant, op, shape=(1, 16, 9, 9), **a):
    graph, eqn = alone_graph(op, shape, **a)
    return accepts(variant, eqn)


def test_refusals_are_sentences():
    assert "12 channels are no multiple of 8" in refused(ONE, "lrn", (1, 12, 3, 3))
    assert "reaches further than 4" in refused(ONE, "lrn_grad", size=11)
    pool = {"kernel": (3, 3), "stride": (2, 2)}
    assert "is row-major" in refused(ONE, "maxpool2d_grad", rows=True, **pool)
    assert "is channels-last, not row-major" in refused(GRAD_TILES, "maxpool2d_grad", **pool)
    assert "dilated by 2 x 1" in refused(ONE, "maxpool2d_grad", dilation=(2, 1), **pool)
    wide = {"kernel": (3, 3), "stride": (1, 1)}
    assert "9 of them reach a block of 1 pixels" in refused(ONE, "maxpool2d_grad", **wide)
    large = refused(GRAD_TILES, "maxpool2d_grad", (1, 8, 30, 30), rows=True, **pool)
    assert "at most 128 pooled pixels, here 225" in large
