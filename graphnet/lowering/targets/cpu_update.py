"""Updates of the cpu target, in place at the end of the step.

They walk the memory of the state in its own order. Plain SGD of one kind is one call of torch's;
every other update runs its op's formula over blocks that stay in cache. The gradient of a wide
linear layer is never whole: some rows of it are made in a buffer that stays, and used up at once.
(A fresh buffer of AlexNet's fc6, 151 MB, costs 100 ms of page faults at every step; rows and update
together take 19 ms.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphnet.ir.graph import Eqn, Value
from graphnet.ir.op import get_op
from graphnet.ir.types import Layout
from graphnet.lowering.targets.cpu_task import Call, Env, Slot, Task

Storage = dict[str, torch.Tensor]
WIDE = 1 << 20  # elements of a gradient from which on it is made by rows
_BUFFER = 1 << 21  # elements of the rows
_BLOCK = 1 << 17  # elements of a block of a formula: with its operands it fits the cache


def replaced(update: Eqn) -> list[tuple[Value, Value]]:
    """(result, the state operand that it replaces) of an update: all operands but the second."""
    return list(zip(update.results, (update.inputs[0], *update.inputs[2:]), strict=False))


def recorded(record: Eqn) -> list[tuple[Value, Value]]:
    """The same of a `record_step`, whose fourth result replaces nothing."""
    return replaced(record)[:3]


def scalars_of(update: Eqn) -> tuple[Value, ...]:
    """The hyper-parameters, behind the tensors."""
    return update.inputs[1 + len(update.results) :]


# (state tensors of each parameter, gradients, scalars): the updates, in place. What belongs
# together lies alike, without gaps.
Apply = Callable[[list[list[torch.Tensor]], list[torch.Tensor], list[torch.Tensor]], None]


def _applied(update: Eqn) -> Apply:
    """How updates of this kind run: torch's fused kernel where it has the formula."""
    attrs: Any = update.attrs
    plain = update.op == "sgd_update" and attrs.form == "torch"
    if plain and not attrs.l1 and not attrs.dampening:
        return _fused_sgd(attrs)
    formula = get_op(update.op).reference

    def apply(
        states: list[list[torch.Tensor]], grads: list[torch.Tensor], scalars: list[torch.Tensor]
    ) -> None:
        for state, g in zip(states, grads, strict=True):
            flat, g = [t.view(-1) for t in state], g.view(-1)
            for start in range(0, g.numel(), _BLOCK):
                w, *slots = parts = [t[start : start + _BLOCK] for t in flat]
                new = formula(attrs, w, g[start : start + _BLOCK], *slots, *scalars)
                for old, value in zip(parts, new, strict=True):
                    old.copy_(value)

    return apply


def _fused_sgd(attrs: Any) -> Apply:
    def apply(
        states: list[list[torch.Tensor]], grads: list[torch.Tensor], scalars: list[torch.Tensor]
    ) -> None:
        lr, *momentum, decay = map(float, scalars)
        torch._fused_sgd_(
            [s[0] for s in states],
            grads,
            [s[1] for s in states] if momentum else [],
            weight_decay=decay * attrs.decay_mult, momentum=momentum[0] if momentum else 0.0,
            lr=lr * attrs.lr_mult, dampening=0.0, nesterov=attrs.nesterov, maximize=attrs.maximize,
            is_first_step=False,  # the buffers start at zero
        )  # fmt: skip

    return apply


@dataclass(frozen=True)
class Update:
    """An update with what guards its results: `if_finite` equations on the same flags, or none."""

    eqn: Eqn
    guards: tuple[Eqn, ...] = ()

    @property
    def eqns(self) -> tuple[Eqn, ...]:
        return (self.eqn, *self.guards)

    @property
    def flags(self) -> tuple[Value, ...]:
        return self.guards[0].inputs[2:] if self.guards else ()

    @property
    def kind(self) -> tuple:
        """Updates of one kind can be one call."""
        return self.eqn.op, self.eqn.attrs, scalars_of(self.eqn), self.flags

    @property
    def new(self) -> list[tuple[Value, Value]]:
        """(value that leaves it, the state that it replaces)."""
        if self.guards:
            return [(g.out, g.inputs[1]) for g in self.guards]
        return replaced(self.eqn)

    def state(self, storage: Storage) -> list[torch.Tensor]:
        return [storage[old.name] for _, old in replaced(self.eqn)]

    def results(self, storage: Storage, slot: Slot) -> list[tuple[int, torch.Tensor]]:
        """Where each value is found afterwards: in the state."""
        return [
            (slot(v), storage[old.name])
            for v, old in (*replaced(self.eqn), *(self.new if self.guards else ()))
        ]


def _in_order_of(layout: Layout) -> Callable[[torch.Tensor], torch.Tensor]:
    """A tensor without gaps whose memory is in the order of the layout: a view, or a copy."""
    return torch.Tensor.contiguous if layout.is_default else layout.elements


def _finite(env: Env, flags: Sequence[int]) -> bool:
    return all(math.isfinite(env[i]) for i in flags)


def updated(updates: Sequence[Update], storage: Storage) -> Task:
    """All updates of one kind in one call, in place on the state."""
    first = updates[0]
    scalars, apply = scalars_of(first.eqn), _applied(first.eqn)
    ordered = [_in_order_of(u.eqn.inputs[0].type.layout) for u in updates]
    states = [
        [as_stored(t) for t in u.state(storage)]
        for u, as_stored in zip(updates, ordered, strict=True)
    ]
    grads = [u.eqn.inputs[1] for u in updates]

    def make(slot: Slot) -> Call:
        ig, numbers = [slot(g) for g in grads], [slot(v) for v in scalars]
        flags = [slot(v) for v in first.flags]
        out = [pair for u in updates for pair in u.results(storage, slot)]

        def call(env: Env) -> None:
            if _finite(env, flags):
                # Mostly no copy: the gradient was made as its parameter lies.
                gradients = [as_stored(env[i]) for as_stored, i in zip(ordered, ig, strict=True)]
                apply(states, gradients, [env[i] for i in numbers])
            for at, t in out:
                env[at] = t

        return call

    eqns = tuple(e for u in updates for e in u.eqns)
    results = tuple(v for e in eqns for v in e.results)
    return Task((*grads, *scalars, *first.flags), results, make, eqns)


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


def wide_updated(wgrad: Eqn, update: Update, storage: Storage) -> Task:
    """dy^T x by rows, each block used by the update at once."""
    x, dy = wgrad.inputs
    scalars, apply = scalars_of(update.eqn), _applied(update.eqn)
    state = update.state(storage)
    rows = max(1, _BUFFER // state[0].shape[1])
    held = torch.empty(min(rows, state[0].shape[0]), state[0].shape[1])

    def make(slot: Slot) -> Call:
        ix, idy, numbers = slot(x), slot(dy), [slot(v) for v in scalars]
        flags, out = [slot(v) for v in update.flags], update.results(storage, slot)

        def call(env: Env) -> None:
            image, above = env[ix], env[idy].t().contiguous()
            hypers = [env[i] for i in numbers]
            for start in range(0, above.shape[0] if _finite(env, flags) else 0, rows):
                part = slice(start, start + rows)
                g = held[: above[part].shape[0]]
                torch.mm(above[part], image, out=g)
                apply([[t[part] for t in state]], [g], hypers)
            for at, t in out:
                env[at] = t

        return call

    results = tuple(v for e in update.eqns for v in e.results)
    return Task((x, dy, *scalars, *update.flags), results, make, update.eqns)
