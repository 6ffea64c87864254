"""Batch normalization of the cpu target in inference: the convolution before it does the work.

On the other targets `normalize` is elementwise code behind the convolution, in the same launch. A
kernel of torch's takes no such code, so here the convolution gets another weight and bias:

    scale = weight / sqrt(var + eps),  w' = w scale,  b' = (b - mean) scale + bias

They are made when they are first needed, and again where an operand has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphnet.ir.graph import Eqn, Graph
from graphnet.lowering.targets.cpu_task import only_f32


class Folded:
    """The weight and the bias of a convolution with a `normalize` behind it.

    Whether operands changed is seen by torch's count of in-place changes. What moves them without
    a trace (a fused optimizer) is told by `forget`.
    """

    def __init__(self, conv: Eqn, norm: Eqn) -> None:
        self.norm, self.biased = norm, len(conv.inputs) == 3
        self.attrs: Any = norm.attrs
        self._made: tuple[torch.Tensor, torch.Tensor] | None = None
        self._seen: list[int] | None = None

    def forget(self) -> None:
        """The next call makes them again."""
        self._seen = None

    def __call__(self, operands: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(w', b') of w, [b], mean, var, [weight, bias]."""
        tracked = not any(t.is_inference() for t in operands)
        versions = [t._version for t in operands] if tracked else None
        if self._made is None or versions is None or versions != self._seen:
            self._made, self._seen = self._fold(*operands), versions
        return self._made

    def _fold(self, w: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        vectors = [v.double() for v in rest]
        bias = vectors.pop(0) if self.biased else 0.0
        mean, var, *affine = vectors
        scale = torch.rsqrt(var + self.attrs.eps)
        if affine:
            scale *= affine[0]
        shift = (bias - mean) * scale + (affine[1] if affine else 0.0)
        return w * scale.to(w.dtype).reshape(-1, 1, 1, 1), shift.to(w.dtype)


def folds(conv: Eqn, norm: Eqn, graph: Graph) -> bool:
    """Whether a convolution takes up the `normalize` behind it: it is by given statistics, of state
    that this graph leaves as it is."""
    a: Any = norm.attrs
    state = (*conv.inputs[1:], *norm.inputs[1:])
    fixed = set(graph.input_values) - {old for old, _ in graph.commits}
    first = norm.inputs[0] == conv.out
    return first and a.centred and fixed.issuperset(state) and only_f32(*state, norm.out)
