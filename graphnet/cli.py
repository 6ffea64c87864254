"""The command line: how it ends. The verbs stand in `graphnet/verbs/`.

Exit codes: 0 done, 1 the work failed, 2 bad usage or bad input, 130 and 143 stopped by SIGINT and
SIGTERM. One clear line on stderr; a traceback only at GRAPHNET_DEBUG >= 1.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import typer

from graphnet import config
from graphnet.errors import (
    BackendUnavailableError,
    CompileError,
    ConfigError,
    DiskError,
    GraphnetError,
    NumericsError,
    OutOfMemoryPlanError,
    RankError,
    Stopped,
    printable,
)
from graphnet.train import ranks

# They register themselves.
from graphnet.verbs import augmenting, benching, compiling, demos, training, tuning  # noqa: F401
from graphnet.verbs.common import app

# The work failed, as against: the input was bad.
_FAILED = (
    BackendUnavailableError, CompileError, DiskError, NumericsError, OutOfMemoryPlanError,
    RankError,
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Runs the command line and exits."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        with stoppable(), warnings.catch_warnings():
            warnings.showwarning = _warn
            ranks.check_verb(argv)
            code = app(args=argv or ["--help"], prog_name="graphnet", standalone_mode=False)
        _exit(code if isinstance(code, int) else 0)
    except Stopped as stop:
        if line := ranks.line(stop, f"stopped by {signal.Signals(stop.number).name}"):
            typer.echo(f"graphnet: {line}", err=True)
        _exit(128 + stop.number)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains when it ends
        sys.exit(1)
    except Exception as error:
        if _debugging():
            raise
        # What typer says of a wrong option, without its panel.
        usage = getattr(error, "format_message", None)
        text = " ".join(usage().split()) if usage else _one_line(error)
        text += _what_is_missing(error)
        if text and (line := ranks.line(error, text)):  # a group without a command shows its help
            typer.echo(f"graphnet: {printable(line)}", err=True)
        bad_input = usage or (isinstance(error, GraphnetError) and not isinstance(error, _FAILED))
        _exit(2 if bad_input else 1)


def _what_is_missing(error: Exception) -> str:
    """What the argument or option is that typer misses, and where there is more to read."""
    param, context = getattr(error, "param", None), getattr(error, "ctx", None)
    if param is None or context is None or type(error).__name__ != "MissingParameter":
        return ""
    said = getattr(param, "help", None)
    return f"{f' It is {said}.' if said else ''} See {context.command_path} --help"


def _exit(code: int) -> NoReturn:
    ranks.end(code)
    sys.exit(code)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM unwind what runs, so that it takes its child processes along.

    A verb may handle them in its own way; what the parent process has ignored stays ignored.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for one in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(one) is not signal.SIG_IGN:
                before[one] = signal.signal(one, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_showwarning = warnings.showwarning


def _warn(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
    """Prints our own warnings as a line, without the place in our source; others as Python does."""
    if category.__module__.startswith("graphnet."):
        if not ranks.speaks():
            return
        typer.echo(f"graphnet: {printable(str(message))}", err=True)
    else:
        _showwarning(message, category, *where, **more)


def _debugging() -> bool:
    try:
        return config.debug() >= 1
    except ConfigError:  # a wrong GRAPHNET_DEBUG must not hide the first error
        return False


def _one_line(error: Exception) -> str:
    """The error on one line; what is not ours says how to see where it comes from."""
    if isinstance(error, GraphnetError):
        text = "; ".join(map(str.strip, str(error).splitlines()))
        return f"{type(error).__name__}: {text.replace(':; ', ': ')}"
    if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("graphnet."):
        return f"{error}; run graphnet doctor"
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{text}; GRAPHNET_DEBUG=1 shows where"


if __name__ == "__main__":
    main()
