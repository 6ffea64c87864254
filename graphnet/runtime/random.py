"""The public reference of graphnet's randomness: which elements dropout keeps, in NumPy."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

from graphnet.errors import ConfigError
from graphnet.ops import philox


def dropout_mask(
    seed: int,
    step: int,
    shape: Sequence[int],
    p: float,
    name: str = "",
    *,
    stream: int | None = None,
    global_batch: int | None = None,
) -> Any:
    """The boolean mask that a dropout layer keeps: `shape` with its batch first.

    seed, step    of the compiled program, and the number of training steps done before
    name          display name of the layer (drop1); or `stream`, its CRC-32
    global_batch  rows of the compiled batch, by default shape[0]
    """
    if not name and stream is None:
        raise ConfigError("dropout_mask needs the layer's name or its stream")
    if stream is None:
        stream = zlib.crc32(name.encode())
    batch = shape[0] if global_batch is None else global_batch
    return philox.dropout_mask(seed, step, tuple(shape), p, stream, batch)
