"""The interpret target: the same kernels under Triton's interpreter, on the CPU.

Triton decides at import whether functions are interpreted, and other packages import it early
(torch.optim does). So the mode is scoped: inside it the knob is set and every jit function of the
loaded triton modules is exchanged for an interpreted twin; outside, Triton is as it was. The
kernels are loaded a second time under a package name of their own.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from graphnet.errors import BackendUnavailableError
from graphnet.ir.types import DTYPES
from graphnet.lowering.build.descriptors import descriptor, passed_box
from graphnet.lowering.launch import files
from graphnet.lowering.launch.codegen import Ref
from graphnet.lowering.launch.files import Source
from graphnet.lowering.launch.steps import (
    Arg,
    Box,
    Collective,
    Copy,
    Fill,
    Launch,
    Step,
    Table,
    bind,
)
from graphnet.lowering.plan.plan import Plan
from graphnet.lowering.targets.collectives import Group, collective
from graphnet.lowering.watch import watched

Storage = dict[str, torch.Tensor]
_PACKAGE = "graphnet.interpreted_kernels"
_KERNELS = "graphnet.kernels"
_twins: dict[int, Any] = {}  # by id of the jit function, which its module keeps alive
_depth = 0
# Held by the one thread that interprets, compiles or launches: the mode is that of the process.
# What is captured is replayed without it.
MODE = threading.RLock()


def _twin(function: Any) -> Any:
    from triton.runtime.interpreter import InterpretedFunction

    if id(function) not in _twins:
        _twins[id(function)] = InterpretedFunction(function.fn)
    return _twins[id(function)]


def _exchange() -> list[tuple[ModuleType, str, Any]]:
    """Puts interpreted twins in place; returns what stood there."""
    from triton.runtime.jit import JITFunction

    before = []
    for name, module in sys.modules.copy().items():  # in one go: another thread may import
        if module is None or not (name == "triton" or name.startswith("triton.")):
            continue
        for key, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                before.append((module, key, value))
                setattr(module, key, _twin(value))
    return before


def problem() -> str | None:
    """Why Triton's interpreter does not work here; None where it does."""
    try:
        import triton
    except ImportError as error:
        return f"target 'interpret' needs triton: {error}"
    import numpy

    def version(module: Any) -> tuple[int, ...]:
        return tuple(int(part) for part in module.__version__.split(".")[:2])

    if version(triton) < (3, 7) and version(numpy) >= (2, 4):
        return (
            f"the interpreter of Triton {triton.__version__} breaks with numpy "
            f"{numpy.__version__}: numpy 2.4 no longer makes scalars of one-element arrays"
        )
    return None


@contextmanager
def interpreted() -> Iterator[None]:
    """Triton's interpreter mode, undone on the way out, the environment included. Threads take
    turns."""
    global _depth
    if (why := problem()) is not None:
        raise BackendUnavailableError(why, help="triton>=3.7 or numpy<2.4; or target='cpu'")
    with MODE:
        _depth += 1
        try:
            with _switched() if _depth == 1 else nullcontext():
                yield
        finally:
            _depth -= 1


def _patch_once(patch: Callable[[Any], Any], function: Any) -> Any:
    """Triton exchanges its language's functions at a launch, and again at every call of a device
    function, which takes a quarter of an interpreted step. Where it is done it need not be again.
    """
    import triton.language as tl
    from triton.runtime.interpreter import _LangPatchScope

    seen = [v for v in function.__globals__.values() if v is tl or v is tl.core]
    if seen and not any(tl.core.is_builtin(language.arange) for language in seen):
        return _LangPatchScope()  # nothing to undo
    return patch(function)


@contextmanager
def _switched() -> Iterator[None]:
    import triton
    from triton.runtime import interpreter

    variable = os.environ.get("TRITON_INTERPRET")
    knob = triton.knobs.runtime.interpret
    triton.knobs.runtime.interpret = True
    before = _exchange()
    patch = interpreter._patch_lang
    interpreter._patch_lang = partial(_patch_once, patch)
    try:
        yield
    finally:
        interpreter._patch_lang = patch
        for module, key, value in before:
            setattr(module, key, value)
        triton.knobs.runtime.interpret = knob
        # Setting the knob exports the variable: a child process would inherit it.
        if variable is None:
            os.environ.pop("TRITON_INTERPRET", None)
        else:
            os.environ["TRITON_INTERPRET"] = variable


def _kernels(module: str) -> ModuleType:
    """The interpreted copy of a kernel module."""
    if _PACKAGE not in sys.modules:
        found = importlib.util.find_spec(_KERNELS)
        assert found is not None and found.origin is not None
        folder = str(Path(found.origin).parent)
        spec = importlib.util.spec_from_file_location(
            _PACKAGE, found.origin, submodule_search_locations=[folder]
        )
        assert spec is not None and spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules[_PACKAGE] = package
        spec.loader.exec_module(package)
    return importlib.import_module(module.replace(_KERNELS, _PACKAGE, 1))


@contextmanager
def _as_kernels(step: Launch | None = None) -> Iterator[None]:
    """Inside, `graphnet.kernels` names the interpreted copy: generated files import from it, those
    of a step its kernels, too."""
    for module in (f"{_KERNELS}.common", f"{_KERNELS}.random"):
        _kernels(module)
    for member in (step.members or (step,)) if step else ():
        _kernels(member.module)
    own = {n: m for n, m in sys.modules.items() if n == _KERNELS or n.startswith(f"{_KERNELS}.")}
    copies = {
        n.replace(_PACKAGE, _KERNELS, 1): m
        for n, m in sys.modules.items()
        if n == _PACKAGE or n.startswith(f"{_PACKAGE}.")
    }
    for name in own:
        del sys.modules[name]
    sys.modules.update(copies)
    try:
        yield
    finally:
        for name in copies:
            sys.modules.pop(name, None)
        sys.modules.update(own)


def buffers(plan: Plan, storage: Storage, arena: torch.Tensor) -> Callable[[Ref], torch.Tensor]:
    """Each buffer as a flat tensor: a view of the arena, what is stored (by `laid`), or a table."""
    tables = {
        t.ref.name: torch.tensor(t.values, dtype=torch.int32, device=arena.device)
        for t in plan.tables
    }

    def tensor(ref: Ref) -> torch.Tensor:
        if ref.name in tables:
            return tables[ref.name]
        dtype, count = plan.types[ref.name]
        if ref.name in plan.storage:
            return storage[plan.storage[ref.name]]
        slot = plan.arena[ref.name]
        bytes = DTYPES[dtype].itemsize * count
        return arena[slot.offset : slot.offset + bytes].view(DTYPES[dtype].torch)

    return tensor


def operands(args: tuple[Arg, ...], tensor: Callable[[Ref], torch.Tensor]) -> list[Any]:
    """What a launch passes for its arguments. Descriptors are made here, once."""

    def real(a: Arg) -> Any:
        if isinstance(a, tuple):
            return tuple(tensor(r) for r in a)
        if isinstance(a, Box):
            return descriptor(tensor(a.ref), passed_box(a))
        if isinstance(a, Table):
            return tensor(a.ref)
        return None if a is None else tensor(a)

    return [real(a) for a in args]


def laid(plan: Plan, storage: Storage) -> tuple[Storage, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The elements of what is stored, in the order that its type says; (tensor, twin) where a
    tensor does not lie so."""
    graph = plan.graph
    types = {v.name: v.type for v in (*graph.returns, *graph.input_values)}
    held: Storage = {}
    twins = []
    for name in sorted(set(plan.storage.values())):
        tensor, type = storage[name], types[name]
        if not type.layout.lies(tensor):
            twin = type.layout.zeros(type.shape, tensor.dtype, tensor.device)
            twins.append((tensor, twin.copy_(tensor)))
            tensor = twin
        held[name] = type.layout.elements(tensor)
    return held, twins


def _call(
    step: Step, tensor: Callable[[Ref], torch.Tensor], plan: Plan, group: Group | None = None
) -> Callable[[], Any]:
    """A step as a call without arguments; launches must be called in interpreted mode."""
    ref = lambda name: Ref(name, plan.types[name][0])
    if isinstance(step, Fill):
        into, value = tensor(ref(step.buffer)), step.value
        return lambda: into.fill_(value)
    if isinstance(step, Copy):
        a, b = tensor(ref(step.source)), tensor(ref(step.target))
        return lambda: b.copy_(a)
    if isinstance(step, Collective):
        return collective(step, tensor, group)
    args, constants, options = bind(step)
    real = operands(args, tensor)
    load = partial(files.load, package="graphnet_interpreted")
    with _as_kernels(step):
        values = {k: load(v) if isinstance(v, Source) else v for k, v in constants.items()}
        kernel = load(step.driver) if step.driver else getattr(_kernels(step.module), step.kernel)
    return lambda: kernel[step.grid](*real, **values, **options)


def calls(
    plan: Plan, tensor: Callable[[Ref], torch.Tensor], group: Group | None = None
) -> list[Callable[[], Any]]:
    """The plan's steps as calls, to be made in interpreted mode."""
    with interpreted():
        return [_call(s, tensor, plan, group) for s in plan.steps]


def _poison(plan: Plan, arena: torch.Tensor) -> list[Callable[[], None]]:
    """Per step: fills with NaN bits what it is the first to write, so that nothing else may
    live there and nothing may be read before it is written."""
    seen: set[str] = set()
    out: list[Callable[[], None]] = []
    for s in plan.steps:
        held = [plan.arena[n] for n in s.reads if n in plan.arena]  # a result may replace one
        first = [plan.arena[n] for n in s.writes if n in plan.arena and n not in seen]
        first = [slot for slot in first if slot not in held]
        seen.update(s.writes)

        def fill(slots: list = first) -> None:
            for slot in slots:
                arena[slot.offset : slot.end] = 0xFF

        out.append(fill)
    return out


def prepare(
    plan: Plan, storage: Storage, *, poison: bool = False, group: Group | None = None
) -> Callable[[], None]:
    """The step as a callable over fixed storage, by name of input and of returned value.

    group   the processes that take part, where there are several
    poison  fills every buffer with NaN bits before its first write, for tests
    """
    arena = torch.zeros(plan.arena_bytes, dtype=torch.uint8)
    held, moved = laid(plan, storage)
    tensor = buffers(plan, held, arena)
    program = watched(plan, calls(plan, tensor, group), tensor)
    fills = _poison(plan, arena) if poison else []

    @torch.no_grad()
    def run() -> None:
        for original, twin in moved:
            twin.copy_(original)
        with interpreted():
            for k, call in enumerate(program):
                if fills:
                    fills[k]()
                call()
        for original, twin in moved:
            original.copy_(twin)

    return run
