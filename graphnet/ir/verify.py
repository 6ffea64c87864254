"""The verifier: run after every pass, it re-derives what a graph claims about itself."""

from __future__ import annotations

from graphnet.errors import GraphError, GraphnetError
from graphnet.ir.graph import ROLES, Eqn, Graph, Value
from graphnet.ir.op import get_op
from graphnet.ir.text import eqn_text

STAGES = ("traced", "joint", "fused", "plan")
_BODY = "body"  # of a fused equation


def _neighbourhood(graph: Graph, at: int, span: int = 2) -> str:
    lines = []
    for i in range(max(0, at - span), min(len(graph.eqns), at + span + 1)):
        lines.append(f"{'-> ' if i == at else '   '}{eqn_text(graph.eqns[i])}")
    return "\n".join(lines)


def _fail(graph: Graph, at: int, message: str) -> GraphError:
    where = graph.eqns[at].where
    return GraphError(
        f"graph {graph.name}: {message}\n{_neighbourhood(graph, at)}",
        **where.located,
    )


def _vocabulary(eqn: Eqn, stage: str) -> str | None:
    """Why the op may not stand at this stage, or None."""
    backward = eqn.op.endswith(("_grad", "grad")) or eqn.op.endswith("_update")
    if stage == "traced" and (backward or eqn.op == "record_step"):
        return f"{eqn.op} is written by autodiff and cannot stand in a traced graph"
    if eqn.op == "fused" and stage == _BODY:
        return "a body holds no fused equation"
    if stage in ("traced", "joint") and eqn.op in ("fused", "relayout"):
        return f"{eqn.op} comes after the {stage} stage"
    return None


def _missed_fusion(graph: Graph, eqn: Eqn) -> str | None:
    """In the fused stage a bare function behind a single-use product is a missed fusion."""
    if not get_op(eqn.op).joins or len(eqn.inputs) != 1:
        return None
    made = graph.producers.get(eqn.inputs[0])
    if made is None or made.op not in ("conv2d", "linear"):
        return None
    if eqn.inputs[0] in graph.escaping or len(graph.readers[eqn.inputs[0]]) > 1:
        return None
    return f"{eqn.op} of a {made.op} that nobody else reads was not fused"


def _rows_missing(graph: Graph, eqn: Eqn) -> str | None:
    """What reduces over the batch must be told how many of its rows are live."""
    for e in eqn.plain:
        at = get_op(e.op).over_batch
        if at is None:
            continue
        given = {i.value for i in graph.inputs if i.role != "hyper"}
        if len(e.inputs) <= at or e.inputs[at] in given:
            return f"{e.op} reduces over the batch: its operand {at + 1} must be %live"
    return None


def _check_types(eqn: Eqn) -> str | None:
    if eqn.body is not None:
        outer = tuple(v.type for v in eqn.inputs)
        inner = tuple(i.value.type for i in eqn.body.inputs)
        if outer != inner:
            return f"operands {list(map(str, outer))} meet a body for {list(map(str, inner))}"
        derived = tuple(v.type for v in eqn.body.returns)
    else:
        derived = get_op(eqn.op).infer(eqn.attrs, *(v.type for v in eqn.inputs))
    if len(derived) != len(eqn.outputs):
        return f"{eqn.op} has {len(derived)} results, the line names {len(eqn.outputs)}"
    for want, value in zip(derived, eqn.outputs, strict=True):
        # Layouts are the layout pass's to choose; dtype and shape follow from the operands.
        if value is not None and want.with_layout(value.type.layout) != value.type:
            return f"{value} is written as {value.type}, derived as {want}"
    return None


def verify(graph: Graph, stage: str, *, fusing: bool = True) -> Graph:
    """Checks single assignment, order, types, vocabulary and commits; returns the graph.

    `fusing=False` accepts missed fusions in the fused stage (for ablation).
    """
    if stage not in (*STAGES, _BODY):
        raise GraphError(f"unknown stage {stage!r}", help=f"stages: {', '.join(STAGES)}")
    known: set[Value] = set()
    names: set[str] = set()
    for i in graph.inputs:
        if i.role not in ROLES:
            raise GraphError(f"input {i.value} has the unknown role {i.role!r}")
        if i.value.name in names:
            raise GraphError(f"graph {graph.name}: input {i.value} exists twice")
        names.add(i.value.name)
        known.add(i.value)
    for at, eqn in enumerate(graph.eqns):
        for v in eqn.inputs:
            if v not in known:
                raise _fail(graph, at, f"{v}: {v.type} is read before it is written")
        try:
            problem = _vocabulary(eqn, stage) or _check_types(eqn)
        except GraphnetError as error:
            raise _fail(graph, at, str(error)) from error
        if problem is None and stage != _BODY:
            problem = _rows_missing(graph, eqn)
        if problem is None and stage in ("fused", "plan") and fusing:
            problem = _missed_fusion(graph, eqn)
        if problem is None and eqn.body is not None:
            verify(eqn.body, _BODY, fusing=fusing)
        for k, value in enumerate(eqn.outputs):
            if value is None:
                if eqn.body is not None or k not in get_op(eqn.op).optional:
                    problem = problem or f"result {k} of {eqn.op} is not optional"
            elif value.name in names:
                problem = problem or f"{value} is written twice"
            else:
                names.add(value.name)
                known.add(value)
        if problem:
            raise _fail(graph, at, problem)
    _check_ends(graph, known)
    return graph


def _check_ends(graph: Graph, known: set[Value]) -> None:
    inputs = {i.value: i for i in graph.inputs}
    for v in (*graph.returns, *(new for _, new in graph.commits)):
        if v not in known:
            raise GraphError(f"graph {graph.name}: {v} leaves the graph but is never written")
    seen: set[Value] = set()
    for old, new in graph.commits:
        if old not in inputs or inputs[old].role == "data":
            raise GraphError(f"graph {graph.name}: commit to {old}, which is no state input")
        if old in seen:
            raise GraphError(f"graph {graph.name}: {old} is committed twice")
        if (old.type.dtype, old.type.shape) != (new.type.dtype, new.type.shape):
            raise GraphError(
                f"graph {graph.name}: commit {old}: {old.type} = {new}: {new.type}",
                help="a committed value has the type of the state that it replaces",
            )
        seen.add(old)
