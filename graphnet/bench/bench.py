"""`graphnet bench`: one net, our step beside torch's, as a table and as JSON.

First both sides must compute the same. Then, one kind of baseline after the other, its variants
and our ways run in interleaved rounds. The file is rewritten after every round, so that whatever
ends the run early leaves what was measured.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import graphnet as gn
from graphnet.api import _device, _resolve
from graphnet.bench import counts, facts, layers, ours, parity, peers
from graphnet.bench.ours import ABLATIONS, OURS, compiled
from graphnet.bench.peers import KINDS, MODES, Work
from graphnet.bench.result import SCHEMA, Found, layer_table, table
from graphnet.bench.rounds import Contestant, Timing, measure, sentence
from graphnet.errors import ConfigError, NumericsError
from graphnet.frontends.loading import input_shape, load_model
from graphnet.passes.precision import resolve, told
from graphnet.train.checkpoint import atomic_write

TARGETS = ("auto", "cuda", "cpu")
Say = Callable[[str], None]


@dataclass(frozen=True)
class BenchConfig:
    """What `graphnet bench` was asked for.

    mode     "train", "infer", or "grads": forward and backward without the update
    seconds  of all rounds together; building and compiling come on top
    quick    of what torch compiles only the layout, update and form that were eager's best
    parity_batches  on which both sides are held against an exact twin first; 0 checks nothing
    """

    model: str
    batch: int = 128
    mode: str = "train"
    precision: str = "auto"
    target: str = "auto"
    against: tuple[str, ...] = ("eager",)
    ablate: tuple[str, ...] = ()
    rounds: int = 15
    seconds: float = 20.0
    parity_batches: int = parity.BATCHES
    dropout: bool = True
    by_layer: bool = True
    quick: bool = False


def _one_of(what: str, names: tuple[str, ...], known: Any) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown {what} {name!r}", help=f"one of {', '.join(known)}")


def _check(c: BenchConfig) -> tuple[BenchConfig, str]:
    """(c with its precision resolved, target); ConfigError for what cannot be measured, before any
    work."""
    _one_of("baseline", c.against, KINDS)
    _one_of("ablation", c.ablate, ABLATIONS)
    _one_of("mode", (c.mode,), MODES)
    _one_of("target", (c.target,), TARGETS)
    target = _resolve(c.target)
    c = replace(c, precision=resolve(c.precision, target))
    if c.precision == "tf32" and target == "cpu":
        raise ConfigError(
            "tf32 is a mode of GPUs: a CPU would compute fp32 under that name",
            help="--precision fp32 or bf16",
        )
    return c, target


def _work(c: BenchConfig, device: torch.device) -> Work:
    """The net and one batch of random images on the device."""
    net = load_model(c.model)
    if not c.dropout:
        net = parity.without_dropout(net)
    shape = input_shape(net, c.batch)
    classes = net.summary((1, *shape[1:])).rows[-1].output[-1]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g)
    y = torch.randint(0, classes, (c.batch,), generator=g)
    sgd = gn.SGD(lr=0.01, momentum=0.9, weight_decay=5e-4) if c.mode == "train" else None
    return Work(net, x.to(device), y.to(device), c.mode, sgd, c.precision)


class _Bench:
    """One run: the result so far, and where it is written."""

    def __init__(self, c: BenchConfig, target: str, out: Path | None, say: Say) -> None:
        self.c, self.target, self.say = c, target, say
        self.device = _device(target)
        self.begin = time.perf_counter()
        self.found = Found(c.batch)
        self.kept: dict[str, Contestant] = {}  # the best of each kind, still running
        self.result: dict[str, Any] = {
            "schema": SCHEMA, "kind": "bench", "model": c.model, "batch": c.batch, "mode": c.mode,
            "precision": c.precision, "target": target, "dropout": c.dropout,
            "date": facts.now(), "machine": facts.machine(self.device),
            "versions": facts.versions(), "flags": facts.flags(), "clocks": [],
            "against": list(c.against), "complete": False, "seconds": 0.0, "parity": None,
            **self.found.as_dict(), "layers": None, "ceilings": None,
            "notes": [],
        }  # fmt: skip
        if out is not None and out.is_dir():
            out = out / facts.file_name(self.result)
        self.out = out

    def save(self) -> None:
        self.result |= self.found.as_dict()
        self.result["seconds"] = round(time.perf_counter() - self.begin, 1)
        if self.out is not None:
            atomic_write(self.out, (json.dumps(self.result, indent=1) + "\n").encode())

    def look_at_clocks(self) -> None:
        if (seen := facts.clocks(self.device)) is not None:
            self.result["clocks"].append(seen)

    def run(self) -> dict[str, Any]:
        c = self.c
        work = _work(c, self.device)
        self.look_at_clocks()
        # Ours come first: what the check compiles would make their first step a warm one.
        mine, failures = ours.start_all(work, self.target)
        if c.parity_batches:
            self.check(work)
        self.add(mine, failures, OURS)
        beside, failures = ours.start_ablations(work, self.target, c.ablate)
        self.add(beside, failures, "ablation")
        kinds = c.against or ("",)
        for kind in kinds:
            if kind:
                beside += self.peers(work, kind)
            self.group(mine, beside, c.seconds / len(kinds))
            if c.by_layer and kind == kinds[0]:  # early: a late end keeps it
                self.extra("times by layer", lambda: self.by_layer(work))
                self.extra("ceilings", lambda: self.ceilings(work))
        self.extra("counts of launches", self.count)
        self.result["complete"] = True
        self.save()
        return self.result

    def extra(self, what: str, measure: Callable[[], None]) -> None:
        """Something beside the ratios, which it must not stop where it fails."""
        try:
            measure()
        except Exception as error:
            self.result["notes"].append(f"no {what}: {sentence(error)}")
            self.save()
            self.say(self.result["notes"][-1])

    def check(self, work: Work) -> None:
        program = lambda w: compiled(w, self.target, alone=False)
        found = parity.check(work, program, self.c.parity_batches)
        self.result["parity"] = found.as_dict()
        self.save()
        self.say(f"{found.table()}\n{found}")
        if not found.ok:
            raise NumericsError(str(found), help="no speed is reported for wrong results")

    def peers(self, work: Work, kind: str) -> list[Contestant]:
        like = self.found.best().get("eager", "") if self.c.quick else ""
        if like and KINDS[kind].modes != ("",):
            self.result["notes"].append(f"{kind}: compiled from {like} alone")
        started, failures = peers.start_all(work, kind, like)
        self.add(started, failures, kind)
        return started

    def add(self, started: list[Contestant], failures: dict[str, str], kind: str) -> None:
        for c in started:
            self.found.kinds[c.name] = c.kind
            self.found.started[c.name] = replace(c, run=lambda n: None)
        for name, why in failures.items():
            self.found.kinds[name] = kind
            self.found.failures[name] = why

    def group(self, mine: list[Contestant], beside: list[Contestant], seconds: float) -> None:
        """Rounds of ours and those beside, which then are let go but for the quickest of a kind."""
        place = len(self.found.groups)

        def note(times: dict[str, Timing]) -> None:
            self.found.groups[place:] = [times]
            self.save()

        def lost(c: Contestant, error: Exception) -> None:
            if c.kind == OURS:
                raise error
            self.found.failures[c.name] = sentence(error)

        measure(
            [*mine, *beside], rounds=self.c.rounds, seconds=seconds, on_round=note,
            on_failure=lost,
        )  # fmt: skip
        self.look_at_clocks()
        self.save()
        top = set(self.found.best().values())
        self.kept |= {c.name: c for c in [*mine, *beside] if c.name in top}
        beside.clear()  # the next kind needs the memory
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def count(self) -> None:
        """Launches and the like, of the best of each kind: behind all timing."""
        for name in self.found.best().values():
            self.found.counts[name] = counts.count(self.kept[name].run, self.device)
            self.save()
        self.kept.clear()

    def by_layer(self, work: Work) -> None:
        """Where our time goes and where that of eager's best, for the plots and the curious."""
        eager, _ = peers.variants("eager", work)
        top = self.found.best().get("eager")
        variant = next((v for v in eager if v.name == top), eager[-1])
        self.result["layers"] = {
            "variant": variant.name, "torch": layers.layer_times(work, variant),
            "graphnet": layers.launch_times(work, self.target),
        }  # fmt: skip
        self.save()

    def ceilings(self, work: Work) -> None:
        self.result["ceilings"] = facts.ceilings(self.device, work.precision)
        self.save()


def run_bench(c: BenchConfig, out: Path | None = None, say: Say = lambda text: None) -> Any:
    """Runs the benchmark and returns what the JSON file holds.

    out  the file, or a folder: then the name says what was measured
    NumericsError where the two sides do not compute the same: no speed is reported then. After a
    KeyboardInterrupt the finished rounds have been printed and written.
    """
    asked = c.precision
    c, target = _check(c)
    say(f"precision {told(asked, target)}, torch's too")
    with peers.torch_flags(c.precision):
        bench = _Bench(c, target, out, say)
        try:
            result = bench.run()
        except KeyboardInterrupt:
            if bench.found.groups:
                say(table(bench.result))
            raise
    say(table(result))
    if result["layers"]:
        say(layer_table(result["layers"]))
    if bench.out is not None:
        say(f"written to {bench.out}")
    return result
