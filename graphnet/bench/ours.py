"""Our side: the ways to run a step that are public, and what is left of it without a part."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

import graphnet as gn
from graphnet import config
from graphnet.api import lower
from graphnet.bench.peers import Work
from graphnet.bench.rounds import Contestant, Run, sentence, start
from graphnet.errors import GraphnetError
from graphnet.ir.graph import Graph
from graphnet.lowering.build import native
from graphnet.lowering.targets.cpu_task import flatten

OURS = "graphnet"
# What can be left out: names of passes and of kernels, or how the step is run.
ABLATIONS = {
    "fusion": "fuse_pairs,fuse_epilogues,fuse_updates,fuse_copies,fuse_chains",
    "cudagraph": "",
    "layout": "layout",
    "update-fusion": "fuse_updates,fuse_copies",
    "native": native.NATIVE,
}


def _asked(work: Work, target: str) -> dict[str, Any]:
    """The arguments of `gn.compile` that stand for the work."""
    out: dict[str, Any] = {"shape": tuple(work.x.shape), "target": target}
    out["precision"] = work.precision
    if work.mode != "infer":
        out["loss"] = gn.CrossEntropyLoss()
    if work.mode == "grads":
        out["grads"] = True
    elif work.mode == "train":
        out["optimizer"] = work.sgd
    return out


def compiled(work: Work, target: str, off: str = "", *, alone: bool = True, **options: Any) -> Any:
    """The program for the work; `off` names passes to leave out. It has a copy of the net unless
    not `alone`."""
    net = work.net.copy() if alone else work.net
    with config.override(DISABLE=off):
        return gn.compile(net, **_asked(work, target), **options)


def _fused(work: Work, target: str, off: str) -> Graph:
    with config.override(DISABLE=off):
        return lower(work.net, **_asked(work, target)).plan.graph


def _call(program: Any, work: Work) -> Run:
    """The public call, once a step; it copies the batch to where the step reads it."""
    feed = (work.x,) if work.mode == "infer" else (work.x, work.y)

    def run(steps: int) -> None:
        for _ in range(steps):
            program(*feed)

    return run


def _bound(program: Any, work: Work) -> Run:
    """`step.run(n)` over the batch as a data set that lies on the device."""
    program.bind(work.x, work.y, shuffle=False)
    return program.run


def start_all(work: Work, target: str) -> tuple[list[Contestant], dict[str, str]]:
    """Our public ways to do the work, started: by call and, in training, over bound data; and why
    one is missing, by name. The call must work."""
    out = [start(OURS, OURS, lambda: _call(compiled(work, target), work), work.device)]
    ways: dict[str, Callable[[], Run]] = {}
    if work.mode == "train":
        ways["bind/run"] = lambda: _bound(compiled(work, target), work)
    failures = {}
    for way, build in ways.items():
        name = f"{OURS} {way}"
        try:
            out.append(start(name, OURS, build, work.device))
        except Exception as error:
            failures[name] = sentence(error)
    return out, failures


def _uncaptured(work: Work, target: str) -> Run:
    """The step without its CUDA graph: the same launches, one by one from Python."""
    program = compiled(work, target)
    cuda = importlib.import_module("graphnet.lowering.targets.cuda")
    program._run = cuda.prepare(program.plan, program._storage, capture=False)
    return _call(program, work)


def _without(work: Work, target: str, name: str) -> Run:
    if name == "cudagraph":
        return _uncaptured(work, target)
    return _call(compiled(work, target, ABLATIONS[name]), work)


def why_not(work: Work, target: str, name: str) -> str:
    """Why a part cannot be left out here; empty where it can."""
    if name == "cudagraph":
        return "" if target == "cuda" else f"the {target} target has no CUDA graph"
    if name == "native":
        if target != "cpu":
            return f"the {target} target has no kernels in C"
        ops = {e.op for e in flatten(_fused(work, target, ""))}
        if "batch_norm" not in ops:
            return "the step has no batch normalization, the only one in C"
        return native.why_not("batch_norm")
    same = str(_fused(work, target, ABLATIONS[name])) == str(_fused(work, target, ""))
    return f"the {target} target's graph is the same without it" if same else ""


def start_ablations(
    work: Work, target: str, names: tuple[str, ...]
) -> tuple[list[Contestant], dict[str, str]]:
    """Our step without a part each, started; and why the others are missing, by name."""
    out, failures = [], {}
    for name in names:
        title = f"{OURS} without {name}"
        try:
            if why := why_not(work, target, name):
                failures[title] = f"not applicable: {why}"
                continue
            build = lambda name=name: _without(work, target, name)  # type: ignore[misc]
            out.append(start(title, "ablation", build, work.device))
        except (GraphnetError, RuntimeError, torch.OutOfMemoryError) as error:
            failures[title] = sentence(error)
    return out, failures
