"""Compile workers: processes that answer requests, started for a build and gone with it.

Each is the leader of a session of its own. Ctrl-C in a terminal goes to everything in the
foreground group, and would kill an assembler, which Triton reports with the program's whole text.
So a signal reaches the build alone, which then ends the workers with all that they have started.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Any

from graphnet.errors import CompileError
from graphnet.lowering.build.tools import package, ptxas
from graphnet.lowering.launch.files import private_dir

Request = dict[str, Any]


def launchers() -> str:
    """Folder of what Triton compiles to launch kernels, which all processes share."""
    return os.environ.get("TRITON_CACHE_DIR") or str(private_dir("triton"))


def _environment(scratch: str) -> dict[str, str]:
    """The worker's: not interpreted, the assembler pinned, this package importable.

    scratch  a folder for all that is written on the way, by tools that may be killed
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(package("graphnet").parent)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH"))))
    env["TRITON_PTXAS_PATH"] = str(ptxas()[0])
    env["TRITON_CACHE_DIR"] = env["TMPDIR"] = scratch
    env["GRAPHNET_CACHE_DIR"] = str(private_dir("generated").parent)
    env["TRITON_ALWAYS_COMPILE"] = "1"  # this cache is the one that verifies
    return env


def processors() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Pool:
    """Workers that take the next request when they have answered the last.

    todo      (key, request) in the order to hand them out
    answered  is told each key and answer, from a thread of ours, one at a time
    """

    def __init__(
        self,
        todo: Sequence[tuple[str, Request]],
        answered: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self.todo, self.answered = list(todo), answered
        self.failures: list[str] = []
        self.raised: list[Exception] = []
        self.processes: list[subprocess.Popen[str]] = []
        self.stopped = False
        self.lock = threading.Lock()

    def run(self) -> None:
        """Until all is answered; CompileError where a worker ended without an answer."""
        count = min(processors(), len(self.todo))
        with tempfile.TemporaryDirectory(prefix="graphnet-", ignore_cleanup_errors=True) as scratch:
            environment = _environment(scratch)  # here: what it raises must reach the caller
            serve = lambda: self._serve(environment)
            threads = [threading.Thread(target=serve, daemon=True) for _ in range(count)]
            atexit.register(self.stop)
            try:
                for t in threads:
                    t.start()
                for t in threads:
                    t.join()
            finally:  # also when a signal has ended the waiting
                self.stop()
                atexit.unregister(self.stop)
        if self.raised:
            raise self.raised[0]
        if self.failures:
            raise CompileError(f"a compile worker ended early: {self.failures[0]}")

    def stop(self) -> None:
        """Ends the workers that still run, with the assemblers that they have started."""
        with self.lock:
            self.stopped = True
            left = [p for p in self.processes if p.returncode is None]
        for p in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(p.pid, signal.SIGKILL)
        for p in left:
            p.wait()

    def _next(self) -> tuple[str, Request] | None:
        with self.lock:
            return self.todo.pop(0) if self.todo and not self.stopped else None

    def _start(self, environment: dict[str, str]) -> subprocess.Popen[str] | None:
        with self.lock:
            if self.stopped:
                return None
            process = subprocess.Popen(
                # -P: `-m` would import from the working folder first, whosever it is.
                [sys.executable, "-P", "-m", "graphnet.lowering.build.worker", launchers()],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=environment, start_new_session=True,
            )  # fmt: skip
            self.processes.append(process)
            return process

    def _serve(self, environment: dict[str, str]) -> None:
        process = self._start(environment)
        if process is None:
            return
        assert process.stdin and process.stdout and process.stderr
        said: list[str] = []
        # Drained all along: a full pipe would stop the worker.
        errors = threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True)
        errors.start()
        early = self._feed(process)
        with contextlib.suppress(OSError):
            process.stdin.close()
        code = process.wait()
        errors.join(1)
        if early and not self.stopped:
            self.failures.append(_last_words(said, code))
        process.stdout.close()
        process.stderr.close()

    def _feed(self, process: subprocess.Popen[str]) -> bool:
        """Hands out requests while there are any; whether the worker ended before."""
        assert process.stdin and process.stdout
        while (work := self._next()) is not None:
            key, body = work
            try:
                process.stdin.write(json.dumps({"id": key, **body}) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:
                line = ""
            if not line:
                return True
            try:
                with self.lock:
                    self.answered(key, json.loads(line))
            except Exception as error:  # a full disk: the caller hears of it
                self.raised.append(error)
                break
        return False


def _last_words(said: Sequence[str], code: int) -> str:
    """How a worker ended, on one line: what it printed may hold a whole program."""
    how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    last = next((line.strip() for line in reversed(said) if line.strip()), "")
    return f"{how}, {last[:300]}" if last else how
