"""Which precision is computed in where nobody names one: tf32 on a GPU, fp32 on cpu and interpret.
What is recorded and printed is the one that was computed in, never "auto"."""

import ast
import inspect
import json
from pathlib import Path

import pytest
import torch

import graphnet as gn
from graphnet.api import lower
from graphnet.bench import bench, peers
from graphnet.cli import main
from graphnet.passes import pipeline
from graphnet.passes.precision import resolve, told
from graphnet.train import run as runs
from graphnet.train.rundir import read_config
from graphnet.train.settings import RunConfig

GPU_TESTS = Path(__file__).resolve().parents[1] / "gpu"
TRAIN = {"loss": gn.CrossEntropyLoss(), "optimizer": gn.SGD(0.1)}
CHOSEN = [("cuda", "tf32"), ("cpu", "fp32"), ("interpret", "fp32")]


def net():
    return gn.Sequential(gn.Conv2d(1, 4, 3), gn.ReLU(), gn.Flatten(), gn.Linear(16, 8))


def ended(capsys, *argv):
    with pytest.raises(SystemExit) as done:
        main(list(map(str, argv)))
    out, err = capsys.readouterr()
    assert done.value.code == 0, err
    return out, err


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.py"
    path.write_text(
        "import graphnet as gn\n"
        "net = gn.Sequential(gn.Flatten(), gn.Linear(16, 16))\n"
        "net.input_shape = (1, 4, 4)\n"
    )
    return f"{path}:net"


@pytest.mark.parametrize("target, chosen", CHOSEN)
def test_what_auto_stands_for(target, chosen):
    assert resolve("auto", target) == chosen
    assert told("auto", target) == f"{chosen} (auto: {target})"
    for named in ("fp32", "tf32", "bf16"):
        assert resolve(named, target) == told(named, target) == named
    low = lower(net(), (2, 1, 4, 4), target=target, **TRAIN)
    assert low.precision == chosen
    products = (e for e in low.stages.joint.eqns if hasattr(e.attrs, "math"))
    math = {e.attrs.math for e in products if e.outputs[0] is not None}
    assert math == {"tf32" if chosen == "tf32" else "ieee"}
    named = lower(net(), (2, 1, 4, 4), target=target, precision=chosen, **TRAIN)
    assert str(named.stages.fused) == str(low.stages.fused)


def test_fp32_stays_ieee_on_a_gpu():
    low = lower(net(), (2, 1, 4, 4), target="cuda", precision="fp32", **TRAIN)
    assert {s.math for s in low.plan.launches} == {"ieee"}


def test_an_unknown_one_is_an_error_that_lists_them():
    for wrong in ("fp8", "AUTO", "", None, 32):
        with pytest.raises(gn.ConfigError, match="unknown precision.*") as e:
            resolve(wrong, "cpu")
        assert "one of auto, fp32, tf32, bf16" in str(e.value)
    with pytest.raises(gn.ConfigError, match="unknown precision 'half'"):
        gn.Trainer(net(), TRAIN["loss"], TRAIN["optimizer"], precision="half")


@pytest.mark.parametrize("entry", [
    gn.compile, gn.build, gn.Trainer, lower, RunConfig, bench.BenchConfig,
])  # fmt: skip
def test_auto_is_the_default(entry):
    assert inspect.signature(entry).parameters["precision"].default == "auto"


def test_programs_and_trainers_say_what_it_became():
    assert gn.compile(net(), (2, 1, 4, 4), target="cpu").precision == "fp32"
    assert gn.Trainer(net(), *TRAIN.values(), target="cuda").precision == "tf32"
    assert gn.Trainer(net(), *TRAIN.values(), target="cpu").precision == "fp32"


def test_check_gradients_is_in_fp32(monkeypatch):
    seen = []
    real = pipeline.run
    monkeypatch.setattr(
        "graphnet.gradcheck.pipeline.run",
        lambda *a, **how: seen.append(how["precision"]) or real(*a, **how),
    )
    assert gn.check_gradients(net(), (2, 1, 4, 4)).ok and seen == ["fp32"]


# ---- on the command line ---------------------------------------------------------------------


@pytest.mark.parametrize("target, chosen", CHOSEN)
def test_inspect_goes_by_its_target(capsys, model, target, chosen):
    asked = ("inspect", model, "--train", "--batch", 4, "--target", target)
    assert f", {chosen} (auto: {target}), target {target}: " in ended(capsys, *asked)[0]
    assert json.loads(ended(capsys, *asked, "--json")[0])["precision"] == chosen
    assert f", bf16, target {target}" in ended(capsys, *asked, "--precision", "bf16")[0]


def test_compile_and_cache_why_are_for_a_gpu(capsys, model):
    report = json.loads(ended(capsys, "compile", model, "--batch", 16, "--json")[0])
    assert report["precision"] == "tf32"
    assert ended(capsys, "compile", model, "--batch", 16)[0].startswith(
        "precision tf32 (auto: cuda)\n"
    )
    assert "1 of 1 launches hit" in ended(capsys, "cache", "why", model, "--batch", 16)[0]
    asked = ("cache", "why", model, "--batch", 16, "--precision", "fp32")
    assert "0 of 1 launches hit" in ended(capsys, *asked)[0]
    plain = gn.Sequential(gn.Flatten(), gn.Linear(16, 16))
    assert gn.build(plain, (16, 1, 4, 4)).precision == "tf32"


def test_tune_says_and_records_it(capsys, model, tmp_path):
    folder = tmp_path / "trials"
    folder.mkdir()
    out, err = ended(capsys, "tune", model, "--infer", "--batch", 2, "--target", "interpret",
                     "--seconds", 0.1, "--out", folder, "--json")  # fmt: skip
    assert err.startswith("precision fp32 (auto: interpret)\n")
    assert json.loads(out)["precision"] == "fp32" and "b2-fp32" in next(folder.iterdir()).name


def test_bench_compares_the_same_precision():
    said = []
    quick = bench.BenchConfig("lenet5", 2, "infer", target="cpu", rounds=1, seconds=0.01,
                              parity_batches=0, by_layer=False)  # fmt: skip
    result = bench.run_bench(quick, None, said.append)
    assert said[0] == "precision fp32 (auto: cpu), torch's too"
    assert result["precision"] == "fp32" and not result["flags"]["matmul_allow_tf32"]
    on_gpu, target = bench._check(bench.BenchConfig("lenet5", target="cuda"))
    assert (on_gpu.precision, target) == ("tf32", "cuda")
    with peers.torch_flags(on_gpu.precision):
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    with pytest.raises(gn.ConfigError, match="a CPU would compute fp32"):
        bench._check(bench.BenchConfig("lenet5", target="cpu", precision="tf32"))


# ---- runs ------------------------------------------------------------------------------------

TINY = {"model": "lenet5", "data": "digits", "epochs": 1, "batch": 8, "overfit_batches": 1,
        "target": "cpu"}  # fmt: skip


@pytest.mark.parametrize("target, chosen", CHOSEN)
def test_the_precision_of_a_run_follows_its_target(target, chosen):
    assert runs._resolved(RunConfig(**TINY | {"target": target})).precision == chosen


def test_a_run_records_it_and_keeps_it(tmp_path, capsys):
    asked = ("train", "lenet5", "--data", "digits", "--batch", 8, "--overfit-batches", 1,
             "--target", "cpu", "--out", tmp_path / "a")  # fmt: skip
    _, err = ended(capsys, *asked, "--epochs", 1)
    assert err.startswith("precision fp32 (auto: cpu)\n")
    assert read_config(tmp_path / "a")["precision"] == "fp32"

    found = json.loads(ended(capsys, "eval", tmp_path / "a", "--target", "cpu", "--json")[0])
    assert (found["target"], found["precision"]) == ("cpu", "fp32")
    said = ended(capsys, "eval", tmp_path / "a", "--target", "cpu")[0]
    assert said.endswith("images, precision fp32 (auto: cpu)\n")

    # A run that was started elsewhere in tf32 stays one, whatever "auto" is here.
    config = tmp_path / "a" / "config.toml"
    more = config.read_text().replace("epochs = 1", "epochs = 2")
    config.write_text(more.replace('precision = "fp32"', 'precision = "tf32"'))
    out = ("--resume", "--out", tmp_path / "a")
    _, err = ended(capsys, "train", *out, "--precision", "auto")
    assert err.startswith("precision tf32, as the run was started\n")
    assert runs.run_training(RunConfig(**TINY | {"epochs": 2}), tmp_path / "a", resume=True,
                             quiet=True)["precision"] == "tf32"  # fmt: skip
    with pytest.raises(gn.ConfigError, match="was started with precision = 'tf32', not 'fp32'"):
        runs.run_training(RunConfig(**TINY | {"epochs": 2, "precision": "fp32"}), tmp_path / "a",
                          resume=True, quiet=True)  # fmt: skip

    # One of an older version that holds no precision was computed in fp32.
    config.write_text(more.replace('precision = "fp32"\n', "").replace("epochs = 2", "epochs = 3"))
    assert "precision fp32, as the run was started" in ended(capsys, "train", *out)[1]


def test_a_dry_run_says_it(capsys):
    asked = ("train", "lenet5", "--data", "digits", "--batch", 8, "--overfit-batches", 1,
             "--target", "cpu", "--dry-run")  # fmt: skip
    assert "target cpu, precision fp32 (auto: cpu): 8 images" in ended(capsys, *asked)[0]
    assert json.loads(ended(capsys, *asked, "--json")[0])["precision"] == "fp32"


# ---- tests on a GPU --------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(GPU_TESTS.glob("test_*.py")), ids=lambda p: p.name)
def test_gpu_tests_name_theirs(path):
    """Bounds are of one precision: a test that leaves it open is held to those of another."""
    for call in ast.walk(ast.parse(path.read_text())):
        if isinstance(call, ast.Call) and ast.unparse(call.func) in (
            "gn.compile", "gn.Trainer", "gn.build", "lower", "compile_together",
        ):  # fmt: skip
            named = {k.arg for k in call.keywords}
            assert "precision" in named, f"{path.name}:{call.lineno}"
