"""Batch normalization of the cpu target, each way in two passes over the image.

The forward kernel also adds the residual and applies the relu. The backward kernel also computes
the relu's gradient, and adds the two cotangents that may come into it. The kernels are those of
`kernels/batch_norm.c`; where there are none every op runs alone, by torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from graphnet.ir.graph import Eqn, Value
from graphnet.lowering.build import native
from graphnet.lowering.targets.cpu_over import Readers, dies, over
from graphnet.lowering.targets.cpu_task import Call, Env, Slot, Task, generic
from graphnet.ops.norm_rows import lies_in_rows

Kernel = Callable[..., None]
Fused = Callable[[Env], bool]  # runs the kernel, or says that it cannot
_SMALL = 1 << 15  # values: fewer take less time on one thread than threads take to start
_long, _double, _int, _pointer = ctypes.c_long, ctypes.c_double, ctypes.c_int, ctypes.c_void_p
_ARGUMENTS = {
    "forward": [*[_long] * 3, *[_pointer] * 3, _double, _pointer, _int, *[_pointer] * 5, _double,
                *[_pointer] * 2, _int],
    "backward": [*[_long] * 3, *[_pointer] * 6, _double, *[_pointer] * 5, _int],
}  # fmt: skip


@dataclass
class Around:
    """What stands around the equations of a task.

    eqns     all equations of the graph, in order
    made     the equation of each value
    read_by  the readers of a value; an empty list where the value leaves the graph
    spare    given an equation, `read_by` for those operands that it may write over; an empty list
             for the others
    taken    equations that have a task
    """

    eqns: list[Eqn]
    made: dict[Value, Eqn]
    read_by: Readers
    spare: Callable[[Eqn], Readers]
    taken: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.at = {v: k for k, e in enumerate(self.eqns) for v in e.results}

    def earlier(self, v: Value, than: Value) -> bool:
        """Whether a value is made before another, or given."""
        return self.at.get(v, -1) < self.at[than]

    def alone(self, v: Value, op: str) -> Eqn | None:
        """The only reader of a value, where it is of that op and reads it once."""
        found = self.read_by(v)
        fits = len(found) == 1 and found[0].op == op and found[0].inputs.count(v) == 1
        return found[0] if fits and id(found[0]) not in self.taken else None


def tasks_of(around: Around) -> list[Task]:
    """A task for each batch normalization and each gradient of one that a kernel can run."""
    library = native.load("batch_norm")
    if library is None:
        return []
    forward, backward = bound(library, "forward"), bound(library, "backward")
    out: list[Task] = []
    for e in around.eqns:
        # Besides fp32 there are two integers: the live rows and the number of batches.
        if not all(v.type.dtype.name in ("f32", "i32", "i64") for v in e.inputs):
            continue
        if e.op == "batch_norm" and e.outputs[0] is not None:
            out.append(_forward(e, around, forward))
        elif e.op == "batch_norm_grad":
            out.append(_backward(e, around, backward))
        else:
            continue
        around.taken.update(map(id, out[-1].eqns))
    return out


def bound(library: ctypes.CDLL, way: str) -> Kernel:
    """The forward or the backward kernel, called with tensors, numbers and None."""
    kernel = getattr(library, f"batch_norm_{way}")
    kernel.argtypes, kernel.restype = _ARGUMENTS[way], _int

    def run(*args: Any) -> None:
        if kernel(*[a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]):
            raise MemoryError("batch normalization has no memory for its sums")

    return run


def _sizes(x: torch.Tensor, live: int) -> tuple[int, int, int]:
    """(channels, pixels, live pixels)"""
    pixels = x.numel() // x.shape[1]
    return x.shape[1], pixels, pixels // len(x) * live


def _threads(x: torch.Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= _SMALL else 1


def _laid(t: torch.Tensor, x: torch.Tensor, free: bool = False) -> tuple[torch.Tensor, bool]:
    """(the tensor laid as x, whether it may be written over). A copy, where it was laid otherwise,
    may be."""
    return (t, free) if t.stride() == x.stride() else (torch.empty_like(x).copy_(t), True)


def _task(parts: list[Eqn], around: Around, kernel: Callable[[Slot], Fused]) -> Task:
    """The equations in one call; where the kernel cannot run, one by one as without it."""
    inner = dict.fromkeys(v for e in parts for v in e.results)
    reads = dict.fromkeys(v for e in parts for v in e.inputs if v not in inner)

    def make(slot: Slot) -> Call:
        fused = kernel(slot)
        plain = [over(e, around.made, around.spare(e)) or generic(e) for e in parts]
        calls = [t.make(slot) for t in plain]

        def call(env: Env) -> None:
            if not fused(env):
                for each in calls:
                    each(env)

        return call

    return Task(tuple(reads), tuple(inner), make, tuple(parts))


# ---- forward ------------------------------------------------------------------------------------


def _forward(e: Eqn, around: Around, kernel: Kernel) -> Task:
    """y = relu(batch_norm(x) + residual), as much of it as there is."""
    y, residual, parts = e.outputs[0], None, [e]
    assert y is not None
    add = around.alone(y, "add")
    if add is not None:
        other = add.inputs[1 - add.inputs.index(y)]
        # Made earlier, so that the task can run where its normalization stood: no task then waits
        # for one behind it. Of two normalizations that are added the later one takes the sum.
        if other.type == y.type == add.out.type and around.earlier(other, y):
            residual, y = other, add.out
            parts.append(add)
    relu = around.alone(y, "relu")
    if relu is not None:
        y = relu.out
        parts.append(relu)
    a: Any = e.attrs

    def make(slot: Slot) -> Fused:
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
            momentum = a.momentum
            if batches is not None and a.cumulative:
                momentum = 1.0 / (float(batches) + 1)
            mean, var, *new = torch.empty(4 if a.track else 2, x.shape[1]).unbind()
            added = None if other is None else _laid(env[other], x)[0]
            env[out] = result = torch.empty_like(x)
            kernel(
                *_sizes(x, rows), x, weight, bias, a.eps, added, relu is not None, result,
                mean, var, old_mean, old_var, momentum, *(new or (None, None)), _threads(x),
            )  # fmt: skip
            counted = () if batches is None else (batches + 1,)
            for at, v in zip(vectors, (mean, var, *new, *counted), strict=False):
                if at is not None:
                    env[at] = v
            return True

        return call

    return _task(parts, around, make)


# ---- backward -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Before:
    """What stands before the gradient of a normalization: g = relu_grad(y, dy + more)."""

    dy: Value
    more: Value | None = None
    relu: Eqn | None = None
    add: Eqn | None = None


def _before(e: Eqn, around: Around) -> _Before:
    relu = around.made.get(e.inputs[0])
    if relu is None or relu.op != "relu_grad" or id(relu) in around.taken:
        return _Before(e.inputs[0])
    alike = all(v.type == e.inputs[1].type for v in relu.inputs)
    if not alike or not all(around.earlier(v, relu.out) for v in e.inputs[1:]):
        return _Before(e.inputs[0])
    dy = relu.inputs[1]
    add = around.made.get(dy)
    if add is not None and add.op == "add" and id(add) not in around.taken:
        if around.read_by(dy) == [relu] and all(v.type == dy.type for v in add.inputs):
            return _Before(add.inputs[0], add.inputs[1], relu, add)
    return _Before(dy, None, relu)


def _backward(e: Eqn, around: Around, kernel: Kernel) -> Task:
    """g, and the gradients of the normalization behind it.

    g is written over `more` or dy where these die here, else into a new tensor. dx is written over
    g unless others read g, else over x where it dies here, else into a new tensor.
    """
    before = _before(e, around)
    dy, more, relu = before.dy, before.more, before.relu
    parts = [p for p in (before.add, relu) if p is not None] + [e]
    first, may = parts[0], around.spare(e)
    dy_dies = dies(dy, first, around.made, may)
    more_dies = more is not None and dies(more, first, around.made, may)
    x_dies = _image_dies(e, around)
    g_is_read = relu is not None and around.read_by(relu.out) != [e]
    eps: float = e.attrs.eps  # type: ignore[attr-defined]

    def make(slot: Slot) -> Fused:
        dy_at, more_at = slot(dy), None if more is None else slot(more)
        y_at = None if relu is None else slot(relu.inputs[0])
        g_at = slot(relu.out) if relu is not None and g_is_read else None
        x_at, mean_at, var_at, live_at, *weight_at = (slot(v) for v in e.inputs[1:])
        outs = [g_at, *(None if v is None else slot(v) for v in e.outputs)]

        def call(env: Env) -> bool:
            x, rows = env[x_at], int(env[live_at])
            if not rows or x.dtype != torch.float32 or not lies_in_rows(x):
                return False
            one, one_is_free = _laid(env[dy_at], x, dy_dies)
            two, two_is_free = None, False
            if more_at is not None:
                two, two_is_free = _laid(env[more_at], x, more_dies)
            y = None if y_at is None else _laid(env[y_at], x)[0]
            g, g_is_free = one, one_is_free
            if y is not None:
                g_is_free = not g_is_read
                if two is not None and two_is_free:
                    g = two
                elif not one_is_free:
                    g = torch.empty_like(x)
            dx = None
            if e.outputs[0] is not None:
                dx = g if g_is_free else x if x_dies else torch.empty_like(x)
            dweight, dbias = torch.empty(2, x.shape[1]).unbind()
            kernel(
                *_sizes(x, rows), one, two, y, x, env[mean_at], env[var_at], eps,
                env[weight_at[0]] if weight_at else None, None if y is None else g, dx,
                dweight, dbias, _threads(x),
            )  # fmt: skip
            for at, v in zip(outs, (g, dx, dweight, dbias), strict=True):
                if at is not None:
                    env[at] = v
            return True

        return call

    return _task(parts, around, make)


def _image_dies(e: Eqn, around: Around) -> bool:
    """Whether the gradient is the last to read x. The forward normalization also reads it, but has
    run by then: the gradient needs its mean and var."""
    forward = around.made.get(e.inputs[2])
    readers = lambda v: [r for r in around.spare(e)(v) if r is not forward]
    return dies(e.inputs[1], e, around.made, readers)
