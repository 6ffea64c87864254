"""The processes of `torchrun ... -m graphnet train`: how they meet, who speaks, and how they end.

torchrun starts them, and ends all when one of them fails. A rank whose collective fails leaves at
once and saves nothing. Of all that went wrong one line is said, by the rank that failed; where a
process is gone without a word, by the first that notices. A store that all reach says who spoke.

Nothing heavy is imported before a group is joined: `graphnet --help` reads this file.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from graphnet.errors import BackendUnavailableError, ConfigError, RankError

if TYPE_CHECKING:
    from graphnet.runtime.group import Group

TIMEOUT = 600  # seconds that a rank waits for the others
_SOON = 1.0  # seconds in which a rank that failed has said so, and a process that ended is gone
_GONE = "has ended without a word, killed or out of memory; --resume goes on from the checkpoint"
_SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def under_torchrun() -> bool:
    """Whether torchrun has started this process as one of several."""
    return all(n in os.environ for n in _SET_BY_TORCHRUN) and _number("WORLD_SIZE") > 1


def check_verb(argv: list[str]) -> None:
    """Where torchrun would do the work of one process several times: ConfigError on the first rank,
    while the others end."""
    if under_torchrun() and argv[:1] not in ([], ["train"]) and not argv[0].startswith("-"):
        if not speaks():
            raise SystemExit(2)
        raise ConfigError(
            f"graphnet {argv[0]} is the work of one process, and torchrun has started "
            f"{os.environ['WORLD_SIZE']}", help=f"graphnet {argv[0]} ... without torchrun",
        )  # fmt: skip


def local_ranks() -> int:
    """How many of these processes share this machine."""
    return max(1, _number("LOCAL_WORLD_SIZE", 1)) if under_torchrun() else 1


def _number(name: str, otherwise: int = 0) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else otherwise


class _Run:
    """This process among those of a run, as long as they are together.

    store  holds under `process.RANK` the process and the machine of each
    """

    def __init__(self, store: Any, group: Group) -> None:
        self.store, self.group = store, group

    def line(self, error: BaseException, text: str) -> str | None:
        """The line about an error; None where another rank says it."""
        said = f"rank {self.group.rank}: {text}"
        try:
            if isinstance(error, RankError):
                until = time.monotonic() + _SOON
                while not self.store.check(["failed"]) and time.monotonic() < until:
                    if gone := self._gone():
                        said = f"rank {gone[0]} of {self.group.ranks} {_GONE}"
                        break
                    time.sleep(0.05)
            first = self.store.add("spoken", 1) == 1
            # Only now: who waits for this key must not speak before the one that failed.
            self.store.set("failed", "")
            return said if first else None
        except RuntimeError:  # the store went with another process
            return said

    def _gone(self) -> list[int]:
        """Ranks of this machine whose process has ended."""
        out = []
        for rank in range(self.group.ranks):
            pid, _, host = self.store.get(f"process.{rank}").decode().partition(" ")
            if host == socket.gethostname() and not _lives(int(pid)):
                out.append(rank)
        return out


def _lives(pid: int) -> bool:
    """Whether a process runs; one that has ended may wait for torchrun to notice."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except FileNotFoundError:
        return not os.path.isdir("/proc/self")
    except OSError:
        return True


_run: _Run | None = None


@contextlib.contextmanager
def joined(target: str = "auto", timeout: float = TIMEOUT) -> Iterator[Group | None]:
    """The group of the processes that torchrun has started, None for a single one.

    timeout  seconds after which a rank gives up waiting for the others
    All wait for one another at the end, where no error came before it: torchrun would end those
    that are behind.
    """
    global _run
    if not under_torchrun():
        yield None
        return
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from graphnet.api import _resolve
    from graphnet.runtime.group import Group, versions

    if not dist.is_available():
        raise BackendUnavailableError("this torch is built without torch.distributed")
    gpu = _resolve(target) == "cuda"
    if gpu:
        _take_gpu(torch.cuda.device_count())
    limit = timedelta(seconds=timeout)
    with _killable():
        try:
            store, rank, ranks = next(dist.rendezvous("env://", timeout=limit))
            known = dist.PrefixStore("graphnet.run", store)
            # Before the others are met: to read a key that a rank never sets is to wait for it.
            known.set(f"process.{rank}", f"{os.getpid()} {socket.gethostname()}")
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if gpu else "gloo", rank=rank, world_size=ranks,
                store=dist.PrefixStore("graphnet", store), timeout=limit,
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            text = f"the other processes are not reached: {' '.join(str(error).split())}"
            raise RankError(text, help="see why they ended, or wait longer (--timeout)") from None
        group = Group(dist.group.WORLD)
        _run = _Run(known, group)
        group.agree(versions())
    yield group
    group.any(False)
    for number in (signal.SIGINT, signal.SIGTERM):  # a rank that ends first makes torchrun send it
        signal.signal(number, signal.SIG_IGN)


def _take_gpu(count: int) -> None:
    """Each process of a machine computes on a GPU of its own."""
    import torch

    if local_ranks() > count:
        raise ConfigError(
            f"{local_ranks()} processes on this machine, which has {count} GPUs",
            help=f"--nproc-per-node {count}, or --target cpu",
        )
    torch.cuda.set_device(_number("LOCAL_RANK"))


@contextlib.contextmanager
def _killable() -> Iterator[None]:
    """Inside, a signal ends the process at once: it waits for others where Python hears none."""
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    before = {n: signal.signal(n, signal.SIG_DFL) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def line(error: BaseException, text: str) -> str | None:
    """The line about an error that ends this process; None where it is another rank's to say."""
    if _run is not None:
        return _run.line(error, text)
    if not under_torchrun():
        return text
    # Nobody has met yet. What is wrong with the command line is wrong on each rank.
    if hasattr(error, "format_message"):
        return text if speaks() else None
    return f"rank {os.environ['RANK']}: {text}"


def speaks() -> bool:
    """Whether this process tells people what is not an error."""
    return not under_torchrun() or _number("RANK") == 0


def end(code: int) -> None:
    """Ends a process of a group: nothing waits for collectives under way, or for their threads."""
    if _run is None:
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
