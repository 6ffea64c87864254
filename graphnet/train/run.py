"""A whole run from settings: the run folder, training, what is left behind, and evaluation."""

from __future__ import annotations

import time
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from graphnet import __version__
from graphnet.api import compile
from graphnet.errors import CheckpointError, ConfigError
from graphnet.frontends.loading import input_shape, load_model
from graphnet.ops.loss import CrossEntropyLoss
from graphnet.ops.update import SGD
from graphnet.runtime.program import Evaluate
from graphnet.train import checkpoint, plots, rundir, schedule
from graphnet.train.callbacks import Checkpoints, Metrics, Progress, Quarantine, restore
from graphnet.train.data import Batches, Dataset, check_classes, load
from graphnet.train.folder import MAX_BAD, Folder, Reading
from graphnet.train.metrics import RunningMean, confusion_matrix, topk_wrong
from graphnet.train.signals import StopSignals
from graphnet.train.trainer import Trainer


@dataclass(frozen=True)
class RunConfig:
    """The settings of a run, as config.toml holds them."""

    model: str
    data: str
    epochs: int = 3
    batch: int = 128
    target: str = "auto"
    precision: str = "fp32"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    schedule: str = "cosine"
    seed: int = 0
    workers: int = 2
    resize: int = 0
    max_bad: float = MAX_BAD


def run_training(
    settings: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    given: Set[str] | None = None,
) -> dict[str, Any]:
    """Trains into the run folder `out` and returns what came of it, as JSON.

    resume  go on with the run in `out`, with its own settings; a finished run stays as it is
    given   settings that the caller insists on (all by default): ConfigError where a resumed
            run has others
    The result's "signal" is the number of the signal that stopped the run, or 0.
    """
    with StopSignals() as signals:
        found = None
        if resume:
            settings = _settings_of(out, settings, given)
            found = checkpoint.load_latest(out)
        torch.manual_seed(settings.seed)  # of the initial parameters
        net = load_model(settings.model)
        shape = input_shape(net, settings.batch)
        if found is not None and _finished(found.state, settings):
            return _result(settings, out, found.state["history"], found.step, 0)
        train, test = (_load(settings, split, shape) for split in ("train", "test"))
        reading = _reading(settings)
        batches = Batches(
            train, settings.batch, seed=settings.seed, reading=reading, cut="random"
        )  # fmt: skip
        tests = Batches(test, settings.batch, shuffle=False, reading=reading)
        rate = schedule.by_name(settings.schedule, settings.lr, settings.epochs * len(batches))
        sgd = SGD(
            lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
        )  # fmt: skip
        trainer = Trainer(
            net, CrossEntropyLoss(), sgd, rate, target=settings.target,
            precision=settings.precision, seed=settings.seed,
        )  # fmt: skip
        signals.watch(trainer)
        check_classes(train, trainer.compile(shape).classes)
        if found is not None:
            restore(trainer, found)
        elif not resume:
            # Only now: whatever was wrong with the settings has left no folder behind.
            rundir.create(out, asdict(settings) | {"graphnet": __version__})
        trainer.callbacks += [Metrics(out), Checkpoints(out), Quarantine(out, (train, test))]
        if not quiet:
            trainer.callbacks.append(Progress(settings.epochs, len(batches), len(train)))
        trainer.fit(batches, tests, settings.epochs, settings.batch)
        stopped = 0 if trainer.epoch >= settings.epochs else signals.received
        _pictures(out, settings, trainer)
        return _result(settings, out, trainer.history, trainer.step, stopped)


def _load(settings: RunConfig, split: str, shape: Sequence[int]) -> Dataset | Folder:
    resize = settings.resize or None
    return load(settings.data, split, shape=shape[1:], resize=resize, max_bad=settings.max_bad)


def _reading(settings: RunConfig) -> Reading:
    pin = settings.target in ("auto", "cuda") and torch.cuda.is_available()
    return Reading(settings.workers, pin=pin)


def _settings_of(out: Path, wanted: RunConfig, given: Set[str] | None) -> RunConfig:
    """The settings of an existing run; ConfigError where the caller insists on others."""
    have = read_settings(out)
    names = {f.name for f in fields(RunConfig)}
    insisted = names if given is None else names & given
    differ = [
        f"{n} = {getattr(have, n)!r}, not {getattr(wanted, n)!r}"
        for n in sorted(insisted)
        if getattr(have, n) != getattr(wanted, n)
    ]
    if differ:
        raise ConfigError(
            f"{out} was started with {', '.join(differ)}",
            help="leave these options out, or start another run with another --out",
        )
    return have


def read_settings(run: Path) -> RunConfig:
    """The settings in a run's config.toml."""
    data = rundir.read_config(run)
    known = {f.name for f in fields(RunConfig)}
    try:
        return RunConfig(**{k: v for k, v in data.items() if k in known})
    except TypeError as error:
        raise ConfigError(f"{run / rundir.CONFIG} is not of a run: {error}") from None


def _finished(state: dict[str, Any], settings: RunConfig) -> bool:
    return state["epoch"] >= settings.epochs


def _pictures(out: Path, settings: RunConfig, trainer: Trainer) -> None:
    if trainer.history:
        plots.curves(out / "curves.png", trainer.history, f"{settings.model} on {settings.data}")
    convolutions = [t for t in trainer.net.state_dict().values() if t.ndim == 4]
    if convolutions:
        plots.filters(out / "filters.png", convolutions[0])


def _result(
    settings: RunConfig, out: Path, history: list[dict[str, Any]], step: int, signal: int
) -> dict[str, Any]:
    last = history[-1] if history else {}
    error = round(100 * (1 - last["val_accuracy"]), 6) if "val_accuracy" in last else None
    return {
        "run": str(out), "model": settings.model, "data": settings.data,
        "epochs": len(history), "steps": step, "signal": signal,
        "train_loss": last.get("train_loss"), "test_loss": last.get("val_loss"),
        "top1_error": error, "seconds": sum(m["seconds"] for m in history), "history": history,
    }  # fmt: skip


# ---- evaluation ------------------------------------------------------------------------------


def _find(path: Path, model: str | None) -> tuple[dict[str, torch.Tensor], RunConfig | None, Path]:
    """(tensors, settings of the run it lies in, file) of a run folder or a checkpoint."""
    if path.is_dir():
        settings = read_settings(path)
        found = checkpoint.load_latest(path)
        if found is None:
            raise CheckpointError(f"{path} has no checkpoint yet", help="train it first")
        return found.tensors, settings, found.path
    run = path.parent.parent
    if path.parent.name == checkpoint.FOLDER and (run / rundir.CONFIG).is_file():
        found = checkpoint.load(path)
        return found.tensors, read_settings(run), found.path
    if model is None:
        raise ConfigError(f"{path} lies in no run, so its model is not known", help="give --model")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path), None, path
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None


def evaluate_run(
    path: Path,
    data: str | None = None,
    *,
    model: str | None = None,
    batch: int = 256,
    target: str = "auto",
) -> dict[str, Any]:
    """Test loss, top-1 and top-5 error in percent and confusion matrix (row = label), as JSON.

    path   a run folder (its last checkpoint) or a checkpoint
    data   default: the run's own; model is only needed for a file that lies in no run
    """
    tensors, settings, file = _find(Path(path), model)
    name = model or (settings.model if settings else "")
    spec = data or (settings.data if settings else None)
    if spec is None:
        raise ConfigError(f"{path} lies in no run, so its data are not known", help="give --data")
    net = load_model(name)
    shape = input_shape(net, batch)
    own = set(net.state_dict())
    net.load_state_dict({k: t for k, t in tensors.items() if k in own or not _trainers(k)})
    settings = replace(settings or RunConfig(name, spec), data=spec, target=target)
    test = _load(settings, "test", shape)
    ev = compile(net, shape, target=target, loss=CrossEntropyLoss())
    assert isinstance(ev, Evaluate)
    check_classes(test, ev.classes)
    mean, top1, top5 = RunningMean(), 0, 0
    classes = ev.classes
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    start, images = time.perf_counter(), 0
    for x, y in Batches(test, batch, shuffle=False, reading=_reading(settings)):
        images += len(x)
        loss, logits = ev(x, y)
        mean.add(loss, len(x))
        top1 += int(topk_wrong(logits, y))
        top5 += int(topk_wrong(logits, y, min(5, classes)))
        confusion += confusion_matrix(logits.argmax(1), y, classes)
    return {
        "model": name, "data": spec, "checkpoint": str(file), "images": images,
        "loss": mean.value(), "top1_error": 100 * top1 / images,
        "top5_error": 100 * top5 / images, "confusion": confusion.tolist(),
        "classes": list(test.classes), "seconds": time.perf_counter() - start,
    }  # fmt: skip


def _trainers(key: str) -> bool:
    """Whether a tensor of a checkpoint is the trainer's, not the net's."""
    return key.startswith("optimizer.") or key in ("epoch", "step")
