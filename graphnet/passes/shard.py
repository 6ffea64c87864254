"""Two towers, or model parallelism by channel: each rank holds its part of the channels of every
tensor, and of the parameters that make them (Krizhevsky et al. 2012, section 3.2).

The traced graph of a net becomes that of one rank; all ranks run the same one. An activation is
split along axis 1, a parameter along axis 0. A convolution in groups stays on its rank, one that
sees all channels, and a linear layer, reads the parts of all ranks (`all_gather`; its gradient is a
`reduce_scatter`). What works channel by channel stays, too. Everything else, the loss above all,
reads whole values and is done by every rank alike: of its gradient each rank keeps its part, and
nothing is summed, since every rank knows all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from graphnet.errors import ConfigError
from graphnet.ir.graph import Builder, Eqn, Graph, Value
from graphnet.ir.op import get_op
from graphnet.ir.types import TensorType, i64
from graphnet.ops.collective import AxisAttrs, GatherAttrs
from graphnet.ops.shape import ReshapeAttrs

RANK = "rank"  # the input that says which part is this rank's
_HELD = ("param", "buffer")
# Besides elementwise code, what makes each channel of its result of that channel alone.
_BY_CHANNEL = ("maxpool2d", "avgpool2d", "adaptive_avgpool2d", "lrn", "batch_norm", "normalize")


def shard(graph: Graph, ranks: int) -> Graph:
    """The graph of one of `ranks` ranks. ConfigError names the layer that cannot be divided."""
    return graph if ranks == 1 else _Shard(graph, ranks).run()


class _Shard:
    """A traced graph written again for one rank.

    env    what each value of the old graph has become: the value, or this rank's part of it
    split  the values of which it is a part
    """

    def __init__(self, graph: Graph, ranks: int) -> None:
        self.graph, self.ranks = graph, ranks
        self.b = Builder(graph.name, [i.value.name for i in graph.inputs])
        self.env: dict[Value, Value] = {}
        self.split: set[Value] = set()
        self.gathered: dict[tuple[Value, bool], Value] = {}
        self.inputs = {i.value: i for i in graph.inputs}
        self.learned = {v for v, i in self.inputs.items() if i.role == "param"}
        for e in graph.eqns:
            if any(v in self.learned for v in e.inputs):
                self.learned.update(e.results)

    def run(self) -> Graph:
        g, b = self.graph, self.b
        for e in g.eqns:
            b.where = e.where
            self.rule(e)(e)
        if not any(v in self.split for v in g.input_values):
            raise ConfigError(
                f"{g.name.split('.')[0]} has no convolution and no linear layer to divide over "
                f"{self.ranks} ranks", help="towers=False",
            )  # fmt: skip
        returns = [self.whole(v, alike=True) for v in g.returns]
        for old, new in g.commits:
            b.commit(self.of(old), self.env[new] if old in self.split else self.whole(new, True))
        for v in g.input_values:
            self.of(v)
        order = {v.name: k for k, v in enumerate(g.input_values)}
        b.inputs.sort(key=lambda i: order.get(i.value.name, len(order)))
        return b.build(*returns)

    def rule(self, e: Eqn) -> Callable[[Eqn], None]:
        """How an equation is written."""
        if e.op in ("conv2d", "linear"):
            return self.product
        if not any(v in self.split for v in e.inputs):
            return self.copy
        if e.op == "reshape":
            return self.reshape
        if e.op in _BY_CHANNEL or get_op(e.op).elementwise:
            if all(self.fits(e, v) for v in e.inputs):
                return self.by_channel
        return self.alike

    def refuse(self, e: Eqn, why: str, fix: str) -> ConfigError:
        return ConfigError(why, help=fix, **e.where.located)

    # ---- values -----------------------------------------------------------------------------

    def of(self, v: Value) -> Value:
        """What a value has become: an input that nothing has asked for yet is whole."""
        if v not in self.env:
            i = self.inputs[v]
            self.env[v] = self.b.input(v.name, v.type, i.role, i.of)
        return self.env[v]

    def part(self, e: Eqn, v: Value) -> Value:
        """This rank's part of a value."""
        if v in self.split:
            return self.env[v]
        if v not in self.inputs or self.inputs[v].role not in _HELD:
            attrs = AxisAttrs(self.ranks, 1)
            return self.b.one("own_part", self.of(v), attrs=attrs)
        if v in self.env:
            raise self.refuse(
                e, f"{v} is read here in {self.ranks} parts and elsewhere whole",
                "give each layer a parameter of its own",
            )  # fmt: skip
        first, *rest = v.type.shape
        local = v.type.with_shape((first // self.ranks, *rest)).with_layout(v.type.layout)
        i = self.inputs[v]
        self.split.add(v)
        self.env[v] = self.b.input(v.name, local, i.role, i.of, self.ranks)
        return self.env[v]

    def whole(self, v: Value, alike: bool) -> Value:
        """All of a value. `alike`: for what every rank does alike."""
        if v not in self.split:
            return self.of(v)
        if (v, alike) not in self.gathered:
            attrs = GatherAttrs(self.ranks, 1, alike)
            self.gathered[v, alike] = self.b.one("all_gather", self.env[v], attrs=attrs)
        return self.gathered[v, alike]

    def emit(self, e: Eqn, ins: list[Value], attrs: Any = None) -> None:
        """The equation over other operands; results that are smaller than before are parts."""
        unread = [k for k, v in enumerate(e.outputs) if v is None]
        outs = self.b.emit(e.op, ins, e.attrs if attrs is None else attrs, unread=unread)
        for old, new in zip(e.outputs, outs, strict=True):
            if old is not None and new is not None:
                self.env[old] = new
                if new.type.shape != old.type.shape:
                    self.split.add(old)

    # ---- rules ------------------------------------------------------------------------------

    def product(self, e: Eqn) -> None:
        """A convolution or a linear layer: each rank makes its part of the outputs."""
        x, *held = e.inputs
        a: Any = e.attrs
        outputs, groups = held[0].type.shape[0], getattr(a, "groups", 1)
        what = "output channels" if e.op == "conv2d" else "output features"
        if outputs % self.ranks:
            raise self.refuse(
                e, f"{outputs} {what} have no {self.ranks} equal parts",
                f"a multiple of {self.ranks}, such as {outputs + -outputs % self.ranks}",
            )  # fmt: skip
        if any(v not in self.inputs or self.inputs[v].role not in _HELD for v in held):
            raise self.refuse(
                e, f"the weights of this {e.op} are computed, so no rank holds a part of them",
                "towers=False",
            )  # fmt: skip
        if groups == 1:
            if x not in self.split and x in self.learned:
                raise self.refuse(
                    e, f"{x}: {x.type} in front of it is whole on all ranks, since no rank can "
                    "make a part of it alone", "towers=False",
                )  # fmt: skip
            image = self.whole(x, alike=False)
        elif groups % self.ranks:
            raise self.refuse(
                e, f"{groups} groups have no {self.ranks} equal parts", f"groups={self.ranks}"
            )
        else:
            image, a = self.part(e, x), replace(a, groups=groups // self.ranks)
        self.emit(e, [image, *(self.part(e, v) for v in held)], a)

    def reshape(self, e: Eqn) -> None:
        """The parts of each sample stay parts where the batch stays the first axis."""
        old, new = e.inputs[0].type.shape, e.out.type.shape
        if new[0] != old[0] or len(new) < 2 or new[1] % self.ranks:
            return self.alike(e)
        local = (new[0], new[1] // self.ranks, *new[2:])
        self.emit(e, [self.env[e.inputs[0]]], ReshapeAttrs(local))

    def fits(self, e: Eqn, v: Value) -> bool:
        """Whether each channel of a result needs that channel of an operand alone."""
        shape, channels = v.type.shape, e.out.type.shape[1]
        vector = v in self.inputs and self.inputs[v].role in _HELD and shape == (channels,)
        scalar = shape == () and not (v in self.learned and v not in self.split)
        return scalar or vector or len(shape) > 1 and shape[1] == channels

    def by_channel(self, e: Eqn) -> None:
        """What each rank does on its channels."""
        ins = [self.of(v) if v.type.shape == () else self.part(e, v) for v in e.inputs]
        a: Any = e.attrs
        if e.op == "lrn":
            if a.groups % self.ranks:
                size = e.out.type.shape[1]
                raise self.refuse(
                    e, f"it normalizes over all {size} channels, of which a rank holds "
                    f"{size // self.ranks}", f"groups={self.ranks}; of the 2012 AlexNet "
                    f"gn.models.alexnet_2012(norm_groups={self.ranks})",
                )  # fmt: skip
            a = replace(a, groups=a.groups // self.ranks)
        if e.op == "dropout" and a.training:
            ins.append(self.rank())
            a = replace(a, parts=self.ranks)
        self.emit(e, ins, a)

    def rank(self) -> Value:
        """The number of this rank."""
        have = [i.value for i in self.b.inputs if i.value.name == RANK]
        return have[0] if have else self.b.input(RANK, TensorType(i64, ()), "hyper")

    def alike(self, e: Eqn) -> None:
        """What every rank does on whole values."""
        for v in e.inputs:
            if v in self.split and v in self.inputs:
                raise self.refuse(
                    e, f"{v} is read here whole and elsewhere in {self.ranks} parts",
                    "give each layer a parameter of its own",
                )  # fmt: skip
        self.emit(e, [self.whole(v, alike=True) for v in e.inputs])

    def copy(self, e: Eqn) -> None:
        """What has nothing to do with the parts."""
        self.emit(e, [self.of(v) for v in e.inputs])
