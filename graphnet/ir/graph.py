"""Graphs: immutable, typed SSA with multi-result equations, and the builder that makes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from graphnet.errors import GraphError
from graphnet.ir.op import NO_ATTRS, Attrs, get_op
from graphnet.ir.types import TensorType

ROLES = ("data", "param", "buffer", "slot", "hyper", "counter", "derived")


@dataclass(frozen=True)
class Value:
    """A named, typed result or input. Names are unique in a graph and print as `%name`."""

    name: str
    type: TensorType

    def __hash__(self) -> int:
        return hash(self.name)  # the passes look values up by the million, and names differ

    def __str__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True)
class Input:
    """A graph input and what it is for (`ROLES`). `of` names the param that a slot or derived
    entry belongs to. Of state in several `parts` each rank holds one, along axis 0."""

    value: Value
    role: str = "data"
    of: str = ""
    parts: int = 1


@dataclass(frozen=True)
class Where:
    """Provenance: the layers, the DSL place, the pass that wrote the line. Never compared."""

    layers: tuple[str, ...] = ()
    place: str = ""
    by: str = ""

    def __str__(self) -> str:
        return "  ".join(filter(None, (", ".join(self.layers), self.place, self.by)))

    @property
    def located(self) -> dict[str, str | None]:
        """Layer and place, as an error takes them: `ShapeError(..., **where.located)`."""
        return {"layer": ", ".join(self.layers) or None, "where": self.place or None}

    def merged(self, other: Where, by: str = "") -> Where:
        layers = tuple(dict.fromkeys(self.layers + other.layers))
        return Where(layers, self.place or other.place, by or self.by)


NOWHERE = Where()


@dataclass(frozen=True)
class Eqn:
    """`outputs = op(inputs) {attrs}`; an unread optional result is None. `fused` has a body."""

    op: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value | None, ...]
    attrs: Attrs = NO_ATTRS
    body: Graph | None = None
    where: Where = field(default=NOWHERE, compare=False)

    @property
    def results(self) -> tuple[Value, ...]:
        """The results that are read."""
        return tuple(v for v in self.outputs if v is not None)

    @property
    def plain(self) -> tuple[Eqn, ...]:
        """The equations that it fuses, or itself alone."""
        return (self,) if self.body is None else self.body.eqns

    @property
    def out(self) -> Value:
        """The first result."""
        value = self.outputs[0]
        if value is None:
            raise GraphError(f"the first result of {self.op} is not read", layer=str(self.where))
        return value


@dataclass(frozen=True)
class Graph:
    """Inputs with roles, equations in order, state changes (`commits`) and what is returned."""

    name: str
    inputs: tuple[Input, ...]
    eqns: tuple[Eqn, ...]
    returns: tuple[Value, ...]
    commits: tuple[tuple[Value, Value], ...] = ()

    def __str__(self) -> str:
        from graphnet.ir.text import to_text

        return to_text(self)

    @property
    def input_values(self) -> tuple[Value, ...]:
        return tuple(i.value for i in self.inputs)

    def input(self, name: str) -> Input:
        """The input of that name."""
        for i in self.inputs:
            if i.value.name == name:
                return i
        raise GraphError(f"graph {self.name} has no input %{name}")

    # A graph does not change, so what is asked of it again and again is worked out once.

    @cached_property
    def producers(self) -> Mapping[Value, Eqn]:
        """Value to the equation that makes it."""
        return {v: e for e in self.eqns for v in e.results}

    @cached_property
    def readers(self) -> Mapping[Value, Sequence[Eqn]]:
        """Value to the equations that read it, in order, once each."""
        out: dict[Value, list[Eqn]] = {}
        for e in self.eqns:
            for v in dict.fromkeys(e.inputs):
                out.setdefault(v, []).append(e)
        return out

    @cached_property
    def escaping(self) -> frozenset[Value]:
        """Values that leave the graph: returned or committed."""
        return frozenset((*self.returns, *(new for _, new in self.commits)))


def substitute(eqn: Eqn, env: Mapping[Value, Value]) -> Eqn:
    """The equation with its inputs replaced."""
    return replace(eqn, inputs=tuple(env.get(v, v) for v in eqn.inputs))


def rename_body(body: Graph, outer: Sequence[Value]) -> Graph:
    """The body with its inputs named as the operands `outer`, interior names moved out of the way.

    This is the one form in which a body is kept, so that it prints with the names around it.
    """
    if len(body.inputs) != len(outer):
        raise GraphError(f"a body of {len(body.inputs)} inputs got {len(outer)} operands")
    if len(set(outer)) != len(outer):
        raise GraphError("an operand of a fused equation stands twice in its operands")
    env = {i.value: v for i, v in zip(body.inputs, outer, strict=True)}
    taken = {v.name for v in outer}
    eqns, count = [], 0
    for e in body.eqns:
        outs: list[Value | None] = []
        for v in e.outputs:
            if v is not None:
                name = chr(ord("a") + count % 26) + (str(count // 26) if count > 25 else "")
                while name in taken:
                    name += "_"
                taken.add(name)
                count += 1
                env[v] = Value(name, v.type)
            outs.append(None if v is None else env[v])
        eqns.append(replace(substitute(e, env), outputs=tuple(outs)))
    return Graph(
        "body", tuple(Input(v) for v in outer), tuple(eqns), tuple(env[v] for v in body.returns)
    )


class Builder:
    """Writes a graph. Result types come from each op's `infer`; names are made here."""

    def __init__(self, name: str, taken: Iterable[str] = ()) -> None:
        self.name = name
        self.inputs: list[Input] = []
        self.eqns: list[Eqn] = []
        self.commits: list[tuple[Value, Value]] = []
        self.where = NOWHERE
        self._taken = set(taken)
        self._next = 0

    def fresh(self, hint: str = "") -> str:
        """A name not used before: the hint if it is free, else a number (behind the hint)."""
        if hint and hint not in self._taken:
            self._taken.add(hint)
            return hint
        while True:
            name = f"{hint}_{self._next}" if hint else str(self._next)
            self._next += 1
            if name not in self._taken:
                self._taken.add(name)
                return name

    def input(
        self, name: str, type: TensorType, role: str = "data", of: str = "", parts: int = 1
    ) -> Value:  # fmt: skip
        """Adds a graph input."""
        if role not in ROLES:
            raise GraphError(f"unknown role {role!r}", help=f"roles: {', '.join(ROLES)}")
        if any(i.value.name == name for i in self.inputs):
            raise GraphError(f"input %{name} exists twice in graph {self.name}")
        self._taken.add(name)
        value = Value(name, type)
        self.inputs.append(Input(value, role, of, parts))
        return value

    def emit(
        self,
        op: str,
        inputs: Sequence[Value],
        attrs: Attrs | None = None,
        *,
        unread: Iterable[int] = (),
        body: Graph | None = None,
        where: Where | None = None,
        names: Sequence[str] = (),
    ) -> tuple[Value | None, ...]:
        """Appends an equation and returns its results; results in `unread` become None."""
        spec = get_op(op)
        attrs = spec.attrs_type() if attrs is None else attrs
        if body is not None:
            body = rename_body(body, inputs)
            types = tuple(v.type for v in body.returns)
        else:
            types = spec.infer(attrs, *(v.type for v in inputs))
        skip = set(unread)
        outs = tuple(
            None if i in skip else Value(self.fresh(names[i] if i < len(names) else ""), t)
            for i, t in enumerate(types)
        )
        where = self.where if where is None else where
        self.eqns.append(Eqn(op, tuple(inputs), outs, attrs, body, where))
        return outs

    def one(self, op: str, *inputs: Value, attrs: Attrs | None = None, **kw) -> Value:
        """`emit` for an op whose first result is wanted."""
        out = self.emit(op, inputs, attrs, **kw)[0]
        if out is None:
            raise GraphError(f"the first result of {op} is not read")
        return out

    def append(self, eqn: Eqn, env: dict[Value, Value]) -> None:
        """Copies an equation under `env`, re-deriving its types, and extends `env`."""
        unread = [i for i, v in enumerate(eqn.outputs) if v is None]
        names = [v.name if v is not None else "" for v in eqn.outputs]
        outs = self.emit(
            eqn.op, [env.get(v, v) for v in eqn.inputs], eqn.attrs,
            unread=unread, body=eqn.body, where=eqn.where, names=names,
        )  # fmt: skip
        for old, new in zip(eqn.outputs, outs, strict=True):
            if old is not None and new is not None:
                env[old] = new

    def commit(self, target: Value, value: Value) -> None:
        """At the end of the step the input `target` becomes `value`."""
        self.commits.append((target, value))

    def build(self, *returns: Value) -> Graph:
        return Graph(
            self.name, tuple(self.inputs), tuple(self.eqns), tuple(returns), tuple(self.commits)
        )
