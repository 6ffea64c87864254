"""compile() and build(): the whole pipeline on one screen, and what stands beside it."""

from __future__ import annotations

import hashlib
import importlib
import os
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from graphnet import config
from graphnet.errors import (
    BackendUnavailableError,
    ConfigError,
)
from graphnet.frontends.arguments import (
    check_arguments,
    check_augment,
    check_net,
    check_ranks,
    check_reduce,
    handling_of,
)
from graphnet.frontends.dsl import Module
from graphnet.frontends.torch_specs import loss_of, optimizer_of
from graphnet.frontends.tracing import trace
from graphnet.passes import pipeline
from graphnet.passes.halves import halves
from graphnet.passes.precision import resolve
from graphnet.runtime.accumulate import Accumulated
from graphnet.runtime.group import Group, group_of, versions
from graphnet.runtime.program import Evaluate, Gradients, Infer, Program
from graphnet.runtime.state import state_of
from graphnet.runtime.training import TrainStep

if TYPE_CHECKING:
    from graphnet.lowering.launch.choice import Kernels

TARGETS = ("auto", "cuda", "interpret", "cpu")
BUILT_FOR = "h100"  # the GPU that we build for where there is none


@dataclass(frozen=True)
class Pass:
    """The forward (half 0) or the backward pass (1) from given cotangents, or both (None), with
    respect to inputs of the graph by name, in training or in inference."""

    half: int | None
    wrt: tuple[str, ...]
    training: bool


@dataclass(frozen=True)
class Lowered:
    """A net on its way to a program: the graphs, the plan, and the arguments; target and
    precision are never "auto"."""

    stages: Any
    plan: Any
    target: str
    precision: str
    trainable: tuple[str, ...]
    kernels: Kernels | None = None


def lower(
    net: Module,
    shape: Sequence[int],
    *,
    target: str = "auto",
    precision: str = "auto",
    loss: Any = None,
    optimizer: Any = None,
    grads: bool = False,
    accumulate: int = 1,
    clip_norm: float | None = None,
    nonfinite: str | None = "auto",
    apply: bool = True,
    augment: Any = None,
    ranks: int = 1,
    global_batch: int = 0,
    sync_bn: bool = False,
    reduce: str | None = None,
    towers: bool = False,
    pass_: Pass | None = None,
    kernels: Kernels | None = None,
) -> Lowered:
    """trace -> passes -> plan. Needs no device: any target can be lowered for anywhere.

    Of the two programs that accumulate, `apply` chooses the one that ends in the update. `kernels`
    decide between variants, where those of the target and the GPU at hand are not meant. `shape`
    is that of one of `ranks` processes, which share a batch of `global_batch` rows (by default as
    many as they have room for); with `towers` they share the channels instead. `pass_` is one half
    of a graph without a loss: see `graphnet.torch_out`.
    """
    from graphnet.lowering.plan.plan import make_plan
    from graphnet.lowering.watch import dump

    check_net(net)
    loss, optimizer = loss_of(loss), optimizer_of(optimizer, net)
    check_arguments(loss, optimizer, grads)
    check_augment(augment, optimizer)
    check_ranks(ranks, optimizer, grads, towers)
    rows, channels = (1, ranks) if towers else (ranks, 1)
    handling = handling_of(optimizer, accumulate, clip_norm, nonfinite, apply)
    target = _resolve(target)
    precision = resolve(precision, target)
    check_reduce(reduce, precision)
    training = pass_.training if pass_ else optimizer is not None or grads
    traced = trace(
        net, shape, loss=loss, training=training, augment=augment, ranks=rows,
        global_batch=global_batch, sync_bn=sync_bn,
    )  # fmt: skip
    keys = tuple(k for k, p in net.named_parameters() if p.trainable)
    if training and not keys and not pass_:
        raise ConfigError("no parameter of the net is trainable", help="p.trainable = True")
    kernels = kernels or kernels_of(target)
    with net.locating():
        stages = pipeline.run(
            traced, precision=precision, optimizer=optimizer, grads=grads, kernels=kernels,
            trainable=keys,
            multipliers={k: (p.lr_mult, p.decay_mult) for k, p in net.named_parameters()},
            handling=handling, wrt=pass_.wrt if pass_ else None, ranks=rows,
            reduce=reduce, towers=channels,
        )  # fmt: skip
        if pass_ and pass_.half is not None:
            stages.fused = halves(stages.fused, len(traced.returns))[pass_.half]
        plan = make_plan(stages.fused, target, kernels)
    dump(plan)
    return Lowered(stages, plan, target, precision, keys, kernels)


def kernels_of(target: str, gpu: str | None = None, arch: int | None = None) -> Kernels | None:
    """What decides between kernels on a target, None where there are none of ours.

    gpu   the GPU whose measurements decide: the one at hand by default, an H100 where there is
          none; "" uses none. Tests rely on the interpreter's tiles, so there tuned ones are used
          only where GRAPHNET_TUNE asks for them
    arch  90 for sm_90; that of the GPU at hand by default
    """
    from graphnet.lowering.launch.registry import kernels_for
    from graphnet.lowering.tune.tables import table_for

    if target == "cpu":
        return None
    name = tuned_as(target) if gpu is None else gpu or None
    known = table_for(name) if target == "cuda" or config.tune() else {}
    if arch is None and target == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        arch = 10 * major + minor
    return kernels_for(target, arch=arch or 90, table=known)


def settle(low: Lowered, on_gpu: bool, *net: Any, **how: Any) -> tuple[Lowered, set[str]]:
    """(what was lowered, with choices that hold; keys of what was compiled for that). See
    `graphnet.lowering.tune.proof`. `net` and `how` are what `lower` was given."""
    from graphnet.lowering.tune.proof import settled

    return settled(low, lambda kernels: lower(*net, **{**how, "kernels": kernels}), on_gpu)


def tuned_as(target: str) -> str | None:
    """Under which name a target's measurements are kept: the GPU's, or the one we build for."""
    from graphnet.lowering.watch import gpu_key

    if target == "cuda":
        return gpu_key() or BUILT_FOR
    return {"interpret": "interpreter"}.get(target)


def tune(low: Lowered, seconds: float = 60.0, **options: Any) -> Any:
    """Searches variants and configurations for what a lowered net launches, on its own target, and
    keeps them.

    Problems that have a measurement of ours are left alone. The result is a `Found`, every trial in
    it; what is lowered from now on uses it. The options are those of
    `graphnet.lowering.tune.search.search`.
    """
    from graphnet.lowering.tune import search, tables

    gpu = tuned_as(low.target)
    if low.kernels is None:
        raise ConfigError(f"target {low.target!r} has no launches to tune", help="use cuda")
    assert gpu is not None
    told = options.pop("each", lambda found: None)
    kept = 0

    def each(found: Any) -> None:
        nonlocal kept
        tables.remember(found.entries[kept:])
        kept = len(found.entries)
        told(found)

    kernels = replace(low.kernels, table=tables.table_for(gpu))
    return search.search(low.plan, kernels, gpu=gpu, seconds=seconds, each=each, **options)


def compile(
    net: Module,
    shape: Sequence[int],
    *,
    target: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    loss: Any = None,
    optimizer: Any = None,
    grads: bool = False,
    accumulate: int = 1,
    clip_norm: float | None = None,
    nonfinite: str | None = "auto",
    augment: Any = None,
    group: Any = None,
    sync_bn: bool = False,
    reduce: str | None = None,
    towers: bool = False,
) -> Program:
    """A program for inputs of `shape`, batch first: what it returns depends on what is given.

    nothing             infer(x) -> logits
    loss                ev(x, y) -> (loss, logits)
    loss, grads=True    g(x, y) -> (loss, {key: gradient})
    loss, optimizer     step(x, y) -> loss

    target "auto" is cuda where there is a GPU, else cpu; precision is fp32 (IEEE, which a GPU has
    no matrix units for), tf32 or bf16, and "auto" is tf32 on cuda, fp32 on cpu and interpret;
    `program.precision` says which. `seed` draws the dropout masks. All programs of one net on one
    device share its state; called from several threads, they take turns.

    accumulate  a step applies the mean gradient of this many calls, at the last of them
    clip_norm   scales the gradients down to this global norm; `step.optimizer.clip_norm` sets it
    nonfinite   "auto": a step whose loss is not finite raises NumericsError, which names the layer,
                and leaves the state as it was. On a GPU a later call raises, and the steps between
                change nothing. A step that accumulates has no such guard, where it costs launches.
                "stop": the state is left as it was, and nothing raises; "skip": so do gradients
                that are not finite, and the recorded loss is NaN. None guards nothing: a loss that
                is NaN makes the weights NaN
    Clipping and "skip" read all gradients before the first update: `inspect --why` has the price.

    augment     a `gn.Augment`: the step takes images as they are stored, and draws for each row by
                its index in the data and the epoch: step(x, y, index, epoch)
    group       data parallel over the processes of a ProcessGroup of torch.distributed, or of
                "world"; None is one process, under torchrun too. `shape` holds the rows of a rank,
                of which a call may have any number, none included. Gradients, loss, clipping and
                guards are those of one process with the rows of all ranks; so are dropout masks,
                where rank r is given the rows from r * batch on of each global batch. Parameters
                and the optimizer's state are those of rank 0 at the start. ConfigError where the
                ranks do not compile the same
    sync_bn     over several ranks, batch normalization uses the statistics of the rows of all of
                them, and its running statistics are the same on each. Otherwise each rank has its
                own, as with torch's DDP: those of rank 0 are the ones to save. One process has one
                kind
    reduce      "bf16": over several ranks, gradients are rounded to bf16, travel and are summed so,
                which halves what is sent; for precision bf16 alone. None sums them in fp32
    towers      the two processes of `group` share the channels instead of the rows: each holds half
                of the feature maps and of the parameters (the AlexNet of 2012). They are called
                with the same rows, and give the same loss, logits and gradients as one process.
                Norms must stay within each half (`LocalResponseNorm(groups=2)`). What the net holds
                as a whole, `state_dict()` or another program, brings the halves together: both
                processes have to come to it
    """
    joined = group_of(group)
    how: dict[str, Any] = {
        "target": target, "precision": precision, "loss": loss, "optimizer": optimizer,
        "grads": grads, "accumulate": accumulate, "clip_norm": clip_norm, "nonfinite": nonfinite,
        "augment": augment, "ranks": joined.ranks if joined else 1, "sync_bn": sync_bn,
        "reduce": reduce, "towers": towers,
    }  # fmt: skip
    (program,) = compile_together(net, shape, [how], seed=seed, group=joined)
    return program


def compile_together(
    net: Module, shape: Sequence[int], ways: Sequence[dict[str, Any]], *, seed: int = 0,
    group: Group | None = None,
) -> list[Program]:  # fmt: skip
    """The programs that `compile` gives for each of these arguments. Where kernels have to be
    compiled, those of all of them are, in one go. Those with `ranks` are run by the group."""
    if not isinstance(seed, int):
        raise ConfigError(f"seed is an int, not {seed!r}")
    check_net(net)
    ways = [
        {**how, "loss": loss_of(how.get("loss")),
         "optimizer": optimizer_of(how.get("optimizer"), net)}
        for how in ways
    ]  # fmt: skip
    lows = [_needed(net, shape, how) for how in ways]
    if group is not None:
        for how, (low, *_) in zip(ways, lows, strict=True):
            group.agree(_facts(shape, how, low, seed))
    if lows[0][0].target == "cuda" and not config.tune():
        cuda = importlib.import_module("graphnet.lowering.targets.cuda")
        cuda.compile_together([low.plan for needed in lows for low in needed])
    return [
        _program(net, shape, how, needed, seed, group if how.get("ranks", 1) > 1 else None)
        for how, needed in zip(ways, lows, strict=True)
    ]  # fmt: skip


def _needed(net: Module, shape: Sequence[int], how: dict[str, Any]) -> list[Lowered]:
    """What a program consists of: one lowered net, and that which only adds where it accumulates.
    On a GPU there must be room for it."""
    _device(_resolve(how.get("target", "auto")))
    low = lower(net, shape, **how)
    _make_sure_of_room(net, shape, how, low)
    more = [lower(net, shape, **how, apply=False)] if how.get("accumulate", 1) > 1 else []
    return [low, *more]


def _make_sure_of_room(
    net: Module, shape: Sequence[int], how: dict[str, Any], low: Lowered
) -> None:
    """OutOfMemoryPlanError, with the batch that fits, where the GPU has too little memory."""
    if low.target == "cuda":
        cuda = importlib.import_module("graphnet.lowering.targets.cuda")
        again = lambda batch: lower(net, (batch, *shape[1:]), **how).plan
        state = state_of(net, _device(low.target))
        cuda.require(low.plan, state.missing_bytes(low.plan.graph) + low.plan.io_bytes, again)


def _program(
    net: Module, shape: Sequence[int], how: dict[str, Any], needed: list[Lowered], seed: int,
    group: Group | None = None,
) -> Program:  # fmt: skip
    """The program of what was lowered, once its choices hold."""
    low, *adding = needed
    _make_sure_of_room(net, shape, how, low)  # beside what the program before it has taken
    if config.tune() and low.plan.launches:
        tune(low)
        low = lower(net, shape, **how)
    if low.target == "cuda":
        low, _ = settle(low, True, net, shape, **how)
    if adding and low is not needed[0]:
        adding = [lower(net, shape, **{**how, "kernels": low.kernels}, apply=False)]
    module = importlib.import_module(f"graphnet.lowering.targets.{low.target}")
    common: dict[str, Any] = {
        "stages": low.stages, "plan": low.plan, "prepare": module.prepare, "seed": seed,
        "group": group, "global_batch": how.get("global_batch", 0),
        "state": state_of(net, _device(low.target)), "target": low.target,
        "precision": low.precision,
    }  # fmt: skip
    if how.get("optimizer") is not None:
        clip_norm = how.get("clip_norm")
        knobs = {"clip_norm": clip_norm} if clip_norm else {}
        common |= {"optimizer": how["optimizer"], "knobs": knobs, "net": weakref.ref(net)}
        if not adding:
            return TrainStep(**common)
        return Accumulated(every=how["accumulate"], adding=adding[0], **common)
    if how.get("grads"):
        return Gradients(keys=low.trainable, **common)
    return Infer(**common) if how.get("loss") is None else Evaluate(**common)


def _facts(
    shape: Sequence[int], how: dict[str, Any], low: Lowered, seed: int
) -> dict[str, Any]:  # fmt: skip
    """What all ranks must have in common, by the name under which an error says so."""
    same = lambda graph: hashlib.sha256(str(graph).encode()).hexdigest()[:12]
    return versions() | {
        "the input shape": tuple(shape), "the seed": seed, "the target": low.target,
        "the precision": low.precision, "the optimizer": how.get("optimizer"),
        "the net": same(low.stages.traced), "the graph of the step": same(low.stages.fused),
    }  # fmt: skip


def build(
    net: Module,
    shape: Sequence[int],
    *,
    arch: str = "sm_90",
    precision: str = "auto",
    loss: Any = None,
    optimizer: Any = None,
    grads: bool = False,
    accumulate: int = 1,
    clip_norm: float | None = None,
    nonfinite: str | None = "auto",
    augment: Any = None,
    ranks: int = 1,
    sync_bn: bool = False,
    reduce: str | None = None,
    towers: bool = False,
    out: str | os.PathLike[str] | None = None,
) -> Any:
    """Everything up to binaries for `arch`, with no device: a Report, one row per launch.

    precision "auto" is tf32: what is built here is for a GPU, whatever this machine has. `ranks`
    processes share a batch, of which `shape` is one's part, with `sync_bn` and `reduce` as
    `compile` has them, or with `towers` the channels. `out` is a folder that receives the binaries
    and the generated files.
    """
    from graphnet.lowering.build.build import arch_number, build_plan

    start = time.perf_counter()
    number = arch_number(arch)
    how: dict[str, Any] = {
        "target": "cuda", "precision": precision, "loss": loss, "optimizer": optimizer,
        "grads": grads, "accumulate": accumulate, "clip_norm": clip_norm, "nonfinite": nonfinite,
        "augment": augment, "ranks": ranks, "sync_bn": sync_bn, "reduce": reduce,
        "towers": towers,
        "kernels": kernels_of("cuda", BUILT_FOR if number == 90 else "", number),
    }  # fmt: skip
    low, fresh = settle(lower(net, shape, **how), False, net, shape, **how)
    return build_plan(
        low.plan, arch=arch, precision=low.precision, out=out, start=start, before=fresh
    )  # fmt: skip


def _resolve(target: str) -> str:
    if target not in TARGETS:
        raise ConfigError(f"unknown target {target!r}", help=f"one of {', '.join(TARGETS)}")
    if target == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return target


def _device(target: str) -> torch.device:
    if target != "cuda":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BackendUnavailableError(
            "target 'cuda' needs a GPU, and torch sees none",
            help="use target='cpu', or gn.build(...) to compile kernels without a device",
        )
    return torch.device("cuda", torch.cuda.current_device())
