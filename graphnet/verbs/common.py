"""What the verbs share: the application, options, the loss and optimizer of `--train`, output."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)



def _say_version(wanted: bool) -> None:
    if wanted:
        from graphnet import __version__

        typer.echo(f"graphnet {__version__}")
        raise typer.Exit()


@app.callback()
def _graphnet(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="and end")
    ] = False,
) -> None:
    """Compile CNNs from a Python DSL into fused Triton training steps."""


_MODEL = "a model's name (lenet5), FILE.py:ATTRIBUTE or FILE.onnx"
Model = Annotated[str, typer.Argument(help=_MODEL)]
Batch = Annotated[int, typer.Option(min=1, help="images in a batch")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
Precision = Annotated[
    str, typer.Option(help="fp32 (IEEE), tf32 or bf16; auto: tf32 for a GPU, fp32 elsewhere")
]
Target = Annotated[str, typer.Option(help="auto, cuda, cpu or interpret")]
Train = Annotated[bool, typer.Option("--train", help="the training step instead of inference")]
Optimizer = Annotated[str, typer.Option(help="sgd (momentum 0.9), adam or adamw")]
Accumulate = Annotated[int, typer.Option(min=1, help="calls whose gradients one update applies")]
ClipNorm = Annotated[float | None, typer.Option(help="global norm that gradients are cut down to")]
Nonfinite = Annotated[
    str, typer.Option(help="auto, stop (guard by the loss), skip (by the gradients too) or none")
]
_PLAIN = {"accumulate": 1, "clip_norm": None, "nonfinite": "auto"}


def training(wanted: bool, optimizer: str = "sgd", **handling: Any) -> dict[str, Any]:
    """The loss and the optimizer that `--train` stands for, and how gradients are treated."""
    import graphnet as gn
    from graphnet.ops.optimizers import by_name

    spec = by_name(optimizer, 0.01, momentum=0.9, weight_decay=5e-4)
    if wanted:
        if handling.get("nonfinite") == "none":
            handling["nonfinite"] = None
        return {"loss": gn.CrossEntropyLoss(), "optimizer": spec, **handling}
    if optimizer != "sgd" or handling not in ({}, _PLAIN):
        raise gn.ConfigError("options of training without --train", help="add --train")
    return {}


def emit(data: dict[str, Any]) -> None:
    """Prints one JSON object on stdout, null for what is not finite."""
    try:
        text = json.dumps(data, allow_nan=False)
    except ValueError:
        from graphnet.train.rundir import finite

        text = json.dumps(finite(data))
    typer.echo(text)
