"""What the settings of a run build: net, loss, optimizer, schedule."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from graphnet.errors import ConfigError
from graphnet.frontends import init
from graphnet.frontends.dsl import Module
from graphnet.frontends.loading import input_shape, runs_code
from graphnet.frontends.tracing import trace
from graphnet.ops.adam import Adam, AdamW
from graphnet.ops.fused import eqn_cost
from graphnet.ops.loss import CrossEntropyLoss, MulticlassHingeLoss, MultiMarginLoss
from graphnet.ops.update import SGD
from graphnet.runtime.program import Program
from graphnet.train import folder, rundir, schedule
from graphnet.train.data import check_classes
from graphnet.train.ranks import local_ranks
from graphnet.train.settings import RunConfig, settings, typed


def read_settings(run: Path) -> RunConfig:
    """The settings in a run's config.toml; what an older version did not know has its default.
    Where nothing says a precision, the run was started in fp32."""
    path, found = run / rundir.CONFIG, rundir.read_config(run)
    data = {f.name: typed(path, f, found[f.name]) for f in settings() if f.name in found}
    if "model" not in data or "data" not in data:
        raise ConfigError(f"{path} is not of a run: it names no model or no data")
    return RunConfig(**{"precision": "fp32"} | data)


def make_optimizer(s: RunConfig) -> Any:
    """The optimizer of the settings; ConfigError where one is set that it does not have."""
    sgd, plain = s.optimizer == "sgd", RunConfig()
    for name in ("amsgrad",) if sgd else ("momentum", "nesterov", "form"):
        if getattr(s, name) != getattr(plain, name):
            raise ConfigError(
                f"{name}={getattr(s, name)} with optimizer {s.optimizer}",
                help=f"it belongs to {'adam and adamw' if sgd else 'sgd'}",
            )
    if sgd:
        return SGD(
            lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay, nesterov=s.nesterov,
            form=s.form, l1=s.l1,
        )  # fmt: skip
    kind = Adam if s.optimizer == "adam" else AdamW
    return kind(lr=s.lr, weight_decay=s.weight_decay, amsgrad=s.amsgrad, l1=s.l1)


def make_loss(s: RunConfig) -> Any:
    """The loss of the settings."""
    if s.label_smoothing and s.loss != "cross_entropy":
        raise ConfigError(
            f"label_smoothing={s.label_smoothing} with loss {s.loss}",
            help="it belongs to cross_entropy",
        )
    if s.loss == "cross_entropy":
        return CrossEntropyLoss(label_smoothing=s.label_smoothing)
    return MulticlassHingeLoss() if s.loss == "hinge" else MultiMarginLoss()


def make_schedule(s: RunConfig, batches: int) -> Any:
    """The schedule of the settings, for epochs of so many batches."""
    total = s.epochs * batches
    steps = round(s.warmup * batches)
    if steps >= total:
        raise ConfigError(f"warmup={s.warmup:g} epochs leave nothing of {s.epochs}")
    if s.accumulate > total:
        raise ConfigError(
            f"accumulate={s.accumulate} batches make an update, and the run has {total}",
            help="accumulate fewer, or train for more epochs",
        )
    rate = schedule.by_name(s.schedule, s.lr, total - steps, warm=steps > 0)
    if not steps:
        return rate
    if isinstance(rate, schedule.Plateau):
        rate.base = schedule.warmup(rate.base, steps)
        return rate
    return schedule.warmup(rate, steps)


def prepare(net: Module, s: RunConfig) -> Module:
    """Initial values, multipliers of biases and frozen layers, on a fresh net."""
    if s.init:
        init.by_name(s.init, net, seed=s.seed)
    for key, p in net.named_parameters():
        if key.rpartition(".")[2] == "bias":
            p.lr_mult, p.decay_mult = s.bias_lr, s.bias_decay
    freeze(net, [n for n in s.freeze.split(",") if n])
    return net


_FLOPS_OF_A_THREAD = 100e6  # about 3 ms of work


def processors() -> int:
    """That this process may use, of several on one machine its part. OMP_NUM_THREADS and
    torch.set_num_threads count as a limit; but for the 1 that torchrun sets by itself."""
    part, limit = _part(), torch.get_num_threads()
    return part if limit == 1 and local_ranks() > 1 else min(part, limit)


def _part() -> int:
    return max(1, folder.processors() // local_ranks())


def workers_of(s: RunConfig) -> int:
    """Processes that decode image files."""
    return _part() if s.workers == "auto" else int(s.workers)


def threads_for(flops: int, processors: int) -> int:
    """Threads for a step of so many FLOPs on the cpu target.

    A thread must have enough to do: torch waits for all of them several times a layer, and on a
    busy machine each wait may last a slice of the scheduler. LeNet-5 at batch 32 (73 MFLOP) takes 3
    to 7 ms on one thread, and 33 to 140 ms on two threads of two busy cores.
    """
    return max(1, min(processors, int(flops / _FLOPS_OF_A_THREAD)))


def step_flops(step: Program) -> int:
    """Floating-point operations of a step."""
    return sum(eqn_cost(e).flops for e in step.stages.fused.eqns)


def check_outputs(net: Module, s: RunConfig, data: Any, *, old: bool) -> None:
    """DataError, at the last layer, where the net's outputs are not the classes of the data; of an
    `old` run a warning."""
    graph = trace(net, input_shape(net, 1))
    logits = graph.returns[0]
    made, v = graph.producers, logits
    while v in made and made[v].op not in ("linear", "conv2d"):
        v = made[v].inputs[0]
    place = made[v].where.located if v in made else {}
    named = not runs_code(s.model)
    fix = lambda n: f"--classes {n}" if named else f"make it {n} in the last layer of {s.model}"
    with net.locating():
        check_classes(data, logits.type.shape[-1], old=old, fix=fix, **place)


def freeze(net: Module, names: Sequence[str]) -> None:
    """Parameters of the named layers are not trained; by display name, attribute path, pattern."""
    shown = net.layer_names()
    layers = {
        m: (shown.get(m, path), path)
        for path, m in net.named_modules()
        if path and any(True for _ in m.named_parameters())
    }
    for name in names:
        hit = [m for m, about in layers.items() if any(fnmatchcase(a, name) for a in about)]
        if not hit:
            known = ", ".join(about[0] for about in layers.values())
            raise ConfigError(f"no layer {name!r} to freeze", help=f"one of {known}")
        for module in hit:
            for _, p in module.named_parameters():
                p.trainable = False
