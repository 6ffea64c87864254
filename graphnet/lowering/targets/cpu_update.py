"""Updates of the cpu target, in place at the end of the step.

Small ones of one kind are one call. The gradient of a wide linear layer is never whole: some rows
of it are made in a buffer that stays, and used up at once. (A fresh buffer of AlexNet's fc6,
151 MB, costs 100 ms of page faults at every step; rows and update together take 19 ms.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphnet.ir.graph import Eqn, Value
from graphnet.lowering.targets.cpu_task import Call, Env, Slot, Task

Storage = dict[str, torch.Tensor]
WIDE = 1 << 20  # elements of a gradient from which on it is made by rows
_BUFFER = 1 << 21  # elements of the rows


def replaced(update: Eqn) -> list[tuple[Value, Value]]:
    """(result, the state operand that it replaces) of an update or a record."""
    return list(zip(update.results, update.inputs[::2], strict=False))


def sgd(updates: Sequence[Eqn], storage: Storage) -> Task:
    """All updates of one kind in one call, in place on the state."""
    attrs: Any = updates[0].attrs
    lr, *mid, wd = updates[0].inputs[3 if attrs.momentum else 2 :]
    params = [storage[e.inputs[0].name] for e in updates]
    slots = [storage[e.inputs[2].name] for e in updates] if attrs.momentum else []
    grads = [e.inputs[1] for e in updates]
    new = [(v, storage[old.name]) for e in updates for v, old in replaced(e)]

    def make(slot: Slot) -> Call:
        ig = [slot(g) for g in grads]
        ilr, iwd, imom = slot(lr), slot(wd), [slot(m) for m in mid]
        out = [(slot(v), t) for v, t in new]

        def call(env: Env) -> None:
            torch._fused_sgd_(
                params,
                # The kernel walks storage: a gradient must lie as its parameter does.
                [env[i].contiguous() for i in ig],
                slots,
                weight_decay=float(env[iwd]), momentum=float(env[imom[0]]) if imom else 0.0,
                lr=float(env[ilr]), dampening=0.0, nesterov=attrs.nesterov, maximize=False,
                is_first_step=False,  # the buffers start at zero
            )  # fmt: skip
            for at, t in out:
                env[at] = t

        return call

    results = tuple(v for e in updates for v in e.results)
    return Task((*grads, lr, *mid, wd), results, make, tuple(updates))


def bias_gradient(wgrad: Eqn) -> Task:
    """The second result of a linear_wgrad alone."""
    dy, db = wgrad.inputs[1], wgrad.outputs[1]
    assert db is not None

    def make(slot: Slot) -> Call:
        i, o = slot(dy), slot(db)

        def call(env: Env) -> None:
            env[o] = env[i].sum(0)

        return call

    return Task((dy,), (db,), make, ())


def wide_sgd(wgrad: Eqn, update: Eqn, storage: Storage) -> Task:
    """dy^T x by rows, each block used by the update at once."""
    x, dy = wgrad.inputs
    attrs: Any = update.attrs
    lr, *mid, wd = update.inputs[3 if attrs.momentum else 2 :]
    weight = storage[update.inputs[0].name]
    slots = [storage[update.inputs[2].name]] if attrs.momentum else []
    rows = max(1, _BUFFER // weight.shape[1])
    held = torch.empty(min(rows, weight.shape[0]), weight.shape[1])
    new = [(v, storage[old.name]) for v, old in replaced(update)]

    def make(slot: Slot) -> Call:
        ix, idy, ilr, iwd, imom = slot(x), slot(dy), slot(lr), slot(wd), [slot(m) for m in mid]
        out = [(slot(v), t) for v, t in new]

        def call(env: Env) -> None:
            image, above = env[ix], env[idy].t().contiguous()
            hypers = {
                "weight_decay": float(env[iwd]), "momentum": float(env[imom[0]]) if imom else 0.0,
                "lr": float(env[ilr]), "dampening": 0.0, "nesterov": attrs.nesterov,
                "maximize": False, "is_first_step": False,
            }  # fmt: skip
            for start in range(0, weight.shape[0], rows):
                part = slice(start, start + rows)
                g = held[: above[part].shape[0]]
                torch.mm(above[part], image, out=g)
                torch._fused_sgd_([weight[part]], [g], [s[part] for s in slots], **hypers)
            for at, t in out:
                env[at] = t

        return call

    return Task((x, dy, lr, *mid, wd), update.results, make, (update,))
