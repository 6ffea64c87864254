"""Runs of several processes for the tests: whole, stopped, failing.

`python -m tests.torchrun FOLDER` does all of them and prints what came of each as JSON. Importing
torch takes seconds of CPU in every process, so all runs but one are forked from this one: under
torchrun's own agent where a rank fails or is sent a signal, as plain processes where none does.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import TCPStore
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import graphnet as gn
import graphnet.train.run  # once, for all that are forked
from graphnet import cli
from graphnet.train.feeding import Batched

ROOT = Path(__file__).resolve().parents[1]
TRAIN, TEST = 90, 20  # images
BATCH, STEPS = 16, 6  # of an epoch; the last batch has 10 rows
_FORK: Any = multiprocessing.get_context("fork")


def net() -> Any:
    """Small, with a mask of dropout; `FILE.py:net` of the runs."""
    made = gn.Sequential(
        gn.Conv2d(1, 4, 5, stride=2), gn.ReLU(), gn.MaxPool2d(2), gn.Flatten(), gn.Dropout(0.4),
        gn.Linear(4 * 6 * 6, 10),
    )  # fmt: skip
    made.input_shape = (1, 28, 28)
    return made


def halves() -> Any:
    """A net that two towers divide, with a normalization by batch and one that stays in a half."""
    made = gn.Sequential(
        gn.Conv2d(1, 8, 5, stride=4, bias=False), gn.BatchNorm2d(8), gn.ReLU(),
        gn.LocalResponseNorm(3, k=2.0, groups=2), gn.Conv2d(8, 8, 3, groups=2), gn.ReLU(),
        gn.Flatten(), gn.Linear(8 * 4 * 4, 12), gn.ReLU(), gn.Dropout(0.4), gn.Linear(12, 10),
    )  # fmt: skip
    made.input_shape = (1, 28, 28)
    return made


def make_data(folder: Path) -> None:
    """Noise in MNIST's format."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for split, count in (("train", TRAIN), ("t10k", TEST)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        for name, data in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(f">I{data.ndim}I", 0x0800 | data.ndim, *data.shape)
            (folder / f"{split}-{name}-ubyte").write_bytes(head + data.tobytes())


def train(folder: Path, out: str, *more: Any, net: str = "net") -> list[str]:
    """A command line."""
    argv = ["train", f"{ROOT / 'tests/torchrun.py'}:{net}", "--data", f"mnist:{folder / 'data'}",
            "--epochs", 3, "--batch", BATCH, "--target", "cpu", "--lr", 0.05, "--augment", "digits",
            "--out", folder / out, *more]  # fmt: skip
    return list(map(str, argv))


def plant(fault: str) -> None:
    """KIND:RANK:STEP makes a rank raise, sleep, or send itself a signal in front of a step.

    In front of step -1 it has met the others, and they do not know it yet.
    """
    kind, rank, step = fault.split(":")
    if step == "-1":
        met = torch.distributed.init_process_group

        def killed(*args: Any, **how: Any) -> None:
            met(*args, **how)
            if os.environ.get("RANK") == rank:
                os.kill(os.getpid(), int(kind))

        torch.distributed.init_process_group = killed
        return
    steps = Batched.steps

    def failing(self: Any) -> Any:
        if self.trainer.step == int(step) and os.environ.get("RANK") == rank:
            if kind == "raise":
                raise ValueError("planted")
            if kind == "sleep":
                time.sleep(60)
            else:
                os.kill(os.getpid(), int(kind))
        return steps(self)

    Batched.steps = failing  # type: ignore[method-assign]


def rank_main(argv: list[str], fault: str = "") -> None:
    """What a process of a run does."""
    if fault:
        plant(fault)
    cli.main(argv)


def _into(log: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)


def _plain(rank: int, ranks: int, port: int, argv: list[str], log: Path, fault: str) -> None:
    _into(log)
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                       "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost",
                       "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"
                       }  # fmt: skip
    rank_main(argv, fault)


def plain(log: Path, argvs: list[list[str]], fault: str = "", patience: float = 60) -> list[Any]:
    """Exit codes of one process for each command line, None for one that had to be killed."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # as the agent's
    processes = [
        _FORK.Process(target=_plain, args=(r, len(argvs), store.port, argv, log, fault))
        for r, argv in enumerate(argvs)
    ]
    for p in processes:
        p.start()
    until = time.monotonic() + patience
    for p in processes:
        p.join(max(0.0, until - time.monotonic()))
    codes = [p.exitcode for p in processes]
    for p in processes:
        p.kill()
        p.join()
    return codes


def _agent(argv: list[str], log: Path, fault: str) -> None:
    _into(log)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", start_method="fork", max_restarts=0,
    )  # fmt: skip
    try:
        elastic_launch(config, rank_main)(argv, fault)
    finally:
        os._exit(1)  # no worker of ours returns to the agent: each ends by itself


def under_agent(log: Path, argv: list[str], fault: str) -> float:
    """Two ranks with torchrun's agent, until it ends: how many seconds that took."""
    process = _FORK.Process(target=_agent, args=(argv, log, fault))
    start = time.monotonic()
    process.start()
    process.join(60)
    assert process.exitcode == 1, process.exitcode
    return time.monotonic() - start


def started(argv: list[str], module: str = "graphnet") -> subprocess.Popen[str]:
    """torchrun as people call it, with two ranks."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*run, "-m", module, *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def interrupted(folder: Path) -> tuple[int, str]:
    """SIGINT to torchrun itself, once there is a checkpoint: (exit code, what was said)."""
    process = started(train(folder, "interrupted", "--epochs", 100_000))
    until = time.monotonic() + 60
    while not (folder / "interrupted/checkpoints/last.json").exists():
        assert process.poll() is None and time.monotonic() < until, process.communicate(timeout=60)
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    return process.returncode, said


def everything(folder: Path) -> dict[str, Any]:
    make_data(folder / "data")
    log = lambda name: folder / f"{name}.log"
    found: dict[str, Any] = {}
    term = int(signal.SIGTERM)
    summed = lambda name: train(folder, name, "--accumulate", 4)  # stopped inside a sum
    found["whole"] = plain(log("whole"), 2 * [summed("whole")])
    found["one"] = plain(log("one"), [summed("one")])
    found["term"] = under_agent(log("term"), summed("term"), f"{term}:1:{STEPS + 3}")
    for n in (1, 2, 3):
        shutil.copytree(folder / "term", folder / f"after{n}")
        argv = train(folder, f"after{n}", "--resume")
        found[f"after{n}"] = plain(log(f"after{n}"), n * [argv])
    kill = int(signal.SIGKILL)
    failing = (("raise", "raise:1:8"), ("kill", f"{kill}:1:8"), ("early", f"{kill}:1:-1"))
    for name, fault in failing:
        found[name] = under_agent(log(name), train(folder, name), fault)
    by_half = lambda name, *more: train(folder, name, "--epochs", 1, *more, net="halves")
    found["half"] = plain(log("half"), [by_half("half")])
    found["towers"] = plain(log("towers"), 2 * [by_half("towers", "--towers")])
    found["norms"] = plain(log("norms"), 2 * [by_half("norms")])
    found["joined"] = plain(log("joined"), 2 * [by_half("joined", "--sync-bn")])
    found["verb"] = plain(log("verb"), 2 * [["eval", str(folder / "whole")]])
    hung = 2 * [train(folder, "hung", "--timeout", 1)]
    found["hung"] = plain(log("hung"), hung, "sleep:1:2", patience=8)
    rates = [train(folder, "differ", "--lr", lr) for lr in (0.1, 0.2)]
    found["differ"] = plain(log("differ"), rates)
    found["empty"] = plain(log("empty"), 3 * [train(folder, "empty", "--batch", 4)])
    found["taken"] = plain(log("taken"), 2 * [train(folder, "whole")])
    found["interrupted"], said = interrupted(folder)
    log("interrupted").write_text(said)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "--rank":  # FAULT, and a command line
        rank_main(sys.argv[3:], sys.argv[2])
    print(json.dumps(everything(Path(sys.argv[1]))))
