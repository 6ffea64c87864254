"""The trace in progress: what symbolic values write their equations to."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import graphnet.ops  # noqa: F401  fills the op registry
from graphnet.errors import ConfigError, GraphnetError, ShapeError
from graphnet.frontends.foreign import called
from graphnet.ir.graph import Builder, Value, Where
from graphnet.ir.op import get_op

if TYPE_CHECKING:
    from graphnet.frontends.dsl import Module
    from graphnet.frontends.held import Held
    from graphnet.frontends.symbolic import Symbol


def user_place() -> str:
    """`file:line` of the nearest frame outside graphnet and torch; the model files count as
    outside."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        inside = module.split(".")[0] in ("graphnet", "torch")
        if not inside or module.startswith("graphnet.frontends.models."):
            return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


_ACTIVE: ContextVar[Tracer | None] = ContextVar("graphnet_tracer", default=None)


class Tracer:
    """Writes the graph of one net: the builder, the layer being called, the lazy inputs.

    names, paths  display name and attribute path of each layer
    rows          values whose axis 0 is the batch
    place         where a function is called that an importer calls for others; "" for the user's
    """

    def __init__(
        self, builder: Builder, names: dict[Module, str], paths: dict[Module, str], *,
        training: bool,
    ) -> None:  # fmt: skip
        self.b = builder
        self.names = names
        self.paths = paths
        self.training = training
        self.held: dict[Held, Value] = {}  # parameters and buffers, as they are by now
        self.commits: dict[Held, Value] = {}  # what replaces a buffer
        self.batch = self.global_batch = 0  # rows here, and on all ranks
        self.joint_ranks = 1  # over which batch normalization joins its statistics
        self.rows: set[Value] = set()
        self.lazy: dict[str, Value] = {}
        self.stack: list[Module] = []
        self.calls: dict[Module, int] = {}
        self.place = ""
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

    def kept(self, p: Held) -> Value:
        """The graph's value of a parameter or a buffer."""
        try:
            return self.held[p]
        except KeyError:
            raise ConfigError(
                f"a {p.title} of shape {list(p.shape)} is used in forward but belongs to no "
                "attribute of the net",
                help="layers in a plain list are not registered: put them into gn.Sequential",
            ) from None

    def replace(self, p: Held, value: Value) -> None:
        """From here on a buffer is `value`; a training step keeps it."""
        before = self.kept(p).type
        if (before.shape, before.dtype) != (value.type.shape, value.type.dtype):
            raise ShapeError(
                f"a buffer of type {before} cannot become {value.type}", where=user_place() or None
            )
        if self.training:
            self.held[p] = self.commits[p] = value

    def value(self, x: Any) -> Value:
        """The graph value of a symbol, a parameter or a number."""
        from graphnet.frontends.held import Held
        from graphnet.frontends.symbolic import Symbol

        if isinstance(x, Symbol):
            if x.tracer is not self:
                raise ConfigError("a symbolic value of another trace was used in forward")
            return x.value
        if isinstance(x, Held):
            return self.kept(x)
        if isinstance(x, (int, float)):
            attrs = get_op("full").attrs_type(value=float(x), shape=(), dtype="f32")  # type: ignore[call-arg]
            return self.b.one("full", attrs=attrs)
        raise mixed(x)

    def emit(self, op: str, operands: Sequence[Any], kind: str = "", **attrs: Any) -> Symbol:
        """Appends `op` and returns its first result.

        Inside a layer the line carries the layer's name; a function called straight from
        `forward` (`kind` given) gets a name of its own and the place of the call.
        """
        return self.emit_all(op, operands, kind, **attrs)[0]

    def emit_all(
        self, op: str, operands: Sequence[Any], kind: str = "", optional: bool = False, **attrs: Any
    ) -> list[Symbol]:
        """The same with all results, the optional ones only where they are asked for."""
        from graphnet.frontends.symbolic import Symbol

        layer = self.stack[-1] if self.stack else None
        if layer is not None and layer in self.names:
            self.b.where = Where((self.names[layer],), layer.place)
        else:
            self.b.where = Where((self.unique(kind or op),), self.place or user_place())
        values = [self.value(x) for x in operands]
        spec = get_op(op)
        try:
            unread = () if optional else spec.optional
            made = self.b.emit(op, values, spec.attrs_type(**attrs), unread=unread)
            results = [v for v in made if v is not None]  # the first one is never optional
            if spec.over_batch is None or made[0].type.shape == values[0].type.shape:  # type: ignore[union-attr]
                self._keep_rows(kind or op, values, results[0])
        except GraphnetError as error:
            if isinstance(error, ShapeError) and len(values) > 1 and spec.elementwise:
                error.message += f" ({self._origins(operands, values)})"
            if not error.layer:
                error.layer = self.b.where.located["layer"]
                error.path = self.paths.get(layer) if layer in self.names else None
            error.where = error.where or self.b.where.place or None
            raise
        return [Symbol(self, v) for v in results]

    def _origins(self, operands: Sequence[Any], values: Sequence[Value]) -> str:
        """What the operands are: "[2,8,4,4] of conv1 net.py:12; [2,4,4,4] of conv2 net.py:13"."""
        made = {v: e.where for e in self.b.eqns for v in e.results}
        said = []
        for x, v in zip(operands, values, strict=True):
            at = made.get(v)
            named = f"{', '.join(at.layers)} {at.place}".strip() if at is not None else ""
            if isinstance(x, (int, float)) or x in self.held:
                named = f"parameter {v.name}" if x in self.held else f"the number {x}"
            said.append(f"{list(v.type.shape)} of {named or 'the input'}")
        return "; ".join(said)

    def _keep_rows(self, what: str, values: Sequence[Value], made: Value) -> None:
        """ShapeError where a result of rows of the batch has other rows: what is computed for an
        image must not depend on its place in the batch, which may be filled in part."""
        rows = next((v for v in values if v in self.rows), None)
        if rows is None:
            return
        before, after = rows.type.shape, made.type.shape
        if after[:1] != (self.batch,):
            raise ShapeError(
                f"{what} makes {list(after)} of {list(before)}: axis 0 is the batch, and its "
                f"{self.batch} rows would become {after[0] if after else 1}",
                help="keep axis 0: x.reshape(x.shape[0], ...), gn.flatten(x, 1), x[:, a:b], "
                "gn.cat([x, y], 1)",
            )
        self.rows.add(made)


def tracing() -> Tracer | None:
    """The tracer of the trace in progress, if there is one."""
    return _ACTIVE.get()


def active_tracer(what: str) -> Tracer:
    """The tracer of the trace in progress; ConfigError outside one."""
    tracer = _ACTIVE.get()
    if tracer is None:
        raise ConfigError(
            f"{what} was called outside a trace",
            help="nets are compiled first: gn.compile(net, x.shape)(x)",
        )
    return tracer


def mixed(x: Any) -> ConfigError:
    """The error where `forward` meets what is neither symbolic nor a number."""
    return ConfigError(
        f"forward mixes symbolic values with {called(x)}", where=user_place() or None,
        help="use symbolic values, gn.Parameter(tensor) as an attribute, and Python numbers",
    )  # fmt: skip
