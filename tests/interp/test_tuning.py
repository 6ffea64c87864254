"""The tuner: wrong and slow configurations, what is kept, and what decides."""

import json
import time
import warnings

import pytest

import graphnet as gn
from benchmarks import tables as workloads
from graphnet import config
from graphnet.api import lower, tune
from graphnet.cli import main
from graphnet.lowering.build import inventory
from graphnet.lowering.launch.config import Choice, Config, analytic, choose, forced, using
from graphnet.lowering.launch.equation import launches
from graphnet.lowering.tune import search, tables
from graphnet.lowering.tune.candidates import candidates, predict_us, rank_correlation

KEY = ("linear", (4, 10, 64, 1), "ieee")
OTHER = Config(16, 16, 64)


@pytest.fixture(autouse=True)
def cache(tmp_path):
    with config.override(CACHE_DIR=str(tmp_path / "cache"), TUNE="0"):
        yield tmp_path / "cache"


def plan(target="interpret"):
    net = gn.Sequential(gn.Conv2d(1, 4, 3, padding=1), gn.ReLU(), gn.Flatten(), gn.Linear(64, 10))
    sgd = gn.SGD(0.1, momentum=0.9)
    return lower(net, (4, 1, 4, 4), target=target, loss=gn.CrossEntropyLoss(), optimizer=sgd)


def only(key):
    """Known entries for everything but one key, so that a search has one thing to do."""
    low = plan()
    return low, {c.key: c.config for s in low.plan.launches for c in s.choices if c.key != key}


def changed(launch, **values):
    """The launch with other constants, as a bug in a template would have it."""
    return search.replace(launch, constants=tuple({**dict(launch.constants), **values}.items()))


def planted(monkeypatch, *configs):
    monkeypatch.setattr(search, "candidates", lambda choice, update: list(configs))


# ---- right first, then fast ------------------------------------------------------------------


def test_a_wrong_configuration_is_rejected_and_reported(monkeypatch):
    """The wrong one skips the last block of its reduction, and is the fastest by far."""
    planted(monkeypatch, analytic(*KEY), OTHER)
    low, known = only(KEY)
    made = search._launches

    def broken(eqn):
        bk = lambda s: dict(s.constants).get("BK")
        return [changed(s, K=16) if bk(s) == OTHER.BK else s for s in made(eqn)]

    monkeypatch.setattr(search, "_launches", broken)
    found = search.search(low.plan, gpu="interpreter", known=known, seconds=60)
    wrong = [t for t in found.trials if t.verdict == "wrong"]
    assert [t.config for t in wrong] == [OTHER]
    assert "differs from its reference" in wrong[0].error and wrong[0].median_us is None
    assert [e.config for e in found.entries] == [analytic(*KEY)]


def test_a_result_that_nobody_writes_is_wrong(monkeypatch):
    planted(monkeypatch, analytic(*KEY))
    low, known = only(KEY)
    made = search._launches
    monkeypatch.setattr(search, "_launches", lambda eqn: [changed(s, M=2) for s in made(eqn)])
    found = search.search(low.plan, gpu="interpreter", known=known)
    assert [t.verdict for t in found.trials] == ["wrong"] and not found.entries
    assert "is finite where its reference is not" in found.trials[0].error


def test_a_slow_configuration_is_not_chosen(monkeypatch):
    planted(monkeypatch, analytic(*KEY), OTHER)
    low, known = only(KEY)
    slow = search.Alone.prepare

    def prepare(self, steps):
        run, tensor = slow(self, steps)
        bk = dict(steps[-1].constants)["BK"]
        return (lambda: (run(), time.sleep(0.2)) if bk == OTHER.BK else run()), tensor

    monkeypatch.setattr(search.Alone, "prepare", prepare)
    found = search.search(low.plan, gpu="interpreter", known=known)
    assert {t.verdict for t in found.trials} == {"right"}
    assert [t.config for t in found.trials if t.chosen] == [analytic(*KEY)]


def test_a_clearly_faster_one_is_chosen_and_decides_from_then_on(monkeypatch):
    planted(monkeypatch, analytic(*KEY), OTHER)
    times = iter([[100.0, 90.0], [100.0, 98.0]])
    monkeypatch.setattr(search, "_time", lambda programs, target, s: next(times))
    low, known = only(KEY)
    found = tune(low, known=known)
    (entry,) = found.entries
    assert entry.config == OTHER and entry.analytic_us == 100.0 and entry.us == 90.0
    assert tables.table_for("interpreter") == {KEY: OTHER}
    with config.override(TUNE="1"), using({**known, KEY: OTHER}):
        launch = next(s for s in plan().plan.launches if s.choices[0].key == KEY)
    assert dict(launch.constants)["BK"] == OTHER.BK and launch.choices[0].source == "measured"
    # Within the noise the rules' choice stays.
    assert search.search(low.plan, gpu="x", known=known).entries[0].config == analytic(*KEY)


def test_what_was_found_survives_an_interrupt():
    low = plan()
    seen = []

    def cut_off(found):
        seen.append(len(found.entries))
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(low, known={}, each=cut_off, keep=1)
    assert seen == [1, 2] and len(tables.table_for("interpreter")) == 2


def test_what_does_not_build_is_recorded(monkeypatch):
    answers = [
        {"spill_bytes": 0, "name": "a"}, {"spill_bytes": 8, "name": "b"}, {"error": "E\nno"},
    ]  # fmt: skip
    monkeypatch.setattr(search, "try_launches", lambda launches, arch: answers)
    launch = plan().plan.launches[0]
    made = [(Config(n), 1.0, [[launch]]) for n in (1, 2, 3)]
    told = []
    kept = search._build(made, 90, lambda *about: told.append(about))
    assert kept == made[:1]
    assert told == [(Config(2), 1.0, "spills", "b: 8 B"), (Config(3), 1.0, "failed", "no")]


def test_the_time_budget_holds_and_what_was_not_reached_says_so():
    low = plan()
    began = time.perf_counter()
    found = search.search(low.plan, gpu="interpreter", seconds=0.0)
    assert time.perf_counter() - began < 20
    assert {t.verdict for t in found.trials} == {"right", "skipped"}
    assert all(t.median_us is None for t in found.trials if t.verdict == "skipped")


# ---- what decides ----------------------------------------------------------------------------


def test_forced_wins_over_measured_and_measured_over_the_rules():
    assert choose(*KEY) == analytic(*KEY)
    with using({KEY: OTHER}):
        assert choose(*KEY) == OTHER
        with forced("linear", BK=16):
            assert choose(*KEY).BK == 16
        assert choose("linear", (4, 10, 65, 1), "ieee") == analytic("linear", (4, 10, 65, 1))


def entry(**changes):
    about = {"source": "measured", "us": 1.0, "environment": tables.environment("interpreter")}
    return tables.Entry(*KEY, OTHER, **{**about, **changes})


def test_only_what_was_measured_with_these_versions_decides():
    here = tables.environment("interpreter")
    for changed in ("triton", "ptxas", "templates", "gpu"):
        old = entry(environment={**here, changed: "other"})
        assert tables.measured([old], "interpreter") == {}
    assert tables.measured([entry(source="analytic")], "interpreter") == {}
    assert tables.measured([entry()], "interpreter") == {KEY: OTHER}


def test_an_edit_of_a_template_changes_the_environment(monkeypatch):
    before = tables.environment("h200")
    monkeypatch.setattr(tables, "kernels_hash", lambda: "edited")
    assert tables.environment("h200") != before


@pytest.mark.parametrize("damage", ["cut", "flip", "config"])
def test_a_damaged_entry_counts_for_nothing(cache, damage):
    tables.remember([entry()])
    assert tables.table_for("interpreter") == {KEY: OTHER}
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

    def spy(plan, **options):
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


# ---- the table in the repository -------------------------------------------------------------


def test_the_shipped_table_is_up_to_date():
    have = {e.key: e for e in tables.shipped("h200")}
    want = {e.key: e for e in workloads.entries()}
    stale = [k for k, e in want.items() if k not in have or (
        have[k].source == "analytic" and have[k].config != e.config)]  # fmt: skip
    assert not stale, f"python benchmarks/tables.py; out of date: {stale[:3]}"
    for e in have.values():
        assert e.source == "analytic" or (e.us and e.environment and e.date), e
    assert tables.shipped("no-such-gpu") == []


def test_a_measured_entry_survives_writing_the_table_anew(tmp_path):
    path = tmp_path / "t.json"
    tables.write(path, "h200", [entry(), tables.Entry(*KEY, analytic(*KEY))])
    assert tables.read(path) == [entry()]
    path.write_text("{}")
    with pytest.raises(gn.ConfigError, match="is no tuning table"):
        tables.read(path)


# ---- candidates and the model ----------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        ("conv2d_taps", (93312, 256, 96, 1), "bf16"),
        ("linear_wgrad", (4096, 9217, 128, 1), "bf16"),
        ("lrn", (93312, 96), "bf16"),
        ("cross_entropy", (128, 1000), "ieee"),
        ("maxpool2d", (1 << 20,), "ieee"),
    ],
)
def test_candidates_start_with_the_rules_and_keep_the_limits(key):
    found = candidates(Choice(*key, analytic(*key), "analytic"), update=True)
    assert found[0] == analytic(*key) and len(found) == len(set(found)) > 5
    if key[0] in ("conv2d_taps", "linear_wgrad"):
        assert all(c.shared_bytes(2) <= 232448 for c in found)
        most = 128 if key[0] == "conv2d_taps" else 32
        assert all(c.accumulators <= most or c.SPLIT > 1 for c in found[1:])


def test_the_model_knows_padding_waves_and_traffic():
    low = plan("cuda")
    e = next(e for e in low.plan.graph.eqns if e.where.layers == ("conv1", "relu1"))
    cost = {}
    for bm in (16, 64):
        with forced("conv2d", BM=bm):
            cost[bm] = predict_us(launches(e), "h200")
    assert 1.5 < cost[16] < 100 and 1.5 < cost[64] < 100
    with pytest.raises(gn.ConfigError, match="no ceilings for GPU"):
        predict_us(launches(e), "abacus")


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
    small = plan("cuda").plan.launches
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
    assert inventory.clear(["binaries"])["files"] == 3
