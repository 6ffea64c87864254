"""The layout pass: the only writer of layouts behind the inputs.

Activations of the convolutional part go channels-last where the channels fill 16-byte loads;
what a reshape reads or writes, what is returned, and inputs stay as they are, so that a flatten
is a view. Kernels address operands by stride, so no pair of layouts needs a relayout here.

Parameters come typed as they are stored: filters channels-last. What replaces one lies like it, a
gradient that is written too, and elementwise code in between follows its operands. The first
layer's image and its derived weight copy go space-to-depth where that makes a strided convolution
of few channels one of stride 1 with many.

Then every product is asked how it wants its operands. What it wants otherwise than it lies (TF32:
the summed axis innermost) becomes a relayout, once for all readers, and joins the kernel that makes
the operand where that can write it in whole runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, count
from typing import Protocol

from graphnet.ir.graph import Eqn, Graph, Input, Value, Where, rename_body
from graphnet.ir.op import get_op
from graphnet.ir.types import NHWC, Layout
from graphnet.passes.fuse import merge
from graphnet.passes.templates import anchors_of, is_pointwise, members_of

CHANNELS = 8  # 16 bytes of bf16
_IMAGE_READERS = ("conv2d", "conv2d_wgrad")


class Kernels(Protocol):
    """Tells passes what the kernels of the target can do: which layouts they take, and which
    equations they join."""

    def takes(self, eqn: Eqn, layouts: Mapping[Value, Layout]) -> bool:
        """Whether one computes an anchor with its operands and results in these layouts."""

    def wanted(self, eqn: Eqn) -> Mapping[Value, Layout]:
        """The operands that the kernel of an equation reads in other layouts than they lie in."""

    def writes(self, eqn: Eqn, layout: Layout) -> bool:
        """Whether the kernel of an equation writes its result in another layout, too."""

    def joins(self, whole: Eqn, parts: Sequence[Eqn]) -> str | None:
        """Why equations should not become one region; None where that pays."""

    def keeps(self, eqn: Eqn) -> str | None:
        """Why the kernel of a convolution keeps no moments of its result; None where it does."""


def _pinned(graph: Graph) -> set[Value]:
    """Values whose layout is given: that of an input, else row-major."""
    out = {*graph.input_values, *graph.returns}
    for e in graph.eqns:
        moves = ("reshape", "relayout", "concat", "slice", "slice_grad", "pad")
        if e.op in (*moves, "all_gather", "reduce_scatter", "own_part"):
            out.update((*e.inputs, *e.results))
    for e in reversed(graph.eqns):  # the sum over ranks takes the place of what it sums
        if e.op == "all_reduce":
            out.update(v for v, s in zip(e.inputs, e.outputs, strict=True) if s in out)
    return out


def layout(graph: Graph, kernels: Kernels | None) -> Graph:
    """The graph with storage chosen for these kernels; a target without kernels of ours (cpu) plans
    its own and gets it unchanged."""
    if kernels is None:
        return graph
    graph, first = _first_layer(graph, kernels)
    pinned = _pinned(graph) - set(first)
    chosen: dict[Value, Layout] = dict(first)
    kept = {new: chosen.get(old, old.type.layout) for old, new in graph.commits}
    for e in graph.eqns:
        for v in e.results:
            if v in pinned:
                continue
            if v in kept:  # state is written as it is stored
                chosen[v] = kept[v]
            elif e.op == "all_reduce":
                source = e.inputs[e.outputs.index(v)]
                chosen[v] = chosen.get(source, source.type.layout)
            elif len(v.type.shape) == 4 and _channels_last(e, v, chosen):
                chosen.setdefault(v, NHWC)
    return _as_wanted(_laid(graph, chosen), kernels)


def _laid(graph: Graph, chosen: Mapping[Value, Layout]) -> Graph:
    """The graph with values in the layouts chosen for them."""
    if not chosen:
        return graph
    env = {v: Value(v.name, v.type.with_layout(to)) for v, to in chosen.items()}

    def swap(v: Value) -> Value:
        return env.get(v, v)

    return replace(
        graph,
        inputs=tuple(replace(i, value=swap(i.value)) for i in graph.inputs),
        eqns=tuple(_relabel(e, env) for e in graph.eqns),
        returns=tuple(map(swap, graph.returns)),
        commits=tuple((swap(old), swap(new)) for old, new in graph.commits),
    )


def _channels_last(eqn: Eqn, v: Value, chosen: dict[Value, Layout]) -> bool:
    """Whether a result that stays inside is stored with its channels innermost."""
    inner = eqn.plain
    if any(e.op == "conv2d_wgrad" for e in inner):  # as its parameter
        return True
    alike = [chosen.get(u, u.type.layout) for u in eqn.inputs if u.type.shape == v.type.shape]
    follows = NHWC in alike and all(is_pointwise(e.op) for e in inner)
    return follows or v.type.shape[1] % CHANNELS == 0


def _first_layer(graph: Graph, kernels: Kernels) -> tuple[Graph, dict[Value, Layout]]:
    """The graph with a relayout behind each image that only strided convolutions read, and the
    layouts of its result and of their weight copies. An augmentation writes the blocks itself."""
    chosen: dict[Value, Layout] = {}
    pinned = _pinned(graph)
    derived = {i.value for i in graph.inputs if i.role == "derived"}
    readers = graph.readers
    data = [i.value for i in graph.inputs if i.role == "data"]
    made = {e.out: e for e in graph.eqns if len(e.results) == 1 and _from_data(e, set(data))}
    for image in (*data, *made):
        uses = [p for r in readers.get(image, ()) for p in r.plain if image in p.inputs]
        weights = {u.inputs[1] for u in uses if u.op == "conv2d"}
        if not uses or not all(_folds(u, image, kernels) for u in uses) or not weights <= derived:
            continue
        # The weight gradient by blocks reads its dy channels-last, which a flatten does not allow.
        if any(u.op == "conv2d_wgrad" and u.inputs[1] in pinned for u in uses):
            continue
        if not all(_read_by_conv2d(w, readers) for w in weights):
            continue
        if any(len(members_of(r)) > 1 for r in readers[image]):  # regions fill no matrix unit
            continue
        to = Layout("row", None, uses[0].attrs.stride[0])  # type: ignore[attr-defined]
        chosen |= {v: to for v in weights}
        if image in made and anchors_of(made[image]):
            chosen[image] = to
            continue
        graph, packed = _copied(graph, image, to)
        chosen[packed] = to
        if image in made:
            graph = _joined(graph, packed)
    return graph, chosen


def _from_data(e: Eqn, data: set[Value]) -> bool:
    """An augmentation, or one operand's elementwise code: what writes blocks of an image, too."""
    if any(p.op == "augment" for p in e.plain):
        return True
    return set(e.inputs) <= data and len(e.inputs) == 1 and all(is_pointwise(p.op) for p in e.plain)


# ---- copies in other layouts -------------------------------------------------------------------


def _as_wanted(graph: Graph, kernels: Kernels) -> Graph:
    """The graph with the operands of products in the layouts that their kernels want."""
    copies: dict[tuple[Value, Layout], Value] = {}
    for eqn in graph.eqns:
        for v, to in kernels.wanted(eqn).items():
            if (v, to) not in copies:
                graph, copies[v, to] = _copied(graph, v, to, everywhere=False, near=eqn)
            at = next(k for k, e in enumerate(graph.eqns) if e.results == eqn.results)
            new = _reading(graph.eqns[at], {v: copies[v, to]})
            graph = replace(graph, eqns=(*graph.eqns[:at], new, *graph.eqns[at + 1 :]))
    for (v, to), copy in copies.items():
        made = graph.producers.get(v)
        if made is not None and kernels.writes(made, to):
            graph = _joined(graph, copy)
    return graph


def _copied(
    graph: Graph, v: Value, to: Layout, *, everywhere: bool = True, near: Eqn | None = None
) -> tuple[Graph, Value]:
    """The graph with a relayout of a value behind what makes it, and its result, which all that
    read the value read instead (`everywhere`). Where nothing makes it, it belongs to the layers of
    `near`."""
    taken = {u.name for e in graph.eqns for u in e.results} | {u.name for u in graph.input_values}
    base = f"{v.name}.{'blocks' if to.order == 'row' else to.order}"
    name = next(n for n in chain((base,), (f"{base}{k}" for k in count())) if n not in taken)
    copy = Value(name, v.type.with_layout(to))
    attrs = get_op("relayout").attrs_type(layout=str(to))  # type: ignore[call-arg]
    made = next((k for k, e in enumerate(graph.eqns) if v in e.results), None)
    if made is not None:
        near = graph.eqns[made]
    elif near is None:
        near = graph.readers[v][0]
    where = Where(near.where.layers, near.where.place, "layout")
    relayout = Eqn("relayout", (v,), (copy,), attrs, where=where)
    at = 0 if made is None else made + 1
    behind = list(graph.eqns[at:])
    if everywhere:
        behind = [_reading(e, {v: copy}) if v in e.inputs else e for e in behind]
    return replace(graph, eqns=(*graph.eqns[:at], relayout, *behind)), copy


def _reading(eqn: Eqn, env: Mapping[Value, Value]) -> Eqn:
    """The equation with other values for some of its operands."""
    inputs = tuple(env.get(v, v) for v in eqn.inputs)
    body = rename_body(eqn.body, inputs) if eqn.body is not None else None
    return replace(eqn, inputs=inputs, body=body)


def _joined(graph: Graph, copy: Value) -> Graph:
    """The graph with a relayout inside the equation that makes its operand."""
    producers = graph.producers
    relayout = producers[copy]
    (v,) = relayout.inputs
    made = producers[v]
    others = any(v in e.inputs for e in graph.eqns if e is not relayout)
    keep = {u for u in made.results if u != v or others or v in graph.escaping}
    joined = merge(made, relayout, keep)
    joined = replace(joined, where=made.where.merged(relayout.where))
    eqns = tuple(joined if e is made else e for e in graph.eqns if e is not relayout)
    return replace(graph, eqns=eqns)


def _folds(use: Eqn, image: Value, kernels: Kernels) -> bool:
    """Whether a use of the image is a convolution whose stride can be its block."""
    if use.op not in _IMAGE_READERS or use.inputs[0] != image or len(image.type.shape) != 4:
        return False
    stride = use.attrs.stride[0]  # type: ignore[attr-defined]
    to, other = Layout("row", None, stride), use.inputs[1]
    if stride == 1:
        return False
    # The weight gradient reads the result's channels channels-last.
    layouts = {image: to, other: to if use.op == "conv2d" else NHWC, use.results[0]: NHWC}
    return kernels.takes(use, layouts)


def _read_by_conv2d(w: Value, readers: Mapping[Value, Sequence[Eqn]]) -> bool:
    return all(p.op == "conv2d" for r in readers[w] for p in r.plain if w in p.inputs)


def _relabel(eqn: Eqn, env: dict[Value, Value]) -> Eqn:
    swap = lambda v: None if v is None else env.get(v, v)
    body = eqn.body
    inputs = tuple(env.get(v, v) for v in eqn.inputs)
    if body is not None:
        inner = dict(zip(body.input_values, inputs, strict=True))
        for ret, out in zip(body.returns, eqn.results, strict=True):
            inner[ret] = Value(ret.name, ret.type.with_layout(env.get(out, out).type.layout))
        eqns = tuple(_relabel(e, inner) for e in body.eqns)
        returns = tuple(inner.get(v, v) for v in body.returns)
        body = replace(body, inputs=tuple(Input(v) for v in inputs), eqns=eqns, returns=returns)
    return replace(eqn, inputs=inputs, outputs=tuple(map(swap, eqn.outputs)), body=body)
