"""The settings of a run: one list, from which config.toml, `--config` files and the options of
`graphnet train` are all made; and what each setting builds."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
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
from graphnet.train.folder import MAX_BAD

OPTIMIZERS = ("sgd", "adam", "adamw")
LOSSES = ("cross_entropy", "hinge", "multi_margin")


def _setting(default: Any, help: str, **limits: Any) -> Any:
    """A setting with what `--help` says of it, and `min` and `max` where it has limits."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class RunConfig:
    """The settings of a run, as config.toml holds them."""

    model: str = _setting("", "a model's name, or FILE.py:ATTRIBUTE")
    data: str = _setting("", "mnist:DIR, cifar10:PATH, digits, synthetic or imagefolder:DIR")
    epochs: int = _setting(3, "passes over the training data", min=1)
    batch: int = _setting(128, "images in a batch", min=1)
    target: str = _setting("auto", "auto, cuda, cpu or interpret")
    precision: str = _setting("fp32", "fp32, tf32 or bf16")
    optimizer: str = _setting("sgd", ", ".join(OPTIMIZERS))
    lr: float = _setting(0.01, "peak learning rate")
    momentum: float = _setting(0.9, "of SGD")
    form: str = _setting("torch", "of momentum: torch (v = m v + g) or classic (v = m v - lr g)")
    nesterov: bool = _setting(False, "Nesterov's momentum")
    weight_decay: float = _setting(5e-4, "L2 penalty; of adamw decoupled")
    l1: float = _setting(0.0, "L1 penalty; with weight decay an elastic net")
    bias_lr: float = _setting(1.0, "times the learning rate for biases", min=0.0)
    bias_decay: float = _setting(1.0, "times the penalties for biases", min=0.0)
    schedule: str = _setting("cosine", ", ".join(schedule.NAMES))
    warmup: float = _setting(0.0, "epochs of linear warm-up in front of the schedule", min=0.0)
    loss: str = _setting("cross_entropy", ", ".join(LOSSES))
    label_smoothing: float = _setting(0.0, "of cross_entropy", min=0.0, max=1.0)
    accumulate: int = _setting(1, "batches whose gradients make one update", min=1)
    clip_norm: float = _setting(0.0, "largest global norm of the gradients, 0 for any", min=0.0)
    nonfinite: str = _setting("stop", "stop or skip a step that is not finite")
    init: str = _setting("", f"initial values: {', '.join(init.NAMES)}; the model's own by default")
    freeze: str = _setting("", "layers that are not trained: conv1,conv2 or patterns (conv*)")
    seed: int = _setting(0, "of initial values, order, dropout and augmentation")
    workers: int = _setting(2, "processes that decode image files", min=0)
    resize: int = _setting(
        0, "keep image files in this size and train on random crops (0: the net's size)", min=0
    )
    max_bad: float = _setting(MAX_BAD, "share of image files that may be bad", min=0.0, max=1.0)
    overfit_batches: int = _setting(0, "train on that many batches alone, to see it fit", min=0)

    def __post_init__(self) -> None:
        """ConfigError for what no later check would name as the option it is."""
        for f in settings():
            value = getattr(self, f.name)
            low, high = f.metadata.get("min"), f.metadata.get("max")
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{f.name}={value!r} is not a finite number")
            if low is not None and value < low or high is not None and value > high:
                limits = f"at least {low}" if high is None else f"from {low} to {high}"
                raise ConfigError(f"{f.name}={value!r} is not {limits}")
        for name, known in (
            ("optimizer", OPTIMIZERS), ("loss", LOSSES), ("schedule", schedule.NAMES),
            ("init", ("", *init.NAMES)), ("nonfinite", ("stop", "skip")),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                valid = ", ".join(filter(None, known))
                raise ConfigError(f"unknown {name} {getattr(self, name)!r}", help=f"one of {valid}")


def settings() -> tuple[Field[Any], ...]:
    return fields(RunConfig)


def kind(f: Field[Any]) -> type:
    """The type of a setting's value."""
    return {"str": str, "int": int, "float": float, "bool": bool}[str(f.type)]


def read_config_file(path: Path) -> dict[str, Any]:
    """Settings from a TOML file; ConfigError for a key that is none and a value of a wrong type."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from None
    known = {f.name: f for f in settings()}
    out = {}
    for key, value in data.items():
        if key == "graphnet":  # the version that a run's own config.toml holds
            continue
        if key not in known:
            raise ConfigError(f"{path}: unknown setting {key!r}", help=f"one of {', '.join(known)}")
        want = kind(known[key])
        if want is float and type(value) is int:
            value = float(value)
        if type(value) is not want:
            raise ConfigError(f"{path}: {key} = {value!r} is no {want.__name__}")
        out[key] = value
    return out


def read_settings(run: Path) -> RunConfig:
    """The settings in a run's config.toml; what an older version did not know has its default."""
    known = {f.name for f in settings()}
    data = {k: v for k, v in rundir.read_config(run).items() if k in known}
    if "model" not in data or "data" not in data:
        raise ConfigError(f"{run / rundir.CONFIG} is not of a run: it names no model or no data")
    return RunConfig(**data)


# ---- what they build -------------------------------------------------------------------------


def make_optimizer(s: RunConfig) -> Any:
    """The optimizer of the settings."""
    if s.optimizer == "sgd":
        return SGD(
            lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay, nesterov=s.nesterov,
            form=s.form, l1=s.l1,
        )  # fmt: skip
    kind = Adam if s.optimizer == "adam" else AdamW
    return kind(lr=s.lr, weight_decay=s.weight_decay, l1=s.l1)


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
    rate = schedule.by_name(s.schedule, s.lr, total - steps)
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
