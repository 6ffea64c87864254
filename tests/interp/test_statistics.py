"""Batch normalization's statistics in the convolution's epilogue: right beside the float64 oracle
over memory filled with NaN, at every border, with rows that are not live."""


import pytest
import torch

import graphnet as gn
from graphnet.api import lower
from graphnet.ir.graph import Builder
from graphnet.ir.types import TensorType, bf16, f32, i32
from graphnet.lowering.build.build import compile_launches
from graphnet.lowering.launch import batch_norm as launching
from graphnet.lowering.launch.choice import Choice, forced
from graphnet.lowering.launch.codegen import Ref
from graphnet.lowering.launch.config import Config
from graphnet.lowering.launch.equation import computed
from graphnet.lowering.launch.registry import VARIANTS, kernels_for
from graphnet.lowering.launch.work import take_apart
from graphnet.lowering.plan.plan import make_plan
from graphnet.lowering.targets import interpret
from graphnet.lowering.tune.alone import Alone
from graphnet.lowering.watch import oracle
from graphnet.passes.fuse_statistics import fuse_statistics
from graphnet.passes.rewrite import Log
from tests.case import attrs
from tests.convs import MATH, Row
from tests.twin import relative

pytestmark = pytest.mark.usefixtures("own_cache", "single_kernels")

KEEPING = {v.name: v for v in VARIANTS if v.moments}
KERNELS = kernels_for("interpret")
ROWS = [
    Row(5, 24, 2, 3, 40, (2, 1), padding=(1, 0), note="two accumulators", BN=32, BT=16),
    Row(18, 16, 2, 3, 24, (1, 1), note="images past the last tile"),
    Row(3, 48, 2, 3, 48, (2, 2), padding=(1, 0), groups=2, note="groups"),
    Row(3, 16, 5, 4, 16, (3, 2), stride=2, padding=(1, 0), note="stride"),
]


def joined(row, dtype, math):
    """A convolution with its bias, batch norm and relu as one equation."""
    b = Builder("g")
    x = TensorType(dtype, (row.n, row.c, row.h, row.w))
    w = TensorType(dtype, (row.o, row.c // row.groups, *row.kernel))
    last = attrs("relayout", layout="nhwc")
    ins = [b.one("relayout", b.input(k, t), attrs=last) for k, t in (("x", x), ("w", w))]
    channels = TensorType(f32, (row.o,))
    z = b.one("conv2d", *ins, b.input("b", channels), attrs=row.attrs("conv2d", math))
    live = b.input("live", TensorType(i32, ()), "hyper")
    scale = [b.input(k, channels) for k in ("scale", "shift")]
    y, mean, var = b.emit("batch_norm", [z, live, *scale], attrs("batch_norm", track=False))
    graph = b.build(b.one("relu", y), z, mean, var)
    after = fuse_statistics(graph, KERNELS, Log())
    (eqn,) = (e for e in after.eqns if e.op == "fused")
    return after, eqn


def held(row, dtype, math, variant, config, alive=None, times=1):
    """The launches of the joined equation over memory full of NaN against the oracle."""
    graph, eqn = joined(row, dtype, math)
    work = take_apart(eqn, lambda v: v.name)
    steps = computed(work, Choice(work.problem, KEEPING[variant], config, "tried"), KERNELS)
    alone = Alone(graph, eqn, "interpret")
    if alive is not None:
        (live,) = (v for v in eqn.inputs if v.name == "live")
        alone.operands[live] = torch.tensor(alive, dtype=torch.int32)
        alone.want = oracle(eqn, alone.operands)
    run, tensor = alone.prepare(steps)
    bits = []
    for _ in range(times):
        with interpret.interpreted():
            assert (why := alone.verdict(run, tensor)) is None, (dtype, alive, why)
        bits.append([tensor(Ref(v.name, v.type.dtype.name)).clone() for v in eqn.results])
    assert all(torch.equal(a, b) for a, b in zip(bits[0], bits[-1], strict=True))
    return steps


def at_the_border(variant, row, cases, **how):
    config = Config(32 if variant == "pairs" else 16, row.BN, 16, BT=row.BT)
    if variant == "flat":
        config = Config(16, row.BN, 16)
    for dtype, alive in cases:
        steps = held(row, dtype, MATH[dtype.name], variant, config, alive, **how)
        assert [s.kernel for s in steps][1:] == ["join_parts", "join_moments", "batch_norm"]


@pytest.fixture
def many(monkeypatch):
    """Few parts are as many, so that two launches join them."""
    monkeypatch.setattr(launching, "MOST_PARTS", 1)
    monkeypatch.setattr(launching, "FEWER", 3)


@pytest.mark.parametrize("variant", KEEPING)
def test_columns_images_and_dead_rows_are_the_oracle(variant, many):
    """Two accumulators, columns and images past the last one, rows that are not live."""
    at_the_border(variant, ROWS[0], [(bf16, 2)], times=2)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.note.replace(" ", "-"))
@pytest.mark.parametrize("variant", KEEPING)
def test_every_border_is_the_oracle(variant, row, many):
    if variant != "pairs" or (row.groups == 1 and row.stride == 1):
        at_the_border(variant, row, [(f32, row.n), (f32, 1), (bf16, 2)])


def test_pieces_of_a_tile_keep_their_own():
    """TF32 results go out 32 accumulators at a time."""
    row = Row(3, 8, 1, 2, 64, (1, 1), BN=64)
    steps = held(row, f32, "tf32", "rows", Config(32, 64, 8, num_warps=1))
    assert dict(steps[0].constants)["AT_ONCE"] == 32 * 32


MORE = [pytest.param(ratio, marks=pytest.mark.slow) for ratio in (1, 10)]


@pytest.mark.parametrize("ratio", [100, *MORE])
def test_the_variance_is_exact_beside_a_large_mean(ratio):
    """Of what the convolution stored."""
    b = Builder("g")
    g = torch.Generator().manual_seed(0)
    drawn = {
        "x": torch.randn(32, 8, 16, 16, generator=g), "w": torch.randn(8, 8, 1, 1, generator=g),
        "b": torch.full((8,), 8**0.5 * ratio), "live": torch.tensor(32, dtype=torch.int32),
    }  # fmt: skip
    types = {k: TensorType(i32 if k == "live" else f32, tuple(t.shape)) for k, t in drawn.items()}
    v = {k: b.input(k, t, "hyper" if k == "live" else "data") for k, t in types.items()}
    z = b.one("conv2d", v["x"], v["w"], v["b"], attrs=attrs("conv2d"))
    how = attrs("batch_norm", affine=False, track=False)
    outs = b.emit("batch_norm", [z, v["live"]], how)
    graph = fuse_statistics(b.build(z, *outs[1:3]), KERNELS, Log())
    storage = drawn | {o.name: torch.full(o.type.shape, float("nan")) for o in graph.returns}
    with forced("conv2d", BM=128):
        plan = make_plan(graph, "interpret")
    assert [s.kernel for s in plan.launches][:2] == ["conv2d_forward", "join_moments"]
    interpret.prepare(plan, storage, poison=True)()
    stored, mean, var = (storage[o.name].double() for o in graph.returns)
    want_var, want = torch.var_mean(stored, (0, 2, 3), correction=0)
    assert relative(mean, want) <= 1e-7
    assert ((var - want_var) / want_var).abs().max() <= 2e-7


class Block(gn.Module):
    """A residual block: its second normalization takes the sum and the relu."""

    def __init__(self):
        self.conv1 = gn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = gn.BatchNorm2d(8)
        self.conv2 = gn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = gn.BatchNorm2d(8)
        self.fc = gn.Linear(8, 3)

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = (self.bn2(self.conv2(y)) + x).relu()
        return self.fc(y.mean((2, 3)))


def lowered(target="interpret", **how):
    torch.manual_seed(0)
    return lower(
        Block(), (4, 8, 4, 4), target=target, loss=gn.CrossEntropyLoss(),
        optimizer=gn.SGD(lr=0.1), **how,
    )  # fmt: skip


def test_a_residual_block_reads_each_result_once(monkeypatch):
    """Two launches fewer; the convolutions' bytes grow by the parts alone."""
    now = lowered()
    kernels = [s.kernel for s in now.plan.parts]
    assert "statistics" not in kernels and kernels.count("join_moments") == 2
    monkeypatch.setenv("GRAPHNET_DISABLE", "fuse_statistics")
    before = lowered()
    assert [s.kernel for s in before.plan.parts].count("statistics") == 2
    image = 4 * 4 * 8 * 16
    moved = [sum(s.bytes for s in low.plan.parts) for low in (before, now)]
    parts = [n for s in now.plan.parts for k, n in s.scratch if "moments" in k]
    assert len(parts) == 2 and moved[0] - moved[1] >= 2 * image - 2 * sum(parts)


def test_a_kernel_that_keeps_none_is_named():
    with forced("conv2d", variant="gluon_rows"):
        low = lowered("cuda", precision="bf16")
    assert [s.kernel for s in low.plan.parts].count("statistics") == 2
    said = [why for (rule, _), why in low.stages.log.refusals.items() if "batch_norm" in rule]
    assert "gluon_rows keeps no moments of its result" in said


def tried(model, batch, precision, every):
    """(configuration, launch with the statistics, the same without) of a model's convolutions."""
    net = gn.models.get(model)
    low = lower(
        net, (batch, *net.input_shape), target="cuda", precision=precision,
        loss=gn.CrossEntropyLoss(), optimizer=gn.SGD(lr=0.1),
    )  # fmt: skip
    kernels, seen = kernels_for("cuda"), set()
    for e in low.plan.graph.eqns:
        work = take_apart(e, lambda v: v.name)
        if work.then is None:
            continue
        chosen = kernels.choose(work)
        cases = [(chosen.variant, chosen.config)]
        if every:
            cases += [(v, c) for v in kernels.able(work)[0] if v.moments
                      for c in v.configs(work.problem)]  # fmt: skip
        for v, c in cases:
            (s,) = v.launch(work, c)
            key = s.kernel, s.constants, s.num_warps, s.num_stages
            if key not in seen:
                seen.add(key)
                yield c, s


def holds(found):
    binaries = compile_launches([s for _, s in found])[0]
    for (c, s), (_, about) in zip(found, binaries, strict=True):
        assert about["spill_bytes"] == 0 == about["float_atomics"], (s, c, about)


def test_it_compiles_for_sm_90_without_spills():
    """A layer of resnet20; the soak compiles every configuration of resnet18's."""
    holds(list(tried("resnet20", 128, "bf16", every=False))[1:2])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_every_configuration_compiles_without_spills(precision):
    holds(list(tried("resnet18", 128, precision, every=True)))
