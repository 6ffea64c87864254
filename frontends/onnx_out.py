"""gn.Module -> ONNX: the inference graph of a net, an operator for each equation."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from graphnet import disk
from graphnet.errors import UnsupportedOpError
from graphnet.frontends.dsl import Module
from graphnet.frontends.onnx_graph import package
from graphnet.frontends.tracing import trace
from graphnet.ir.graph import Eqn, Graph, Value

OPSET = 20
_IR = 10  # the format's version that goes with it


def to_onnx(net: Module, path: str | os.PathLike[str] | None, shape: Sequence[int]) -> Any:
    """Writes what a net computes in inference as an ONNX file of opset 20, and returns the model.

    path   of the file; None writes none
    shape  of the input, batch first; the batch stays open in the file

    Weights are initializers under their keys in `state_dict`, outputs are y0, y1 ...
    UnsupportedOpError for what ONNX has
    no operator for. Needs the package onnx: `pip install graphnet[onnx]`.
    """
    onnx = package()
    model = _Writer(net, trace(net, shape), onnx).model()
    onnx.checker.check_model(model, full_check=True)
    if path is not None:
        try:
            disk.write(path, model.SerializeToString(), mode=0o644)
        except OSError as error:
            raise disk.unwritten(path, error) from None
    return model


class _Writer:
    """One graph on its way into a file."""

    def __init__(self, net: Module, graph: Graph, onnx: Any) -> None:
        self.net, self.graph, self.onnx = net, graph, onnx
        self.names: dict[Value, str] = {}
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.taken = {"x", *(f"y{k}" for k in range(len(graph.returns)))}
        self.state = {key: p.snapshot() for key, p in net._keys()}
        # What a mask would be drawn by in training.
        self.unread = {i.value for i in graph.inputs if i.role in ("hyper", "counter")}
        self.momentum = {
            id(m.__dict__["running_mean"]): m.__dict__["momentum"]
            for m in net.modules()
            if m.__dict__.get("running_mean") is not None
        }

    def model(self) -> Any:
        h, floats = self.onnx.helper, self.onnx.TensorProto.FLOAT
        g = self.graph
        self.names[g.input("x").value] = "x"
        for e in g.eqns:
            self.equation(e)
        outs = [self.operand(v) for v in g.returns]
        ends = [f"y{k}" for k in range(len(outs))]
        for made, end in zip(outs, ends, strict=True):
            self.nodes.append(h.make_node("Identity", [made], [end], name=end))
        info = lambda name, v: h.make_tensor_value_info(name, floats, ["N", *v.type.shape[1:]])
        graph = h.make_graph(
            _without_ends(self.nodes, ends), self.net._title(), [info("x", g.input("x").value)],
            [info(n, v) for n, v in zip(ends, g.returns, strict=True)],
            list(self.initializers.values()),
        )  # fmt: skip
        return h.make_model(
            graph, opset_imports=[h.make_opsetid("", OPSET)], ir_version=_IR,
            producer_name="graphnet",
        )  # fmt: skip

    # ---- values -----------------------------------------------------------------------------

    def operand(self, v: Value) -> str:
        """The name of a value; a parameter or a buffer becomes an initializer when it is read."""
        if v in self.unread:
            return ""
        if v not in self.names:
            self.names[v] = self.constant(v.name, self.state[v.name].numpy())
        return self.names[v]

    def constant(self, name: str, value: Any) -> str:
        """An initializer of that name, or of one like it."""
        name = self.fresh(name)
        self.initializers[name] = self.onnx.numpy_helper.from_array(np.asarray(value), name)
        return name

    def fresh(self, name: str) -> str:
        found, k = name, 1
        while found in self.taken:
            found, k = f"{name}_{k}", k + 1
        self.taken.add(found)
        return found

    def node(self, e: Eqn, op: str, inputs: Sequence[str], **attrs: Any) -> str:
        """Appends an operator, called after its layer, and returns its result."""
        layer = ", ".join(e.where.layers)
        name = self.fresh(self.net.path_of(layer) or layer or op)
        out = self.fresh(f"{name}.out")
        self.nodes.append(self.onnx.helper.make_node(op, list(inputs), [out], name=name, **attrs))
        return out

    def equation(self, e: Eqn) -> None:
        write = _WRITE.get(e.op)
        if write is None:
            raise UnsupportedOpError(f"{e.op} has no operator in ONNX", **e.where.located)
        self.names[e.out] = write(self, e, [self.operand(v) for v in e.inputs])


def _without_ends(nodes: list[Any], ends: Sequence[str]) -> list[Any]:
    """The nodes with the results named as the graph's outputs, where nobody else reads them."""
    made = {o: n for n in nodes for o in n.output}
    reads = [i for n in nodes for i in n.input]
    kept = []
    for n in nodes:
        source = n.input[0] if n.op_type == "Identity" and n.output[0] in ends else None
        if source in made and reads.count(source) == 1:
            made[source].output[0] = n.output[0]
        else:
            kept.append(n)
    return kept


# ---- what each op becomes ------------------------------------------------------------------------

Write = Callable[[_Writer, Eqn, list[str]], str]


def _plain(op: str, **attrs: Any) -> Write:
    return lambda w, e, ins: w.node(e, op, ins, **attrs)


def _along(op: str) -> Write:
    """An operator along an axis."""
    return lambda w, e, ins: w.node(e, op, ins, axis=e.attrs.axis)  # type: ignore[attr-defined]


def _pads(sides: Sequence[int]) -> list[int]:
    t, b, le, r = sides
    return [t, le, b, r]


def _conv(w: _Writer, e: Eqn, ins: list[str]) -> str:
    a: Any = e.attrs
    return w.node(
        e, "Conv", ins, kernel_shape=list(e.inputs[1].type.shape[2:]), strides=list(a.stride),
        pads=_pads(a.padding), dilations=list(a.dilation), group=a.groups,
    )  # fmt: skip


def _maxpool(w: _Writer, e: Eqn, ins: list[str]) -> str:
    a: Any = e.attrs
    return w.node(
        e, "MaxPool", ins, kernel_shape=list(a.kernel), strides=list(a.stride),
        pads=_pads(a.padding), dilations=list(a.dilation), ceil_mode=int(a.ceil_mode),
    )  # fmt: skip


def _avgpool(w: _Writer, e: Eqn, ins: list[str]) -> str:
    a: Any = e.attrs
    out = w.node(
        e, "AveragePool", ins, kernel_shape=list(a.kernel), strides=list(a.stride),
        pads=_pads(a.padding), ceil_mode=int(a.ceil_mode),
        count_include_pad=int(a.count_include_pad),
    )  # fmt: skip
    if not a.divisor_override:
        return out
    if not a.count_include_pad or a.ceil_mode:
        raise UnsupportedOpError(
            "divisor_override of windows of several sizes has no operator in ONNX",
            **e.where.located,
        )
    ratio = np.float32(a.kernel[0] * a.kernel[1] / a.divisor_override)
    return w.node(e, "Mul", [out, w.constant("ratio", ratio)])


def _adaptive(w: _Writer, e: Eqn, ins: list[str]) -> str:
    size, out = e.inputs[0].type.shape[2:], e.out.type.shape[2:]
    if size == out:
        return ins[0]
    if out == (1, 1):
        return w.node(e, "GlobalAveragePool", ins)
    if size == (1, 1):  # every window holds the one pixel
        return w.node(e, "Expand", [*ins, w.constant("shape", np.array([1, 1, *out], np.int64))])
    if any(s % o for s, o in zip(size, out, strict=True)):
        raise UnsupportedOpError(
            f"adaptive pooling of {size[0]}x{size[1]} to {out[0]}x{out[1]} has windows of several "
            "sizes, and ONNX has no operator for those",
            **e.where.located, help="an input whose size is a multiple of the output's",
        )  # fmt: skip
    window = [s // o for s, o in zip(size, out, strict=True)]
    return w.node(e, "AveragePool", ins, kernel_shape=window, strides=window)


def _lrn(w: _Writer, e: Eqn, ins: list[str]) -> str:
    a: Any = e.attrs
    if a.size % 2 == 0:
        raise UnsupportedOpError(
            f"local response normalization over an even number of channels, {a.size}: ONNX counts "
            "them otherwise", **e.where.located,
        )  # fmt: skip
    if a.groups > 1:
        raise UnsupportedOpError(
            f"local response normalization within {a.groups} groups of channels: ONNX's has one "
            "group", help="groups=1 (alexnet_2012(norm_groups=1))", **e.where.located,
        )  # fmt: skip
    alpha = a.alpha * (a.size if a.alpha_mode == "sum" else 1)
    return w.node(e, "LRN", ins, size=a.size, alpha=alpha, beta=a.beta, bias=a.k)


def _normalize(w: _Writer, e: Eqn, ins: list[str]) -> str:
    a: Any = e.attrs
    x, mean, var, *scale = ins
    if not scale:
        ones = np.ones(e.inputs[1].type.shape, np.float32)
        scale = [w.constant(f"{mean}.ones", ones), w.constant(f"{mean}.zeros", 0 * ones)]
    held = dict(w.net._keys()).get(e.inputs[1].name)
    momentum = w.momentum.get(id(held))
    more = {} if momentum is None else {"momentum": 1.0 - momentum}
    return w.node(e, "BatchNormalization", [x, *scale, mean, var], epsilon=a.eps, **more)


def _dropout(w: _Writer, e: Eqn, ins: list[str]) -> str:
    """The vanilla mode in inference: x (1 - p)."""
    a: Any = e.attrs
    return w.node(e, "Mul", [ins[0], w.constant("kept", np.float32(1 - a.p))])


def _reshape(w: _Writer, e: Eqn, ins: list[str]) -> str:
    before, after = e.inputs[0].type.shape, e.out.type.shape
    if e.inputs[0].name in w.state:  # a parameter: no axis of it is the batch
        return w.node(e, "Reshape", [ins[0], w.constant("shape", np.array(after, np.int64))])
    if len(after) == 2 and len(before) > 1 and before[0] == after[0]:
        return w.node(e, "Flatten", ins, axis=1)
    sizes = np.array([0, *after[1:]], np.int64)
    return w.node(e, "Reshape", [ins[0], w.constant("shape", sizes)])


def _slice(w: _Writer, e: Eqn, ins: list[str]) -> str:
    a: Any = e.attrs
    ends = [w.constant(n, np.array([getattr(a, n)], np.int64)) for n in ("start", "stop", "axis")]
    return w.node(e, "Slice", [ins[0], *ends])


def _pad(w: _Writer, e: Eqn, ins: list[str]) -> str:
    a: Any = e.attrs
    sides = w.constant("pads", np.array([*a.before, *a.after], np.int64))
    return w.node(e, "Pad", [ins[0], sides, w.constant("value", np.float32(a.value))])


def _full(w: _Writer, e: Eqn, ins: list[str]) -> str:
    a: Any = e.attrs
    return w.constant("number", np.full(a.shape, a.value, np.float32))


def _clip(low: float | None, high: float | None) -> Write:
    def write(w: _Writer, e: Eqn, ins: list[str]) -> str:
        limits = [getattr(e.attrs, "low", low), getattr(e.attrs, "high", high)]
        names = [
            w.constant("limit", np.float32(v)) if v is not None and np.isfinite(v) else ""
            for v in limits
        ]
        return w.node(e, "Clip", [ins[0], *names])

    return write


_WRITE: dict[str, Write] = {
    "conv2d": _conv,
    "linear": _plain("Gemm", transB=1),
    "maxpool2d": _maxpool, "avgpool2d": _avgpool, "adaptive_avgpool2d": _adaptive,
    "lrn": _lrn, "normalize": _normalize, "dropout": _dropout,
    "reshape": _reshape, "slice": _slice, "pad": _pad, "full": _full,
    **{n: _along(o) for n, o in (("softmax", "Softmax"), ("log_softmax", "LogSoftmax"),
                                 ("concat", "Concat"))},
    **{n: _plain(n.title()) for n in ("add", "sub", "mul", "div", "relu", "tanh", "sigmoid", "neg",
                                      "exp", "sqrt", "abs")},
    "hardswish": _plain("HardSwish"),
    "leaky_relu": lambda w, e, ins: w.node(e, "LeakyRelu", ins, alpha=e.attrs.slope),  # type: ignore[attr-defined]
    "gelu": lambda w, e, ins: w.node(e, "Gelu", ins, approximate=e.attrs.approximate),  # type: ignore[attr-defined]
    "silu": lambda w, e, ins: w.node(e, "Mul", [ins[0], w.node(e, "Sigmoid", ins)]),
    "relu6": _clip(0.0, 6.0), "clamp": _clip(None, None),
}  # fmt: skip
