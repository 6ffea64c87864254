"""Data parallelism: collectives in the graph and in plans, and three gloo processes against one."""

import pytest
import torch
import torch.distributed as dist

import graphnet as gn
from graphnet.api import build, lower
from graphnet.errors import ConfigError, GraphnetError, ShapeError
from graphnet.ir.graph import Builder
from graphnet.ir.op import get_op
from graphnet.ir.text import parse
from graphnet.ir.types import TensorType, f32, i64
from graphnet.lowering.launch.steps import Collective, Launch
from graphnet.ops.collective import exchanging
from graphnet.passes import autodiff
from graphnet.passes.dce import cse, dce
from graphnet.passes.rewrite import order
from tests import ranks, towers

TEXT = """graph g.joint(%x: f32[4] data, %y: f32[4] data) {
  %0: f32[4] = all_reduce(%x) {ranks=2}
  %1: f32[4] = all_reduce(%x) {ranks=2}
  %2: f32[4] = relu(%y)
  %3: f32[8] = all_gather(%y) {ranks=2}
  return %2
}
"""


def lowered(target="cpu", n=2, **how):
    how = {"loss": gn.CrossEntropyLoss(), "optimizer": gn.SGD(lr=0.1, momentum=0.9), **how}
    return lower(ranks.small(), (4, 3, 16, 16), target=target, ranks=n, **how)


def joined(graph):
    return [e for e in graph.eqns if get_op(e.op).effect == "collective"]


def test_no_pass_shares_drops_or_reorders_a_collective():
    graph = parse(TEXT)
    kept = ["all_reduce", "all_reduce", "relu", "all_gather"]
    assert [e.op for e in dce(cse(graph)).eqns] == kept
    # What waits for a collective makes those behind it wait, too.
    needs = Builder("g")
    x = needs.input("x", TensorType(f32, (4,)))
    y = needs.one("relu", x)
    needs.one("all_reduce", y)
    needs.one("all_reduce", x)
    made = needs.build(y)
    back = order([made.eqns[1], made.eqns[2], made.eqns[0]], made)
    assert back == made.eqns
    assert parse(str(graph)) == graph


def test_references_over_ranks():
    held = [torch.arange(4.0), 10 * torch.arange(4.0)]
    a = lambda op, **k: get_op(op).attrs_type(ranks=2, **k)
    for rank in range(2):
        with exchanging(lambda t: held, rank):
            (total,) = get_op("all_reduce").reference(a("all_reduce"), held[rank])
            assert total.tolist() == [0, 11, 22, 33]
            (all_,) = get_op("all_gather").reference(a("all_gather"), held[rank])
            assert torch.equal(all_, torch.cat(held))
            (part,) = get_op("reduce_scatter").reference(a("reduce_scatter"), held[rank])
            assert part.tolist() == [[0, 11], [22, 33]][rank]
    with pytest.raises(GraphnetError, match="run by one process"):
        get_op("all_reduce").reference(a("all_reduce"), held[0])


@pytest.mark.parametrize(
    ("op", "fields", "ins", "words"),
    [
        ("all_reduce", {}, (), "nothing"),
        ("all_reduce", {}, (TensorType(i64, (2,)),), "floats"),
        ("all_gather", {"axis": 1}, (TensorType(f32, (2,)),), "axis 1"),
        ("reduce_scatter", {"ranks": 3}, (TensorType(f32, (4,)),), "3 equal parts"),
    ],
)
def test_what_collectives_refuse(op, fields, ins, words):
    with pytest.raises(ShapeError, match=words):
        get_op(op).infer(get_op(op).attrs_type(**fields), *ins)


def test_gradients_are_summed_in_the_order_in_which_they_arise(monkeypatch):
    monkeypatch.setattr(autodiff, "BUCKET", 4000)
    low = lowered()
    found = joined(low.stages.fused)
    assert len(found) > 2
    made = {v: k for k, e in enumerate(low.stages.joint.eqns) for v in e.results}
    last = [max(made[v] for v in e.inputs) for e in joined(low.stages.joint)]
    assert last == sorted(last)
    # Each stands right behind its last gradient, so that the rest of backward runs beside it.
    assert [made[e.out] for e in joined(low.stages.joint)][0] < max(last)
    sizes = [sum(v.type.bytes for v in e.inputs) for e in found]
    assert all(s <= 4004 or len(e.inputs) == 1 for s, e in zip(sizes, found, strict=True))


def test_the_update_is_refused_a_place_in_the_weight_gradient():
    low = lowered()
    why = [w for (rule, _), w in low.stages.log.refusals.items() if "all_reduce(g)" in rule]
    assert len(why) == 8 and all("a sum over all ranks" in w for w in why)


def test_gradients_that_travel_in_bf16():
    """Kernels write them so, straight into the bucket, and updates read them so; the loss goes
    alone."""
    low = lowered("interpret", precision="bf16", reduce="bf16")
    loss, *buckets = joined(low.stages.fused)
    assert loss.inputs[0].type == TensorType(f32, ())
    assert buckets and all(v.type.dtype.name == "bf16" for e in buckets for v in e.inputs)
    assert not [e for e in low.stages.fused.eqns if e.op == "cast" and e.out.type.dtype == f32]
    plain = lowered("interpret", precision="bf16")
    moved = lambda n: sum(s.bytes for s in n.plan.launches)
    size = sum(v.type.bytes for e in buckets for v in e.inputs)
    assert moved(plain) - moved(low) == 2 * size  # written and read at half the size
    for c in low.plan.collectives[1:]:
        assert c.bucket and c.reads == c.writes
    with pytest.raises(ConfigError, match="precision tf32 keeps in fp32"):
        build(ranks.small(), (4, 3, 16, 16), ranks=2, reduce="bf16", loss=gn.CrossEntropyLoss(),
              optimizer=gn.SGD(lr=0.1))  # fmt: skip
    with pytest.raises(ConfigError, match="None .fp32. or 'bf16', not 'fp16'"):
        lowered(precision="bf16", reduce="fp16")


def test_a_plan_writes_gradients_straight_into_buckets(monkeypatch):
    monkeypatch.setattr(autodiff, "BUCKET", 4000)
    plan = lowered("interpret").plan
    assert len(plan.collectives) > 2
    for c in plan.collectives:
        if len(c.outs) > 1:
            own = plan.arena[c.bucket]
            assert c.reads == c.writes  # in place
            assert all(own.offset <= plan.arena[n].offset < plan.arena[n].end <= own.end
                       for n in c.writes)  # fmt: skip
            assert sum(plan.arena[n].size for n in c.writes) == own.size
    at = [k for k, s in enumerate(plan.steps) if isinstance(s, Collective)]
    chain = set(plan.edges)
    assert all(pair in chain for pair in zip(at, at[1:], strict=False))


def test_what_reads_a_gradient_reads_it_before_it_is_summed():
    """The gradient of a batch norm's image is made of those of its weight and bias."""
    net = gn.Sequential(
        gn.Conv2d(3, 4, 3), gn.BatchNorm2d(4), gn.ReLU(), gn.Conv2d(4, 4, 3), gn.BatchNorm2d(4),
        gn.Flatten(), gn.Linear(4 * 16, 10),
    )  # fmt: skip
    how = {"loss": gn.CrossEntropyLoss(), "optimizer": gn.SGD(lr=0.1), "target": "interpret"}
    plan = lower(net, (4, 3, 8, 8), ranks=2, **how).plan
    (at,) = (k for k, s in enumerate(plan.steps) if isinstance(s, Collective))
    own = {k for k, s in enumerate(plan.steps)
           if isinstance(s, Launch) and any(m.kernel == "batch_norm_grad" for m in s.parts)}
    assert len(own) == 2 and all((k, at) in plan.edges and k < at for k in own)


def test_messages_travel_beside_the_rest_of_backward(monkeypatch):
    """A wide gradient is made before the convolutions behind it; updates wait until the end."""
    monkeypatch.setattr(autodiff, "BUCKET", 4000)
    plan = lowered("cuda").plan
    at = {k: s for k, s in enumerate(plan.steps)}
    sums = [k for k, s in at.items() if isinstance(s, Collective)]
    wgrad = [k for k, s in at.items() if isinstance(s, Launch)
             and any(m.kernel == "linear_wgrad" for m in s.parts)]  # fmt: skip
    conv = [k for k, s in at.items() if isinstance(s, Launch)
            and any("wgrad" in m.kernel and "conv" in m.kernel for m in s.parts)]  # fmt: skip
    assert wgrad and conv and max(wgrad) < min(conv) and sums[0] < min(conv)
    updates = [k for k, s in at.items() if isinstance(s, Launch)
               and any(w in plan.storage for w in s.writes) and k > sums[0]]  # fmt: skip
    assert updates and min(updates) > max(sums)
    assert all(plan.streams[k] == 0 for k in updates)


def test_segments_between_collectives(monkeypatch):
    from graphnet.lowering.targets.cuda_ranks import segments_of

    monkeypatch.setattr(autodiff, "BUCKET", 4000)
    plan = lowered("cuda").plan
    parts = segments_of(plan)
    assert [k for _, _, steps in parts for k in steps] == list(range(len(plan.steps)))
    alone = [steps for together, _, steps in parts if together]
    assert [s for (s,) in alone] == [
        k for k, s in enumerate(plan.steps) if isinstance(s, Collective)
    ]
    # Whatever stands behind a collective by an edge comes in or behind a part that waits.
    waited: set[int] = set()
    running: set[int] = set()
    for together, waits, steps in parts:
        if together:
            running |= set(steps)
            continue
        if waits:
            waited |= running
        for a, b in plan.edges:
            assert b not in steps or a not in running or a in waited
    assert any(waits for _, waits, _ in parts)


def test_ranks_and_groups_that_cannot_be():
    net, loss = ranks.lenet(), gn.CrossEntropyLoss()
    with pytest.raises(ConfigError, match="training step"):
        lower(net, (2, 1, 28, 28), loss=loss, ranks=2)
    with pytest.raises(ConfigError, match="without an initialised process group"):
        gn.compile(net, (2, 1, 28, 28), loss=loss, optimizer=gn.SGD(lr=0.1), group="world")
    with pytest.raises(ConfigError, match="no process group"):
        gn.compile(net, (2, 1, 28, 28), loss=loss, optimizer=gn.SGD(lr=0.1), group=2)
    with pytest.raises(ConfigError, match="positive int"):
        build(net, (2, 1, 28, 28), ranks=0)


BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


# ---- three processes -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    return ranks.run()


def apart(got, want):
    """The largest relative norm of a difference between parameters."""
    return max(float((v - want[k]).float().norm() / v.float().norm()) for k, v in got.items())


@pytest.mark.parametrize(
    ("key", "name", "steps", "rows", "how"),
    [
        ("small 3", "small", 6, 7, {}),
        ("small 3 clip", "small", 6, 7, {"clip_norm": 0.5, "accumulate": 2}),
        ("tiny 3 interpret", "tiny", 3, 4, {"target": "interpret"}),
        ("lenet 2", "lenet", 6, 7, {}),
        ("norm 3", "norm", 20, 13, {}),
        ("norm 3 accumulate", "norm", 4, 13, {"accumulate": 2}),
        ("norm 3 interpret", "one norm", 3, 4, {"target": "interpret"}),
    ],
)
def test_several_ranks_are_one_process(found, key, name, steps, rows, how):
    want = ranks.trained(name, None, steps, rows, **how)
    got = [f[key] for f in found if key in f]
    assert got[0]["losses"] == pytest.approx(want["losses"], rel=1e-5)
    assert apart(got[0]["params"], want["params"]) < (1e-6 if steps < 20 else 1e-5)
    for other in got[1:]:
        assert other["losses"] == got[0]["losses"]
        assert all(torch.equal(v, other["params"][k]) for k, v in got[0]["params"].items())


def test_two_towers_are_one_process(found):
    """With the gradients of two calls in a step, clipped; and in the interpreter."""
    for key, want in [
        ("towers", towers.results(None, clip_norm=0.5, accumulate=2)),
        ("towers interpret", towers.results(None, towers.tiny, (2, 6, 6))),
    ]:
        for f in found[:2]:
            distance = towers.worst(f[key], want)
            assert all(d < 1e-5 for d in distance.values()), (key, distance)


@pytest.mark.parametrize("fault", ranks.FAULTS)
def test_planted_faults_are_found(found, fault):
    want = ranks.trained("small", None, 3, 7)["params"]
    got = [f[fault]["params"] for f in found]
    agree = all(torch.equal(v, o[k]) for o in got[1:] for k, v in got[0].items())
    assert not agree or apart(got[0], want) > 1e-4


def test_gradients_and_loss_are_those_of_all(found):
    with torch.no_grad():
        _, step = ranks.compiled("lenet", None, 6, "cpu", optimizer=None, grads=True)
        loss, want = step(*ranks.batches("lenet", 1, 6)[0])
    for f in found:
        assert f["grads"]["loss"] == pytest.approx(float(loss), rel=1e-6)
        assert apart(f["grads"]["grads"], want) < 2e-6


def test_sums_in_bf16_are_near_those_in_fp32(found):
    exact = found[0]["bf16"]["params"]
    alone = ranks.trained("tiny", None, 1, 4, "interpret", precision="bf16")["params"]
    for key, want in (("bf16 reduced", exact), ("bf16 reduced interpret", alone)):
        got = found[0][key]["params"]
        assert 1e-7 < apart(got, want) < 1e-3, key
        for f in found[1:]:
            assert all(torch.equal(v, f[key]["params"][k]) for k, v in got.items())


def test_a_nan_of_one_rank_stops_all(found):
    for f in found:
        assert f["nan"]["unchanged"] and "NumericsError" in f["nan"]["error"]


def test_bound_data_are_shared_out(found):
    want = ranks.bound(None)
    for f in found:
        assert f["bound"] == pytest.approx(want, rel=1e-6)


def test_ranks_that_differ_are_named(found):
    for f in found:
        assert "the input shape is (2, 1, 28, 28) on rank 0 and (3, 1, 28, 28)" in f["shapes"]
        assert "the seed is 0 on rank 0 and 1 on rank 1" in f["seeds"]
        assert "the net is" in f["nets"]


def test_ddp_of_torch(found):
    for f in found[:2]:
        assert max(f["ddp"].values()) < 1e-5


@pytest.mark.parametrize("key", ["ddp norm", "ddp norm interpret"])
def test_statistics_of_a_rank_are_those_of_ddp(found, key):
    """The running ones, too: DDP gives all ranks those of rank 0."""
    for rank, f in enumerate(found[:2]):
        own = {k: v for k, v in f[key].items() if not rank or k.split(".")[1] not in BUFFERS}
        assert max(own.values()) < 1e-5


def test_a_trainer_joins_statistics(found):
    """Each rank evaluates by the running statistics that it has, which are those of all."""
    want = ranks.fitted(None)
    for f in found:
        assert apart(f["fitted"]["params"], want["params"]) < 1e-5
        for got, one in zip(f["fitted"]["history"], want["history"], strict=True):
            assert got == pytest.approx(one, rel=1e-5)


def test_a_rank_without_rows_changes_nothing(found):
    """By the statistics of each rank: the others' step is theirs, its running ones stay."""
    want = found[0]["norm 2"]["params"]
    for rank, f in enumerate(found):
        got = f["norm 3 of 2"]["params"]
        kept = {k for k in got if k.split(".")[1] in BUFFERS}
        assert len(kept) == 6
        assert apart({k: v for k, v in got.items() if k not in kept or not rank}, want) < 1e-6
        if rank == 2:
            before = f["norm 3 of 2"]["before"]
            assert all(torch.equal(got[k], before[k]) for k in kept)
