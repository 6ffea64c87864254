"""The precision policy as casts and attributes in the joint graph.

fp32   every product in IEEE fp32
tf32   products in TF32, everything else fp32
bf16   the image, activations and derived weight copies bf16, products in bf16; parameters,
       slots, weight gradients, logits and the loss stay fp32. Accumulation is always fp32.
"""

from __future__ import annotations

from dataclasses import replace

from graphnet.errors import ConfigError
from graphnet.ir.graph import Builder, Eqn, Graph, Value, Where
from graphnet.ir.op import get_op
from graphnet.ir.types import DType, bf16, f32
from graphnet.passes.dce import cse, dce

POLICIES = ("fp32", "tf32", "bf16")
CHOICES = ("auto", *POLICIES)
_PRODUCTS = ("conv2d", "linear", "conv2d_dgrad", "linear_dgrad")
_WGRADS = ("conv2d_wgrad", "linear_wgrad")
_LOSSES = ("cross_entropy", "cross_entropy_grad", "multi_margin", "multi_margin_grad")


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
    if policy == "tf32":
        return replace(joint, eqns=tuple(_with_math(e, "tf32") for e in joint.eqns))
    return dce(cse(_Bf16(joint).run()))


def _with_math(eqn: Eqn, math: str) -> Eqn:
    if eqn.op not in _PRODUCTS + _WGRADS:
        return eqn
    return replace(eqn, attrs=replace(eqn.attrs, math=math))  # type: ignore[call-arg]


class _Bf16:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.b = Builder(graph.name)
        self.env: dict[Value, Value] = {}
        self.copies: dict[Value, Value] = {}  # param -> its derived bf16 copy
        self.cast_of: dict[tuple[Value, DType], Value] = {}
        self.readers = graph.readers()
        self.escaping = graph.escaping()

    def run(self) -> Graph:
        g, b = self.graph, self.b
        for i in g.inputs:
            type = i.value.type
            if i.role == "data" and type.dtype == f32 and self.low(i.value):
                type = type.with_dtype(bf16)  # rounded when the batch is copied in
            value = b.input(i.value.name, type, i.role, i.of)
            if value != i.value:
                self.env[i.value] = value
        for eqn in g.eqns:
            self.equation(eqn)
        for old, new in g.commits:
            new = self.env.get(new, new)
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
        param = next((i for i in self.graph.inputs if i.value == v and i.role == "param"), None)
        if param is not None and dtype == bf16:
            if v not in self.copies:
                name = f"{v.name}.bf16"
                self.copies[v] = self.b.input(name, v.type.with_dtype(bf16), "derived", v.name)
            return self.copies[v]
        key = (v, dtype)
        if key not in self.cast_of:
            attrs = get_op("cast").attrs_type(dtype=dtype.name)  # type: ignore[call-arg]
            where = where or Where(self.b.where.layers, self.b.where.place, "precision")
            self.cast_of[key] = self.b.one("cast", v, attrs=attrs, where=where)
        return self.cast_of[key]

    def equation(self, eqn: Eqn) -> None:
        b = self.b
        b.where = eqn.where
        ins = [self.env.get(v, v) for v in eqn.inputs]
        attrs = eqn.attrs
        if eqn.op in _PRODUCTS + _WGRADS:
            ins[:2] = [self.cast(v, bf16) for v in ins[:2]]
            attrs = replace(attrs, math="bf16")  # type: ignore[call-arg]
            if eqn.op in _PRODUCTS:
                attrs = replace(attrs, out=self.result_dtype(eqn).name)  # type: ignore[call-arg]
        elif eqn.op in _LOSSES:
            ins[0] = self.cast(ins[0], f32)
        elif eqn.op.endswith("_update"):
            ins = [self.cast(v, w.type.dtype) for v, w in zip(ins, eqn.inputs, strict=True)]
        elif len({v.type.dtype for v in ins if v.type.dtype.is_float and v.type.shape}) > 1:
            ins = [self.cast(v, bf16) if v.type.shape else v for v in ins]
        unread = [k for k, v in enumerate(eqn.outputs) if v is None]
        names = [v.name if v is not None else "" for v in eqn.outputs]
        outs = b.emit(eqn.op, ins, attrs, unread=unread, names=names)
        self.env.update(
            (old, new)
            for old, new in zip(eqn.outputs, outs, strict=True)
            if old is not None and new is not None
        )

    def result_dtype(self, eqn: Eqn) -> DType:
        """Logits stay fp32: a loss reads them, or the caller gets them."""
        out = eqn.out
        if out in self.escaping or any(e.op in _LOSSES for e in self.readers.get(out, ())):
            return f32
        return bf16
