"""Models by name or from a user's file, as the command line takes them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graphnet.errors import ConfigError, GraphnetError


def load_model(spec: str, classes: int = 0, towers: bool = False) -> Any:
    """The net of a model's name, of `FILE.py:ATTRIBUTE` (a net of ours or of torch's, or a function
    that makes one) or of `FILE.onnx`.

    classes  outputs of a named model, or of a function with a parameter num_classes; 0 for its own
    towers   a named model in the form that two ranks can divide, where it has one
    """
    import torch

    from graphnet.frontends import models
    from graphnet.frontends.dsl import Module

    path, colon, attribute = spec.rpartition(":")
    if not colon and spec.endswith(".py"):
        raise ConfigError(f"{spec} names no net", help=f"{spec}:ATTRIBUTE, a net or a function")
    if spec.endswith(".onnx"):
        if classes:
            raise ConfigError(f"{spec} has its classes, and --classes gives {classes}")
        from graphnet.frontends.onnx_in import from_onnx

        return from_onnx(spec)
    if not runs_code(spec):
        how: dict[str, int] = {"num_classes": classes} if classes else {}
        if towers and _takes(models.MODELS.get(spec), "norm_groups"):
            how["norm_groups"] = 2
        return models.get(spec, **how)
    module = _run_file(Path(path))
    if not hasattr(module, attribute):
        raise ConfigError(f"{path} has no attribute {attribute!r}")
    found = getattr(module, attribute)

    nets = (Module, torch.nn.Module)
    makes = not isinstance(found, nets) and callable(found)
    if classes and not (makes and _takes(found, "num_classes")):
        raise ConfigError(
            f"{spec} takes no number of classes, and --classes gives {classes}",
            help="a function with a parameter num_classes takes it; or change the last layer there",
        )
    if makes:
        with _blamed_on(f"{path}: {attribute}()"):
            found = found(num_classes=classes) if classes else found()
    if isinstance(found, torch.nn.Module):
        from graphnet.frontends.torch_in import from_torch

        known = getattr(found, "input_shape", None)
        found = from_torch(found)
        found.input_shape = None if known is None else tuple(known)
    if not isinstance(found, Module):
        raise ConfigError(f"{spec} is no gn.Module or torch.nn.Module but {found!r:.80}")
    return found


def runs_code(spec: str) -> bool:
    """Whether `load_model` runs a file of the user's for this model."""
    return spec.rpartition(":")[0].endswith(".py")


def _takes(function: Any, name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # one without a signature
        return False


def _run_file(path: Path) -> Any:
    """The module of a user's file; as under `python FILE`, what lies beside it can be imported."""
    import importlib.util

    if not path.is_file():
        raise ConfigError(f"model file {path} does not exist")
    spec = importlib.util.spec_from_file_location(f"_model_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent.absolute()))
    with _blamed_on(str(path)):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _blamed_on(what: str) -> Iterator[None]:
    """What a user's file raises is bad input, not a fault of this program."""
    try:
        yield
    except GraphnetError:
        raise
    except Exception as error:
        raise ConfigError(f"{what} fails: {type(error).__name__}: {error}") from error


def input_shape(net: Any, batch: int) -> tuple[int, ...]:
    """(batch, C, H, W) of a net that knows what it takes."""
    shape = getattr(net, "input_shape", None)
    if shape is None:
        raise ConfigError(
            "the net does not say what it takes", help="set net.input_shape = (C, H, W)"
        )
    return (batch, *shape)
