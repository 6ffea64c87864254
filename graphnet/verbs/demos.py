"""demo: the lecture's demonstrations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from graphnet.verbs.common import Json, app, emit

demo = typer.Typer(no_args_is_help=True, help="The lecture's demonstrations: optimizers, dropout.")
app.add_typer(demo, name="demo")
Out = Annotated[Path, typer.Option(help="the picture")]


def _tell(rows: list[dict[str, Any]], out: Path, as_json: bool) -> None:
    from graphnet.train.demos import shown

    if as_json:
        emit({"picture": str(out), "rows": rows})
    else:
        typer.echo(f"{shown(rows)}\n{out}")


@demo.command()
def optimizers(
    out: Out = Path("optimizers.png"),
    steps: Annotated[int, typer.Option(min=1)] = 120,
    as_json: Json = False,
) -> None:
    """How SGD, momentum and Nesterov move on a narrow bowl, a saddle and a noisy loss."""
    from graphnet.train.demos import demo_optimizers

    rows = demo_optimizers(out, steps)
    _tell(rows, out, as_json)


@demo.command()
def dropout(
    out: Out = Path("dropout.png"),
    p: Annotated[float, typer.Option(min=0.0, max=0.95, help="share that is dropped")] = 0.5,
    masks: Annotated[int, typer.Option(min=2)] = 1000,
    as_json: Json = False,
) -> None:
    """What dropout does in training and at test time, inverted and vanilla."""
    from graphnet.train.demos import demo_dropout

    rows = demo_dropout(out, p, masks)
    _tell(rows, out, as_json)
