"""Images in files: a data set that is decoded as it is read, through a cache on disk.

Files that are no image are quarantined: left out, counted and listed with the reason. The order of
the others stays what it is, whichever epoch or process found out. Above a stated share of them
reading stops.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from graphnet.errors import CompileError, ConfigError, DataError
from graphnet.train.decoding import Decoders
from graphnet.train.rowstore import RowStore

Window = tuple[int, int, bool]  # top, left, mirrored
MAX_BAD = 0.001


def processors() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def normalised(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Images as a net sees them: float32, (value - mean) / std; bytes are value / 255."""
    x = images.float().div_(255) if images.dtype == torch.uint8 else images.clone()
    shift, scale = (torch.tensor(v).reshape(1, -1, 1, 1) for v in (mean, std))
    return x.sub_(shift).div_(scale)


def centre(images: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The middle of images [..., S, T], in `size` (H, W)."""
    top, left = ((s - n) // 2 for s, n in zip(images.shape[-2:], size, strict=True))
    return images[..., top : top + size[0], left : left + size[1]]


@dataclass(frozen=True)
class File:
    """One image: its path, and what tells whether it has changed."""

    path: str
    label: int
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Reading:
    """How batches are read: worker processes, batches ahead, pinned memory; none of it shows in
    what is read."""

    workers: int = 0
    prefetch: int = 2
    pin: bool = False

    def __post_init__(self) -> None:
        for what, least in (("workers", 0), ("prefetch", 1)):
            value = getattr(self, what)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{what} is a number of at least {least}, not {value!r}")
        if self.pin and not torch.cuda.is_available():
            raise ConfigError("pinned memory is for a GPU, and none is here", help="pin=False")


def reading_of(workers: int, pin: bool = False) -> Reading:
    """Reading with so many workers, and a batch ahead for every two of them: each batch is put
    together by a thread."""
    return Reading(workers, max(2, min(8, workers // 2)), pin)


class Folder:
    """A data set of image files.

    shape     (C, H, W) of an image as the net takes it
    stored    (C, S, T) as it is decoded and kept: crops of `shape` are cut from it
    seen      (C, S, T) to which a net's augmentation resizes smaller ones: they are read as they
              are stored, and not cut
    max_bad   share of the files that may be quarantined; DataError above it
    cache     keep decoded images under GRAPHNET_CACHE_DIR
    quarantined   {row: reason} of the files found so far
    note      why nothing is kept although it was asked for, or None
    decoded   files that `stream` has decoded so far; others were kept
    """

    def __init__(
        self,
        root: Path,
        files: Sequence[File],
        classes: Sequence[str],
        shape: Sequence[int],
        stored: Sequence[int] | None = None,
        *,
        name: str = "imagefolder",
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        max_bad: float = MAX_BAD,
        cache: bool = True,
        seen: Sequence[int] | None = None,
    ) -> None:
        if not files:
            raise DataError(f"{root}: the data set is empty")
        if not (isinstance(max_bad, int | float) and 0 <= max_bad <= 1):
            raise ConfigError(f"max_bad is a share from 0 to 1, not {max_bad!r}")
        self.root, self.files, self.classes, self.name = root, files, tuple(classes), name
        self.shape, self.stored = tuple(shape), tuple(stored or shape)
        self.seen = tuple(seen) if seen else None
        kept = self.seen or self.stored
        if kept[0] != self.shape[0] or any(s < n for s, n in zip(kept, self.shape, strict=True)):
            raise DataError(
                f"images kept as {_size(kept)}, the net takes {_size(self.shape)}",
                help="keep them at least as large as the net's input",
            )
        self.mean, self.std, self.max_bad = tuple(mean), tuple(std), max_bad
        self.labels = torch.tensor([f.label for f in files])
        self.quarantined: dict[int, str] = {}
        self.note: str | None = None
        self.decoded = 0
        self.cache = self._open_cache() if cache else None

    def __len__(self) -> int:
        return len(self.files)

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        """Images as the net sees them."""
        return normalised(images, self.mean, self.std)

    def read(self, rows: Sequence[int], workers: int = 0) -> torch.Tensor:
        """The images of some rows, uint8 as they are stored; without the quarantined ones."""
        order = np.asarray(rows, dtype=np.int64)
        found = [x for x, *_ in self.stream(order, 0, max(1, len(order)), Reading(workers))]
        return torch.cat(found) if found else torch.empty(0, *self.stored, dtype=torch.uint8)

    # ---- the cache --------------------------------------------------------------------------

    def key(self) -> str:
        """Hash of all that the decoded bytes depend on: the files as they are, the size, Pillow."""
        import PIL

        digest = hashlib.sha256()
        version = 3  # of what `decode` makes of a file
        about = [version, PIL.__version__, self.stored, str(self.root)]
        digest.update(json.dumps(about).encode())
        for f in self.files:
            digest.update(json.dumps([f.path, f.size, f.mtime_ns]).encode())
        return digest.hexdigest()[:32]

    def _open_cache(self) -> RowStore | None:
        from graphnet.lowering.launch.files import private_dir

        size = int(np.prod(self.stored))
        about = {"of": str(self.root), "stored": list(self.stored)}
        try:
            home = private_dir("images")
            made = (home / (key := self.key())).exists()
            free, need = shutil.disk_usage(home).free, len(self) * size
            if made or need <= 0.9 * free:
                return RowStore(home, key, len(self), size, about)
            why = f"they take {need} bytes, {home} has {free} free"
        except CompileError as error:
            why = error.message
        except OSError as error:
            why = f"{error.filename}: {error.strerror}"
        self.note = f"decoded images are not kept, every epoch decodes again: {why}"
        return None

    # ---- reading ----------------------------------------------------------------------------

    def stream(
        self,
        order: np.ndarray,
        start: int,
        batch: int,
        reading: Reading,
        windows: Callable[[np.ndarray], Sequence[Window]] | None = None,
        normalise: bool = False,
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """(images, rows, place in `order` behind them) of each batch of `order[start:]`.

        windows    rows -> where `shape` is cut from each image; None gives images as stored
        normalise  float32 as `normalised` gives it, not bytes
        share      (rank, ranks): of each batch the part of one rank
        Each batch but the last has `batch` images: quarantined files are skipped, not replaced. Of
        several ranks, none knows what the others find: there a bad file leaves its batch smaller.
        """
        places = np.arange(start, len(order))
        if share[1] > 1:
            yield from self._share(order, places, batch, reading, windows, normalise, share)
            return
        if self.quarantined:
            known = np.fromiter(self.quarantined, dtype=np.int64)
            places = places[~np.isin(order[places], known)]
        held: list[_Part] = []
        with _Reader(self, batch, reading, windows, normalise) as reader:
            for part in reader.parts(order, _cut(places, batch)):
                self._quarantine(part)
                if not held and len(part.places) == batch:
                    yield part.result(order)
                    continue
                held.append(part)
                if sum(len(p.places) for p in held) >= batch:
                    whole, rest = _joined(held, batch)
                    held = [rest] if len(rest.places) else []
                    yield whole.result(order)
        if held and any(len(p.places) for p in held):
            yield _joined(held, batch)[0].result(order)

    def _share(
        self, order: np.ndarray, places: np.ndarray, batch: int, reading: Reading,
        windows: Callable[[np.ndarray], Sequence[Window]] | None, normalise: bool,
        share: tuple[int, int],
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:  # fmt: skip
        most = -(-batch // share[1])
        whole = _cut(places, batch)
        mine = [w[share[0] * most :][:most] for w in whole]
        with _Reader(self, most, reading, windows, normalise) as reader:
            for part, w in zip(reader.parts(order, mine), whole, strict=True):
                self._quarantine(part)
                yield part.images, torch.from_numpy(order[part.places]), int(w[-1]) + 1

    def _quarantine(self, part: _Part) -> None:
        self.decoded += part.decoded
        self.set_aside(part.failed)

    def set_aside(self, failed: Mapping[int, str]) -> None:
        """Quarantines rows, with the reason of each; DataError where they are too many."""
        new = failed.keys() - self.quarantined.keys()
        self.quarantined.update(failed)
        bad, most = len(self.quarantined), self.max_bad * len(self)
        if new and bad > most:
            row, reason = next(iter(self.quarantined.items()))
            raise DataError(
                f"{bad} of {len(self)} files under {self.root} are no images, more than the share "
                f"{self.max_bad:g} that is allowed; the first: {self.files[row].path}: {reason}",
                help="remove or replace them, or allow a larger share (max_bad)",
            )

    def report(self) -> list[dict[str, str]]:
        """The quarantined files with their reasons, in the order of the listing."""
        rows = sorted(self.quarantined)
        return [{"path": self.files[r].path, "reason": self.quarantined[r]} for r in rows]


@dataclass
class _Part:
    """Images that were read together; `places` says where in the order each stood."""

    images: torch.Tensor
    places: np.ndarray
    failed: dict[int, str] = field(default_factory=dict)
    decoded: int = 0

    def result(self, order: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, int]:
        rows = torch.from_numpy(order[self.places])
        return self.images, rows, int(self.places[-1]) + 1


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _cut(places: np.ndarray, batch: int) -> list[np.ndarray]:
    """Places by batches; the last may have fewer."""
    return [places[at : at + batch] for at in range(0, len(places), batch)]


def _joined(parts: Sequence[_Part], batch: int) -> tuple[_Part, _Part]:
    """The first `batch` images of the parts, and the others."""
    images = torch.cat([p.images for p in parts])
    places = np.concatenate([p.places for p in parts])
    return _Part(images[:batch], places[:batch]), _Part(images[batch:], places[batch:])


def _holders(arrays: Sequence[np.ndarray]) -> list[int]:
    """References to each array of a list, as this function sees them."""
    return [sys.getrefcount(a) for a in arrays]


_ALONE = _holders([np.empty(0)])[0]  # of an array that only the list holds


class _Recycled:
    """Arrays that are handed out again when nobody holds them any more.

    The first touch of fresh memory is a page fault for each 4 kB: as expensive as all the rest of
    making a batch. A tensor made of an array holds it, and so does every view of that tensor.
    """

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self.lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
        """An array that nothing else refers to; its content is undefined."""
        with self.lock:
            for at, holders in enumerate(_holders(self.arrays)):
                if holders == _ALONE and self.arrays[at].shape == shape:
                    return self.arrays[at]
            # Not np.empty: it asks for huge pages, which took seconds to find beside a cache that
            # is being written.
            array = torch.empty(shape, dtype=dtype).numpy()
            if len(self.arrays) < 8:
                self.arrays.append(array)
            return array


class _Reader:
    """Reads batches of a Folder: a few at once in threads, or in the caller without workers."""

    def __init__(
        self,
        folder: Folder,
        batch: int,
        reading: Reading,
        windows: Callable[[np.ndarray], Sequence[Window]] | None,
        normalise: bool,
    ) -> None:
        self.folder, self.batch, self.windows, self.pin = folder, batch, windows, reading.pin
        self.dtype = torch.float32 if normalise else torch.uint8
        self.memory = _Recycled()
        c = folder.stored[0]
        wide = [np.broadcast_to(np.asarray(v, "f4"), (c,)) for v in (folder.mean, folder.std)]
        self.mean, self.std = (v.reshape(c, 1, 1) for v in wide)
        ahead = reading.prefetch if reading.workers else 0
        self.threads = ThreadPoolExecutor(ahead, "graphnet-read") if ahead else None
        self.buffers = ahead + 1  # one is being used up
        self.decoders = Decoders(
            reading.workers, folder.stored, self.buffers * batch, folder.cache
        )  # fmt: skip

    def parts(self, order: np.ndarray, places: Sequence[np.ndarray]) -> Iterator[_Part]:
        """The images at each of the `places`, up to `batch` of them, in their order."""
        waiting: deque[Future[_Part]] = deque()
        for number, mine in enumerate(places):
            work = (order[mine], mine, number % self.buffers)
            if self.threads is None:
                yield self._read(*work)
                continue
            waiting.append(self.threads.submit(self._read, *work))
            if len(waiting) == self.buffers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _read(self, rows: np.ndarray, places: np.ndarray, buffer: int) -> _Part:
        """Reads rows from the cache, decodes those it lacks, and cuts the windows."""
        folder, cache, first = self.folder, self.folder.cache, buffer * self.batch
        views = [None if cache is None else cache.get(row) for row in rows.tolist()]
        jobs = [
            (first + k, row, folder.files[row].path)
            for k, row in enumerate(rows.tolist())
            if views[k] is None
        ]
        failed = {}
        for (slot, row, _), found in zip(jobs, self.decoders.run(jobs), strict=True):
            if isinstance(found, str):
                failed[row] = found
            else:
                views[slot - first] = found
        good = [(k, view) for k, view in enumerate(views) if view is not None]
        c, h, w = folder.stored if self.windows is None else folder.shape
        windows = [(0, 0, False)] * len(rows) if self.windows is None else self.windows(rows)
        images, into = self._batch((len(good), c, h, w))
        for image, (k, view) in zip(into, good, strict=True):
            top, left, mirrored = windows[k]
            whole = np.frombuffer(view, dtype=np.uint8).reshape(folder.stored)
            piece = whole[:, top : top + h, left : left + w]
            if mirrored:
                piece = piece[:, :, ::-1]
            if image.dtype == np.uint8:
                image[:] = piece
            else:  # image by image: what one step leaves is in the processor's cache for the next
                np.divide(piece, np.float32(255), out=image, dtype=np.float32)
                np.subtract(image, self.mean, out=image)
                np.divide(image, self.std, out=image)
        return _Part(images, places[[k for k, _ in good]], failed, len(jobs))

    def _batch(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, np.ndarray]:
        """Memory for a batch, as a tensor and as an array."""
        if self.pin:  # torch keeps and reuses pinned memory by itself
            images = torch.empty(shape, dtype=self.dtype, pin_memory=True)
            return images, images.numpy()
        into = self.memory.take(shape, self.dtype)
        return torch.from_numpy(into), into

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        if self.threads is not None:
            self.threads.shutdown(cancel_futures=True)
        self.decoders.close()
