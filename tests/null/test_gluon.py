"""Variants in Gluon: where they are taken, what they say where not, and what a table decides."""

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import graphnet as gn
from graphnet import config
from graphnet.api import kernels_of
from graphnet.lowering.launch import gluon
from graphnet.lowering.launch.choice import Kernels, Measured, fastest
from graphnet.lowering.launch.config import Config
from graphnet.lowering.launch.registry import VARIANTS, by_op, kernels_for
from graphnet.lowering.launch.work import take_apart
from graphnet.lowering.tune import tables
from graphnet.ops.activation import Relu
from tests.gluon_cases import PADDED, SAME, Conv

OURS = [v for v in VARIANTS if isinstance(v, gluon.Specialised)]
FIRST = Conv(70, 3, (23, 19), 96, (11, 11), stride=4, block=4)


def work_of(case):
    return take_apart(case.graph().eqns[0], lambda v: v.name)


def refused(case, **how):
    return Kernels(by_op(), **how).able(work_of(case))[1]


def names(case):
    return {v.name for v in OURS if work_of(case).problem.op in v.ops}


@pytest.mark.parametrize("case", [SAME, replace(SAME, back=True), FIRST, PADDED])
def test_each_is_accepted_behind_its_twin_and_no_rule_takes_it(case):
    kernels, work = kernels_for("cuda"), work_of(case)
    choice = kernels.choose(work)
    assert (choice.source, choice.variant.name in names(case)) == ("rule", False)
    able = [v.name for v in kernels.able(work)[0]]
    assert set(able) & names(case) and able[0] not in names(case)
    for v in OURS:
        if v.name in able:
            assert v.suits(work.problem) == "a table has to name it: no rule chooses Gluon"


@pytest.mark.parametrize("case", [SAME, replace(SAME, back=True), PADDED])
@pytest.mark.parametrize("how, why", [
    ({"arch": 80}, "sm_80 has no products of warpgroups (wgmma)"),
    ({"arch": 100}, "sm_100 has no products of warpgroups (wgmma)"),
    ({"interpreted": True}, "Triton's interpreter cannot run it"),
])  # fmt: skip
def test_it_says_where_it_cannot_run(case, how, why):
    said = refused(case, **how)
    assert {said[name] for name in names(case)} == {why}


def test_it_says_which_versions_of_triton_were_tried(monkeypatch):
    monkeypatch.setattr(gluon, "triton", lambda: "3.8.0")
    why = "Triton 3.8.0 was not tried with Gluon kernels, 3.6.0 and 3.7.1 were"
    assert refused(SAME)["gluon_rows"] == refused(PADDED)["gluon_rows"] == why


def test_it_says_what_it_does_not_multiply():
    assert refused(replace(PADDED, dtype="f32"))["gluon_rows"] == (
        "specialised warps multiply in bf16, not ieee"
    )
    why = "a row of taps is 384 values, more than 256"
    assert refused(replace(SAME, c=128))["gluon_resident"] == why
    why = "groups or a dilation keep the taps of a row apart"
    assert refused(replace(SAME, c=32, o=32, groups=2))["gluon_resident"] == why
    wide = replace(SAME, c=64, o=256, kernel=(3, 4))
    why = "384 KiB of filters leave no room for images in shared memory"
    assert refused(wide)["gluon_resident"] == why
    why = "neighbours of a strided convolution do not share taps"
    assert refused(replace(SAME, stride=2))["gluon_pairs"] == why


def test_code_that_makes_ranges_is_refused(monkeypatch):
    monkeypatch.setattr(Relu, "emit", lambda self, x, attrs, ctx: [f"{x[0]} + tl.arange(0, 8)"])
    why = "the code of relu makes ranges of its own, which lack a layout in Gluon"
    assert {refused(SAME)[name] for name in names(SAME)} == {why}


def test_a_flag_leaves_a_variant_out():
    with config.override(DISABLE="gluon_rows"):
        said = refused(SAME)
    assert said["gluon_rows"] == "GRAPHNET_DISABLE names it" and "gluon_pairs" not in said


# ---- what a table decides --------------------------------------------------------------------


def row(variant, us, source="prototype"):
    return Measured(variant, Config(), us, source, "h100, today")


OWN = [row("a", 100.0, "graphnet"), row("b", 110.0, "graphnet"), row("a", 90.0), row("b", 50.0)]


@pytest.mark.parametrize("rows, taken", [
    ([row("a", 90.0), row("new", 89.0)], ("new", 89.0)),
    (OWN, ("a", 100.0)),  # b's prototype is known not to hold in its place
    ([*OWN, row("new", 82.0)], ("a", 100.0)),
    ([*OWN, row("new", 81.0)], ("new", 81.0)),
    ([*OWN, row("new", 85.0), row("new", 80.0)], ("new", 80.0)),
    ([*OWN, row("new", 80.0), row("new", 120.0, "graphnet")], ("a", 100.0)),
    ([row("a", 80.0, "graphnet"), row("a", 90.0), row("new", 73.0)], ("a", 80.0)),
    ([row("a", 100.0, "graphnet"), row("new", 10.0)], ("a", 100.0)),  # nothing to compare it with
    ([row("a", 100.0, "h100"), row("new", 10.0, "h100")], ("new", 10.0)),
    ([], None),
])  # fmt: skip
def test_a_prototype_is_compared_with_prototypes(rows, taken):
    best = fastest(rows)
    assert (best and (best.variant, best.us)) == taken


def test_what_the_shipped_table_takes():
    """On an H100 Gluon's prototypes replace four of the fourteen passes of AlexNet; a flag brings
    ours back, and a sibling borrows only what was measured in its place."""
    ours = {v.name for v in OURS}
    table = tables.table_for("h100")
    convs = {
        p: rows for p, rows in table.items() if p.op.startswith("conv2d") and p.dtype == "bf16"
    }
    new = {p: b for p, rows in convs.items() if (b := fastest(rows)).variant in ours}
    assert len(new) == 4 and {b.source for b in new.values()} == {"prototype"}
    for p, best in new.items():
        rest = [r for r in convs[p] if r.variant not in ours]
        before = fastest(rest)
        assert before.source == "graphnet" and best.us <= 0.9 * before.us
    borrowed = tables.table_for("h200")
    assert not any(r.variant in ours for p in convs for r in borrowed[p])


def test_a_row_that_does_not_hold_leaves_its_twin():
    from graphnet.lowering.tune.proof import without

    kernels = kernels_of("cuda", "h100")
    p = next(p for p, rows in kernels.table.items() if fastest(rows).variant == "gluon_rows")
    best = fastest(kernels.table[p])
    choice = type("C", (), {"problem": p, "variant": OURS[0], "config": best.config})
    left = fastest(without(kernels, [choice]).table[p])
    assert (left.variant, left.source) != (best.variant, best.source)


def test_gluon_is_imported_by_builds_and_gpus_alone():
    """Nothing names these kernels but launches, by a string; cpu and interpreter load none."""
    text = """
import sys, torch
import graphnet as gn
net = gn.Sequential(gn.Conv2d(16, 8, 1), gn.ReLU())
from graphnet.lowering.targets.interpret import problem
for target in ("cpu", *(() if problem() else ("interpret",))):
    gn.compile(net, (1, 16, 1, 1), target=target)(torch.zeros(1, 16, 1, 1))
loaded = [m for m in sys.modules if "kernels.gl_" in m]
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for path in Path(gn.__file__).parent.rglob("*.py"):
        if path.stem.startswith("gl_") and path.parent.name == "kernels":
            continue
        top = [
            n
            for n in ast.parse(path.read_text()).body
            if isinstance(n, ast.Import | ast.ImportFrom)
        ]
        assert not [n for n in top if "gluon" in ast.unparse(n) and "triton" in ast.unparse(n)], (
            path
        )
