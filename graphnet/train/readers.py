"""The readers behind `data.load`: strict about files, and DataError is all that they raise."""

from __future__ import annotations

import gzip
import os
import struct
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from graphnet.errors import DataError
from graphnet.train.data import Dataset, permutation
from graphnet.train.decode import SUFFIXES, BadImage, decode, own_size
from graphnet.train.folder import MAX_BAD, File, Folder, centre

_MAX_BYTES = 4 << 30  # a header may claim anything; no set that belongs in memory is larger
_DIGITS = tuple("0123456789")
_SAMPLE = 64  # files that are asked for the size of all
_SPLIT_SEED = 20_240_901  # of the digits' split; changing it changes every reported error


# ---- MNIST -----------------------------------------------------------------------------------


def mnist(folder: str, split: str) -> Dataset:
    """The IDX files of one split, .gz or unpacked."""
    stem = {"train": "train", "test": "t10k"}[split]
    image_file = _find(Path(folder), f"{stem}-images-idx3-ubyte")
    label_file = _find(Path(folder), f"{stem}-labels-idx1-ubyte")
    images, labels = read_idx(image_file, ndim=3), read_idx(label_file, ndim=1)
    if len(images) != len(labels):
        raise DataError(
            f"{image_file} holds {len(images)} images, {label_file} {len(labels)} labels",
            help="take both files from one source",
        )
    if int(labels.max()) > 9:
        raise DataError(f"{label_file}: label {int(labels.max())}, the largest of MNIST is 9")
    return Dataset(
        torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64)),
        _DIGITS, "mnist", (0.1307,), (0.3081,),
    )  # fmt: skip


def _find(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder", help="use mnist:DIR with MNIST's IDX files")
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(
        f"{folder} has neither {name} nor {name}.gz", help="put MNIST's IDX files there"
    )


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """A whole IDX file of unsigned bytes with `ndim` dimensions; DataError for anything else."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as packed:
                return _parse_idx(path, packed, ndim)
        with open(path, "rb") as file:
            return _parse_idx(path, file, ndim)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is no whole gzip file: {error}", help=_AGAIN) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


_AGAIN = "fetch the file again and compare its size with the source's"


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def _parse_idx(path: Path, file: _Readable, ndim: int) -> np.ndarray:
    head = file.read(4 + 4 * ndim)
    magic = 0x0800 | ndim
    if len(head) >= 4 and (found := struct.unpack(">I", head[:4])[0]) != magic:
        raise DataError(
            f"{path}: magic number 0x{found:08x}, expected 0x{magic:08x}",
            help=f"it should be an IDX file of unsigned bytes with {ndim} dimensions",
        )
    if len(head) < 4 + 4 * ndim:
        raise DataError(
            f"{path}: the header has {len(head)} bytes, expected {4 + 4 * ndim}", help=_AGAIN
        )
    dims = struct.unpack(f">{ndim}I", head[4:])
    size = 1
    for d in dims:
        size *= d
    shape = "x".join(map(str, dims))
    if ndim == 3 and dims[1:] != (28, 28):
        raise DataError(f"{path}: images of {dims[1]}x{dims[2]}, MNIST's are 28x28")
    if not 0 < size <= _MAX_BYTES:
        raise DataError(f"{path}: the header claims {shape} bytes", help=_AGAIN)
    # One byte more than claimed: it shows a longer file, and makes gzip check its CRC.
    body = file.read(size + 1)
    if len(body) != size:
        found_text = f"{len(body)} bytes" if len(body) < size else f"more than {size} bytes"
        raise DataError(
            f"{path}: {found_text} behind the header, {shape} = {size} expected", help=_AGAIN
        )
    return np.frombuffer(bytearray(body), dtype=np.uint8).reshape(dims)


# ---- digits and synthetic --------------------------------------------------------------------


def digits(split: str) -> Dataset:
    """scikit-learn's 1,797 digits, 8x8 upscaled to 28x28; a fixed fifth of each class is test."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    labels = torch.from_numpy(np.asarray(raw.target)).long()
    small = torch.from_numpy(np.asarray(raw.images, dtype=np.float32) / 16).unsqueeze(1)
    images = torch.nn.functional.interpolate(small, size=(28, 28), mode="bilinear")
    test = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(10):
        rows = (labels == c).nonzero()[:, 0]
        rows = rows[permutation(len(rows), _SPLIT_SEED, c)]
        test[rows[: round(len(rows) / 5)]] = True
    train = images[~test]
    mean, std = float(train.mean()), float(train.std())
    mine = test if split == "test" else ~test
    return Dataset(images[mine], labels[mine], _DIGITS, "digits", (mean,), (std,))


def synthetic(split: str, shape: Sequence[int] | None = None, classes: int = 10) -> Dataset:
    """Seeded: each class is a coarse random pattern, each image that pattern under noise."""
    c, h, w = shape or (1, 28, 28)
    many = 2048 if c * h * w <= 1 << 14 else 256  # enough for batch 128 at AlexNet's sizes
    count, stream = (many, 1) if split == "train" else (many // 4, 2)
    patterns = np.random.Philox(key=[_SPLIT_SEED, 0]).random_raw(classes * c * 16)
    coarse = torch.from_numpy((patterns >> np.uint64(40)).astype(np.float32) / (1 << 24))
    coarse = coarse.reshape(classes, c, 4, 4)
    clean = torch.nn.functional.interpolate(coarse, size=(h, w), mode="nearest")
    bits = np.random.Philox(key=[_SPLIT_SEED, stream])
    labels = torch.from_numpy((bits.random_raw(count) % np.uint64(classes)).astype(np.int64))
    words = bits.random_raw(-(-count * c * h * w // 8))
    noise = torch.from_numpy(words.view(np.uint8)[: count * c * h * w].copy())
    images = torch.empty(count, c, h, w, dtype=torch.uint8)
    for at in range(0, count, 64):  # in pieces: the fp32 images are four times the result
        part = slice(at, min(at + 64, count))
        size = part.stop - at
        rough = noise[at * c * h * w : part.stop * c * h * w].reshape(size, c, h, w).float()
        images[part] = (clean[labels[part]] * 127 + rough / 2).to(torch.uint8)
    names = tuple(f"class{k}" for k in range(classes))
    return Dataset(images, labels, names, "synthetic", (0.5,), (0.21,))


# ---- CIFAR-10 --------------------------------------------------------------------------------

_CIFAR = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
_CIFAR_MEAN, _CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_RECORD = 1 + 3 * 32 * 32


def cifar10(
    place: str, split: str, shape: Sequence[int] | None = None, **options: Any
) -> Dataset | Folder:
    """The binary version, unpacked or as the .tar.gz it comes in; or an image folder."""
    path = Path(place)
    names = ["test_batch.bin"]
    if split == "train":
        names = [f"data_batch_{k}.bin" for k in range(1, 6)]
    if path.is_file():
        return _cifar_tensors(_from_archive(path, names))
    if not path.is_dir():
        raise DataError(f"{path} is neither a folder nor a file", help=_CIFAR_HELP)
    for home in (path, path / "cifar-10-batches-bin"):
        if (home / names[0]).is_file():
            return _cifar_tensors([(str(home / n), _bytes_of(home / n)) for n in names])
    if (path / "train").is_dir():
        known = imagefolder(place, split, shape or (3, 32, 32), **options)
        known.name = "cifar10"
        if known.shape[0] == 3:
            known.mean, known.std = _CIFAR_MEAN, _CIFAR_STD
        return known
    if any(path.glob("**/data_batch_1")):
        raise DataError(f"{path} holds pickled batches, which are not read", help=_CIFAR_HELP)
    raise DataError(f"{path} has neither {names[0]} nor a folder train", help=_CIFAR_HELP)


_CIFAR_HELP = (
    "give the folder or the .tar.gz of CIFAR-10's binary version, or one with train/CLASS/*.jpg"
)


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def _from_archive(path: Path, names: Sequence[str]) -> list[tuple[str, bytes]]:
    """Members of a tar by their last name, read in memory: nothing is unpacked."""
    found: dict[str, bytes] = {}
    kinds = set()
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                kinds.add(name.rpartition(".")[2].lower() if "." in name else name)
                if name in names and member.isreg():
                    if member.size > 10_000 * _RECORD:
                        raise DataError(f"{path}: {name} has {member.size} bytes")
                    file = archive.extractfile(member)
                    found[name] = file.read() if file is not None else b""
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path} is no whole tar file: {error}", help=_AGAIN) from None
    if missing := [n for n in names if n not in found]:
        unpack = f"unpack it (tar xf {path.name}) and give imagefolder:DIR, DIR holding train/"
        raise DataError(
            f"{path} has no {missing[0]}",
            help=unpack if kinds & {s[1:] for s in SUFFIXES} else _CIFAR_HELP,
        )
    return [(f"{path}:{n}", found[n]) for n in names]


def _cifar_tensors(files: Sequence[tuple[str, bytes]]) -> Dataset:
    images, labels = [], []
    for name, data in files:
        if not data or len(data) % _RECORD:
            raise DataError(
                f"{name}: {len(data)} bytes are no whole number of {_RECORD}-byte records",
                help=_AGAIN,
            )
        records = np.frombuffer(bytearray(data), dtype=np.uint8).reshape(-1, _RECORD)
        if (most := int(records[:, 0].max())) > 9:
            row = int((records[:, 0] > 9).argmax())
            raise DataError(f"{name}: record {row} has label {most}, the largest of CIFAR-10 is 9")
        labels.append(records[:, 0].astype(np.int64))
        images.append(records[:, 1:].reshape(-1, 3, 32, 32))
    return Dataset(
        torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels)),
        _CIFAR, "cifar10", _CIFAR_MEAN, _CIFAR_STD,
    )  # fmt: skip


# ---- folders of images -----------------------------------------------------------------------


def imagefolder(
    folder: str,
    split: str,
    shape: Sequence[int] | None = None,
    *,
    resize: int | None = None,
    max_bad: float = MAX_BAD,
    cache: bool = True,
    own: bool = False,
) -> Folder:
    """DIR/SPLIT/CLASS/**/*.jpg: cropped to the aspect ratio of `shape` and resized to it, or to
    `resize` x `resize`, from which `shape` is cut. With `own`, images that are all smaller, and of
    one size, stay as small as they are: the net's augmentation resizes them."""
    c, h, w = shape or (3, 224, 224)
    if c not in (1, 3):
        raise DataError(f"images have 1 or 3 channels, the net takes {c}")
    home = _split_folder(Path(folder), split)
    train = Path(folder) / "train"
    names = _classes(train if train.is_dir() else home)  # a set for tests may stand alone
    if (found := _classes(home)) != names:
        odd = ", ".join(sorted(set(found) ^ set(names)))
        raise DataError(
            f"{home} has {len(found)} classes, train {len(names)}; only one has: {odd}",
            help="give both splits the same class folders",
        )
    if resize is not None and resize < max(h, w):
        raise DataError(
            f"images resized to {resize}x{resize}, the net takes {h}x{w}",
            help=f"resize to at least {max(h, w)}",
        )
    stored = (c, h, w) if resize is None else (c, resize, resize)
    files: list[File] = []
    for label, name in enumerate(names):
        mine = _files(home / name, label)
        if not mine:
            raise DataError(
                f"class folder {home / name} holds 0 images, expected at least 1",
                help=f"images end in {', '.join(SUFFIXES)}",
            )
        files += mine
    # ImageNet's constants; for one channel their means.
    mean = (0.485, 0.456, 0.406) if c == 3 else (0.449,)
    std = (0.229, 0.224, 0.225) if c == 3 else (0.226,)
    seen = None
    sample = [files[k].path for k in range(0, len(files), max(1, len(files) // _SAMPLE))]
    if own and (size := own_size(sample, stored[1:])) is not None:
        seen, stored = stored, (c, *size)
    return Folder(
        home.resolve(), files, names, (c, h, w), stored,
        mean=mean, std=std, max_bad=max_bad, cache=cache, seen=seen,
    )  # fmt: skip


# Photographs in formats that are not read: listed, so that they are missed with a reason.
_FOREIGN = (".heic", ".heif", ".avif", ".jxl", ".jp2")


def _files(folder: Path, label: int) -> list[File]:
    """The image files of a class and of the folders in it, by path."""
    found: list[File] = []
    above = {str(p) for p in Path(os.path.realpath(folder)).parents}
    _gather(folder, label, found, above)
    return sorted(found, key=lambda f: f.path)


def _gather(folder: str | Path, label: int, found: list[File], seen: set[str]) -> None:
    if (place := os.path.realpath(folder)) in seen:  # a link upwards, or a second one
        return
    seen.add(place)
    for entry in _entries(folder):
        if entry.name.lower().endswith(SUFFIXES + _FOREIGN):
            try:
                about = entry.stat()
                size, mtime = about.st_size, about.st_mtime_ns
            except OSError:  # a link to nothing: decoding says so
                size = mtime = -1
            found.append(File(entry.path, label, size, mtime))
        elif not entry.name.startswith(".") and os.path.isdir(entry.path):
            _gather(entry.path, label, found, seen)


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror or error}") from None


def _split_folder(folder: Path, split: str) -> Path:
    wanted = ("train",) if split == "train" else ("test", "val")
    for name in wanted:
        if (folder / name).is_dir():
            return folder / name
    raise DataError(
        f"{folder} has no folder {' or '.join(wanted)}",
        help="use imagefolder:DIR with DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg",
    )


def _classes(folder: Path) -> tuple[str, ...]:
    seen = [e for e in _entries(folder) if not e.name.startswith(".")]
    names = [e.name for e in seen if os.path.isdir(e.path)]
    if not names:
        raise DataError(f"{folder} holds 0 class folders, expected at least 1")
    return tuple(names)


def read_image(
    path: str | os.PathLike[str], shape: Sequence[int], stored: Sequence[int] | None = None
) -> torch.Tensor:
    """One image file as uint8 [C, H, W], as a test reads it: the middle of what is `stored`.

    DataError where it is no image.
    """
    stored = shape if stored is None else stored
    try:
        data = b"".join(decode(path, stored))
    except BadImage as error:
        raise DataError(
            f"cannot read image {path}: {error}", help="remove or replace it"
        ) from None
    image = torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(tuple(stored))
    return centre(image, shape[1:]).contiguous()
