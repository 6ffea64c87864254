"""What importers share: nets put together from the modules of others, and lists of refusals."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from graphnet.errors import ConfigError, UnsupportedOpError
from graphnet.frontends.dsl import Module


class Part(Module):
    """A container: it has a name in the tree, and holds layers and parameters."""


def put(into: Module, key: str, what: Any, whole: str = "") -> None:
    """Makes a module or a parameter an attribute; ConfigError where the name is taken by a net's
    own method.

    whole  its attribute path, for the error
    """
    if hasattr(Module, key):
        raise ConfigError(
            f"{whole or key}: a part of a net cannot be called {key!r}, nets have a method or an "
            "attribute of that name",
            help="rename it in the original: its key in state_dict would be the same name",
        )
    into.__dict__[key] = what


def refusal(what: str, reasons: Iterable[str], where: str | None, help: str) -> UnsupportedOpError:
    """One error for everything that an importer does not take, a line each."""
    lines = list(dict.fromkeys(reasons))
    return UnsupportedOpError(
        f"{what} has {len(lines)} part{'s' * (len(lines) != 1)} that graphnet does not take:\n  "
        + "\n  ".join(lines),
        where=where, help=help,
    )  # fmt: skip
