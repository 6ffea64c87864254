"""Regions: one launch whose programs run several equations as stages (kernels/region.py).

`passes/regions.py` proposes a region, `joins` says whether it pays, and `Body` writes its kernel: a
call for each stage, a barrier of the block where a stage reads what an earlier one has stored, and
the composed epilogues of all stages, in one generated file.

A stage takes one or several members of the region and writes their call (region_conv.py has the
first). To add one: its jit function in kernels/, imported by kernels/region.py, that works on the
images from `first` on; a class under `Stage` here, in a file for its family, and a row in STAGES;
then a rule in passes/regions.py that lets its equation join.

What passes between stages lies where it would lie without a region: a result in its own buffer, and
what nobody else reads in a workspace. What passes within a stage stays in registers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from graphnet.ir.graph import Eqn, Value
from graphnet.ir.types import NHWC, Layout
from graphnet.lowering.launch.codegen import HEADER, PARAMETERS, Index, Ref, write_epilogue
from graphnet.lowering.launch.config import Config, cdiv
from graphnet.lowering.launch.cost import HOUSE, Ceiling, ceiling, floor_us
from graphnet.lowering.launch.files import Source
from graphnet.lowering.launch.steps import Launch, make
from graphnet.lowering.launch.variants import Problem, Variant
from graphnet.lowering.launch.work import Work
from graphnet.ops.fused import eqn_cost
from graphnet.passes.templates import anchors_of, members_of

INT32 = 1 << 31
POINTERS = 48  # of one kernel
# Measured on an H100: LeNet-5's step of 22 launches took 299 us in one graph, and an empty launch
# 1.3; FMAs in loops reach a quarter of the rate, in one program an image.
LAUNCH_US, GAP_US, STAGE_US, FMA_SHARE = 13.6, 1.3, 0.5, 0.25
# Shares of its floor, padding included, that a launch reaches; products without matrix units are
# fed from shared memory.
REACHED, IEEE_REACHED = 0.6, 0.4


class Stage(ABC):
    """One way to compute members of a region, one after the other in one call.

    ops  what the members are, in order: their anchors, "+" between those of a pair
    """

    ops: tuple[str, ...]
    second_pass: tuple[str, ...] = ()  # kernels that add up what its programs leave

    @abstractmethod
    def refusal(self, members: Sequence[Eqn], kept: set[Value]) -> str | None:
        """Why it cannot compute these members, as a sentence; `kept` is read outside of them."""

    @abstractmethod
    def write(self, body: Body, works: Sequence[Work]) -> None:
        """Adds the call."""

    def share(self) -> float:
        """Which share of the FMA rate it reaches, of that of the best."""
        return 1.0

    def us(self, members: Sequence[Eqn], programs: int, gpu: Ceiling) -> float:
        """About how long it takes, where one program has all of its images at once."""
        flops = sum(eqn_cost(m).flops for m in members)
        rate = gpu.ieee * FMA_SHARE * self.share()
        return STAGE_US + 1e6 * flops / rate * max(1.0, gpu.processors / programs)


@dataclass
class Body:
    """The generated function of a region, while its stages write it.

    places  what holds each value of the region outside of registers: an operand, a result, or a
            workspace
    """

    work: Work
    config: Config
    images: int
    places: Mapping[Value, Value]
    args: list[Ref] = field(default_factory=list)
    functions: dict[tuple[str, ...], str] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    seen: int = 0  # reads of stages that are written
    writes: list[str] = field(default_factory=list)
    scratch: dict[str, int] = field(default_factory=dict)  # workspaces of a stage, in bytes
    twins: dict[Value, Value] = field(default_factory=dict)  # values that lie channels-last, too
    after: list[Launch] = field(default_factory=list)  # second passes
    pending: set[str] = field(default_factory=set)  # stored since the last barrier

    def name(self, v: Value) -> str:
        """The buffer of a value: that of an operand or a result outside, or a workspace."""
        held = self.places[v]
        return self.work.name.get(held, held.name)

    def member(self, eqn: Eqn, kept: set[Value]) -> Work:
        """A member as the work that a kernel of its own would have; what it stores is in `kept`."""
        anchors = anchors_of(eqn)
        rest = tuple(e for e in eqn.plain if e not in anchors)
        stores = tuple((v, self.places[v]) for v in eqn.results if v in kept)
        names = {v: self.name(v) for v in self.places}
        return Work(eqn, anchors, rest, names | {o: names[i] for i, o in stores},
                    self.places, stores)  # fmt: skip

    def read(self, v: Value) -> str:
        """The pointer to an operand of a stage."""
        self.reads.append(self.name(v))
        return self._pointer(Ref(self.name(v), self.places[v].type.dtype.name))

    def own(self, name: str) -> str:
        """The name of a workspace of this region: values inside are called alike in all of them."""
        return f".{self.work.eqn.results[0].name}.{name}"

    @property
    def programs(self) -> int:
        return cdiv(self.images, self.config.BM)

    def store(self, v: Value) -> str:
        """The pointer to a result outside that a stage stores by itself."""
        self.writes.append(self.work.name[v])
        return self._pointer(Ref(self.work.name[v], v.type.dtype.name))

    def extra(self, name: str, dtype: str, size: int) -> str:
        """The pointer to a workspace of `size` bytes that a stage writes."""
        self.scratch[name] = size
        self.writes.append(name)
        return self._pointer(Ref(name, dtype))

    def twin(self, v: Value) -> str:
        """The pointer to a channels-last copy of a value, which its stage writes beside it."""
        copy = Value(self.own(f"twin.{v.name}"), v.type.with_layout(NHWC))
        self.twins[v] = copy
        return self.extra(copy.name, v.type.dtype.name, v.type.bytes)

    def read_twin(self, v: Value) -> str:
        """The pointer to a value as it lies channels-last, where it has a copy."""
        if v not in self.twins:
            return self.read(v)
        self.reads.append(self.twins[v].name)
        return self._pointer(Ref(self.twins[v].name, v.type.dtype.name))

    def _pointer(self, ref: Ref) -> str:
        if ref not in self.args:
            self.args.append(ref)
        return f"args[{self.args.index(ref)}]"

    def epilogue(
        self, work: Work, roots: Mapping[Value, str], index: Index, returns: Value | None = None,
        bias: Value | None = None,
    ) -> str:  # fmt: skip
        """The name of the function that runs a member's elementwise code and stores its results;
        "None" where it has nothing to do."""
        if not work.rest and not work.stores:
            return "None"
        made = write_epilogue(
            index, work.name, roots, work.rest, work.stores, note=work.note, returns=returns,
            args=self.args, bias=bias,
        )  # fmt: skip
        self.reads += made.reads
        self.writes += made.writes
        return self.functions.setdefault(made.lines, f"e{len(self.functions)}")

    def call(self, function: str, operands: Sequence[str], constants: Mapping[str, Any]) -> None:
        """Appends a stage: its function of kernels/region.py, pointers, and constants, of which
        strings are code. It comes behind a barrier where it reads what was stored before."""
        if self.pending & set(self.reads[self.seen :]):
            self.calls.append("tl.debug_barrier()")
            self.pending = set()
        self.pending |= set(self.writes)
        self.seen = len(self.reads)
        given = [*operands, "args", *(f"{k}={v}" for k, v in constants.items())]
        lines = [f"{function}(", "    first,"]
        for text in given:
            if len(lines[-1]) + len(text) > 90:
                lines.append("   ")
            lines[-1] += f" {text},"
        self.calls += [*lines, ")"]

    def source(self) -> Source:
        """The file: the body, and below it the functions that its stages call."""
        names = dict.fromkeys(line.partition("(")[0] for line in self.calls if line[0] not in " )")
        imported = ", ".join(n for n in names if n != "tl.debug_barrier")
        head = HEADER.replace("\n\n\n@", f"\nfrom graphnet.kernels.region import {imported}\n\n\n@")
        text = f"{head}def body(first, args):\n" + _indented(self.calls)
        for lines, name in self.functions.items():
            text += f"\n\n@triton.jit\ndef {name}{PARAMETERS}\n" + _indented(lines)
        return Source(text + "\n\n" + "".join(f"# {n}\n" for n in self.notes))


def _indented(lines: Sequence[str]) -> str:
    return "".join(f"    {line}\n" for line in lines)


Cut = list[tuple[Stage, tuple[Eqn, ...], set[Value]]]


def cut(eqn: Eqn, known: Sequence[Stage]) -> Cut | str:
    """The stages of a region, of those known: each with its members, and those of their results
    that are read outside of it; or why there are none."""
    assert eqn.body is not None
    members, out, said, k = members_of(eqn), [], [], 0
    while k < len(members):
        found = None
        for stage in known:
            group = members[k : k + len(stage.ops)]
            if tuple("+".join(a.op for a in anchors_of(m)) for m in group) != stage.ops:
                continue
            outside = [m for m in members if m not in group]
            kept = {v for m in outside for v in m.inputs} | set(eqn.body.returns)
            why = stage.refusal(group, kept)
            if why is None:
                found = stage, group, kept
                break
            said.append(why)
        if found is None:
            return said[0] if said else f"no stage computes {anchors_of(members[k])[0].op}"
        out.append(found)
        k += len(found[1])
    return out


def _places(eqn: Eqn, stages: Cut) -> dict[Value, Value]:
    assert eqn.body is not None
    out = dict(zip(eqn.body.input_values, eqn.inputs, strict=True))
    out |= dict(zip(eqn.body.returns, eqn.results, strict=True))
    for _, group, kept in stages:
        for v in (v for m in group for v in m.results):
            if v in kept and v not in out:
                held = f".{eqn.results[0].name}.{v.name}"
                readers = [e for e in eqn.body.eqns if v in e.inputs]
                last = all(e.op == "conv2d_wgrad" for e in readers) and len(v.type.shape) == 4
                out[v] = Value(held, v.type.with_layout(NHWC if last else Layout()))
    return out


class Stages(Variant):
    """One program for each of the images, or for several of them."""

    name = "in_stages"
    ops = ("region",)
    alone_us = LAUNCH_US  # of an equation in a launch of its own, beyond its floor

    def known(self) -> Sequence[Stage]:
        """The stages that its kernel can have."""
        from graphnet.lowering.launch.region_conv import STAGES as convolutions
        from graphnet.lowering.launch.region_grad import STAGES as gradients

        return (*convolutions, *gradients)

    def accepts(
        self, eqn: Eqn, layouts: Mapping[Value, Layout], dtype: str, arch: int
    ) -> str | None:
        if members_of(eqn) == (eqn,):
            return "it is no region"
        stages = cut(eqn, self.known())
        if isinstance(stages, str):
            return stages
        for v in (*eqn.inputs, *eqn.results):
            if v.type.numel >= INT32:
                return f"{v}: {v.type} has more elements than 32 bits count"
            if v.type.layout.s2d or v.type.layout.order == "hwcn":
                return f"{v} lies as {{{v.type.layout}}}"
        count = len({*eqn.inputs, *_places(eqn, stages).values()})
        if count > POINTERS:
            return f"the kernel would take {count} pointers, at most {POINTERS} are"
        return None

    def configs(self, problem: Problem) -> Iterator[Config]:
        for warps in (8, 4, 16):
            yield Config(BM=1, BLOCK=32 * warps, num_warps=warps)

    def interpretable(self, config: Config, problem: Problem) -> Config:
        return replace(config, BM=min(problem.shape[0], 64), BLOCK=4096)

    def joins(self, whole: Work, parts: Sequence[Work], padded: Sequence[int]) -> str | None:
        together, apart = self.us(whole), sum(map(self.us, parts, padded))
        if together < apart:
            return None
        return f"one launch would take about {together:.0f} us, apart they take {apart:.0f}"

    def launch(self, work: Work, config: Config) -> list[Launch]:
        stages = cut(work.eqn, self.known())
        assert not isinstance(stages, str), stages
        n = work.problem.shape[0]
        body = Body(work, config, n, _places(work.eqn, stages))
        for stage, group, kept in stages:
            stage.write(body, [body.member(m, kept) for m in group])
        held = {v.name: v.type.bytes for v in body.places.values() if v.name.startswith(".")}
        return [
            make(
                "region", "region", (tuple(body.args),),
                {"IMAGES": config.BM, "BODY": body.source()}, (cdiv(n, config.BM),),
                reads=tuple(r for r in body.reads if r not in body.writes),
                writes=tuple(body.writes), num_warps=config.num_warps,
                scratch=tuple((held | body.scratch).items()),
            ),
            *body.after,
        ]  # fmt: skip

    def us(self, work: Work, padded: int = 0) -> float:
        """About how long an equation takes, on the GPU that floors are for."""
        gpu = ceiling(HOUSE)
        if len(work.members) == 1:
            cost = eqn_cost(work.eqn)
            math = getattr(work.anchors[0].attrs, "math", "ieee") if work.anchors else "ieee"
            reached = REACHED if math != "ieee" else IEEE_REACHED
            return self.alone_us + floor_us(max(cost.flops, padded), cost.bytes, math) / reached
        stages = cut(work.eqn, self.known())
        assert not isinstance(stages, str)
        programs = cdiv(work.problem.shape[0], self.rule(work.problem).BM)
        return GAP_US + sum(
            stage.us(group, programs, gpu) + GAP_US * len(stage.second_pass)
            for stage, group, _ in stages
        )
