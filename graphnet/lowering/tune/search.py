"""The search for variants and configurations: right first, then fast.

Each problem of the plan gets its candidates: every variant that accepts its equations, in several
configurations, ordered by what was measured elsewhere and by the model. Every candidate is built,
run alone over operands that nothing else touches and results filled with NaN, and held against the
float64 reference of its equation. Only right ones are timed, in interleaved rounds; a wrong one is
recorded as wrong, however fast it would have been.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from graphnet.errors import GraphnetError
from graphnet.lowering.build.build import try_launches
from graphnet.lowering.launch.choice import Choice, Kernels
from graphnet.lowering.launch.config import Config
from graphnet.lowering.launch.cost import CEILINGS, floor_us
from graphnet.lowering.launch.equation import computed
from graphnet.lowering.launch.steps import Launch
from graphnet.lowering.launch.variants import Problem, Variant
from graphnet.lowering.launch.work import Work, take_apart
from graphnet.lowering.plan.plan import Plan
from graphnet.lowering.tune import tables
from graphnet.lowering.tune.alone import Alone, mode
from graphnet.lowering.tune.model import predict_us, rank_correlation
from graphnet.lowering.watch import clock

KEEP = 24  # candidates of a problem that are tried, the likeliest
GAIN = 0.97  # the rules' choice stays unless another takes at most this share of its time
ROUNDS = 9
MODEL_GPU = "h200"  # the GPU whose ceilings order candidates where the one at hand is unknown


@dataclass(frozen=True)
class Candidate:
    """A configuration of a variant, its predicted time, and its launches for each equation."""

    variant: Variant
    config: Config
    predicted_us: float
    steps: list[list[Launch]]


@dataclass(frozen=True)
class Trial:
    """One candidate for a problem. verdict: right, wrong, spills, failed or skipped (not
    reached)."""

    problem: Problem
    layers: tuple[str, ...]
    variant: str
    config: Config
    predicted_us: float
    median_us: float | None
    verdict: str
    error: str | None = None
    chosen: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for a result file."""
        return {
            "kernel": self.problem.op, "shape": list(self.problem.shape),
            "precision": self.problem.dtype, "layers": list(self.layers),
            "variant": self.variant, "config": self.config.as_dict(),
            "predicted_us": round(self.predicted_us, 3),
            "median_us": None if self.median_us is None else round(self.median_us, 3),
            "verdict": self.verdict, "error": self.error, "chosen": self.chosen,
        }  # fmt: skip


@dataclass
class Found:
    """What a search found: every trial, and the entries that are used from now on."""

    gpu: str
    trials: list[Trial] = field(default_factory=list)
    entries: list[tables.Entry] = field(default_factory=list)
    keys: int = 0
    seconds: float = 0.0

    def rank_correlations(self) -> dict[str, float]:
        """Of the predicted order with the measured one, by op, over problems with enough trials."""
        out: dict[str, list[float]] = {}
        for problem in dict.fromkeys(t.problem for t in self.trials):
            pairs = [
                (t.predicted_us, t.median_us)
                for t in self.trials
                if t.problem == problem and t.median_us is not None
            ]
            rho = rank_correlation(*zip(*pairs, strict=True)) if pairs else None
            if rho is not None:
                out.setdefault(problem.op, []).append(rho)
        return {op: statistics.fmean(v) for op, v in out.items()}


# ---- the search ------------------------------------------------------------------------------


def _launches(work: Work, variant: Variant, config: Config, kernels: Kernels) -> list[Launch]:
    return computed(work, Choice(work.problem, variant, config, "tried"), kernels)


def _jobs(plan: Plan) -> dict[Problem, list[Work]]:
    """The equations of a plan that a variant is chosen for, by problem; of equations whose launches
    are alike one."""
    found: dict[tuple, Work] = {}
    for e in plan.graph.eqns:
        own = [s for s in plan.parts if s.choice is not None and set(s.writes) & {
            v.name for v in e.results}]  # fmt: skip
        if own:
            alike = tuple((s.kernel, s.constants, s.grid, s.num_warps, s.num_stages) for s in own)
            found.setdefault(alike, take_apart(e, lambda v: v.name))
    out: dict[Problem, list[Work]] = {}
    for work in found.values():
        out.setdefault(work.problem, []).append(work)
    return out


def search(
    plan: Plan,
    kernels: Kernels,
    *,
    gpu: str,
    seconds: float = 60.0,
    again: bool = False,
    keep: int = KEEP,
    say: Callable[[str], None] = lambda line: None,
    each: Callable[[Found], None] = lambda found: None,
) -> Found:
    """Tries candidates for every problem of a plan, those with most to gain first, until the time
    is up; what is far from its floor gets more of it.

    kernels  what may compute the plan's equations; problems that have a row of ours are left alone
             unless `again`
    gpu      under which name the result is kept; also the model's ceilings where it knows them
    each     told of what is found so far after every problem: being cut off loses nothing
    """
    began = time.perf_counter()
    model = gpu if gpu in CEILINGS else MODEL_GPU
    known = {p for p, rows in kernels.table.items() if any(r.source == "graphnet" for r in rows)}
    problems = {p: works for p, works in _jobs(plan).items() if again or p not in known}
    gain = {p: sum(_to_gain_us(w, kernels, model) for w in works) for p, works in problems.items()}
    found = Found(gpu, keys=len(problems))
    order = sorted(gain, key=lambda p: -gain[p])
    jobs = [_Job(p, problems[p], kernels, model, keep) for p in order]
    if plan.target == "cuda":
        _build(jobs, kernels.arch)
    rest = sum(gain.values())
    for job in jobs:
        left = seconds - (time.perf_counter() - began)
        share = max(left * gain[job.problem] / rest, 0.0) if rest else 0.0
        rest -= gain[job.problem]
        job.run(plan, share)
        entries = _decide(job.trials, job.rule, gpu)
        best = min(entries, key=lambda e: e.us, default=None)
        if best is not None:
            chosen = (best.variant, best.config)
            job.trials = [replace(t, chosen=(t.variant, t.config) == chosen) for t in job.trials]
        found.entries += entries
        found.trials += job.trials
        found.seconds = time.perf_counter() - began
        say(_line(job.problem, job.trials, best, job.rule))
        each(found)
    return found


def _to_gain_us(work: Work, kernels: Kernels, model: str) -> float:
    """What today's choice takes, as measured or else predicted, beyond the least that is possible.
    At least a little, so that nothing is left out."""
    now = kernels.choose(work)
    steps = _launches(work, now.variant, now.config, kernels)
    least = sum(floor_us(s.flops, s.bytes, s.math, model) for s in steps)
    return max((now.us or predict_us(steps, model)) - least, 0.1)


Rule = tuple[str, Config]


def candidates(
    p: Problem, works: Sequence[Work], kernels: Kernels
) -> Iterator[tuple[Variant, Config]]:
    """Configurations of all variants that accept all equations: first the rules' own choice, then
    the rule of each variant, what was measured elsewhere, and the rest."""
    able = [[v.name for v in kernels.able(w)[0]] for w in works]
    variants = [v for v in kernels.variants(p.op) if all(v.name in names for names in able)]
    first = replace(kernels, table={}).choose(works[0])
    yield first.variant, first.config
    yield from ((v, v.rule(p)) for v in variants)
    by_name = {v.name: v for v in variants}
    rows = sorted(kernels.table.get(p, ()), key=lambda r: r.us)
    yield from ((by_name[r.variant], r.config) for r in rows if r.variant in by_name)
    for v in variants:
        yield from ((v, c) for c in v.configs(p))


class _Job:
    """The state of one problem's search: its equations, its candidates, and their verdicts."""

    def __init__(self, p: Problem, works: Sequence[Work], kernels: Kernels, model: str, keep: int):
        self.problem, self.works = p, works
        self.layers = tuple(dict.fromkeys(n for w in works for n in w.eqn.where.layers))
        self.trials: list[Trial] = []
        self.made = self._candidates(kernels, model, keep)
        self.rule = self.made[0].variant.name, self.made[0].config

    def trial(
        self, c: Candidate, verdict: str, error: str | None = None, us: float | None = None
    ) -> None:
        """Records the verdict on a candidate."""
        about = self.problem, self.layers, c.variant.name, c.config, c.predicted_us
        self.trials.append(Trial(*about, us, verdict, error))

    def _candidates(self, kernels: Kernels, model: str, keep: int) -> list[Candidate]:
        """The rules' own choice, the first of every variant, and the likeliest of the others."""
        p = self.problem
        measured = {(r.variant, r.config): r.us for r in kernels.table.get(p, ())}
        made: list[Candidate] = []
        seen: set[tuple] = set()
        for variant, config in candidates(p, self.works, kernels):
            try:
                steps = [_launches(w, variant, config, kernels) for w in self.works]
            except GraphnetError as error:
                self.trial(Candidate(variant, config, float("inf"), []), "failed", str(error))
                continue
            alike = tuple((s.kernel, s.constants, s.grid, s.num_warps, s.num_stages)
                          for group in steps for s in group)  # fmt: skip
            if alike not in seen:
                seen.add(alike)
                us = measured.get((variant.name, config))
                us = sum(predict_us(s, model) for s in steps) if us is None else us
                made.append(Candidate(variant, config, us, steps))
        first, *others = made
        heads = {c.variant.name: c for c in reversed(others)}
        rest = sorted(others, key=lambda c: (c is not heads[c.variant.name], c.predicted_us))
        return [first, *rest[: keep - 1]]

    def run(self, plan: Plan, seconds: float) -> None:
        """Holds each candidate against the reference, and times those that are right."""
        began = time.perf_counter()
        alone = [Alone(plan.graph, w.whole, plan.target) for w in self.works]
        right: list[tuple[Candidate, list[Callable[[], None]]]] = []
        with torch.no_grad(), mode(plan.target):
            for k, c in enumerate(self.made):
                if k and time.perf_counter() - began > seconds:
                    self.trial(c, "skipped", "the time was up")
                    continue
                verdict, why, runs = _check(alone, c.steps)
                if verdict == "right":
                    right.append((c, runs))
                else:
                    self.trial(c, verdict, why)
            left = max(seconds - (time.perf_counter() - began), 0.0)
            times = _time([runs for _, runs in right], plan.target, left)
        for (c, _), us in zip(right, times, strict=True):
            self.trial(c, "right", us=us)


def _build(jobs: Sequence[_Job], arch: int) -> None:
    """Compiles all candidates of all problems together; those that spill or do not compile are
    recorded and dropped."""
    kernels = [s for job in jobs for c in job.made for group in c.steps for s in group]
    answers = iter(try_launches(kernels, arch))
    for job in jobs:
        kept = []
        for c in job.made:
            about = [next(answers) for group in c.steps for _ in group]
            if broken := next((a for a in about if "error" in a), None):
                job.trial(c, "failed", broken["error"].splitlines()[-1][:200])
            elif spilled := next((a for a in about if a["spill_bytes"]), None):
                job.trial(c, "spills", f"{spilled['name']}: {spilled['spill_bytes']} B")
            else:
                kept.append(c)
        job.made = kept


def _check(
    alone: Sequence[Alone], steps: Sequence[Sequence[Launch]]
) -> tuple[str, str | None, list[Callable[[], None]]]:
    """(verdict, how it differs, calls) of one candidate over all equations that it decides."""
    runs = []
    for job, group in zip(alone, steps, strict=True):
        try:
            run, tensor = job.prepare(group)
            why = job.verdict(run, tensor)
        except Exception as error:  # a candidate that fails is a result, not our error
            return "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"[:200], []
        if why is not None:
            return "wrong", why, []
        job.fill(tensor)  # the timed runs read real operands, not the NaN of the check
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


def _decide(trials: Sequence[Trial], rule: Rule, gpu: str) -> list[tables.Entry]:
    """The rows of a problem, the best of each variant; none where nothing right was timed. The
    rules' own choice stays the fastest unless another beats it clearly."""
    right = [t for t in trials if t.verdict == "right" and t.median_us is not None]
    own = next((t for t in right if (t.variant, t.config) == rule), None)
    by_rule = None if own is None else own.median_us
    if own is not None and min(t.median_us or 0.0 for t in right) > GAIN * (by_rule or 0.0):
        right = [t for t in right if (t.median_us or 0.0) >= (by_rule or 0.0)]
    best: dict[str, Trial] = {}
    for t in sorted(right, key=lambda t: (t.median_us or 0.0, t is not own)):
        best.setdefault(t.variant, t)
    today = datetime.date.today().isoformat()
    return [
        tables.Entry(
            t.variant, t.problem, t.config, round(t.median_us or 0.0, 3), "graphnet", gpu, today,
            None if by_rule is None else round(by_rule, 3), tables.versions(),
        )
        for t in best.values()
    ]  # fmt: skip


def _line(p: Problem, trials: Sequence[Trial], best: tables.Entry | None, rule: Rule) -> str:
    counts: dict[str, int] = {}
    for t in trials:
        counts[t.verdict] = counts.get(t.verdict, 0) + 1
    said = ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()))
    head = f"{p.op:20} {'x'.join(map(str, p.shape)):22} {p.dtype:5} {said}"
    if best is None:
        return f"{head}; nothing right: the rules stay"
    if (best.variant, best.config) == rule:
        return f"{head}; the rules' choice stays, {best.us:.1f} us"
    gain = f" instead of {best.rule_us:.1f}" if best.rule_us else ""
    return f"{head}; {best.variant} {best.config}, {best.us:.1f} us{gain}"
