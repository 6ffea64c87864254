"""An equation becomes launches: which kernel, which operands, which numbers.

`launches` is the entry. An equation with an anchor asks for a variant; code without one, and what
only moves data, has a kernel each. Everything that a kernel needs to know about its operands,
strides included, becomes a constexpr.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

from graphnet.errors import UnsupportedOpError
from graphnet.ir.graph import Eqn, Value
from graphnet.ir.op import get_op
from graphnet.lowering.launch.aside import confined
from graphnet.lowering.launch.choice import Choice, Kernels
from graphnet.lowering.launch.codegen import Index, Ref, write_epilogue
from graphnet.lowering.launch.cost import with_costs
from graphnet.lowering.launch.moments import kept
from graphnet.lowering.launch.moves import MOVES, pack, pointwise_launch, run_move
from graphnet.lowering.launch.steps import Collective, Launch, Step, make
from graphnet.lowering.launch.sums import SUMS
from graphnet.lowering.launch.take import take
from graphnet.lowering.launch.work import Work, take_apart


def launches(eqn: Eqn, name: Callable[[Value], str], kernels: Kernels) -> list[Step]:
    """The steps that compute an equation; none for a view. `name` gives each value's buffer."""
    if eqn.op in MOVES:
        return run_move(eqn, name)
    if get_op(eqn.op).effect == "collective":
        ins, outs = (tuple((name(v), v.type) for v in vs) for vs in (eqn.inputs, eqn.results))
        return [Collective(eqn.op, eqn.attrs, ins, outs, where=eqn.where)]
    _check_layouts(eqn)
    if eqn.op in SUMS:
        return SUMS[eqn.op](eqn, name)
    if eqn.op == "take":
        return [take(eqn, name)]
    work = take_apart(eqn, name)
    if work.anchors:
        return [confined(s) for s in computed(work, kernels.choose(work), kernels)]
    if eqn.op == "record_step":
        return list(with_costs(work, [_record(work)]))
    packs = any(e.op == "relayout" and e.out.type.layout.s2d for e in work.rest)
    return list(with_costs(work, [_packed(work) if packs else _pointwise(work)]))


def computed(work: Work, choice: Choice, kernels: Kernels) -> list[Launch]:
    """The launches of an equation with an anchor, and of the batch normalization joined with it."""
    steps = with_costs(work, choice.variant.launch(work, choice.config))
    made = [replace(s, choice=choice) for s in steps]
    if work.then is None:
        return made
    norm = replace(work.then, kept=kept(work.then, made))
    return [*made, *computed(norm, kernels.choose(norm), kernels)]


def _check_layouts(eqn: Eqn) -> None:
    for v in (*eqn.inputs, *eqn.results):
        if v.type.layout.flat is not None:
            raise UnsupportedOpError(
                f"no kernel takes the layout of {v}: {v.type}", **eqn.where.located,
                help="target='cpu' runs every op on torch's kernels",
            )  # fmt: skip


# ---- without an anchor ----------------------------------------------------------------------


def _pointwise(work: Work) -> Launch:
    """Elementwise code alone. Where all operands lie alike, one index counts their storage."""
    results = [o for _, o in work.stores]
    shape = results[0].type.shape
    inputs = {v for e in work.rest for v in e.inputs if v in work.name}
    channels = any(get_op(e.op).over_channels for e in work.rest)
    full = [work.type(v) for v in inputs if v.type.shape == shape] + [v.type for v in results]
    alike = len({t.layout for t in full}) == 1
    repeated = any(v.type.shape != shape and v.type.numel > 1 for v in inputs)
    coordinates = repeated or channels or any(e.op == "dropout" for e in work.rest)
    flat = alike and not coordinates
    if len(shape) > 4 and not flat:
        raise UnsupportedOpError(
            f"elementwise code over the {len(shape)} dimensions of {list(shape)}, whose operands"
            " lie differently: kernels index at most 4", **work.eqn.where.located,
            help="flatten the tensor to 4 dimensions or fewer",
        )  # fmt: skip
    space = (prod(shape), 1, 1, 1) if flat else (*shape, 1, 1, 1, 1)[:4]
    note = f"elementwise {list(shape)}"
    stores = work.stores
    # The body's operands get the layouts that they have outside.
    eqns = [replace(e, inputs=tuple(work.outer.get(v, v) for v in e.inputs)) for e in work.rest]
    epi = write_epilogue(Index(shape, flat), work.name, {}, eqns, stores, note=note)
    return pointwise_launch(epi, space, not flat and results[0].type.layout.order == "nhwc")


def _packed(work: Work) -> Launch:
    """Elementwise code over an image whose result lies in blocks of pixels."""
    ((x, *more), ((inner, out), *others)) = work.eqn.inputs, work.stores
    assert not more and not others, "the layout pass packs one image"
    root = next(i for i in work.outer if work.outer[i] == x)
    epi = work.middle(root, inner, Index(x.type.shape))
    return pack(x, work.name[x], out, work.name[out], epi, work.eqn.where)


def _record(work: Work) -> Launch:
    ring, loss, step, *more = reads = tuple(work.name[v] for v in work.eqn.inputs)
    ring1, step1, *rest = writes = tuple(work.name[v] for v in work.eqn.results)
    pairs = ((ring, ring1), (step, step1), *zip(more, rest[:1], strict=False))
    held, go = (Ref(name, "f32") for name in rest) if rest else (None, None)
    norm = [Ref(name, "f32") for name in more[len(rest) // 2 :]]
    args = (
        Ref(ring1, "f32"), Ref(loss, "f32"), Ref(step1, "i64"), held, go, norm[0] if norm else None
    )  # fmt: skip
    constants = {
        "RING": work.eqn.inputs[0].type.numel, "STICKY": bool(rest), "NORM": bool(norm)
    }  # fmt: skip
    moved = 2 * (4 + 8 + 4 * bool(rest))  # a loss and the counters, each read and written
    return make(
        "record_step", "elementwise", args, constants, (1,), reads=reads, writes=writes,
        starts_as=pairs, bytes=moved, num_warps=1,
    )  # fmt: skip
