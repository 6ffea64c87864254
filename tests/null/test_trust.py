"""A run folder of somebody else: it runs no code, holds nothing up, and writes to no terminal."""

import json
import os
import shutil
import time

import pytest
import torch
from PIL import Image

import graphnet as gn
from graphnet.errors import CheckpointError, ConfigError, printable
from graphnet.train import checkpoint, rundir
from graphnet.train.evaluation import load_trained, predict
from graphnet.train.run import run_training
from graphnet.train.settings import RunConfig

EVIL = """from pathlib import Path
Path(__file__).with_name("ran").touch()
import graphnet as gn
net = gn.models.lenet5
"""
ABOUT = {
    "classes": list("0123456789"), "mean": [0.1307], "std": [0.3081], "stored": [1, 28, 28],
}  # fmt: skip
SETTINGS = {
    "data": "digits", "epochs": 1, "target": "cpu", "batch": 16, "overfit_batches": 1
}  # fmt: skip
PROGRESS = {"epoch": 0, "step": 0, "history": [], "partial": None, "data": None}


@pytest.fixture
def run(tmp_path):
    """run(model): a run folder that names it, with one checkpoint."""

    def make(model):
        out = tmp_path / "run"
        rundir.create(out, {"model": model, **SETTINGS})
        checkpoint.save(out, 0, gn.models.lenet5().state_dict(), PROGRESS)
        (out / "data.json").write_text(json.dumps(ABOUT))
        return out

    return make


@pytest.fixture
def evil(tmp_path):
    file = tmp_path / "evil.py"
    file.write_text(EVIL)
    return file


@pytest.fixture
def image(tmp_path):
    Image.new("L", (28, 28), 77).save(tmp_path / "image.png")
    return tmp_path / "image.png"


# ---- code ------------------------------------------------------------------------------------


def test_a_file_that_a_run_names_is_run_only_where_it_is_named(run, evil, image, cli, monkeypatch):
    model = f"{evil}:net"
    out = run(model)
    monkeypatch.setattr("graphnet.train.run._pictures", lambda *parts: None)
    for argv, fix in (
        (("eval", out), f"--model {model}"),
        (("eval", next(out.glob("checkpoints/*.safetensors"))), f"--model {model}"),
        (("predict", out, image), f"--model {model}"),
        (("eval", out, "--model", "lenet5", "--ensemble", out), f"--model {model}"),
        (("train", "--resume", "--out", out), f"graphnet train {model} --resume --out {out}"),
        (("train", "--config", out / "config.toml", "--out", out.parent / "new"),
         f"graphnet train {model} --config"),
        (("train", "--config", out / "config.toml", "--resume", "--out", out),
         f"graphnet train {model} --config"),
    ):  # fmt: skip
        code, said, err = cli(*argv)
        assert (code, said) == (2, "") and err.count("\n") == 1, (argv, err)
        assert f"names the model {model}, a file that would be run; help: if you trust it" in err
        assert fix in err and not evil.with_name("ran").exists(), argv
    assert cli("predict", out, image, "--model", model)[0] == 0
    assert evil.with_name("ran").exists()
    for argv in (
        ("eval", out, "--model", model, "--ensemble", out),
        ("eval", out, "--model", "lenet5", "--model", model, "--ensemble", out),
    ):
        code, _, err = cli(*argv)
        assert code == 0, (argv, err)
    shutil.rmtree(out / "checkpoints")
    code, _, err = cli("train", model, "--resume", "--out", out)
    assert code == 0, err
    (out / "misclassified.png").touch()
    evil.with_name("ran").unlink()
    code, _, err = cli("train", "--resume", "--out", out)  # finished: nothing is run
    assert code == 0 and not evil.with_name("ran").exists(), err


def test_a_named_model_needs_no_naming(run, image, cli):
    out = run("lenet5")
    assert cli("predict", out, image)[0] == cli("eval", out)[0] == 0
    assert cli("eval", out, "--ensemble", out)[0] == 0


def test_in_python_the_settings_name_the_model(run, evil, monkeypatch):
    """Whoever gives all settings has named the file; who leaves them out has not."""
    out = run(f"{evil}:net")
    monkeypatch.setattr("graphnet.train.run._pictures", lambda *parts: None)
    with pytest.raises(ConfigError, match="a file that would be run"):
        load_trained(out)
    with pytest.raises(ConfigError, match="a file that would be run"):
        run_training(RunConfig(), out, resume=True, quiet=True, given=frozenset())
    assert not evil.with_name("ran").exists()
    shutil.rmtree(out / "checkpoints")  # so it starts
    settings = RunConfig(model=f"{evil}:net", **SETTINGS)
    assert run_training(settings, out, resume=True, quiet=True)["epochs"] == 1


# ---- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_no_part_of_a_run(run, image, kind, cli, tmp_path):
    out = run("lenet5")
    (tensors,) = out.glob("checkpoints/*.safetensors")
    whole = tmp_path / "whole"
    shutil.copytree(out, whole)
    start = time.monotonic()
    for path, wanted in (
        (tensors, 2), (tensors.with_suffix(".json"), 2), (out / "config.toml", 2),
        (out / "data.json", 2), (out / "checkpoints/last.json", 0),  # else the newest is taken
    ):  # fmt: skip
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero")
        code, _, err = cli("predict", out, image)
        assert code == wanted and (not wanted or "not a regular file" in err), (path, err)
        path.unlink()
        shutil.copy(whole / path.relative_to(out), path)
    os.mkfifo(tmp_path / "alone.safetensors")
    code, _, err = cli("predict", tmp_path / "alone.safetensors", image, "--model", "lenet5")
    assert code == 2 and "not a regular file" in err
    with pytest.raises(CheckpointError, match="not a regular file"):
        gn.load(tmp_path / "alone.safetensors", gn.models.lenet5())
    assert time.monotonic() - start < 30


def test_metrics_go_to_no_file_elsewhere(run, tmp_path):
    out = run("lenet5")
    (tmp_path / "victim").write_text("one line\n")
    (out / "metrics.jsonl").symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match=r"cannot write .*metrics.jsonl"):
        rundir.MetricsLog(out)
    assert (tmp_path / "victim").read_text() == "one line\n"
    (out / "metrics.jsonl").unlink()
    os.mkfifo(out / "metrics.jsonl")
    with pytest.raises(ConfigError, match=r"cannot write .*metrics.jsonl"):
        rundir.MetricsLog(out)


# ---- what it says ----------------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    {"classes": 5}, {"classes": [1, 2]}, {"classes": None}, {"mean": ["a"]}, {"mean": []},
    {"mean": [0.1, 0.2]}, {"mean": [float("nan")]}, {"mean": [1e300]}, {"mean": [True]},
    {"std": [0]}, {"std": [-1.0]}, {"std": "1"}, {"std": {}}, {"stored": [1, 100000, 100000]},
    {"stored": [1, 28]}, {"stored": [1, 28, -28]}, {"stored": [1, 28.0, 28]}, {"stored": 28},
    {"stored": [1, 20, 28]}, {"stored": [3, 28, 28]}, {"mean": ...},
])  # fmt: skip
def test_a_hostile_data_json_gets_one_line(run, image, change):
    out = run("lenet5")
    about = {name: value for name, value in (ABOUT | change).items() if value is not ...}
    (out / "data.json").write_text(json.dumps(about))
    lost = ".*it lacks" if len(about) < len(ABOUT) else ""
    with pytest.raises(CheckpointError, match=rf"data\.json{lost}") as error:
        predict(out, [image], target="cpu")
    assert "\n" not in error.value.message and len(error.value.message) < 400


@pytest.mark.parametrize("line", ["model = 5", "epochs = 'x'", "lr = [1]", "data = {}"])
def test_a_hostile_config_gets_one_line(run, image, line, cli):
    out = run("lenet5")
    name = line.partition(" ")[0]
    kept = [t for t in (out / "config.toml").read_text().splitlines() if not t.startswith(name)]
    (out / "config.toml").write_text("\n".join([*kept, line]))
    for argv in (("predict", out, image), ("train", "--resume", "--out", out)):
        code, _, err = cli(*argv)
        assert code == 2 and f"config.toml: {name} = " in err and err.count("\n") == 1, err


def test_names_of_classes_reach_no_terminal(run, image, cli):
    out = run("lenet5")
    net = gn.models.lenet5()
    state = {k: torch.zeros_like(v) for k, v in net.state_dict().items()}
    last = [k for k in state if k.endswith("bias")][-1]
    state[last][0] = 9.0
    checkpoint.save(out, 1, state, PROGRESS | {"step": 1})
    name = "\x1b]0;owned\x07\x1b[31mzero\x1b[2J\x9b1m\u202e\r\n!"
    (out / "data.json").write_text(json.dumps(ABOUT | {"classes": [name, *"123456789"]}))
    code, said, _ = cli("predict", out, image, "--top", 1)
    assert code == 0 and said == f"{image}: zero! 99.9 %\n"
    _, said, _ = cli("predict", out, image, "--json")
    assert json.loads(said)["images"][0]["classes"][0]["name"] == "zero!"
    code, said, err = cli("predict", out.parent / "no\x1b[2Jthing", image)
    assert code == 2 and "\x1b" not in err and "nothing" in err


def test_what_is_printable():
    assert printable("naïve 猫 👍🏽 a\u00a0b") == "naïve 猫 👍🏽 a\u00a0b"
    link = "\x1b]8;;x\x1b\\y\x1b]8;;\x1b\\"
    assert printable(f"\x1b\x1b[31m[31mred\x1b[0m{link}\x1b]open") == "[31mredyopen"
    assert printable("a\tb\x00\x7f\x85c\x1b") == "abc"
