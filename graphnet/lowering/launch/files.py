"""Files of the cache: folders that are ours alone, files that appear whole, generated modules.

Compile workers read generated files through here, so nothing of torch is imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from graphnet import config
from graphnet.errors import CompileError


@dataclass(frozen=True)
class Source:
    """The text of one generated file; `sha` is the SHA-256 that names and verifies it."""

    text: str

    @property
    def sha(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def name(self) -> str:
        return f"e_{self.sha[:16]}"

    @property
    def function(self) -> str:
        """The name of its one function."""
        return self.text.partition("\ndef ")[2].partition("(")[0]


def private_dir(name: str) -> Path:
    """A folder of the cache, made with mode 0700; CompileError if it cannot be ours alone."""
    base = config.cache_dir()
    path = base / name
    try:
        base.mkdir(parents=True, exist_ok=True, mode=0o700)  # one that is there may be shared
        path.mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise CompileError(
            f"the cache {path} cannot be made: {error.strerror}", help="set GRAPHNET_CACHE_DIR"
        ) from error
    for folder in (base, path):
        if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
            raise CompileError(
                f"the cache {folder} belongs to another user", help="set GRAPHNET_CACHE_DIR"
            )
    if path.stat().st_mode & 0o077:
        path.chmod(0o700)
    return path


def write_whole(path: Path, data: bytes) -> None:
    """The file appears whole or not at all."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(partial, path)
    except BaseException:  # a full disk, a signal
        os.unlink(partial)
        raise


def materialise(source: Source, folder: Path | None = None) -> Path:
    """The file of a source, written or repaired where its SHA-256 does not match."""
    path = (folder or private_dir("generated")) / f"{source.name}.py"
    data = source.text.encode()
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != source.sha:
        write_whole(path, data)
    return path


class _Loader(SourceFileLoader):
    """Runs the text that was verified; a bytecode file beside it vouches for nothing."""

    def __init__(self, name: str, path: Path, text: str) -> None:
        super().__init__(name, str(path))
        self.text = text

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.text, self.path, "exec", dont_inherit=True)


_loaded: dict[tuple[str, str], ModuleType] = {}


def load(source: Source, package: str = "graphnet_generated") -> Any:
    """The jit function of a source; `package` keeps copies for different modes apart."""
    key = (package, source.sha)
    if key not in _loaded:
        name, path = f"{package}_{source.name}", materialise(source)
        loader = _Loader(name, path, source.text)
        spec = importlib.util.spec_from_file_location(name, path, loader=loader)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[spec.name]
            raise
        _loaded[key] = module
    return getattr(_loaded[key], source.function)
