"""The parent's side of decoding: shared memory, the workers that fill it, and their failures."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import queue
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from graphnet.errors import DataError
from graphnet.train.decode_worker import Cache, Job, handled
from graphnet.train.rowstore import RowStore

_CHUNK = 16  # files in a request: enough to hide the pipe, few enough to share out evenly
LIMIT_S = 30.0  # for one file; 25 million pixels take less than one second
# For glibc: keep what an image needed for the next one. Given back to the system, it costs a page
# fault for each 4 kB, a third of the time of decoding a small JPEG.
_KEEP_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20), "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TOP_PAD_": str(16 << 20),
}  # fmt: skip
TRIES = 5  # workers that a file may end, or that may be killed while they start
START_S = 120.0  # for a process to come up, on a machine that is busy


class Decoders:
    """Decodes files: `run(jobs)` gives the bytes of each image, or what is wrong with the file.

    workers  processes; 0 decodes in the caller. They start with the first job.
    slots    pieces of memory, for images that are not kept: a job names one that is free
    cache    where decoded rows are kept, or None
    `run` may be called from several threads. Close it when done: `with Decoders(...) as d`.
    """

    def __init__(
        self, workers: int, shape: Sequence[int], slots: int, cache: RowStore | None
    ) -> None:
        self.shape, self.cache, self.workers = tuple(shape), cache, workers
        self.size = shape[0] * shape[1] * shape[2]
        self.stride = -(-self.size // 8) * 8
        self._handle = os.memfd_create("graphnet-images")
        os.ftruncate(self._handle, slots * self.stride)
        self.memory = mmap.mmap(self._handle, slots * self.stride)
        self._threads: ThreadPoolExecutor | None = None
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        if workers:
            # A thread for each process: it waits for the answers.
            self._threads = ThreadPoolExecutor(workers, "graphnet-decode")
            for _ in range(workers):
                self._idle.put(_Worker(self._command(), self._handles()))

    def run(self, jobs: Sequence[Job]) -> list[memoryview | str]:
        """Decodes; the reason for each file that is no image, the bytes of the others."""
        if self._threads is None:
            memory, cache = memoryview(self.memory), self._kept()
            answers = [handled(job, self.shape, self.stride, memory, cache) for job in jobs]
        else:
            size = max(1, min(_CHUNK, -(-len(jobs) // (2 * self.workers))))
            chunks = [jobs[at : at + size] for at in range(0, len(jobs), size)]
            answers = [one for answer in self._threads.map(self._ask, chunks) for one in answer]
        return [self._found(*pair) for pair in zip(jobs, answers, strict=True)]

    def _found(self, job: Job, answer: bool | str) -> memoryview | str:
        if isinstance(answer, str):
            return answer
        slot, row, _ = job
        if answer:
            assert self.cache is not None
            return self.cache.written(row)
        return memoryview(self.memory)[slot * self.stride : slot * self.stride + self.size]

    def _ask(self, jobs: Sequence[Job]) -> list[bool | str]:
        worker = self._idle.get()
        try:
            if len(jobs) > 1:
                with contextlib.suppress(_WorkerFailed):
                    return worker.ask(jobs)
            # One of them ends the worker or holds it up: alone, it shows.
            return [self._alone(worker, job) for job in jobs]
        finally:
            self._idle.put(worker)

    def _alone(self, worker: _Worker, job: Job) -> bool | str:
        """The answer to one job. Somebody else may have killed the worker, for want of memory for
        example: only a file that each of several workers dies over is no image."""
        for left in reversed(range(TRIES)):
            try:
                return worker.ask([job])[0]
            except _WorkerFailed as error:
                if not (left and error.killed):
                    return str(error)
        raise AssertionError("TRIES is at least 1")

    def _handles(self) -> tuple[int, ...]:
        return (self._handle, *(self._kept() or ()))

    def _kept(self) -> Cache | None:
        return None if self.cache is None else (self.cache.images, self.cache.sums)

    def _command(self) -> list[str]:
        numbers = [str(v) for v in (self.stride, self._handle, *(self._kept() or (-1, -1)))]
        shape = ",".join(map(str, self.shape))
        # -P: `-m` would import from the working folder first, whosever it is. -S: what `site` would
        # set up is not needed, and is a third of the time to start.
        return [sys.executable, "-P", "-S", "-m", "graphnet.train.decode_worker", shape, *numbers]

    def close(self) -> None:
        """Ends the workers. The memory goes when its last view does."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            for _ in range(self.workers):
                self._idle.get().end()
        os.close(self._handle)

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _WorkerFailed(Exception):
    """The worker died over a request or took too long; the next request starts a new one.

    killed  by a signal: by its own fault, or by somebody else
    """

    def __init__(self, message: str, killed: bool = False) -> None:
        self.killed = killed
        super().__init__(message)


class _Worker:
    """A process of `decode_worker`, started when it is first asked."""

    def __init__(self, command: list[str], handles: tuple[int, ...]) -> None:
        self.command, self.handles = command, handles
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, jobs: Sequence[Job]) -> list[bool | str]:
        if self.process is None:
            self._start()
        return self._exchange(jobs, LIMIT_S * len(jobs))

    def _start(self) -> None:
        """Starts the process, again where it is killed meanwhile; DataError where it cannot be."""
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (root, *sys.path)))
        env = {**_KEEP_MEMORY, **os.environ, "PYTHONPATH": path}
        for left in reversed(range(TRIES)):
            # A file: nobody reads along, and a full pipe would stop the worker.
            with tempfile.TemporaryFile() as said:
                try:
                    self.process = subprocess.Popen(
                        self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
                        bufsize=0, pass_fds=self.handles, env=env,
                    )  # fmt: skip
                    self._exchange([], START_S)  # whether it works at all is no fault of a file
                    return
                except (OSError, _WorkerFailed) as error:
                    if left and isinstance(error, _WorkerFailed) and error.killed:
                        continue
                    said.seek(0)
                    lines = said.read().decode(errors="replace").strip().splitlines()
                    raise DataError(
                        f"a decode worker does not start: {lines[-1] if lines else error}",
                        help="use workers=0 to decode in this process",
                    ) from None

    def _exchange(self, jobs: Sequence[Job], limit: float) -> list[bool | str]:
        process = self.process
        assert process is not None and process.stdin and process.stdout
        answer, until = b"", time.monotonic() + limit
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        try:
            request = memoryview(json.dumps(jobs).encode() + b"\n")
            while request:  # a signal may cut a write short
                request = request[process.stdin.write(request) :]
            while not answer.endswith(b"\n"):
                if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
                    self.end()
                    raise _WorkerFailed(f"decoding takes more than {limit:.0f} s")
                piece = os.read(process.stdout.fileno(), 1 << 16)
                if not piece:
                    raise BrokenPipeError
                answer += piece
        except BrokenPipeError:
            code = self.end()
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise _WorkerFailed(f"the decoder ended with {how}", killed=code < 0) from None
        return json.loads(answer)

    def end(self) -> int:
        """Ends the process and returns its exit code."""
        if self.process is None:
            return 0
        # Closing its stdin would do, if no process that was forked meanwhile (a DataLoader's) held
        # it open as well. An idle worker has nothing to lose, and one that died keeps its code.
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        code = self.process.wait()
        self.process = None
        return code
