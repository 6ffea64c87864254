"""What `graphnet inspect` prints: every kernel of a program, with what it has to do at the least.

A row is a launch of the plan. The cpu target has no launches, it runs the fused graph on torch's
own kernels and a few in C; there a row is an equation of that graph, no binary has a name, and no
GPU a floor.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from graphnet.api import Lowered
from graphnet.errors import ConfigError
from graphnet.frontends.dsl import Module
from graphnet.ir.graph import Eqn, Graph
from graphnet.ir.op import get_op
from graphnet.lowering.build.build import key_of, request
from graphnet.lowering.launch.choice import Choice
from graphnet.lowering.launch.cost import ceiling, limits_us
from graphnet.lowering.launch.moves import is_view
from graphnet.lowering.launch.steps import Copy, Fill
from graphnet.ops.fused import eqn_cost
from graphnet.passes.templates import anchor_of

STAGES = ("traced", "joint", "fused", "plan")
_ARCH = 90  # of every GPU whose ceilings are known
WIDE = 30  # letters of a row's layers; --json has all of them
REACHED = 0.6  # share of its roofline that a launch without a measurement is taken to reach


@dataclass(frozen=True)
class Kernel:
    """A row: `kind` is the kernel family, `binary` names the code, `floor_us` is that of the given
    GPU and None on the cpu target.

    variant, config, source  what was chosen, and where the choice comes from; empty where there is
                             nothing to choose
    measured_us  what the choice took where it was measured; of an equation's launches the first
                 has the time of all, the others 0. None without a measurement
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    binary: str
    variant: str
    config: dict[str, Any]
    source: str
    flops: int
    bytes: int
    floor_us: float | None
    measured_us: float | None

    @property
    def expected_us(self) -> float:
        """What was measured, else what a kernel takes that reaches REACHED of its floor."""
        return (self.floor_us or 0.0) / REACHED if self.measured_us is None else self.measured_us


def check_choices(stage: str, gpu: str) -> None:
    """ConfigError for a stage or a GPU that does not exist, before any work."""
    if stage not in STAGES:
        raise ConfigError(f"unknown stage {stage!r}", help=f"one of {', '.join(STAGES)}")
    ceiling(gpu)


# ---- rows -----------------------------------------------------------------------------------


def _kernels(low: Lowered, gpu: str) -> Iterator[tuple[Kernel, str]]:
    """Each row, and whether arithmetic or memory bounds it."""

    seen: set[int] = set()

    def row(name: str, kind: str, layers: tuple[str, ...], binary: str, flops: int, moved: int,
            math: str, choices: Sequence[Choice] = ()) -> tuple[Kernel, str]:  # fmt: skip
        compute, memory = limits_us(flops, moved, math, gpu)
        floor = None if low.plan.target == "cpu" else round(max(compute, memory), 6)
        bound = "compute" if compute > memory else "memory"
        about: tuple[str, dict[str, Any], str] = ("", {}, "")
        us = None
        if choices:
            sources = [c.source + (f" ({c.origin})" if c.origin else "") for c in choices]
            config = choices[0].config.as_dict() if len(choices) == 1 else {}
            about = _each(c.variant.name for c in choices), config, _each(sources)
            if all(c.us is not None for c in choices):
                us = sum(c.us or 0.0 for c in choices if id(c) not in seen)
            seen.update(map(id, choices))
        return Kernel(name, kind, layers, binary, *about, flops, moved, floor, us), bound

    if low.plan.target == "cpu":
        for e in low.plan.graph.eqns:
            if not is_view(e):
                cost = eqn_cost(e)
                yield row(*_named(e), e.where.layers, "", cost.flops, cost.bytes, _math(e))
        return
    for s in low.plan.launches:
        family = s.module.rpartition(".")[2]
        binary = key_of(request(s, _ARCH))
        choices = [m.choice for m in s.parts if m.choice is not None]
        yield row(s.kernel, family, s.where.layers, binary, s.flops, s.bytes, s.math, choices)


def launch_times(low: Lowered, gpu: str) -> list[float]:
    """Microseconds that each launch of the plan is expected to take, in order."""
    return [k.expected_us for k, _ in _kernels(low, gpu)]


def _each(names: Iterable[str]) -> str:
    """Every name once: those of the members of a group, else the one there is."""
    return "+".join(dict.fromkeys(names))


def _named(eqn: Eqn) -> tuple[str, str]:
    """(name, kind) of an equation: the ops that it fuses, and its anchor's kernel family."""
    ops = dict.fromkeys(e.op for e in eqn.plain)
    return "+".join(ops), get_op(anchor_of(eqn) or next(iter(ops))).kernel or "move"


def _math(eqn: Eqn) -> str:
    return next((m for e in eqn.plain if (m := getattr(e.attrs, "math", None))), "ieee")


def _graph(low: Lowered, stage: str) -> Graph:
    return low.stages.graph("fused" if stage == "plan" else stage)


def inspect_data(net: Module, low: Lowered, facts: dict[str, Any]) -> dict[str, Any]:
    """The object of `inspect --json`. `facts` is what was asked for, model to stage.

    `ops` counts the equations of the stage's graph (the plan's is the fused one); the kernels and
    totals are the plan's, whatever the stage.
    """
    check_choices(facts["stage"], facts["gpu"])
    rows = [k for k, _ in _kernels(low, facts["gpu"])]
    return {
        **facts,
        "target": low.target,
        "gpu": None if low.target == "cpu" else facts["gpu"],
        "ops": dict(sorted(Counter(e.op for e in _graph(low, facts["stage"]).eqns).items())),
        "kernels": [{**asdict(k), "layers": list(k.layers)} for k in rows],
        "flops": sum(k.flops for k in rows),
        "bytes": sum(k.bytes for k in rows),
        "floor_us": None if low.target == "cpu" else round(_floors(rows), 6),
        "peak_bytes": low.plan.peak_bytes,
        "params": sum(p.numel() for p in net.parameters()),
    }


def _floors(rows: Sequence[Kernel]) -> float:
    return sum(k.floor_us or 0.0 for k in rows)


# ---- text -----------------------------------------------------------------------------------


def inspect_text(net: Module, low: Lowered, facts: dict[str, Any], why: bool = False) -> str:
    """The graph of a stage, or the plan as a table; then, where asked, what was not fused."""
    check_choices(facts["stage"], facts["gpu"])
    plan = facts["stage"] == "plan"
    text = _table(net, low, facts) if plan else str(_graph(low, facts["stage"])).rstrip()
    return f"{text}\n\n{why_text(low)}" if why else text


def _table(net: Module, low: Lowered, facts: dict[str, Any]) -> str:
    found = list(_kernels(low, facts["gpu"]))
    rows = [k for k, _ in found]
    padded = [s.padded for s in low.plan.launches] or [0] * len(rows)
    groups = {n: f"group of {len(s.members)}" for n, s in enumerate(low.plan.launches) if s.members}
    head = ("", "kernel", "layers", "variant", "FLOPs", "padding", "bytes", "floor us",
            "measured", "bound")  # fmt: skip
    cells = [
        (str(n), groups.get(n, k.name), _layers(k.layers),
         "" if n in groups else k.variant, count(k.flops),
         f"+{max(0.0, padded[n] / k.flops - 1):.0%}" if padded[n] and k.flops else "",
         count(k.bytes, "B"), f"{k.floor_us or 0.0:.2f}",
         f"{k.measured_us:.1f}" if k.measured_us else "", bound)
        for n, (k, bound) in enumerate(found)
    ]  # fmt: skip
    flops, moved = sum(k.flops for k in rows), sum(k.bytes for k in rows)
    floor = f"{_floors(rows):.2f}"
    total = ("", "total", "", "", count(flops), "", count(moved, "B"), floor, "", "")
    on_cpu = low.target == "cpu"
    shown = [0, 1, 2, 4, 6] if on_cpu else list(range(len(head)))  # no variants, no floors
    width = [max(map(len, column)) for column in zip(head, *cells, total, strict=True)]

    def line(c: Sequence[str]) -> str:
        left = (0, 4, 5, 6, 7, 8)  # numbers stand on the right
        parts = (
            v.rjust(w) if k in left else v.ljust(w)
            for k, (v, w) in enumerate(zip(c, width, strict=True))
            if k in shown
        )
        return "  ".join(parts).rstrip()

    rule = "-" * max(len(line(c)) for c in (head, *cells))
    what = "training step" if facts["train"] else "inference"
    params = sum(p.numel() for p in net.parameters())
    title = (
        f"{facts['model']}, {what}, batch {facts['batch']}, {facts['precision']}, target "
        f"{low.target}: {_steps(low, len(rows))}{'' if on_cpu else '; floors of ' + facts['gpu']}"
    )
    lines = [title, line(head), rule, *map(line, cells), rule, line(total)]
    behind = [*_expected(rows), *_norms(low), *_memory(low, params, facts["gpu"])]
    return "\n".join([*lines, *behind])


def _layers(names: Sequence[str]) -> str:
    """The layers of a launch; of a long row the first two and the last."""
    text = ", ".join(names) or "-"
    short = f"{', '.join(names[:2])} ... {''.join(names[-1:])} ({len(names)})"
    return text if len(text) <= WIDE else short


def _expected(rows: Sequence[Kernel]) -> list[str]:
    """The sum of what was measured, and which launches were not."""
    missing = [n for n, k in enumerate(rows) if k.measured_us is None]
    if len(missing) == len(rows):
        return []
    total = sum(k.expected_us for k in rows)
    rest = sum(rows[n].expected_us for n in missing)
    line = f"measured launches and the rest at floor / {REACHED}: {total:.0f} us"
    if missing:
        line += f", of which {rest:.0f} us are not measured: {', '.join(map(str, missing))}"
    return [line]


def _norms(low: Lowered) -> list[str]:
    """What batch normalization moves for each element that it normalizes in training: its own
    launches, the write of what it reads, and moments that another kernel keeps for it."""
    elements = {
        e.where.layers[0]: e.inputs[0].type
        for e in low.stages.joint.eqns if e.op == "batch_norm" and e.where.layers
    }  # fmt: skip
    kept = {name: size for s in low.plan.launches for name, size in s.scratch}
    moved: dict[tuple[str, str], float] = {}
    for s in low.plan.launches:
        layer = next((name for name in s.where.layers if name in elements), "")
        if not layer or s.module.rpartition(".")[2] != "batch_norm":
            continue
        backward = "sums" in s.kernel or s.kernel.endswith("_grad")
        at, type = (layer, "backward" if backward else "forward"), elements[layer]
        moments = sum(kept.get(name, 0) for name in s.reads if name.startswith(".moments"))
        beside = 0 if backward or at in moved else type.bytes
        moved[at] = moved.get(at, 0.0) + (s.bytes + moments + beside) / type.numel
    said = []
    for way in ("forward", "backward"):
        if found := sorted(v for (_, other), v in moved.items() if other == way):
            middle = found[len(found) // 2]
            said.append(f"{way} {middle:.1f} ({found[0]:.1f} to {found[-1]:.1f})")
    what = "batch normalization, bytes an element, the convolution's write included"
    return [f"{what}: {', '.join(said)}"] if said else []


def _steps(low: Lowered, rows: int) -> str:
    if low.plan.target == "cpu":
        return f"{rows} fused equations, no launches"
    fills = sum(isinstance(s, Fill) for s in low.plan.steps)
    copies = sum(isinstance(s, Copy) for s in low.plan.steps)
    sums = len(low.plan.collectives)
    counts = ((fills, "fills"), (copies, "copies"), (sums, "collectives"))
    extra = [f"{n} {what}" for n, what in counts if n]
    return ", ".join([f"{rows} launches", *extra])


def _memory(low: Lowered, params: int, gpu: str) -> list[str]:
    plan = low.plan
    parts = [("state", plan.state_bytes), ("inputs and outputs", plan.io_bytes)]
    if plan.target != "cpu":
        parts.insert(1, ("arena", plan.arena_bytes))
    listed = " + ".join(f"{what} {count(n, 'B')}" for what, n in parts)
    beside = "; torch allocates the rest" if plan.target == "cpu" else ""
    out = [f"{params:,} parameters; peak {count(plan.peak_bytes, 'B')} = {listed}{beside}"]
    if plan.target != "cpu":
        memory = ceiling(gpu).memory
        fits = plan.largest_batch(memory)
        out.append(f"by this plan's bytes a row, {count(memory, 'B')} ({gpu}) hold batch {fits:,}")
    return out


def count(n: float, unit: str = "") -> str:
    """A number with three digits and a decimal prefix: 30.7 M, 2.81 MB."""
    for prefix in ("", "k", "M", "G", "T"):
        if n < 999.5 or prefix == "T":
            break
        n /= 1000
    digits = f"{n:.0f}" if prefix == "" or n >= 99.95 else f"{n:.1f}" if n >= 9.995 else f"{n:.2f}"
    return f"{digits} {prefix}{unit}".rstrip()


def why_text(low: Lowered) -> str:
    """What the rewrite rules refused: the rule, the value, its place, and the reason; then the
    variant of each launch, where the choice comes from, and why it was not another; then the small
    launches that are in no group."""
    refused = low.stages.log.refusals
    lines = ["not fused:"] if refused else ["not fused: the rules refused nothing"]
    for (rule, label), sentence in refused.items():
        place = _place(low, label)
        lines += [f"  {rule}", f"    at {label}{f', {place}' if place else ''}", f"    {sentence}"]
    return "\n".join([*lines, *_norm_price(low), *_choices(low), *_alone(low)])


def _norm_price(low: Lowered) -> list[str]:
    """What the norm of all gradients costs: none of them can stay in its kernel."""
    norms = [e for e in low.stages.fused.eqns if e.op == "global_norm"]
    moved = 3 * sum(v.type.bytes for e in norms for v in e.inputs)
    if not norms:
        return []
    least = limits_us(0, moved, gpu="h200")[1]
    return [
        "",
        "the norm of all gradients keeps each of them out of its update's kernel:"
        f" {count(moved, 'B')} more are written and read at each step, at least {least:.3g} us on"
        " an H200",
    ]


def _choices(low: Lowered) -> list[str]:
    """By the number of the launch in the plan's table; of an equation's launches the first."""
    lines, seen = [], set()
    for n, s in enumerate(low.plan.launches):
        for m in s.parts:
            if m.choice is None or id(m.choice) in seen:
                continue
            seen.add(id(m.choice))
            lines.append(f"  {n:2}  {m.kernel} ({', '.join(m.where.layers)}): {m.choice}")
            lines += [f"        not {name}: {why}" for name, why in m.choice.refused]
    return ["", "variants:", *lines] if lines else []


def _alone(low: Lowered) -> list[str]:
    """Small launches that share no launch with others, and why."""
    by_reason: dict[str, list[str]] = {}
    for s, why in low.plan.alone:
        by_reason.setdefault(why, []).append(f"{s.kernel} ({', '.join(s.where.layers) or '-'})")
    lines = [f"  {', '.join(names)}\n    {why}" for why, names in by_reason.items()]
    return ["", "small launches in no group:", *lines] if lines else []


def _place(low: Lowered, label: str) -> str:
    """The DSL place of the value that a refusal names."""
    found = re.search(r"%\S+", label)
    for graph in (low.stages.fused, low.stages.joint):
        for e in graph.eqns:
            if found and any(str(v) == found[0] for v in e.results):
                return e.where.place
    return ""
