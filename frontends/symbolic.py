"""Symbolic values: what `forward` computes with while a net is traced.

A `Symbol` stands for one value of the graph under construction. Layers and the functions below
append equations to the active `Tracer`; nothing is computed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import graphnet.ops  # noqa: F401  fills the op registry
from graphnet.errors import ConfigError, ShapeError, UnsupportedOpError
from graphnet.ir.graph import Builder, Value, Where
from graphnet.ir.op import get_op
from graphnet.ir.types import Shape

if TYPE_CHECKING:
    from graphnet.frontends.dsl import Module, Parameter


def user_place() -> str:
    """`file:line` of the nearest frame outside graphnet; the model files count as outside."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        inside = module == "graphnet" or module.startswith("graphnet.")
        if not inside or module.startswith("graphnet.frontends.models."):
            return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


_ACTIVE: ContextVar[Tracer | None] = ContextVar("graphnet_tracer", default=None)


class Tracer:
    """Writes the graph of one net: the builder, the layer being called, the lazy inputs."""

    def __init__(self, builder: Builder, names: dict[Module, str], *, training: bool) -> None:
        self.b = builder
        self.names = names
        self.training = training
        self.params: dict[Parameter, Value] = {}
        self.batch = 0
        self.lazy: dict[str, Value] = {}
        self.stack: list[Module] = []
        self.calls: dict[Module, int] = {}
        self._used = set(names.values())

    @contextmanager
    def active(self) -> Iterator[None]:
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def unique(self, kind: str) -> str:
        """The next free display name of that kind, for functions called inside `forward`."""
        at = 1
        while f"{kind}{at}" in self._used:
            at += 1
        self._used.add(f"{kind}{at}")
        return f"{kind}{at}"

    def param(self, p: Parameter) -> Value:
        """The graph input of a parameter."""
        try:
            return self.params[p]
        except KeyError:
            raise ConfigError(
                f"a parameter of shape {list(p.shape)} is used in forward but belongs to no "
                "attribute of the net",
                help="layers in a plain list are not registered: put them into gn.Sequential",
            ) from None

    def value(self, x: Any) -> Value:
        """The graph value of a symbol, a parameter or a number."""
        from graphnet.frontends.dsl import Parameter

        if isinstance(x, Symbol):
            if x.tracer is not self:
                raise ConfigError("a symbolic value of another trace was used in forward")
            return x.value
        if isinstance(x, Parameter):
            return self.param(x)
        if isinstance(x, (int, float)):
            attrs = get_op("full").attrs_type(value=float(x), shape=(), dtype="f32")  # type: ignore[call-arg]
            return self.b.one("full", attrs=attrs)
        raise ConfigError(
            f"forward mixes symbolic values with a {type(x).__name__}",
            help="use symbolic values, gn.Parameter and Python numbers",
        )

    def emit(self, op: str, operands: Sequence[Any], kind: str = "", **attrs: Any) -> Symbol:
        """Appends `op` and returns its first result.

        Inside a layer the line carries the layer's name; a function called straight from
        `forward` (`kind` given) gets a name of its own and the place of the call.
        """
        layer = self.stack[-1] if self.stack else None
        if layer is not None and layer in self.names:
            self.b.where = Where((self.names[layer],), layer.place)
        else:
            self.b.where = Where((self.unique(kind or op),), user_place())
        values = [self.value(x) for x in operands]
        spec = get_op(op)
        unread = spec.optional
        made = self.b.emit(op, values, spec.attrs_type(**attrs), unread=unread)[0]
        assert made is not None  # no op has an optional first result
        return Symbol(self, made)


def active_tracer(what: str) -> Tracer:
    """The tracer of the trace in progress; ConfigError outside one."""
    tracer = _ACTIVE.get()
    if tracer is None:
        raise ConfigError(
            f"{what} was called outside a trace",
            help="nets are compiled first: gn.compile(net, x.shape)(x)",
        )
    return tracer


class Symbol:
    """One value of the graph being traced: it has a `shape`, and `+`, `*` and slices make more."""

    __slots__ = ("tracer", "value")
    __array_priority__ = 1000

    def __init__(self, tracer: Tracer, value: Value) -> None:
        self.tracer = tracer
        self.value = value

    @property
    def shape(self) -> Shape:
        return self.value.type.shape

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def _binary(self, op: str, other: Any) -> Symbol:
        a, b = self, other
        if isinstance(other, Symbol) and self.shape == () and other.shape != ():
            a, b = other, self  # the scalar stands second
        return self.tracer.emit(op, [a, b], kind=op)

    def __add__(self, other: Any) -> Symbol:
        return self._binary("add", other)

    def __mul__(self, other: Any) -> Symbol:
        return self._binary("mul", other)

    __radd__ = __add__
    __rmul__ = __mul__

    def __getitem__(self, index: Any) -> Symbol:
        items = index if isinstance(index, tuple) else (index,)
        if Ellipsis in items:
            at = items.index(Ellipsis)
            fill = (slice(None),) * (self.ndim - len(items) + 1)
            items = items[:at] + fill + items[at + 1 :]
        if len(items) > self.ndim:
            raise ShapeError(f"{len(items)} indices for a value of shape {list(self.shape)}")
        out = self
        for axis, item in enumerate(items):
            if not isinstance(item, slice) or item.step not in (None, 1):
                raise UnsupportedOpError(
                    f"index {item!r} on axis {axis}: only slices with step 1 can be traced",
                    where=user_place(),
                    help="write x[:, a:b]",
                )
            size = self.shape[axis]
            start, stop, _ = item.indices(size)
            if start >= stop:
                raise ShapeError(
                    f"slice {start}:{stop} of axis {axis} is empty (size {size})",
                    where=user_place(),
                )
            if (start, stop) != (0, size):
                out = out.tracer.emit("slice", [out], axis=axis, start=start, stop=stop)
        return out

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Symbol:
        return flatten(self, start_dim, end_dim)

    def reshape(self, *shape: Any) -> Symbol:
        """The same elements in another shape; one size may be -1."""
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        total, known = self.value.type.numel, 1
        for s in sizes:
            known *= 1 if s == -1 else s
        full = tuple(total // max(known, 1) if s == -1 else s for s in sizes)
        return self.tracer.emit("reshape", [self], shape=full)

    view = reshape

    def _concrete(self, *_: Any) -> Any:
        raise UnsupportedOpError(
            "forward runs once on symbolic values: it cannot branch on data or read numbers",
            where=user_place(),
            help="branch on shapes or on attributes of the module instead",
        )

    __bool__ = __float__ = __int__ = __iter__ = __index__ = _concrete

    def __repr__(self) -> str:
        return f"Symbol({self.value}: {self.value.type})"


def _unary(op: str, x: Any) -> Symbol:
    return active_tracer(f"gn.{op}").emit(op, [x], kind=op)


def relu(x: Symbol) -> Symbol:
    """max(x, 0), element by element."""
    return _unary("relu", x)


def tanh(x: Symbol) -> Symbol:
    """Hyperbolic tangent, element by element."""
    return _unary("tanh", x)


def sigmoid(x: Symbol) -> Symbol:
    """1 / (1 + exp(-x)), element by element."""
    return _unary("sigmoid", x)


def cat(tensors: Sequence[Symbol], dim: int = 0) -> Symbol:
    """Values joined along axis `dim`; their other sizes must agree."""
    tensors = list(tensors)
    if not tensors:
        raise ShapeError("gn.cat of no values", where=user_place())
    axis = _axis(dim, tensors[0].ndim)
    return active_tracer("gn.cat").emit("concat", tensors, kind="cat", axis=axis)


def flatten(x: Symbol, start_dim: int = 0, end_dim: int = -1) -> Symbol:
    """Axes start_dim..end_dim (both included) joined into one, as torch.flatten."""
    first, last = _axis(start_dim, x.ndim), _axis(end_dim, x.ndim)
    if first > last:
        raise ShapeError(f"flatten: start_dim {start_dim} comes after end_dim {end_dim}")
    joined = 1
    for s in x.shape[first : last + 1]:
        joined *= s
    shape = (*x.shape[:first], joined, *x.shape[last + 1 :])
    if shape == x.shape:
        return x
    return x.tracer.emit("reshape", [x], kind="flatten", shape=shape)


def _axis(dim: int, ndim: int) -> int:
    if not -ndim <= dim < ndim:
        raise ShapeError(f"axis {dim} of a value with {ndim} dimensions", where=user_place())
    return dim % ndim
