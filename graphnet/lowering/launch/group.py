"""Groups: several small launches that need nothing of each other run as one.

A generated driver, a real file like every epilogue, deals its programs out by their number: the
first ones are the first member's, and so on. A member is called as it would be launched, with
arguments and constants of its own, and learns from its constant AT which program it is
(`kernels/common.py`). The text names no buffer, so groups that are alike share one binary.

All members run with one number of warps, since a launch has one. A kernel of a single program takes
that of the others: its time is latency. Results of any other kernel may depend on the number in
their last bits (the order of a sum), and its tiles were chosen for it: only equal ones meet.
Registers and shared memory are the most that a member takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

from graphnet.lowering.launch.files import Source
from graphnet.lowering.launch.signature import signature_of
from graphnet.lowering.launch.steps import Launch, bind

GROUPS = "groups"  # for GRAPHNET_DISABLE
PLACE = "AT"  # the constant of kernels that can be members


def outside(launch: Launch) -> str | None:
    """Why a launch cannot be a member of any group, as a sentence; None where it can."""
    if launch.members:
        return "it is a group itself"
    if PLACE not in signature_of(launch.module, launch.kernel).constants:
        return f"their kernels cannot be members of a group: they take no {PLACE}"
    return None


def group(members: Sequence[Launch]) -> Launch:
    """One launch of several that run at once. No member may read or write what another writes."""
    warps = max(members, key=lambda m: m.programs).num_warps
    reads = [r for m in members for r in m.reads]
    pairs = [p for m in members for p in m.inplace]
    heavy = max(members, key=lambda m: m.flops)
    driver, sources = _driver(members)
    return Launch(
        "+".join(dict.fromkeys(m.kernel for m in members)),
        "group",
        tuple(a for m in members for a in m.args if a is not None),
        tuple((f"E{k}", s) for k, s in enumerate(sources)),
        (sum(m.programs for m in members), 1, 1),
        tuple(dict.fromkeys(reads)),
        tuple(dict.fromkeys(w for m in members for w in m.writes)),
        num_warps=warps,
        num_stages=max(m.num_stages for m in members),
        scratch=tuple(dict.fromkeys(s for m in members for s in m.scratch)),
        # What another member reads, too, it may read after this one has written there.
        inplace=tuple(p for p in pairs if reads.count(p[0]) == 1),
        starts_as=tuple(p for m in members for p in m.starts_as),
        flops=sum(m.flops for m in members),
        bytes=sum(m.bytes for m in members),
        math=heavy.math,
        padded=sum(m.padded or m.flops for m in members) if heavy.padded else 0,
        where=reduce(lambda a, b: a.merged(b), (m.where for m in members)),
        members=tuple(members),
        driver=driver,
    )  # fmt: skip


def _driver(members: Sequence[Launch]) -> tuple[Source, list[Source]]:
    """The text of the driver, and the generated functions that it takes as constants."""
    lines: list[str] = []
    sources: list[Source] = []
    count = first = 0
    for m in members:
        args, constants, _ = bind(m)
        given = []
        for a in args:
            given.append("None" if a is None else f"a{count}")
            count += a is not None
        for name, value in constants.items():
            if isinstance(value, Source):
                given.append(f"{name}=E{len(sources)}")
                sources.append(value)
            else:
                given.append(f"{name}={value!r}")
        width, height, _ = m.grid
        given.append(f"{PLACE}=({first}, {width}, {height})")
        first += m.programs
        lines.append(f"    {'elif' if lines else 'if'} pid < {first}:")
        lines.append(f"        {m.kernel}(")
        lines += [f"            {part}," for part in given]
        lines.append("        )")
    kernels = sorted({(m.module, m.kernel) for m in members})
    imports = [f"from {module} import {kernel}" for module, kernel in kernels]
    taken = [
        *(f"a{k}" for k in range(count)),
        *(f"E{k}: tl.constexpr" for k in range(len(sources))),
    ]
    text = [
        "import triton", "import triton.language as tl", "", *imports, "", "", "@triton.jit",
        f"def group({', '.join(taken)}):", "    pid = tl.program_id(0)", *lines,
    ]  # fmt: skip
    return Source("\n".join(text) + "\n"), sources
