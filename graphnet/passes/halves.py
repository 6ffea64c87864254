"""A fused joint graph in two: the forward pass, and the backward pass from given cotangents.

The split comes after all passes, so that both halves are fused and laid out as one graph. What the
forward pass computes and the backward pass reads is returned by the one and an input of the other,
in the layout that it has.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from graphnet.errors import GraphError
from graphnet.ir.graph import Eqn, Graph, Input, Value
from graphnet.ir.verify import verify

_VIEWS = ("reshape",)  # made again from their operand, which is kept in their place


def halves(fused: Graph, results: int) -> tuple[Graph, Graph]:
    """(forward, backward) of the graph of `pullback` behind all passes.

    results  how many of its returned values are the forward pass's own

    forward returns these, then what is kept; backward takes what is kept under the same names,
    inputs of the forward pass that it reads, and the cotangents, and returns the gradients.
    """
    own, gradients = fused.returns[:results], fused.returns[results:]
    made = fused.producers
    first = _ancestors(made, [*own, *(new for _, new in fused.commits)])
    then = [e for e in fused.eqns if id(e) not in first]
    before = {v for e in fused.eqns if id(e) in first for v in e.results}
    read = {v for e in then for v in e.inputs} | set(gradients)
    again: list[Eqn] = []
    for e in reversed(fused.eqns):
        if id(e) in first and e.op in _VIEWS and e.out in read and e.out not in own:
            again.insert(0, e)
            read = (read - {e.out}) | set(e.inputs)
    kept = tuple(v for e in fused.eqns for v in e.results if v in before and v in read)
    stem = fused.name.split(".")[0]
    forward = Graph(
        f"{stem}.forward", _read(fused.inputs, first, fused),
        tuple(e for e in fused.eqns if id(e) in first),
        (*own, *(v for v in kept if v not in own)), fused.commits,
    )  # fmt: skip
    behind = {v for e in (*again, *then) for v in e.inputs} | set(gradients)
    state = {old for old, _ in fused.commits}
    if lost := [str(v) for v in behind & state]:
        raise GraphError(f"the backward pass reads state that the forward pass replaces: {lost}")
    inputs = [i for i in fused.inputs if i.value in behind]
    inputs += [Input(v, "data") for v in kept]
    backward = Graph(f"{stem}.backward", tuple(inputs), (*again, *then), gradients)
    return verify(forward, "fused", fusing=False), verify(backward, "fused", fusing=False)


def _ancestors(made: Mapping[Value, Eqn], roots: Sequence[Value]) -> set[int]:
    """The equations that these values come from, by id."""
    found: set[int] = set()
    todo = list(roots)
    while todo:
        e = made.get(todo.pop())
        if e is not None and id(e) not in found:
            found.add(id(e))
            todo += e.inputs
    return found


def _read(inputs: Sequence[Input], eqns: Collection[int], graph: Graph) -> tuple[Input, ...]:
    """The inputs that some of the equations read, that are returned or committed, and x."""
    read = {v for e in graph.eqns if id(e) in eqns for v in e.inputs} | set(graph.returns)
    read |= {v for pair in graph.commits for v in pair}
    return tuple(i for i in inputs if i.value in read or i.value.name == "x")
