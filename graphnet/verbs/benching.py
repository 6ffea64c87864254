"""bench: how fast, beside whom."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphnet.verbs.common import Batch, Model, Precision, Target, app


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
