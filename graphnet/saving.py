"""A net's parameters as a safetensors file, and back."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from graphnet.errors import CheckpointError
from graphnet.frontends.dsl import Module


def save(path: str | os.PathLike[str], net: Module) -> None:
    """Writes the parameters as safetensors, under torch's keys; the file appears whole."""
    from safetensors.torch import save as to_bytes

    path = Path(path)
    about = {"graphnet": json.dumps({"net": net._title()})}
    data = to_bytes(dict(net.state_dict()), metadata=about)
    try:
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from None
    finally:
        Path(partial).unlink(missing_ok=True)


def load(path: str | os.PathLike[str], net: Module) -> Module:
    """Reads what `save` wrote into the net and returns it.

    CheckpointError for a missing or damaged file, StateDictError where keys do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    try:
        tensors = from_bytes(Path(path).read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is no whole safetensors file: {error}", help="save it again"
        ) from None
    net.load_state_dict(tensors)
    return net
