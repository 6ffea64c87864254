"""What each ONNX operator becomes on symbolic values.

A function takes the call (its attributes, its file's opset) and the operands: symbolic values,
NumPy constants, parameters of the net, or None. It returns one result, or several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from graphnet.errors import UnsupportedOpError
from graphnet.frontends import functions, layers
from graphnet.frontends.activations import ROWS, absolute, clamp, gelu, leaky_relu
from graphnet.frontends.dsl import Parameter
from graphnet.frontends.onnx_graph import Node
from graphnet.frontends.symbolic import Symbol, cat, expand, padded, power, softmax_along


@dataclass
class Call:
    """One node on the way: with the opset, the batch that the file was exported for (None where it
    is open), and the layer that stands for it where it has one."""

    node: Node
    opset: int
    batch: int | None
    layer: Any = None

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        return self.node.attrs.get(name, default)

    def refuse(self, why: str, help: str | None = None) -> UnsupportedOpError:
        return UnsupportedOpError(why, help=help)


Operator = Callable[..., Any]


def _ints(x: Any, call: Call, what: str) -> list[int]:
    if not isinstance(x, np.ndarray):
        raise call.refuse(f"{what} is not constant")
    return [int(v) for v in x.reshape(-1)]


def number(x: Any) -> Any:
    """A constant of one value as a Python number; what else it is, as it is."""
    return float(x.reshape(())) if isinstance(x, np.ndarray) and x.size == 1 else x


# ---- products and pools --------------------------------------------------------------------------


def _window(
    call: Call, x: Symbol, kernel: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, int, int, int]]:
    """(kernel, stride, dilation, (top, bottom, left, right)) of a convolution or a pool."""
    if x.ndim != 4 or len(kernel) != 2:
        raise call.refuse(f"{len(kernel)}-D windows on a value of shape {list(x.shape)}",
                          "images are 2-D: [N, C, H, W]")  # fmt: skip
    stride = tuple(call.get("strides", (1, 1)))
    dilation = tuple(call.get("dilations", (1, 1)))
    auto = call.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        sides: list[int] = []
        for size, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True):
            total = max(0, (-(-size // s) - 1) * s + d * (k - 1) + 1 - size)
            small, large = total // 2, total - total // 2
            sides += [small, large] if auto == "SAME_UPPER" else [large, small]
        return tuple(kernel), stride, dilation, (sides[0], sides[1], sides[2], sides[3])
    top, left, bottom, right = call.get("pads", (0, 0, 0, 0))
    if min(top, left, bottom, right) < 0:
        raise call.refuse(f"negative pads {[top, left, bottom, right]}")
    if auto == "VALID":
        top = left = bottom = right = 0
    return tuple(kernel), stride, dilation, (top, bottom, left, right)


def _conv(call: Call, x: Symbol, w: Any, b: Any = None) -> Symbol:
    _, stride, dilation, sides = _window(call, x, w.shape[2:])
    if not isinstance(w, Parameter):
        raise call.refuse("its filters are computed", "they must be an initializer or a constant")
    operands = [x, w] + ([] if b is None else [b])
    return x.tracer.emit(  # type: ignore[no-any-return]
        "conv2d", operands, kind="conv", stride=stride, padding=sides, dilation=dilation,
        groups=call.get("group", 1),
    )  # fmt: skip


def _max_pool(call: Call, x: Symbol) -> Symbol:
    if len(call.node.outputs) > 1:
        raise call.refuse("its indices are read")
    kernel, stride, dilation, sides = _window(call, x, call.get("kernel_shape"))
    return x.tracer.emit(  # type: ignore[no-any-return]
        "maxpool2d", [x], kind="pool", kernel=kernel, stride=stride, padding=sides,
        dilation=dilation, ceil_mode=bool(call.get("ceil_mode", 0)),
    )  # fmt: skip


def _average_pool(call: Call, x: Symbol) -> Symbol:
    kernel, stride, dilation, sides = _window(call, x, call.get("kernel_shape"))
    whole, ceil = bool(call.get("count_include_pad", 0)), bool(call.get("ceil_mode", 0))
    if dilation != (1, 1):
        raise call.refuse(f"an average over a window with dilations {list(dilation)}")
    return x.tracer.emit(  # type: ignore[no-any-return]
        "avgpool2d", [x], kind="pool", kernel=kernel, stride=stride, padding=sides,
        ceil_mode=ceil, count_include_pad=whole,
    )  # fmt: skip


def _global_average(call: Call, x: Symbol) -> Symbol:
    return layers.AdaptiveAvgPool2d(1).forward(x)


def _global_max(call: Call, x: Symbol) -> Symbol:
    return layers.MaxPool2d((x.shape[2], x.shape[3])).forward(x)


def _gemm(call: Call, x: Symbol, w: Any, c: Any = None) -> Symbol:
    """alpha and beta stand in the parameters (onnx_in.py), and weights lie as Linear's do."""
    if call.get("transA", 0):
        raise call.refuse("transA=1: axis 0 of the operand is the batch")
    if not isinstance(w, Parameter):
        raise call.refuse("its second operand is computed", "a product is by a constant matrix")
    fits = isinstance(c, Parameter) and c.shape == (w.shape[0],)
    y = functions._linear(x, w, c if fits else None)
    return y if fits or c is None else y + c


def _matmul(call: Call, x: Any, w: Any) -> Symbol:
    if not isinstance(x, Symbol) or x.ndim != 2 or not isinstance(w, Parameter):
        shapes = [list(getattr(v, "shape", ())) for v in (x, w)]
        raise call.refuse(
            f"a product of values of shapes {shapes[0]} and {shapes[1]}",
            "the batch [N, K] times a constant matrix [K, M]",
        )
    return functions._linear(x, w)


def _lrn(call: Call, x: Symbol) -> Symbol:
    size = call.get("size")
    if size % 2 == 0:
        raise call.refuse(f"an even size, {size}: ONNX and torch disagree about those")
    return layers.LocalResponseNorm(
        size, call.get("alpha", 1e-4), call.get("beta", 0.75), call.get("bias", 1.0)
    ).forward(x)


def _batch_norm(call: Call, x: Symbol, *_: Any) -> Symbol:
    """The layer has the weights: of [N, C, ...], as images of what lies behind the channels."""
    if call.get("training_mode", 0) or len(call.node.outputs) > 1:
        raise call.refuse(
            "training_mode: ONNX keeps the biased variance there", "export it in .eval()"
        )
    if call.layer is None:
        raise call.refuse("its scale, bias, mean or variance is computed")
    if not call.get("spatial", 1):
        raise call.refuse("spatial=0: statistics of each pixel")
    image = x.shape if x.ndim == 4 else (*x.shape[:2], prod(x.shape[2:]), 1)
    return _shaped(call.layer.forward(_shaped(x, image)), x.shape)


def _dropout(call: Call, x: Symbol, ratio: Any = None, mode: Any = None) -> Symbol:
    if len(call.node.outputs) > 1:
        raise call.refuse("its mask is read")
    if mode is not None and bool(np.asarray(mode).any()):
        raise call.refuse("training_mode: a file that drops in inference", "export it in .eval()")
    return call.layer(x) if call.layer is not None else x  # type: ignore[no-any-return]


# ---- element by element --------------------------------------------------------------------------


def _arithmetic(name: str) -> Operator:
    def call_(call: Call, a: Any, b: Any) -> Any:
        a, b = number(a), number(b)
        if call.opset < 7 and isinstance(a, Symbol) and call.get("axis") is not None:
            b = _along(a, b, call.get("axis") % a.ndim)
        if name == "Div":
            return a / b
        return a + b if name == "Add" else a - b if name == "Sub" else a * b

    return call_


def _along(x: Symbol, b: Any, axis: int) -> Any:
    """An operand whose axes are those of x from `axis` on, as NumPy's rule wants it."""
    if isinstance(b, (Symbol, Parameter)):
        return b.reshape(*b.shape, *[1] * (x.ndim - axis - len(b.shape)))
    return b


def _sum(call: Call, *xs: Any) -> Any:
    total = number(xs[0])
    for x in xs[1:]:
        total = total + number(x)
    return total


def _mean(call: Call, *xs: Any) -> Any:
    return _sum(call, *xs) / len(xs) if len(xs) > 1 else xs[0]


def _pow(call: Call, x: Any, exponent: Any) -> Any:
    n = number(exponent)
    if not isinstance(n, float):
        raise call.refuse("a power of many values", "one exponent")
    return power(x, n)


def _clip(call: Call, x: Any, low: Any = None, high: Any = None) -> Any:
    limits = [call.get("min") if low is None else number(low),
              call.get("max") if high is None else number(high)]  # fmt: skip
    if any(v is not None and not isinstance(v, float) for v in limits):
        raise call.refuse("limits that are no constant numbers")
    if limits == [0.0, None]:
        return functions.METHODS["relu"](x)
    if limits == [0.0, 6.0]:
        return functions.METHODS["relu6"](x)
    return clamp(x, *limits) if any(v is not None for v in limits) else x


def _plain(function: Operator) -> Operator:
    return lambda call, x: function(x)


# ---- shapes --------------------------------------------------------------------------------------


def _normalised(op: str) -> Operator:
    """Softmax and log-softmax; before opset 13 over all axes from `axis` on."""

    def call_(call: Call, x: Symbol) -> Any:
        old = call.opset < 13
        axis = call.get("axis", 1 if old else -1) % x.ndim
        if axis == 0:
            raise call.refuse(
                f"axis 0 of a value of shape {list(x.shape)}: it is the batch", "another axis"
            )
        if not old:
            return softmax_along(op, x, axis)
        rows = (x.shape[0], prod(x.shape[1:axis]), prod(x.shape[axis:]))
        return _shaped(softmax_along(op, _shaped(x, rows), 2), x.shape)

    return call_


def _concat(call: Call, *xs: Any) -> Symbol:
    return cat(xs, call.get("axis"))


def _flatten(call: Call, x: Symbol) -> Symbol:
    axis = call.get("axis", 1)
    axis += x.ndim if axis < 0 else 0
    return _shaped(x, (prod(x.shape[:axis]), prod(x.shape[axis:])))


def _reshape(call: Call, x: Symbol, target: Any = None) -> Symbol:
    sizes = list(call.get("shape", ())) if target is None else _ints(target, call, "its shape")
    if not call.get("allowzero", 0):
        sizes = [x.shape[k] if s == 0 else s for k, s in enumerate(sizes)]
    # A file that was exported for one batch has its size in every shape.
    if sizes and -1 not in sizes and prod(sizes) != prod(x.shape) and sizes[0] == call.batch:
        sizes[0] = x.shape[0]
    return _shaped(x, sizes)


def _shaped(x: Symbol, sizes: Sequence[int]) -> Symbol:
    return x if tuple(sizes) == x.shape else x.reshape(*sizes)


def _axes(call: Call, given: Any, ndim: int) -> list[int] | None:
    axes = call.get("axes") if given is None else _ints(given, call, "its axes")
    return None if axes is None else sorted(a % ndim for a in axes)


def _squeeze(call: Call, x: Symbol, axes: Any = None) -> Symbol:
    found = _axes(call, axes, x.ndim)
    drop = [k for k, s in enumerate(x.shape) if s == 1] if found is None else found
    return _shaped(x, [s for k, s in enumerate(x.shape) if k not in drop])


def _unsqueeze(call: Call, x: Symbol, axes: Any = None) -> Symbol:
    given = call.get("axes") if axes is None else _ints(axes, call, "its axes")
    sizes = list(x.shape)
    for a in sorted(a % (x.ndim + len(given)) for a in given):
        sizes.insert(a, 1)
    return _shaped(x, sizes)


def _transpose(call: Call, x: Symbol) -> Symbol:
    perm = call.get("perm", list(range(x.ndim))[::-1])
    moved = [p for p in perm if x.shape[p] != 1]
    if moved != sorted(moved):
        raise call.refuse(f"perm {list(perm)} of a value of shape {list(x.shape)}",
                          "layouts are the compiler's: export the model in NCHW")  # fmt: skip
    return _shaped(x, [x.shape[p] for p in perm])


def _slice(call: Call, x: Symbol, *given: Any) -> Symbol:
    if call.opset < 10:
        starts, ends = call.get("starts"), call.get("ends")
        axes, steps = call.get("axes", range(len(starts))), [1] * len(starts)
    else:
        parts: list[Any] = [None if g is None else _ints(g, call, "a bound") for g in given]
        parts += [None] * (4 - len(parts))
        starts, ends, axes, steps = parts
        axes = range(len(starts)) if axes is None else axes
        steps = [1] * len(starts) if steps is None else steps
    cut = [slice(None)] * x.ndim
    for a, start, stop, step in zip(axes, starts, ends, steps, strict=True):
        if step != 1:
            raise call.refuse(f"steps of {step}", "step 1")
        cut[a] = slice(start, stop)
    return x[tuple(cut)]


def _split(call: Call, x: Symbol, sizes: Any = None) -> list[Any]:
    axis, count = call.get("axis", 0) % x.ndim, len(call.node.outputs)
    given = call.get("split") if sizes is None else _ints(sizes, call, "its sizes")
    return functions._split(x, given or -(-x.shape[axis] // call.get("num_outputs", count)), axis)


def _pad(call: Call, x: Symbol, pads: Any = None, value: Any = None, axes: Any = None) -> Symbol:
    if call.get("mode", "constant") != "constant":
        raise call.refuse(f"mode {call.get('mode')!r}", "constant")
    sides = list(call.get("pads", ())) if pads is None else _ints(pads, call, "its pads")
    fill = call.get("value", 0.0) if value is None else number(value)
    at = list(range(x.ndim)) if axes is None else _ints(axes, call, "its axes")
    both = {a % x.ndim: (sides[k], sides[k + len(at)]) for k, a in enumerate(at)}
    flat = [v for a in reversed(range(x.ndim)) for v in both.get(a, (0, 0))]
    return padded(x, flat, float(fill)) if any(flat) else x


def _reduce(name: str) -> Operator:
    """A mean, sum or maximum over axes."""

    def call_(call: Call, x: Symbol, axes: Any = None) -> Any:
        over = _axes(call, axes, x.ndim)
        if not over:
            if call.get("noop_with_empty_axes", 0):
                return x
            raise call.refuse("over all axes: axis 0 is the batch", "axes [2, 3]")
        return functions.METHODS[name](x, tuple(over), keepdim=bool(call.get("keepdims", 1)))

    return call_


def _expand(call: Call, x: Symbol, target: Any) -> Any:
    wanted = _ints(target, call, "its shape")
    wanted = [1] * (x.ndim - len(wanted)) + wanted
    if len(wanted) == x.ndim and wanted[0] in (1, call.batch):
        wanted[0] = x.shape[0]  # of a file that was exported for one batch
    sizes = x.shape if len(wanted) == x.ndim else (1,) * (len(wanted) - x.ndim) + x.shape
    return expand(x, [s if w == 1 else w for w, s in zip(wanted, sizes, strict=True)])


def _hard_sigmoid(call: Call, x: Symbol) -> Symbol:
    return clamp(x * call.get("alpha", 0.2) + call.get("beta", 0.5), 0.0, 1.0)


def _cast(call: Call, x: Symbol) -> Symbol:
    if call.get("to") != 1:
        raise call.refuse("a cast to another type than FLOAT")
    return x


TABLE: dict[str, Operator] = {
    **{r.onnx: _plain(r.call) for r in ROWS},
    "Abs": _plain(absolute),
    "LeakyRelu": lambda call, x: leaky_relu(x, call.get("alpha", 0.01)),
    "Gelu": lambda call, x: gelu(x, call.get("approximate", "none")),
    "Clip": _clip,
    **{n: _arithmetic(n) for n in ("Add", "Sub", "Mul", "Div")},
    "Sum": _sum, "Mean": _mean, "Pow": _pow,
    "Conv": _conv, "Gemm": _gemm, "MatMul": _matmul,
    "MaxPool": _max_pool, "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average, "GlobalMaxPool": _global_max,
    "BatchNormalization": _batch_norm, "LRN": _lrn, "Dropout": _dropout,
    "Softmax": _normalised("softmax"), "LogSoftmax": _normalised("log_softmax"),
    "Concat": _concat, "Flatten": _flatten, "Reshape": _reshape, "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze, "Transpose": _transpose, "Slice": _slice, "Split": _split,
    "Pad": _pad, "ReduceMean": _reduce("mean"), "ReduceSum": _reduce("sum"),
    "ReduceMax": _reduce("amax"), "Expand": _expand, "HardSigmoid": _hard_sigmoid,
    "Reciprocal": lambda call, x: 1.0 / x, "Cast": _cast,
    "Identity": lambda call, x: x,
}  # fmt: skip

# Where an operator takes parameters: which operands may be constants that are learned.
WEIGHTS: dict[str, tuple[int, ...]] = {
    "Conv": (1, 2), "Gemm": (1, 2), "MatMul": (1,),
    **{n: (0, 1) for n in ("Add", "Sub", "Mul", "Div")},
    "Sum": tuple(range(16)), "Mean": tuple(range(16)), "Concat": tuple(range(16)),
}  # fmt: skip
