"""The search for launch configurations: right first, then fast.

Each key that the plan's launches asked `choose` about gets its candidates, ordered by the model.
Every candidate is built, run alone over operands that nothing else touches and results filled with
NaN, and held against the float64 reference of its equation. Only right ones are timed, in
interleaved rounds; a wrong one is recorded as wrong, however fast it would have been.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from graphnet.errors import GraphnetError
from graphnet.ir.graph import Eqn
from graphnet.lowering.build.build import try_launches
from graphnet.lowering.launch.config import Choice, Config, Key, analytic, using
from graphnet.lowering.launch.cost import CEILINGS
from graphnet.lowering.launch.equation import launches
from graphnet.lowering.launch.steps import Launch, Step
from graphnet.lowering.plan.plan import Plan
from graphnet.lowering.tune import tables
from graphnet.lowering.tune.alone import Alone
from graphnet.lowering.tune.candidates import candidates, predict_us, rank_correlation
from graphnet.lowering.watch import clock

KEEP = 24  # candidates of a key that are tried, the model's best
GAIN = 0.97  # the rules' choice stays unless another takes at most this share of its time
ROUNDS = 9
MODEL_GPU = "h200"  # whose ceilings order candidates where the GPU is none that we know


# A configuration, its predicted time, and the steps of every equation that it decides.
Candidate = tuple[Config, float, list[list[Step]]]


@dataclass(frozen=True)
class Trial:
    """One candidate for a key. verdict: right, wrong, spills, failed or skipped (not reached)."""

    kind: str
    shape: tuple[int, ...]
    precision: str
    layers: tuple[str, ...]
    config: Config
    predicted_us: float
    median_us: float | None
    verdict: str
    error: str | None = None
    chosen: bool = False

    @property
    def key(self) -> Key:
        return self.kind, self.shape, self.precision

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for a result file."""
        config = tables.Entry(*self.key, self.config).as_dict()["config"]
        return {
            "kernel": self.kind, "shape": list(self.shape), "precision": self.precision,
            "layers": list(self.layers), "config": config,
            "predicted_us": round(self.predicted_us, 3),
            "median_us": None if self.median_us is None else round(self.median_us, 3),
            "verdict": self.verdict, "error": self.error, "chosen": self.chosen,
        }  # fmt: skip


@dataclass
class Found:
    """What a search found: every trial, and the entries that decide from now on."""

    gpu: str
    trials: list[Trial] = field(default_factory=list)
    entries: list[tables.Entry] = field(default_factory=list)
    keys: int = 0
    seconds: float = 0.0

    def rank_correlations(self) -> dict[str, float]:
        """Of the model's order with the measured one, by kernel, over keys with enough trials."""
        out: dict[str, list[float]] = {}
        for key in dict.fromkeys(t.key for t in self.trials):
            pairs = [
                (t.predicted_us, t.median_us)
                for t in self.trials
                if t.key == key and t.median_us is not None
            ]
            rho = rank_correlation(*zip(*pairs, strict=True)) if pairs else None
            if rho is not None:
                out.setdefault(key[0], []).append(rho)
        return {kind: statistics.fmean(v) for kind, v in out.items()}


# ---- the search ------------------------------------------------------------------------------


@contextmanager
def _mode(target: str) -> Iterator[None]:
    if target == "interpret":
        from graphnet.lowering.targets.interpret import interpreted

        with interpreted():
            yield
    else:
        yield


def _launches(eqn: Eqn) -> list[Step]:
    return launches(eqn, lambda v: v.name)


def _jobs(plan: Plan) -> list[tuple[Eqn, tuple[Choice, ...]]]:
    """The equations of a plan whose launches differ, each with the choices in it."""
    found: dict[tuple, tuple[Eqn, tuple[Choice, ...]]] = {}
    for e in plan.graph.eqns:
        steps = [s for s in _launches(e) if isinstance(s, Launch)]
        if steps and steps[0].choices:
            alike = tuple((s.kernel, s.constants, s.grid) for s in steps)
            found.setdefault(alike, (e, steps[0].choices))
    return list(found.values())


def search(
    plan: Plan,
    *,
    gpu: str,
    seconds: float = 60.0,
    arch: int = 90,
    known: Mapping[Key, Config] | None = None,
    keep: int = KEEP,
    say: Callable[[str], None] = lambda line: None,
    each: Callable[[Found], None] = lambda found: None,
) -> Found:
    """Tries candidates for every key of a plan, the dearest first, until the time is up.

    gpu    under which name the result is kept; also the model's ceilings where it knows them
    known  keys that need no search
    each   told of what is found so far after every key: being cut off loses nothing
    """
    began = time.perf_counter()
    model = gpu if gpu in CEILINGS else MODEL_GPU
    known = dict(known or {})
    jobs = _jobs(plan)
    keys: dict[Key, Choice] = {}
    for _, asked in jobs:
        keys.update((c.key, c) for c in asked if c.key not in known)
    cost = {
        key: sum(predict_us(_launches(e), model) for e, asked in jobs if key in _keys(asked))
        for key in keys
    }
    found = Found(gpu, keys=len(keys))
    rest = sum(cost.values())
    for key in sorted(keys, key=lambda k: -cost[k]):
        left = seconds - (time.perf_counter() - began)
        share = max(left * cost[key] / rest, 0.0) if rest else 0.0
        rest -= cost[key]
        mine = [e for e, asked in jobs if key in _keys(asked)]
        trials = _try_key(keys[key], mine, plan, known, model, arch, keep, share)
        entry = _decide(trials, gpu)
        if entry is not None:
            best = entry.config
            known[key] = best
            trials = [replace(t, chosen=t.config == best) for t in trials]
            found.entries.append(entry)
        found.trials += trials
        found.seconds = time.perf_counter() - began
        say(_line(key, trials, entry))
        each(found)
    return found


def _keys(asked: Sequence[Choice]) -> set[Key]:
    return {c.key for c in asked}


def _try_key(
    choice: Choice, eqns: Sequence[Eqn], plan: Plan, known: Mapping[Key, Config], model: str,
    arch: int, keep: int, seconds: float,
) -> list[Trial]:  # fmt: skip
    began = time.perf_counter()
    update = any(e.op.endswith("_update") for q in eqns for e in (q.body.eqns if q.body else ()))
    layers = tuple(dict.fromkeys(n for e in eqns for n in e.where.layers))
    made: list[Candidate] = []
    trials: list[Trial] = []

    def trial(c: Config, predicted: float, verdict: str, error: str | None = None) -> None:
        trials.append(Trial(*choice.key, layers, c, predicted, None, verdict, error))

    seen: set[tuple] = set()
    for c in candidates(choice, update):
        with using({**known, choice.key: c}):
            try:
                steps = [_launches(e) for e in eqns]
            except GraphnetError as error:
                trial(c, float("inf"), "failed", str(error))
                continue
        alike = tuple((s.kernel, s.constants, s.grid, s.num_warps, s.num_stages)
                      for group in steps for s in group if isinstance(s, Launch))  # fmt: skip
        if alike in seen:  # a loader that cannot be had here
            continue
        seen.add(alike)
        made.append((c, sum(predict_us(s, model) for s in steps), steps))
    first, *others = made
    made = [first, *sorted(others, key=lambda m: m[1])[: keep - 1]]
    if plan.target == "cuda":
        made = _build(made, arch, trial)
    alone = [Alone(plan.graph, e, plan.target) for e in eqns]
    right: list[tuple[Config, float, list[Callable[[], None]]]] = []
    with torch.no_grad(), _mode(plan.target):
        for k, (c, predicted, steps) in enumerate(made):
            if k and time.perf_counter() - began > seconds:
                trial(c, predicted, "skipped", "the time was up")
                continue
            verdict, why, runs = _check(alone, steps)
            if verdict == "right":
                right.append((c, predicted, runs))
            else:
                trial(c, predicted, verdict, why)
        left = max(seconds - (time.perf_counter() - began), 0.0)
        times = _time([runs for *_, runs in right], plan.target, left)
    for (c, predicted, _), us in zip(right, times, strict=True):
        trials.append(Trial(*choice.key, layers, c, predicted, us, "right"))
    return trials


def _build(made: list[Candidate], arch: int, trial: Callable[..., None]) -> list[Candidate]:
    """Those whose launches all compile without spills, built together; the others are recorded."""
    kernels = [[s for g in steps for s in g if isinstance(s, Launch)] for *_, steps in made]
    answers = iter(try_launches([s for group in kernels for s in group], arch))
    out = []
    for candidate, group in zip(made, kernels, strict=True):
        about = [next(answers) for _ in group]
        c, predicted, _ = candidate
        if broken := next((a for a in about if "error" in a), None):
            trial(c, predicted, "failed", broken["error"].splitlines()[-1][:200])
        elif spilled := next((a for a in about if a["spill_bytes"]), None):
            trial(c, predicted, "spills", f"{spilled['name']}: {spilled['spill_bytes']} B")
        else:
            out.append(candidate)
    return out


def _check(
    alone: Sequence[Alone], steps: Sequence[Sequence[Step]]
) -> tuple[str, str | None, list[Callable[[], None]]]:
    """(verdict, how it differs, calls) of one candidate over all equations that it decides."""
    runs = []
    for job, group in zip(alone, steps, strict=True):
        try:
            run, tensor = job.prepare(group)
            why = job.verdict(run, tensor)
        except Exception as error:  # a candidate's failure is a result, not ours
            return "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"[:200], []
        if why is not None:
            return "wrong", why, []
        job.fill(tensor)  # what is timed reads operands, not NaN
        runs.append(run)
    return "right", None, runs


def _time(
    programs: Sequence[Sequence[Callable[[], None]]], target: str, seconds: float
) -> list[float]:
    """Median microseconds of each program, in interleaved rounds."""
    if not programs:
        return []
    calls = [_repeated(runs, target) for runs in programs]
    samples: list[list[float]] = [[] for _ in calls]
    began = time.perf_counter()
    for done in range(ROUNDS):
        if done and time.perf_counter() - began > seconds:
            break
        for k, (call, times) in enumerate(calls):
            samples[k].append(1e6 * clock(call) / times)
    return [statistics.median(s) for s in samples]


def _repeated(runs: Sequence[Callable[[], None]], target: str) -> tuple[Callable[[], None], int]:
    """(a call, how often it does the work): on a GPU a captured graph, free of host time."""

    def once() -> None:
        for run in runs:
            run()

    if target != "cuda":
        return once, 1
    times = 10
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=side):
        for _ in range(times):
            once()
    graph.replay()
    return graph.replay, times


def _decide(trials: Sequence[Trial], gpu: str) -> tables.Entry | None:
    """The entry of a key: its fastest right candidate, the rules' own unless it is clearly beaten.

    None where nothing right was timed.
    """
    right = [t for t in trials if t.verdict == "right" and t.median_us is not None]
    if not right:
        return None
    best = min(right, key=lambda t: t.median_us or 0.0)
    rules = next((t for t in right if t.config == analytic(*t.key)), None)
    if rules is not None and (best.median_us or 0.0) > GAIN * (rules.median_us or 0.0):
        best = rules
    return tables.Entry(
        *best.key, best.config, "measured", round(best.median_us or 0.0, 3),
        None if rules is None else round(rules.median_us or 0.0, 3),
        datetime.date.today().isoformat(), tables.environment(gpu),
    )  # fmt: skip


def _line(key: Key, trials: Sequence[Trial], entry: tables.Entry | None) -> str:
    counts: dict[str, int] = {}
    for t in trials:
        counts[t.verdict] = counts.get(t.verdict, 0) + 1
    said = ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()))
    head = f"{key[0]:20} {'x'.join(map(str, key[1])):22} {key[2]:5} {said}"
    if entry is None:
        return f"{head}; nothing right: the rules stay"
    if entry.config == analytic(*key):
        return f"{head}; the rules' choice stays, {entry.us:.1f} us"
    gain = f" instead of {entry.analytic_us:.1f}" if entry.analytic_us else ""
    return f"{head}; {entry.us:.1f} us{gain}"
