"""A backend for ONNX's own test runner: `onnx.backend.test.BackendTest(onnx_backend, __name__)`.

    prepare(model, device).run(inputs) -> results

Inputs behind the first one are constants of the net (many test cases give weights as inputs), so
the net is made when they are known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from graphnet.errors import UnsupportedOpError
from graphnet.frontends.onnx_graph import load, package, read
from graphnet.frontends.onnx_in import imported

_TARGETS = {"CPU": "cpu", "CUDA": "cuda"}


def supports_device(device: str) -> bool:
    """Whether programs run there: "CPU", and "CUDA" where there is a GPU."""
    kind = device.partition(":")[0]
    return kind == "CPU" or kind == "CUDA" and torch.cuda.is_available()


def prepare(model: Any, device: str = "CPU", **options: Any) -> Prepared:
    """A ModelProto on a device."""
    return Prepared(model, _TARGETS[device.partition(":")[0]])


def run_model(model: Any, inputs: Any, device: str = "CPU", **options: Any) -> tuple[Any, ...]:
    """The results of a model for inputs."""
    return prepare(model, device).run(inputs)


class Prepared:
    """A model whose net is compiled at each call for the shape of its batch."""

    def __init__(self, model: Any, target: str) -> None:
        self.model, self.target = load(model)[0], target

    def run(self, inputs: Sequence[np.ndarray] | Mapping[str, np.ndarray]) -> tuple[Any, ...]:
        """The results, a NumPy array each; UnsupportedOpError for what graphnet does not take."""
        import graphnet

        held = {i.name for i in self.model.graph.initializer}
        names = [i.name for i in self.model.graph.input if i.name not in held]
        given = inputs if isinstance(inputs, Mapping) else dict(zip(names, inputs, strict=False))
        if any(not isinstance(v, (np.ndarray, np.generic)) for v in given.values()):
            raise UnsupportedOpError("an input that is no tensor")
        floats = package().TensorProto.FLOAT
        kinds = {i.name: i.type.tensor_type.elem_type for i in self.model.graph.input}
        batch = next((n for n in names if kinds[n] == floats), names[0] if names else "")
        bound = {n: np.asarray(v) for n, v in given.items() if n != batch}
        net = imported(read(self.model, bound))
        x = torch.from_numpy(np.array(given[batch]))
        program: Any = graphnet.compile(net, x.shape, target=self.target)
        made = program(x)
        outs = made if isinstance(made, tuple) else (made,)
        return tuple(y.numpy(force=True) for y in outs)
