"""Batch normalization of the cpu target, each way in two passes over the image.

Forward it takes along what is added to its result and the relu behind that. Backward it takes along
the relu's gradient before it, and the sum of the two cotangents that the relu may have. The kernels
are those of `kernels/batch_norm.c`; without a C compiler every op runs alone, by torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from graphnet.ir.graph import Eqn, Value
from graphnet.lowering.build import native
from graphnet.lowering.targets.cpu_over import dies
from graphnet.lowering.targets.cpu_task import Call, Env, Slot, Task, generic
from graphnet.ops.norm_rows import lies_in_rows

Readers = Callable[[Value], list[Eqn]]
_SMALL = 1 << 15  # values: fewer take less time on one thread than threads take to start
_long, _double, _int, _at = ctypes.c_long, ctypes.c_double, ctypes.c_int, ctypes.c_void_p


def tasks_of(
    eqns: list[Eqn], made: dict[Value, Eqn], read_by: Readers, spare: Readers
) -> list[Task]:
    """A task for each batch normalization and each gradient of one that a kernel can run.

    made     the equation of each value
    read_by  the readers of a value, none of one that leaves the graph
    spare    the same, but none of a value that may not be written over
    """
    library = native.library("batch_norm")
    if library is None:
        return []
    out: list[Task] = []
    taken: set[int] = set()  # equations that a task has
    for e in eqns:
        if not all(v.type.dtype.name in ("f32", "i32", "i64") for v in e.inputs):
            continue
        if e.op == "batch_norm" and e.outputs[0] is not None:
            out.append(_forward(e, made, read_by, taken, _bound(library, "forward")))
        elif e.op == "batch_norm_grad":
            out.append(_backward(e, made, read_by, spare, taken, _bound(library, "backward")))
        else:
            continue
        taken.update(map(id, out[-1].eqns))
    return out


_ARGUMENTS = {
    "forward": [*[_long] * 3, *[_at] * 3, _double, _at, _int, *[_at] * 5, _double, _at, _at, _int],
    "backward": [*[_long] * 3, *[_at] * 6, _double, *[_at] * 5, _int],
}  # fmt: skip


def _bound(library: ctypes.CDLL, way: str) -> Callable[..., None]:
    kernel = getattr(library, f"batch_norm_{way}")
    kernel.argtypes, kernel.restype = _ARGUMENTS[way], _int

    def run(*args: Any) -> None:
        at = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
        if kernel(*at):
            raise MemoryError("batch normalization has no memory for its sums")

    return run


def _threads(x: torch.Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= _SMALL else 1


def _laid(t: torch.Tensor, x: torch.Tensor, free: bool = False) -> tuple[torch.Tensor, bool]:
    """(the tensor laid as x, whether it may be written over): a copy of one laid otherwise may."""
    return (t, free) if t.stride() == x.stride() else (torch.empty_like(x).copy_(t), True)


def _depends(values: Iterable[Value], on: Value, made: dict[Value, Eqn]) -> bool:
    """Whether one of the values is computed from `on`."""
    open_, seen = list(values), set[Value]()
    while open_:
        v = open_.pop()
        if v == on:
            return True
        if v not in seen and v in made:
            seen.add(v)
            open_ += made[v].inputs
    return False


def _alone(v: Value, read_by: Readers, op: str) -> Eqn | None:
    """The only reader of a value, where it is of that op and reads it once."""
    found = read_by(v)
    fits = len(found) == 1 and found[0].op == op and found[0].inputs.count(v) == 1
    return found[0] if fits else None


def _task(
    parts: list[Eqn], results: Iterable[Value], run: Callable[[Slot], Callable[[Env], bool]]
) -> Task:
    """The equations in one call; each by its op's twin where `run` says that it cannot.

    results  what `run` writes; the twins also write what lies between
    """
    inner = {v for e in parts for v in e.results}
    reads = tuple(dict.fromkeys(v for e in parts for v in e.inputs if v not in inner))

    def make(slot: Slot) -> Call:
        fused = run(slot)
        plain = [generic(e).make(slot) for e in parts]

        def call(env: Env) -> None:
            if not fused(env):
                for each in plain:
                    each(env)

        return call

    return Task(reads, tuple(dict.fromkeys((*results, *inner))), make, tuple(parts))


# ---- forward ------------------------------------------------------------------------------------


def _forward(
    e: Eqn, made: dict[Value, Eqn], read_by: Readers, taken: set[int], kernel: Callable[..., None]
) -> Task:
    """y = relu(batch_norm(x) + residual), as much of it as there is."""
    y, residual, parts = e.outputs[0], None, [e]
    assert y is not None
    add = _alone(y, read_by, "add")
    if add is not None and id(add) not in taken:
        other = add.inputs[1 - add.inputs.index(y)]
        # Nor may the residual need this task's statistics.
        if other.type == y.type == add.out.type and not any(
            _depends([other], v, made) for v in e.results
        ):
            residual, y = other, add.out
            parts.append(add)
    relu = _alone(y, read_by, "relu")
    if relu is not None:
        y = relu.out
        parts.append(relu)
    a: Any = e.attrs

    def run(slot: Slot) -> Callable[[Env], bool]:
        ins = [slot(v) for v in e.inputs]
        other = None if residual is None else slot(residual)
        out, *vectors = slot(y), *(None if v is None else slot(v) for v in e.outputs[1:])

        def call(env: Env) -> bool:
            x, live, *rest = (env[i] for i in ins)
            rows = int(live)
            if not rows or x.dtype != torch.float32 or not lies_in_rows(x):
                return False
            weight, bias = rest[:2] if a.affine else (None, None)
            old_mean, old_var, batches = rest[2 * a.affine :] if a.track else (None, None, None)
            share = a.momentum
            if batches is not None and a.cumulative:
                share = 1.0 / (float(batches) + 1)
            channels = x.shape[1]
            pixels = x.numel() // channels
            mean, var, *new = torch.empty(4 if a.track else 2, channels).unbind()
            res = None if other is None else _laid(env[other], x)[0]
            env[out] = result = torch.empty_like(x)
            kernel(
                channels, pixels, pixels // len(x) * rows, x, weight, bias, a.eps, res,
                relu is not None, result, mean, var, old_mean, old_var, share,
                *(new or (None, None)), _threads(x),
            )  # fmt: skip
            counted = () if batches is None else (batches + 1,)
            for at, v in zip(vectors, (mean, var, *new, *counted), strict=False):
                if at is not None:
                    env[at] = v
            return True

        return call

    return _task(parts, (y,), run)


# ---- backward -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Before:
    """What stands before the gradient of a normalization: g = relu_grad(y, dy + more)."""

    dy: Value
    more: Value | None = None
    relu: Eqn | None = None
    add: Eqn | None = None


def _before(e: Eqn, made: dict[Value, Eqn], read_by: Readers, taken: set[int]) -> _Before:
    relu = made.get(e.inputs[0])
    own = relu is not None and relu.op == "relu_grad" and id(relu) not in taken
    alike = own and relu is not None and all(v.type == e.inputs[1].type for v in relu.inputs)
    if relu is None or not alike or _depends(e.inputs[1:], relu.out, made):
        return _Before(e.inputs[0])
    dy = relu.inputs[1]
    add = made.get(dy)
    if add is not None and add.op == "add" and id(add) not in taken and read_by(dy) == [relu]:
        if all(v.type == dy.type for v in add.inputs):
            return _Before(add.inputs[0], add.inputs[1], relu, add)
    return _Before(dy, None, relu)


def _backward(
    e: Eqn, made: dict[Value, Eqn], read_by: Readers, spare: Readers, taken: set[int],
    kernel: Callable[..., None],
) -> Task:  # fmt: skip
    """g and the gradients of the normalization: g over dy, dx over g or x, where these die here."""
    b = _before(e, made, read_by, taken)
    parts = [p for p in (b.add, b.relu) if p is not None] + [e]
    x, first = e.inputs[1], parts[0]
    over_dy = dies(b.dy, first, made, spare)
    over_more = b.more is not None and dies(b.more, first, made, spare)
    g = b.relu.out if b.relu is not None else None
    kept = g is not None and read_by(g) != [e]  # others read g
    over_x = dies(x, e, made, spare)
    a: Any = e.attrs

    def run(slot: Slot) -> Callable[[Env], bool]:
        iy = None if b.relu is None else slot(b.relu.inputs[0])
        into = slot(g) if g is not None and kept else None
        idy, imore = slot(b.dy), None if b.more is None else slot(b.more)
        ix, imean, ivar, ilive, *iw = (slot(v) for v in e.inputs[1:])
        outs = [None if v is None else slot(v) for v in e.outputs]

        def call(env: Env) -> bool:
            x, mean, var, rows = env[ix], env[imean], env[ivar], int(env[ilive])
            if not rows or x.dtype != torch.float32 or not lies_in_rows(x):
                return False
            channels = x.shape[1]
            pixels = x.numel() // channels
            dy, dy_is_free = _laid(env[idy], x, over_dy)
            more, more_is_free = (None, False) if imore is None else _laid(env[imore], x, over_more)
            y = None if iy is None else _laid(env[iy], x)[0]
            target, target_is_free = dy, dy_is_free
            if y is not None:
                target_is_free = not kept
                if more is not None and more_is_free:
                    target = more
                elif not dy_is_free:
                    target = torch.empty_like(x)
            dx = None
            if outs[0] is not None:
                dx = target if target_is_free else x if over_x else torch.empty_like(x)
            dweight, dbias = torch.empty(2, channels).unbind()
            weight = env[iw[0]] if iw else None
            kernel(
                channels, pixels, pixels // len(x) * rows, dy, more, y, x, mean, var, a.eps,
                weight, target if y is not None else None, dx, dweight, dbias, _threads(x),
            )  # fmt: skip
            for at, v in zip((into, *outs), (target, dx, dweight, dbias), strict=True):
                if at is not None:
                    env[at] = v
            return True

        return call

    return _task(parts, (), run)
