"""A pytest plugin that keeps the outcome of a run as JSON, rewritten after each test.

python -m pytest -p benchmarks.record --record FILE tests/gpu
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from graphnet.bench import facts
from graphnet.bench.result import SCHEMA
from graphnet.train.checkpoint import atomic_write


class Recorder:
    """Counts of the tests so far, and what failed."""

    def __init__(self, path: Path) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.path = path
        self.result: dict[str, Any] = {
            "schema": SCHEMA, "kind": "tests", "date": facts.now(),
            "machine": facts.machine(device), "versions": facts.versions(), "complete": False,
            "counts": {"passed": 0, "failed": 0, "skipped": 0}, "failures": [],
        }  # fmt: skip
        if path.is_dir():
            gpu, day = facts.gpu_slug(self.result["machine"]["device"]), self.result["date"][:10]
            self.path = path / f"{gpu}-tests-{day}.json"
        self.save()

    def save(self) -> None:
        atomic_write(self.path, (json.dumps(self.result, indent=1) + "\n").encode())

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.passed:
            return  # what a test counts as is its call, unless it ends in front of it or behind
        self.result["counts"][report.outcome] += 1
        if report.failed:
            message = report.longreprtext.strip().splitlines() or [""]
            self.result["failures"].append({"test": report.nodeid, "message": message[-1][:300]})
        self.save()

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self.result["complete"] = exitstatus in (0, 1, 5)
        self.save()


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--record", type=Path, help="JSON file for the outcome, or a folder")


def pytest_configure(config: Any) -> None:
    path = config.getoption("--record")
    if path is not None and not hasattr(config, "workerinput"):  # xdist's workers report to us
        config.pluginmanager.register(Recorder(path))
