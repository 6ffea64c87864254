"""Runs from the command line: what they leave, how they stop, and how they go on."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import graphnet as gn
from graphnet.errors import ConfigError, NumericsError, RunExistsError, Stopped
from graphnet.train import checkpoint
from graphnet.train.callbacks import Checkpoints, restore
from graphnet.train.data import Batches, Dataset
from graphnet.train.evaluation import evaluate_run
from graphnet.train.run import RunConfig, run_training
from graphnet.train.rundir import read_metrics
from graphnet.train.signals import StopSignals
from graphnet.train.trainer import Trainer
from tests.stopping import StopAt, StopInEval

ROOT = Path(__file__).resolve().parents[2]
DIGITS = RunConfig("lenet5", "digits", epochs=2, batch=64, target="cpu", lr=0.05)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "a"
    return out, run_training(DIGITS, out, quiet=True)


def files(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def test_a_run_leaves_metrics_pictures_and_a_checkpoint_torch_can_read(run):
    out, result = run
    assert {p.name for p in out.iterdir()} == {
        "checkpoints", "config.toml", "confusion.png", "curves.png", "data.json", "filters.png",
        "metrics.csv", "metrics.jsonl", "misclassified.png", "test.json",
    }  # fmt: skip
    epochs = [r for r in read_metrics(out) if r["kind"] == "epoch"]
    assert [r["epoch"] for r in epochs] == [1, 2] and epochs[1]["step"] == result["steps"] == 46
    assert epochs[1]["train_loss"] < epochs[0]["train_loss"]
    for name in ("curves.png", "filters.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    tensors = load_file(out / "checkpoints/step-00000046.safetensors")
    assert set(gn.models.lenet5().state_dict()) <= set(tensors)
    assert json.dumps(result)  # plain JSON


def test_evaluation_of_a_run_agrees_with_its_last_epoch(run):
    out, result = run
    found = evaluate_run(out, target="cpu", batch=50)
    assert found["top1_error"] == pytest.approx(result["top1_error"])
    assert found["loss"] == pytest.approx(result["test_loss"], rel=1e-5)
    confusion = torch.tensor(found["confusion"])
    assert int(confusion.sum()) == found["images"] == 359
    assert 100 * (1 - int(confusion.diag().sum()) / 359) == pytest.approx(found["top1_error"])
    assert found["top5_error"] <= found["top1_error"]


def test_a_finished_run_stays_as_it_is(run):
    out, result = run
    before = files(out)
    again = run_training(DIGITS, out, resume=True, quiet=True)
    assert files(out) == before and again["top1_error"] == result["top1_error"]


def test_an_existing_run_is_not_overwritten_and_keeps_its_settings(run):
    out, _ = run
    with pytest.raises(RunExistsError, match="already exists"):
        run_training(DIGITS, out, quiet=True)
    other = RunConfig("lenet5", "digits", epochs=2, batch=32, target="cpu", lr=0.05)
    with pytest.raises(ConfigError, match="batch = 64, not 32"):
        run_training(other, out, resume=True, quiet=True, given={"batch"})


def test_wrong_settings_leave_no_folder(tmp_path):
    for wrong in ({"lr": -1.0}, {"data": "digitz"}, {"model": "lenet6"}, {"schedule": "zigzag"}):
        with pytest.raises(gn.GraphnetError):
            run_training(RunConfig(**{**DIGITS.__dict__, **wrong}), tmp_path / "x", quiet=True)
    assert not list(tmp_path.iterdir())


def small_trainer(dropout=True):
    torch.manual_seed(3)
    layers = [gn.Conv2d(1, 4, 3), gn.ReLU(), gn.MaxPool2d(2), gn.Flatten()]
    layers += [gn.Dropout(0.3)] if dropout else []
    net = gn.Sequential(*layers, gn.Linear(36, 10))
    schedule = gn.schedule.cosine(0.1, 24, 3)
    sgd = gn.SGD(lr=0.1, momentum=0.9, weight_decay=1e-3)
    return Trainer(net, gn.CrossEntropyLoss(), sgd, schedule, target="cpu", seed=5)


def data():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (60,), generator=g)
    return Dataset(torch.rand(60, 1, 8, 8, generator=g), labels)


def fit(trainer, val=None):
    held = Dataset(data().images[:20], data().labels[:20])
    return trainer.fit(Batches(data(), 8, seed=5), val or held, epochs=3, batch=8)


def final(trainer):
    return {**trainer.net.state_dict(), **trainer.state_dict()}


@pytest.mark.parametrize("stop", [0, 1, 5, 8, 9, 13, 16, 23, 24, "eval0", "eval1", "eval2"])
def test_a_stopped_run_goes_on_bit_for_bit(stop, tmp_path):
    whole = small_trainer()
    history = fit(whole)
    first = small_trainer()
    first.callbacks = [Checkpoints(tmp_path, keep=9)]
    if isinstance(stop, int):
        first.callbacks.append(StopAt(stop))
        first.stop = stop == 0
        fit(first)
        assert first.step == stop
    else:
        held = Dataset(data().images[:20], data().labels[:20])
        fit(first, StopInEval(Batches(held, 8, shuffle=False), first, int(stop[4:])))
        assert first.step == 8 * (int(stop[4:]) + 1) and first.epoch == int(stop[4:])
    second = small_trainer()
    second.compile((8, 1, 8, 8))
    found = checkpoint.load_latest(tmp_path)
    restore(second, found)
    again = fit(second)
    for key, want in final(whole).items():
        assert torch.equal(final(second)[key], want), key
    assert [m["val_loss"] for m in again] == [m["val_loss"] for m in history]
    got = [m["train_loss"] for m in again]
    assert got == pytest.approx([m["train_loss"] for m in history], rel=1e-12)


def test_a_loss_that_is_not_finite_stops_in_its_step():
    trainer = small_trainer(dropout=False)
    bad = data()
    bad.images[int(Batches(bad, 8, seed=5).dataset.labels.argmax())] = math.nan
    with pytest.raises(NumericsError, match="at step [0-7]"):
        trainer.fit(Batches(bad, 8, seed=5), epochs=1, batch=8)
    assert trainer.step <= 8


def test_a_signal_before_the_trainer_exists_counts():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        trainer = small_trainer()
        signals.watch(trainer)
        assert trainer.stop and signals.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits_and_resume_finishes(number, code, tmp_path):
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "graphnet", "train", "lenet5", "--data", "digits", "--epochs", "20",
        "--lr", "0.05", "--batch", "32", "--target", "cpu", "--out", str(out),
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    last = out / "checkpoints/last.json"
    end = time.monotonic() + 120
    while not last.exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert b"saves after this step" in err and f"--resume --out {out} goes on".encode() in err
    step = checkpoint.load_latest(out).step
    assert 0 < step < 20 * 45
    resumed = subprocess.run(
        [*command[:5], "--data", "digits", "--out", str(out), "--resume", "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    result = json.loads(resumed.stdout)
    assert result["epochs"] == 20 and result["steps"] == 20 * 45 and result["top1_error"] < 10


@pytest.mark.data
@pytest.mark.slow
def test_mnist_reaches_one_percent(tmp_path):
    """LeCun et al. 1998: 0.95 % after 20 epochs without distortions."""
    errors = []
    for seed in range(3):
        config = RunConfig(
            "lenet5", f"mnist:{os.environ['GRAPHNET_DATA']}/mnist", epochs=5, target="cpu",
            lr=0.05, seed=seed,
        )  # fmt: skip
        errors.append(run_training(config, tmp_path / str(seed), quiet=True)["top1_error"])
    assert sum(errors) / 3 <= 1.0, errors


def test_a_signal_while_there_is_nothing_to_save_ends_the_work_at_once():
    with StopSignals() as signals:
        with pytest.raises(Stopped) as stop, signals.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        assert stop.value.number == signal.SIGTERM == signals.received
    assert not isinstance(stop.value, Exception)  # nobody who handles errors catches it
