"""The GRAPHNET_* flags: an environment variable and a context manager each.

with config.override(DEBUG="2"):
    ...
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graphnet.errors import ConfigError

FLAGS = {
    "DEBUG": "1 pass summaries, 2 per-launch time and rates, 3 rule hits and refusals, 4 IR text",
    "DUMP": "folder for the numbered IR after each pass, DOT, generated files and the plan",
    "DISABLE": "passes, rewrite rules and variants of kernels to leave out, separated by commas "
    "(rules: by semicolons)",
    "CHECK": "1 compares every launch with its reference and stops at the first bad one",
    "TUNE": "1 lets compile search for launch configurations, 0 (default) uses the tables",
    "STREAMS": "0 one stream, 1 (default) wide updates beside the rest, N > 1 by N programs there",
    "NCCL_CAPTURE": "1 records collectives in the CUDA graph, 0 (default) runs them between graphs",
    "CACHE_DIR": "folder for compiled kernels and generated files",
    "DATA": "folder with real data sets; data tests skip without it",
}
MOST_PROGRAMS = 1024  # more than any GPU has processors
_overrides: dict[str, str] = {}


def get(name: str, default: str = "") -> str:
    """The value of a flag: the innermost override, else GRAPHNET_<name>, else `default`."""
    if name not in FLAGS:
        raise ConfigError(f"unknown flag {name!r}", help=f"flags: {', '.join(FLAGS)}")
    return _overrides.get(name, os.environ.get(f"GRAPHNET_{name}", default))


@contextmanager
def override(**flags: str) -> Iterator[None]:
    """Sets flags inside a `with` block, without touching the environment."""
    for name in flags:
        get(name)
    before = dict(_overrides)
    _overrides.update(flags)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def _number(name: str, most: int, default: str = "0") -> int:
    text = get(name, default) or default
    if not text.isdigit() or int(text) > most:
        raise ConfigError(f"GRAPHNET_{name}={text!r}", help=f"use a number from 0 to {most}")
    return int(text)


def debug() -> int:
    """The debug level, 0 to 4."""
    return _number("DEBUG", 4)


def check() -> bool:
    return bool(_number("CHECK", 1))


def tune() -> bool:
    return bool(_number("TUNE", 1))


def streams() -> int:
    """0: one stream; 1: wide updates on a second one; more: by that many programs there."""
    return _number("STREAMS", MOST_PROGRAMS, "1")


def nccl_capture() -> bool:
    """Whether a step's collectives stand in its CUDA graph. The same on all ranks."""
    return bool(_number("NCCL_CAPTURE", 1))


def dump_dir() -> str:
    """Folder for dumps, or an empty string."""
    return get("DUMP")


def disabled() -> tuple[str, ...]:
    """Names of the passes, rules and variants to leave out. Rule names hold commas, so `;`
    separates, too."""
    text = get("DISABLE")
    if "=>" in text or ";" in text:
        return tuple(filter(None, (part.strip() for part in text.split(";"))))
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def cache_dir() -> Path:
    """Folder for compiled kernels and generated files (not created here)."""
    text = get("CACHE_DIR")
    if text:
        return Path(text)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "graphnet"


def data_dir() -> Path | None:
    """Folder with real data sets, or None."""
    text = get("DATA")
    return Path(text) if text else None
