"""ONNX -> gn.Module: each operator becomes ours, each weight a parameter under its own name.

What does not depend on the batch is computed when the file is read (onnx_graph.py), what depends on
its shape when the net is traced, and the rest is traced (onnx_ops.py).
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from graphnet.errors import ConfigError, GraphnetError, ShapeError, UnsupportedOpError
from graphnet.frontends.dsl import Module
from graphnet.frontends.held import Buffer, Parameter
from graphnet.frontends.imported import Part, put, refusal
from graphnet.frontends.layers import Dropout
from graphnet.frontends.norm import BatchNorm2d
from graphnet.frontends.onnx_graph import (
    Node,
    OnnxGraph,
    decimal,
    evaluate,
    nodes_of,
    outer_names,
    package,
    read,
)
from graphnet.frontends.onnx_ops import TABLE, WEIGHTS, Call
from graphnet.frontends.symbolic import Symbol, active_tracer
from graphnet.frontends.tracing import trace

_INSTEAD = (
    "change these parts in the model before it is exported; graphnet trains convolutional nets for "
    "images (README, What it cannot do)"
)
_MISSING = object()  # the result of a node that was refused


def from_onnx(source: str | os.PathLike[str] | bytes | Any) -> Module:
    """A net that computes what an ONNX model does, from a path, bytes or a ModelProto.

    Weights keep their names: `net.state_dict()` has the initializers that operators learn from. A
    Dropout drops in training programs. Everything that graphnet does not take is listed in one
    UnsupportedOpError, each node with its name and its reason. Needs the package onnx: `pip install
    graphnet[onnx]`.
    """
    return imported(read(source))


def imported(graph: OnnxGraph) -> OnnxNet:
    """The net of a graph that was read; its refusals come here where the sizes are known."""
    net = OnnxNet(graph)
    sizes = graph.input[1]
    net._refusals = {id(n): (n, _no_such(n.op)) for n in _unknown(graph)}
    if sizes and None not in sizes[1:]:
        net.input_shape = tuple(s for s in sizes[1:] if s is not None)
        trace(net, (graph_batch(graph) or 2, *net.input_shape))
    if net._refusals:
        raise net._refused()
    net._refusals = None
    return net


_RESAMPLED = "no resampling inside a net: resize the images before it"
_FP32 = "export the model in fp32, before it is quantized"
_NORM = "BatchNormalization or LRN"
_OTHER = {
    **dict.fromkeys(("Resize", "Upsample", "ConvTranspose", "DepthToSpace"), _RESAMPLED),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear", "QLinearConv", "ConvInteger"), _FP32),
    **dict.fromkeys(
        ("InstanceNormalization", "GroupNormalization", "LayerNormalization"), _NORM
    ),
    **dict.fromkeys(("Elu", "Selu", "Celu", "PRelu", "Softplus", "Mish"), "Relu, Gelu or Swish"),
    **dict.fromkeys(("ArgMax", "TopK"), "take it of the result: logits.argmax(1)"),
}


def _no_such(op: str) -> str:
    """Why a node is refused whose operator we do not have, and what to use."""
    return "no such operator" + (f"; instead: {_OTHER[op]}" if op in _OTHER else "")


def _unknown(graph: OnnxGraph) -> list[Node]:
    """The nodes that compute with the batch, not with its sizes alone, and that we do not have."""
    sizes, out = set(graph.constants), []
    for n in graph.nodes:
        if n.op in _SHAPES or sizes.issuperset(outer_names(n)):
            sizes.update(n.outputs)
        elif n.op not in TABLE and n.op != "If":
            out.append(n)
    return out


def graph_batch(graph: OnnxGraph) -> int | None:
    """The batch that the file was exported for, None where it is open."""
    return graph.input[1][0] if graph.input[1] else None


_SHAPES = ("Shape", "Size")  # what only asks for sizes


class OnnxNet(Module):
    """A net that was read from ONNX: its parameters by name, and its nodes."""

    def __init__(self, graph: OnnxGraph) -> None:
        self._graph = graph
        self._learned: dict[tuple[str, str], str] = {}  # (constant, form) to key
        self._layers: dict[str, Module] = {}  # by the first result of a node
        # While the file is read: what was refused, and no error before all of it is known.
        self._refusals: dict[int, tuple[Node, str]] | None = None
        self.name = graph.file.rpartition(".")[0] or graph.file
        for n in graph.nodes:
            self._adopt(n)

    # ---- parameters -------------------------------------------------------------------------

    def _adopt(self, n: Node) -> None:
        """Registers the constants that a node learns from, and its layer where it has one."""
        if n.op == "Dropout":
            ratio = n.attrs.get("ratio", 0.5)
            if len(n.inputs) > 1 and n.inputs[1] in self._graph.constants:
                ratio = float(self._graph.constants[n.inputs[1]])
            drops = self.__dict__.setdefault("_dropouts", Part())
            layer = self._layers[n.outputs[0]] = Dropout(ratio)
            put(drops, f"drop{len(vars(drops))}", layer)
        if n.op == "BatchNormalization":
            self._adopt_norm(n)
        for at in WEIGHTS.get(n.op, ()):
            name = n.inputs[at] if at < len(n.inputs) else ""
            value = self._graph.constants.get(name)
            form = _form(n, at)
            if value is None or value.dtype.kind != "f" or (name, form) in self._learned:
                continue
            if value.size == 1 and n.op not in ("Conv", "Gemm"):
                continue  # a number
            value = _in_form(value, form, n)
            if n.op in ("Conv", "Gemm", "MatMul") and value.ndim not in (1, 2, 4):
                continue
            self._learned[name, form] = self._place(name, value, name in self._graph.held)

    def _adopt_norm(self, n: Node) -> None:
        """A layer over the four constants of a node, which keep their own names."""
        four = [self._graph.constants.get(name) for name in n.inputs[1:5]]
        if any(v is None or v.dtype.kind != "f" for v in four):
            return
        scale, mean = four[0], n.inputs[3]
        assert scale is not None
        momentum = decimal(1.0 - n.attrs.get("momentum", 0.9))
        layer = BatchNorm2d(scale.size, n.attrs.get("epsilon", 1e-5), momentum)
        for name, attribute, value in zip(
            n.inputs[1:5], ("weight", "bias", "running_mean", "running_var"), four, strict=True
        ):
            key = self._learned.get((name, ""))
            if key is None:
                assert value is not None
                kind = Buffer if attribute.startswith("running") else None
                key = self._learned[name, ""] = self._place(
                    name, value, name in self._graph.held, kind
                )
            layer.__dict__[attribute] = dict(self._keys())[key]
        stem = mean.removesuffix("running_mean")
        count = f"{stem}num_batches_tracked" if stem != mean else f"{mean}_batches"
        key = self._place(count, np.array(0), True, Buffer)
        layer.__dict__["num_batches_tracked"] = dict(self._keys())[key]
        self._layers[n.outputs[0]] = layer

    def _place(
        self, name: str, value: np.ndarray, learned: bool, kind: type[Buffer] | None = None
    ) -> str:
        """Makes a parameter of that name, or a buffer, and returns its key; a dot goes one level
        down."""
        tensor = torch.from_numpy(np.array(value, np.int64 if value.dtype.kind == "i" else "f4"))
        p = Parameter(tensor, trainable=learned) if kind is None else kind(tensor)
        taken = dict(self._keys())
        parts = [part for part in name.split(".") if part]
        into: Module = self
        for part in parts[:-1]:
            inner = into.__dict__.get(part)
            if isinstance(inner, Part) or inner is None and not hasattr(Module, part):
                if inner is None:
                    put(into, part, Part())
                into = into.__dict__[part]
            else:
                into, parts = self, [name.replace(".", "_")]
                break
        last = parts[-1]
        while last in into.__dict__ or hasattr(Module, last):
            last += "_"
        put(into, last, p)
        return next(k for k, q in self._keys() if k not in taken and q is p)

    # ---- tracing ----------------------------------------------------------------------------

    def forward(self, x: Symbol) -> Any:
        tracer, g = active_tracer("OnnxNet"), self._graph
        env: dict[str, Any] = {**g.constants, g.input[0]: x}
        held = dict(self._keys())
        try:
            for n in g.nodes:
                self._run(n, env, held, tracer)
        finally:
            tracer.place = ""
        if self._refusals:
            raise self._refused()
        outs = [env[o] for o in g.outputs]
        fixed = [o for o, v in zip(g.outputs, outs, strict=True) if not isinstance(v, Symbol)]
        if fixed:
            raise UnsupportedOpError(f"the output {fixed[0]!r} does not depend on the input",
                                     where=g.file)  # fmt: skip
        return outs[0] if len(outs) == 1 else tuple(outs)

    def _run(self, n: Node, env: dict[str, Any], held: dict[str, Any], tracer: Any) -> None:
        """Adds the results of one node; while the file is read, a refusal instead of an error."""
        tracer.place = f"{self._graph.file}:{n.name}"
        args = [env[i] if i else None for i in n.inputs]
        if any(a is _MISSING for a in args):
            env.update({o: _MISSING for o in n.outputs})
            return
        try:
            made = self._results(n, args, env, held, tracer)
        except (UnsupportedOpError, ShapeError, ConfigError) as error:
            if self._refusals is None:
                error.message = f"{n}: {error.message}"
                error.where = error.where or tracer.place
                raise
            why = error.message + (f"; {error.help}" if error.help else "")
            self._refusals[id(n)] = n, why
            made = [_MISSING] * len(n.outputs)
        env.update({o: v for o, v in zip(n.outputs, made, strict=False) if o})

    def _results(
        self, n: Node, args: list[Any], env: dict[str, Any], held: dict[str, Any], tracer: Any
    ) -> list[Any]:
        g = self._graph
        if n.op == "Shape":
            sizes = args[0].shape[n.attrs.get("start", 0) : n.attrs.get("end")]
            return [np.array(sizes, np.int64)]
        if n.op == "Size":
            return [np.array(np.prod(args[0].shape), np.int64)]
        if n.op == "If":
            return self._branch(n, args[0], env, held, tracer)
        if not any(isinstance(a, Symbol) for a in args):
            return evaluate(n, args, g.opset)
        if n.op not in TABLE:
            raise UnsupportedOpError(_no_such(n.op))
        for at in WEIGHTS.get(n.op, ()):
            key = self._learned.get((n.inputs[at], _form(n, at))) if at < len(args) else None
            if key is not None:
                args[at] = held[key]
        wrong = [a for a in args if isinstance(a, np.ndarray) and a.dtype == np.float64]
        if wrong:
            raise UnsupportedOpError("a constant of type DOUBLE", help="export it in fp32")
        call = Call(n, g.opset, graph_batch(g), self._layers.get(n.outputs[0]))
        try:
            made = TABLE[n.op](call, *args)
        except TypeError as error:  # operands that the operator does not have in its opset
            raise UnsupportedOpError(f"its operands: {error}") from error
        return list(made) if isinstance(made, list) else [made]

    def _branch(
        self, n: Node, condition: Any, env: dict[str, Any], held: dict[str, Any], tracer: Any
    ) -> list[Any]:
        """The branch of an If whose condition follows from shapes."""
        if not isinstance(condition, np.ndarray):
            raise UnsupportedOpError("its condition depends on the data")
        graph = n.attrs["then_branch" if bool(condition.reshape(())) else "else_branch"]
        onnx, inner = package(), dict(env)
        inner.update({i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer})
        for node in nodes_of(graph, onnx):
            self._run(node, inner, held, tracer)
        return [inner[o.name] for o in graph.output]

    def _refused(self) -> GraphnetError:
        """What was refused: a line for each operator and reason, with all its nodes."""
        alike: dict[tuple[str, str], list[str]] = {}
        for n, why in (self._refusals or {}).values():
            alike.setdefault((n.op, why), []).append(repr(n.name))
        lines = [f"{op} ({', '.join(names)}): {why}" for (op, why), names in alike.items()]
        return refusal(f"the model {self._graph.file!r}", lines, None, _INSTEAD)


def _form(n: Node, at: int) -> str:
    """How an operand is stored: as it stands in the file, or as a Linear wants it."""
    if n.op == "Gemm":
        alpha, beta = n.attrs.get("alpha", 1.0), n.attrs.get("beta", 1.0)
        flip = "" if n.attrs.get("transB", 0) else "transposed "
        return f"{flip}{alpha}" if at == 1 else f"bias {beta}"
    return "transposed" if n.op == "MatMul" else ""


def _in_form(value: np.ndarray, form: str, n: Node) -> np.ndarray:
    if n.op == "Gemm" and form.startswith("bias"):
        width = value.shape[-1] if value.ndim else 1
        value = value.reshape(-1) if value.size == width and value.ndim == 2 else value
        value = value.reshape(1) if value.ndim == 0 else value
        return value * np.float32(n.attrs.get("beta", 1.0))
    if n.op == "Gemm":
        value = value * np.float32(n.attrs.get("alpha", 1.0))
    return value.T if form.startswith("transposed") and value.ndim == 2 else value
