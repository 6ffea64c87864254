"""A signal while kernels compile: one line, the right exit code, and nobody is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graphnet.lowering.build.tools import ptxas

ROOT = Path(__file__).parents[2]
COMMAND = ["-m", "graphnet", "compile", "lenet5", "--train", "--batch", "8"]
SCRIPT = """
import graphnet as gn
gn.build(gn.models.lenet5(), (8, 1, 28, 28))
"""


@pytest.fixture
def environment(tmp_path):
    """With an assembler that says when it is at work, and then never ends."""
    slow = tmp_path / "ptxas"
    slow.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec {ptxas()[0]} --version\n'
        f"touch {tmp_path}/assembling\nexec sleep 300\n"
    )
    slow.chmod(0o700)
    known = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {
        **known, "PYTHONPATH": str(ROOT), "GRAPHNET_CACHE_DIR": str(tmp_path / "cache"),
        "TRITON_PTXAS_PATH": str(slow), "TMPDIR": str(tmp_path),
    }  # fmt: skip


def left(mark):
    """Processes that hold the mark in their environment."""
    out = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                out.append((path.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # gone, or not ours
            continue
    return out


def stopped(arguments, environment, tmp_path, number):
    """(exit code, stdout, stderr) of a build whose whole group gets a signal, as from a
    terminal."""
    process = subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + 240
        while not (tmp_path / "assembling").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.05)
        assert any("sleep 300" in line for line in left(str(tmp_path)))
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_line(number, code, environment, tmp_path):
    got, out, err = stopped(COMMAND, environment, tmp_path, number)
    assert (got, out) == (code, "")
    assert err == f"graphnet: stopped by {signal.Signals(number).name}\n"
    assert left(str(tmp_path)) == []
    assert not list(tmp_path.glob("graphnet-*")) and not list(tmp_path.glob("tmp*"))


def test_a_script(environment, tmp_path):
    _, out, err = stopped(["-c", SCRIPT], environment, tmp_path, signal.SIGINT)
    assert err.rstrip().endswith("KeyboardInterrupt") and ".visible .entry" not in out + err
    assert left(str(tmp_path)) == []


def test_a_parent_that_is_killed_takes_its_workers_along(environment, tmp_path):
    """Nobody can tell them then: they see that nobody asks any more."""
    stopped(COMMAND, environment, tmp_path, signal.SIGKILL)
    end = time.monotonic() + 30
    while lines := [line for line in left(str(tmp_path)) if "build.worker" in line]:
        assert time.monotonic() < end, lines
        time.sleep(0.1)
