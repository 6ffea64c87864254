"""The tasks that the cpu target runs over a flat environment, and the graph without its bodies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graphnet.ir.graph import Eqn, Graph, Value
from graphnet.ir.op import get_op

Env = list[Any]
Call = Callable[[Env], None]
Slot = Callable[[Value], int]


@dataclass
class Task:
    """One call: what it reads and writes, so that values can be dropped after their last use.

    make   given the place of each value in the environment, the call
    eqns   the equations that it does
    """

    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    make: Callable[[Slot], Call]
    eqns: tuple[Eqn, ...] = ()


def only_f32(*values: Value) -> bool:
    return all(v.type.dtype.name == "f32" for v in values)


def symmetric(attrs: Any) -> bool:
    """Whether torch can express the padding."""
    t, b, le, r = attrs.padding
    return (t, le) == (b, r)


def flatten(graph: Graph) -> list[Eqn]:
    """Bodies inlined, every value under a name of its own."""
    out: list[Eqn] = []
    for at, eqn in enumerate(graph.eqns):
        if eqn.body is None:
            out.append(eqn)
            continue
        env = dict(zip(eqn.body.input_values, eqn.inputs, strict=True))
        env.update(zip(eqn.body.returns, eqn.results, strict=True))
        for k, e in enumerate(eqn.body.eqns):
            for j, v in enumerate(e.outputs):
                if v is not None and v not in env:
                    env[v] = Value(f".{at}.{k}.{j}", v.type)
            outs = tuple(None if v is None else env[v] for v in e.outputs)
            out.append(Eqn(e.op, tuple(env[v] for v in e.inputs), outs, e.attrs, None, eqn.where))
    return out


def generic(eqn: Eqn, fn: Callable[..., Any] | None = None) -> Task:
    """The op's cpu twin, or what is given in its place."""
    attrs = eqn.attrs
    fn = fn or get_op(eqn.op).cpu

    def make(slot: Slot) -> Call:
        ins = [slot(v) for v in eqn.inputs]
        outs = [None if v is None else slot(v) for v in eqn.outputs]

        def call(env: Env) -> None:
            for at, value in zip(outs, fn(attrs, *[env[i] for i in ins]), strict=False):
                if at is not None:
                    env[at] = value

        return call

    return Task(eqn.inputs, eqn.results, make, (eqn,))


def in_order(tasks: list[Task], given: set[Value]) -> list[Task]:
    """A merged task may read what a later one writes: the tasks, stably, in a legal order."""
    ready, out = set(given), []
    while tasks:
        rest = []
        for t in tasks:
            if all(v in ready for v in t.reads):
                ready.update(t.writes)
                out.append(t)
            else:
                rest.append(t)
        assert len(rest) < len(tasks), "a peephole closed a cycle"
        tasks = rest
    return out
