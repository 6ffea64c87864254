"""Files: read where they are plain files, and written so that they appear whole or not at all.

Decode workers read through here, so nothing heavy is imported.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from pathlib import Path

from graphnet.errors import CheckpointError, DiskError, GraphnetError

Name = str | os.PathLike[str]
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def read(path: Name, most: int | None = None) -> bytes:
    """All bytes of a regular file; a link to one is followed.

    OSError for everything else: a named pipe would wait for its other end, a device never ends. So
    the kind and the size (`most` bytes) are asked for before anything is read.
    """
    # Without O_NONBLOCK, opening a named pipe waits for its other end for ever.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            what = "a directory" if stat.S_ISDIR(about.st_mode) else "not a regular file"
            raise OSError(errno.EINVAL, what, os.fspath(path))
        if most is not None and about.st_size > most:
            text = f"{about.st_size} bytes, at most {most}"
            raise OSError(errno.EFBIG, text, os.fspath(path))
        with open(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)


def write(path: Name, data: bytes, *, durable: bool = False, mode: int = 0o600) -> None:
    """Writes a file that holds, at every moment, either what it held before or all of `data`.

    Temporary file (0600, random name) -> rename. `durable` also survives a power cut: the file is
    synced before the rename, and the folder after it, without which the new name may have no
    content. OSError where it cannot be done; nothing is left then.
    """
    path = Path(path)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(partial, mode)
        os.replace(partial, path)
    except BaseException:  # a full disk, a signal
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Name) -> None:
    """Makes renames in the folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unwritten(
    path: Name,
    error: OSError,
    what: str = "",
    otherwise: type[GraphnetError] = CheckpointError,
    help: str = "free some space or choose another folder",
) -> GraphnetError:
    """The error of a file that was not written: DiskError where the disk is at fault."""
    kind = DiskError if error.errno in _DISK else otherwise
    return kind(
        f"cannot write {path}{what}: {error.strerror or error}",
        help=f"what stood there before is intact; {help}",
    )
