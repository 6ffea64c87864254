"""What a kernel takes, read from its file: a launch that gives anything else is refused.

Triton's launcher refuses a constant that the kernel does not know, but its interpreter drops it
silently. So a wrong launch could pass every test that runs without a GPU. Here all targets ask the
same question, and no Triton is needed to answer it.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from graphnet.errors import CompileError


@dataclass(frozen=True)
class Signature:
    """Parameters of a kernel: pointers in their order, constexprs, and those with a default."""

    pointers: tuple[str, ...]
    constants: tuple[str, ...]
    optional: frozenset[str]

    def mismatch(self, pointers: int, constants: Collection[str]) -> str | None:
        """What is wrong with so many pointers and these constants; None where they fit."""
        given, known = set(constants), set(self.constants)
        if unknown := sorted(given - known):
            return f"it has no constant {', '.join(unknown)}"
        if missing := sorted(known - given - self.optional):
            return f"it is not given {', '.join(missing)}"
        if pointers != len(self.pointers):
            names = ", ".join(self.pointers)
            return f"it takes {len(self.pointers)} arguments ({names}), not {pointers}"
        return None


@cache
def _functions(module: str) -> dict[str, Signature]:
    """Every function at the top of a module's file; the module itself is not imported."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise CompileError(f"there is no module {module}")
    tree = ast.parse(Path(found.origin).read_text(encoding="utf-8"))
    return {f.name: _signature(f) for f in tree.body if isinstance(f, ast.FunctionDef)}


def _signature(function: ast.FunctionDef) -> Signature:
    a = function.args
    names = [*a.posonlyargs, *a.args, *a.kwonlyargs]
    constant = [p.arg for p in names if p.annotation and "constexpr" in ast.unparse(p.annotation)]
    positional = [*a.posonlyargs, *a.args]
    optional = {p.arg for p in positional[len(positional) - len(a.defaults) :]}
    optional |= {p.arg for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True) if d is not None}
    pointers = tuple(p.arg for p in names if p.arg not in constant)
    return Signature(pointers, tuple(constant), frozenset(optional))


def signature_of(module: str, kernel: str) -> Signature:
    """The signature of `kernel` in a module like "graphnet.kernels.pool"; CompileError if there is
    none."""
    known = _functions(module)
    if kernel not in known:
        raise CompileError(f"{module} has no kernel {kernel}")
    return known[kernel]
