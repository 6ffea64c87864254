"""Checkpoints and run folders under damage, full disks and kills at random moments."""

import json
import os
import random
import resource
import signal
import sys
import time
import tomllib

import numpy as np
import pytest
import torch

from graphnet.errors import CheckpointError, ConfigError, DataError, RunExistsError
from graphnet.train import checkpoint, rundir
from graphnet.train.checkpoint import CheckpointWarning, load, load_best, load_latest, save


def tensors(generation, size=64):
    # Filled by NumPy: a large torch.full starts OpenMP threads, which a forked child has not.
    return {
        "conv1.weight": torch.from_numpy(np.full((size, 3), generation, dtype=np.float32)),
        "half": torch.from_numpy(np.full(size, generation, dtype=np.int32)).view(torch.bfloat16),
        "count": torch.tensor(generation),
        "none": torch.empty(0, 4),
    }


def save_generation(run, generation, **options):
    return save(run, generation, tensors(generation, options.pop("size", 64)),
                {"generation": generation, "lr": 0.1, "best": None}, **options)  # fmt: skip


def consistent(found):
    """The generation of a checkpoint, all of whose parts come from one save."""
    values = {found.step, found.state["generation"], int(found.tensors["count"])}
    values |= set(found.tensors["conv1.weight"].flatten().int().tolist())
    assert len(values) == 1, f"mixed generations {values}"
    return values.pop()


def test_round_trip_is_exact_and_plain_safetensors(tmp_path):
    from safetensors.torch import load_file

    path = save_generation(tmp_path, 7)
    assert path.name == "step-00000007.safetensors" and path.parent.name == "checkpoints"
    found = load(path)
    assert found.state == {"generation": 7, "lr": 0.1, "best": None} and found.step == 7
    for key, tensor in tensors(7).items():
        assert found.tensors[key].dtype == tensor.dtype
        assert torch.equal(found.tensors[key], tensor) and torch.equal(load_file(path)[key], tensor)
    assert consistent(load(path.with_suffix(".json"))) == 7


def test_tensors_that_are_not_contiguous(tmp_path):
    odd = {"t": torch.arange(12).reshape(3, 4).T, "s": torch.arange(10)[::3]}
    found = load(save(tmp_path, 0, odd))
    assert all(torch.equal(found.tensors[k], odd[k]) for k in odd)


def test_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 7):
        save_generation(tmp_path, step, best=step == 2)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    stems = [f"step-{n:08d}" for n in (2, 5, 6)]
    suffixes = ("json", "safetensors")
    assert names == ["best.json", "last.json", *(f"{s}.{x}" for s in stems for x in suffixes)]
    assert consistent(load_latest(tmp_path)) == 6 and consistent(load_best(tmp_path)) == 2


def test_no_checkpoint_is_none(tmp_path):
    assert load_latest(tmp_path) is None and load_latest(tmp_path / "no") is None
    with pytest.raises(CheckpointError, match="names no checkpoint"):
        load_best(tmp_path)


def test_saving_behind_a_damaged_newer_one_keeps_what_was_saved(tmp_path):
    save_generation(tmp_path, 1)
    newest = save_generation(tmp_path, 9)
    newest.write_bytes(b"")
    with pytest.warns(CheckpointWarning, match="step-00000001"):
        assert consistent(load_latest(tmp_path)) == 1
    save_generation(tmp_path, 2, keep=1)
    assert consistent(load_latest(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["last.json", "manifest", "tensors"])
def test_falls_back_with_a_warning(tmp_path, damage):
    save_generation(tmp_path, 1)
    newest = save_generation(tmp_path, 2)
    if damage == "last.json":  # the pointer alone: nothing is lost, so nothing is said
        (tmp_path / "checkpoints" / "last.json").write_bytes(b'{"file": 3')
        assert consistent(load_latest(tmp_path)) == 2
        return
    path = newest if damage == "tensors" else newest.with_suffix(".json")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.warns(CheckpointWarning, match="took step-00000001.safetensors: "):
        assert consistent(load_latest(tmp_path)) == 1
    (tmp_path / "checkpoints" / "step-00000001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        load_latest(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_every_truncation_of_a_small_checkpoint_is_found(tmp_path, suffix):
    path = save_generation(tmp_path, 3, size=2).with_suffix(suffix)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        damaged(path, whole[:cut], must_fail=True)


def damaged(path, data, must_fail):
    """Loads a checkpoint one of whose files now holds `data`: an error of ours, or no change."""
    path.write_bytes(data)
    try:
        assert consistent(load(path)) == 3 and not must_fail
    except CheckpointError as error:
        assert str(path.parent) in str(error)


def damage_at_random(tmp_path, count):
    """`count` truncations and `count` flipped bits of each file of a checkpoint of 280 kB."""
    rng = random.Random(0)
    for suffix in (".safetensors", ".json"):
        path = save_generation(tmp_path, 3, size=20_000).with_suffix(suffix)
        whole = path.read_bytes()
        for _ in range(count):
            damaged(path, whole[: rng.randrange(len(whole))], must_fail=True)
        for _ in range(count):
            spot = rng.randrange(8 * len(whole))
            data = bytearray(whole)
            data[spot // 8] ^= 1 << spot % 8
            # A flip in JSON's white space or in a digit's form may leave its meaning as it was.
            damaged(path, data, must_fail=suffix == ".safetensors")
        path.write_bytes(whole)


def test_random_damage_is_found(tmp_path):
    damage_at_random(tmp_path, 200)


@pytest.mark.slow
def test_random_damage_is_found_many_times(tmp_path):
    damage_at_random(tmp_path, 2000)


@pytest.mark.parametrize(
    "text", ["[]", "{}", "3", "[" * 100_000, '{"manifest_sha256": 1}', "\x00", "NaN"]
)
def test_hostile_manifests(tmp_path, text):
    path = save_generation(tmp_path, 1)
    path.with_suffix(".json").write_text(text)
    with pytest.raises(CheckpointError):
        load(path)


def test_parts_of_two_saves_do_not_mix(tmp_path):
    one, two = save_generation(tmp_path, 1), save_generation(tmp_path, 2)
    one.write_bytes(two.read_bytes())
    with pytest.raises(CheckpointError, match="tensors differ from the manifest"):
        load(one)
    one.with_suffix(".json").write_bytes(two.with_suffix(".json").read_bytes())
    with pytest.raises(CheckpointError, match="is the manifest of step-00000002"):
        load(one)


@pytest.mark.parametrize("state", [{"x": object()}, {"x": float("nan")}, {"x": {1, 2}}])
def test_state_that_is_no_json(tmp_path, state):
    save_generation(tmp_path, 1)
    with pytest.raises(CheckpointError, match="is no JSON"):
        save(tmp_path, 2, {}, state)
    assert consistent(load_latest(tmp_path)) == 1


# ---- processes that end ----------------------------------------------------------------------


def in_child(work):
    """Forks, runs `work`, returns the child's pid; a forked child is warm, it imports nothing."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)  # whatever hangs in a forked child ends, and fails the test
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(3)
    return pid


def save_for_ever(run, first):
    generation = first
    while True:
        save_generation(run, generation, size=20_000)
        generation += 1


def kill_at_random_moments(tmp_path, kills):
    moved, torn = 0, 0
    rng = random.Random(0)
    for k in range(kills):
        run = tmp_path / str(k)
        save_generation(run, 1, size=20_000)
        pid = in_child(lambda run=run: save_for_ever(run, 2))
        time.sleep(rng.uniform(0.0, 0.15))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        torn += bool(list((run / "checkpoints").glob(".tmp-*")))
        generation = consistent(load_latest(run))
        moved += generation > 1
        save_generation(run, generation + 1)
        assert consistent(load_latest(run)) == generation + 1
    # Without these two the kills may all have come before the first save.
    assert moved >= kills // 2, f"only {moved} of {kills} children saved anything"
    assert torn, "no kill came in the middle of a save"


def test_kill_9_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    kill_at_random_moments(tmp_path, 20)


@pytest.mark.slow
def test_kill_9_many_times(tmp_path):
    kill_at_random_moments(tmp_path, 300)


def test_a_full_disk_at_25_offsets_is_typed_and_harms_nothing(tmp_path):
    path = save_generation(tmp_path, 1, size=20_000)
    folder = path.parent
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    size = path.stat().st_size

    def fill(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(CheckpointError, match=r"cannot write .*\n  help: what stood there"):
            save_generation(tmp_path, 2, size=20_000)

    for limit in [0, 1, 100, 4095, 4096, *(size * k // 20 for k in range(1, 20)), size - 1]:
        _, status = os.waitpid(in_child(lambda limit=limit: fill(limit)), 0)
        assert os.waitstatus_to_exitcode(status) == 0, limit
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert consistent(load_latest(tmp_path)) == 1


# What reaches the kernel on the way of a save, by the name Python calls it.
SYSCALLS = {
    "open", "write", "flush", "fsync", "chmod", "replace", "close", "unlink", "mkdir", "stat",
    "lstat", "listdir", "scandir", "readinto", "read", "__exit__", "__next__",
}  # fmt: skip


def die_at(point):
    """Ends the process by SIGKILL before (even) or behind (odd) its next such call."""
    seen = 0

    def profile(frame, event, function):
        nonlocal seen
        if event in ("c_call", "c_return") and function.__name__ in SYSCALLS:
            if seen == point:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.setprofile(profile)


def test_a_kill_at_each_system_call_of_a_save(tmp_path):
    finished = point = 0
    while not finished:
        run = tmp_path / str(point)
        for generation in (1, 2):  # so that the save also prunes
            save_generation(run, generation, size=500, keep=1, best=generation == 1)

        def third(run=run, point=point):
            die_at(point)
            save_generation(run, 3, size=500, keep=1, best=True)
            sys.setprofile(None)

        _, status = os.waitpid(in_child(third), 0)
        finished = os.WIFEXITED(status)
        assert finished or os.WTERMSIG(status) == signal.SIGKILL
        latest = consistent(load_latest(run))
        assert latest in (2, 3) and consistent(load_best(run)) in (1, 3)
        save_generation(run, latest + 1, size=500)
        assert consistent(load_latest(run)) == latest + 1
        point += 1
    assert point > 50, f"a save made only {point} calls that count"
    assert latest == 3


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_is_typed_and_harms_nothing(tmp_path, monkeypatch, call):
    save_generation(tmp_path, 1)

    def fail(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as m:
        m.setattr(checkpoint.os, call, fail)
        with pytest.raises(CheckpointError, match="Input/output error"):
            save_generation(tmp_path, 2)
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))
    assert consistent(load_latest(tmp_path)) == 1


def test_leftovers_go_but_not_those_of_a_writer_at_work(tmp_path):
    save_generation(tmp_path, 1)
    old, new = (tmp_path / "checkpoints" / f".tmp-{n}" for n in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    save_generation(tmp_path, 2)
    assert not old.exists() and new.exists()


# ---- run folders -----------------------------------------------------------------------------

SETTINGS = {
    "model": 'le"net\\\n\x7f\U0001f600', "epochs": 3, "lr": 1e-5, "big": 1e16, "nesterov": False,
    "resume": None, "shape": [1, 28, 28], "optim": {"momentum": 0.9, "a b": "x"},
}  # fmt: skip


def test_run_folder_holds_its_config(tmp_path):
    run = rundir.create(tmp_path / "a" / "run", SETTINGS)
    expected = {k: v for k, v in SETTINGS.items() if v is not None}
    assert rundir.read_config(run) == expected == tomllib.loads((run / "config.toml").read_text())
    assert [p.name for p in run.parent.iterdir()] == ["run"] and run.stat().st_mode & 0o777 == 0o755


def test_a_run_is_not_overwritten(tmp_path):
    run = rundir.create(tmp_path / "run", {"seed": 1})
    with pytest.raises(RunExistsError, match="holds a run\n  help: add --resume"):
        rundir.create(run, {"seed": 2})
    assert rundir.read_config(run) == {"seed": 1}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    with pytest.raises(RunExistsError, match="something that is no run"):
        rundir.create(tmp_path / "other", {})
    (tmp_path / "empty").mkdir()
    rundir.create(tmp_path / "empty", {})
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_no_run_and_bad_config(tmp_path):
    with pytest.raises(ConfigError, match="is no run folder"):
        rundir.read_config(tmp_path)
    (tmp_path / "config.toml").write_text("a = = 3")
    with pytest.raises(ConfigError, match="is no TOML"):
        rundir.read_config(tmp_path)
    with pytest.raises(ConfigError, match="has no form in TOML"):
        rundir.create(tmp_path / "x", {"a": object()})
    assert not (tmp_path / "x").exists()


def test_metrics_with_a_torn_last_line(tmp_path):
    assert rundir.read_metrics(tmp_path) == []
    with rundir.MetricsLog(tmp_path) as log:
        log.append({"epoch": 1, "loss": float("nan")})
        log.append({"epoch": 2, "loss": 0.5})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    two = [{"epoch": 1, "loss": None}, {"epoch": 2, "loss": 0.5}]
    assert rundir.read_metrics(tmp_path) == two
    cuts = [whole[:cut] for cut in range(len(whole))]
    for torn in [*cuts, whole + b"\x00" * 9, whole + b"\x00\n"]:
        path.write_bytes(torn)
        kept = rundir.read_metrics(tmp_path)
        assert kept == two[: min(torn.count(b"}\n"), 2)]
        with rundir.MetricsLog(tmp_path) as log:
            log.append({"epoch": 3})
        assert rundir.read_metrics(tmp_path) == [*kept, {"epoch": 3}]


def test_metrics_damaged_in_the_middle(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"a": 1}\nxx\n{"a": 2}\n')
    with pytest.raises(DataError, match="line 2 of 3"):
        rundir.read_metrics(tmp_path)
    with pytest.raises(DataError, match="line 2 of 3"):
        rundir.MetricsLog(tmp_path)


def test_the_pointer_names_a_step(tmp_path):
    save_generation(tmp_path, 5)
    pointer = json.loads((tmp_path / "checkpoints" / "last.json").read_text())
    assert pointer == {"step": 5, "file": "step-00000005.safetensors"}
