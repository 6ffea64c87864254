"""An equation taken apart into its anchors and the elementwise code around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from graphnet.ir.graph import Eqn, Value
from graphnet.ir.types import Layout, TensorType
from graphnet.lowering.launch.codegen import Epilogue, Index, Ref, write_epilogue
from graphnet.lowering.launch.problems import ANCHORS, problem_of, problem_of_region
from graphnet.lowering.launch.variants import Problem
from graphnet.passes.templates import anchors_of, members_of, normalised


def strides(prefix: str, type: TensorType) -> dict[str, int]:
    """The constexprs that say how an operand lies: XS0, XS1, ..."""
    return {f"{prefix}S{d}": s for d, s in enumerate(type.strides)}


@dataclass(frozen=True)
class Work:
    """An equation taken apart: anchors, the elementwise rest, and who is who outside.

    name    buffer of every operand and result, inner or outer
    stores  (inner value, outer value) of each result
    then    the batch normalization of a result, joined with this convolution: its kernel may keep
            the statistics. `whole` is the equation of both
    kept    of a batch normalization: (workspace, parts) of the statistics, where they were kept
    """

    eqn: Eqn
    anchors: tuple[Eqn, ...]
    rest: tuple[Eqn, ...]
    name: Mapping[Value, str]
    outer: Mapping[Value, Value]
    stores: tuple[tuple[Value, Value], ...]
    then: Work | None = None
    joined: Eqn | None = None
    kept: tuple[Ref, int] | None = None

    @property
    def whole(self) -> Eqn:
        """The equation, with what was joined with it."""
        return self.joined or self.eqn

    @property
    def anchor(self) -> Eqn:
        return self.anchors[0]

    @property
    def bias(self) -> Value | None:
        """The bias that a product adds, where it has one."""
        return self.anchor.inputs[2] if len(self.anchor.inputs) > 2 else None

    @cached_property
    def problem(self) -> Problem:
        """What a kernel for the equation is chosen for."""
        if len(self.members) > 1:
            return problem_of_region([anchors_of(m) for m in self.members])
        return problem_of(self.anchors, self.held)

    @cached_property
    def members(self) -> tuple[Eqn, ...]:
        """The equations of a region, or the equation itself."""
        return members_of(self.eqn)

    @property
    def layouts(self) -> dict[Value, Layout]:
        """How the operands and results of the anchors lie outside."""
        outer = {**self.outer, **dict(self.stores)}
        values = {v for a in self.anchors for v in (*a.inputs, *a.results)}
        return {v: outer.get(v, v).type.layout for v in values}

    @property
    def moved(self) -> int:
        """Bytes of the operands and results outside: what a kernel moves whose workspace stays in
        the second-level cache."""
        return sum(v.type.bytes for v in {*self.eqn.inputs, *self.eqn.results})

    @property
    def held(self) -> int:
        """How many tensors like the anchor's result the code behind it reads: what an update keeps
        in registers beside each accumulator."""
        made = {v for e in self.eqn.body.eqns for v in e.results} if self.eqn.body else set()
        reads = {v for e in self.rest for v in e.inputs} - made
        return sum(v.type.shape == self.anchor.results[0].type.shape for v in reads)

    def type(self, v: Value) -> TensorType:
        """The type of an operand, with the layout that it has outside."""
        return self.outer.get(v, v).type

    def ref(self, v: Value) -> Ref:
        return Ref(self.name[v], v.type.dtype.name)

    def keeping(
        self, inner: Value, layout: Layout
    ) -> tuple[Work, Value, tuple[tuple[str, int], ...]]:
        """(the work, the value outside that holds `inner`, scratch for it). What is no result goes
        to a workspace of this layout, which the work stores like one."""
        outer = dict(self.stores).get(inner)
        if outer is not None:
            return self, outer, ()
        held = Value(f".kept{self.eqn.results[0]}", inner.type.with_layout(layout))
        name = {**self.name, held: held.name}
        work = replace(self, stores=(*self.stores, (inner, held)), name=name)
        return work, held, ((held.name, held.type.bytes),)

    def epilogue(
        self, root: Value, index: Index, *, held: str = "acc", also: Value | None = None, **kw: Any
    ) -> Epilogue | None:
        """The code and the stores that stem from one anchor result; None if there are none."""
        roots = {root: held} | ({also: "aux"} if also is not None else {})
        stems, eqns = set(roots), []
        for e in self.rest:
            if stems & set(e.inputs):
                stems.update(e.results)
                eqns.append(e)
        stores = [(i, o) for i, o in self.stores if i in stems]
        if not stores:
            return None
        return write_epilogue(index, self.name, roots, eqns, stores, note=self.note, **kw)

    @property
    def note(self) -> str:
        e = self.anchors[0] if self.anchors else self.rest[0]
        return f"{e.op} {' '.join(str(v.type) for v in e.inputs)}"

    def middle(self, root: Value, wanted: Value, index: Index) -> Epilogue:
        """The code from `root`, a first anchor's result, to `wanted`, a second one's operand."""
        made = {v: e for e in self.rest for v in e.results}
        needed, todo = set(), [wanted]
        while todo:
            v = todo.pop()
            if v in made and made[v] not in needed:
                needed.add(made[v])
                todo.extend(made[v].inputs)
        eqns = [e for e in self.rest if e in needed]
        return write_epilogue(
            index, self.name, {root: "acc"}, eqns, (), note=self.note, returns=wanted
        )


def take_apart(eqn: Eqn, name: Callable[[Value], str]) -> Work:
    """`name` gives each value outside its buffer."""
    if (both := normalised(eqn)) is not None:
        first, second = (take_apart(e, name) for e in both)
        return replace(first, then=second, joined=eqn)
    eqns: tuple[Eqn, ...]
    outer: dict[Value, Value]
    if eqn.body is None:
        eqns, outer, stores = (eqn,), {}, tuple((v, v) for v in eqn.results)
    else:
        eqns = eqn.body.eqns
        outer = dict(zip(eqn.body.input_values, eqn.inputs, strict=True))
        stores = tuple(
            (i, o) for i, o in zip(eqn.body.returns, eqn.outputs, strict=True) if o is not None
        )
    names = {i: name(o) for i, o in outer.items()}
    names |= {v: name(v) for v in (*eqn.inputs, *eqn.results)}
    anchors = tuple(e for e in eqns if e.op in ANCHORS)
    rest = tuple(e for e in eqns if e.op not in ANCHORS)
    return Work(eqn, anchors, rest, names, outer, stores)
