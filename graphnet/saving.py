"""A net's parameters as a safetensors file, and back."""

from __future__ import annotations

import json
import os

from graphnet import disk
from graphnet.errors import CheckpointError
from graphnet.frontends.dsl import Module


def save(path: str | os.PathLike[str], net: Module) -> None:
    """Writes the parameters as safetensors, under torch's keys; the file appears whole."""
    from safetensors.torch import save as to_bytes

    about = {"graphnet": json.dumps({"net": net._title()})}
    data = to_bytes(dict(net.state_dict()), metadata=about)
    try:
        disk.write(path, data, durable=True, mode=0o644)
    except OSError as error:
        raise disk.unwritten(path, error) from None


def load(path: str | os.PathLike[str], net: Module) -> Module:
    """Reads what `save` wrote into the net and returns it.

    CheckpointError for a missing or damaged file, StateDictError where keys do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    try:
        tensors = from_bytes(disk.read(path))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is no whole safetensors file: {error}", help="save it again"
        ) from None
    net.load_state_dict(tensors)
    return net
