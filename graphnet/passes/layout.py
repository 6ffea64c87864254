"""The layout pass: the only writer of layouts behind the inputs.

Activations of the convolutional part go channels-last where the channels fill 16-byte loads;
what a reshape reads or writes, what is returned, and inputs stay as they are, so that a flatten
is a view. Kernels address operands by stride, so no pair of layouts needs a relayout here.

Parameters come typed as they are stored: filters channels-last. What replaces one lies like it, a
gradient that is written too, and elementwise code in between follows its operands. The first
layer's image and its derived weight copy go space-to-depth where that makes a strided convolution
of few channels one of stride 1 with many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from graphnet.ir.graph import Eqn, Graph, Input, Value, Where, rename_body
from graphnet.ir.op import get_op
from graphnet.ir.types import NHWC, Layout
from graphnet.passes.templates import is_pointwise

CHANNELS = 8  # 16 bytes of bf16
_IMAGE_READERS = ("conv2d", "conv2d_wgrad")


class Kernels(Protocol):
    """Tells the pass which layouts the kernels of the target take."""

    def takes(self, eqn: Eqn, layouts: Mapping[Value, Layout]) -> bool:
        """Whether one computes an anchor with its operands and results in these layouts."""


def _pinned(graph: Graph) -> set[Value]:
    """Values whose layout is given: that of an input, else row-major."""
    out = {*graph.input_values, *graph.returns}
    for e in graph.eqns:
        if e.op in ("reshape", "relayout", "concat", "slice", "slice_grad"):
            out.update((*e.inputs, *e.results))
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
            elif len(v.type.shape) == 4 and _channels_last(e, v, chosen):
                chosen.setdefault(v, NHWC)
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
    readers = graph.readers()
    names = {v.name for e in graph.eqns for v in e.results} | {v.name for v in graph.input_values}
    made = {e.out for e in graph.eqns if any(p.op == "augment" for p in e.plain)}
    for image in [*(i.value for i in graph.inputs if i.role == "data"), *made]:
        uses = [p for r in readers.get(image, ()) for p in r.plain if image in p.inputs]
        weights = {u.inputs[1] for u in uses if u.op == "conv2d"}
        if not uses or not all(_folds(u, image, kernels) for u in uses) or not weights <= derived:
            continue
        # The weight gradient by blocks reads its dy channels-last, which a flatten does not allow.
        if any(u.op == "conv2d_wgrad" and u.inputs[1] in pinned for u in uses):
            continue
        if not all(_read_by_conv2d(w, readers) for w in weights):
            continue
        to = Layout("row", None, uses[0].attrs.stride[0])  # type: ignore[attr-defined]
        if image in made:
            chosen |= {v: to for v in (image, *weights)}
            continue
        name = next(n for n in (f"{image.name}.blocks", f"{image.name}.blocks0") if n not in names)
        packed = Value(name, image.type.with_layout(to))
        graph = _behind(graph, image, packed)
        chosen |= {v: to for v in (packed, *weights)}
    return graph, chosen


def _behind(graph: Graph, image: Value, packed: Value) -> Graph:
    """A relayout of the image at the start of the graph; its readers read that instead."""
    attrs = get_op("relayout").attrs_type(layout=str(packed.type.layout))  # type: ignore[call-arg]
    first = [e for e in graph.eqns if image in e.inputs]
    where = Where(first[0].where.layers, first[0].where.place, "layout")
    relayout = Eqn("relayout", (image,), (packed,), attrs, where=where)
    eqns = []
    for e in graph.eqns:
        if image in e.inputs:
            if e.body is not None:
                body = rename_body(e.body, tuple(packed if v == image else v for v in e.inputs))
                e = replace(e, body=body)
            e = replace(e, inputs=tuple(packed if v == image else v for v in e.inputs))
        eqns.append(e)
    return replace(graph, eqns=(relayout, *eqns))


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


def _read_by_conv2d(w: Value, readers: dict[Value, list[Eqn]]) -> bool:
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
