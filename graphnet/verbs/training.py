"""train, eval and predict: what makes or reads a run."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from graphnet.errors import ConfigError, printable
from graphnet.frontends.loading import runs_code
from graphnet.train import ranks
from graphnet.train.settings import DATA, RunConfig, kind, read_config_file, settings
from graphnet.verbs.common import Batch, Json, Target, app, emit

DATA_OF = "as for train; default: the run's own"
WAIT = "seconds that a process waits for the others, where torchrun has started several"
OUT = "run folder to create; default: runs/MODEL-TIME"
Run = Annotated[Path, typer.Argument(help="a run folder or a checkpoint (.safetensors)")]
_MODEL = "of a checkpoint that lies in no run; FILE.py:ATTRIBUTE where a run names it, which is run"
ModelOf = Annotated[str, typer.Option("--model", help=_MODEL)]
ModelsOf = Annotated[
    list[str] | None, typer.Option("--model", help=f"{_MODEL}; more of them for an ensemble")
]


def _options() -> list[inspect.Parameter]:
    """The settings of a run as command-line parameters, the model in front."""
    out = []
    for f in settings():
        about: dict[str, Any] = dict(f.metadata)
        if f.name == "model":
            note: Any = typer.Argument(help=about["help"])
        elif kind(f) is bool:
            name = f.name.replace("_", "-")
            note = typer.Option(f"--{name}/--no-{name}", help=about["help"])
        else:
            note = typer.Option(**about)
        out.append(
            inspect.Parameter(
                f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default,
                annotation=Annotated[kind(f), note],
            )
        )  # fmt: skip
    return out


def _train(
    ctx: typer.Context,
    out: Annotated[Path | None, typer.Option(help=OUT)] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="two steps on the real data; leaves nothing")
    ] = False,
    as_json: Json = False,
    timeout: Annotated[float, typer.Option(min=1, help=WAIT)] = ranks.TIMEOUT,
    **values: Any,
) -> None:
    """Train a model; leaves a run folder with metrics, curves, pictures and checkpoints. Under
    torchrun the processes train together, and --batch is that of all."""
    from graphnet.train import run

    given = {
        name for name in values
        if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }  # fmt: skip
    if config is not None:
        file = read_config_file(config)
        values |= {k: v for k, v in file.items() if k not in given}
        if "model" not in given and runs_code(model := file.get("model", "")):
            raise ConfigError(
                f"{config} names the model {model}, a file that would be run",
                help=f"if you trust it: graphnet train {shlex.quote(model)} --config ...",
            )
        given |= set(file)
    if resume and dry_run:
        raise typer.BadParameter("a dry run starts from nothing", param_hint="--resume")
    if not resume and not values["model"]:
        from graphnet.frontends.models import MODELS

        text = f"no model is given: {', '.join(sorted(MODELS))}, FILE.py:ATTRIBUTE or FILE.onnx"
        raise typer.BadParameter(text, param_hint="model")
    if not resume and not values["data"]:
        raise typer.BadParameter(f"no data is given: --data {DATA}", param_hint="--data")
    chosen = RunConfig(**values)
    if out is None and resume:
        raise typer.BadParameter("which run goes on? --out RUN", param_hint="--out")
    with ranks.joined(chosen.target, timeout) as group:
        if dry_run:
            found = run.dry_run(chosen, group)
            if ranks.speaks():
                _dry(found, chosen.precision, as_json)
            return
        result = run.run_training(
            chosen, out, resume=resume, quiet=as_json, given=given, group=group
        )
        if ranks.speaks():
            _end(result, as_json)
    if result["signal"]:
        raise typer.Exit(128 + result["signal"])


def _end(result: dict[str, Any], as_json: bool) -> None:
    """Says what came of a run."""
    out = Path(result["run"])
    if as_json:
        emit(result)
    elif result["top1_error"] is not None and not result["signal"]:
        typer.echo(
            f"{out}: {result['epochs']} epochs, test accuracy {100 - result['top1_error']:.2f} %\n"
            f"  {', '.join(result['files'])}"
        )
    if result["signal"]:
        if not as_json:
            typer.echo(
                f"stopped at step {result['steps']}, {result['epochs']} epochs done, and saved; "
                f"graphnet train {_again(result['model'])}--resume --out {shlex.quote(str(out))} "
                "goes on", err=True,
            )  # fmt: skip


def _again(model: str) -> str:
    """What stands in front of --resume: a file that would be run has to be named."""
    return f"{shlex.quote(model)} " if runs_code(model) else ""


def _dry(found: dict[str, Any], asked: str, as_json: bool) -> None:
    if as_json:
        emit(found)
        return
    from graphnet.passes.precision import told

    f = found
    typer.echo(
        f"{f['model']} on {f['data']}, target {f['target']}, precision {told(asked, f['target'])}: "
        f"{f['images']} images in {f['batches']} batches\n"
        f"loss {f['loss']:.4f}, on the same batch again {f['next_loss']:.4f}, "
        f"test {f['test_loss']:.4f}\n"
        f"{1e3 * f['step_s']:.1f} ms a step, about {_time(f['epoch_s'])} an epoch without reading; "
        f"peak {f['peak_bytes'] / 2**20:.0f} MiB"
        + (f" in {f['launches']} launches" if f["launches"] else " beside what torch allocates")
    )


def _time(seconds: float) -> str:
    """3.2 s, 4 min, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _with_options(function: Any) -> Any:
    """The function with the settings among its parameters, for typer to read."""
    own = [p for p in inspect.signature(function, eval_str=True).parameters.values()
           if p.kind is not inspect.Parameter.VAR_KEYWORD]  # fmt: skip
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + _options()
    function.__signature__ = inspect.Signature(parameters)
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    return function


app.command("train")(_with_options(_train))


@app.command("eval")
def evaluate(
    run: Run,
    data: Annotated[str, typer.Option(help=DATA_OF)] = "",
    model: ModelsOf = None,
    batch: Batch = 256,
    target: Target = "auto",
    ten_crop: Annotated[
        bool, typer.Option("--ten-crop", help="average corners, centre and their mirrors")
    ] = False,
    ensemble: Annotated[
        list[Path] | None, typer.Option(help="another run, averaged in; may be repeated")
    ] = None,
    resize: Annotated[int, typer.Option(min=0, help="keep image files in this size")] = 0,
    as_json: Json = False,
) -> None:
    """Test error of a trained model, or of several that vote."""
    from graphnet.train.evaluation import evaluate_run

    result = evaluate_run(
        run, data or None, model=model[0] if model else None, trusted=model or (), batch=batch,
        target=target, ten_crop=ten_crop, ensemble=ensemble or (), resize=resize,
    )  # fmt: skip
    if as_json:
        emit(result)
        return
    if left := result["left_out"]:
        text = f"{len(left)} image files left out, the first: {left[0]['path']}: "
        typer.echo(printable(text + left[0]["reason"]), err=True)
    from graphnet.passes.precision import told

    how = ", ten crops" if ten_crop else ""
    how += f", {result['members']} nets averaged" if result["members"] > 1 else ""
    typer.echo(
        f"{result['model']} on {result['data']}{how}: top-1 error {result['top1_error']:.2f} %, "
        f"top-5 error {result['top5_error']:.2f} %, loss {result['loss']:.4f}, "
        f"{result['images']} images, precision {told('auto', result['target'])}"
    )


@app.command()
def predict(
    run: Run,
    images: Annotated[list[Path], typer.Argument(help="image files")],
    top: Annotated[int, typer.Option(min=1, help="classes to name")] = 5,
    model: ModelOf = "",
    target: Target = "auto",
    as_json: Json = False,
) -> None:
    """What a trained model sees in image files."""
    from graphnet.train.evaluation import predict

    rows = predict(run, images, model=model or None, top=top, target=target)
    if as_json:
        emit({"run": str(run), "images": rows})
    else:
        for row in rows:
            said = row.get("error") or "  ".join(
                f"{c['name']} {100 * c['p']:.1f} %" for c in row["classes"]
            )
            typer.echo(printable(f"{row['image']}: {said}"), err="error" in row)
    if any("error" in row for row in rows):
        raise typer.Exit(2)
