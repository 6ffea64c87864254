"""What a choice has to show before it runs: a binary without spills, and on a GPU the right result.

A measured row is advice. Its binary is refused where it spills or does not compile, and then the
rules decide. On a GPU an equation whose binaries have not been proven there is run once, alone,
over operands of its own and results full of NaN, against the float64 reference on the device; what
the interpreter cannot run, and may therefore never end, in a process of its own (trial.py). A
wrong measured choice is replaced by the rules', loudly; if the rules' own is wrong, too, that is an
error. A right one is remembered under a hash of everything that its result depends on.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from graphnet.errors import NumericsError
from graphnet.ir.graph import Eqn, Graph, Input, Value, substitute
from graphnet.lowering.build.build import answers, key_of, request
from graphnet.lowering.launch.choice import Choice, Kernels
from graphnet.lowering.launch.equation import launches
from graphnet.lowering.launch.files import private_dir, write_whole
from graphnet.lowering.launch.group import GROUPS, group
from graphnet.lowering.launch.moves import is_view
from graphnet.lowering.launch.steps import Launch
from graphnet.lowering.plan.plan import Plan
from graphnet.lowering.tune.alone import Alone, mode
from graphnet.lowering.tune.tables import TuningWarning
from graphnet.lowering.tune.trial import tried

Lower = Callable[[Kernels], Any]


def settled(low: Any, lower: Lower, on_gpu: bool) -> tuple[Any, set[str]]:
    """(a lowered net whose choices hold, keys of the binaries that were compiled for that): the one
    given, or one with the rules in place of rows that do not hold.

    lower   lowers the same net again with other kernels
    on_gpu  results are compared, too, not only binaries
    """
    fresh: set[str] = set()
    while bad := _unfit(low.plan, low.kernels.arch, fresh) or (_wrong(low) if on_gpu else {}):
        for choice, why in bad.items():
            warnings.warn(
                f"{choice.problem}: {choice.variant.name} {choice.config} ({choice.origin}) {why};"
                " the rules' choice is taken",
                TuningWarning, stacklevel=3,
            )  # fmt: skip
        low = lower(without(low.kernels, list(bad)))
    return low, fresh


def without(kernels: Kernels, choices: Sequence[Choice]) -> Kernels:
    """The kernels with these choices' rows left out."""
    bad = {(c.problem, c.variant.name, c.config) for c in choices}
    table = {
        p: [r for r in rows if (p, r.variant, r.config) not in bad]
        for p, rows in kernels.table.items()
    }
    return replace(kernels, table=table)


def _unfit(plan: Plan, arch: int, fresh: set[str]) -> dict[Choice, str]:
    """Measured choices whose binaries spill or do not compile, and what they do. All of the plan is
    compiled together; `fresh` gets the keys of what was."""
    found, compiled = answers(plan.launches, arch)
    fresh |= compiled
    out: dict[Choice, str] = {}
    for s, (_, about) in zip(plan.launches, found, strict=True):
        for choice in (m.choice for m in s.parts):
            if choice is None or choice.source != "measured":
                continue
            if "error" in about:
                out[choice] = f"does not compile: {about['error'].splitlines()[-1][:200]}"
            elif about["spill_bytes"]:
                out[choice] = f"spills {about['spill_bytes']} bytes in {s.kernel}"
    return out


# ---- on a GPU --------------------------------------------------------------------------------


def computed(low: Any) -> Iterator[tuple[Eqn, list[Launch]]]:
    """Every equation that a variant computes, with its launches alone: buffers carry the names of
    the equation's own values."""
    for e in low.plan.graph.eqns:
        steps = [] if is_view(e) else launches(e, lambda v: v.name, low.kernels)
        own = [s for s in steps if isinstance(s, Launch)]
        if own and own[0].choice is not None:
            yield e, own


def together(low: Any) -> Iterator[tuple[list[Eqn], list[Launch]]]:
    """Equations whose launches meet in groups, with all of their launches: what is proven of them
    is the group's binary."""
    again: dict[tuple, tuple[Eqn, Launch]] = {}
    for e in low.plan.graph.eqns:
        steps = [] if is_view(e) else launches(e, lambda v: v.name, low.kernels)
        again |= {_same(s): (e, s) for s in steps if isinstance(s, Launch)}
    units: list[tuple[list[Eqn], list[Launch]]] = []
    for s in low.plan.launches:
        if any(_same(m) not in again for m in s.parts):  # another one here: proven one by one
            return
        eqns = [again[_same(m)][0] for m in s.parts]
        turns = [[again[_same(m)][1] for m in turn] for turn in s.turns]
        made = [group(turns) if turns else again[_same(s)][1]]
        for unit in [u for u in units if any(e in u[0] for e in eqns)]:
            units.remove(unit)
            eqns, made = [*unit[0], *eqns], [*unit[1], *made]
        units.append((list(dict.fromkeys(eqns)), made))
    yield from (u for u in units if any(s.members for s in u[1]))


def _same(launch: Launch) -> tuple:
    """What tells the launches of a graph apart, whatever their operands' buffers are called."""
    sizes = tuple(v for _, v in launch.constants if isinstance(v, int))
    return launch.kernel, launch.writes, launch.grid, sizes


def joined(eqns: Sequence[Eqn]) -> Eqn:
    """One equation that computes what these do, in their order."""
    if len(eqns) == 1:
        return eqns[0]
    inner: list[Eqn] = []
    made: dict[Value, Value] = {}
    for k, e in enumerate(eqns):
        own = {v: Value(f"{k}.{v.name}", v.type) for p in e.plain for v in p.results}
        env = {**made, **own}
        inner += [
            replace(substitute(p, env), outputs=tuple(v and own[v] for v in p.outputs))
            for p in e.plain
        ]
        returns = e.body.returns if e.body is not None else e.outputs
        made |= {o: env[i] for i, o in zip(returns, e.outputs, strict=True) if o and i}
    operands = [v for e in eqns for v in e.inputs if v not in made]
    inputs = tuple(dict.fromkeys(operands))
    body = Graph("body", tuple(Input(v) for v in inputs), tuple(inner), tuple(made.values()))
    where = reduce(lambda a, b: a.merged(b), (e.where for e in eqns))
    return Eqn("fused", inputs, tuple(made), body=body, where=where)


def name_of(steps: Sequence[Launch], arch: int) -> str:
    """The key of a computation: the code of its launches, their grids and tables."""
    about = [
        [key_of(request(s, arch)), s.grid, [t.values for t in s.tables]] for s in steps
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _wrong(low: Any) -> dict[Choice, str]:
    """Measured choices that are wrong here; NumericsError where a choice of the rules is."""
    gpu, arch = torch.cuda.get_device_name(), low.kernels.arch
    done: list[Eqn] = []
    failed: list[tuple[list[Eqn], str]] = []
    for eqns, steps in together(low):
        name = name_of(steps, arch)
        why = None if _proven(gpu, name) else checked(low.plan, joined(eqns), steps)
        if why is None:
            _remember(gpu, name, "+".join(s.kernel for s in steps))
            done += eqns
        else:
            failed.append((eqns, why))
    todo = [(e, steps, name_of(steps, arch)) for e, steps in computed(low) if e not in done]
    todo = [case for case in todo if not _proven(gpu, case[2])]
    out: dict[Choice, str] = {}
    apart = _apart(low, todo)
    for e, steps, name in todo:
        choice = steps[0].choice
        assert choice is not None
        if choice in out or _proven(gpu, name):
            continue
        why = apart[name] if name in apart else checked(low.plan, e, steps)
        if why is None:
            _remember(gpu, name, f"{choice.problem}: {choice}")
        elif choice.source == "measured":
            out[choice] = f"is wrong on this GPU: {why}"
        else:
            raise NumericsError(
                f"{choice.variant.name} of {choice.problem}: {why}",
                **e.where.located,
                help="no other choice computes it rightly on this GPU; target='cpu' runs without "
                "our kernels, GRAPHNET_DUMP=folder leaves them for a report",
            )  # fmt: skip
    for eqns, why in failed:
        if not any(e in eqns and steps[0].choice in out for e, steps, _ in todo):
            raise NumericsError(
                f"a group of launches, each of which is right alone: {why}",
                **eqns[0].where.located, help=f"GRAPHNET_DISABLE={GROUPS} runs them one by one",
            )  # fmt: skip
    return out


def _apart(low: Any, todo: Sequence[tuple[Eqn, list[Launch], str]]) -> dict[str, str | None]:
    """How the results differ of what the interpreter cannot run, by the name of the computation:
    run in a process of its own, because it may never end (trial.py)."""
    cases = {
        name: (e, steps[0].choice)
        for e, steps, name in todo
        if steps[0].choice is not None and not steps[0].choice.variant.interpreted
    }
    out: dict[str, str | None] = {}
    while left := [name for name in cases if name not in out]:
        asked = [cases[name] for name in left]
        found = tried(low.plan.graph, low.plan.target, low.kernels.arch, asked)
        out.update(zip(left, found, strict=False))
    return out


@torch.no_grad()
def checked(plan: Plan, e: Eqn, steps: Sequence[Launch]) -> str | None:
    """How the launches of an equation differ from its reference; None where they do not."""
    alone = Alone(plan.graph, e, plan.target)
    run, tensor = alone.prepare(steps)
    with mode(plan.target):
        return alone.verdict(run, tensor)


def _file(gpu: str, name: str) -> Path:
    digest = hashlib.sha256(f"{gpu} {name}".encode()).hexdigest()
    return private_dir("proven") / f"{digest[:32]}.json"


def _proven(gpu: str, name: str) -> bool:
    try:
        about = json.loads(_file(gpu, name).read_text())
        return (about["gpu"], about["computation"]) == (gpu, name)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _remember(gpu: str, name: str, what: str) -> None:
    about = {"gpu": gpu, "computation": name, "what": what}
    write_whole(_file(gpu, name), json.dumps(about, indent=1).encode())
