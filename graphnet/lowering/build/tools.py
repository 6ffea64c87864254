"""What binaries are made with: the assembler, the templates, the architectures."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
from functools import cache
from pathlib import Path

from graphnet.errors import CompileError, ConfigError

ARCHES = (80, 86, 89, 90, 100, 120)


@cache
def package(name: str) -> Path:
    """Folder of a package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise CompileError(f"{name} is not installed", help=f"pip install {name}")
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def ptxas() -> tuple[Path, str]:
    """(path, version) of the assembler: what the user pinned, torch's own, else Triton's."""
    pinned = os.environ.get("TRITON_PTXAS_PATH")
    own = package("torch") / "bin" / "ptxas"
    bundled = package("triton") / "backends" / "nvidia" / "bin" / "ptxas"
    path = Path(pinned) if pinned else own if own.exists() else bundled
    try:
        text = subprocess.run(
            [path, "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(f"the assembler {path} does not run: {error}") from error
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    return path, found[1] if found else "unknown"


@cache
def kernels_hash() -> str:
    """SHA-256 over the text of all templates."""
    digest = hashlib.sha256()
    for path in sorted(package("graphnet.kernels").glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def arch_number(text: str) -> int:
    """90 for "sm_90" or "sm_90a"; ConfigError for what Triton compiles nothing for."""
    found = re.fullmatch(r"sm_(\d+)a?", text)
    if not found or int(found[1]) not in ARCHES:
        known = ", ".join(f"sm_{n}" for n in ARCHES)
        raise ConfigError(f"unknown architecture {text!r}", help=f"one of {known}")
    return int(found[1])
