"""Every variant, a row each: those that the rules prefer stand first.

Adding a variant is its class, in the file of its kernel family, and one row here.
"""

from __future__ import annotations

from graphnet.lowering.launch.augment import Augmentation
from graphnet.lowering.launch.batch_norm import BatchNorms
from graphnet.lowering.launch.choice import Kernels, Table
from graphnet.lowering.launch.chunks import Chunks, PoolThenNorm, TwoPass
from graphnet.lowering.launch.conv_flat import Flat, FlatWgrad
from graphnet.lowering.launch.conv_rows import Pairs, Rows
from graphnet.lowering.launch.conv_taps import Taps, TapsWgrad
from graphnet.lowering.launch.gl_conv import GluonPairs, GluonResident, GluonRows
from graphnet.lowering.launch.gl_wgrad import GluonWgrad
from graphnet.lowering.launch.linear import LinearBoxes, LinearPointers
from graphnet.lowering.launch.linear_wgrad import LinearWgradBoxes, LinearWgradPointers
from graphnet.lowering.launch.loss import Losses
from graphnet.lowering.launch.norm import Norm, PooledNorm
from graphnet.lowering.launch.pool import Pools
from graphnet.lowering.launch.pool_tiles import PoolGradTiles, PoolTiles
from graphnet.lowering.launch.region import Stages
from graphnet.lowering.launch.region_linear import RowBlocks
from graphnet.lowering.launch.sync_batch_norm import SyncBatchNorms
from graphnet.lowering.launch.variants import Variant
from graphnet.lowering.launch.wgrad_rows import WgradRows

VARIANTS: tuple[Variant, ...] = (
    Pairs(),
    Rows(),
    Taps(),
    Flat(),
    WgradRows(),
    TapsWgrad(),
    FlatWgrad(),
    GluonRows(),
    GluonPairs(),
    GluonResident(),
    GluonWgrad(),
    LinearBoxes(),
    LinearPointers(),
    LinearWgradBoxes(),
    LinearWgradPointers(),
    Chunks(),
    PoolThenNorm(),
    TwoPass(),
    PoolTiles(),
    PoolGradTiles(),
    Pools(),
    Norm(),
    PooledNorm(),
    BatchNorms(),
    SyncBatchNorms(),
    Losses(),
    Augmentation(),
    Stages(),
    RowBlocks(),
)


def by_op() -> dict[str, tuple[Variant, ...]]:
    """The variants of each op, in the order of the rows."""
    ops = dict.fromkeys(op for v in VARIANTS for op in v.ops)
    return {op: tuple(v for v in VARIANTS if op in v.ops) for op in ops}


def kernels_for(target: str, *, arch: int = 90, table: Table | None = None) -> Kernels:
    """The kernels of a target."""
    return Kernels(by_op(), arch, target == "interpret", table or {})
