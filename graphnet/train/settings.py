"""The settings of a run: one list, from which config.toml, `--config` files and the options of
`graphnet train` are all made. Imports nothing heavy: `graphnet --help` reads it."""

from __future__ import annotations

import tomllib
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from graphnet.errors import LARGEST, ConfigError
from graphnet.train.schedule import NAMES as SCHEDULES

DATA = "mnist:DIR, cifar10:PATH, digits, synthetic or imagefolder:DIR"
OPTIMIZERS = ("sgd", "adam", "adamw")
LOSSES = ("cross_entropy", "hinge", "multi_margin")
INITS = ("torch", "gaussian", "he", "xavier")  # as gn.init.by_name takes them


def _setting(default: Any, help: str, **limits: Any) -> Any:
    """A setting with what `--help` says of it, and `min` and `max` where it has limits."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class RunConfig:
    """The settings of a run, as config.toml holds them."""

    model: str = _setting("", "a model's name, FILE.py:ATTRIBUTE or FILE.onnx")
    data: str = _setting("", DATA)
    classes: int = _setting(0, "outputs of a named model; 0 for its own number", min=0)
    epochs: int = _setting(3, "passes over the training data", min=1)
    batch: int = _setting(128, "images in a batch", min=1)
    target: str = _setting("auto", "auto, cuda, cpu or interpret")
    precision: str = _setting("auto", "fp32 (IEEE), tf32 or bf16; auto: tf32 on a GPU, else fp32")
    optimizer: str = _setting("sgd", ", ".join(OPTIMIZERS))
    lr: float = _setting(0.01, "peak learning rate")
    momentum: float = _setting(0.9, "of SGD")
    form: str = _setting("torch", "of momentum: torch (v = m v + g) or classic (v = m v - lr g)")
    nesterov: bool = _setting(False, "Nesterov's momentum")
    amsgrad: bool = _setting(False, "of Adam and AdamW: the largest average of squares so far")
    weight_decay: float = _setting(5e-4, "L2 penalty; of adamw decoupled")
    l1: float = _setting(0.0, "L1 penalty; with weight decay an elastic net")
    bias_lr: float = _setting(1.0, "times the learning rate for biases", min=0.0)
    bias_decay: float = _setting(1.0, "times the penalties for biases", min=0.0)
    schedule: str = _setting("cosine", ", ".join(SCHEDULES))
    warmup: float = _setting(0.0, "epochs of linear warm-up in front of the schedule", min=0.0)
    loss: str = _setting("cross_entropy", ", ".join(LOSSES))
    label_smoothing: float = _setting(0.0, "of cross_entropy", min=0.0, max=1.0)
    accumulate: int = _setting(1, "batches whose gradients make one update", min=1)
    clip_norm: float = _setting(0.0, "largest global norm of the gradients, 0 for any", min=0.0)
    nonfinite: str = _setting("stop", "stop or skip a step that is not finite")
    sync_bn: bool = _setting(
        False, "under torchrun, batch normalization by the rows of all processes, not of each"
    )
    towers: bool = _setting(
        False, "under torchrun with two processes, each holds half of the channels (alexnet_2012)"
    )
    init: str = _setting("", f"initial values: {', '.join(INITS)}; the model's own by default")
    freeze: str = _setting("", "layers that are not trained: conv1,conv2 or patterns (conv*)")
    augment: str = _setting(
        "", "what is drawn for each image: digits, cifar, photos, or rotate=10,scale=0.9:1.1,..."
    )
    seed: int = _setting(0, "of initial values, order, dropout and augmentation")
    threads: int = _setting(
        0, "of target cpu; 0: by the work of a step, and the run keeps the number", min=0
    )
    workers: str = _setting(
        "auto", "processes that decode image files; auto: one for each processor, 0: this one"
    )
    resize: int = _setting(
        0, "keep image files in this size and train on random crops (0: the net's size)", min=0
    )
    max_bad: float = _setting(0.001, "share of image files that may be bad", min=0.0, max=1.0)
    uncached: bool = _setting(False, "decode image files in every epoch and keep none on disk")
    overfit_batches: int = _setting(0, "train on that many batches alone, to see it fit", min=0)

    def __post_init__(self) -> None:
        """ConfigError for what no later check would name as the option it is."""
        object.__setattr__(self, "workers", str(self.workers))
        if self.workers != "auto" and not self.workers.isdecimal():
            raise ConfigError(f"workers={self.workers!r}", help="auto, or a number of processes")
        for f in settings():
            value = getattr(self, f.name)
            low, high = f.metadata.get("min"), f.metadata.get("max")
            if isinstance(value, float) and not abs(value) <= LARGEST:
                raise ConfigError(f"{f.name}={value!r} is not a finite number in fp32")
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ConfigError(f"{f.name}={value!r} has more than 64 bits")
            if low is not None and value < low or high is not None and value > high:
                limits = f"at least {low}" if high is None else f"from {low} to {high}"
                raise ConfigError(f"{f.name}={value!r} is not {limits}")
        for name, known in (
            ("optimizer", OPTIMIZERS), ("loss", LOSSES), ("schedule", SCHEDULES),
            ("init", ("", *INITS)), ("nonfinite", ("stop", "skip")),
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
        out[key] = typed(path, known[key], value)
    return out


def typed(path: Path, f: Field[Any], value: Any) -> Any:
    """The value of a setting as a file holds it; ConfigError where it is of another type."""
    want = kind(f)
    if f.name == "workers" and type(value) is int:  # as older versions wrote it
        value = str(value)
    if want is float and type(value) is int:
        value = float(value)
    if type(value) is not want:
        raise ConfigError(f"{path}: {f.name} = {value!r:.80} is no {want.__name__}")
    return value
