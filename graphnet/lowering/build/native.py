"""Kernels in C for the cpu target: compiled once for this processor, and loaded.

A C compiler need not be there. Without one, or where torch's OpenMP is not found, the cpu target
runs torch's kernels instead, and `why_not` says why.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from graphnet import config, disk
from graphnet.errors import GraphnetError
from graphnet.lowering.build.tools import package
from graphnet.lowering.launch.files import private_dir, write_whole

NATIVE = "native"  # for GRAPHNET_DISABLE
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_SECONDS = 120  # of a compiler that hangs
_OPENMP = re.compile(r"lib(?:gomp|iomp5|omp)\b[^/]*\.so[^/]*$")


class _Missing(Exception):
    """What the kernels cannot do without is not here; the text names it."""


def library(name: str) -> ctypes.CDLL | None:
    """The functions of `kernels/<name>.c`; None where torch's kernels are to run."""
    return None if NATIVE in config.disabled() else _loaded(name)[0]


def why_not(name: str) -> str:
    """Why there is no such library: a sentence, empty where there is one."""
    if NATIVE in config.disabled():
        return f"GRAPHNET_DISABLE names {NATIVE}"
    found, about = _loaded(name)
    return about if found is None else ""


def compiler_of(name: str) -> str | None:
    """What compiled the library, as it calls itself; None where there is no library."""
    return None if library(name) is None else _loaded(name)[1]


def _compiler() -> list[str]:
    """The C compiler's command: CC, as for Triton's launcher, else the first of the usual names."""
    given = shlex.split(os.environ.get("CC", ""))
    found = shutil.which(given[0]) if given else None
    for usual in () if given else ("gcc", "cc", "clang"):
        found = found or shutil.which(usual)
    if found is None:
        raise _Missing(f"CC names {given[0]}, which is not there" if given else "no C compiler")
    return [found, *given[1:]]


@cache
def _loaded(name: str) -> tuple[ctypes.CDLL | None, str]:
    """(the library, its compiler's first line), or (None, why not)."""
    try:
        cc = _compiler()
        version = _output([*cc, "--version"])
        return ctypes.CDLL(str(_compiled(name, cc, version))), (version or cc[0]).splitlines()[0]
    except (_Missing, GraphnetError, OSError) as error:
        return None, " ".join(str(error).split())


def _compiled(name: str, cc: list[str], version: str) -> Path:
    """The library's file in the cache, made where it is not there or not whole."""
    if platform.system() != "Linux":
        raise _Missing("kernels in C are compiled on Linux alone")
    source, openmp = package("graphnet.kernels") / f"{name}.c", _openmp()
    parts = (disk.read(source).decode(), cc, version, _FLAGS, openmp, _cpu())
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    folder = private_dir("native")
    path, seal = folder / f"{name}-{key[:32]}.so", folder / f"{name}-{key[:32]}.sha256"
    try:
        if hashlib.sha256(disk.read(path)).hexdigest() == disk.read(seal).decode():
            return path
    except (OSError, UnicodeDecodeError):
        pass  # not there, or something else is
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made, linked = Path(work, "kernel.o"), Path(work, "kernel.so")
        _output([*cc, *_FLAGS, "-c", str(source), "-o", str(made)])
        # Linked by hand: -fopenmp would add the system's library. Its threads would spin for a
        # millisecond behind each loop, on the processors of torch's.
        _output([*cc, "-shared", str(made), openmp, "-lm", "-o", str(linked)])
        data = disk.read(linked)
    write_whole(path, data)
    write_whole(seal, hashlib.sha256(data).hexdigest().encode())
    return path


def _output(command: list[str]) -> str:
    """What a command prints; _Missing with the first line of its complaint where it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, errors="replace",
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Missing(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        said = (done.stderr.strip() or f"it ended with {done.returncode}").splitlines()[0]
        raise _Missing(f"{command[0]} fails: {said}")
    return done.stdout


def _openmp() -> str:
    """The OpenMP library that torch has loaded into this process."""
    import torch  # noqa: F401

    for line in Path("/proc/self/maps").read_text().splitlines():
        if _OPENMP.search(line):
            return line[line.index("/") :]
    raise _Missing("torch has loaded no OpenMP")


def _cpu() -> str:
    """What `-march=native` goes by: model and features of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    known = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(known)))
