"""summary, inspect, compile, doctor: what looks at a model on its way to kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphnet.frontends.loading import input_shape, load_model
from graphnet.verbs.common import (
    Accumulate,
    Batch,
    ClipNorm,
    Json,
    Model,
    Nonfinite,
    Optimizer,
    Precision,
    Target,
    Train,
    app,
    emit,
    training,
)

RANKS = "processes with a GPU and --batch images each: what their messages cost, by a model"


@app.command()
def summary(model: Model, batch: Batch = 1, as_json: Json = False) -> None:
    """Layers, shapes, parameters and multiply-accumulates."""
    net = load_model(model)
    table = net.summary(input_shape(net, batch))
    if as_json:
        emit({**table.as_dict(), "model": model})
    else:
        typer.echo(table)


@app.command()
def inspect(
    model: Model,
    batch: Batch = 128,
    train: Train = False,
    precision: Precision = "auto",
    target: Target = "cuda",
    gpu: Annotated[str, typer.Option(help="whose ceilings the floors are for")] = "h200",
    stage: Annotated[str, typer.Option(help="traced, joint, fused or plan")] = "plan",
    optimizer: Optimizer = "sgd",
    accumulate: Accumulate = 1,
    clip_norm: ClipNorm = None,
    nonfinite: Nonfinite = "auto",
    why: Annotated[bool, typer.Option("--why", help="what was not fused, and why")] = False,
    ranks: Annotated[int, typer.Option(min=1, help=RANKS)] = 1,
    link: Annotated[str, typer.Option(help="between ranks: nvlink, ib or eth")] = "nvlink",
    reduce: Annotated[str, typer.Option(help="bf16: gradients travel so; else fp32")] = "",
    as_json: Json = False,
) -> None:
    """The graph or the plan: one line per kernel with FLOPs, bytes, floor and bound."""
    import graphnet as gn
    from graphnet.api import kernels_of, lower
    from graphnet.passes.precision import told
    from graphnet.report import check_choices, inspect_data, inspect_text, why_text
    from graphnet.scaling import link_of, scaling, scaling_text

    check_choices(stage, gpu)
    link_of(link)
    if ranks > 1 and (not train or target != "cuda"):
        raise gn.ConfigError(
            "--ranks is about a training step on GPUs", help="add --train, and leave --target out"
        )
    net = load_model(model)
    shape = input_shape(net, batch)
    wanted = training(
        train, optimizer, accumulate=accumulate, clip_norm=clip_norm, nonfinite=nonfinite
    )
    kernels = None if target == "cpu" else kernels_of(target, gpu if target == "cuda" else None)
    how = {"target": target, "precision": precision, "kernels": kernels, **wanted}
    low = lower(net, shape, **how, ranks=ranks, reduce=reduce or None)
    told_of = scaling(lower(net, shape, **how), low, ranks, link, gpu) if ranks > 1 else None
    facts = {
        "model": model, "batch": batch, "train": train, "precision": low.precision,
        "target": target, "gpu": gpu, "stage": stage,
    }  # fmt: skip
    if as_json:
        more = {"scaling": told_of.as_dict()} if told_of else {}
        emit(inspect_data(net, low, facts) | more)
        if why:
            typer.echo(why_text(low), err=True)
    else:
        facts["precision"] = told(precision, low.target)
        typer.echo(inspect_text(net, low, facts, why=why))
        if told_of:
            typer.echo(f"\n{scaling_text(told_of, gpu, batch)}")


@app.command("compile")
def compile_(
    model: Model,
    batch: Batch = 128,
    train: Train = False,
    precision: Precision = "auto",
    optimizer: Optimizer = "sgd",
    accumulate: Accumulate = 1,
    clip_norm: ClipNorm = None,
    nonfinite: Nonfinite = "auto",
    arch: Annotated[str, typer.Option(help="e.g. sm_90")] = "sm_90",
    out: Annotated[Path | None, typer.Option(help="folder for the binaries")] = None,
    as_json: Json = False,
) -> None:
    """Compile every kernel to a binary. Needs no GPU."""
    import graphnet as gn
    from graphnet.passes.precision import told

    net = load_model(model)
    shape = input_shape(net, batch)
    wanted = training(
        train, optimizer, accumulate=accumulate, clip_norm=clip_norm, nonfinite=nonfinite
    )
    report = gn.build(
        net, shape, precision=precision, arch=arch, out=out, **wanted
    )
    if as_json:
        emit(report.as_dict())
    else:
        typer.echo(f"precision {told(precision, 'cuda')}\n{report}")


@app.command()
def doctor() -> None:
    """What is installed, which targets work here, and the flags."""
    from graphnet.doctor import doctor_text

    text, healthy = doctor_text()
    typer.echo(text)
    if not healthy:
        raise typer.Exit(1)
