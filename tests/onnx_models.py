"""ONNX models for tests: of torch's exporters, by hand, and the onnx package's own with weights."""

import io
import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

FLOAT = onnx.TensorProto.FLOAT


def exported(module, shape, dynamo=False, batch=False):
    """A ModelProto of a torch module in inference; `batch` leaves its size open."""
    x, out = torch.zeros(shape), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        if dynamo:
            sizes = ({0: "n"},) if batch else None
            program = torch.onnx.export(
                module.eval(), (x,), dynamo=True, dynamic_shapes=sizes, verbose=False
            )
            return program.model_proto
        open_ = {"dynamic_axes": {"x": {0: "n"}}} if batch else {}
        torch.onnx.export(module.eval(), (x,), out, dynamo=False, input_names=["x"], **open_)
    return onnx.load_from_string(out.getvalue())


def model(nodes, shape, weights=(), opset=17, outputs=("y",)):
    """A ModelProto of nodes over x: (operator, inputs, outputs, attributes) each."""
    made = [helper.make_node(op, i.split(), o.split(), **a) for op, i, o, a in nodes]
    graph = helper.make_graph(
        made, "g", [helper.make_tensor_value_info("x", FLOAT, shape)],
        [helper.make_tensor_value_info(o, FLOAT, None) for o in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in dict(weights).items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def light(name, seed=0):
    """A model of the onnx package with random weights: its own are all one constant."""
    folder = Path(onnx.__file__).parent / "backend/test/data/light"
    found = onnx.load(folder / f"light_{name}.onnx")
    g, rng, rest = found.graph, np.random.default_rng(seed), []
    known = {i.name: numpy_helper.to_array(i) for i in g.initializer}
    for n in g.node:
        if n.op_type == "Constant":
            known[n.output[0]] = numpy_helper.to_array(n.attribute[0].t)
        if n.op_type != "ConstantOfShape":
            rest.append(n)
            continue
        sizes = tuple(int(s) for s in known[n.input[0]])
        fan = int(np.prod(sizes[1:]))
        value = rng.standard_normal(sizes, np.float32) * np.float32(np.sqrt(2 / fan))
        if len(sizes) == 1:  # a bias, or what a batch norm has: variances are positive
            value = np.abs(rng.standard_normal(sizes, np.float32)) * 0.3 + 0.5
        g.initializer.append(numpy_helper.from_array(value.astype(np.float32), n.output[0]))
    if rest[-1].op_type == "Softmax":  # it may saturate: what it is of is a result, too
        logits = onnx.helper.make_tensor_value_info(rest[-1].input[0], 1, None)
        g.output.append(logits)
    del g.node[:]
    g.node.extend(rest)
    return found


def runtime(found, x):
    """What onnxruntime computes."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    given = {i.name for i in found.graph.initializer}
    (name,) = [i.name for i in found.graph.input if i.name not in given]
    out = onnxruntime.InferenceSession(found.SerializeToString()).run(None, {name: x.numpy()})
    return [torch.from_numpy(y) for y in out]
