"""Philox on Python ints, for tests."""

from __future__ import annotations

from collections.abc import Sequence


def philox_scalar(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 as the paper writes it, on Python ints: independent of `ops/philox.py`."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(q >> 32) ^ c[1] ^ k[0], q & 0xFFFFFFFF, (p >> 32) ^ c[3] ^ k[1], p & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c
