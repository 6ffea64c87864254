"""Where the time of a step goes: torch's by layer, ours by launch (on a CPU by task).

Stamps stand between the parts of a real step. On a GPU they are events, and the device is held
busy until the host has issued the whole step, so no time of the host is in the figures.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from graphnet.bench.ours import compiled
from graphnet.bench.peers import Variant, Work, autocast, module_of
from graphnet.lowering.launch.steps import Launch
from graphnet.ops.fused import eqn_cost

REPEATS = 7
_HEAD_START = 60_000_000  # clock ticks of the GPU, about 35 ms


class Clock:
    """Points in the device's time of one step."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self.points: list[Any] = []

    def begin(self) -> None:
        self.points = []
        if self.gpu:
            torch.cuda._sleep(_HEAD_START)

    def stamp(self) -> int:
        """A new point; its number."""
        if self.gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.points.append(event)
        else:
            self.points.append(time.perf_counter())
        return len(self.points) - 1

    def us(self, a: int, b: int) -> float:
        """Microseconds from one point to another; on a GPU once the device is done."""
        if self.gpu:
            return 1e3 * self.points[a].elapsed_time(self.points[b])
        return 1e6 * (self.points[b] - self.points[a])


def _medians(clock: Clock, run: Callable[[], list[tuple[int, int]]]) -> list[float]:
    """Medians over repeated steps of the spans that each step returns."""
    found: list[list[float]] = []
    for _ in range(REPEATS + 1):
        clock.begin()
        spans = run()
        if clock.gpu:
            torch.cuda.synchronize()
        found.append([clock.us(a, b) for a, b in spans])
    return [statistics.median(us) for us in zip(*found[1:], strict=True)]


# ---- ours ------------------------------------------------------------------------------------


def launch_times(work: Work, target: str) -> list[dict[str, Any]]:
    """One row for each launch, fill, copy or task of our step, in the order in which they run.

    The launches of a second stream stand in the same row as all others: one after another.
    """
    program = compiled(work, target)
    found = times_of(program, (work.x,) if work.mode == "infer" else (work.x, work.y))
    rows = [row_of(part, program.plan) for part, _, _ in found]
    loss = next((k for k, r in enumerate(rows) if "loss" in r["layers"]), len(rows))
    for k, (row, (_, us, _)) in enumerate(zip(rows, found, strict=True)):
        row["phase"] = "forward" if k < loss else "loss" if k == loss else "backward"
        row["us"] = round(us, 3)
    return rows


def times_of(program: Any, feed: Sequence[torch.Tensor]) -> list[tuple[Any, float, Any]]:
    """(part, microseconds, call) of what a program runs, in order, one after another: the part is a
    step of the plan, or a task of the cpu target; the call does it once more."""
    program(*feed)
    clock, spans = Clock(program.device), []
    parts: list[tuple[Any, Callable[..., Any]]] = []

    def around(part: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        parts.append((part, call))

        def timed(*args: Any) -> None:
            a = clock.stamp()
            call(*args)
            spans.append((a, clock.stamp()))

        return timed

    module = importlib.import_module(f"graphnet.lowering.targets.{program.target}")
    more = {"capture": False} if program.target == "cuda" else {}
    plan = replace(program.plan, streams=(0,) * len(program.plan.steps))
    once = module.prepare(plan, program._storage, around=around, **more)

    def run() -> list[tuple[int, int]]:
        spans.clear()
        once()
        return list(spans)

    us = _medians(clock, run)
    return [(part, t, call) for (part, call), t in zip(parts, us, strict=True)]


def row_of(part: Any, plan: Any) -> dict[str, Any]:
    """Name, layers, FLOPs and bytes of a step of a plan or a task."""
    if isinstance(part, Launch):
        layers = part.where.layers
        return _named(part.kernel, layers, part.flops, part.bytes)
    if hasattr(part, "eqns"):  # a task of the cpu target
        return _task_row(part)
    sizes = {i.value.name: i.value.type.bytes for i in plan.graph.inputs}
    sizes |= {name: slot.size for name, slot in plan.arena.items()}
    moved = sum(sizes.get(name, 0) for name in (*part.reads, *part.writes))
    return _named(type(part).__name__.lower(), (), 0, moved)


def _task_row(task: Any) -> dict[str, Any]:
    ops = dict.fromkeys(e.op for e in task.eqns)
    made = {v for e in task.eqns for v in e.results}
    read = {v for e in task.eqns for v in e.inputs} - made or set(task.reads)
    written = set(task.writes) or made
    layers = tuple(dict.fromkeys(name for e in task.eqns for name in e.where.layers))
    flops = sum(eqn_cost(e).flops for e in task.eqns)
    moved = sum(v.type.bytes for v in read | written)
    return _named("+".join(ops) or "relayout", layers, flops, moved)


def _named(name: str, layers: Sequence[str], flops: int, moved: int) -> dict[str, Any]:
    return {"name": name, "layers": list(layers), "flops": flops, "bytes": moved}


# ---- torch's ---------------------------------------------------------------------------------


def layer_times(work: Work, v: Variant) -> list[dict[str, Any]]:
    """One row for each layer of the eager variant: forward and backward, in microseconds.

    A layer's backward time ends when the gradient of its input is there, its weights' gradients
    included; the optimizer is not in it. The last row is the loss.
    """
    module, x = module_of(work, v)
    leaves = [m for m in module.modules() if not list(m.children())]
    clock = Clock(work.device)
    training = work.mode != "infer"
    forward: list[int] = []
    backward: list[int] = []

    def after(m: nn.Module, inputs: Any, out: torch.Tensor) -> None:
        forward.append(clock.stamp())
        if out.requires_grad:  # fires when the gradient of this result is complete
            out.register_hook(lambda g: backward.append(clock.stamp()))

    for m in leaves:
        m.register_forward_hook(after)
    parameters = list(module.parameters())

    def run() -> list[tuple[int, int]]:
        forward[:], backward[:] = [clock.stamp()], []
        for p in parameters:
            p.grad = None
        with torch.set_grad_enabled(training), autocast(v.form, work.device):
            out = module(x)
            loss = nn.functional.cross_entropy(out.float(), work.y) if training else None
        spans = list(zip(forward, forward[1:], strict=False))
        if loss is None:
            return spans
        begin = clock.stamp()
        loss.backward()
        backward.append(clock.stamp())
        return [*spans, (forward[-1], begin), (begin, backward[0]),
                *zip(backward, backward[1:], strict=False)]  # fmt: skip

    us = [round(t, 3) for t in _medians(clock, run)]
    names = _names(work.net, leaves)
    n = len(leaves)
    if not training:
        return [{"layer": name, "forward_us": t} for name, t in zip(names, us, strict=True)]
    back = us[n + 2 :][::-1]  # the last layer's gradient comes first
    back = [0.0] * (n - len(back)) + back  # layers in front of all parameters have none
    rows = [
        {"layer": name, "forward_us": f, "backward_us": b}
        for name, f, b in zip(names, us[:n], back, strict=True)
    ]
    return [*rows, {"layer": "loss", "forward_us": us[n], "backward_us": us[n + 1]}]


def _names(net: Any, leaves: list[nn.Module]) -> list[str]:
    """The layers' names as graphnet prints them; a layer that is used twice has two twins."""
    names = list(net.layer_names().values())
    if len(names) == len(leaves):
        return names
    return [f"{type(m).__name__} {k}" for k, m in enumerate(leaves)]
