"""net -> traced Graph: one run of `forward` on symbolic values, and the errors it may raise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphnet.errors import ConfigError, GraphnetError, ShapeError
from graphnet.frontends.dsl import Module
from graphnet.frontends.foreign import called
from graphnet.frontends.symbolic import Symbol
from graphnet.frontends.tracer import Tracer
from graphnet.ir.graph import Builder, Graph, Input, Value, Where
from graphnet.ir.op import get_op
from graphnet.ir.types import DTYPES, TensorType, f32, i32, i64, layout_of_parameter
from graphnet.ops.augment import Augment

_SPATIAL = ("conv2d", "maxpool2d", "avgpool2d", "adaptive_avgpool2d")


def trace(
    net: Module,
    shape: Sequence[int],
    *,
    loss: Any = None,
    training: bool = False,
    augment: Augment | None = None,
    ranks: int = 1,
    global_batch: int = 0,
    sync_bn: bool = False,
) -> Graph:
    """The traced graph of a net for inputs of `shape`, its batch first.

    Returns logits, or all that `forward` returns; with `loss` (a spec such as
    `CrossEntropyLoss()`), (loss, logits), or in training the loss alone; and commits of what
    becomes of the buffers. Where `forward` returns several logits, the loss is the sum of theirs
    by `net.loss_weights`, and the first ones are the logits. Inputs: x, the parameters in
    state_dict order, then buffers, labels, live, seed and step where they are read. With
    `augment`, x is what is stored, and index and epoch say for what to draw. With several
    `ranks`, live_all counts the live rows of all of them, and first_row says where this rank's
    rows start among the `global_batch`, by default as many as the ranks hold; `sync_bn` joins
    the statistics of batch normalization over them. Errors name the layer, its place and the chain
    of sizes.
    """
    shape = _checked_shape(shape, net.input_shape)
    b = Builder(f"{net._title()}.traced")
    paths = {m: path for path, m in net.named_modules()}
    tracer = Tracer(b, net.layer_names(), paths, training=training)
    tracer.batch, tracer.global_batch = shape[0], global_batch or ranks * shape[0]
    tracer.joint_ranks = ranks if sync_bn else 1
    kind, stored = f32, shape
    if augment is not None:
        augment = augment.sized(shape)
        kind, stored = DTYPES[augment.source], augment.input_shape(shape)
    x = b.input("x", TensorType(kind, stored), "data")
    for key, p in net.named_parameters():
        type = TensorType(f32, p.shape, layout_of_parameter(p.shape))
        tracer.held[p] = b.input(key, type, "param")
    for key, v in net.named_buffers():
        kept = TensorType(v.dtype, v.shape, layout_of_parameter(v.shape))
        tracer.held[v] = b.input(key, kept, "buffer")
    given = dict(tracer.held)
    labels = b.input("labels", TensorType(i64, shape[:1]), "data")
    live = b.input("live", TensorType(i32, ()), "hyper")
    tracer.lazy = {
        "seed": b.input("seed", TensorType(i64, ()), "hyper"),
        "step": b.input("step", TensorType(i64, ()), "counter"),
        "live": live,
    }
    over = []  # what the mean of the loss is over, if not `live`
    if ranks > 1:
        over = [b.input("live_all", TensorType(i32, ()), "hyper")]
        tracer.lazy["live_all"] = over[0]
        tracer.lazy["first_row"] = b.input("first_row", TensorType(i64, ()), "hyper")
    image = x
    if augment is not None:
        index = b.input("index", TensorType(i64, shape[:1]), "data")
        epoch = b.input("epoch", TensorType(i64, ()), "hyper")
        b.where = Where(("augment",), "")
        image = b.one("augment", x, index, epoch, tracer.lazy["seed"], attrs=augment)
    tracer.rows = {image}
    with tracer.active():
        try:
            made = net(Symbol(tracer, image))
        except ShapeError as error:
            raise _with_chain(error, net, b, x) from None
        outs = made if isinstance(made, (tuple, list)) else (made,)
        for out in outs:
            if not isinstance(out, Symbol):
                raise ConfigError(
                    f"forward of {net._title()} returned {called(out)}, not a value",
                    where=net.place,
                    help="return the logits, or a tuple of values",
                )
    returns = tuple(out.value for out in outs)
    if loss is not None:
        one = lambda z: b.one(loss.op, z, labels, live, *over, attrs=loss.attrs())
        value = _loss_of(net, outs, shape[0], b, one)
        returns = (value,) if training else (value, returns[0])
    for held, new in tracer.commits.items():
        b.commit(given[held], new)
    return _without_unread(b.build(*returns))


def _loss_of(
    net: Module, outs: Sequence[Symbol], batch: int, b: Builder, one: Callable[[Value], Value]
) -> Value:
    """The loss of the logits; of several, the sum by `net.loss_weights`."""
    weights = (1.0,) if len(outs) == 1 else net.loss_weights
    if weights is None:
        raise ConfigError(
            f"forward of {net._title()} returns {len(outs)} values, and a loss takes one",
            where=net.place,
            help="return the logits alone; or net.loss_weights = (1.0, 0.3) adds up the losses of "
            "several logits; gn.as_torch(net, shape) trains with any loss of torch's",
        )
    if len(weights) != len(outs):
        raise ConfigError(
            f"forward of {net._title()} returns {len(outs)} values, and loss_weights is {weights}",
            where=net.place, help="a number for each value, in their order",
        )  # fmt: skip
    for out in outs:
        _check_logits(out, batch)
    b.where = Where(("loss",), "")
    total: Value | None = None
    for out, weight in zip(outs, weights, strict=True):
        term = one(out.value)
        if weight != 1.0:
            told = get_op("full").attrs_type(value=float(weight), shape=(), dtype="f32")  # type: ignore[call-arg]
            term = b.one("mul", term, b.one("full", attrs=told))
        total = term if total is None else b.one("add", total, term)
    assert total is not None
    return total


def _checked_shape(given: Any, sample: tuple[int, ...] | None) -> tuple[int, ...]:
    """The input shape as a tuple; `sample` is that of one image, where the net knows it."""
    shape = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else ()
    if not shape or any(not isinstance(s, int) or isinstance(s, bool) or s < 1 for s in shape):
        if isinstance(given, torch.Tensor):
            said, fix = f"tensor of shape {list(given.shape)}", "give its shape: x.shape"
        else:
            said, fix = f"{given!r:.80}", f"give the batch first: {(32, *(sample or (1, 28, 28)))}"
        raise ShapeError(f"the input shape {said} is no tuple of positive ints", help=fix)
    if sample is not None and shape == tuple(sample):
        raise ShapeError(
            f"the input shape {shape} is that of one image: the batch is missing",
            help=f"give the batch first: {(32, *shape)}",
        )
    return shape


def _check_logits(out: Symbol, batch: int) -> None:
    if out.ndim != 2 or out.shape[0] != batch:
        raise ShapeError(
            f"the loss takes logits [{batch}, classes], the net returns {list(out.shape)}",
            help="end the net with gn.Flatten() and gn.Linear(...)",
        )


def _without_unread(graph: Graph) -> Graph:
    """Drops buffers, labels, live, seed and step where nothing reads them; parameters stay."""
    read = {v for e in graph.eqns for v in e.inputs} | {old for old, _ in graph.commits}
    read |= set(graph.returns)
    lazy = ("labels", "live", "live_all", "first_row", "seed", "step")

    def keep(i: Input) -> bool:
        may_go = i.role == "buffer" or i.role != "param" and i.value.name in lazy
        return not may_go or i.value in read

    kept = tuple(i for i in graph.inputs if keep(i))
    return Graph(graph.name, kept, graph.eqns, graph.returns, graph.commits)


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape[1:]))


def _chain(b: Builder, x: Value) -> str:
    """The sizes from the input to the last equation written, one per layer that changed one."""
    made = {v: e for e in b.eqns for v in e.results}
    steps: list[str] = []
    v = b.eqns[-1].out if b.eqns else x
    while v in made:
        eqn = made[v]
        if eqn.op in (*_SPATIAL, "linear", "reshape"):
            steps.append(f"{', '.join(eqn.where.layers)} {_size(v.type.shape)}")
        data = [u for u in eqn.inputs if u in made or u == x]
        if not data:
            break
        v = data[0]
    steps.append(f"input {_size(x.type.shape)}")
    return " -> ".join(reversed(steps))


def _with_chain(error: ShapeError, net: Module, b: Builder, x: Value) -> GraphnetError:
    """The error with the sizes on the way there and, for large images, the usual mistake."""
    hints = [error.help] if error.help else []
    shape = x.type.shape
    known = net.input_shape
    if known is not None and tuple(known) != shape[1:]:
        hints.append(f"this net is written for inputs of {'x'.join(map(str, known))}")
    first = next((e for e in b.eqns if e.op == "conv2d"), None)
    wide = first is not None and first.inputs[1].type.shape[2] >= 7
    if len(shape) == 4 and (wide or shape[2] in (224, 227)):
        hints.append(
            "AlexNet's 11x11 stride-4 conv1 without padding wants 227x227, (227-11)/4+1 = 55; "
            "224x224 goes with padding 2"
        )
    full = ShapeError(
        f"{error.message}\n  sizes: {_chain(b, x)}",
        layer=error.layer,
        where=error.where,
        help="; ".join(hints) or None,
    )
    full.path = error.path
    return full
