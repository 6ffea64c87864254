"""Generated epilogues: the elementwise code of a launch as one jit function in a real file.

The file is named by the SHA-256 of its text and holds one function at a fixed line, because
Triton's cache key contains the line number. Names in it are `v0, v1, ...`: nothing that a user
named enters the source.

A kernel that waits for memory at its end can ask for the epilogue's operands before its loop: then
the loads stand in a second function, the preload, whose tuple the epilogue takes as `aux`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from graphnet.errors import UnsupportedOpError
from graphnet.ir.graph import Eqn, Value
from graphnet.ir.op import get_op
from graphnet.ir.types import TensorType
from graphnet.lowering.launch.files import Source

# The same lines above every function, whatever it uses.
HEADER = """\
import triton
import triton.language as tl

from graphnet.kernels.common import (  # noqa: F401
    cast_store,
    maximum_nan,
    round_tf32,
    tanh,
)
from graphnet.kernels.random import dropout_keep  # noqa: F401


@triton.jit
"""
PARAMETERS = "(acc, aux, i0, i1, i2, i3, mask, args):"
EPILOGUE = f"def epilogue{PARAMETERS}"
_PRELOAD = "def preload(i0, i1, i2, i3, mask, args):"
_HELPERS = ("cast_store", "maximum_nan", "round_tf32", "tanh", "dropout_keep")
_WIDE = 1 << 31


@dataclass(frozen=True)
class Ref:
    """A pointer argument: the buffer's name and its element type, as the IR prints it."""

    name: str
    dtype: str


@dataclass(frozen=True)
class Epilogue:
    """A generated function with its pointers, in the order of its `args`.

    inplace  (operand, result) pairs read and written at one index: they may share memory
    preload  loads the operands, in the order in which the epilogue finds them in `aux`; None where
             the epilogue loads them itself, or there are none
    lines    the statements of the function, for who writes several into one file
    """

    source: Source
    args: tuple[Ref, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    inplace: tuple[tuple[str, str], ...]
    preload: Source | None = None
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Index:
    """The index space of a kernel: its logical shape; `flat` when i0 alone counts storage."""

    shape: tuple[int, ...]
    flat: bool = False

    def repeated(self, type: TensorType) -> tuple[str, str]:
        """(element offset, mask) of an operand that is repeated over the index: both name only the
        coordinates that it has, so that a value is loaded once for each of them."""
        first = len(self.shape) - len(type.shape)
        terms, inside = [], []
        for d, (size, stride) in enumerate(zip(type.shape, type.strides, strict=True), first):
            if size > 1:
                terms.append(f"i{d}" if stride == 1 else f"i{d} * {stride}")
                inside.append(f"(i{d} < {size})")
        return " + ".join(terms), " & ".join(inside)

    def at(self, type: TensorType, origin: int = 0) -> str:
        """The element offset of an operand, broadcast to the whole tile."""
        if self.flat:
            return "i0"
        if type.layout.s2d:
            b, c = type.layout.s2d, type.shape[1]
            rows, cols, inner = replace(type.layout, order="nhwc").stored(type.shape)[1:]
            image = "" if type.layout.order == "hwcn" else f"i0 * {rows} + "
            block = f"({image}i2 // {b}) * {cols} + i3 // {b}"
            at = f"({block}) * {inner} + (i2 % {b} * {b} + i3 % {b}) * {c} + i1"
            return at if image else f"({at}) * {type.shape[0]} + i0"
        terms = [] if origin == 0 else [str(origin)]
        strides = type.strides if type.shape else (0,)
        wide = type.numel >= _WIDE
        for d, stride in enumerate(strides):
            coord = f"i{d}.to(tl.int64)" if wide and d == 0 else f"i{d}"
            terms.append(coord if stride == 1 else f"{coord} * {stride}")
        return " + ".join(terms)


@dataclass
class _Context:
    """What `Op.emit` may ask for."""

    shape: tuple[int, ...]
    coords: tuple[str, ...] = ("i0", "i1", "i2", "i3")

    def uses(self, name: str) -> None:
        if name not in _HELPERS:
            raise UnsupportedOpError(f"generated code has no helper {name!r}")


@dataclass
class Writer:
    """Writes one epilogue: roots and operands in, equations, stores out."""

    index: Index
    name: Mapping[Value, str]
    widen: bool = False  # the index lacks columns (a bias gradient): broadcast it over the tile
    ahead: bool = False  # operands are loaded by a preload
    early: list[str] = field(default_factory=list)  # the preload's loads
    lines: list[str] = field(default_factory=list)
    args: list[Ref] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    env: dict[Value, str] = field(default_factory=dict)
    full: dict[str, TensorType] = field(default_factory=dict)
    inplace: list[tuple[str, str]] = field(default_factory=list)
    count: int = 0

    def let(self, expression: str) -> str:
        """Binds an expression to the next name."""
        name = f"v{self.count}"
        self.count += 1
        self.lines.append(f"{name} = {expression}")
        return name

    def pointer(self, buffer: str, type: TensorType) -> str:
        ref = Ref(buffer, type.dtype.name)
        if ref not in self.args:
            self.args.append(ref)
        return f"args[{self.args.index(ref)}]"

    def at(self, type: TensorType, origin: int = 0) -> str:
        at = self.index.at(type, origin)
        return f"{at} + tl.zeros_like(acc).to(tl.int32)" if self.widen else at

    def _typed(self, load: str, type: TensorType) -> str:
        return f"{load}.to(tl.float32)" if type.dtype.is_float else load

    def load(self, v: Value) -> str:
        """The value of an operand at the index, loaded once; scalars without a mask."""
        if v in self.env:
            return self.env[v]
        buffer, type = self.name[v], v.type
        pointer = self.pointer(buffer, type)
        self.reads.append(buffer)
        if type.numel == 1 and type.shape != self.index.shape:
            text = f"tl.load({pointer})"
        elif type.shape == self.index.shape:
            zero = "0.0" if type.dtype.is_float else "0"
            text = f"tl.load({pointer} + {self.at(type)}, mask=mask, other={zero})"
            self.full[buffer] = type
        elif self.index.flat or len(type.shape) > len(self.index.shape):
            raise UnsupportedOpError(
                f"operand {v}: {type} does not fit the index {list(self.index.shape)}"
            )
        else:
            at, inside = self.index.repeated(type)
            zero = "0.0" if type.dtype.is_float else "0"
            text = f"tl.load({pointer} + {at}, mask={inside}, other={zero})"
        if self.ahead:
            self.early.append(text)
            text = f"aux[{len(self.early) - 1}]"
        self.env[v] = self.let(self._typed(text, type))
        return self.env[v]

    def channel(self, v: Value) -> str:
        """A vector over axis 1: a bias. It needs no mask over the rows."""
        pointer = self.pointer(self.name[v], v.type)
        self.reads.append(self.name[v])
        load = f"tl.load({pointer} + i1, mask=i1 < {v.type.numel}, other=0.0)"
        return self.let(self._typed(load, v.type))

    def eqn(self, e: Eqn) -> None:
        """The elementwise equation, on what was loaded or computed."""
        context, op = _Context(self.index.shape), get_op(e.op)
        operands = [
            self.channel(v) if k in op.over_channels else self.load(v)
            for k, v in enumerate(e.inputs)
        ]
        expressions = op.emit(operands, e.attrs, context)
        for v, text in zip(e.outputs, expressions, strict=True):
            if v is not None:
                self.env[v] = self.let(text)
        self.notes.append(f"{e.op} -> {', '.join(str(v.type) for v in e.results)}")

    def store(self, value: str, buffer: str, type: TensorType, origin: int = 0) -> None:
        """Rounds once and stores; call after all loads."""
        pointer = self.pointer(buffer, type)
        self.lines.append(f"cast_store({pointer} + {self.at(type, origin)}, {value}, mask)")
        self.writes.append(buffer)
        if origin == 0:
            self.inplace += [(old, buffer) for old, t in self.full.items() if t == type]

    def finish(self, note: str, returns: str | None = None) -> Epilogue:
        if returns is not None:
            self.lines.append(f"return {returns}")
        notes = "\n".join(f"# {n}" for n in (note, *self.notes))
        preload = None
        if self.early:
            names = [f"v{k}" for k in range(len(self.early))]
            loads = [f"{v} = {text}" for v, text in zip(names, self.early, strict=True)]
            preload = _written(_PRELOAD, [*loads, f"return ({', '.join(names)},)"], notes)
        lines = self.lines or ["pass"]
        return Epilogue(
            _written(EPILOGUE, lines, notes), tuple(self.args),
            tuple(dict.fromkeys(self.reads)), tuple(self.writes),
            tuple(dict.fromkeys(self.inplace)), preload, tuple(lines),
        )  # fmt: skip


def _written(signature: str, lines: Sequence[str], notes: str) -> Source:
    """A file of one function, what it is for below it."""
    body = "\n".join(f"    {line}" for line in lines)
    return Source(f"{HEADER}{signature}\n{body}\n\n\n{notes}\n")


# What makes a tensor of its own in generated code: in a Gluon kernel it would lack a layout.
_MAKERS = ("tl.arange(", "tl.full(", "tl.zeros(", "tl.zeros_like(")


def makes_tensors(e: Eqn) -> bool:
    """Whether the code of an elementwise equation makes ranges or constant tensors."""
    context = _Context(e.results[0].type.shape)
    code = get_op(e.op).emit(["v"] * len(e.inputs), e.attrs, context)
    return any(maker in text for text in code for maker in _MAKERS)


def write_epilogue(
    index: Index,
    name: Mapping[Value, str],
    roots: Mapping[Value, str],
    eqns: Sequence[Eqn],
    stores: Sequence[tuple[Value, Value]],
    *,
    note: str,
    bias: Value | None = None,
    widen: bool = False,
    ahead: bool = False,
    returns: Value | None = None,
    args: list[Ref] | None = None,
) -> Epilogue:
    """The composed epilogue of a kernel.

    roots   anchor results and the expression that holds them ("acc", "aux")
    stores  (inner value, outer value): what is written, with the outer value's layout
    bias    vector over axis 1 that is added to the first root
    ahead   operands come from a preload, which the kernel calls beforehand at the same index; then
            no root is held in "aux", nor is the index widened
    returns  the value that the function gives back to the kernel (fp32), where it goes on
    args     the pointers that several functions share: those that are missing are added
    """
    assert not (ahead and (widen or "aux" in roots.values()))
    w = Writer(index, name, widen, ahead, args=[] if args is None else args)
    w.env.update(roots)
    if bias is not None:
        first = next(iter(roots))
        w.env[first] = w.let(f"{roots[first]} + {w.channel(bias)}")
    for e in eqns:
        w.eqn(e)
    for inner, outer in stores:
        w.store(w.env[inner], name[outer], outer.type)
    return w.finish(note, w.env[returns] if returns is not None else None)
