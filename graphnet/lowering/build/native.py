"""Kernels in C for the cpu target: compiled once for this processor, and loaded.

They make a step faster and are not needed: without a C compiler, or where anything about them
fails, the cpu target runs torch's kernels, and `why_not` says why.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
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
# They stand behind those that CC may hold. A library that needs a sanitizer ends the process that
# loads it, and fast math would drop NaN.
_PLAIN = ("-fno-sanitize=all",)
_FLAGS = (
    *_PLAIN, "-fno-fast-math", "-fvisibility=default", "-std=gnu11", "-O3", "-march=native",
    "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip


class _Missing(Exception):
    """Something that the kernels need is missing; the message says what."""


def load(name: str) -> ctypes.CDLL | None:
    """The functions of `kernels/<name>.c`; None where torch's kernels are to run."""
    return None if NATIVE in config.disabled() else _loaded(name)[0]


def why_not(name: str) -> str:
    """Why there is no such library; empty where there is one."""
    if NATIVE in config.disabled():
        return f"GRAPHNET_DISABLE names {NATIVE}"
    found, about = _loaded(name)
    return about if found is None else ""


def compiler_of(name: str) -> str | None:
    """What compiled the library, as it calls itself; None where there is no library."""
    return None if load(name) is None else _loaded(name)[1]


@cache
def _loaded(name: str) -> tuple[ctypes.CDLL | None, str]:
    """(the library, its compiler's first line), or (None, why not)."""
    try:
        cc = _compiler()
        version = _output([*cc, "--version"], 10)
        return ctypes.CDLL(str(_compiled(name, cc, version))), (version or cc[0]).splitlines()[0]
    except GraphnetError as error:
        return None, f"{error.message}: {error.help}" if error.help else error.message
    except Exception as error:  # whatever it is, a run goes on without
        return None, " ".join(str(error).split())


def _compiler() -> list[str]:
    """The C compiler's command: CC, as for Triton's launcher, else the first of the usual names."""
    try:
        given = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise _Missing(f"CC is no command: {error}") from error
    found = shutil.which(given[0]) if given else None
    for usual in () if given else ("gcc", "cc", "clang"):
        found = found or shutil.which(usual)
    if found is None:
        what = f"CC names {given[0]}, which is not there" if given else "no C compiler"
        raise _Missing(f"{what}: install gcc, or set CC")
    return [found, *given[1:]]


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
        # Linked by hand: -fopenmp would add the compiler's own OpenMP. Its threads would spin for
        # a millisecond behind each loop, on the processors that torch's need.
        _output([*cc, *_PLAIN, "-shared", str(made), openmp, "-lm", "-o", str(linked)])
        data = disk.read(linked)
    write_whole(path, data)
    write_whole(seal, hashlib.sha256(data).hexdigest().encode())
    return path


def _output(command: list[str], seconds: float = 120) -> str:
    """What a command prints; _Missing with the first line of its complaint where it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, errors="replace",
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Missing(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        said = (done.stderr.strip() or f"it ended with {done.returncode}").splitlines()[0]
        raise _Missing(f"{command[0]} fails: {said}")
    return done.stdout


class _Symbol(ctypes.Structure):
    """Dl_info of dladdr(3)."""

    _fields_ = (
        ("file", ctypes.c_char_p), ("base", ctypes.c_void_p), ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )  # fmt: skip


def _openmp() -> str:
    """The file of the OpenMP library that torch calls; others may be loaded beside it."""
    import torch

    called = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    if not hasattr(called, "omp_get_max_threads"):
        raise _Missing("torch has no OpenMP")
    address, about = ctypes.cast(called.omp_get_max_threads, ctypes.c_void_p), _Symbol()
    if not ctypes.CDLL(None).dladdr(address, ctypes.byref(about)) or not about.file:
        raise _Missing("torch's OpenMP is not found")
    return os.fsdecode(about.file)


def _cpu() -> str:
    """Model and features of the processor, on which the code of `-march=native` depends."""
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    known = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(known)))
