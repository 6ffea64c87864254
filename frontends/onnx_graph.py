"""An ONNX graph made ready to be read: constants folded, patterns named, what nobody reads dropped.

`onnx` is an extra and is imported when it is used.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphnet.errors import BackendUnavailableError, DataError, UnsupportedOpError
from graphnet.frontends.foreign import called

_OLDEST = 6
_ONE_IN_ONE_OUT = ("Reshape", "Squeeze", "Unsqueeze", "Identity", "Pad", "Cast")


def package() -> Any:
    """The package onnx; BackendUnavailableError says how to get it."""
    try:
        return importlib.import_module("onnx")
    except ImportError as error:
        raise BackendUnavailableError(
            f"ONNX files need the package onnx: {error}", help="pip install graphnet[onnx]"
        ) from error


@dataclass
class Node:
    """One operator: `name` for errors, operator, inputs and outputs by name ("" for none)."""

    name: str
    op: str
    inputs: list[str]
    outputs: list[str]
    attrs: dict[str, Any]

    def __str__(self) -> str:
        return f"node {self.name!r} ({self.op})"


@dataclass
class OnnxGraph:
    """A graph whose constants are known.

    constants  by name: initializers, and what follows from constants alone
    held       names of the constants that are the file's own weights
    input      (name, sizes; None for a size that is left open)
    outputs    names of what is returned
    file       for errors
    opset      of the standard operators
    """

    nodes: list[Node]
    constants: dict[str, np.ndarray]
    held: set[str]
    input: tuple[str, tuple[int | None, ...]]
    outputs: list[str]
    file: str
    opset: int


def load(source: Any) -> tuple[Any, str]:
    """(ModelProto, what errors call it) of a path, of bytes or of a ModelProto."""
    onnx = package()
    if isinstance(source, onnx.ModelProto):
        return source, "model"
    try:
        if isinstance(source, (bytes, bytearray)):
            return onnx.load_from_string(bytes(source)), "model"
        return onnx.load(os.fspath(source)), os.path.basename(os.fspath(source))
    except FileNotFoundError as error:
        raise DataError(
            f"{error.filename or source} does not exist",
            help="an ONNX file; weights beside it, in a file of their own, stay in its folder",
        ) from None
    except TypeError:
        raise DataError(
            f"an ONNX model is a path, bytes or a ModelProto, not {called(source)}",
            help="gn.from_torch(module) takes a torch module",
        ) from None
    except Exception as error:  # protobuf's and onnx's own errors have no common base
        raise DataError(
            f"{source!r:.80} is no whole ONNX file: {error}",
            help="write it again: torch.onnx.export(module, (x,), path), or gn.to_onnx",
        ) from error


def read(source: Any, bound: dict[str, np.ndarray] | None = None) -> OnnxGraph:
    """The graph of a model.

    bound  values of inputs, by name, that are constants of the net
    """
    onnx = package()
    model, file = load(source)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < _OLDEST:
        raise UnsupportedOpError(
            f"opset {opset} is older than {_OLDEST}", where=file,
            help="onnx.version_converter.convert_version(model, 13)",
        )  # fmt: skip
    g = model.graph
    if g.sparse_initializer:
        raise UnsupportedOpError(
            "sparse initializers", where=file, help="write them as dense initializers"
        )
    held = {i.name: onnx.numpy_helper.to_array(i) for i in g.initializer}
    given = [i for i in g.input if i.name not in held and i.name not in (bound or {})]
    held |= bound or {}
    if len(given) != 1:
        names = ", ".join(i.name for i in given) or "none"
        raise UnsupportedOpError(
            f"the model has {len(given)} inputs ({names}), and a net takes one batch", where=file,
            help="make the others initializers",
        )  # fmt: skip
    kind = given[0].type.tensor_type
    if kind.elem_type != onnx.TensorProto.FLOAT:
        name = onnx.TensorProto.DataType.Name(kind.elem_type)
        raise UnsupportedOpError(
            f"the input {given[0].name!r} is {name}, not FLOAT", where=file,
            help="export it in fp32",
        )  # fmt: skip
    sizes = tuple(
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in kind.shape.dim
    )
    out = OnnxGraph(
        [], dict(held), set(held), (given[0].name, sizes), [o.name for o in g.output], file, opset
    )
    out.nodes = list(nodes_of(g, onnx))
    _fold(out)
    _recognise_lrn(out)
    _join_bias(out)
    _prune(out)
    return out


def nodes_of(graph: Any, onnx: Any) -> Iterator[Node]:
    """The nodes of a GraphProto; one without a name is called after its first output."""
    for n in graph.node:
        attrs = {a.name: onnx.helper.get_attribute_value(a) for a in n.attribute}
        attrs = {k: v.decode() if isinstance(v, bytes) else decimal(v) for k, v in attrs.items()}
        domain = "" if n.domain in ("", "ai.onnx") else f"{n.domain}."
        name = n.name or next(iter(n.output), "")
        yield Node(name, domain + n.op_type, list(n.input), list(n.output), attrs)


def decimal(value: Any) -> Any:
    """An fp32 number as the shortest decimal that it stands for: 1e-4, not 9.9999997e-05."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


# ---- constants -----------------------------------------------------------------------------------

_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial")


def evaluate(node: Node, args: Sequence[np.ndarray | None], opset: int) -> list[np.ndarray]:
    """The results of an operator on constants, by onnx's reference."""
    onnx = package()
    h = onnx.helper
    if node.op == "Identity":
        return [np.asarray(args[0])]
    if node.op == "Constant" and "value" in node.attrs:
        return [onnx.numpy_helper.to_array(node.attrs["value"])]
    made = h.make_node(node.op, node.inputs, node.outputs, **node.attrs)
    known = {n: a for n, a in zip(node.inputs, args, strict=True) if n and a is not None}
    infos = [
        h.make_tensor_value_info(n, h.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in known.items()
    ]
    graph = h.make_graph([made], "constant", infos, [
        h.make_tensor_value_info(o, onnx.TensorProto.UNDEFINED, None) for o in node.outputs if o
    ])  # fmt: skip
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", opset)])
    reference = importlib.import_module("onnx.reference")
    return list(reference.ReferenceEvaluator(model).run(None, known))


def _fold(g: OnnxGraph) -> None:
    """Replaces nodes whose operands are all constants by their results."""
    rest = []
    for n in g.nodes:
        constant = all(not i or i in g.constants for i in n.inputs)
        if not constant or n.op in _RANDOM or n.op == "If" or "." in n.op:
            rest.append(n)
            continue
        args = [g.constants[i] if i else None for i in n.inputs]
        found = evaluate(n, args, g.opset)
        g.constants.update(zip([o for o in n.outputs if o], found, strict=False))
        if n.op == "Identity" and n.inputs[0] in g.held:
            g.held.add(n.outputs[0])
    g.nodes = rest


def _prune(g: OnnxGraph) -> None:
    """Drops nodes that no output comes from; outputs that nobody reads lose their name."""
    needed, kept = set(g.outputs), []
    for n in reversed(g.nodes):
        if needed.isdisjoint(n.outputs):
            continue
        n.outputs = [o if o in needed else "" for o in n.outputs]
        while not n.outputs[-1]:
            n.outputs.pop()
        needed.update(outer_names(n))
        kept.append(n)
    g.nodes = kept[::-1]


def outer_names(n: Node) -> set[str]:
    """All names that a node reads, those inside its branches included."""
    names = set(filter(None, n.inputs))
    for a in n.attrs.values():
        if hasattr(a, "node"):
            for inner in nodes_of(a, package()):
                names |= outer_names(inner)
            names.update(o.name for o in a.output)
    return names


# ---- patterns ------------------------------------------------------------------------------------


def _recognise_lrn(g: OnnxGraph) -> None:
    """Writes an LRN for what torch's exporters make of one:
    x / (k + alpha mean over channels of x x)^beta."""
    made = {o: n for n in g.nodes for o in n.outputs if o}

    def of(name: str, op: str) -> Node | None:
        n = made.get(name)
        return n if n is not None and n.op == op else None

    def scaled(name: str, op: str) -> tuple[str, float] | None:
        """(operand, number) of a sum, a product or a power with a constant."""
        n = of(name, op)
        if n is None:
            return None
        for x, c in (n.inputs, n.inputs[::-1]) if op != "Pow" else (n.inputs,):
            if c in g.constants and g.constants[c].size == 1:
                return x, decimal(float(g.constants[c].reshape(())))
        return None

    for at, n in enumerate(g.nodes):
        if n.op != "Div":
            continue
        x, below = n.inputs
        power = scaled(below, "Pow")
        total = power and scaled(power[0], "Add")
        times = total and scaled(total[0], "Mul")
        if not (power and total and times):
            continue
        size = _channels_averaged(g, made, times[0], x)
        if size:
            attrs = {"size": size, "alpha": times[1], "beta": power[1], "bias": total[1]}
            g.nodes[at] = Node(n.name, "LRN", [x], n.outputs, attrs)


def _channels_averaged(g: OnnxGraph, made: dict[str, Node], name: str, x: str) -> int:
    """How many channels the average of x x is taken over, 0 where it is none."""
    size = 0
    while name in made:
        n = made[name]
        if n.op == "Mul":
            return size if n.inputs == [x, x] else 0
        if n.op == "AveragePool":
            kernel = n.attrs["kernel_shape"]
            whole = n.attrs.get("count_include_pad", 0) or not any(n.attrs.get("pads", []))
            if size or any(k != 1 for k in kernel[1:]) or not whole:
                return 0
            size = kernel[0]
            name = n.inputs[0]
        elif n.op == "If":  # whether torch squeezes an axis of one: either way it is gone
            branch = list(nodes_of(n.attrs["then_branch"], package()))
            plain = all(b.op in (*_ONE_IN_ONE_OUT, "Constant") for b in branch)
            name = next((i for b in branch for i in b.inputs if i in made and plain), "")
        elif n.op in _ONE_IN_ONE_OUT:
            name = n.inputs[0]
        else:
            return 0
    return 0


def _join_bias(g: OnnxGraph) -> None:
    """Writes a Gemm for a MatMul by a constant whose only reader adds a constant vector."""
    readers: dict[str, list[Node]] = {}
    for n in g.nodes:
        for name in outer_names(n):
            readers.setdefault(name, []).append(n)
    for at, n in enumerate(g.nodes):
        if n.op != "MatMul" or n.inputs[1] not in g.constants or n.outputs[0] in g.outputs:
            continue
        behind = readers.get(n.outputs[0], [])
        if len(behind) != 1 or behind[0].op != "Add":
            continue
        add = behind[0]
        bias = add.inputs[1 - add.inputs.index(n.outputs[0])]
        weight = g.constants[n.inputs[1]]
        if bias in g.constants and g.constants[bias].shape == weight.shape[1:]:
            inputs = [*n.inputs, bias]
            g.nodes[g.nodes.index(add)] = Node(n.name, "Gemm", inputs, add.outputs, {})
            g.nodes[at] = Node(n.name, "MatMul", n.inputs, n.outputs, n.attrs)
