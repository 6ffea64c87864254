"""Launches of batch normalization over several ranks: those of batch_norm.py with the exchanges of
the ranks between them, and what is told and heard (kernels/sync_batch_norm.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from graphnet.ir.graph import Eqn, Value
from graphnet.lowering.launch.batch_norm import (
    BatchNorms,
    Parts,
    normalised,
    shifted,
    statistics,
    sums,
)
from graphnet.lowering.launch.codegen import Ref
from graphnet.lowering.launch.config import Config, cdiv, next_power
from graphnet.lowering.launch.steps import Launch, Step, make
from graphnet.lowering.launch.work import Work

HEARD = (32, 32)  # ranks by channels that a program joins at once


class SyncBatchNorms(BatchNorms):
    """The equations with an image, by the tiles of `BatchNorms`."""

    ops = (
        "batch_norm_stats", "batch_norm_elemt", "batch_norm_grad_reduce", "batch_norm_grad_elemt",
    )  # fmt: skip

    def launch(self, work: Work, config: Config) -> list[Launch]:
        return _MADE[work.anchor.op](Parts(work, config))


def _stats(s: Parts) -> list[Launch]:
    x, live = s.vectors(s.e.inputs)
    parts, scratch = s.partial(3)
    out = s.work.ref(dict(s.work.stores)[s.e.out])
    told = s.launch(
        "tell_statistics", (x, parts, out),
        {"C": s.channels, "XS1": s.strides("X", s.x)["XS1"], "PARTS": s.parts, **s.join},
        (s.joins,), (x, parts), (out,), module="sync_batch_norm",
        bytes=12 * s.channels * (s.parts + 1),
    )  # fmt: skip
    return [statistics(s, x, live, parts, scratch), told]


def _elemt(s: Parts) -> list[Launch]:
    x, mean, var, _, _, *rest = s.vectors(s.e.inputs)
    return normalised(s, (x, mean, var, *(rest or (None, None))))


def _grad_reduce(s: Parts) -> list[Launch]:
    first, joined, _, _ = sums(s, 0)
    return [first, joined]


def _grad_elemt(s: Parts) -> list[Launch]:
    g, x, mean, var, live, rows, products, level, *rest = s.vectors(s.e.inputs)
    weight = rest[0] if rest else None
    return shifted(s, s.e.out, (g, x, mean, var, live, rows, weight, products, level))


_MADE: dict[str, Callable[[Parts], list[Launch]]] = dict(
    zip(SyncBatchNorms.ops, (_stats, _elemt, _grad_reduce, _grad_elemt), strict=True)
)


def gather_stats(eqn: Eqn, name: Callable[[Value], str]) -> list[Step]:
    """The statistics of all ranks from what they have told."""
    a: Any = eqn.attrs
    ranks, _, channels = eqn.inputs[0].type.shape
    told, *old = (Ref(name(v), v.type.dtype.name) for v in eqn.inputs)
    scratch: list[tuple[str, int]] = []
    outs: list[Ref | None] = []
    track = any(v is not None for v in eqn.outputs[2:])
    for k, v in enumerate(eqn.outputs if track else eqn.outputs[:2]):
        ref = Ref(
            name(v) if v is not None else f".heard{k}{eqn.results[0]}", "i64" if k == 4 else "f32"
        )
        outs.append(ref)
        if v is None:
            scratch.append((ref.name, 8 if k == 4 else 4 * channels))
    nothing: list[Ref | None] = [None] * 3
    before, mean, var, *after = (old if track else nothing), *outs[:2], *(outs[2:] or nothing)
    br, bc = HEARD
    bc = min(bc, next_power(channels))
    # Where every program reads the number of batches, one must not count it on meanwhile.
    safe = 2 if a.cumulative else 3
    pairs = tuple(
        (o.name, n.name) for o, n in zip(before[:safe], after[:safe], strict=True)
        if o is not None and n is not None
    )  # fmt: skip
    names = lambda refs: tuple(r.name for r in refs if r is not None)
    made = make(
        "gather_statistics", "sync_batch_norm", (told, mean, var, *before, *after),
        {"C": channels, "RANKS": ranks, "TRACK": track, "MOMENTUM": a.momentum,
         "CUMULATIVE": a.cumulative, "BR": min(br, next_power(ranks)), "BC": bc},
        (cdiv(channels, bc),), reads=names((told, *before)), writes=names((mean, var, *after)),
        scratch=tuple(scratch), flops=4 * eqn.inputs[0].type.numel,
        bytes=4 * channels * (3 * ranks + 2 + 4 * track), where=eqn.where, num_warps=1,
    )  # fmt: skip
    return [replace(made, inplace=pairs)]
