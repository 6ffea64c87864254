"""SIGINT, SIGTERM and SIGUSR1 ask for a stop; a second one ends the process at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from graphnet.errors import Stopped

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)


def _say(text: str) -> None:
    # Past Python's buffers, whose lock the code that was interrupted may hold.
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


class StopSignals:
    """While entered, a signal is noted in `received` and `stop(trainer)` carries it out.

    The handler sets a flag and says so: the step that runs is finished, and whoever owns the run
    saves.
    Elsewhere than in the main thread, where Python allows no handlers, it does nothing.

    quiet: says nothing, as where another process of the run does.
    `at_once` is for work that leaves nothing to save: inside, a signal raises Stopped.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.received, self.quiet = 0, quiet
        self._trainer: Any = None
        self._before: dict[int, Any] = {}
        self._at_once = False

    def watch(self, trainer: Any) -> None:
        """From now on a signal, also one that came before, sets `trainer.stop`."""
        self._trainer = trainer
        if self.received:
            trainer.stop = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if os.isatty(2):
                _say("\x1b[?25h\n")  # a progress bar has hidden the cursor
            os._exit(128 + number)
        self.received = number
        if self._at_once:
            raise Stopped(number)
        name = signal.Signals(number).name
        if not self.quiet:
            then = "saves after this step; a second signal ends the run at once"
            _say(f"\ngraphnet: {name}: {then}\n")
        if self._trainer is not None:
            self._trainer.stop = True

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
