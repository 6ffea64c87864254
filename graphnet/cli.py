"""The command line: train, eval, summary, inspect, compile, doctor.

Exit codes: 0 done, 1 the work failed, 2 bad usage or bad input. One clear line on stderr; a
traceback only at GRAPHNET_DEBUG >= 1.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from graphnet import config
from graphnet.errors import (
    BackendUnavailableError,
    CompileError,
    ConfigError,
    GraphnetError,
    NumericsError,
    OutOfMemoryPlanError,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compile CNNs from a Python DSL into fused Triton training steps.",
)

Model = Annotated[str, typer.Argument(help="a model's name, or FILE.py:ATTRIBUTE")]
Batch = Annotated[int, typer.Option(min=1, help="images in a batch")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
Precision = Annotated[str, typer.Option(help="fp32, tf32 or bf16")]
Target = Annotated[str, typer.Option(help="auto, cuda, cpu or interpret")]
Train = Annotated[bool, typer.Option("--train", help="the training step instead of inference")]

# The work failed, as against: the input was bad.
_FAILED = (BackendUnavailableError, CompileError, NumericsError, OutOfMemoryPlanError)


def load_model(spec: str) -> Any:
    """The net of a model's name, or of `FILE.py:ATTRIBUTE` (a net, or a function that makes it)."""
    from graphnet.frontends import models

    if ".py:" not in spec:
        return models.get(spec)
    import importlib.util

    path, _, attribute = spec.rpartition(":")
    if not Path(path).is_file():
        raise ConfigError(f"model file {path} does not exist")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, attribute):
        raise ConfigError(f"{path} has no attribute {attribute!r}")
    found = getattr(module, attribute)
    return found if hasattr(found, "state_dict") else found()


def input_shape(net: Any, batch: int) -> tuple[int, ...]:
    """(batch, C, H, W) of a net that knows what it takes."""
    shape = getattr(net, "input_shape", None)
    if shape is None:
        raise ConfigError(
            "the net does not say what it takes", help="set net.input_shape = (C, H, W)"
        )
    return (batch, *shape)


def _lowered(model: str, batch: int, train: bool, precision: str, target: str) -> Any:
    import graphnet as gn
    from graphnet.api import lower

    net = load_model(model)
    extra: dict[str, Any] = {}
    if train:
        extra = {
            "loss": gn.CrossEntropyLoss(),
            "optimizer": gn.SGD(lr=0.01, momentum=0.9, weight_decay=5e-4),
        }
    return net, lower(net, input_shape(net, batch), target=target, precision=precision, **extra)


def _emit(data: Any) -> None:
    typer.echo(json.dumps(data))


@app.command()
def train(
    model: Model,
    data: Annotated[str, typer.Option(help="mnist:DIR, digits, synthetic or imagefolder:DIR")],
    out: Annotated[Path, typer.Option(help="run folder to create")],
    epochs: Annotated[int, typer.Option(min=1)] = 3,
    batch: Batch = 128,
    target: Target = "auto",
    precision: Precision = "fp32",
    lr: Annotated[float, typer.Option(help="peak learning rate")] = 0.01,
    momentum: Annotated[float, typer.Option()] = 0.9,
    weight_decay: Annotated[float, typer.Option()] = 5e-4,
    nesterov: Annotated[bool, typer.Option("--nesterov")] = False,
    schedule: Annotated[str, typer.Option(help="constant or cosine (with warm-up)")] = "cosine",
    seed: Annotated[int, typer.Option()] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    as_json: Json = False,
) -> None:
    """Train a model; leaves a run folder with metrics, curves and checkpoints."""
    from graphnet.train.run import RunConfig, run_training

    settings = RunConfig(
        model=model, data=data, epochs=epochs, batch=batch, target=target, precision=precision,
        lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov,
        schedule=schedule, seed=seed,
    )  # fmt: skip
    result = run_training(settings, out, resume=resume, quiet=as_json)
    if as_json:
        _emit(result)


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="a run folder or a checkpoint (.safetensors)")],
    data: Annotated[str, typer.Option(help="as for train; default: the run's own")] = "",
    batch: Batch = 256,
    target: Target = "auto",
    as_json: Json = False,
) -> None:
    """Test error of a trained model."""
    from graphnet.train.run import evaluate_run

    result = evaluate_run(run, data or None, batch=batch, target=target)
    if as_json:
        _emit(result)
        return
    typer.echo(
        f"{result['model']} on {result['data']}: top-1 error {result['top1_error']:.2f} %, "
        f"loss {result['loss']:.4f}, {result['images']} images"
    )


@app.command()
def summary(model: Model, batch: Batch = 1, as_json: Json = False) -> None:
    """Layers, shapes, parameters and multiply-accumulates."""
    net = load_model(model)
    shape = input_shape(net, batch)
    if as_json:
        _emit(net.summary_rows(shape))
    else:
        typer.echo(net.summary(shape))


@app.command()
def inspect(
    model: Model,
    batch: Batch = 128,
    train: Train = False,
    precision: Precision = "fp32",
    target: Target = "cuda",
    gpu: Annotated[str, typer.Option(help="whose ceilings the floors are for")] = "h200",
    stage: Annotated[str, typer.Option(help="traced, joint, fused or plan")] = "plan",
    why: Annotated[bool, typer.Option("--why", help="what was not fused, and why")] = False,
    as_json: Json = False,
) -> None:
    """The graph or the plan: one line per kernel with FLOPs, bytes, floor and bound."""
    from graphnet.report import inspect_data, inspect_text

    net, low = _lowered(model, batch, train, precision, target)
    facts = {
        "model": model, "batch": batch, "train": train, "precision": precision,
        "target": target, "gpu": gpu, "stage": stage,
    }  # fmt: skip
    if as_json:
        _emit(inspect_data(net, low, facts))
    else:
        typer.echo(inspect_text(net, low, facts, why=why))


@app.command("compile")
def compile_(
    model: Model,
    batch: Batch = 128,
    train: Train = False,
    precision: Precision = "fp32",
    arch: Annotated[str, typer.Option(help="e.g. sm_90")] = "sm_90",
    out: Annotated[Path | None, typer.Option(help="folder for the binaries")] = None,
    as_json: Json = False,
) -> None:
    """Compile every kernel to a binary. Needs no GPU."""
    import graphnet as gn

    net = load_model(model)
    extra: dict[str, Any] = {}
    if train:
        extra = {
            "loss": gn.CrossEntropyLoss(),
            "optimizer": gn.SGD(lr=0.01, momentum=0.9, weight_decay=5e-4),
        }
    report = gn.build(
        net, input_shape(net, batch), precision=precision, arch=arch, out=out, **extra
    )
    if as_json:
        _emit(report.as_dict())
    else:
        typer.echo(str(report))


@app.command()
def doctor() -> None:
    """What is installed, which targets work here, and the flags."""
    from graphnet.report import doctor_text

    text, healthy = doctor_text()
    typer.echo(text)
    if not healthy:
        raise typer.Exit(1)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line and exits."""
    try:
        app(args=argv, prog_name="graphnet", standalone_mode=True)
    except GraphnetError as error:
        if config.debug() >= 1:
            raise
        typer.echo(f"graphnet: {type(error).__name__}: {error}", err=True)
        sys.exit(1 if isinstance(error, _FAILED) else 2)
    except KeyboardInterrupt:
        typer.echo("graphnet: interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
