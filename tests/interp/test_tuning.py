"""The tuner: wrong and slow configurations, what is kept, and what decides."""

import json
import time
import warnings

import pytest

import graphnet as gn
from graphnet import config
from graphnet.api import lower, tune
from graphnet.cli import main
from graphnet.lowering.build import inventory
from graphnet.lowering.launch.choice import forced
from graphnet.lowering.launch.config import Config
from graphnet.lowering.launch.registry import kernels_for
from graphnet.lowering.launch.variants import Problem
from graphnet.lowering.tune import search, tables
from graphnet.lowering.tune.model import predict_us, rank_correlation

PROBLEM = Problem("linear", (4, 64, 10), "ieee")
OTHER = Config(16, 16, 64)


@pytest.fixture(autouse=True)
def cache(tmp_path):
    alone = "row_blocks,in_stages,groups"  # launches of their own: one problem for each
    with config.override(CACHE_DIR=str(tmp_path / "cache"), TUNE="0", DISABLE=alone):
        yield tmp_path / "cache"


def plan(target="interpret"):
    net = gn.Sequential(gn.Conv2d(1, 4, 3, padding=1), gn.ReLU(), gn.Flatten(), gn.Linear(64, 10))
    sgd = gn.SGD(0.1, momentum=0.9)
    return lower(net, (4, 1, 4, 4), target=target, loss=gn.CrossEntropyLoss(), optimizer=sgd)


def variant(name="pointers", op="linear"):
    return next(v for v in kernels_for("interpret").variants(op) if v.name == name)


def by_rule():
    return variant().rule(PROBLEM)


def only(monkeypatch):
    """A lowered net with one problem to search."""
    low = plan()
    jobs = search._jobs(low.plan)
    monkeypatch.setattr(search, "_jobs", lambda plan: {PROBLEM: jobs[PROBLEM]})
    return low


def found_by(low, **options):
    return search.search(low.plan, low.kernels, gpu="interpreter", **options)


def changed(launch, **values):
    """The launch with other constants, as a bug in a template would have it."""
    return search.replace(launch, constants=tuple({**dict(launch.constants), **values}.items()))


def planted(monkeypatch, *configs):
    own = variant()
    monkeypatch.setattr(
        search, "candidates", lambda p, works, kernels: iter([(own, c) for c in configs])
    )


# ---- right first, then fast ------------------------------------------------------------------


def test_a_wrong_configuration_is_rejected_and_reported(monkeypatch):
    """The wrong one skips the last block of its reduction, and is the fastest by far."""
    planted(monkeypatch, by_rule(), OTHER)
    low = only(monkeypatch)
    made = search._launches

    def broken(work, variant, config, kernels):
        return [
            changed(s, K=16) if config == OTHER else s for s in made(work, variant, config, kernels)
        ]

    monkeypatch.setattr(search, "_launches", broken)
    found = found_by(low, seconds=60)
    wrong = [t for t in found.trials if t.verdict == "wrong"]
    assert [t.config for t in wrong] == [OTHER]
    assert "differs from its reference" in wrong[0].error and wrong[0].median_us is None
    assert [e.config for e in found.entries] == [by_rule()]


def test_a_result_that_nobody_writes_is_wrong(monkeypatch):
    planted(monkeypatch, by_rule())
    low = only(monkeypatch)
    made = search._launches
    monkeypatch.setattr(search, "_launches", lambda *a: [changed(s, M=2) for s in made(*a)])
    found = found_by(low)
    assert [t.verdict for t in found.trials] == ["wrong"] and not found.entries
    assert "is finite where its reference is not" in found.trials[0].error


def test_a_slow_configuration_is_not_chosen(monkeypatch):
    planted(monkeypatch, by_rule(), OTHER)
    low = only(monkeypatch)
    slow = search.Alone.prepare

    def prepare(self, steps):
        run, tensor = slow(self, steps)
        bk = dict(steps[-1].constants)["BK"]
        return (lambda: (run(), time.sleep(0.2)) if bk == OTHER.BK else run()), tensor

    monkeypatch.setattr(search.Alone, "prepare", prepare)
    found = found_by(low)
    assert {t.verdict for t in found.trials} == {"right"}
    assert [t.config for t in found.trials if t.chosen] == [by_rule()]


def test_a_clearly_faster_one_is_chosen_and_decides_from_then_on(monkeypatch):
    planted(monkeypatch, by_rule(), OTHER)
    times = iter([[100.0, 90.0], [100.0, 98.0]])
    monkeypatch.setattr(search, "_time", lambda programs, target, s: next(times))
    low = only(monkeypatch)
    (entry,) = tune(low).entries
    assert entry.config == OTHER and entry.rule_us == 100.0 and entry.us == 90.0
    (row,) = tables.table_for("interpreter")[PROBLEM]
    assert (row.variant, row.config, row.source) == ("pointers", OTHER, "graphnet")
    with config.override(TUNE="1"):
        launch = next(s for s in plan().plan.launches if s.choice and s.choice.problem == PROBLEM)
    assert dict(launch.constants)["BK"] == OTHER.BK and launch.choice.source == "measured"
    assert str(launch.choice).endswith(", 90.0 us")
    # Within the noise the rules' choice stays.
    assert found_by(low).entries[0].config == by_rule()


def test_what_was_found_survives_an_interrupt():
    low = plan()
    seen = []

    def cut_off(found):
        seen.append(len({e.problem for e in found.entries}))
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(low, each=cut_off, keep=1)
    assert seen == [1, 2] and len(tables.table_for("interpreter")) == 2


def test_what_does_not_build_is_recorded(monkeypatch):
    answers = [
        {"spill_bytes": 0, "name": "a"}, {"spill_bytes": 8, "name": "b"}, {"error": "E\nno"},
    ]  # fmt: skip
    low = only(monkeypatch)
    job = search._Job(PROBLEM, search._jobs(low.plan)[PROBLEM], low.kernels, "h200", keep=3)
    asked = []
    monkeypatch.setattr(search, "try_launches", lambda s, arch: asked.append(len(s)) or answers)
    first, second, third = job.made
    search._build([job], 90)
    assert asked == [3] and job.made == [first]
    assert [(t.config, t.verdict, t.error) for t in job.trials] == [
        (second.config, "spills", "b: 8 B"), (third.config, "failed", "no")]  # fmt: skip


def test_the_time_budget_holds_and_what_was_not_reached_says_so():
    low = plan()
    began = time.perf_counter()
    found = found_by(low, seconds=0.0)
    assert time.perf_counter() - began < 20
    assert {t.verdict for t in found.trials} == {"right", "skipped"}
    assert all(t.median_us is None for t in found.trials if t.verdict == "skipped")


def test_what_has_most_to_gain_comes_first():
    low = plan()
    order = lambda found: list(dict.fromkeys(t.problem for t in found.trials))
    first, *_, last = order(found_by(low, seconds=0.0))
    (work,) = search._jobs(low.plan)[last]
    rule = low.kernels.choose(work)
    slow = tables.Entry(
        rule.variant.name, last, rule.config, 1e9, "graphnet", "interpreter", "2026-11-26"
    )
    kernels = search.replace(low.kernels, table=tables.as_table([slow]))
    again = search.search(low.plan, kernels, gpu="interpreter", seconds=0.0, again=True)
    assert order(again)[:2] == [last, first]


def test_every_variant_that_can_gets_a_chance():
    """A convolution whose images fill channels: taps and flat are both tried."""
    net = gn.Sequential(
        gn.Conv2d(8, 16, 3, padding=1), gn.ReLU(), gn.Conv2d(16, 8, 1), gn.Flatten(),
        gn.Linear(128, 2),
    )  # fmt: skip
    with config.override(DISABLE="regions"):
        low = lower(net, (2, 8, 4, 4), target="interpret", loss=gn.CrossEntropyLoss(),
                    optimizer=gn.SGD(0.1))  # fmt: skip
    found = found_by(low, seconds=0.0, keep=6)
    tried = {t.variant for t in found.trials if t.problem.op == "conv2d"}
    assert tried >= {"taps", "flat"}


# ---- what decides ----------------------------------------------------------------------------


def measured(us, config=OTHER, source="graphnet", variant="pointers", gpu="interpreter"):
    return tables.Entry(variant, PROBLEM, config, us, source, gpu, "2026-11-26")


def chosen(*entries, **forces):
    low = plan()
    kernels = search.replace(low.kernels, table=tables.as_table(entries))
    work = search._jobs(low.plan)[PROBLEM][0]
    with forced("linear", **forces):
        return kernels.choose(work)


def test_forced_wins_over_measured_and_measured_over_the_rules():
    assert (chosen().config, chosen().source) == (by_rule(), "rule")
    choice = chosen(measured(5.0))
    assert (choice.config, choice.source, choice.us) == (OTHER, "measured", 5.0)
    assert choice.origin == "graphnet, interpreter, 2026-11-26"
    choice = chosen(measured(5.0), BK=16)
    assert (choice.config.BK, choice.source, choice.us) == (16, "forced", None)
    other = search.replace(measured(5.0), problem=Problem("linear", (4, 65, 10), "ieee"))
    assert chosen(other).source == "rule"


def test_rows_are_compared_within_one_source_only():
    slow, quick = Config(16, 16, 16), Config(16, 16, 32)
    both = measured(3.0, slow, "prototype"), measured(2.0, quick, "prototype")
    assert chosen(*both).config == quick
    # Once there is a row of ours, prototypes only order the search.
    assert chosen(*both, measured(9.0)).config == OTHER
    with pytest.raises(gn.ConfigError, match="unknown source 'guess'"):
        measured(1.0, source="guess")


def test_a_variant_that_is_gone_is_left_out_and_that_is_said_once():
    tables._gone.cache_clear()
    with pytest.warns(tables.TuningWarning, match="'winograd' of linear .* gone; .* pointers"):
        assert chosen(measured(1.0, variant="winograd")).source == "rule"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(measured(1.0, variant="winograd")).source == "rule"


def test_a_gpu_borrows_the_rows_of_its_sibling(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    quick = Config(16, 16, 32)
    rows = [measured(3.0, source="prototype", gpu="h100"), measured(4.0, quick, gpu="h100")]
    tables.write(tmp_path / "h100.json", "h100", rows)
    (row,) = tables.table_for("h200")[PROBLEM]
    assert (row.config, row.source, row.us) == (quick, "h100", 4.0)
    assert tables.table_for("a100") == {} == tables.table_for(None)


@pytest.mark.parametrize("damage", ["cut", "flip", "config"])
def test_a_damaged_entry_counts_for_nothing(cache, damage):
    tables.remember([measured(1.0)])
    assert list(tables.table_for("interpreter")) == [PROBLEM]
    (path,) = (cache / "tuning").glob("*.json")
    text = path.read_text()
    if damage == "config":
        data = json.loads(text)
        data["entry"]["config"] = {"BM": 128}
        path.write_text(json.dumps(data))
    else:
        path.write_text(text[:40] if damage == "cut" else text.replace('"us": 1.0', '"us": 7.0'))
    with pytest.warns(tables.TuningWarning, match=path.name):
        assert tables.table_for("interpreter") == {}


def test_compile_searches_only_where_it_is_asked_to(monkeypatch):
    asked = []

    def spy(plan, kernels, **options):
        asked.append(options["gpu"])
        return search.Found("interpreter")

    monkeypatch.setattr(search, "search", spy)
    net = gn.Sequential(gn.Flatten(), gn.Linear(4, 2))
    gn.compile(net, (2, 1, 2, 2), target="interpret")
    assert asked == []
    with config.override(TUNE="1"):
        gn.compile(net, (2, 1, 2, 2), target="interpret")
        gn.compile(net, (2, 1, 2, 2), target="cpu")  # has no launches
    assert asked == ["interpreter"]


# ---- the tables in the repository ------------------------------------------------------------


@pytest.mark.parametrize("gpu", [p.stem for p in tables.FOLDER.glob("*.json")])
def test_every_row_of_a_shipped_table_names_a_variant_that_is_there(gpu):
    rows = tables.shipped(gpu)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sum(map(len, tables.as_table(rows).values())) == len(rows) > 0
    assert all(e.us > 0 and e.date and e.gpu for e in rows)


def test_a_row_of_ours_replaces_the_earlier_one_and_prototypes_stay(tmp_path):
    path = tmp_path / "t.json"
    proto = [measured(4.0, source="prototype"), measured(5.0, by_rule(), "prototype")]
    tables.write(path, "h100", [measured(2.0), *proto, measured(1.0, by_rule())])
    assert [e.us for e in tables.read(path)] == [1.0, 4.0, 5.0]
    path.write_text("{}")
    with pytest.raises(gn.ConfigError, match="is no tuning table"):
        tables.read(path)


# ---- candidates and the model ----------------------------------------------------------------


@pytest.mark.parametrize(
    "op, name, shape, dtype",
    [
        ("conv2d", "taps", (128, 96, 27, 27, 256, 5, 5, 1, 1, 2, 2, 2, 2, 1, 1, 1), "bf16"),
        ("linear_wgrad", "pointers", (128, 9216, 4096), "bf16"),
        ("lrn", "pixels", (128, 96, 27, 27, 2, 2), "bf16"),
        ("cross_entropy", "rows", (128, 1000), "f32"),
        ("maxpool2d", "elements", (128, 96, 55, 55, 3, 3, 2, 2, 0, 0, 0, 0, 1, 1), "f32"),
    ],
)
def test_candidates_start_with_the_rules_and_keep_the_limits(op, name, shape, dtype):
    v, p = variant(name, op), Problem(op, shape, dtype, held=2)
    found = list(v.configs(p))
    assert found[0] == v.rule(p) and len(found) == len(set(found)) > 5
    if op in ("conv2d", "linear_wgrad"):
        assert all(c.shared_bytes(2) <= 232448 for c in found)
        most = 128 if op == "conv2d" else 32
        assert all(c.accumulators <= most or c.SPLIT > 1 for c in found[1:])


def test_the_model_knows_padding_waves_and_traffic():
    cost = {}
    for bm in (16, 64):
        with forced("conv2d", BM=bm):
            own = [s for s in plan("cuda").plan.launches if s.where.layers == ("conv1", "relu1")]
            cost[bm] = predict_us(own, "h200")
    assert 1.5 < cost[16] < 100 and 1.5 < cost[64] < 100
    with pytest.raises(gn.ConfigError, match="no ceilings for GPU"):
        predict_us(own, "abacus")


def test_rank_correlation():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2], [1, 2]) is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


# ---- the command line ------------------------------------------------------------------------


def run(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        main(list(argv))
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


def test_tune_and_cache(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(search, "KEEP", 2)
    model = tmp_path / "net.py"
    model.write_text(
        "import graphnet as gn\nnet = gn.Sequential(gn.Flatten(), gn.Linear(8, 4))\n"
        "net.input_shape = (2, 2, 2)\n"
    )
    out, table = tmp_path / "out.json", tmp_path / "table.json"
    common = ("--batch", "2", "--target", "interpret", "--seconds", "2")
    code, text, err = run(capsys, "tune", f"{model}:net", *common, "--out", str(out),
                          "--table", str(table), "--json")  # fmt: skip
    assert code == 0, err
    result = json.loads(text)
    assert json.loads(out.read_text()) == result and result["kind"] == "tune"
    assert result["keys"] == len(tables.read(table)) == len({r["kernel"] for r in result["rows"]})
    assert "linear_wgrad" in err
    code, text, _ = run(capsys, "tune", f"{model}:net", *common)  # all is known now
    assert code == 0 and text.startswith("0 keys, 0 trials")
    code, text, _ = run(capsys, "cache", "list", "--json")
    assert code == 0 and {r["kind"] for r in json.loads(text)["entries"]} == {"tuning"}
    code, text, _ = run(capsys, "cache", "clear", "--tuning", "--json")
    assert code == 0 and json.loads(text)["files"] == result["keys"]
    code, _, err = run(capsys, "tune", f"{model}:net", "--target", "cpu")
    assert code == 2 and "has no launches to tune" in err


def test_cache_says_why_a_launch_misses(capsys):
    small = plan("cuda").plan.parts
    launch = next(s for s in small if s.kernel == "mean_reduce" or s.kernel == "record_step")
    (row,) = inventory.why([launch])
    assert row["hit"] is False and row["differs"] is None
    gone = inventory.clear()
    assert gone == {"files": 0, "bytes": 0}
    from graphnet.lowering.build.build import compile_launches

    compile_launches([launch])
    assert inventory.why([launch])[0]["hit"] is True
    constants = tuple((k, v + 1 if isinstance(v, int) else v) for k, v in launch.constants)
    other = search.replace(launch, constants=constants, num_warps=2)
    (row,) = inventory.why([other])
    assert row["hit"] is False and "num_warps 1 -> 2" in row["differs"]
    assert [r["kind"] for r in inventory.listing()] == ["binary"]
    assert inventory.clear(["binaries"])["files"] == 4
