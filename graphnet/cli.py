"""The command line: train, eval, summary, inspect, compile, bench, doctor.

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
from graphnet.frontends.loading import input_shape, load_model

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


def _training(wanted: bool) -> dict[str, Any]:
    """The loss and the optimizer that `--train` stands for."""
    import graphnet as gn

    sgd = gn.SGD(lr=0.01, momentum=0.9, weight_decay=5e-4)
    return {"loss": gn.CrossEntropyLoss(), "optimizer": sgd} if wanted else {}


def _emit(data: Any) -> None:
    typer.echo(json.dumps(data))


@app.command()
def train(
    model: Model,
    ctx: typer.Context,
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
    given = {
        name for name in ctx.params
        if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }  # fmt: skip
    result = run_training(settings, out, resume=resume, quiet=as_json, given=given)
    if as_json:
        _emit(result)
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
    table = net.summary(input_shape(net, batch))
    if as_json:
        _emit({**table.as_dict(), "model": model})
    else:
        typer.echo(table)


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
    from graphnet.api import lower
    from graphnet.report import check_choices, inspect_data, inspect_text, why_text

    check_choices(stage, gpu)
    net = load_model(model)
    shape = input_shape(net, batch)
    low = lower(net, shape, target=target, precision=precision, **_training(train))
    facts = {
        "model": model, "batch": batch, "train": train, "precision": precision,
        "target": target, "gpu": gpu, "stage": stage,
    }  # fmt: skip
    if as_json:
        _emit(inspect_data(net, low, facts))
        if why:
            typer.echo(why_text(low), err=True)
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
    shape = input_shape(net, batch)
    report = gn.build(
        net, shape, precision=precision, arch=arch, out=out, **_training(train)
    )  # fmt: skip
    if as_json:
        _emit(report.as_dict())
    else:
        typer.echo(str(report))


@app.command()
def bench(
    model: Model,
    batch: Batch = 128,
    mode: Annotated[bool, typer.Option("--train/--infer", help="what is timed")] = True,
    precision: Precision = "fp32",
    target: Target = "auto",
    against: Annotated[str, typer.Option(help="baselines: eager,compile")] = "eager",
    ablate: Annotated[str, typer.Option(help="fusion,update-fusion,layout left out")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 15,
    seconds: Annotated[float, typer.Option(min=0.1, help="of all rounds together")] = 20.0,
    parity: Annotated[int, typer.Option(min=0, help="steps both sides train first")] = 100,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the result")] = None,
) -> None:
    """Our step beside torch's best, in one interleaved run; first both must learn the same."""
    from graphnet.bench.bench import BenchConfig, run_bench

    names = lambda text: tuple(filter(None, text.split(",")))
    settings = BenchConfig(
        model, batch, mode, precision, target, names(against), names(ablate), rounds, seconds,
        parity,
    )  # fmt: skip
    run_bench(settings, json_file, typer.echo)


@app.command()
def doctor() -> None:
    """What is installed, which targets work here, and the flags."""
    from graphnet.doctor import doctor_text

    text, healthy = doctor_text()
    typer.echo(text)
    if not healthy:
        raise typer.Exit(1)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line and exits."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = app(args=argv or ["--help"], prog_name="graphnet", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except Exception as error:
        if _debugging():
            raise
        # What typer says of a wrong option, without its panel.
        usage = getattr(error, "format_message", None)
        text = usage() if usage else _one_line(error)
        typer.echo(f"graphnet: {text}", err=True)
        bad_input = usage or (isinstance(error, GraphnetError) and not isinstance(error, _FAILED))
        sys.exit(2 if bad_input else 1)


def _debugging() -> bool:
    try:
        return config.debug() >= 1
    except ConfigError:  # a wrong GRAPHNET_DEBUG must not hide the first error
        return False


def _one_line(error: Exception) -> str:
    """The error on one line; what is not ours says how to see where it comes from."""
    if isinstance(error, GraphnetError):
        return f"{type(error).__name__}: " + "; ".join(map(str.strip, str(error).splitlines()))
    if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("graphnet."):
        return f"{error}; run graphnet doctor"
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{text}; GRAPHNET_DEBUG=1 shows where"


if __name__ == "__main__":
    main()
