"""A cache of decoded images: rows of bytes in a file, each with its checksum beside it.

A row counts only where its checksum holds, and it is compared when the row is first read. So a
run that is killed leaves the rows it has decoded, two runs may fill one cache, and whatever
damages the file costs the damaged rows: they are decoded again.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from graphnet.errors import ConfigError

IMAGES, SUMS, MANIFEST = "images.u8", "sums.u64", "manifest.json"
_THERE = 1 << 32  # above the checksum: a row that was never written reads as zero


def checksum(parts: Iterable[Any], row: int) -> int:
    """Of the row's bytes and its number, so that a row in the wrong place is a damaged one."""
    value = row
    for part in parts:
        value = zlib.crc32(part, value)
    return _THERE | value


def write_row(images: int, sums: int, row: int, stride: int, parts: Sequence[bytes]) -> bool:
    """Writes a row into the files behind the two descriptors: whether all of it is there.

    OSError where it cannot. The row comes in parts, so that nobody has to put them together.
    """
    if os.pwritev(images, parts, row * stride) < sum(map(len, parts)):
        return False
    return os.pwrite(sums, checksum(parts, row).to_bytes(8, "little"), 8 * row) == 8


class RowStore:
    """`rows` rows of `size` bytes under `folder / key`.

    key       names everything that the rows depend on
    manifest  what the folder is about, for people; it belongs to the key
    damaged   rows whose checksum did not hold
    """

    def __init__(
        self, folder: Path, key: str, rows: int, size: int, manifest: dict[str, Any]
    ) -> None:
        self.path, self.rows, self.size = folder / key, rows, size
        self.stride = -(-size // 8) * 8
        self.damaged = 0
        self._known = bytearray(rows)  # 1: compared in this process
        self._manifest = {**manifest, "rows": rows, "row_bytes": size}
        if self.path.exists() and not self._sound():
            shutil.rmtree(self.path)
        if not self.path.exists():
            self._make(folder)
        self.images = os.open(self.path / IMAGES, os.O_RDWR | os.O_CLOEXEC)
        self.sums = os.open(self.path / SUMS, os.O_RDWR | os.O_CLOEXEC)
        # A set that is dropped gives its files back: while open, a removed cache takes room.
        weakref.finalize(self, _close, self.images, self.sums)
        self._data = memoryview(mmap.mmap(self.images, rows * self.stride, prot=mmap.PROT_READ))
        self._words = memoryview(mmap.mmap(self.sums, rows * 8, prot=mmap.PROT_READ)).cast("Q")

    def _sound(self) -> bool:
        """Whether the folder is of this set and whole; ConfigError where it is not ours."""
        about = self.path.lstat()
        if self.path.is_symlink() or about.st_uid != os.getuid() or about.st_mode & 0o022:
            raise ConfigError(
                f"the image cache {self.path} is a link, or others may write to it",
                help="remove it, or set GRAPHNET_CACHE_DIR",
            )
        try:
            sizes = [(self.path / name).stat().st_size for name in (IMAGES, SUMS)]
            manifest = json.loads((self.path / MANIFEST).read_bytes())
        except (OSError, ValueError):
            return False
        return sizes == [self.rows * self.stride, self.rows * 8] and manifest == self._manifest

    def _make(self, folder: Path) -> None:
        """Empty files, which take no room yet, in a folder that appears whole."""
        partial = Path(tempfile.mkdtemp(dir=folder, prefix=f".{self.path.name}-"))
        try:
            for name, size in ((IMAGES, self.rows * self.stride), (SUMS, self.rows * 8)):
                with open(partial / name, "wb") as file:
                    file.truncate(size)
            (partial / MANIFEST).write_text(json.dumps(self._manifest, indent=1))
            try:
                os.rename(partial, self.path)
            except OSError:
                if not self.path.exists():  # else another run was quicker: its folder is as good
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def get(self, row: int) -> memoryview | None:
        """The row's bytes, or None where they are not there or damaged."""
        word = self._words[row]
        if not word:
            return None
        data = self._bytes(row)
        if not self._known[row]:
            if word != checksum([data], row):
                self.damaged += 1
                return None
            self._known[row] = 1
        return data

    def written(self, row: int) -> memoryview:
        """The row's bytes just after a `write_row` that said True. What the disk makes of them is
        compared when the row is read the next time."""
        return self._bytes(row)

    def _bytes(self, row: int) -> memoryview:
        return self._data[row * self.stride : row * self.stride + self.size]

    def filled(self) -> int:
        """How many rows are there, damaged ones included."""
        return self.rows - self._words.tolist().count(0)


def _close(*handles: int) -> None:
    for handle in handles:
        os.close(handle)
