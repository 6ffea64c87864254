"""Files of the cache: folders that are ours alone, files that appear whole, generated modules.

Compile workers read generated files through here, so nothing of torch is imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import linecache
import os
import sys
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from graphnet import config, disk
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
    """A folder of the cache, made with mode 0700; CompileError if it cannot be ours alone.

    Neither the cache nor the folder may be a symbolic link, which could lead into another place,
    belong to somebody else, or be writable for others.
    """
    base = config.cache_dir()
    path = base / name
    try:
        base.mkdir(parents=True, exist_ok=True, mode=0o700)  # one that is there may be readable
        path.mkdir(exist_ok=True, mode=0o700)
        _ours(base)
        _ours(path, alone=True)
    except OSError as error:
        raise CompileError(
            f"the cache {path} cannot be made: {error.strerror}", help="set GRAPHNET_CACHE_DIR"
        ) from error
    return path


def _ours(folder: Path, alone: bool = False) -> None:
    """CompileError where the folder may hold what others put there. `alone`: nobody reads it."""
    if folder.is_symlink():
        raise CompileError(
            f"the cache {folder} is a symbolic link", help="set GRAPHNET_CACHE_DIR to a real folder"
        )
    # The folder is checked and changed through one descriptor: a renamed path cannot redirect it.
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        about = os.fstat(handle)
        if about.st_uid != os.getuid():
            raise CompileError(
                f"the cache {folder} belongs to another user", help="set GRAPHNET_CACHE_DIR"
            )
        if about.st_mode & 0o022:
            raise CompileError(
                f"others can write to the cache {folder} (mode {about.st_mode & 0o777:04o})",
                help="what lies there may not be yours: empty it and chmod go-w, or set "
                "GRAPHNET_CACHE_DIR",
            )
        if alone and about.st_mode & 0o077:
            os.fchmod(handle, 0o700)
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes) -> None:
    """The file appears whole or not at all; DiskError or CompileError where it cannot."""
    try:
        disk.write(path, data)
    except OSError as error:
        raise disk.unwritten(path, error, "", CompileError, _ELSEWHERE) from None


_ELSEWHERE = "free some space, or set GRAPHNET_CACHE_DIR if it lies in the cache"


def materialise(source: Source, folder: Path | None = None) -> Path:
    """The file of a source, written or repaired where its SHA-256 does not match."""
    path = (folder or private_dir("generated")) / f"{source.name}.py"
    data = source.text.encode()
    try:
        whole = disk.read(path, len(data)) == data
    except OSError:  # not there, or something else is
        whole = False
    if not whole:
        write_whole(path, data)
    return path


class _Loader(SourceFileLoader):
    """Runs the text that a Source verifies, and nothing that lies on disk: neither a bytecode file
    beside the generated file nor what that file may hold by now."""

    def __init__(self, name: str, path: Path, text: str) -> None:
        super().__init__(name, str(path))
        self.text = text

    def get_source(self, fullname: str) -> str:
        return self.text

    def get_code(self, fullname: str) -> CodeType:
        # Triton reads the text again, through `inspect`, which asks linecache. An entry without a
        # time is never compared with the file.
        lines = self.text.splitlines(keepends=True)
        linecache.cache[self.path] = (len(self.text), None, lines, self.path)
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
