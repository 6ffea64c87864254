"""train and eval: what makes or reads a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphnet.verbs.common import Batch, Json, Model, Precision, Target, app, emit

RESIZE = "keep image files in this size and train on random crops from them (0: the net's size)"
DATA = "mnist:DIR, cifar10:PATH, digits, synthetic or imagefolder:DIR"


@app.command()
def train(
    model: Model,
    ctx: typer.Context,
    data: Annotated[str, typer.Option(help=DATA)],
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
    workers: Annotated[int, typer.Option(min=0, help="processes that decode image files")] = 2,
    resize: Annotated[int, typer.Option(min=0, help=RESIZE)] = 0,
    max_bad: Annotated[float, typer.Option(help="share of image files that may be bad")] = 0.001,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    as_json: Json = False,
) -> None:
    """Train a model; leaves a run folder with metrics, curves and checkpoints."""
    from graphnet.train.run import RunConfig, run_training

    settings = RunConfig(
        model=model, data=data, epochs=epochs, batch=batch, target=target, precision=precision,
        lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov,
        schedule=schedule, seed=seed, workers=workers, resize=resize, max_bad=max_bad,
    )  # fmt: skip
    given = {
        name for name in ctx.params
        if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }  # fmt: skip
    result = run_training(settings, out, resume=resume, quiet=as_json, given=given)
    if as_json:
        emit(result)
    elif result["top1_error"] is not None:
        typer.echo(
            f"{out}: {result['epochs']} epochs, test accuracy {100 - result['top1_error']:.2f} %"
        )
    if result["signal"]:
        raise typer.Exit(128 + result["signal"])


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="a run folder or a checkpoint (.safetensors)")],
    data: Annotated[str, typer.Option(help="as for train; default: the run's own")] = "",
    model: Annotated[str, typer.Option(help="of a checkpoint that lies in no run")] = "",
    batch: Batch = 256,
    target: Target = "auto",
    as_json: Json = False,
) -> None:
    """Test error of a trained model."""
    from graphnet.train.run import evaluate_run

    result = evaluate_run(run, data or None, model=model or None, batch=batch, target=target)
    if as_json:
        emit(result)
        return
    typer.echo(
        f"{result['model']} on {result['data']}: top-1 error {result['top1_error']:.2f} %, "
        f"loss {result['loss']:.4f}, {result['images']} images"
    )
