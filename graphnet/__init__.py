"""graphnet compiles the whole training step of a CNN into a few generated kernels.

Names are loaded when they are first used: `import graphnet` imports neither torch nor Triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "graphnet.api": ("build", "compile"),
    "graphnet.gradcheck": ("check_gradients",),
    "graphnet.saving": ("load", "save"),
    "graphnet.torch_out": ("as_torch",),
    "graphnet.frontends.dsl": ("Buffer", "Module", "Parameter", "Sequential"),
    "graphnet.frontends.layers": (
        "AdaptiveAvgPool2d", "AdaptiveMaxPool2d", "AvgPool2d", "BatchNorm1d", "BatchNorm2d",
        "Conv2d", "Dropout", "Dropout2d", "Flatten", "GELU", "Hardsigmoid", "Hardswish",
        "LeakyReLU", "Linear",
        "LocalResponseNorm", "LogSoftmax", "MaxPool2d", "ReLU", "ReLU6", "Sigmoid", "SiLU",
        "Softmax", "Softmax2d", "Tanh", "ZeroPad2d",
    ),
    "graphnet.frontends.activations": (
        "clamp", "exp", "gelu", "hardswish", "leaky_relu", "relu", "relu6", "sigmoid", "silu",
        "sqrt", "tanh",
    ),
    "graphnet.frontends.functions": ("log_softmax", "mean", "pad", "softmax"),
    "graphnet.frontends.onnx_in": ("from_onnx",),
    "graphnet.frontends.onnx_out": ("to_onnx",),
    "graphnet.frontends.symbolic": ("cat", "flatten"),
    "graphnet.frontends.torch_in": ("from_torch",),
    "graphnet.frontends.tracing": ("trace",),
    "graphnet.ops.loss": ("CrossEntropyLoss", "MultiMarginLoss", "MulticlassHingeLoss"),
    "graphnet.ops.adam": ("Adam", "AdamW"),
    "graphnet.ops.augment": ("Augment",),
    "graphnet.ops.update": ("SGD",),
    "graphnet.train.trainer": ("Trainer",),
    "graphnet.errors": (
        "BackendUnavailableError", "CheckpointError", "CompileError", "ConfigError", "DTypeError",
        "DataError", "GraphError", "GraphnetError", "MissingError", "NumericsError",
        "OutOfMemoryPlanError", "ParseError", "RankError", "RunExistsError", "ShapeError",
        "StateDictError", "UnsupportedOpError",
    ),
}  # fmt: skip
_MODULES = {
    "init": "graphnet.frontends.init",
    "models": "graphnet.frontends.models",
    "random": "graphnet.runtime.random",
    "schedule": "graphnet.train.schedule",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", *sorted([*_HOME, *_MODULES])]

# ruff: noqa: F401  the imports below are for type checkers; __getattr__ does the work
if TYPE_CHECKING:
    from graphnet.api import build, compile
    from graphnet.errors import GraphnetError
    from graphnet.frontends import init, models
    from graphnet.frontends.activations import (
        clamp,
        exp,
        gelu,
        hardswish,
        leaky_relu,
        relu,
        relu6,
        sigmoid,
        silu,
        sqrt,
        tanh,
    )
    from graphnet.frontends.dsl import Buffer, Module, Parameter, Sequential
    from graphnet.frontends.functions import log_softmax, mean, pad, softmax
    from graphnet.frontends.layers import (
        GELU,
        AdaptiveAvgPool2d,
        AdaptiveMaxPool2d,
        AvgPool2d,
        BatchNorm1d,
        BatchNorm2d,
        Conv2d,
        Dropout,
        Dropout2d,
        Flatten,
        Hardsigmoid,
        Hardswish,
        LeakyReLU,
        Linear,
        LocalResponseNorm,
        LogSoftmax,
        MaxPool2d,
        ReLU,
        ReLU6,
        Sigmoid,
        SiLU,
        Softmax,
        Softmax2d,
        Tanh,
        ZeroPad2d,
    )
    from graphnet.frontends.onnx_in import from_onnx
    from graphnet.frontends.onnx_out import to_onnx
    from graphnet.frontends.symbolic import cat, flatten
    from graphnet.frontends.torch_in import from_torch
    from graphnet.frontends.tracing import trace
    from graphnet.gradcheck import check_gradients
    from graphnet.ops.adam import Adam, AdamW
    from graphnet.ops.augment import Augment
    from graphnet.ops.loss import CrossEntropyLoss, MulticlassHingeLoss, MultiMarginLoss
    from graphnet.ops.update import SGD
    from graphnet.runtime import random
    from graphnet.saving import load, save
    from graphnet.torch_out import as_torch
    from graphnet.train import schedule
    from graphnet.train.trainer import Trainer


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = importlib.import_module(_MODULES[name])
    elif name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    else:
        raise _missing(name)
    globals()[name] = value
    return value


def _missing(name: str) -> AttributeError:
    if name.startswith("__"):  # Python asks for names of its own
        return AttributeError(f"module 'graphnet' has no attribute {name!r}")
    from graphnet.errors import MissingError
    from graphnet.frontends.foreign import did_you_mean

    near = did_you_mean(name, __all__)
    if name.lower().endswith("loss"):  # MSELoss is nearer to a loss than its letters are
        near, of, home = None, "losses", "graphnet.ops.loss"
    else:
        of, home = "layers", "graphnet.frontends.layers"
    return MissingError(
        f"graphnet has no {name!r}", help=near or f"its {of}: {', '.join(_NAMES[home])}"
    )


def __dir__() -> list[str]:
    return list(__all__)
