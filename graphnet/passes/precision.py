"""The precision policy as casts and attributes in the joint graph.

fp32   every product in IEEE fp32
tf32   products in TF32, everything else fp32; the operands of products are rounded to TF32 where
       they are made (`round_tf32`), because the tensor cores would truncate them
bf16   the image, activations and derived weight copies bf16, products in bf16; parameters,
       slots, weight gradients, logits and the loss stay fp32. Accumulation is always fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from graphnet.errors import ConfigError
from graphnet.ir.graph import Builder, Eqn, Graph, Value, Where
from graphnet.ir.op import Attrs, get_op
from graphnet.ir.types import DType, TensorType, bf16, f32
from graphnet.ops.round_tf32 import rounded
from graphnet.passes.dce import cse, dce

POLICIES = ("fp32", "tf32", "bf16")
CHOICES = ("auto", *POLICIES)
_PRODUCTS = ("conv2d", "linear", "conv2d_dgrad", "linear_dgrad")
_WGRADS = ("conv2d_wgrad", "linear_wgrad")
_LOSSES = ("cross_entropy", "cross_entropy_grad", "multi_margin", "multi_margin_grad")
# What reads and makes fp32, as the losses do: its results are probabilities.
_EXACT = ("softmax", "softmax_grad", "log_softmax", "log_softmax_grad")


def resolve(asked: str, target: str) -> str:
    """The policy that a choice stands for on a target: "auto" is tf32 on cuda, and fp32 on cpu and
    interpret, which have no TF32. ConfigError for what is no choice."""
    if asked not in CHOICES:
        raise ConfigError(f"unknown precision {asked!r}", help=f"one of {', '.join(CHOICES)}")
    if asked != "auto":
        return asked
    return "tf32" if target == "cuda" else "fp32"


def told(asked: str, target: str) -> str:
    """The policy as the verbs print it: "tf32 (auto: cuda)" where "auto" has chosen it."""
    chosen = resolve(asked, target)
    return f"{chosen} (auto: {target})" if asked == "auto" else chosen


def precision(joint: Graph, policy: str) -> Graph:
    """The graph under a policy; ConfigError for an unknown one."""
    if policy not in POLICIES:
        raise ConfigError(f"unknown precision {policy!r}", help=f"use one of {POLICIES}")
    if policy == "fp32":
        return joint
    return dce(cse((_Tf32 if policy == "tf32" else _Bf16)(joint).run()))


# ---- derived copies of parameters --------------------------------------------------------------

# The ending of a copy's name, and how it is made of its parameter.
_COPIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    ".bf16": lambda w: w.to(torch.bfloat16),
    ".tf32": rounded,
}


def derived(name: str, param: torch.Tensor) -> torch.Tensor:
    """The value of the derived copy `name` of a parameter."""
    return _COPIES[name[name.rindex(".") :]](param)


class _Policy:
    """A graph written again, equation by equation, with copies of parameters that follow them.

    ending  of the copies' names
    """

    ending: str

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.b = Builder(graph.name)
        self.env: dict[Value, Value] = {}  # what a value has become
        self.copies: dict[Value, Value] = {}  # of parameters
        self.params = {i.value: i.parts for i in graph.inputs if i.role == "param"}

    def copy(self, param: Value, type: TensorType) -> Value:
        """The derived copy of a parameter, an input of this type."""
        if param not in self.copies:
            name = param.name + self.ending
            self.copies[param] = self.b.input(
                name, type, "derived", param.name, self.params[param]
            )  # fmt: skip
        return self.copies[param]

    def emit(self, eqn: Eqn, ins: Sequence[Value], attrs: Attrs) -> None:
        """The equation over other operands, its results under their old names."""
        unread = [k for k, v in enumerate(eqn.outputs) if v is None]
        names = [v.name if v is not None else "" for v in eqn.outputs]
        outs = self.b.emit(eqn.op, ins, attrs, unread=unread, names=names)
        self.env.update(
            (old, new)
            for old, new in zip(eqn.outputs, outs, strict=True)
            if old is not None and new is not None
        )


class _Tf32(_Policy):
    """Products read rounded operands; who else reads a value gets it as it was.

    A view of a value is rounded as a view of the rounded value, so that rounding ends up behind
    what makes it, in the same kernel.
    """

    ending = ".tf32"

    def run(self) -> Graph:
        g, b = self.graph, self.b
        self.rounded_of: dict[Value, Value] = {}
        self.made = g.producers
        for i in g.inputs:
            b.input(i.value.name, i.value.type, i.role, i.of, i.parts)
        for eqn in g.eqns:
            b.where = eqn.where
            ins, attrs = [self.env.get(v, v) for v in eqn.inputs], eqn.attrs
            eqn = self.without_sum(eqn)
            if eqn.op in _PRODUCTS + _WGRADS:
                ins[:2] = [self.rounded(v) for v in eqn.inputs[:2]]
                attrs = replace(attrs, math="tf32")  # type: ignore[call-arg]
            self.emit(eqn, ins, attrs)
        for old, new in g.commits:
            new = self.env.get(new, new)
            b.commit(old, new)
            if old in self.copies:
                b.commit(self.copies[old], b.one("round_tf32", new, where=Where(by="precision")))
        return b.build(*(self.env.get(v, v) for v in g.returns))

    def without_sum(self, eqn: Eqn) -> Eqn:
        """A weight gradient of the loss's own gradient, or of one that is given, without its bias
        gradient: that sums what is not rounded. Behind other products rounding adds little to their
        error, here it would be more than half of it (LeNet-5's last bias, batch 256: 2.0e-4 in
        place of 8.4e-5)."""
        if eqn.op not in _WGRADS or eqn.outputs[0] is None or eqn.outputs[1] is None:
            return eqn
        made = self.made.get(eqn.inputs[1])
        # By the loss's own gradient, or a rank's part of it.
        while made is not None and made.op in ("mul", "own_part"):
            made = self.made.get(made.inputs[0])
        if made is not None and made.op not in _LOSSES:  # None: a cotangent from outside
            return eqn
        x, dy = eqn.inputs
        ins = [self.rounded(x), self.env.get(dy, dy)]  # x is not read
        self.emit(replace(eqn, outputs=(None, eqn.outputs[1])), ins, eqn.attrs)
        return replace(eqn, outputs=(eqn.out, None))

    def rounded(self, v: Value) -> Value:
        """A value of the old graph, rounded."""
        if v in self.params:
            return self.copy(v, v.type)
        if v not in self.rounded_of:
            e = self.made.get(v)
            made = self.b.where if e is None else e.where  # the rounding belongs to what makes v
            where = Where(made.layers, made.place, "precision")
            if e is not None and e.op in ("reshape", "concat"):
                parts = [self.rounded(u) for u in e.inputs]
                self.rounded_of[v] = self.b.one(e.op, *parts, attrs=e.attrs, where=where)
            else:
                new = self.env.get(v, v)
                self.rounded_of[v] = self.b.one("round_tf32", new, where=where)
        return self.rounded_of[v]


class _Bf16(_Policy):
    ending = ".bf16"

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.cast_of: dict[tuple[Value, DType], Value] = {}
        self.readers = graph.readers
        self.escaping = graph.escaping

    def run(self) -> Graph:
        g, b = self.graph, self.b
        for i in g.inputs:
            type = i.value.type
            if i.role == "data" and type.dtype == f32 and self.low(i.value):
                type = type.with_dtype(bf16)  # rounded when the batch is copied in
            value = b.input(i.value.name, type, i.role, i.of, i.parts)
            if value != i.value:
                self.env[i.value] = value
        for eqn in g.eqns:
            self.equation(eqn)
        for old, new in g.commits:
            new = self.cast(self.env.get(new, new), old.type.dtype)
            b.commit(old, new)
            if old in self.copies:  # the low-precision copy follows its parameter
                where = Where(by="precision")
                b.commit(self.copies[old], self.cast(new, bf16, where))
        returns = [self.cast(self.env.get(v, v), v.type.dtype) for v in g.returns]
        return b.build(*returns)

    def low(self, v: Value) -> bool:
        """Whether all readers of a value are products, which take it in bf16."""
        readers = self.readers.get(v, [])
        products = all(e.op in _PRODUCTS + _WGRADS and v in e.inputs[:2] for e in readers)
        return bool(readers) and products and v not in self.escaping

    def cast(self, v: Value, dtype: DType, where: Where | None = None) -> Value:
        if v.type.dtype == dtype or not v.type.dtype.is_float:
            return v
        if v in self.params and dtype == bf16:
            return self.copy(v, v.type.with_dtype(bf16))
        key = (v, dtype)
        if key not in self.cast_of:
            attrs = get_op("cast").attrs_type(dtype=dtype.name)  # type: ignore[call-arg]
            where = where or Where(self.b.where.layers, self.b.where.place, "precision")
            self.cast_of[key] = self.b.one("cast", v, attrs=attrs, where=where)
        return self.cast_of[key]

    def equation(self, eqn: Eqn) -> None:
        self.b.where = eqn.where
        ins = [self.env.get(v, v) for v in eqn.inputs]
        attrs = eqn.attrs
        if eqn.op in _PRODUCTS + _WGRADS:
            ins[:2] = [self.cast(v, bf16) for v in ins[:2]]
            attrs = replace(attrs, math="bf16")  # type: ignore[call-arg]
            if eqn.op in _PRODUCTS:
                attrs = replace(attrs, out=self.result_dtype(eqn).name)  # type: ignore[call-arg]
        elif eqn.op in _LOSSES:
            ins[0] = self.cast(ins[0], f32)
        elif (low := get_op(eqn.op).low) is not None:
            small = bf16 if any(ins[k].type.dtype == bf16 for k in low) else f32
            ins = [self.cast(v, small if k in low else f32) for k, v in enumerate(ins)]
        elif eqn.op in _EXACT:
            ins = [self.cast(v, f32) for v in ins]
        elif eqn.op.endswith("_update"):
            ins = [self.cast(v, w.type.dtype) for v, w in zip(ins, eqn.inputs, strict=True)]
        elif len({v.type.dtype for v in ins if v.type.dtype.is_float and v.type.shape}) > 1:
            ins = [self.cast(v, bf16) if v.type.shape else v for v in ins]
        self.emit(eqn, ins, attrs)

    def result_dtype(self, eqn: Eqn) -> DType:
        """Logits stay fp32: a loss reads them, or the caller gets them."""
        return f32 if self.exact(eqn.out) else bf16

    def exact(self, v: Value) -> bool:
        """Whether a value stays fp32, on this rank or where all ranks' are gathered."""
        return v in self.escaping or any(
            e.op in (*_LOSSES, *_EXACT) or e.op == "all_gather" and self.exact(e.out)
            for e in self.readers.get(v, ())
        )
