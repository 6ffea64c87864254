"""benchmarks/gpu.sh: what it runs, in which order, and what happens when something fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from tests.benching import SCHEMA

ROOT = Path(__file__).resolve().parents[2]
GPU_TESTS = sorted(p.name for p in (ROOT / "tests" / "gpu").glob("test_*.py"))
STUB = """#!/usr/bin/env bash
[[ $* == *"-c import sys, torch"* ]] && exit ${NO_GPU:-0}
[[ $* == *"-c import"* ]] && exit ${LACKS:-0}  # whether a package is there
echo "$@" >> "$SAID"
[[ $* == *"$FAILS"* ]] && exit 3
[[ $* == *"$HANGS"* ]] && { sleep 60 & wait; }
exit 0
"""


def gpu_sh(tmp_path, *options, **env):
    return subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh", *options], cwd=tmp_path, text=True,
        capture_output=True, env={**os.environ, "OUT": str(tmp_path / "out"), **env},
    )  # fmt: skip


def stubbed(tmp_path, *options, text=STUB, **env):
    """(outcome, commands) of gpu.sh with a python that only writes down what it is asked for."""
    stub, log = tmp_path / "python", tmp_path / "log"
    stub.write_text(text)
    stub.chmod(0o755)
    log.write_text("")
    given = {"PYTHON": str(stub), "SAID": str(log), "FAILS": "nothing", "HANGS": "nothing"}
    done = gpu_sh(tmp_path, *options, **(given | env))
    return done, log.read_text().splitlines()


def timed(said):
    """Without what only fills caches."""
    return [line for line in said if "--warm" not in line]


def test_everything_in_order_of_value_and_on_past_a_failure(tmp_path):
    done, said = stubbed(tmp_path, GRAPHNET_DATA=str(tmp_path), FAILS="bench lenet5")
    assert "bench lenet5 b128 fp32: failed (3)" in done.stdout and done.returncode == 1
    gluon, tests, *rest = timed(said)
    assert gluon.endswith("tests/gpu/test_gluon.py") and "-n 12" in gluon
    assert "-p benchmarks.record" in tests and "-n 12" in tests
    files = [w.removeprefix("tests/gpu/") for w in tests.split() if w.startswith("tests/gpu")]
    assert files[:2] == ["test_parity.py", "test_step.py"]
    assert sorted(files) == GPU_TESTS  # each of them once
    kinds = ("steps.py", "graphnet bench", "jax_peer", "graphnet tune", "mnist99")
    order = [next(k for k in kinds if k in line) for line in rest]
    assert order == [*["steps.py"] * 4, *["graphnet bench"] * 2, "jax_peer", "graphnet tune",
                     "steps.py", "mnist99"]  # fmt: skip
    assert "--batch 32,64,256,512,1024" in rest[8] and "--no-launches" in rest[8]
    writes = [w for line in [tests, *rest] for w in ("--json", "--record", "--out") if w in line]
    # Runs of steps share a file; with the log that is at most 8.
    assert len(writes) == len([tests, *rest]) and len(writes) - 4 + 1 <= 8
    assert all(str(tmp_path / "out") in line for line in [tests, *rest])


def test_specialised_warps_that_do_not_hold_are_left_out(tmp_path):
    """They are tried alone, and what comes behind is told not to choose them."""
    text = STUB.replace('echo "$@"', 'echo "$@ [${GRAPHNET_DISABLE:-}]"')
    done, said = stubbed(tmp_path, "--part", "correctness,tune", text=text, FAILS="-x -p")
    gluon, tests, tune = timed(said)
    assert gluon.endswith("tests/gpu/test_gluon.py []")
    assert "left out from here on, GRAPHNET_DISABLE=gluon_rows" in done.stdout
    assert "test_gluon.py" not in tests and "graphnet tune" in tune
    assert all(s.endswith("[gluon_rows,gluon_pairs,gluon_resident]") for s in (tests, tune))


def test_kernels_are_compiled_together_in_front_of_what_is_timed(tmp_path):
    _, said = stubbed(tmp_path, "--part", "steps")
    warm = [k for k, line in enumerate(said) if "--warm" in line]
    assert warm == [0, 1, 2, 3] and len(said) == 8


def test_streams_are_compared_in_one_process_for_each_precision(tmp_path):
    done, said = stubbed(tmp_path, "--part", "streams")
    assert done.returncode == 0 and ["--warm" in line for line in said] == [True, False] * 2
    for line, precision in zip(timed(said), ("bf16", "tf32"), strict=True):
        assert f"steps.py alexnet --batch 128 --precision {precision}" in line
        assert "--streams 0,1,16,32,48 --no-launches" in line and f"--json {tmp_path}" in line
    assert all("--streams 0,1,16,32,48" in line for line in said)


def test_image_files_are_measured_where_they_are_asked_for(tmp_path):
    done, said = stubbed(tmp_path, "--part", "input")
    assert done.returncode == 0 and ["--warm" in line for line in said] == [True, False]
    assert "input_pipeline.py --train --json" in said[1] and "--images 8192" in said[1]


def test_a_part_or_two_alone(tmp_path):
    done, said = stubbed(tmp_path, "--part", "correctness", LACKS="1")
    assert done.returncode == 0 and len(said) == 2
    assert all("pytest" in line and "-n" not in line for line in said)
    done, said = stubbed(tmp_path, "--part", "history,mnist", GRAPHNET_DATA=str(tmp_path))
    assert [("mnist99" in s, "alexnet" in s) for s in said] == [(True, False), *[(False, True)] * 2]
    done, said = stubbed(tmp_path, "--part", "peers", LACKS="1")
    assert "jax: skipped, it is not installed" in done.stdout and len(said) == 2


def test_time_runs_out(tmp_path):
    done, said = stubbed(tmp_path, "--part", "mnist,history", "--seconds", "5",
                         GRAPHNET_DATA=str(tmp_path))  # fmt: skip
    assert done.stdout.count("skipped, no time left") == 3 and said == []


def test_a_measurement_that_hangs_is_cut_off_and_the_others_run(tmp_path):
    done, said = stubbed(tmp_path, "--part", "history", "--seconds", "11", HANGS="alexnet_owt")
    assert "alexnet_owt b128 bf16: cut off" in done.stdout and done.returncode == 0
    assert "kernelbench_alexnet b1024 tf32: skipped" in done.stdout
    assert "cut off" in (tmp_path / "out" / "log.txt").read_text()


@pytest.mark.parametrize(
    "options", [("--part", "everything"), ("--part",), ("--seconds", "soon"), ("--fast",)]
)
def test_it_refuses(tmp_path, options):
    done, said = stubbed(tmp_path, *options)
    assert done.returncode == 2 and said == []
    assert "--part      of correctness, steps, peers, tune, sweep, mnist, streams" in done.stderr
    assert "see that they run" in done.stderr  # all of the options


def test_without_a_gpu_nothing_is_run(tmp_path):
    hidden, said = stubbed(tmp_path, NO_GPU="1")
    assert hidden.returncode == 1 and "sees no GPU" in hidden.stderr and said == []


@pytest.mark.slow
def test_streams_run_dry(tmp_path):
    done = gpu_sh(tmp_path, "--dry-run", "--part", "streams", PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "out").glob("*.json")
    result = json.loads(path.read_text())
    jsonschema.validate(result, SCHEMA)
    (run,) = result["runs"]
    assert run["streams"] == [0, 1, 16, 32, 48] and not run["failures"]
    assert [n for n in run["ways"] if "streams" in n] == [f"streams {n}" for n in run["streams"]]


@pytest.mark.slow
def test_image_files_run_dry(tmp_path):
    done = gpu_sh(tmp_path, "--dry-run", "--part", "input", PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "input-pipeline-train.json").read_text())["train"]
    assert len(found["epochs"]) == 2 and found["step_images_per_s"] > 0


@pytest.mark.slow
def test_it_runs_dry_from_end_to_end(tmp_path):
    done = gpu_sh(tmp_path, "--dry-run", PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "out").glob("*.json")}
    assert 5 <= len(found) <= 7
    for result in found.values():
        jsonschema.validate(result, SCHEMA)
        assert result.get("complete", True)
