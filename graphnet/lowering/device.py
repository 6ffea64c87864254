"""Templates as device functions: the same code, told its program ids instead of asking for them.

A template is a kernel and asks `tl.program_id`. Inside a persistent kernel it is a phase, and the
ids are those of a task. So its source is rewritten: `tl.program_id(k)` becomes a parameter, and so
do the ids of every helper that asks for them. Nothing else changes, hence the same bits.
"""

from __future__ import annotations

import ast
from functools import cache

from graphnet.errors import CompileError
from graphnet.lowering.build import _package

IDS = ("pid0", "pid1", "pid2")
_KERNELS = "graphnet.kernels"


class _Module:
    """A kernel module's functions, and where its other names come from."""

    def __init__(self, name: str) -> None:
        self.name = name
        tree = ast.parse((_package(_KERNELS) / f"{name}.py").read_text())
        self.functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
        self.imported: dict[str, str] = {}  # name to module
        self.values: set[str] = set()
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                self.imported.update((a.name, node.module) for a in node.names)
            elif isinstance(node, ast.Assign):
                self.values.update(t.id for t in node.targets if isinstance(t, ast.Name))

    def home(self, name: str) -> str | None:
        """The kernel module that defines a name which is used here; None for any other name."""
        if name in self.functions or name in self.values:
            return self.name
        return self.imported.get(name)


@cache
def _module(name: str) -> _Module:
    return _Module(name)


def _is_id(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "program_id"
    )


@cache
def _asks(module: str, name: str) -> bool:
    """Whether a function, or one that it calls, asks for a program id."""
    found = _module(module).functions.get(name)
    if found is None:
        return False
    for node in ast.walk(found):
        if _is_id(node):
            return True
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            home = _module(module).home(node.func.id)
            if home and (home, node.func.id) != (module, name) and _asks(home, node.func.id):
                return True
    return False


class _Told(ast.NodeTransformer):
    """`tl.program_id(k)` becomes a name, and calls of functions that ask pass the ids on."""

    def __init__(self, module: _Module) -> None:
        self.module = module
        self.calls: list[tuple[str, str]] = []

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if _is_id(node):
            (at,) = node.args
            assert isinstance(at, ast.Constant)
            return ast.Name(IDS[int(at.value)], ast.Load())  # type: ignore[arg-type]
        if isinstance(node.func, ast.Name):
            home = self.module.home(node.func.id)
            if home and _asks(home, node.func.id):
                self.calls.append((home, node.func.id))
                node.args[:0] = [ast.Name(i, ast.Load()) for i in IDS]
        return node


class Functions:
    """Collects device functions and the imports they need, for one generated file."""

    def __init__(self) -> None:
        self.texts: dict[tuple[str, str], str] = {}
        self.imports: dict[str, set[str]] = {}

    def parameters(self, module: str, name: str) -> set[str]:
        """What a template takes."""
        return {a.arg for a in _module(module).functions[name].args.args}

    def need(self, module: str, name: str, inline: bool = False) -> str:
        """The name under which a template can be called, with three ids before its arguments.

        inline  for helpers, which return tensors: a real call cannot
        """
        key = (module, name)
        if key in self.texts:
            return name
        if any(n == name for _, n in self.texts):
            raise CompileError(f"two templates are called {name!r}", help="rename one of them")
        home = _module(module)
        node = ast.parse(ast.unparse(home.functions[name])).body[0]
        assert isinstance(node, ast.FunctionDef)
        told = _Told(home)
        told.visit(node)
        node.args.args[:0] = [ast.arg(i) for i in IDS]
        if not inline:
            node.decorator_list = [ast.parse("triton.jit(noinline=True)", mode="eval").body]
        self.texts[key] = ""  # keeps its place: what it calls may call it
        for other in told.calls:
            self.need(*other, inline=True)
        for used in {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}:
            where = home.home(used)
            if where and (where, used) not in told.calls and used != name:
                self.imports.setdefault(where, set()).add(used)
        self.texts[key] = ast.unparse(ast.fix_missing_locations(node))
        return name

    def use(self, module: str, name: str) -> str:
        """A function of the templates that asks for nothing, as it is."""
        self.imports.setdefault(module, set()).add(name)
        return name

    def text(self) -> str:
        """Imports and functions, callees first."""
        lines = ["import triton", "import triton.language as tl", ""]
        for module in sorted(self.imports):
            names = ", ".join(sorted(self.imports[module]))
            lines.append(f"from {_KERNELS}.{module} import {names}  # noqa: F401, E501")
        return "\n\n\n".join(["\n".join(lines), *reversed(self.texts.values())])
