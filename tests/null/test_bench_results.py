"""The results, their schema, tables and pictures; the scripts under benchmarks/."""

import copy
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch

from benchmarks import index, mnist99, nets, plots, run, steps
from benchmarks.goals import GOALS
from benchmarks.published import WORKLOADS
from graphnet.bench import bench, facts
from graphnet.bench.result import table
from graphnet.cli import main
from graphnet.lowering.launch.config import Config
from graphnet.lowering.launch.variants import Problem
from graphnet.lowering.tune import tables

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "benchmarks" / "schema.json").read_text())
GPU_TESTS = (ROOT / "tests" / "gpu").glob("test_*.py")
LENET = "cpu-lenet5-train-b128-fp32-2026-11-24"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads wait for each other for long where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def measured(one_thread):
    """A whole result, measured here."""
    return bench.run_bench(
        bench.BenchConfig("lenet5", 4, target="cpu", rounds=2, seconds=0.1, parity_batches=2)
    )


def on_gpu(result, gpu="NVIDIA H200", **changes):
    """The result as if a GPU had measured it."""
    r = copy.deepcopy(result)
    r["machine"] |= {
        "device": gpu, "arch": "sm_90", "processors": 132, "memory": 1, "driver": "580.1",
    }  # fmt: skip
    return r | {"target": "cuda", **changes}


def with_ours(result, ms, ratios):
    name = result["best"]["graphnet"]
    for row in result["rows"]:
        if row["name"] == name:
            row["ms"] = {"median": ms, "low": ms, "high": ms}
    result["ratio"] = {k: {"median": v, "low": v, "high": v} for k, v in ratios.items()}
    return result


# ---- files -----------------------------------------------------------------------------------


def test_every_result_fits_the_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    results = index.read()
    assert LENET in results
    for stem, result in results.items():
        jsonschema.validate(result, SCHEMA)
        assert stem.startswith(facts.gpu_slug(result["machine"]["device"]) + "-"), stem


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r.pop("parity"),
        lambda r: r.update(surprise=1),
        lambda r: r["machine"].pop("driver"),
        lambda r: r["rows"][0].pop("ms"),
        lambda r: r["rows"][0]["ms"].update(median=-1.0),
        lambda r: r.update(date="yesterday"),
        lambda r: r.update(schema=1),
        lambda r: r.update(kind="rumour"),
        lambda r: r["versions"].pop("ptxas"),
    ],
)
def test_the_schema_refuses(spoil, measured):
    whole = on_gpu(measured)
    jsonschema.validate(whole, SCHEMA)
    spoil(whole)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(whole, SCHEMA)


def test_tables_and_pictures_are_those_of_the_results():
    assert index.stale() == [], "python benchmarks/run.py"
    assert run.stale_plots(index.read()) == [], "python benchmarks/run.py"
    assert run.main(["--check"]) == 0 and run.main(["--wrong"]) == 2


def test_another_result_makes_the_tables_stale(measured):
    results = {**index.read(), "cpu-another": measured}
    assert set(index.stale(results)) == {index.PAGES[0]}
    assert set(index.stale({"owt": owt(measured)})) == set(index.PAGES)


# ---- tables ----------------------------------------------------------------------------------


def verdicts(*results, gpu="H200"):
    return {g.what: g.on(gpu, results) for g in GOALS}


def test_the_text_of_a_gpu_result_says_what_decides_its_speed(measured):
    clocks = [{"at": "now", "clocks.sm": "1980 MHz", "power.draw": "350 W"}]
    text = table(on_gpu(measured, clocks=clocks))
    assert "NVIDIA H200" in text and "driver 580.1, ptxas" in text and "1980 MHz, 350 W" in text
    assert "No result of a GPU" in index.goals({"x": measured})
    assert "No result of a GPU" not in index.goals({"x": on_gpu(measured)})


@pytest.mark.parametrize("gpu", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"])
def test_goals_are_reached_missed_or_not_measured(measured, gpu):
    this, other = ("H200", "H100") if "H200" in gpu else ("H100", "H200")
    assert set(verdicts(measured).values()) == {"not measured"}  # a CPU is no H200
    alexnet = on_gpu(measured, gpu, model="alexnet", batch=128, precision="bf16")
    fast = with_ours(alexnet, 2.4, {"eager": 3.5, "compile": 2.0, "compile-max": 1.6})
    found = verdicts(fast, gpu=this)
    name = "alexnet, batch 128, bf16, training step"
    assert found[name] == "2.4 ms, reached"
    assert found[f"{name}: against eager"] == "3.5x, reached"
    assert found[f"{name}: against torch.compile"] == "2x, **missed**"
    assert found[f"{name}: against max-autotune"] == "1.6x, reached"
    assert found[f"{name}: against eager in one CUDA graph"] == "not measured"
    assert verdicts(with_ours(fast, 2.1, {}), gpu=this)[name] == "2.1 ms, stretch reached"
    assert set(verdicts(fast, gpu=other).values()) == {"not measured"}
    assert set(verdicts(on_gpu(fast, gpu, batch=64), gpu=this).values()) == {"not measured"}
    row = next(g for g in GOALS if g.what == name).row([fast])
    assert row[:2] == (name, "<= 2.5 ms (stretch 2.2 ms)") and "not measured" in row[2:]


def seeds(times, accuracy=0.991):
    return [
        {"seed": k, "way": "plain", "batch": 256, "steps": 705, "compile_s": 1.0, "train_s": t,
         "accuracy": accuracy}
        for k, t in enumerate(times)
    ]  # fmt: skip


def test_the_goal_of_ten_seeds_takes_ten_that_arrive():
    what = "LeNet-5 from scratch to 99 % on MNIST, median of 10 seeds"
    r = {"kind": "mnist99", "date": "2026-11-24T00:00:00Z", "machine": {"device": "NVIDIA H200"}}
    assert verdicts({**r, "rows": seeds([0.03] * 9)})[what] == "not measured"
    assert verdicts({**r, "rows": seeds([0.03] * 10)})[what] == "30 ms, reached"
    assert verdicts({**r, "rows": seeds([0.03] * 10, 0.98)})[what] == "inf ms, **missed**"
    quicker = [row | {"way": "persistent"} for row in seeds([0.01] * 10)]
    both = {**r, "rows": seeds([0.03] * 10) + quicker}
    assert verdicts(both)[what] == "10 ms, stretch reached"


def tuned(*pairs, **more):
    row = {"kernel": "conv2d", "layers": ["conv1"], "shape": [1, 2], "config": {}}
    row |= {"precision": "bf16", "verdict": "right", **more}
    return [row | {"predicted_us": p, "median_us": m} for p, m in pairs]


def of_tuner(rows, gpu="NVIDIA H200"):
    about = {"schema": 2, "kind": "tune", "date": "2026-11-24T00:00:00Z", "versions": {}}
    return on_gpu({**about, "machine": {}, "rows": rows}, gpu)


def test_rank_correlation_within_each_key():
    same = tuned((1, 10), (2, 20), (3, 90), (4, 91))
    opposite = tuned((1, 9), (2, 8), (3, 7), (4, 6), shape=[3, 4])
    assert index.order(same) == (1.0, 1) and index.order(opposite) == (-1.0, 1)
    assert index.order(same + opposite) == (0.0, 2)
    wrong = tuned((5, None), verdict="wrong")
    assert index.order(same + wrong) == (1.0, 1) and index.order(wrong) == (None, 0)
    text = index.tuning({"h200-tune-lenet5": of_tuner(same + wrong)})
    assert "| 5 | 4 | 1 | 1.00 over 1 keys |" in text and "not measured" not in text
    assert "not measured" in index.tuning({"interpreter": of_tuner(same, "cpu")})


def test_a_wrong_configuration_of_the_shipped_table_shows(monkeypatch):
    what = "wrong results among the shipped configurations"
    problem, config = Problem("linear", (128, 400, 120), "bf16"), Config(64, 64, 64)
    entry = tables.Entry("matmul", problem, config, 10.0, "graphnet", "h200", "2026-11-26")
    monkeypatch.setattr(tables, "shipped", lambda gpu: [entry] if gpu == "h200" else [])
    key = {"kernel": "linear", "shape": [128, 400, 120], "precision": "bf16", "variant": "matmul",
           "config": config.as_dict()}  # fmt: skip
    right, wrong = (tuned((1, 2), **key | {"verdict": v}) for v in ("right", "wrong"))
    elsewhere = tuned((1, 2), verdict="wrong")
    assert verdicts(of_tuner(right + elsewhere))[what] == "0, reached"
    assert verdicts(of_tuner(wrong))[what] == "1, **missed**"
    assert verdicts(of_tuner(elsewhere))[what] == "not measured"
    assert verdicts(of_tuner(wrong), gpu="H100")[what] == "not measured"


def owt(measured):
    r = on_gpu(measured, model="alexnet_owt", mode="grads", batch=128, dropout=False)
    return with_ours(r | {"precision": "bf16"}, 2.0, {"eager": 2.0})


def test_published_figures_stand_beside_ours(measured):
    before = index.history({})
    assert "| cuDNN R4, fp16 (Torch) | 71 | 25 / 46 | 1,803 |" in before
    assert before.count("not measured") == 7 and "graphnet, bf16, " not in before
    after = index.history({"x": owt(measured)})
    assert "| **graphnet, bf16, H200** | 2 | - | 64,000 |" in after
    assert "torch: eager" in after and after.count("not measured") == 6


@pytest.mark.parametrize("w", WORKLOADS, ids=lambda w: w.match[0])
def test_the_commands_of_the_history_measure_its_workloads(w, monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "run_bench", lambda c, out, say: asked.append(c))
    with pytest.raises(SystemExit) as done:
        main(shlex.split(w.command)[1:])
    assert done.value.code == 0
    c = asked[0]
    model, mode, batch, precisions, dropout = w.match
    assert (c.model.rpartition(":")[2], c.mode, c.batch, c.dropout) == (model, mode, batch, dropout)
    assert c.precision in precisions


def test_the_nets_of_the_history_are_those_of_their_authors():
    net = nets.kernelbench_alexnet()
    rows = {r.layer: r.output for r in net.summary((1, 3, 224, 224)).rows}
    assert rows["conv1"] == (1, 96, 55, 55) and rows["pool5"] == (1, 256, 6, 6)
    assert not any("norm" in name for name in rows)
    found = bench.run_bench(
        bench.BenchConfig(f"{nets.__file__}:kernelbench_lenet5", 2, "infer", target="cpu",
                          rounds=1, seconds=0.1, by_layer=False)
    )  # fmt: skip
    assert found["parity"]["ok"]


def test_steps_and_jax_stand_in_tables():
    assert "not measured" in index.steps({}) and "not measured" in index.jax({})
    q = lambda v: {"median": v, "low": v, "high": v}
    ways = {"replay": {"ms": q(2.3)}, "graphnet": {"ms": q(2.4)},
            "eager channels_last fused autocast": {"ratio": q(3.4), "ms": q(8.2)}}  # fmt: skip
    run = {"model": "alexnet", "batch": 128, "precision": "bf16", "ways": ways, "failure": "",
           "date": "2026-11-26", "launches": [{"us": 60.0, "floor_us": 40.0}] * 2}  # fmt: skip
    found = on_gpu({"kind": "steps", "machine": {}, "runs": [run, run | {"launches": None}]})
    text = index.steps({"h200-steps": found})
    assert "| 128 | bf16 | H200 | 2.3 | 2.4 | 3.40 (3.40-3.40) | 2 | 0.12 | 0.08 | 2026" in text
    assert "not measured" in index.streams({})
    several = run | {"streams": [0, 32], "ways": ways | {"streams 32": {"ms": q(2.1)}}}
    found = on_gpu({"kind": "steps", "machine": {}, "runs": [run, several]})
    assert index.steps({"h200-steps": found}).count("alexnet") == 1
    text = index.streams({"h200-steps": found})
    assert "| 128 | bf16 | H200 | - | - | - | 2.100 (2.100-2.100) | - | 2026" in text
    row = {"model": "alexnet", "batch": 128, "precision": "bf16", "scan": 20, "failure": ""}
    rows = [row | {"ms": 3.5}, row | {"scan": 1, "failure": "OutOfMemory"}]
    found = on_gpu({"kind": "jax", "machine": {}, "rows": rows, "date": "2026-11-26"})
    text = index.jax({"h200-jax": found})
    assert "20 steps a call | H200 | 3.5 |" in text and "a call | H200 | OutOfMemory |" in text


# ---- pictures --------------------------------------------------------------------------------


def test_pictures_are_drawn_once_and_go_with_their_result(measured, tmp_path):
    from PIL import Image

    results = {"a": measured, "b": {**measured, "layers": None}}
    drawn = {p.name for p in plots.draw(results, tmp_path)}
    assert drawn == {"a-bars.png", "a-roofline.png", "b-bars.png"}
    with Image.open(tmp_path / "a-roofline.png") as image:
        assert min(image.size) > 400
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50  # something is on it
    assert plots.draw(results, tmp_path) == [] and run.stale_plots(results, tmp_path) == []
    changed = {"a": {**measured, "seconds": 1e6}}
    assert run.stale_plots(changed, tmp_path) == ["a-bars.png", "a-roofline.png", "b-bars.png"]
    plots.draw(changed, tmp_path)
    assert run.stale_plots(changed, tmp_path) == [] and not (tmp_path / "b-bars.png").exists()


# ---- scripts ---------------------------------------------------------------------------------


def test_to_99_percent_runs_on_any_data_of_that_shape(tmp_path, capsys):
    asked = ["--data", "digits", "--target", "cpu", "--epochs", "1", "--seeds", "0-1"]
    assert mnist99.main([*asked, "--json", str(tmp_path)]) == 0
    assert "0 of 2 seeds reached 99%" in capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    jsonschema.validate(found, SCHEMA)
    assert path.name.startswith("cpu-mnist99-fp32-") and len(found["rows"]) == 2
    assert found["rows"][0]["steps"] == -(-1437 // 128)
    assert 0.1 < found["rows"][0]["accuracy"] < 0.99


def test_steps_and_their_launches_of_several_processes_share_a_file(tmp_path, capsys):
    plain = ["--precision", "fp32", "--target", "cpu", "--seconds", "0.1", "--json", str(tmp_path)]
    assert steps.main(["lenet5", "--batch", "2,3", *plain, "--no-launches", "--beside"]) == 0
    assert steps.main(["lenet5", "--batch", "3", *plain]) == 0
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    jsonschema.validate(found, SCHEMA)
    assert path.name.startswith("cpu-steps-") and [r["batch"] for r in found["runs"]] == [2, 3]
    two, three = found["runs"]
    assert list(two["ways"]) == [
        "replay", "graphnet", "graphnet bind/run", "eager channels_last fused"
    ]  # fmt: skip
    assert two["launches"] is None and list(three["ways"]) == list(two["ways"])[:3]
    assert {"conv1", "fc3", "loss"} <= {n for row in three["launches"] for n in row["layers"]}
    text = capsys.readouterr().out
    assert f"{len(three['launches'])} in all" in text and "linear_wgrad" in text


def test_steps_under_other_streams_stand_beside_the_plain_ones(tmp_path, capsys, monkeypatch):
    plain = ["--precision", "fp32", "--target", "cpu", "--seconds", "0.1", "--no-launches",
             "--json", str(tmp_path)]  # fmt: skip
    assert steps.main(["lenet5", "--batch", "2", *plain]) == 0
    real = steps.ours.compiled

    def compiled(work, target, **how):
        """One setting that computes something else."""
        if steps.config.streams() == 3:
            next(iter(work.net.parameters())).data += 1
        return real(work, target, **how)

    monkeypatch.setattr(steps.ours, "compiled", compiled)
    assert steps.main(["lenet5", "--batch", "2", *plain, "--streams", "0,2,3,7777"]) == 0
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    jsonschema.validate(found, SCHEMA)
    one, several = found["runs"]  # neither replaces the other
    assert one["streams"] == [] and several["streams"] == [0, 2, 3, 7777]
    assert [n for n in several["ways"] if "streams" in n] == ["streams 0", "streams 2"]
    assert "other bits than streams 0: loss, " in several["failures"]["streams 3"]
    assert "use a number from 0 to 1024" in several["failures"]["streams 7777"]
    assert "streams 2" in capsys.readouterr().out


def test_a_step_that_cannot_be_measured_says_why(tmp_path, capsys):
    asked = ["lenet5", "--mode", "infer", "--batch", "0,2", "--precision", "fp32", "--target"]
    path = tmp_path / "f.json"
    assert steps.main([*asked, "cpu", "--seconds", "0.1", "--json", str(path)]) == 1
    bad, good = json.loads(path.read_text())["runs"]
    assert bad["failure"] and bad["failure"] in capsys.readouterr().out and not good["failure"]


def test_the_recorder_keeps_what_each_test_did(tmp_path):
    (tmp_path / "test_x.py").write_text(
        "import os, pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'not so'\n"
        "@pytest.mark.skip\ndef test_later(): pass\n"
        "@pytest.fixture\ndef broken(): raise OSError('no disk')\n"
        "def test_setup(broken): pass\n"
        "def test_killed(): os._exit(9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.record", "-p", "no:cacheprovider",
         "--record", tmp_path, "--rootdir", tmp_path, tmp_path / "test_x.py"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 9, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    jsonschema.validate(found, SCHEMA)
    assert found["counts"] == {"passed": 1, "failed": 2, "skipped": 1}
    assert [f["test"].split("::")[1] for f in found["failures"]] == ["test_bad", "test_setup"]
    assert not found["complete"]


MISSING = """
import importlib, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import graphnet, tests.gpu, benchmarks.record, benchmarks.mnist99, benchmarks.steps
for package in (graphnet, tests.gpu):
    for m in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if m.name != "graphnet.__main__":
            importlib.import_module(m.name)
print("all imported")
"""


def test_what_a_gpu_machine_lacks_is_not_imported():
    lacks = {"matplotlib", "hypothesis", "jsonschema", "ruff", "mypy", "build", "xdist"}
    done = subprocess.run(
        [sys.executable, "-c", MISSING.replace("{names}", repr(lacks))],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip().endswith("all imported"), done.stderr
