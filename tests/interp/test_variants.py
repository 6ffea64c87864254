"""One mechanism for another kernel of the same equation: this file holds a variant of its own."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest

import graphnet as gn
from graphnet import config
from graphnet.api import lower
from graphnet.cli import main
from graphnet.lowering.launch import registry
from graphnet.lowering.launch.conv_flat import FlatWgrad
from graphnet.lowering.tune import tables
from graphnet.lowering.tune.search import search
from graphnet.passes.templates import anchors_of

PACKAGE = Path(gn.__file__).parent
COMMON = {"rows", "pixels", "elements", "parts"}  # words that stand for something else, too
SGD = gn.SGD(0.1, momentum=0.9)


class Whole(FlatWgrad):
    """A weight gradient that is never cut, for few filters."""

    name = "whole"

    def accepts(self, eqn, layouts, dtype, arch):
        (e,) = anchors_of(eqn)
        filters = e.inputs[1].type.shape[1]
        if filters > 4:
            return f"{filters} filters are more than 4"
        return super().accepts(eqn, layouts, dtype, arch)

    def configs(self, problem):
        yield from (replace(c, num_warps=8) for c in super().configs(problem) if c.SPLIT == 1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path):
    with config.override(CACHE_DIR=str(tmp_path / "cache"), TUNE="0"):
        yield


@pytest.fixture
def row(monkeypatch):
    """The one row that adds the variant, behind all others."""
    monkeypatch.setattr(registry, "VARIANTS", (*registry.VARIANTS, Whole()))


def lowered(filters=4, **how):
    net = gn.Sequential(gn.Conv2d(1, filters, 3, padding=1), gn.ReLU(), gn.Flatten(),
                        gn.Linear(16 * filters, 3))  # fmt: skip
    return lower(net, (2, 1, 4, 4), target="interpret", loss=gn.CrossEntropyLoss(), optimizer=SGD,
                 **how)  # fmt: skip


def wgrad(low):
    choices = [s.choice for s in low.plan.launches if s.choice is not None]
    return next(c for c in choices if c.problem.op == "conv2d_wgrad")


def test_it_is_searched(row):
    low = lowered()
    found = search(low.plan, low.kernels, gpu="interpreter", seconds=0.0, keep=3)
    tried = {t.variant: t.verdict for t in found.trials if t.problem == wgrad(low).problem}
    assert tried["whole"] in ("right", "skipped") and "flat" in tried


def test_an_entry_of_a_table_chooses_it(row):
    low = lowered()
    p = wgrad(low).problem
    config = Whole().rule(p)
    entry = tables.Entry("whole", p, config, 1.0, "graphnet", "h100", "2026-11-26")
    chosen = lowered(kernels=replace(low.kernels, table=tables.as_table([entry])))
    assert (wgrad(chosen).variant.name, wgrad(chosen).source) == ("whole", "measured")
    assert dict(wgrad(chosen).refused)["flat"] == "not measured there"


def test_it_is_refused_with_its_sentence_where_it_does_not_fit(row):
    assert dict(wgrad(lowered(8)).refused)["whole"] == "8 filters are more than 4"
    # It fits here, but the rules prefer what stands above it.
    assert dict(wgrad(lowered()).refused)["whole"] == "the rules prefer flat"


def test_the_report_names_it(row, tmp_path, capsys):
    model = tmp_path / "net.py"
    model.write_text(
        "import graphnet as gn\nnet = gn.Sequential(gn.Conv2d(1, 8, 3), gn.Flatten(), "
        "gn.Linear(32, 2))\nnet.input_shape = (1, 4, 4)\n"
    )
    with pytest.raises(SystemExit):
        main(["inspect", f"{model}:net", "--train", "--batch", "2", "--why"])
    assert "not whole: 8 filters are more than 4" in capsys.readouterr().out


def test_names_of_one_op_are_distinct_and_rows_complete():
    for op, variants in registry.by_op().items():
        names = [v.name for v in variants]
        assert len(set(names)) == len(names), (op, names)
    classes = [type(v) for v in registry.VARIANTS]
    assert len(set(classes)) == len(classes)


ASKING = ("passes", "lowering/tune", "lowering/plan", "lowering/build", "lowering/targets")


def test_adding_a_variant_touches_its_file_and_one_row():
    """Whoever chooses, searches or reports knows no variant by its class or by its name."""
    own = {type(v).__module__.rpartition(".")[2] for v in registry.VARIANTS} | {"registry"}
    classes = {type(v).__name__ for v in registry.VARIANTS}
    names = {v.name for v in registry.VARIANTS}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        if path.parent.name == "launch" and path.stem in own:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and "lowering.launch" in (node.module or ""):
                assert not classes & {a.name for a in node.names}, path
    for folder in ASKING:
        for path in (PACKAGE / folder).rglob("*.py"):
            literals = {n.value for n in ast.walk(ast.parse(path.read_text()))
                        if isinstance(n, ast.Constant) and isinstance(n.value, str)}  # fmt: skip
            assert not (names - COMMON) & literals, path
