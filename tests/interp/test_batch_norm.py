"""Batch normalization's kernels: in whole steps, at the edges of their tiles, and how exact."""

import pytest
import torch

import graphnet as gn
from graphnet.ir.graph import Builder
from graphnet.ir.op import get_op
from graphnet.lowering.launch.choice import forced
from graphnet.lowering.plan.plan import make_plan
from graphnet.lowering.targets import interpret
from tests.case import Case, attrs, f, fill
from tests.cases_norm import _COUNT, _LIVE, _drawn
from tests.null.test_batch_norm import batch, blocks, compare, off, trained
from tests.poisoned import graph_of, run

pytestmark = pytest.mark.usefixtures("own_cache")


SMALL = (4, 3, 4, 4)


def test_steps_are_torchs():
    mine, theirs = trained("interpret", rows=(4, 3), size=4, small=True)
    compare(mine, theirs)
    x, _ = batch(3, 9, 4)
    want = theirs.eval()(x.double()).detach()
    assert off(gn.compile(mine, SMALL, target="interpret")(x), want) <= 1e-5


@pytest.mark.slow
def test_steps_of_two_blocks_are_torchs():
    compare(*trained("interpret"))


def stepped(target, rows=4, **how):
    """State and graph of a small net after one step."""
    torch.manual_seed(3)
    net = blocks(gn, small=True)
    step = gn.compile(
        net, SMALL, target=target, loss=gn.CrossEntropyLoss(), optimizer=gn.SGD(lr=0.05), **how
    )
    step(*batch(rows, 0, 4))
    return net.state_dict(), step.graph("fused")


def test_bf16_keeps_statistics_in_fp32():
    one, _ = stepped("cpu", precision="bf16")
    two, graph = stepped("interpret", precision="bf16")
    kept = [i.value.type.dtype.name for i in graph.inputs if i.role == "buffer"]
    assert kept and set(kept) <= {"f32", "i64"}
    assert all(off(v, two[k].double()) < 0.02 for k, v in one.items() if "running" in k)


@pytest.mark.slow
def test_statistics_have_the_same_bits_every_time():
    (one, _), (two, _) = stepped("interpret", 3), stepped("interpret", 3)
    assert all(torch.equal(v, two[k]) for k, v in one.items())


@pytest.mark.parametrize("layout", ["nhwc", "row"])
@pytest.mark.parametrize("shape", [(1, 1, 2, 1), (2, 3, 3, 5), (3, 17, 4, 3)])
def test_many_parts_at_the_edges(shape, layout):
    """Tiles of 64 elements: several a program, parts without a row, half tiles."""
    c = f(shape[1])
    track = (c, c, c, c, _COUNT)
    back = (f(*shape), f(*shape), c, c, _LIVE, c)
    with forced("batch_norm", "batch_norm_grad", BLOCK=64, SPLIT=3):
        for op, ins in (("batch_norm", (f(*shape), _LIVE, *track)), ("batch_norm_grad", back)):
            for note in ("", "dead") if shape[0] > 1 else ("",):
                case = Case(op, ins, torch.clone, attrs(op), note)
                graph = graph_of(case) if layout == "row" else in_layout(case)
                run(graph, _drawn(case, torch.Generator().manual_seed(1), torch.float32))


def test_a_batch_without_rows():
    """The kernels agree with the reference: finite results, statistics as they were."""
    c, image = f(5), f(2, 5, 3, 3)
    for op, ins in (
        ("batch_norm", (image, _LIVE, c, c, c, c, _COUNT)),
        ("batch_norm_grad", (image, image, c, c, _LIVE, c)),
    ):
        case = Case(op, ins, torch.clone, attrs(op), "none")
        args = [fill(t, torch.Generator().manual_seed(k), torch.float32).abs() if t.dtype.is_float
                else torch.tensor(5 if t == _COUNT else 0).to(t.dtype.torch)
                for k, t in enumerate(ins)]  # fmt: skip
        run(graph_of(case), args)


def in_layout(case):
    """The case over images that lie channels-last, made so by a relayout."""
    b = Builder("g")
    given = [b.input(f"i{k}", t) for k, t in enumerate(case.ins)]
    to = get_op("relayout").attrs_type(layout="nhwc")
    ins = [b.one("relayout", v, attrs=to) if len(v.type.shape) == 4 else v for v in given]
    outs = b.emit(case.op, ins, case.attrs)
    return b.build(*(b.one("relu", v) if len(v.type.shape) == 4 else v for v in outs))


@pytest.mark.parametrize("ratio", [1, 10, 100])
def test_the_variance_is_exact_beside_a_large_mean(ratio):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(16, 4, 16, 16, generator=g) + ratio
    b = Builder("g")
    v = b.input("x", f(*x.shape))
    live = b.input("live", _LIVE, "hyper")
    outs = b.emit("batch_norm", [v, live], attrs("batch_norm", affine=False, track=False))
    graph = b.build(*outs[1:3])
    storage = {"x": x, "live": torch.tensor(16, dtype=torch.int32)}
    storage |= {o.name: torch.full((4,), float("nan")) for o in graph.returns}
    with forced("batch_norm", BLOCK=256, SPLIT=12):
        interpret.prepare(make_plan(graph, "interpret"), storage, poison=True)()
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert off(storage[graph.returns[0].name], mean) <= 1e-7
    assert off(storage[graph.returns[1].name], var) <= 2e-7
