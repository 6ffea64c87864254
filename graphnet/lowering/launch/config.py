"""Launch configurations: a pure function of kind, shape and precision.

What was measured for a key wins (`using` a table, see tables.py), else the rules here decide. They
are for sm_90 with 132 processors. Tiles are powers of two of at least 16, the least
that `tl.dot` takes. Flattened loops get 4 warps: 8 are known to miscompile on Hopper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

from graphnet.errors import ConfigError

PROCESSORS = 132
SHARED_BYTES = 232448
UPDATE_ACCUMULATORS = 32  # a thread; a fused update spills above (measured)
UPDATE_TENSORS = 3  # beside that many: with a fourth Triton 3.6 spills, with a fifth 3.7 too
LEAST_PART = 256  # of a split reduction
TAPS = ("conv2d_taps", "conv2d_wgrad_taps")
PRODUCTS = ("conv2d", "conv2d_dgrad", "linear", "linear_dgrad", "conv2d_taps")
WGRADS = ("conv2d_wgrad", "linear_wgrad", "conv2d_wgrad_taps")
NORMS = ("lrn", "lrn_grad")  # also fused with a pool


@dataclass(frozen=True)
class Config:
    """Tile sizes of a product (BM, BN, BK, SPLIT) or of a pointwise kernel (BLOCK).

    BT is the width of a product's second accumulator, 0 for none.

    loader is of convolutions: "" for the rule's (see loaders.py), or the one to take if it can.

    Normalization: BM pixels by BN channels, BK rows of a gradient's task, SPLIT programs.
    """

    BM: int = 0
    BN: int = 0
    BK: int = 0
    BT: int = 0
    SPLIT: int = 1
    BLOCK: int = 0
    num_warps: int = 4
    num_stages: int = 2
    loader: str = ""

    @property
    def accumulators(self) -> int:
        """fp32 accumulators a thread."""
        return self.BM * (self.BN + self.BT) // (32 * self.num_warps)

    def shared_bytes(self, itemsize: int) -> int:
        """What the operand tiles of all stages take."""
        return (self.BM + self.BN + self.BT) * self.BK * itemsize * self.num_stages


def next_power(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def _tile(size: int, most: int, least: int = 16) -> int:
    return max(least, min(most, next_power(size)))


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def _product(m: int, n: int, k: int, groups: int, precision: str) -> Config:
    low = precision == "bf16"
    # ieee products run on FMAs; flattened convolutions hold addresses, fully connected layers draw
    # dropout masks in their epilogue: all of them spill above 64 columns.
    bm, bn = _tile(m, 64), _tile(n, 64)
    # Too few tiles leave processors idle: smaller ones, rows first; wgmma takes at least 64 rows.
    least = 32 if precision == "ieee" or m < 64 else 64
    while cdiv(m, bm) * cdiv(n, bn) * groups < PROCESSORS and (bm > least or bn > 32):
        bm, bn = (bm // 2, bn) if bm > least and bm >= bn or bn <= 32 else (bm, bn // 2)
    bk = _tile(k, 64 if low else 32)
    return Config(bm, bn, bk, num_stages=2 if precision == "ieee" else 3)


def _wgrad(m: int, n: int, k: int, groups: int, precision: str) -> Config:
    bm, bn = _tile(m, 64), _tile(n, 64)
    # ieee products hold their operand tiles in registers: BK=32 spills beside an update. bf16 at
    # BK=64 spills 8 to 16 bytes in LeNet's first convolution (Triton 3.6 and 3.7), none at 32.
    bk = _tile(k, 16 if precision == "ieee" else 32)
    tiles = cdiv(m, bm) * cdiv(n, bn) * groups
    # A part of fewer pixels or rows does not pay for the second launch; and there are no more
    # parts than processors.
    parts = min(PROCESSORS // tiles, k // LEAST_PART) if tiles < PROCESSORS else 1
    split = 1 << (max(parts, 1).bit_length() - 1)
    return Config(bm, bn, bk, SPLIT=split, num_stages=2 if precision == "ieee" else 3)


def _columns(n: int, most: int, wide: int) -> tuple[int, int]:
    """(BN, BT) for n columns: least padding, but narrow tiles read their rows more often.

    most, wide  limits of BN and of BN + BT; BT is narrower than BN
    """
    powers = [16 << k for k in range(4) if 16 << k <= most]
    tiles = [(bn, 0) for bn in powers]
    tiles += [(bn, bt) for bn in powers for bt in powers if bt < bn and bn + bt <= wide]

    def cost(tile: tuple[int, int]) -> tuple[float, int]:
        width = sum(tile)
        return cdiv(n, width) * width * (1 + 24 / width), tile[1]

    return min(tiles, key=cost)


def _depth(k: int, most: int) -> int:
    """The deepest block of a reduction over k channels that wastes at most an eighth."""
    bk = _tile(k, most)
    while bk > 16 and 8 * (cdiv(k, bk) * bk - k) > k:
        bk //= 2
    return bk


def _taps(m: int, n: int, k: int, groups: int, precision: str) -> Config:
    """k is the channels of one tap."""
    if precision == "ieee":
        return _product(m, n, k, groups, precision)
    low = precision == "bf16"
    bm = _tile(m, 128 if low else 64)
    bn, bt = _columns(n, 128, 128)
    while cdiv(m, bm) * cdiv(n, bn + bt) * groups < PROCESSORS and bm > 64:
        bm //= 2
    bk = _depth(k, 64 if low else 32)
    return Config(bm, bn, bk, BT=bt, num_stages=3 if bk >= 64 else 4)


def _wgrad_taps(m: int, n: int, k: int, columns: int, precision: str) -> Config:
    """m output channels, n channels of a tap, k pixels; `columns` is taps times groups."""
    if precision == "ieee":
        c = _wgrad(m, n, k, columns, precision)
        return replace(c, SPLIT=1) if c.SPLIT == 1 else c
    bn, bt = _columns(n, *(128, 144) if precision == "bf16" else (64, 96))
    bm = _tile(m, 64 if bt else 128)  # two accumulators of 128 rows spill
    tiles = cdiv(m, bm) * cdiv(n, bn + bt) * columns
    # Two waves of tiles; the update is done by the second pass, which the first one needs for its
    # large accumulators anyway.
    parts = max(2, min(2 * PROCESSORS // tiles, k // (4 * LEAST_PART)))
    split = 1 << (parts.bit_length() - 1)
    # 128 x 128 holds its operands' addresses beside 128 accumulators: Triton 3.6 spills at 4 warps.
    warps = 8 if bm * (bn + bt) > 128 * 96 else 4
    return Config(
        bm, bn, 32, BT=bt, SPLIT=split, num_warps=warps, num_stages=4 if precision == "bf16" else 3
    )  # fmt: skip


def _loss(rows: int, classes: int) -> Config:
    bn = next_power(classes)
    if bn > 4096:
        raise ConfigError(f"the loss kernel keeps a row in registers: {classes} classes, most 4096")
    bm = _tile(rows, max(1, 2048 // bn), least=1)
    programs = 1 if rows * bn <= 16384 else min(cdiv(rows, bm), PROCESSORS)
    return Config(bm, bn, SPLIT=programs)


def _norm(pixels: int, channels: int, dtype: str) -> Config:
    bn = next_power(channels)
    elements = 1024 if dtype == "bf16" else 512  # 16 bytes a thread
    return Config(
        _tile(pixels, max(1, elements // bn), least=1), bn, BK=8, SPLIT=4 * PROCESSORS
    )  # fmt: skip


def _four(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    m, n, k, groups = shape
    return m, n, k, groups


Key = tuple[str, tuple[int, ...], str]


@dataclass(frozen=True)
class Choice:
    """A question to `choose` and its answer. `source` is "analytic", "measured" or "forced"."""

    kind: str
    shape: tuple[int, ...]
    precision: str
    config: Config
    source: str

    @property
    def key(self) -> Key:
        return self.kind, self.shape, self.precision


def choose(kind: str, shape: tuple[int, ...], precision: str = "ieee", held: int = 0) -> Config:
    """The configuration of a kernel.

    kind       an anchor op, "split_reduce" or "elementwise"
    shape      (M, N, K, groups) of products, K and N being those of one tap where the kernel goes
               by taps, and groups the taps of all groups in a weight gradient; (rows, classes) of
               losses; (pixels, channels) of normalization; (elements,) otherwise
    precision  "ieee", "tf32" or "bf16" of products; the image's element type of normalization
    held       tensors that an update in the kernel reads beside each of its accumulators
    """
    found = _tables[-1].get((kind, shape, precision)) if _tables else None
    config = found or analytic(kind, shape, precision)
    source = "analytic" if found is None else "measured"
    for kinds, changes in _forced:
        if not kinds or kind in kinds:
            config, source = _cut(replace(config, **changes), kind, shape), "forced"
    config = _with_room(config, held)
    for asked in _listening:
        asked.append(Choice(kind, shape, precision, config, source))
    return config


def analytic(kind: str, shape: tuple[int, ...], precision: str = "ieee") -> Config:
    """What the rules of this file say, whatever was measured."""
    if kind == "conv2d_taps":
        return _taps(*_four(shape), precision)
    if kind == "conv2d_wgrad_taps":
        return _wgrad_taps(*_four(shape), precision)
    if kind in PRODUCTS:
        return _product(*_four(shape), precision)
    if kind in WGRADS:
        return _wgrad(*_four(shape), precision)
    if kind in ("cross_entropy", "multi_margin"):
        return _loss(shape[0], shape[1])
    if kind in NORMS:
        return _norm(shape[0], shape[1], precision)
    return Config(BLOCK=_tile(shape[0], 256 if kind == "split_reduce" else 1024, 32))


def _cut(config: Config, kind: str, shape: tuple[int, ...]) -> Config:
    """Forced tiles that are larger than the problem shrink to it."""
    if kind not in (*PRODUCTS, *WGRADS):
        return config
    m, n, k, _ = shape
    return replace(
        config, BM=_tile(m, config.BM), BN=_tile(n, config.BN), BK=_tile(k, config.BK),
        BT=config.BT if n > config.BN else 0,
    )  # fmt: skip


def _with_room(config: Config, held: int) -> Config:
    """Fewer columns where an update holds many tensors; behind a split it has a pass of its own."""
    most = UPDATE_ACCUMULATORS * UPDATE_TENSORS
    while config.SPLIT == 1 and held > UPDATE_TENSORS and config.accumulators * held > most:
        if not config.BT and config.BN <= 16:
            break
        config = replace(config, BT=0) if config.BT else replace(config, BN=config.BN // 2)
    return config


_forced: list[tuple[tuple[str, ...], dict[str, Any]]] = []
_tables: list[Mapping[Key, Config]] = []
_listening: list[list[Choice]] = []


@contextmanager
def using(table: Mapping[Key, Config]) -> Iterator[None]:
    """Inside, what stands in the table wins over the rules."""
    _tables.append(table)
    try:
        yield
    finally:
        _tables.pop()


@contextmanager
def choices() -> Iterator[list[Choice]]:
    """The questions that are asked inside, in order."""
    asked: list[Choice] = []
    _listening.append(asked)
    try:
        yield asked
    finally:
        _listening.pop()


@contextmanager
def forced(*kinds: str, **changes: int | str) -> Iterator[None]:
    """Overrides fields of every choice (of the given kinds). For tests and the tuner."""
    unknown = set(changes) - {f.name for f in fields(Config)}
    if unknown:
        raise ConfigError(f"no configuration field {sorted(unknown)}")
    _forced.append((kinds, changes))
    try:
        yield
    finally:
        _forced.pop()
