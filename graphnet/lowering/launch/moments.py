"""What a convolution's kernel gets where batch normalization follows, whose statistics it keeps in
parts: kernels/moments.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graphnet.ir.graph import Value
from graphnet.lowering.launch.codegen import Ref
from graphnet.lowering.launch.steps import Launch
from graphnet.lowering.launch.work import Work

OUT = 32  # accumulators of a thread that go out at once beside their moments; 64 can spill


@dataclass(frozen=True)
class Moments:
    """What is kept in `parts`; nothing where no batch normalization follows.

    args   the number of live rows, and the workspace
    value  what the epilogue gives back to the kernel
    z      the result whose moments they are
    """

    parts: int = 0
    args: tuple[Ref, Ref] | None = None
    value: Value | None = None
    z: Value | None = None

    @property
    def constants(self) -> dict[str, Any]:
        return {"PARTS": self.parts, "STORED": self.z.type.dtype.name if self.z else ""}

    def at_once(self, warps: int, most: int = 0) -> dict[str, int]:
        """How many elements of a tile go out at once, where `most` for each thread could; 0 for
        all."""
        if self.z is not None:
            most = min(most or OUT, OUT)
        return {"AT_ONCE": 32 * warps * most}

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.args[0].name,) if self.args else ()

    @property
    def rest(self) -> dict[str, Any]:
        """Of the launch: what it writes beside its epilogue, and its workspace."""
        if self.args is None or self.z is None:
            return {}
        name = self.args[1].name
        scratch = (name, size(self.parts, self.z.type.shape[1]))
        return {"writes": (name,), "scratch": (scratch,)}


def size(parts: int, channels: int) -> int:
    """Bytes of a workspace: a number of each part, a mean and a sum of each of its channels."""
    return 4 * parts * (1 + 2 * channels)


def moments(work: Work, parts: int) -> Moments:
    """What the kernel of `work` keeps, in so many parts."""
    if work.then is None:
        return Moments()
    z, live = work.then.anchor.inputs[:2]
    outer = work.then.outer.get(z, z)
    inner = next(i for i, o in work.stores if o == outer)
    args = work.then.ref(live), _workspace(work.then)
    return Moments(parts, args, inner, outer)


def kept(norm: Work, steps: Sequence[Launch]) -> tuple[Ref, int] | None:
    """(workspace, parts) that these launches leave to a batch normalization; None where they keep
    nothing."""
    work = _workspace(norm)
    made = next((s for s in steps if work.name in s.writes), None)
    return (work, dict(made.constants)["PARTS"]) if made else None


def _workspace(norm: Work) -> Ref:
    return Ref(f".moments{norm.name[norm.anchor.inputs[0]]}", "f32")
