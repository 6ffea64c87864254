"""Boxes of images, one pixel or two: right beside the float64 oracle over memory filled with NaN,
and on sm_90 fed by the copy engine without a spill."""

from math import prod

import pytest
import torch

import graphnet as gn
from graphnet.api import lower
from graphnet.ir.graph import Builder
from graphnet.ir.types import TensorType, bf16, f32
from graphnet.lowering.build.build import compile_launches
from graphnet.lowering.launch.choice import forced
from graphnet.lowering.launch.config import SHARED_BYTES, Config
from graphnet.lowering.launch.conv_rows import Pairs, Rows
from graphnet.lowering.launch.work import take_apart
from graphnet.lowering.targets.interpret import interpreted
from graphnet.lowering.tune.alone import Alone
from tests.case import attrs
from tests.convs import Row, hold
from tests.twin import relative

pytestmark = pytest.mark.usefixtures("own_cache", "single_kernels")

VARIANTS = (Rows(), Pairs())
OPS = Rows.ops
CASES = [
    Row(3, 24, 3, 3, 24, (3, 2), padding=(1, 1), note="blocks cross taps, columns past the last"),
    Row(18, 16, 2, 3, 16, (1, 1), note="images past the last tile"),
    Row(2, 16, 2, 3, 16, (5, 5), padding=(2, 2), note="more taps than pixels"),
    Row(2, 40, 2, 2, 40, (2, 1), note="two accumulators past the last column", BN=32, BT=16),
    Row(3, 48, 2, 3, 48, (2, 2), padding=(1, 0), groups=2, note="groups inside no block"),
    Row(2, 16, 2, 2, 16, (1, 1), padding=(1, 2), note="pixels that no tap reaches"),
    Row(2, 24, 4, 3, 16, (3, 2), stride=2, padding=(1, 0), note="stride"),
    Row(2, 24, 3, 3, 24, (2, 2), padding=(1, 1), dilation=2, note="dilation"),
]


@pytest.mark.parametrize("row", CASES, ids=lambda r: r.note.replace(" ", "-"))
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_every_boundary_is_the_oracle(variant, row):
    """Forward with its bias, and the input gradient."""
    for op in set(OPS) & set(row.ops(variant.name)):
        assert hold(op, row, f32, variant.name, BM=16 * variant.pixels) == variant.name
    if "conv2d_dgrad" in row.ops(variant.name):  # TF32 reads the filters from a copy
        given = {"math": "tf32", "filters": "hwcn", "BM": 16 * variant.pixels}
        assert hold("conv2d_dgrad", row, f32, variant.name, **given) == variant.name


def result(alone, variant, work, tile):
    """Runs one tile against the oracle; the bits of what it wrote."""
    run, tensor = alone.prepare(variant.launch(work, tile))
    with interpreted():
        verdict = alone.verdict(run, tensor)
    assert verdict is None, (variant.name, tile, verdict)
    return [tensor(work.ref(v)).clone() for v in work.eqn.results]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_the_order_of_the_pixels_changes_no_bit(variant, op):
    row = Row(3, 24, 2, 3, 24, (3, 3), padding=(1, 1))
    graph = row.graph(op, bf16, "bf16")
    (eqn,) = (e for e in graph.eqns if e.op == op)
    work, alone = take_apart(eqn, lambda v: v.name), Alone(graph, eqn, "interpret")
    tiles = [Config(16 * variant.pixels, 32, 16, LPT=lpt) for lpt in (1, 0)]
    tables = [variant.launch(work, t)[0].tables for t in tiles]
    assert [len(t) for t in tables] == [1, 0]
    (a,), (b,) = (result(alone, variant, work, t) for t in tiles)
    assert torch.equal(a, b) and a.isfinite().all()


def blocks(n, c, size, k, taps, b):
    """A first layer: image and filters in blocks of b x b pixels."""
    g = Builder("g")
    shapes = {"x": (n, c, size, size), "w": (k, c, taps, taps)}
    given = [g.input(name, TensorType(f32, shape)) for name, shape in shapes.items()]
    x, w = (g.one("relayout", v, attrs=attrs("relayout", layout=f"s2d{b}")) for v in given)
    row = Row(n, c, size, size, k, (taps, taps), stride=b)
    bias = g.input("b", TensorType(f32, (k,)))
    return g.build(*g.emit("conv2d", [x, w, bias], row.attrs("conv2d", "ieee")))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
@pytest.mark.parametrize("taps", [3, 4, 5])
def test_space_to_depth_is_the_oracle(variant, taps):
    graph = blocks(3, 4, 7, 16, taps, 2)
    work = take_apart(graph.eqns[-1], lambda v: v.name)
    result(Alone(graph, work.eqn, "interpret"), variant, work, Config(16 * variant.pixels, 16, 16))


def takes(variant, work):
    return variant.accepts(work.eqn, work.layouts, work.problem.dtype, 90) is None


def training(net, shape, target, precision="bf16"):
    return lower(
        net, shape, target=target, precision=precision, loss=gn.CrossEntropyLoss(),
        optimizer=gn.SGD(momentum=0.9, weight_decay=5e-4),
    ).stages.fused  # fmt: skip


def works(graph):
    """Each convolution of a graph that boxes can feed, forward or input gradient."""
    for eqn in graph.eqns:
        if any(e.op in OPS for e in (eqn.body.eqns if eqn.body else (eqn,))):
            yield take_apart(eqn, lambda v: v.name)


SHAPE = (3, 4, 8, 8)


def small():
    torch.manual_seed(0)
    return gn.Sequential(
        gn.Conv2d(4, 16, 4, stride=2), gn.ReLU(), gn.Conv2d(16, 24, 3, padding=1), gn.ReLU(),
        gn.Dropout(0.3), gn.Conv2d(24, 16, (2, 3)), gn.ReLU(), gn.Flatten(), gn.Linear(32, 3),
    )  # fmt: skip


def test_every_epilogue_of_a_training_step():
    """Bias and relu, dropout, the mask of the gradient, a result that a flatten reads row-major."""
    graph = training(small(), SHAPE, "interpret")
    held, ops = [], set()
    for work in works(graph):
        alone = Alone(graph, work.eqn, "interpret")
        for variant in VARIANTS:
            if takes(variant, work):
                result(alone, variant, work, Config(BM=16 * variant.pixels, BN=16, BK=16))
                held.append(work.anchor.op)
                ops |= {e.op for e in work.rest}
    # The last gradient reads what the flatten's wrote, row-major.
    assert held == ["conv2d"] * 2 * 3 + ["conv2d_dgrad"] * 2
    assert {"relu", "relu_grad", "dropout"} <= ops


def gradients(target, precision="bf16"):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(SHAPE, generator=g), torch.tensor([0, 2, 1])
    program = gn.compile(
        small(), SHAPE, target=target, precision=precision, loss=gn.CrossEntropyLoss(), grads=True
    )  # fmt: skip
    return *program(x, y), [s.kernel for s in program.plan.launches]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_a_training_step_is_that_of_the_cpu(variant):
    """bf16 rounds differently in every kernel: the cpu target's own error is the measure."""
    tile = {"BM": 16 * variant.pixels, "BN": 16, "BT": 0, "BK": 16}
    with forced(*OPS, variant=variant.name, **tile):
        loss, ours, kernels = gradients("interpret")
    assert kernels.count("conv2d_rows") == 4
    _, theirs, _ = gradients("cpu")
    exact, wanted, _ = gradients("cpu", "fp32")
    assert abs(float(loss) - float(exact)) <= 5e-3
    for key, want in wanted.items():
        want = want.double()
        assert relative(ours[key], want) <= 2 * relative(theirs[key], want) + 2e-3, key


# ---- sm_90 -----------------------------------------------------------------------------------


def launches(model, keep, precision="bf16"):
    """What the first `keep` configurations of AlexNet's convolutions launch where they suit."""
    net = gn.models.get(model)
    for work in works(training(net, (128, *net.input_shape), "cuda", precision)):
        problem = work.problem
        for v in VARIANTS:
            if takes(v, work) and v.suits(problem) is None:
                for c in list(v.configs(problem))[:keep]:
                    yield work, c, v.launch(work, c)[0]


def hold_binaries(found):
    binaries = compile_launches([s for *_, s in found])[0]
    for (_, c, s), (_, binary) in zip(found, binaries, strict=True):
        assert binary["spill_bytes"] == 0 == binary["float_atomics"], (s, c)
        assert binary["shared_bytes"] <= SHARED_BYTES, (s, c)
        # All tiles come by the copy engine: a prologue and the loop fetch each operand.
        boxes = 3 if c.BT else 2
        assert binary["tma"] == boxes * c.num_stages and binary["cp_async"] == 0, (s, c)
        # 64 rows and 32 bytes an instruction; each half of 8 warps has rows or columns of its own.
        depth = {"bf16": 16, "tf32": 8}.get(dict(s.constants)["PRECISION"])
        tiles = max(1, c.BM // 64 // (c.num_warps // 4)) * (2 if c.BT else 1)
        assert binary["wgmma"] == (tiles * c.BK // depth if depth else 0), (s, c)


def test_alexnets_layers_on_sm_90():
    found = list(launches("alexnet", 1))
    assert len(found) == 5 + 4 + 1
    for work, _, s in found:
        out, w = work.anchor.out.type.shape, work.anchor.inputs[1].type.shape
        padded = 2 * out[0] * prod(w) * prod(out[2:])
        if w[2] < 11:
            # Taps beyond the border are left out; pairs multiply 128 columns for 96.
            pairs = dict(s.constants)["PIXELS"] == 2
            assert s.padded < padded * (1.3 if pairs else 1), s
    hold_binaries(found)


@pytest.mark.parametrize("precision", ["tf32", "fp32"])
def test_a_layer_of_fp32_operands_on_sm_90(precision):
    found = [f for f in launches("alexnet", 1, precision) if "conv2" in f[0].eqn.where.layers]
    assert len(found) == 2
    hold_binaries(found)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["tf32", "fp32"])
def test_every_configuration_of_fp32_operands_on_sm_90(precision):
    hold_binaries(list(launches("alexnet", 99, precision)))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["alexnet", "alexnet_2012", "caffenet", "alexnet_owt"])
def test_every_configuration_of_every_variant_on_sm_90(model):
    hold_binaries(list(launches(model, 99)))
