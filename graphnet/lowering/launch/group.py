"""Groups: several small launches that need nothing of each other run as one.

A generated driver, a real file like every epilogue, deals its programs out by their number: the
first ones are the first member's, and so on. A member is called as it would be launched, with
arguments and constants of its own, and learns from its constant AT which program it is
(`kernels/common.py`). The text names no buffer, so groups that are alike share one binary.

All members run with one number of warps, since a launch has one, the most that a member asks for. A
kernel of a single program may get more than it asks for: its time is latency. Results of any other
kernel may depend on the number in their last bits (the order of a sum), and its tiles were chosen
for it: only equal ones meet.
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


def group(turns: Sequence[Sequence[Launch]]) -> Launch:
    """One launch of several that run at once. No member may read or write what another writes.

    turns  of each member the launches that take turns in it: one, or several of one program, of
           which a later one may read what an earlier one has written
    """
    members = [m for turn in turns for m in turn]
    warps = max(m.num_warps for m in members)
    reads = [r for m in members for r in m.reads]
    written = {w for turn in turns for m in turn[:-1] for w in m.writes}
    pairs = [p for m in members for p in m.inplace]
    heavy = max(members, key=lambda m: m.flops)
    driver, sources = _driver(turns)
    return Launch(
        "+".join(dict.fromkeys(m.kernel for m in members)),
        "group",
        tuple(a for m in members for a in m.args if a is not None),
        tuple((f"E{k}", s) for k, s in enumerate(sources)),
        (sum(m.programs for m in members), 1, 1),
        tuple(r for r in dict.fromkeys(reads) if r not in written),
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
        turns=tuple(map(tuple, turns)),
        driver=driver,
    )  # fmt: skip


def _driver(turns: Sequence[Sequence[Launch]]) -> tuple[Source, list[Source]]:
    """The text of the driver, and the generated functions that it takes as constants."""
    calls: list[str] = []
    args: list[str] = []
    sources: list[Source] = []
    first = 0
    for turn in turns:
        after = first + turn[0].programs
        calls.append(f"    {'elif' if calls else 'if'} pid < {after}:")
        for k, m in enumerate(turn):
            calls += ["        tl.debug_barrier()"] if k else []
            calls += _call(m, first, args, sources)
        first = after
    kernels = sorted({(m.module, m.kernel) for turn in turns for m in turn})
    imports = [f"from {module} import {kernel}" for module, kernel in kernels]
    taken = [*args, *(f"E{k}: tl.constexpr" for k in range(len(sources)))]
    text = [
        "import triton", "import triton.language as tl", "", *imports, "", "", "@triton.jit",
        f"def group({', '.join(taken)}):", "    pid = tl.program_id(0)", *calls,
    ]  # fmt: skip
    return Source("\n".join(text) + "\n"), sources


def _call(m: Launch, first: int, args: list[str], sources: list[Source]) -> list[str]:
    """The lines that call a member whose first program is `first`; what they take is added."""
    passed, constants, _ = bind(m)
    given = []
    for a in passed:
        if a is not None:
            args.append(f"a{len(args)}")
        given.append("None" if a is None else args[-1])
    for name, value in constants.items():
        if isinstance(value, Source):
            sources.append(value)
            given.append(f"{name}=E{len(sources) - 1}")
        else:
            given.append(f"{name}={value!r}")
    given.append(f"{PLACE}=({first}, {m.grid[0]}, {m.grid[1]})")
    return [f"        {m.kernel}(", *(f"            {part}," for part in given), "        )"]
