"""A whole run from settings: the run folder, training, and what is left behind."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from signal import Signals
from typing import Any

import torch

from graphnet import __version__
from graphnet.api import _resolve
from graphnet.errors import ConfigError
from graphnet.frontends.arguments import check_share
from graphnet.frontends.loading import input_shape, load_model, runs_code
from graphnet.passes.precision import resolve, told
from graphnet.runtime.group import Group, digest
from graphnet.train import augment, checkpoint, plots, rundir
from graphnet.train.building import (
    check_outputs,
    make_loss,
    make_optimizer,
    make_schedule,
    prepare,
    processors,
    read_settings,
    step_flops,
    threads_for,
    workers_of,
)
from graphnet.train.callbacks import (
    Checkpoints,
    Metrics,
    Progress,
    Quarantine,
    Together,
    restore,
    say,
)
from graphnet.train.data import Batches, Dataset, load
from graphnet.train.evaluation import Tally, keep_about
from graphnet.train.feeding import divided
from graphnet.train.folder import Folder, Reading, centre, reading_of
from graphnet.train.settings import RunConfig
from graphnet.train.signals import StopSignals
from graphnet.train.trainer import Trainer

_LAST = "misclassified.png"  # what a finished run writes last
_FREE = frozenset({"workers", "uncached"})  # settings that no result depends on


def default_folder(model: str) -> Path:
    """runs/<model>-<time>, where a run goes that was given no place."""
    path, _, attribute = model.rpartition(":")
    name = re.sub(r"[^\w.-]+", "-", f"{Path(path).stem}-{attribute}" if path else attribute)
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def run_training(
    settings: RunConfig,
    out: Path | None = None,
    *,
    resume: bool = False,
    quiet: bool = False,
    given: Set[str] | None = None,
    group: Group | None = None,
) -> dict[str, Any]:
    """Trains into the run folder `out` and returns what came of it, as JSON.

    out     runs/<model>-<time> by default, which is then said
    resume  go on with the run in `out`, with its own settings; a finished run stays as it is
    given   settings that the caller insists on (all by default): ConfigError where a resumed
            run has others. A FILE.py that a run names is run only where the caller insists on it
    group   the processes that train together: rank 0 reads and writes the run folder and speaks
    The result's "signal" is the number of the signal that stopped the run, or 0. A precision of
    "auto" is resolved where a run starts, and the run keeps what it became.
    """
    first = group is None or group.first
    named, quiet = out is not None, quiet or not first
    with StopSignals(quiet=not first) as signals, contextlib.ExitStack() as held:

        tensors: dict[str, torch.Tensor] = {}

        def find() -> tuple[RunConfig, Path, checkpoint.Checkpoint | None, bool]:
            """Settings, folder and checkpoint of the run, and whether it was finished."""
            place = out or default_folder(settings.model)
            if not resume:
                rundir.check_free(place)  # before anything is read for it
                return settings, place, None, False
            had = _settings_of(place, settings, given)
            held.enter_context(rundir.locked(place))
            found = checkpoint.load_latest(place)
            done = found is not None and _finished(found.state, had) and (place / _LAST).exists()
            if found is not None:  # the tensors follow when there is a place for them
                tensors.update(found.tensors)
                found = replace(found, tensors={})
            return had, place, found, done

        if group is not None:
            group.agree(_facts(settings, resume, given))
        settings, out, found, done = _told(group, find)
        asked, settings = settings, _resolved(settings)
        if done:
            assert found is not None
            if not quiet:
                say(f"{out} was finished before: nothing is left to do")
            return _result(settings, out, found.state["history"], found.step, 0)
        if resume and given is not None and "model" not in given and runs_code(settings.model):
            quoted, place = shlex.quote(settings.model), shlex.quote(str(out))
            raise ConfigError(
                f"{out} names the model {settings.model}, a file that would be run",
                help=f"if you trust it: graphnet train {quoted} --resume --out {place}",
            )
        parts = _build(settings, out if resume else None, group)
        trainer, batches, tests = parts.trainer, parts.batches, parts.tests
        signals.watch(trainer)
        with signals.at_once():
            step = trainer.compile(parts.shape)
        settings = replace(settings, threads=_threads(settings, step, found, group))
        if settings.threads and step.target == "cpu":
            held.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(settings.threads)
        if found is not None:
            tensors = tensors if group is None else group.tell_tensors(tensors)
            restore(trainer, replace(found, tensors=tensors))
        elif not resume and first:
            # Only now: whatever was wrong with the settings has left no folder behind.
            rundir.create(out, asdict(settings) | {"graphnet": __version__})
            held.enter_context(rundir.locked(out))
            if not named:
                say(f"the run folder is {out}")
        if group is not None:
            trainer.callbacks.append(Together(group, parts.loaded))
        if first:
            keep_about(out, parts.loaded[0])  # also of a run that was killed before it had one
            if trainer.augment is not None and not (out / augment.FILE).exists():
                augment.save(out, trainer.augment)
            trainer.callbacks += [Metrics(out), Quarantine(out, parts.loaded)]
        trainer.callbacks.append(Checkpoints(out))
        if first and trainer.augment is not None:
            if remark := augment.idle(trainer.augment, parts.train):
                print(remark, file=sys.stderr, flush=True)
        if first and settings.batch > len(parts.train):
            say(
                f"a batch of {settings.batch:,} is more than the {len(parts.train):,} training "
                "images: each epoch is one step"
            )
        if not quiet:
            about = told(asked.precision, step.target)
            many = "" if group is None else f"{group.ranks} processes, "
            say(f"{many}precision {about}{', as the run was started' if resume else ''}")
            trainer.callbacks.append(Progress(settings.epochs, len(batches), len(parts.train)))
        trainer.fit(batches, tests, settings.epochs, settings.batch)
        stopped = 0 if trainer.epoch >= settings.epochs else signals.received
        if group is not None:
            asked_by = group.collect(stopped)
            stopped = max(asked_by)
            if stopped and not signals.received and not quiet:
                say(f"rank {asked_by.index(stopped)} was sent {Signals(stopped).name}")
        _pictures(out, settings, parts)
        return _result(settings, out, trainer.history, trainer.step, stopped)


def _resolved(settings: RunConfig) -> RunConfig:
    """The settings with the precision that they stand for on their target."""
    return replace(settings, precision=resolve(settings.precision, _resolve(settings.target)))


@dataclass
class _Parts:
    """What a run trains and on what; `loaded` is both splits, whole."""

    trainer: Trainer
    loaded: tuple[Any, Any]
    train: Any
    test: Any
    batches: Any
    tests: Any
    shape: tuple[int, ...]


def _told(group: Group | None, call: Callable[[], Any]) -> Any:
    """What rank 0 finds; the others need not see its files."""
    if group is None:
        return call()
    return group.tell(call() if group.first else None)


def _facts(settings: RunConfig, resume: bool, given: Set[str] | None) -> dict[str, Any]:
    """What all ranks must have been started with."""
    asked = {f"--{k.replace('_', '-')}": v for k, v in asdict(settings).items() if k not in _FREE}
    return asked | {"--resume": resume, "what is given": sorted(given or ())}


def _threads(
    settings: RunConfig, step: Any, found: checkpoint.Checkpoint | None, group: Group | None
) -> int:
    """Threads of this process: a run goes on with those that it had, of as many processes."""
    kept = settings.threads
    if found is not None:
        ranks = 1 if group is None else group.ranks
        same = found.state.get("ranks", 1) == ranks
        kept = found.state.get("threads", kept) if same else 0
    return kept or threads_for(step_flops(step), processors())


def _build(settings: RunConfig, run: Path | None = None, group: Group | None = None) -> _Parts:
    """Net, data and trainer of the settings, or of an existing run. Writes nothing."""

    def stored() -> Any:
        there = run is not None and (run / augment.FILE).exists()
        return augment.stored(run) if run is not None and there else None

    drawn = augment.parse(settings.augment) if settings.augment else None
    kept = drawn is not None and (before := _told(group, stored)) is not None
    drawn = before if kept else drawn
    own = drawn is not None and (bool(drawn.seen) if kept else _resizes(settings))
    torch.manual_seed(settings.seed)  # of the initial parameters
    net = prepare(load_model(settings.model, settings.classes, settings.towers), settings)
    shape = input_shape(net, settings.batch)
    train, test = loaded = (
        _load(settings, "train", shape, own), _load(settings, "test", shape)
    )  # fmt: skip
    check_outputs(net, settings, train, old=run is not None)
    reading = _reading(settings)
    batches = Batches(train, settings.batch, seed=settings.seed, reading=reading, cut="random")
    if settings.overfit_batches:
        train = test = _first(batches, settings.overfit_batches)
        batches = Batches(train, settings.batch, seed=settings.seed)
    tests = Batches(test, settings.batch, shuffle=False, reading=reading)
    if drawn is not None:
        batches.raw = True
        asked = drawn
        drawn = _told(group, lambda: augment.known(asked, train))
    if group is not None:
        check_share(min(settings.batch, len(train)), settings.batch, group.ranks)
        group.agree(_of_data(train, "training") | _of_data(test, "test"), help=_DATA)
    # What two towers have begun, one process goes on with: the net is the same.
    towers = settings.towers and (group is not None or run is None)
    trainer = Trainer(
        net, make_loss(settings), make_optimizer(settings), make_schedule(settings, len(batches)),
        target=settings.target, precision=settings.precision, seed=settings.seed,
        accumulate=settings.accumulate, clip_norm=settings.clip_norm or None,
        nonfinite=settings.nonfinite, augment=drawn, group=group,
        sync_bn=settings.sync_bn, towers=towers,
    )  # fmt: skip
    return _Parts(trainer, loaded, train, test, batches, tests, shape)


_DATA = "every process reads the same data, also on another machine"


def _of_data(data: Any, name: str) -> dict[str, Any]:
    """What tells data of one rank from those of another."""
    about = {"number": len(data), "classes": list(data.classes), "labels": digest(data.labels)[:12]}
    about |= {"mean": list(data.mean), "standard deviation": list(data.std)}
    return {f"the {what} of the {name} data": v for what, v in about.items()}


def _first(batches: Batches, count: int) -> Dataset:
    """The first batches as a data set of their own: of images stored larger, the middle."""
    batches.raw, whole = True, batches.dataset
    parts = list(itertools.islice(batches, count))
    x, y = (torch.cat(t) for t in zip(*parts, strict=True))
    name = f"{count} batches of {whole.name}"
    return Dataset(centre(x, whole.shape[1:]), y, whole.classes, name, whole.mean, whole.std)


def dry_run(settings: RunConfig, group: Group | None = None) -> dict[str, Any]:
    """Two steps and an evaluation of one batch on the real data, and what a run would take.

    Leaves nothing behind.
    """
    if group is not None:
        group.agree(_facts(settings, False, None))
    settings = _resolved(settings)
    parts = _build(replace(settings, uncached=True), group=group)
    step = parts.trainer.compile(parts.shape)
    if (sharing := parts.trainer.sharing) is not None:
        divided(parts.batches, sharing)
        divided(parts.tests, sharing)
    x, y = next(iter(parts.batches))
    first = float(step(x, y))
    start = time.perf_counter()
    again = float(step(x, y))
    seconds = time.perf_counter() - start
    assert parts.trainer.evaluation is not None
    x, y = next(iter(parts.tests))
    held = float(parts.trainer.evaluation(x, y)[0]) if len(x) else 0.0
    if group is not None:
        held, images = group.total([held * len(x), len(x)])
        held /= images
    return {
        "model": settings.model, "data": settings.data, "target": step.target,
        "precision": step.precision,
        "batches": len(parts.batches), "images": len(parts.train), "loss": first,
        "next_loss": again, "test_loss": held, "step_s": seconds,
        "epoch_s": seconds * len(parts.batches), "launches": len(step.plan.launches),
        "peak_bytes": step.plan.peak_bytes,
    }  # fmt: skip


def _resizes(settings: RunConfig) -> bool:
    """Whether small images travel as they are: a GPU resizes them beside all else that it draws."""
    return _resolve(settings.target) == "cuda" and not settings.overfit_batches


def _load(
    settings: RunConfig, split: str, shape: Sequence[int], own: bool = False
) -> Dataset | Folder:
    resize = settings.resize or None
    return load(
        settings.data, split, shape=shape[1:], resize=resize, max_bad=settings.max_bad,
        cache=not settings.uncached, own=own,
    )  # fmt: skip


def _reading(settings: RunConfig) -> Reading:
    pin = settings.target in ("auto", "cuda") and torch.cuda.is_available()
    return reading_of(workers_of(settings), pin)


def _settings_of(out: Path, wanted: RunConfig, given: Set[str] | None) -> RunConfig:
    """The settings of an existing run; ConfigError where the caller insists on others, but for
    those that change nothing of what is computed."""
    have = read_settings(out)
    names = {f.name for f in fields(RunConfig)}
    insisted = names if given is None else names & given
    insisted = insisted if wanted.threads else insisted - {"threads"}  # 0 leaves them to the run
    if wanted.precision == "auto":  # the run has resolved it
        insisted = insisted - {"precision"}
    differ = [
        f"{n} = {getattr(have, n)!r}, not {getattr(wanted, n)!r}"
        for n in sorted(insisted - _FREE)
        if getattr(have, n) != getattr(wanted, n)
    ]
    if differ:
        raise ConfigError(
            f"{out} was started with {', '.join(differ)}",
            help="leave these options out, or start another run with another --out; where files "
            f"have moved, change {out / rundir.CONFIG}",
        )
    return replace(have, **{n: getattr(wanted, n) for n in _FREE & insisted})


def _finished(state: dict[str, Any], settings: RunConfig) -> bool:
    return state["epoch"] >= settings.epochs


def _pictures(out: Path, settings: RunConfig, parts: _Parts) -> None:
    """Curves and filters; of a finished run also what it got wrong, and as what."""
    trainer, group = parts.trainer, parts.trainer.group
    first = group is None or group.first
    if trainer.history and first:
        plots.curves(out / "curves.png", trainer.history, f"{settings.model} on {settings.data}")
    convolutions = [t for t in trainer.net.state_dict().values() if t.ndim == 4]
    if convolutions and first:
        plots.filters(out / "filters.png", convolutions[0])
    if trainer.epoch < settings.epochs or trainer.evaluation is None:
        return
    tally = Tally(trainer.evaluation.classes)
    for x, y in parts.tests:
        if len(x):  # of several ranks, one may have none
            _, logits = trainer.evaluation(x, y)
            tally.add(torch.softmax(logits.float(), 1), y, x)
    if trainer.sharing is not None:
        tally = Tally.of_all(trainer.sharing.collect(tally))
    if not first:
        return
    found = rundir.finite(tally.as_dict())
    checkpoint.atomic_write(out / "test.json", json.dumps(found).encode())
    names = [*parts.test.classes, *map(str, range(len(parts.test.classes), tally.classes))]
    plots.confusion(out / "confusion.png", tally.confusion, names)
    plots.misclassified(out / _LAST, tally.shown, names)


def _result(
    settings: RunConfig, out: Path, history: list[dict[str, Any]], step: int, signal: int
) -> dict[str, Any]:
    last = history[-1] if history else {}
    error = round(100 * (1 - last["val_accuracy"]), 6) if "val_accuracy" in last else None
    return {
        "run": str(out), "model": settings.model, "data": settings.data,
        "precision": settings.precision,
        "epochs": len(history), "steps": step, "signal": signal,
        "train_loss": last.get("train_loss"), "test_loss": last.get("val_loss"),
        "files": sorted(p.name for p in out.iterdir()) if out.is_dir() else [],
        "top1_error": error, "seconds": sum(m["seconds"] for m in history), "history": history,
    }  # fmt: skip
