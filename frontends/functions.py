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
from graphnet.frontends.activations import ROWS, hardsigmoid
from graphnet.frontends.dsl import Parameter
from graphnet.frontends.symbolic import (
    Symbol,
    cat,
    expand,
    flatten,
    images,
    padded,
    power,
    softmax_along,
)
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
    images("conv2d", x)
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


def _reduced(what: str, x: Any, dim: Any) -> tuple[list[int], tuple[int, ...], tuple[int, ...]]:
    """The axes of a reduction, and the shape of its result with and without them.
    UnsupportedOpError where they are not neighbours or the batch is one of them."""
    dims = (dim,) if isinstance(dim, int) else tuple(dim or ())
    axes = sorted({d % x.ndim for d in dims if -x.ndim <= d < x.ndim})
    neighbours = axes and axes == list(range(axes[0], axes[-1] + 1))
    if len(axes) != len(dims) or not neighbours or axes[0] == 0:
        raise UnsupportedOpError(
            f"{what} over dim={dim!r} of a value of shape {list(x.shape)}",
            where=user_place() or None,
            help=f"over neighbouring axes behind the batch, as the pixels: x.{what}((2, 3))",
        )
    kept = tuple(1 if d in axes else s for d, s in enumerate(x.shape))
    return axes, kept, tuple(s for d, s in enumerate(x.shape) if d not in axes)


def _view(x: Any, shape: Sequence[int]) -> Any:
    return x if tuple(shape) == x.shape else x.reshape(*shape)


def mean(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """The mean over neighbouring axes, the batch's excluded: over the pixels of [N, C, H, W] with
    dim=(2, 3)."""
    axes, kept, left = _reduced("mean", x, dim)
    n, first, last = x.shape[0], axes[0], axes[-1] + 1
    if x.ndim == 4 and first >= 2:  # the sizes that stay
        image, out = x.shape, tuple(kept[2:])
    else:
        image = (n, math.prod(x.shape[1:first]), math.prod(x.shape[first:last]),
                 math.prod(x.shape[last:]))  # fmt: skip
        out = (1, image[3])
    made = _view(x, image).tracer.emit(
        "adaptive_avgpool2d", [_view(x, image)], kind="mean", output_size=out
    )
    return _view(made, kept if keepdim else left)


def total(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """The sum over neighbouring axes, as `mean`."""
    axes, _, _ = _reduced("sum", x, dim)
    return mean(x, dim, keepdim) * float(math.prod(x.shape[d] for d in axes))


def amax(x: Any, dim: Any = (), keepdim: bool = False) -> Any:
    """The maximum over the pixels of [N, C, H, W]: dim=(2, 3)."""
    axes, kept, left = _reduced("amax", x, dim)
    if x.ndim != 4 or axes != [2, 3]:
        raise UnsupportedOpError(
            f"amax over dim={dim!r} of a value of shape {list(x.shape)}",
            where=user_place() or None, help="over the pixels: x.amax((2, 3))",
        )  # fmt: skip
    return _view(layers.AdaptiveMaxPool2d(1).forward(x), kept if keepdim else left)


def squeeze(x: Any, dim: Any = None) -> Any:
    """Without the axes of size 1 among `dim`, or among all but the batch's."""
    dims = range(1, x.ndim) if dim is None else [d % x.ndim for d in _dims(dim)]
    return _view(x, [s for d, s in enumerate(x.shape) if d not in dims or s != 1])


def unsqueeze(x: Any, dim: int) -> Any:
    """With one more axis, of size 1, which becomes axis `dim`."""
    sizes = list(x.shape)
    sizes.insert(dim % (x.ndim + 1), 1)
    return _view(x, sizes)


def _unflatten(x: Any, dim: int, sizes: Sequence[int]) -> Any:
    at = dim % x.ndim
    return x.reshape(*x.shape[:at], *sizes, *x.shape[at + 1 :])


def _dims(dim: Any) -> tuple[int, ...]:
    return (dim,) if isinstance(dim, int) else tuple(dim)


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
    "sum": total,
    "amax": amax,
    "squeeze": squeeze,
    "unsqueeze": unsqueeze,
    "unflatten": _unflatten,
    "expand": expand,
    "expand_as": lambda x, other: expand(x, *other.shape),
    "view_as": lambda x, other: x.reshape(*other.shape),
    "reshape_as": lambda x, other: x.reshape(*other.shape),
    "pow": power,
    "square": lambda x: x * x,
    "rsqrt": lambda x: power(x, -0.5),
    "reciprocal": lambda x: power(x, -1),
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
    F.hardsigmoid: _unary(hardsigmoid),
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
