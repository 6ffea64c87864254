"""tune and cache: launch configurations, and what was kept on disk."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from graphnet.frontends.loading import input_shape, load_model
from graphnet.verbs.common import Batch, Json, Model, Precision, Target, Train, app, emit, training

cache = typer.Typer(no_args_is_help=True, help="What was compiled and tuned: list, why, clear.")
app.add_typer(cache, name="cache")


@app.command()
def tune(
    model: Model,
    batch: Batch = 128,
    mode: Annotated[bool, typer.Option("--train/--infer", help="what is tuned")] = True,
    precision: Precision = "auto",
    target: Target = "auto",
    seconds: Annotated[float, typer.Option(min=0.1, help="for the whole search")] = 120.0,
    again: Annotated[bool, typer.Option("--again", help="also what is known already")] = False,
    table: Annotated[Path | None, typer.Option(help="a table to add the results to")] = None,
    out: Annotated[Path | None, typer.Option(help="file or folder for all trials (JSON)")] = None,
    as_json: Json = False,
) -> None:
    """Search launch configurations: each candidate against the oracle first, then by time."""
    from graphnet import api
    from graphnet.bench import facts
    from graphnet.bench.result import SCHEMA
    from graphnet.lowering.launch.files import write_whole
    from graphnet.lowering.tune import tables
    from graphnet.passes.precision import told

    net = load_model(model)
    low = api.lower(
        net, input_shape(net, batch), target=target, precision=precision, **training(mode)
    )  # fmt: skip
    date, machine, versions = facts.now(), facts.machine(_device(low.target)), facts.versions()

    def result(found: Any) -> dict[str, Any]:
        return {
            "schema": SCHEMA, "kind": "tune", "date": date, "model": model,
            "mode": "train" if mode else "infer", "batch": batch, "precision": low.precision,
            "target": low.target, "gpu": found.gpu, "machine": machine, "versions": versions,
            "keys": found.keys, "seconds": round(found.seconds, 1),
            "rank_correlation": {k: round(v, 3) for k, v in found.rank_correlations().items()},
            "rows": [t.as_dict() for t in found.trials],
        }  # fmt: skip

    def write(found: Any) -> None:
        if out is not None:
            name = f"{found.gpu}-{facts.slug(model)}-tune-b{batch}-{low.precision}-{date[:10]}.json"
            text = json.dumps(result(found), indent=1)
            write_whole(out / name if out.is_dir() else out, text.encode())

    say = lambda line: typer.echo(line, err=True)
    say(f"precision {told(precision, low.target)}")
    found = api.tune(low, seconds, say=say, each=write, again=again)
    write(found)
    if table is not None:
        have = tables.read(table) if table.exists() else []
        tables.write(table, found.gpu, [*have, *found.entries])
    if as_json:
        emit(result(found))
        return
    bad = [t for t in found.trials if t.verdict == "wrong"]
    for t in bad:
        typer.echo(f"wrong: {t.problem} {t.variant} {t.config}: {t.error}")
    gained = [e for e in found.entries if e.rule_us and e.us < e.rule_us]
    typer.echo(
        f"{found.keys} keys, {len(found.trials)} trials, {len(bad)} wrong, "
        f"{len(gained)} faster than the rules, {found.seconds:.0f} s"
    )


def _device(target: str) -> Any:
    import torch

    return torch.device("cuda" if target == "cuda" else "cpu")


@cache.command("list")
def list_(as_json: Json = False) -> None:
    """Binaries and tuning results, with size and age."""
    from graphnet.lowering.build.inventory import listing

    rows = listing()
    if as_json:
        emit({"entries": rows})
        return
    typer.echo(f"{'kind':7} {'name':16} {'size':>11}  {'age':>16}  of")
    for r in rows:
        age = datetime.timedelta(seconds=round(r["age_s"]))
        typer.echo(f"{r['kind']:7} {r['name'][:16]} {r['bytes']:>9,} B  {age!s:>16}  {r['what']}")
    total = sum(r["bytes"] for r in rows)
    typer.echo(f"{len(rows)} entries, {total:,} B")


@cache.command()
def why(
    model: Model,
    batch: Batch = 128,
    train: Train = False,
    precision: Precision = "auto",
    arch: Annotated[str, typer.Option(help="e.g. sm_90")] = "sm_90",
    as_json: Json = False,
) -> None:
    """Which kernels of a model are compiled already, and what sets the others apart."""
    from graphnet.api import lower
    from graphnet.lowering.build.build import arch_number
    from graphnet.lowering.build.inventory import why

    net = load_model(model)
    low = lower(
        net, input_shape(net, batch), target="cuda", precision=precision, **training(train)
    )  # fmt: skip
    rows = why(low.plan.launches, arch_number(arch))
    if as_json:
        emit({"model": model, "launches": rows})
        return
    for r in rows:
        differs = r.get("differs")
        reason = "hit" if r["hit"] else (
            "miss: no binary of this kernel" if differs is None else
            f"miss: {', '.join(differs[:6])}{', ...' if len(differs) > 6 else ''}"
        )  # fmt: skip
        typer.echo(f"{r['kernel']:24} {', '.join(r['layers'])[:28]:28} {reason}")
    typer.echo(f"{sum(r['hit'] for r in rows)} of {len(rows)} launches hit")


@cache.command()
def clear(
    tuning: Annotated[bool, typer.Option("--tuning", help="only tuning results")] = False,
    binaries: Annotated[bool, typer.Option("--binaries", help="only what was compiled")] = False,
    images: Annotated[bool, typer.Option("--images", help="only decoded images")] = False,
    as_json: Json = False,
) -> None:
    """Empty the cache, or a part of it."""
    from graphnet.lowering.build.inventory import COMPILED, KINDS, clear

    parts = [(binaries, COMPILED), (tuning, ("tuning",)), (images, ("images",))]
    kinds = [k for wanted, names in parts if wanted for k in names] or list(KINDS)
    gone = clear(kinds)
    if as_json:
        emit(gone)
    else:
        typer.echo(f"removed {gone['files']} files, {gone['bytes']:,} B ({', '.join(kinds)})")
