"""Which fused bodies one kernel can run. Pure IR, so that fusing and layout can ask.

A kernel has one anchor, the op whose loops it is, and composed elementwise code on the anchor's
results; `lowering/launch/equation.py` turns the same answer into a launch. A region (regions.py) is
several such equations in one body: its members.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

from graphnet.ir.graph import Eqn, Graph, Input, Value
from graphnet.ir.op import get_op


@dataclass(frozen=True)
class Template:
    """A kernel family. `pair` ops may stand with the anchor when they read the same operands;
    `then` is an op that the same kernel can run on the anchor's result, as its operand `then_at`;
    `updates` lets a parameter update follow, and nothing else; `follows` names the elementwise code
    that the rules join with it, by `traits_of`."""

    anchor: str
    pair: str | None = None
    updates: bool = False
    follows: tuple[str, ...] = ("is:pointwise", "is:rounding")
    then: str | None = None
    then_at: int = 0


TEMPLATES = {
    t.anchor: t
    for t in (
        Template("augment", follows=("cast", "is:rounding")),
        Template("batch_norm"),
        Template("batch_norm_grad"),
        Template("batch_norm_stats", follows=()),
        Template("batch_norm_elemt"),
        Template("batch_norm_grad_reduce", follows=()),
        Template("batch_norm_grad_elemt"),
        Template("conv2d"),
        Template("conv2d_dgrad"),
        Template("conv2d_wgrad", updates=True, follows=()),
        Template("linear"),
        Template("linear_dgrad"),
        Template("linear_wgrad", updates=True, follows=()),
        Template("maxpool2d", then="lrn"),
        Template("maxpool2d_grad", then="lrn_grad", then_at=1),
        Template("lrn", then="maxpool2d"),
        Template("lrn_grad", then="maxpool2d_grad"),
        Template("avgpool2d"),
        Template("avgpool2d_grad"),
        Template("adaptive_avgpool2d"),
        Template("adaptive_avgpool2d_grad"),
        Template("cross_entropy", pair="cross_entropy_grad"),
        Template("multi_margin", pair="multi_margin_grad"),
        Template("cross_entropy_grad"),
        Template("multi_margin_grad"),
    )
}
MAX_OPERANDS = 20  # of one kernel; more is unreadable and costs registers


def is_update(op: str) -> bool:
    return op.endswith("_update")


def is_pointwise(op: str) -> bool:
    """Elementwise, an update, or another order of storage: all work element by element on one
    index."""
    return is_update(op) or op == "relayout" or get_op(op).elementwise


def anchor_of(eqn: Eqn) -> str | None:
    """The anchor op of an equation: its own op, that of its body, or None if there is none."""
    return next((e.op for e in anchors_of(eqn)), None)


def anchors_of(eqn: Eqn) -> tuple[Eqn, ...]:
    """The anchors of an equation, plain or fused, in order."""
    return tuple(e for e in eqn.plain if e.op in TEMPLATES)


def traits_of(eqn: Eqn) -> set[str]:
    """What patterns may ask of an equation beside its name.

    is:pointwise  elementwise code alone that joins the kernels around it
    is:rounding   one op of which the operand may be read as it was, too (`Op.keeps`)
    is:kernel     it has an anchor; "takes:x" for each x that may follow it
    is:mask       the gradient of a function; is:sign if it reads the sign of the output alone,
                  is:output if it reads the output
    """
    specs = [get_op(e.op) for e in eqn.plain]
    rounding = eqn.body is None and specs[0].keeps
    found = {"is:rounding"} if rounding else set()
    if all(s.joins for s in specs) and not rounding:
        found.add("is:pointwise")
    if (anchor := anchor_of(eqn)) is not None:
        found |= {f"takes:{what}" for what in TEMPLATES[anchor].follows}
    if eqn.body is None and specs[0].mask:
        found |= {"is:mask"} | ({"is:sign"} if specs[0].mask == "sign" else set())
    return found


def members_of(eqn: Eqn) -> tuple[Eqn, ...]:
    """The equations of a region, each what one kernel could run: an anchor, or a pair of them, with
    the elementwise code on its results. They are in the order of their anchors and name values as
    the body does. An equation that is no region is its only member."""
    body = eqn.body
    if body is None or len(anchors_of(eqn)) < 2 or refusal(body) is None:
        return (eqn,)
    groups: list[list[Eqn]] = []
    made: dict[Value, int] = {}
    for e in body.eqns:
        at = max((made[v] for v in e.inputs if v in made), default=len(groups))
        if e.op in TEMPLATES:
            last = groups[-1][0] if groups else None
            paired = last is not None and TEMPLATES[last.op].pair == e.op
            at = len(groups) - 1 if last and paired and last.inputs == e.inputs else len(groups)
        if at == len(groups):
            groups.append([])
        groups[at].append(e)
        made.update((v, at) for v in e.results)
    return tuple(_member(group, body, made, k) for k, group in enumerate(groups))


def normalised(eqn: Eqn) -> tuple[Eqn, Eqn] | None:
    """A convolution and the batch normalization of its result as the two equations that
    fuse_statistics.py joined; None for any other equation."""
    if [e.op for e in anchors_of(eqn)] != ["conv2d", "batch_norm"] or eqn.body is None:
        return None
    outer = dict(zip(eqn.body.input_values, eqn.inputs, strict=True))
    outer |= dict(zip(eqn.body.returns, eqn.results, strict=True))

    def outside(m: Eqn) -> Eqn:
        where = reduce(lambda a, b: a.merged(b), (e.where for e in m.plain))
        outputs = tuple(v and outer[v] for v in m.outputs)
        return replace(m, inputs=tuple(outer[v] for v in m.inputs), outputs=outputs, where=where)

    first, second = members_of(eqn)
    return outside(first), outside(second)


def _member(group: Sequence[Eqn], body: Graph, made: dict[Value, int], at: int) -> Eqn:
    if len(group) == 1:
        return group[0]
    own = {v for e in group for v in e.results}
    inputs = tuple(dict.fromkeys(v for e in group for v in e.inputs if v not in own))
    read = {v for e in body.eqns if made[e.results[0]] != at for v in e.inputs} | set(body.returns)
    results = tuple(v for e in group for v in e.results if v in read)
    inner = Graph("body", tuple(Input(v) for v in inputs), tuple(group), results)
    return Eqn("fused", inputs, results, body=inner)


def refusal(body: Graph) -> str | None:
    """Why no template takes this body, as a sentence; None if one does."""
    anchors = [e for e in body.eqns if not is_pointwise(e.op)]
    if len(body.inputs) > MAX_OPERANDS:
        return f"the kernel would take {len(body.inputs)} operands, at most {MAX_OPERANDS} are"
    if not anchors:
        return _same_shape(body, body.eqns[0].out.type.shape)
    first = anchors[0]
    template = TEMPLATES.get(first.op)
    if template is None:
        return f"no kernel family has {first.op} as its anchor"
    if len(anchors) == 2 and anchors[1].op == template.then:
        return _chain(body, anchors[0], anchors[1], template)
    allowed = [first.op] + ([template.pair] if template.pair else [])
    names = [e.op for e in anchors]
    if names != allowed[: len(names)]:
        return f"one kernel cannot run {' and '.join(names)}"
    if len(anchors) == 2 and anchors[0].inputs != anchors[1].inputs:
        return f"{names[0]} and {names[1]} read different operands"
    if not template.updates and any(is_update(e.op) for e in body.eqns):
        return f"a parameter update cannot follow {first.op}"
    main = anchors[-1]
    for e in body.eqns:
        if e not in anchors and (problem := _follows(e, body, anchors, main, template)):
            return problem
    return None


def _chain(body: Graph, first: Eqn, second: Eqn, template: Template) -> str | None:
    """Two anchors, one after the other, with elementwise code between them and behind."""
    operand, forward = second.inputs[template.then_at], not first.op.endswith("_grad")
    made = body.producers
    if forward and operand != first.out:
        return f"{second.op} does not read the result of {first.op} itself"
    if any(v in set(first.results) for k, v in enumerate(second.inputs) if k != template.then_at):
        return f"{second.op} reads {first.op} more than once"
    between: set[Value] = set()
    todo = [operand]
    while todo:
        v = todo.pop()
        if v in made and made[v] is not first:
            between.add(v)
            todo.extend(made[v].inputs)
    inner = between if forward and first.op == "maxpool2d" else between | {first.out}
    if kept := sorted(str(v) for v in inner & set(body.returns)):
        return f"{', '.join(kept)} between {first.op} and {second.op} is read elsewhere"
    for e in body.eqns:
        if e is first or e is second:
            continue
        where = first if e.out in between else second
        sources = _anchor_results(e, body, [first, second])
        if sources != {where.out}:
            return f"{e.op} does not read the result of {where.op} alone"
        if e.out.type.shape != where.out.type.shape or is_update(e.op):
            return f"{e.op} yields {e.out.type}, the kernel runs over {where.out.type}"
    return None


def _follows(e: Eqn, body: Graph, anchors: list[Eqn], main: Eqn, template: Template) -> str | None:
    """An elementwise equation must run on the index of the anchor result that it stems from."""
    sources = _anchor_results(e, body, anchors)
    if not sources:
        return f"{e.op} does not read the result of {main.op}"
    if len(sources) > 1:
        return f"{e.op} mixes two results of {main.op}"
    root = next(iter(sources))
    if any(v.type.shape != root.type.shape for v in e.results):
        return f"{e.op} yields {e.out.type}, the kernel runs over {root.type}"
    if root not in main.results:
        return f"{e.op} reads the scalar loss, which the kernel finishes last"
    if root is not main.outputs[0] and not template.updates:
        return f"{e.op} reads the second result of {main.op}"
    return None


def _anchor_results(eqn: Eqn, body: Graph, anchors: list[Eqn]) -> set[Value]:
    results = {v for a in anchors for v in a.results}
    made = body.producers
    found: set[Value] = set()
    todo = list(eqn.inputs)
    while todo:
        v = todo.pop()
        if v in results:
            found.add(v)
        elif v in made:
            todo.extend(made[v].inputs)
    return found


def _same_shape(body: Graph, shape: tuple[int, ...]) -> str | None:
    for e in body.eqns:
        for v in e.results:
            if v.type.shape != shape:
                return f"{e.op} yields {v.type}, the kernel runs over {list(shape)}"
    return None
