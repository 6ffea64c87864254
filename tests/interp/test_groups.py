"""Small launches that need nothing of each other run as one: which, where, and to the same bits."""

from dataclasses import replace

import pytest
import torch

import graphnet as gn
from graphnet import config
from graphnet.api import lower
from graphnet.ir.graph import Where
from graphnet.ir.text import parse
from graphnet.lowering.build.build import compile_launches
from graphnet.lowering.launch.codegen import Ref
from graphnet.lowering.launch.group import group, outside
from graphnet.lowering.launch.steps import Copy, Launch, make
from graphnet.lowering.plan import groups
from graphnet.lowering.plan.plan import make_plan
from graphnet.lowering.tune import proof

REGIONS = "in_stages,row_blocks"  # left out here: they leave little to group
HOW = {
    "loss": gn.CrossEntropyLoss(),
    "optimizer": gn.SGD(lr=0.1, momentum=0.9, weight_decay=5e-4),
}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with config.override(CACHE_DIR=str(tmp_path_factory.mktemp("cache")), DISABLE=REGIONS):
        yield


def net():
    return gn.Sequential(
        gn.Conv2d(2, 3, 3), gn.ReLU(), gn.Flatten(), gn.Linear(3 * 4 * 4, 17), gn.ReLU(),
        gn.Linear(17, 5),
    )  # fmt: skip


def lowered(target="interpret", **more):
    how = {"precision": "fp32", "nonfinite": None, **HOW, **more}
    return lower(net(), (6, 2, 6, 6), target=target, **how)


def the_group(low):
    """The last one: updates, which nothing waits for."""
    return [s for s in low.plan.launches if s.members][-1]


def shared_out(*launches):
    """The numbers of launches at one distance, by groups."""
    units = {k: groups.Unit((k,), (s,)) for k, s in enumerate(launches)}
    return list(groups._shared_out(units, [0] * len(launches)))


# ---- which -----------------------------------------------------------------------------------


def step(name, reads, writes, programs=2, **more):
    """A launch that adds; only its edges matter."""
    made = make("mean_reduce", "reduce", (), {}, (programs,), reads=reads, writes=writes,
                where=Where((name,)), **more)  # fmt: skip
    return replace(made, kernel="mean_reduce")


def grouped(monkeypatch, steps, edges):
    """Layers of each launch, groups as sets, and those that take turns as one word."""
    word = lambda turn: "".join(m.where.layers[0] for m in turn)
    monkeypatch.setattr(groups, "group", lambda turns: tuple(map(word, turns)))
    made, moved, alone = groups.grouped(steps, edges)
    names = [set(s) if isinstance(s, tuple) else s.where.layers[0] for s in made]
    return names, moved, {s.where.layers[0]: why for s, why in alone}


def test_what_a_path_connects_is_not_joined(monkeypatch):
    """a -> b -> c and d: d may run beside any of them and takes the last place; the others are a
    chain by data and by a read before a write."""
    steps = [step("a", ("x",), ("y",)), step("b", ("y",), ("z",)), step("d", ("x",), ("w",)),
             step("c", ("z",), ("v",))]  # fmt: skip
    names, moved, alone = grouped(monkeypatch, steps, {(0, 1), (1, 3)})
    assert names == ["a", "b", {"d", "c"}] and moved == {(0, 1), (1, 2)}
    assert alone == dict.fromkeys("ab", "nothing small may run at the same time")


def test_single_programs_take_turns(monkeypatch):
    """a -> b -> c in one program; not b and c where c also waits for d, which a does not need."""
    chain = [step(to, (of,), (to,), 1) for of, to in ("xa", "ab", "bc")]
    names, moved, _ = grouped(monkeypatch, chain, {(0, 1), (1, 2)})
    assert names == [{"abc"}] and not moved
    chain.append(step("d", ("x",), ("w",)))
    names, _, _ = grouped(monkeypatch, chain, {(0, 1), (1, 2), (3, 2)})
    assert names == [{"ab", "d"}, "c"]
    # Another path leads from a to c: they cannot be one, and b is no single program.
    names, moved, _ = grouped(monkeypatch, [chain[0], chain[3], chain[2]], {(0, 1), (1, 2), (0, 2)})
    assert names == ["a", "d", "c"] and moved == {(0, 1), (1, 2), (0, 2)}


def test_no_circle_through_what_stays_outside(monkeypatch):
    """a -> B -> c and d -> b, and B is large: d finds nobody at its distance and goes before it."""
    big = replace(step("B", ("y",), ("z",)), bytes=1 << 40)
    steps = [step("a", ("x",), ("y",)), big, step("c", ("z",), ("u",)),
             step("d", ("x",), ("w",)), step("b", ("w",), ("v",))]  # fmt: skip
    names, moved, _ = grouped(monkeypatch, steps, {(0, 1), (1, 2), (3, 4)})
    assert names == [{"a", "d"}, "B", {"c", "b"}] and moved == {(0, 1), (1, 2), (0, 2)}


def test_a_planted_dependency_keeps_an_update_out():
    """The input gradient of a layer reads the weight that the layer's update writes over."""
    low = lowered()
    joined = the_group(low)
    read = {r for s in low.plan.parts if s.kernel == "linear_product" for r in s.reads}
    assert {"3.weight", "5.weight"} <= read
    before = [k for k, s in enumerate(low.plan.steps) if "5.weight" in s.reads and s != joined]
    at = low.plan.steps.index(joined)
    assert before and all((k, at) in low.plan.edges or k < at for k in before)
    # What reads an update's result cannot run beside it.
    new = next(new for old, new in low.stages.fused.commits if old.name == "5.weight")
    text = str(low.stages.fused).replace("  return %", "  return %late, %")
    text = text.replace("  commit %", f"  %late: f32[5,17] = relu({new})\n  commit %")
    for s in make_plan(parse(text), "interpret").launches:
        assert len({"late", new.name} & set(s.writes)) < 2
    assert new.name in joined.writes


def test_only_small_launches_pay():
    low = lowered()
    assert all(groups.small(m) for m in the_group(low).members)
    first = low.plan.parts[0]
    assert groups.small(first) and not groups.small(replace(first, bytes=1 << 30))
    assert not groups.small(replace(first, grid=(10_000, 1, 1)))
    assert not groups.small(Copy("a", "b"))


def test_warps_agree_or_are_those_of_one_program():
    record = next(m for m in the_group(lowered()).members if m.kernel == "record_step")
    four, eight = (replace(record, grid=(2, 1, 1), num_warps=w) for w in (4, 8))
    assert record.num_warps == 1 and group([[record], [four]]).num_warps == 4
    assert shared_out(four, eight, record, four) == [[0, 2, 3], [1]]


def test_what_updates_wait_for_meets_others_further_from_the_end():
    """The record of the loss tells the updates of a guarded step whether it is finite."""
    low = lowered(nonfinite="auto")
    joined = [s for s in low.plan.launches if s.members]
    first = next(s for s in joined if "record_step" in [m.kernel for m in s.members])
    assert len(joined) == 2 and first is joined[0]
    go = next(w for w in first.writes if w in joined[1].reads)
    assert go


def test_a_large_level_is_several_groups():
    record = next(m for m in the_group(lowered()).members if m.kernel == "record_step")
    sizes = [len(s) for s in shared_out(*[record] * (2 * groups.MOST + 1))]
    assert sum(sizes) == 2 * groups.MOST + 1 and max(sizes) <= groups.MOST and min(sizes) > 1


def test_what_takes_no_place_and_what_is_a_group_stays_out():
    joined = the_group(lowered())
    assert "group itself" in outside(joined)
    assert all(outside(m) is None for m in joined.members)
    conv = lowered().plan.launches[0]
    assert conv.kernel == "conv2d_forward" and "AT" in outside(conv)


def test_it_can_be_left_out_and_why_says_so():
    from graphnet.report import why_text

    with config.override(DISABLE=f"groups,{REGIONS}"):
        low = lowered()
    assert not [s for s in low.plan.launches if s.members]
    assert "names groups" in why_text(low)
    assert "nothing small may run at the same time" in why_text(lowered())


# ---- what it leaves --------------------------------------------------------------------------


def trained(steps=2, **flags):
    """(losses, state, kernels) of a step whose arena is full of NaN."""
    torch.manual_seed(3)
    model = net()
    with config.override(**flags):
        program = gn.compile(model, (6, 2, 6, 6), target="interpret", precision="fp32", **HOW)
        from graphnet.lowering.targets import interpret

        program._run = interpret.prepare(program.plan, program._storage, poison=True)
        draw = torch.Generator().manual_seed(1)
        losses = []
        for rows in (6, 4)[:steps]:
            x = torch.randn(rows, 2, 6, 6, generator=draw)
            losses.append(float(program(x, torch.randint(0, 5, (rows,), generator=draw))))
    return losses, model.state_dict(), program.plan.launches


def test_the_bits_are_those_of_launches_of_their_own():
    losses, state, made = trained()
    apart, want, single = trained(DISABLE=f"groups,{REGIONS}")
    assert len(made) < len(single) and losses == apart
    assert all(torch.equal(state[k], want[k]) for k in want)
    checked, state, _ = trained(CHECK="1")
    assert checked == apart and all(torch.equal(state[k], want[k]) for k in want)


def test_operands_that_another_member_reads_are_not_written_over():
    """Two members read a dying tensor; one may replace it at the same index, were it alone."""
    x = Ref("x", "f32")
    a = Launch("elementwise", "graphnet.kernels.elementwise", ((x, Ref("y", "f32")),), (),
               (1, 1, 1), ("x",), ("y",), inplace=(("x", "y"),))  # fmt: skip
    b = replace(a, args=((x, Ref("z", "f32")),), writes=("z",), inplace=(("x", "z"),))
    assert a.inplace
    constants = {"D0": 4, "D1": 1, "D2": 1, "D3": 1, "NHWC": False, "BLOCK": 16, "EPILOGUE": 0}
    a, b = (replace(s, constants=tuple(constants.items())) for s in (a, b))
    assert group([[a], [b]]).inplace == ()


def test_a_group_is_proven_as_it_runs(monkeypatch):
    low = lowered()
    units = list(proof.together(low))
    assert units[-1][1][-1].driver == the_group(low).driver  # the binary of the plan
    assert {"linear_wgrad", "record_step"} < {p.op for u, _ in units for e in u for p in e.plain}
    for eqns, steps in units:
        assert proof.checked(low.plan, proof.joined(eqns), steps) is None
    monkeypatch.setattr(proof.torch.cuda, "get_device_name", lambda: "NVIDIA Abacus")
    assert proof._wrong(low) == {}
    real = proof.group
    lame = lambda turns: real([[replace(turns[0][0], grid=(0, 1, 1))], *turns[1:]])
    monkeypatch.setattr(proof, "group", lame)
    with pytest.raises(gn.NumericsError, match="each of which is right alone") as e:
        proof._wrong(low)
    assert "GRAPHNET_DISABLE=groups" in e.value.help


# ---- for a GPU -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "precision", ["tf32", *(pytest.param(p, marks=pytest.mark.slow) for p in ("fp32", "bf16"))]
)
def test_a_group_compiles_without_spills(precision):
    low = lower(gn.models.lenet5(), (128, 1, 28, 28), target="cuda", precision=precision, **HOW)
    joined = [s for s in low.plan.launches if s.members]
    assert joined
    found, _ = compile_launches(joined)
    for _, about in found:
        assert about["spill_bytes"] == 0 and about["float_atomics"] == 0


def test_groups_that_are_alike_share_a_binary():
    """No buffer's name stands in the text."""
    first, second = (the_group(lowered("cuda")) for _ in range(2))
    assert first.driver == second.driver and "weight" not in first.driver.text


def test_launches_of_the_nets():
    count = lambda name, shape, **how: len(
        lower(gn.models.get(name), shape, target="cuda", **HOW, **how).plan.launches
    )
    assert count("lenet5", (128, 1, 28, 28), precision="fp32") <= 17
    # Large launches gain nothing.
    low = lower(gn.models.alexnet(), (128, 3, 227, 227), target="cuda", precision="tf32", **HOW)
    assert not [s for s in low.plan.launches if s.members]
