"""Variants: for one equation there may be several kernels.

A variant is one way to compute an equation: it says which equations it takes and why not the
others, which configurations are worth trying, and how a configuration becomes launches. A variant
is one class in the file of its kernel family and one row in `registry.py`; whoever lists, chooses,
searches or reports asks the registry, and nobody names kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from graphnet.ir.graph import Eqn, Value
from graphnet.ir.types import Layout
from graphnet.lowering.launch.config import Config
from graphnet.lowering.launch.steps import Step
from graphnet.lowering.launch.work import Work

# What the numbers of a problem's shape mean, by the first anchor.
_CONV = ("N", "C", "H", "W", "K", "R", "S", "SH", "SW", "PT", "PB", "PL", "PR", "DH", "DW", "G")
_POOL = ("N", "C", "H", "W", "KH", "KW", "SH", "SW", "PT", "PB", "PL", "PR", "DH", "DW")
AXES = {
    "conv2d": _CONV, "conv2d_dgrad": _CONV, "conv2d_wgrad": _CONV,
    "linear": ("N", "C", "K"), "linear_dgrad": ("N", "C", "K"), "linear_wgrad": ("N", "C", "K"),
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """What a kernel is chosen for, and what a measurement is remembered by.

    op     the anchor, or two of one kernel joined: "lrn_grad+maxpool2d_grad"
    shape  the anchor's full logical shape. Of all three passes of a convolution: images, channels,
           height, width, filters, filter height and width, stride, padding, dilation, groups; of a
           fully connected layer: rows, inputs, outputs
    dtype  how products are formed ("ieee", "tf32", "bf16"); elsewhere the image's element type
    """

    op: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def sizes(self) -> dict[str, int]:
        """The shape by name: N, C, H, W, K, R, S, SH, ..."""
        return dict(zip(AXES[self.op], self.shape, strict=True))


class Variant:
    """One way to compute an equation.

    name         as tables, flags and reports call it; distinct among the variants of an op
    ops          the anchors that it computes; a pair in one region is "first+second"
    interpreted  whether Triton's interpreter can run it
    """

    name: str
    ops: tuple[str, ...]
    interpreted: bool = True

    def accepts(
        self, eqn: Eqn, layouts: Mapping[Value, Layout], dtype: str, arch: int
    ) -> str | None:
        """Why not, as a sentence; None where it computes the equation.

        eqn      plain or fused
        layouts  of its anchors' operands and results, by the names that the anchors use
        dtype    as `Problem.dtype`
        arch     90 for sm_90
        """
        raise NotImplementedError

    def suits(self, problem: Problem) -> str | None:
        """Why the rules prefer another variant although this one could; None where they do not."""
        return None

    def configs(self, problem: Problem) -> Iterator[Config]:
        """Configurations worth trying, the rules' own first."""
        raise NotImplementedError

    def launch(self, work: Work, config: Config) -> list[Step]:
        """The launches that compute the equation, in order."""
        raise NotImplementedError
