"""What the settings of a run build: net, loss, optimizer, schedule."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from graphnet.errors import ConfigError
from graphnet.frontends import init
from graphnet.frontends.dsl import Module
from graphnet.ops.adam import Adam, AdamW
from graphnet.ops.loss import CrossEntropyLoss, MulticlassHingeLoss, MultiMarginLoss
from graphnet.ops.update import SGD
from graphnet.train import rundir, schedule
from graphnet.train.settings import RunConfig, settings


def read_settings(run: Path) -> RunConfig:
    """The settings in a run's config.toml; what an older version did not know has its default."""
    known = {f.name for f in settings()}
    data = {k: v for k, v in rundir.read_config(run).items() if k in known}
    if "model" not in data or "data" not in data:
        raise ConfigError(f"{run / rundir.CONFIG} is not of a run: it names no model or no data")
    return RunConfig(**data)


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
