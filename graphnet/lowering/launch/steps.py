"""The steps of a plan: kernel launches, fills and copies of whole buffers, collectives."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from graphnet.errors import CompileError
from graphnet.ir.graph import NOWHERE, Where
from graphnet.ir.types import DType, TensorType
from graphnet.lowering.launch.codegen import Epilogue, Ref
from graphnet.lowering.launch.files import Source
from graphnet.lowering.launch.signature import signature_of

if TYPE_CHECKING:
    from graphnet.lowering.launch.choice import Choice


@dataclass(frozen=True)
class Box:
    """A descriptor argument: a buffer as an array of `size`, of which the kernel fetches boxes of
    `block`; what a box holds beyond the array is zero.

    strides  elements from one index to the next of each axis, the last one 1; row-major if empty
    gluon    the kernel is written in Gluon, where a descriptor also says how a box lies in shared
             memory
    """

    ref: Ref
    size: tuple[int, ...]
    block: tuple[int, ...]
    strides: tuple[int, ...] = ()
    gluon: bool = False

    @property
    def steps(self) -> tuple[int, ...]:
        """The strides, spelled out."""
        if self.strides:
            return self.strides
        return tuple(prod(self.size[d + 1 :]) for d in range(len(self.size)))


@dataclass(frozen=True)
class Table:
    """A constant buffer of int32 that a kernel reads: the order of its work, for example. The plan
    keeps one for all launches that read the same values."""

    values: tuple[int, ...]

    @property
    def ref(self) -> Ref:
        digest = hashlib.sha256(repr(self.values).encode()).hexdigest()
        return Ref(f".table{digest[:16]}", "i32")


Arg = Ref | Box | Table | tuple[Ref, ...] | None


@dataclass(frozen=True)
class Launch:
    """One kernel launch on named buffers.

    kernel      function of `module`, a module of graphnet.kernels; of a group its members' kernels
    args        the pointers and descriptors in the kernel's order; a tuple is one argument
    constants   the constexpr arguments; a Source stands for its generated function
    scratch     (buffer, bytes) that only this equation's launches use
    inplace     (operand, result) pairs that may share memory
    starts_as   (operand, result) pairs where the kernel works in place: the result starts as a
                copy of the operand unless they share memory
    flops, bytes  its own work, each buffer that it touches counted once; `math` is how products
                are formed
    padded      arithmetic of the whole tiles that a product multiplies, their padding counted; 0
                for what is no product
    choice      why this variant and this configuration; None where there is nothing to choose
    turns       of a group: what runs as this one, each a launch or several that take turns in one
                program; see group.py
    driver      of a group: the generated function that runs, in place of a kernel of a module
    """

    kernel: str
    module: str
    args: tuple[Arg, ...]
    constants: tuple[tuple[str, Any], ...]
    grid: tuple[int, int, int]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    num_warps: int = 4
    num_stages: int = 2
    scratch: tuple[tuple[str, int], ...] = ()
    inplace: tuple[tuple[str, str], ...] = ()
    starts_as: tuple[tuple[str, str], ...] = ()
    flops: int = 0
    bytes: int = 0
    math: str = "ieee"
    padded: int = 0
    where: Where = field(default=NOWHERE, compare=False)
    choice: Choice | None = field(default=None, compare=False)
    turns: tuple[tuple[Launch, ...], ...] = ()
    driver: Source | None = None

    @property
    def members(self) -> tuple[Launch, ...]:
        """The launches of a group."""
        return tuple(m for turn in self.turns for m in turn)

    @property
    def parts(self) -> tuple[Launch, ...]:
        """The members of a group, or the launch alone."""
        return self.members or (self,)

    @property
    def refs(self) -> tuple[Ref, ...]:
        """The pointers among the arguments, those behind descriptors included."""
        flat = [r for a in self.args for r in (a if isinstance(a, tuple) else (a,))]
        return tuple(r.ref if isinstance(r, Box | Table) else r for r in flat if r is not None)

    @property
    def tables(self) -> tuple[Table, ...]:
        return tuple(a for a in self.args if isinstance(a, Table))

    @property
    def epilogues(self) -> tuple[Source, ...]:
        """The generated functions that the launch's kernel calls."""
        return tuple(v for _, v in self.constants if isinstance(v, Source))

    @property
    def generated(self) -> tuple[Source, ...]:
        """All generated files that the launch needs."""
        return (*self.epilogues, self.driver) if self.driver else self.epilogues

    @property
    def programs(self) -> int:
        return prod(self.grid)

    def __str__(self) -> str:
        grid = "x".join(map(str, self.grid))
        return f"{self.kernel}[{grid}] {', '.join(self.reads)} -> {', '.join(self.writes)}"


@dataclass(frozen=True)
class Fill:
    """Every element of a buffer becomes `value`."""

    buffer: str
    value: float

    @property
    def reads(self) -> tuple[str, ...]:
        return ()

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.buffer,)

    def __str__(self) -> str:
        return f"fill({self.value}) -> {self.buffer}"


@dataclass(frozen=True)
class Copy:
    """A buffer of the same type and layout, byte by byte."""

    source: str
    target: str

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.target,)

    def __str__(self) -> str:
        return f"copy {self.source} -> {self.target}"


@dataclass(frozen=True)
class Collective:
    """What the ranks do together: one of the ops of `ops/collective.py`.

    ins, outs  (buffer, type) of each operand and result; they share memory where they are alike
    bucket     the buffer that holds all results behind one another, "" where none does
    bytes      of the results: what a rank has to tell or to hear
    """

    op: str
    attrs: Any
    ins: tuple[tuple[str, TensorType], ...]
    outs: tuple[tuple[str, TensorType], ...]
    bucket: str = ""
    where: Where = field(default=NOWHERE, compare=False)

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.ins)

    @property
    def writes(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.outs)

    @property
    def dtype(self) -> DType:
        """The element type of all that it moves."""
        return self.outs[0][1].dtype

    @property
    def bytes(self) -> int:
        return sum(t.bytes for _, t in self.outs)

    def __str__(self) -> str:
        tensors = f"{len(self.outs)} tensor{'s' * (len(self.outs) > 1)}"
        return f"{self.op} of {tensors}, {self.bytes:,} bytes, over {self.attrs.ranks} ranks"


Step = Launch | Fill | Copy | Collective


def arguments(e: Epilogue | None) -> tuple[Ref, ...] | None:
    """The pointers of a generated function, as one argument of the kernel."""
    return e.args if e is not None else None


def source(e: Epilogue | None) -> Source | None:
    return e.source if e is not None else None


def preload(e: Epilogue | None) -> Source | None:
    """The function that loads an epilogue's operands before it runs."""
    return e.preload if e is not None else None


def bind(launch: Launch) -> tuple[tuple[Arg, ...], dict[str, Any], dict[str, Any]]:
    """(arguments, constexprs, options) of a launch: the one source for launcher, build, tuner.

    A Ref or a Table among the arguments stands for a pointer and a Box for a descriptor, a Source
    among the constexprs for its function. CompileError where the kernel does not take them so.
    """
    wrong = None
    if launch.driver is None:  # a driver is written for its launch
        signature = signature_of(launch.module, launch.kernel)
        wrong = signature.mismatch(len(launch.args), [k for k, _ in launch.constants])
    if wrong is not None:
        raise CompileError(
            f"{launch.kernel} cannot be launched so: {wrong}",
            **launch.where.located,
        )
    options: dict[str, Any] = {
        "num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip
    return launch.args, dict(launch.constants), options


def make(
    kernel: str,
    module: str,
    args: tuple[Arg, ...],
    constants: dict[str, Any],
    grid: tuple[int, ...],
    *,
    reads: tuple[str, ...] = (),
    writes: tuple[str, ...] = (),
    epilogues: tuple[Epilogue | None, ...] = (),
    **rest: Any,
) -> Launch:
    """A Launch with what its epilogues read, write and may do in place added."""
    inplace: tuple[tuple[str, str], ...] = ()
    for e in epilogues:
        if e is not None:
            reads, writes = (*reads, *e.reads), (*writes, *e.writes)
            inplace += e.inplace
    # An operand that the anchor or another epilogue also reads cannot be updated in place.
    often = [r for r in reads if reads.count(r) > 1]
    return Launch(
        kernel, f"graphnet.kernels.{module}", args, tuple(constants.items()),
        (*grid, 1, 1)[:3],  # type: ignore[arg-type]
        tuple(dict.fromkeys(reads)), tuple(dict.fromkeys(writes)),
        inplace=tuple(p for p in inplace if p[0] not in often), **rest,
    )  # fmt: skip
