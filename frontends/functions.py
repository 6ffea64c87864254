"""torch's functions and tensor methods on symbolic values: what each of them becomes.

A function takes what torch's takes, in the same order and under the same names. One that has a
layer of ours is that layer's `forward`, so that there is one place that checks its arguments.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F

from graphnet.errors import UnsupportedOpError
from graphnet.frontends import layers
from graphnet.frontends.activations import ROWS
from graphnet.frontends.dsl import Parameter
from graphnet.frontends.symbolic import Symbol, cat, flatten, padded, softmax_along
from graphnet.frontends.tracer import user_place

Function = Callable[..., Any]


def _layer(name: str) -> Function:
    """The function of a layer without parameters: its first argument is the value."""

    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(layers, name)(*args, **kwargs).forward(x)

    return call


def _conv2d(
    x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Symbol:  # fmt: skip
    layers.images("conv2d", x)
    stride, dilation = layers.pair(stride, "stride"), layers.pair(dilation, "dilation")
    sides = layers.four_sides(padding, weight.shape[2:], stride, dilation)
    operands = [x, weight] + ([] if bias is None else [bias])
    return x.tracer.emit(  # type: ignore[no-any-return]
        "conv2d", operands, kind="conv", stride=stride, padding=sides, dilation=dilation,
        groups=groups,
    )  # fmt: skip


def _linear(x: Any, weight: Any, bias: Any = None) -> Symbol:
    operands = [x, weight] + ([] if bias is None else [bias])
    return x.tracer.emit("linear", operands, kind="fc")  # type: ignore[no-any-return]


def _add(x: Any, y: Any, alpha: float = 1) -> Any:
    return x + (y if alpha == 1 else y * alpha)


def _sub(x: Any, y: Any, alpha: float = 1) -> Any:
    return x - (y if alpha == 1 else y * alpha)


def _div(x: Any, y: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        raise UnsupportedOpError(f"div with rounding_mode={rounding_mode!r}", where=user_place())
    return x / y


def _cat(tensors: Sequence[Any], dim: int = 0, **named: Any) -> Any:
    return cat(tensors, named.get("axis", dim))


def _reshape(x: Any, *shape: Any) -> Any:
    return x.reshape(*shape)


def _split(x: Any, size: int | Sequence[int], dim: int = 0) -> list[Any]:
    """Parts of `size` along an axis, the last one smaller; or parts of the sizes given."""
    length = x.shape[dim]
    if isinstance(size, int):
        size = [min(size, length - at) for at in range(0, length, size)]
    axis, at, parts = dim % x.ndim, 0, []
    for s in size:
        parts.append(x[(slice(None),) * axis + (slice(at, at + s),)])
        at += s
    return parts


def _chunk(x: Any, chunks: int, dim: int = 0) -> list[Any]:
    return _split(x, -(-x.shape[dim] // chunks), dim)


def _narrow(x: Any, dim: int, start: int, length: int) -> Any:
    return x[(slice(None),) * (dim % x.ndim) + (slice(start, start + length),)]


def mean(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """The mean over the pixels of [N, C, H, W]: dim=(2, 3)."""
    dims = (dim,) if isinstance(dim, int) else tuple(dim or ())
    if x.ndim != 4 or sorted(d % 4 for d in dims) != [2, 3]:
        raise UnsupportedOpError(
            f"mean over dim={dim!r} of a value of shape {list(x.shape)}",
            where=user_place() or None,
            help="the mean over pixels: x.mean((2, 3)) of [N, C, H, W]",
        )  # fmt: skip
    out = x.tracer.emit("adaptive_avgpool2d", [x], kind="mean", output_size=(1, 1))
    return out if keepdim else out.reshape(*x.shape[:2])


def softmax(input: Any, dim: int | None = None, *_: Any, **__: Any) -> Any:
    """exp(x) over its sum along an axis, which is not that of the batch."""
    return softmax_along("softmax", input, dim)


def log_softmax(input: Any, dim: int | None = None, *_: Any, **__: Any) -> Any:
    """The logarithm of softmax along an axis, which is not that of the batch."""
    return softmax_along("log_softmax", input, dim)


def pad(input: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Any:
    """torch's F.pad: two numbers an axis, the last axis first; negative ones cut off."""
    if mode != "constant":
        raise UnsupportedOpError(
            f"pad with mode={mode!r}", where=user_place() or None, help='mode="constant"'
        )
    return padded(input, pad, float(value or 0.0))


def _same(x: Any, *args: Any, **kwargs: Any) -> Any:
    return x


def _clone(x: Any, **kwargs: Any) -> Any:
    """Another name for the value: what overwrites the copy leaves the original alone."""
    return Symbol(x.tracer, x.value) if isinstance(x, Symbol) else x


def _ignored(*args: Any, **kwargs: Any) -> None:
    """What checks and returns nothing."""


def _size(x: Any, dim: int | None = None) -> Any:
    return x.shape if dim is None else x.shape[dim]


def _dim(x: Any) -> int:
    return len(x.shape)


def _unary(function: Function) -> Function:
    """The same without torch's `inplace`: who calls it sees to that."""

    def call(*args: Any, inplace: bool = False, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


# What tensors have as a method, by its name.
METHODS: dict[str, Function] = {
    **{row.torch: _unary(row.call) for row in ROWS},
    "flatten": flatten,
    "reshape": _reshape,
    "view": _reshape,
    "add": _add,
    "sub": _sub,
    "subtract": _sub,
    "mul": operator.mul,
    "multiply": operator.mul,
    "div": _div,
    "divide": _div,
    "true_divide": _div,
    "negative": operator.neg,
    "mean": mean,
    "softmax": softmax,
    "log_softmax": log_softmax,
    "split": _split,
    "chunk": _chunk,
    "narrow": _narrow,
    "contiguous": _same,
    "clone": _clone,
    "float": _same,
    "size": _size,
    "dim": _dim,
}

# torch's functions that are methods as well, and those that are layers.
FUNCTIONS: dict[Any, Function] = {
    **{getattr(torch, n): f for n, f in METHODS.items() if hasattr(torch, n)},
    **{getattr(F, n): _unary(r.call) for r in ROWS for n in (r.torch, f"{r.torch}_")
       if hasattr(F, n)},
    torch.relu_: METHODS["relu"],
    F.softmax: softmax,
    F.log_softmax: log_softmax,
    F.pad: pad,
    torch._assert: _ignored,
    torch.fx._symbolic_trace._assert_is_none: _ignored,
    torch.cat: _cat,
    torch.concat: _cat,
    torch.concatenate: _cat,
    F.conv2d: _conv2d,
    F.linear: _linear,
    F.max_pool2d: _layer("MaxPool2d"),
    F.avg_pool2d: _layer("AvgPool2d"),
    F.adaptive_avg_pool2d: _layer("AdaptiveAvgPool2d"),
    F.adaptive_max_pool2d: _layer("AdaptiveMaxPool2d"),
    F.local_response_norm: _layer("LocalResponseNorm"),
}

# Python's own, which run on symbolic values and on plain numbers alike.
PYTHON: set[Any] = {
    getattr, len, int, float, min, max, sum, math.prod, math.floor, math.ceil, math.sqrt,
    *(getattr(operator, n) for n in dir(operator) if not n.startswith("_")),
}  # fmt: skip


def method(name: str) -> Function | None:
    """What a tensor's method of that name becomes; one that ends in _ is the same function."""
    known = METHODS.get(name) or METHODS.get(name.removesuffix("_"))
    if known is None and not name.startswith("_") and callable(getattr(Symbol, name, None)):
        known = getattr(Symbol, name)
    return known


def is_operand(x: Any) -> bool:
    """Whether something is a value of the graph, not a number or a shape."""
    return isinstance(x, (Symbol, Parameter))
