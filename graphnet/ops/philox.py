"""Philox4x32-10 in NumPy, the reference of all randomness (Salmon et al., SC 2011)."""

from __future__ import annotations

import zlib

import numpy as np

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)


def philox4x32(
    c0: np.ndarray, c1: np.ndarray, c2: np.ndarray, c3: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ten rounds on counters of uint32 (broadcast together) under the 64-bit key `seed`."""
    words = [np.asarray(c).astype(np.uint64) & _LOW for c in (c0, c1, c2, c3)]
    x0, x1, x2, x3 = (np.array(w) for w in np.broadcast_arrays(*words))
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = x0 * _M0, x2 * _M1
        x0, x1, x2, x3 = (
            (p1 >> np.uint64(32)) ^ x1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> np.uint64(32)) ^ x3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return tuple(x.astype(np.uint32) for x in (x0, x1, x2, x3))  # type: ignore[return-value]


def stream_of(name: str) -> int:
    """The stream of a layer: CRC-32 of its name."""
    return zlib.crc32(name.encode())


def threshold(p: float) -> int:
    """floor(p 2^32): a word below it drops."""
    return min(int(p * 2**32), 2**32 - 1)


def dropout_mask(
    seed: int, step: int, shape: tuple[int, ...], p: float, stream: int | str,
    global_batch: int = 0, first_row: int = 0, first_element: int = 0,
) -> np.ndarray:  # fmt: skip
    """Bool array, True where an element is kept.

    counter = (element within the sample in logical order, sample low, sample high, stream),
    sample = step * global_batch + first_row + row; kept iff word 0 >= floor(p 2^32). The rows are
    those from `first_row` on of a global batch, 0 rows of which mean that it is this one; the
    elements are those from `first_element` on of each sample.
    """
    if isinstance(stream, str):
        stream = stream_of(stream)
    batch = global_batch or shape[0]
    per_sample = int(np.prod(shape[1:], dtype=np.int64))
    sample = (step * batch + first_row + np.arange(shape[0], dtype=np.uint64))[:, None]
    element = np.arange(first_element, first_element + per_sample, dtype=np.uint64)[None, :]
    word, *_ = philox4x32(
        element, sample & _LOW, sample >> np.uint64(32), np.asarray(stream, np.uint64), int(seed)
    )
    return (word >= np.uint32(threshold(p))).reshape(shape)
