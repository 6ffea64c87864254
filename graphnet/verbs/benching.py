"""bench: times our step beside torch's."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from graphnet.verbs.common import Batch, Model, Precision, Target, app

_AGAINST = "baselines, each the best of its variants: eager,eager-graph,compile,compile-max"
_ABLATE = "ours without: fusion,cudagraph,layout,update-fusion,native"
_JSON = "file for the result, or a folder, where its name says what was measured"


@app.command()
def bench(
    model: Model,
    batch: Batch = 128,
    train: Annotated[bool, typer.Option("--train/--infer", help="what is timed")] = True,
    update: Annotated[
        bool, typer.Option("--update/--no-update", help="--no-update: forward and backward alone")
    ] = True,
    dropout: Annotated[
        bool, typer.Option("--dropout/--no-dropout", help="on both sides")
    ] = True,
    precision: Precision = "auto",
    target: Target = "auto",
    against: Annotated[str, typer.Option(help=_AGAINST)] = "eager",
    ablate: Annotated[str, typer.Option(help=_ABLATE)] = "",
    rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 15,
    seconds: Annotated[float, typer.Option(min=0.1, help="of all rounds together")] = 20.0,
    parity: Annotated[
        int, typer.Option(min=0, help="batches that prove both sides first; 0 checks nothing")
    ] = 5,
    layers: Annotated[
        bool, typer.Option("--layers/--no-layers", help="times by layer and by launch")
    ] = True,
    quick: Annotated[
        bool, typer.Option("--quick", help="compile only what is eager's best otherwise")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help=_JSON)] = None,
) -> None:
    """Our step beside torch's best, in interleaved rounds; first both must compute the same."""
    from graphnet.bench.bench import BenchConfig, run_bench

    names = lambda text: tuple(filter(None, text.split(",")))
    mode = "infer" if not train else "train" if update else "grads"
    settings = BenchConfig(
        model, batch, mode, precision, target, names(against), names(ablate), rounds, seconds,
        parity, dropout, layers, quick,
    )  # fmt: skip
    number = signal.SIGINT

    def stop(received: int, frame: object) -> None:
        nonlocal number
        number = signal.Signals(received)
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    both = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {n: signal.signal(n, stop) for n in both}
    try:
        run_bench(settings, json_file, typer.echo)
    except KeyboardInterrupt:
        typer.echo("graphnet: interrupted; what was measured is kept", err=True)
        raise typer.Exit(128 + number) from None
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
