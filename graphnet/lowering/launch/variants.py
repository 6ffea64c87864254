"""Variants: for one equation there may be several kernels.

A variant is one way to compute an equation: it says which equations it takes and why not the
others, which configurations are worth trying, and how a configuration becomes launches. A variant
is one class in the file of its kernel family and one row in `registry.py`. Code that lists,
chooses, searches or reports asks the registry and names no kernel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from graphnet.ir.graph import Eqn, Value
from graphnet.ir.types import Layout
from graphnet.lowering.launch.config import Config

if TYPE_CHECKING:
    from graphnet.lowering.launch.steps import Launch
    from graphnet.lowering.launch.work import Work

# What the numbers of a problem's shape mean.
_CONV = ("N", "C", "H", "W", "K", "R", "S", "SH", "SW", "PT", "PB", "PL", "PR", "DH", "DW", "G")
_LINEAR = ("N", "C", "K")
_IMAGE = ("N", "C", "H", "W")
_POOL = (*_IMAGE, "KH", "KW", "SH", "SW", "PT", "PB", "PL", "PR", "DH", "DW")
_NORM = (*_IMAGE, "LOW", "HIGH")
AXES = {
    **dict.fromkeys(("conv2d", "conv2d_dgrad", "conv2d_wgrad"), _CONV),
    **dict.fromkeys(("linear", "linear_dgrad", "linear_wgrad"), _LINEAR),
    **dict.fromkeys(("maxpool2d", "maxpool2d_grad", "avgpool2d", "avgpool2d_grad"), _POOL),
    **dict.fromkeys(("adaptive_avgpool2d", "adaptive_avgpool2d_grad"), (*_IMAGE, "OH", "OW")),
    **dict.fromkeys(("lrn", "lrn_grad"), _NORM),
    **dict.fromkeys(("cross_entropy", "multi_margin"), ("N", "C")),
    **dict.fromkeys(("batch_norm", "batch_norm_stats", "batch_norm_elemt"), _IMAGE),
    **dict.fromkeys(
        ("batch_norm_grad", "batch_norm_grad_reduce", "batch_norm_grad_elemt"), _IMAGE
    ),
    "augment": _IMAGE,
}


@dataclass(frozen=True)
class Problem:
    """What a kernel is chosen for, and what a measurement is remembered by.

    op     the anchor, or two of one kernel joined: "lrn_grad+maxpool2d_grad"; of a region what
           its members are: "region:conv2d,maxpool2d"
    shape  the anchor's full logical shape, named by AXES. Of all three passes of a convolution:
           images, channels, height, width, filters, filter height and width, stride, padding,
           dilation, groups; of a fully connected layer: rows, inputs, outputs. A second anchor's
           numbers follow those of the first, a region's are those of its members in order
    dtype  how products are formed ("ieee", "tf32", "bf16"); elsewhere the image's element type
    held   tensors that the code behind a product reads beside each accumulator: what an update
           keeps in registers. It is no part of the key
    """

    op: str
    shape: tuple[int, ...]
    dtype: str
    held: int = field(default=0, compare=False)

    @property
    def kind(self) -> str:
        """Under which name the registry has its variants: `op`, or "region"."""
        return self.op.partition(":")[0]

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the shape's numbers; the second anchor's only where they are new. A region
        numbers its members: N0, C0, ..., N1, ..."""
        if self.kind != self.op:
            ops = self.op.partition(":")[2].split(",")
            each = (Problem(op, (), self.dtype).axes for op in ops)
            return tuple(f"{axis}{k}" for k, axes in enumerate(each) for axis in axes)
        first, *more = self.op.split("+")
        own = AXES.get(first, ("elements",))
        return own + tuple(a for op in more for a in AXES[op] if a not in own)

    @property
    def sizes(self) -> dict[str, int]:
        """The shape by name: N, C, H, W, K, R, S, SH, ..."""
        return dict(zip(self.axes, self.shape, strict=True))

    def __str__(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.shape))} {self.dtype}"


def no_descriptors(arch: int) -> str | None:
    """Why a GPU cannot fetch operands as boxes of tensor descriptors; None where it can."""
    return f"sm_{arch} has no tensor descriptors" if arch < 90 else None


class Variant(ABC):
    """One way to compute an equation.

    name         as tables, flags and reports call it; distinct among the variants of an op
    ops          the anchors that it computes; a pair in one region is "first+second"
    interpreted  whether Triton's interpreter can run it
    moments      whether its kernel can keep the statistics of a batch normalization that follows
    """

    name: str
    ops: tuple[str, ...]
    interpreted: bool = True
    moments: bool = False

    def accepts(
        self, eqn: Eqn, layouts: Mapping[Value, Layout], dtype: str, arch: int
    ) -> str | None:
        """Why not, as a sentence; None where it computes the equation.

        eqn      plain or fused
        layouts  of its anchors' operands and results, by the values that the anchors name
        dtype    as `Problem.dtype`
        arch     90 for sm_90
        """
        return None

    def wants(
        self, eqn: Eqn, layouts: Mapping[Value, Layout], dtype: str
    ) -> Mapping[Value, Layout]:
        """Other layouts in which it reads operands of the anchor that lie as `layouts` says: the
        layout pass makes copies in these, or lets the kernel that writes an operand write them."""
        return {}

    def writes(self, eqn: Eqn, layout: Layout) -> bool:
        """Whether its kernel can write the result once more in another layout, in whole runs."""
        return False

    def keeps(self, problem: Problem) -> str | None:
        """Why its kernel keeps no statistics of this problem's result; None where it does."""
        return None if self.moments else f"{self.name} keeps no moments of its result"

    def suits(self, problem: Problem) -> str | None:
        """Why the rules take another variant, although this one could; None where they need not."""
        return None

    @abstractmethod
    def configs(self, problem: Problem) -> Iterator[Config]:
        """Configurations worth trying, the rules' own first."""

    def rule(self, problem: Problem) -> Config:
        """The configuration by the rules."""
        return next(iter(self.configs(problem)))

    def cut(self, config: Config, problem: Problem) -> Config:
        """A forced configuration, its tiles shrunk to the problem where they are larger."""
        return config

    @abstractmethod
    def launch(self, work: Work, config: Config) -> list[Launch]:
        """The launches that compute the equation, in order."""

    def interpretable(self, config: Config, problem: Problem) -> Config:
        """The configuration by the rules where Triton's interpreter runs it, which pays for each
        operation and not for each element."""
        return config

    def joins(self, whole: Work, parts: Sequence[Work], padded: Sequence[int]) -> str | None:
        """Of a region's variant: why it should not compute an equation in place of the launches of
        its parts; None where that pays. `padded` is the arithmetic of their whole tiles."""
        return None
