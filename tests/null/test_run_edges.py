"""Runs at their edges: taken up again in every way people do, on full disks, into closed pipes."""

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from graphnet.errors import CheckpointError, ConfigError, DiskError, RunExistsError
from graphnet.train import callbacks, checkpoint, plots, rundir
from graphnet.train.run import RunConfig, run_training

ROOT = Path(__file__).resolve().parents[2]
TINY = RunConfig("lenet5", "digits", epochs=2, batch=256, target="cpu", lr=0.05)


@pytest.fixture
def run(tmp_path):
    out = tmp_path / "a"
    run_training(TINY, out, quiet=True)
    return out


def contents(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.filterwarnings("default::graphnet.train.checkpoint.CheckpointWarning")
def test_taking_a_run_up_again(run, cli):
    before = contents(run)
    code, out, err = cli("train", "--resume", "--out", run)  # the run knows its model
    assert code == 0 and "2 epochs, test accuracy" in out
    assert err == f"{run} was finished before: nothing is left to do\n"
    code, _, err = cli("train", "--resume", "--workers", 0, "--uncached", "--out", run)
    assert code == 0, err
    assert contents(run) == before
    code, _, err = cli("train", "--resume", "--dry-run", "--out", run)
    assert (code, err[10:]) == (2, "Invalid value for --resume: a dry run starts from nothing\n")
    with open(run / "config.toml") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is training"):
            run_training(TINY, run, resume=True, quiet=True)

    # Killed between its last checkpoint and its last picture.
    for name in ("test.json", "misclassified.png"):
        (run / name).unlink()
    assert cli("train", "--resume", "--out", run)[0] == 0
    after = contents(run)
    assert after.keys() == before.keys()
    assert after[run / "test.json"][1] == before[run / "test.json"][1]

    newest = max((run / "checkpoints").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1])
    code, out, err = cli("train", "--resume", "--out", run)
    assert code == 0 and err.startswith("graphnet: took step-00000006.safetensors: "), err
    assert "run.py" not in err and contents(run).keys() == before.keys()
    assert contents(run)[newest][1] == before[newest][1]


def test_an_existing_folder_is_refused_before_data_are_read(tmp_path):
    run = rundir.create(tmp_path / "a", {})
    settings = RunConfig("lenet5", "mnist:/nowhere", target="cpu")
    with pytest.raises(RunExistsError, match="add --resume"):
        run_training(settings, run, quiet=True)
    (tmp_path / "file").touch()
    with pytest.raises(RunExistsError, match="no run\n  help: choose another --out"):
        run_training(settings, tmp_path / "file", quiet=True)


def test_a_switch_of_a_file_can_be_turned_off(tmp_path, cli):
    file = tmp_path / "c.toml"
    file.write_text('model = "lenet5"\ndata = "digits"\nnesterov = true\nmomentum = 0\n')
    argv = ("train", "--config", file, "--batch", 256, "--target", "cpu", "--dry-run")
    assert cli(*argv)[0] == 2
    code, out, err = cli(*argv, "--no-nesterov")
    assert code == 0 and "1438 images in 6 batches" in out, err


def test_a_full_disk_is_no_bad_usage(tmp_path, monkeypatch, cli):
    demo = ("demo", "dropout", "--masks", 2, "--out")
    code, _, err = cli(*demo, tmp_path / "no" / "a.png")
    assert code == 2 and err.startswith("graphnet: CheckpointError: cannot write"), err

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(checkpoint.os, "fsync", full)
        code, _, err = cli(*demo, tmp_path / "a.png")
    assert code == 1 and err.startswith("graphnet: DiskError: cannot write"), err
    assert not list(tmp_path.iterdir()) and issubclass(DiskError, CheckpointError)


def test_metrics_on_a_full_disk(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = rundir.MetricsLog(tmp_path)
    log.append({"epoch": 1})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
        with pytest.raises(DiskError, match=r"cannot write .*metrics.jsonl"):
            log.append({"epoch": 2, "loss": 0.25})
        log.close()  # raises nothing: other callbacks have their end to come
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert rundir.read_metrics(tmp_path) == [{"epoch": 1}]


def test_a_run_survives_its_reader(monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

        flush = isatty = write

    monkeypatch.setattr(sys, "stderr", Closed())
    callbacks.say("epoch 1")  # raises nothing


def test_a_pipe_that_is_closed_ends_without_a_word():
    process = subprocess.Popen(
        [sys.executable, "-m", "graphnet", "inspect", "lenet5", "--train", "--stage", "fused"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == (b"", 1)


def test_a_group_without_a_command_shows_its_help(cli):
    code, out, err = cli("demo")
    assert (code, err) == (2, "") and "dropout" in out


def test_a_second_signal_shows_the_cursor_again():
    """A progress bar hides it, and nothing else runs before the process ends."""
    script = (
        "import os, signal\n"
        "from graphnet.train.signals import StopSignals\n"
        "with StopSignals():\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('not reached')\n"
    )
    terminal, other = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=other
    )
    assert (process.communicate(timeout=60)[0], process.returncode) == (b"", 143)
    said = os.read(terminal, 4096).decode()
    assert "SIGUSR1: saves after this step" in said and said.rstrip().endswith("\x1b[?25h")
    os.close(terminal)
    os.close(other)


def test_pictures_have_the_format_of_their_name(tmp_path, cli):
    heads = {"a.png": b"\x89PNG", "a": b"\x89PNG", "a.jpg": b"\xff\xd8\xff", "a.PDF": b"%PDF"}
    for name, head in heads.items():
        assert cli("demo", "dropout", "--masks", 2, "--out", tmp_path / name)[0] == 0
        assert (tmp_path / name).read_bytes().startswith(head)
    code, _, err = cli("demo", "dropout", "--masks", 2, "--out", tmp_path / "a.xyz")
    assert code == 2 and "no picture ends in .xyz; help: one of" in err


def test_curves_of_a_loss_that_reached_0(tmp_path):
    rows = [{"epoch": k, "train_loss": 0.0, "val_loss": 0.0, "val_accuracy": 1.0} for k in (1, 2)]
    plots.curves(tmp_path / "a.png", rows[:1], "one epoch")
    plots.curves(tmp_path / "b.png", rows, "two")  # a warning would be an error here
    assert (tmp_path / "a.png").stat().st_size > 5000 < (tmp_path / "b.png").stat().st_size


def test_a_run_whose_test_loss_is_not_finite_is_saved(tmp_path, cli):
    """Its other steps are skipped, and the parameters of the first are all that it has."""
    argv = ("train", "lenet5", "--data", "digits", "--target", "cpu", "--lr", 1e20, "--epochs", 1)
    code, out, err = cli(*argv, "--nonfinite", "skip", "--out", tmp_path / "a", "--json")
    assert code == 0, err
    strict = {"parse_constant": lambda name: pytest.fail(f"{name} is no JSON")}
    found = json.loads(out, **strict)
    assert found["test_loss"] is None and found["history"][0]["skipped"] == 11
    assert json.loads((tmp_path / "a/test.json").read_text(), **strict)["loss"] is None
    code, out, err = cli("train", "--resume", "--out", tmp_path / "a", "--json")
    assert code == 0 and json.loads(out, **strict) == found
    (tmp_path / "a/misclassified.png").unlink()
    assert json.loads(cli("train", "--resume", "--out", tmp_path / "a", "--json")[1]) == found
    code, out, err = cli(*argv, "--dry-run", "--json")
    assert code == 0 and json.loads(out, **strict)["next_loss"] is None
