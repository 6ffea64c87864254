"""Runs of several processes under torchrun: the same run on any number of them, and how it ends."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from graphnet.train import checkpoint, evaluation, rundir
from graphnet.train.data import Batches, Dataset, load
from tests import torchrun

STOPPED = torchrun.STEPS + 5  # where the run that is sent SIGTERM ends

# Seconds to the end beside other tests, where 17 were seen; alone it takes 3 to 4. The soak
# holds 10. Without our doing it would be the group's timeout, 600.
BUSY = 60


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    folder = tmp_path_factory.mktemp("torchrun")
    done = subprocess.run(
        [sys.executable, "-m", "tests.torchrun", folder],
        cwd=torchrun.ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def said(runs, name):
    """The lines of ours that a run left, without the dots of torchrun's report."""
    text = (runs[0] / f"{name}.log").read_text()
    return [line for line in text.splitlines() if line.startswith("graphnet: ")]


def last(runs, name):
    return checkpoint.load_latest(runs[0] / name)


def of_all(tensors):
    """With the gradients that wait for an update summed over the ranks."""
    out = {k: t.clone() for k, t in tensors.items() if ".of_rank" not in k}
    for k, t in tensors.items():
        if ".of_rank" in k:
            out[k.partition(".of_rank")[0]] += t
    return out


def history(runs, name):
    timed = ("seconds", "images_per_s")
    rows = last(runs, name).state["history"]
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def apart(runs, one, other):
    """The largest relative norm of a difference between the tensors of two runs."""
    a, b = (of_all(last(runs, name).tensors) for name in (one, other))
    assert a.keys() == b.keys()
    norm = lambda t: float(t.double().norm())
    return max(norm(t.double() - b[k].double()) / max(norm(t), 1e-30) for k, t in a.items())


def test_two_processes_train_as_one_does(runs):
    folder, found = runs
    assert found["whole"] == [0, 0] and found["one"] == [0]
    assert apart(runs, "one", "whole") < 1e-5
    for a, b in zip(history(runs, "one"), history(runs, "whole"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    text = (folder / "whole.log").read_text()
    assert text.count("epoch 3/3") == 1 and "2 processes, precision fp32" in text
    one, whole = ({p.name for p in (folder / n).iterdir()} for n in ("one", "whole"))
    assert one == whole
    tests = [json.loads((folder / n / "test.json").read_text()) for n in ("one", "whole")]
    assert tests[0]["confusion"] == tests[1]["confusion"]


@pytest.mark.parametrize("name", ["towers", "joined"])
def test_a_normalized_net_trains_as_in_one_process(runs, name):
    """In two towers, whose channels have statistics of their own, and over the rows of all."""
    assert runs[1]["half"] == [0] and runs[1][name] == [0, 0]
    assert apart(runs, name, "half") < 1e-5
    for a, b in zip(history(runs, name), history(runs, "half"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_statistics_of_the_first_rank_are_evaluated(runs):
    """Each rank has its own, unless they are joined: the checkpoint holds those that were used."""
    assert runs[1]["norms"] == [0, 0] and apart(runs, "norms", "half") > 1e-3
    said = json.loads((runs[0] / "norms/test.json").read_text())
    model = f"{torchrun.ROOT / 'tests/torchrun.py'}:halves"
    found = evaluation.evaluate_run(runs[0] / "norms", model=model)
    assert found["loss"] == pytest.approx(said["loss"], rel=1e-5)
    assert found["confusion"] == said["confusion"]


def test_a_signal_to_one_rank_stops_all_at_one_step(runs):
    assert runs[1]["term"] < BUSY and last(runs, "term").step == STOPPED
    text = (runs[0] / "term.log").read_text()
    assert f"stopped at step {STOPPED}, 1 epochs done, and saved" in text
    assert text.count("stopped at") == 1 and "rank 1 was sent SIGTERM" in text


@pytest.mark.parametrize("ranks", [2, 1, 3])
def test_a_run_goes_on_with_any_number_of_processes(runs, ranks):
    assert runs[1][f"after{ranks}"] == ranks * [0]
    name = f"after{ranks}"
    assert last(runs, name).step == 3 * torchrun.STEPS
    if ranks == 2:  # bit for bit
        want, got = last(runs, "whole").tensors, last(runs, name).tensors
        assert all(torch.equal(t, got[k]) for k, t in want.items())
        assert history(runs, name) == history(runs, "whole")
    assert apart(runs, name, "whole") < 1e-5


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("raise", "graphnet: rank 1: ValueError: planted; GRAPHNET_DEBUG=1 shows where"),
        ("kill", "graphnet: rank 1 of 2 has ended without a word"),
        ("early", "graphnet: rank 1 of 2 has ended without a word"),  # before there is a run
    ],
)
def test_a_rank_that_fails_ends_all(runs, name, line):
    assert runs[1][name] < BUSY
    (only,) = said(runs, name)
    assert only.startswith(line)
    if name == "early":
        assert not (runs[0] / name).exists()
    else:
        assert last(runs, name).step == torchrun.STEPS  # whole, and from before


def test_a_rank_that_hangs_is_not_waited_for(runs):
    assert runs[1]["hung"] == [1, None]  # the other had to be killed
    (only,) = said(runs, "hung")
    assert "rank 0 of 2 got no answer from the others" in only and "imed out" in only


def test_what_is_wrong_at_the_start_is_named_once(runs):
    folder, found = runs
    for name, text in (
        ("differ", "--lr is 0.1 on rank 0 and 0.2 on rank 1"),
        ("empty", "a batch of 4 images gives each of 3 ranks 2, and rank 2 has none in any step; "
                  "help: start 2 processes, or a batch of 3"),
        ("verb", "graphnet eval is the work of one process, and torchrun has started 2; help: "
                 "graphnet eval ... without torchrun"),
        ("taken", "already exists and holds a run; help: add --resume"),
    ):  # fmt: skip
        assert 2 in found[name] and 0 not in found[name]
        (only,) = said(runs, name)
        assert text in only
    assert not (folder / "differ").exists() and not (folder / "empty").exists()


def test_ctrl_c_on_torchrun_saves(runs):
    text = (runs[0] / "interrupted.log").read_text()
    assert runs[1]["interrupted"] == 1 and text.count("SIGINT: saves after this step") == 1
    assert "and saved; graphnet train" in text
    metrics = rundir.read_metrics(runs[0] / "interrupted")
    assert last(runs, "interrupted").step == metrics[-1]["step"]


# ---- what a rank reads -----------------------------------------------------------------------


def images(folder, count=11):
    from PIL import Image

    g = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        (folder / "train" / name).mkdir(parents=True)
        for k in range(count):
            pixels = torch.randint(0, 256, (9, 9, 3), dtype=torch.uint8, generator=g)
            Image.fromarray(pixels.numpy()).save(folder / "train" / name / f"{k:02d}.png")
    return folder


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("kind", ["memory", "files"])
def test_ranks_read_disjoint_rows_of_the_same_batches(tmp_path, kind, ranks):
    if kind == "files":
        data = load(f"imagefolder:{images(tmp_path)}", "train", shape=(3, 8, 8), cache=False)
    else:
        g = torch.Generator().manual_seed(0)
        data = Dataset(torch.rand(22, 3, 8, 8, generator=g), torch.arange(22))
    whole = Batches(data, 7, seed=3, cut="random", flip=True)
    parts = [Batches(data, 7, seed=3, cut="random", flip=True) for _ in range(ranks)]
    for r, p in enumerate(parts):
        p.share = r, ranks
    for epoch in (0, 1):
        for every in (whole, *parts):
            every.set_epoch(epoch)
        for (x, y), *mine in zip(whole, *parts, strict=True):
            assert torch.equal(torch.cat([a for a, _ in mine]), x)
            assert torch.equal(torch.cat([b for _, b in mine]), y)
            assert torch.equal(torch.cat([p.rows for p in parts]), whole.rows)
            assert {p.cursor for p in parts} == {whole.cursor}
            assert len(mine[0][0]) == min(-(-7 // ranks), len(x))  # the first ranks fill up


def test_a_file_that_is_no_image_leaves_its_batch_smaller(tmp_path):
    images(tmp_path)
    (tmp_path / "train/a/03.png").write_bytes(b"no image")
    data = load(f"imagefolder:{tmp_path}", "train", shape=(3, 8, 8), cache=False, max_bad=0.1)
    rows = []
    for rank in range(2):
        part = Batches(data, 8, seed=3)
        part.share = rank, 2
        rows.append([part.rows.tolist() for _ in part])
    assert sorted(sum(rows[0] + rows[1], [])) == [r for r in range(22) if r != 3]
    assert [len(a) + len(b) for a, b in zip(*rows, strict=True)].count(8) == 1  # 8, 7 and 6


# ---- at random moments -----------------------------------------------------------------------


def children(pid):
    out = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            out += [int(stat.parent.name)] if int(fields[1]) == pid else []
    return sorted(out)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "raise", "SIGTERM", "SIGINT"])
def test_it_ends_well_at_any_moment(runs, how, tmp_path):
    """20 times each, under torchrun's command: a rank, or all of them by way of torchrun."""
    draw = random.Random(how)
    whole = f"whole-{how}"
    assert torchrun.plain(tmp_path / whole, [torchrun.train(runs[0], whole)]) == [0]
    want = checkpoint.load_latest(runs[0] / whole).tensors
    for k in range(20):
        name = f"{how}{k}"
        argv = torchrun.train(runs[0], name)
        if how == "raise":
            fault = f"raise:{draw.randrange(2)}:{draw.randrange(3 * torchrun.STEPS)}"
            process = torchrun.started(["--rank", fault, *argv], "tests.torchrun")
            said, _ = process.communicate(timeout=60)
            assert said.count("ValueError: planted") == 1, said
        else:
            process = torchrun.started(argv)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(draw.uniform(1, 6))
            ranks = children(process.pid)
            whom = [process.pid, *ranks] if how != "SIGKILL" else ranks
            if whom:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(draw.choice(whom), getattr(signal, how))
            start = time.monotonic()
            said, _ = process.communicate(timeout=60)
            assert time.monotonic() - start < 10, said
            assert not any(map(ranks_run, ranks)), said
        if not (runs[0] / name).exists():
            continue
        codes = torchrun.plain(tmp_path / name, [torchrun.train(runs[0], name, "--resume")])
        assert codes == [0], said
        got = checkpoint.load_latest(runs[0] / name).tensors
        assert all(torch.allclose(t, got[k], 1e-4, 1e-5) for k, t in want.items())


def ranks_run(pid):
    return Path(f"/proc/{pid}").exists() and "torchrun" in Path(f"/proc/{pid}/cmdline").read_text()
