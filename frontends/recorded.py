"""What the forward of a torch module does, as a list of calls, and the net that makes them.

torch.fx records the calls, with the line of the user's file that makes each; our `forward` makes
the same calls on symbolic values. Sizes are read then, so one list serves all shapes.
"""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx

from graphnet.errors import ConfigError, GraphnetError, UnsupportedOpError
from graphnet.frontends.dsl import Module
from graphnet.frontends.symbolic import Symbol
from graphnet.frontends.tracer import active_tracer, user_place


@dataclass(frozen=True)
class Ref:
    """The result of an earlier call, by its name."""

    name: str


@dataclass(frozen=True)
class Call:
    """One line of a recorded forward.

    what    the attribute path of a layer or a parameter, or a function
    over    names whose value it overwrites: torch's `inplace`
    """

    name: str
    what: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    over: str = ""
    place: str = ""


class TorchNet(Module):
    """A converted net. It has the submodules and keys of its original, and makes its calls."""

    def __init__(self) -> None:
        self._calls: dict[bool, list[Call]] = {}  # by whether it trains

    def forward(self, x: Symbol) -> Any:
        tracer = active_tracer(type(self).__name__)
        made = dict(self.named_modules())
        held = dict(self._keys())
        env: dict[str, Any] = {}

        def value(a: Any) -> Any:
            return env[a.name] if isinstance(a, Ref) else a

        try:
            for c in self._calls[tracer.training]:
                tracer.place = c.place
                args, kwargs = mapped(c.args, value), mapped(c.kwargs, value)
                if c.what is None:  # the input, or what is returned
                    env[c.name] = args[0] if args else x
                elif isinstance(c.what, str):
                    given = (*args, *kwargs.values())
                    env[c.name] = made[c.what](*given) if c.what in made else held[c.what]
                else:
                    env[c.name] = _called(c, args, kwargs)
                if c.over:
                    old = env[c.over]
                    env.update({n: env[c.name] for n, v in env.items() if v is old})
        finally:
            tracer.place = ""
        return env["output"]


def _called(c: Call, args: Any, kwargs: Any) -> Any:
    try:
        return c.what(*args, **kwargs)
    except TypeError as error:  # an argument of torch's that the function does not have
        raise UnsupportedOpError(
            f"{title(c.what)} as it is called here: {error}", where=c.place or None
        ) from error


def mapped(x: Any, value: Any) -> Any:
    """Nested arguments with `value` applied to what they hold."""
    if isinstance(x, tuple):
        return tuple(mapped(v, value) for v in x)
    if isinstance(x, list):
        return [mapped(v, value) for v in x]
    if isinstance(x, dict):
        return {k: mapped(v, value) for k, v in x.items()}
    if isinstance(x, slice):
        return slice(*(mapped(v, value) for v in (x.start, x.stop, x.step)))
    return value(x)


class Identity(Module):
    """Its input."""

    def forward(self, x: Symbol) -> Symbol:
        return x


def record(module: torch.nn.Module, training: bool) -> torch.fx.Graph:
    """The calls of its forward in one mode; UnsupportedOpError where it cannot be recorded."""
    tracer = _Tracer()
    with _mode(module, training):
        try:
            return tracer.trace(module, _further(module))
        except GraphnetError:
            raise
        except Exception as error:
            raise UnsupportedOpError(
                f"forward of {type(module).__name__} cannot be recorded: "
                f"{type(error).__name__}: {error}",
                where=_last_place(error),
                help="it runs once on values without numbers: branch on attributes of the module "
                "instead of on data or sizes, and keep such parts in torch",
            ) from error


class _Tracer(torch.fx.Tracer):
    """Records each call with the line of the user's file that makes it."""

    def create_node(self, *args: Any, **kwargs: Any) -> torch.fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["place"] = user_place()
        return node

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return is_layer(m)

    def to_bool(self, obj: torch.fx.Proxy) -> bool:
        """What an `assert` asks for holds: shapes are checked when the net is traced."""
        frame = sys._getframe(1)
        while frame.f_globals.get("__name__", "").split(".")[0] == "torch":
            assert frame.f_back is not None
            frame = frame.f_back
        code = [i for i in dis.get_instructions(frame.f_code) if i.offset >= frame.f_lasti]
        code = [i for i in code if not i.opname.startswith(("POP_JUMP", "TO_BOOL", "COMPARE"))]
        if code and "assert" in f"{code[0].opname} {code[0].argval}".lower():
            return True  # next it would load AssertionError
        return super().to_bool(obj)  # type: ignore[no-any-return]


def is_layer(m: torch.nn.Module) -> bool:
    """Whether a module is one of torch's own layers, not a container or a class of the user's."""
    containers = (torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict)
    own = type(m).__module__.startswith(("torch.nn", "torch.ao.nn"))
    return own and not isinstance(m, containers)


def _further(module: torch.nn.Module) -> dict[str, Any]:
    """The arguments of forward behind the batch, at their defaults; ConfigError without one."""
    given: dict[str, Any] = {}
    for at, (name, p) in enumerate(inspect.signature(module.forward).parameters.items()):
        if at == 0 or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        if p.default is p.empty:
            raise ConfigError(
                f"forward of {type(module).__name__} takes {name!r} beside the batch",
                help="a net takes one batch of images: give the others a default",
            )
        given[name] = p.default
    return given


@contextmanager
def _mode(module: torch.nn.Module, training: bool) -> Iterator[None]:
    """The module in training or inference; afterwards each part is as it was."""
    before = {m: m.training for m in module.modules()}
    if training != module.training:
        module.train(training)
    try:
        yield
    finally:
        for m, mode in before.items():
            m.training = mode


def title(function: Any) -> str:
    """What an error calls a function of torch's: "F.relu"."""
    name = getattr(function, "__name__", str(function))
    room = str(getattr(function, "__module__", "") or "torch").removeprefix("torch._C._")
    return f"{'F' if room in ('torch.nn.functional', 'nn') else room}.{name}"


def _last_place(error: BaseException) -> str | None:
    """`file:line` of the innermost frame of an error that is neither ours nor torch's."""
    place, tb = None, error.__traceback__
    while tb is not None:
        room = tb.tb_frame.f_globals.get("__name__", "").split(".")[0]
        if room not in ("torch", "graphnet"):
            name = tb.tb_frame.f_code.co_filename.rpartition("/")[2]
            place = f"{name}:{tb.tb_lineno}"
        tb = tb.tb_next
    return place
