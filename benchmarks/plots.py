"""Pictures of the results: bars beside the baselines, and each kernel under the roofline."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphnet.bench.result import span
from graphnet.train.checkpoint import atomic_write

Result = Mapping[str, Any]
_COLOURS = {"graphnet": "#1b6ca8", "ablation": "#8fbcdb"}
_TORCH = "#b9b4ab"
_PHASES = {"forward": "o", "loss": "^", "backward": "s"}


def wanted(results: Mapping[str, Result]) -> dict[str, tuple[str, str]]:
    """By name of a picture: what it shows, and the result it is of."""
    out = {}
    for stem, r in results.items():
        if r["kind"] != "bench":
            continue
        if any(not row["failure"] for row in r["rows"]):
            out[f"{stem}-bars"] = "bars", stem
        if r["layers"] and r["ceilings"]:
            out[f"{stem}-roofline"] = "roofline", stem
    return out


def fingerprint(result: Result) -> str:
    """Of a result's content: a picture carries it, so that a stale one shows."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def drawn_from(path: Path) -> str:
    """The fingerprint of the result that a picture was drawn from."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get("Source", "")


def draw(results: Mapping[str, Result], folder: Path) -> list[Path]:
    """Draws what is missing or stale, removes what no result has; the paths it wrote."""
    folder.mkdir(exist_ok=True)
    names = wanted(results)
    for path in folder.glob("*.png"):
        if path.stem not in names:
            path.unlink()
    written = []
    for name, (what, stem) in names.items():
        path, mark = folder / f"{name}.png", fingerprint(results[stem])
        if path.exists() and drawn_from(path) == mark:
            continue
        figure = (bars if what == "bars" else roofline)(results[stem])
        data = io.BytesIO()
        figure.savefig(
            data, format="png", dpi=110, bbox_inches="tight", metadata={"Source": mark}
        )
        atomic_write(path, data.getvalue())
        written.append(path)
    return written


def _title(r: Result) -> str:
    where = r["machine"]["device"]
    where = f"{r['machine']['threads']} CPU threads" if where == "cpu" else where
    model = r["model"].rpartition(":")[2]
    return f"{model}, {r['mode']}, batch {r['batch']}, {r['precision']}, {where}, {r['date'][:10]}"


def bars(r: Result) -> Any:
    """Milliseconds of a step, quickest on top, from 0; whiskers are quartiles."""
    from matplotlib.figure import Figure  # no pyplot: no state, no display

    rows = [row for row in r["rows"] if not row["failure"]]
    rows.sort(key=lambda row: row["ms"]["median"])
    figure = Figure(figsize=(9, 0.8 + 0.34 * len(rows)))
    axes = figure.subplots()
    values = [row["ms"]["median"] for row in rows]
    below = [row["ms"]["median"] - row["ms"]["low"] for row in rows]
    above = [row["ms"]["high"] - row["ms"]["median"] for row in rows]
    best = set(r["best"].values())
    axes.barh(
        range(len(rows)), values, xerr=(below, above), error_kw={"lw": 0.8, "capsize": 2},
        color=[_COLOURS.get(row["kind"], _TORCH) for row in rows],
        edgecolor=["black" if row["name"] in best else "none" for row in rows],
    )  # fmt: skip
    end = max(row["ms"]["high"] for row in rows)
    for k, row in enumerate(rows):
        axes.annotate(
            span(row["ratio"], 2), (row["ms"]["high"] + 0.01 * end, k), va="center", fontsize=8
        )
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.22 * end)
    axes.set_xlabel("ms a step; beside it: times our best, median (quartiles)")
    axes.set_title(_title(r) + "\nframed: the best of its kind", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def roofline(r: Result) -> Any:
    """Each launch's rate over its arithmetic intensity, below ceilings measured in the same run.

    Launches that take less than a thousandth of the step are left out. Of several that lie in one
    place the one that takes longest has a label.
    """
    from matplotlib.figure import Figure

    top, slope = r["ceilings"]["flops"], r["ceilings"]["bandwidth"]
    total = sum(row["us"] for row in r["layers"]["graphnet"])
    rows = [row for row in r["layers"]["graphnet"] if row["flops"] and row["bytes"]]
    rows = [row for row in rows if row["us"] > total / 1000]
    figure = Figure(figsize=(9, 5.4))
    axes = figure.subplots()
    intensity = [row["flops"] / row["bytes"] for row in rows]
    low, high = min([*intensity, 0.1]), max([*intensity, 4 * top / slope])
    ridge = top / slope
    axes.plot(
        [low, ridge, high], [low * slope / 1e9, top / 1e9, top / 1e9], color="black", lw=1,
        label=f"{top / 1e9:,.0f} GFLOP/s, {slope / 1e9:,.0f} GB/s, measured",
    )  # fmt: skip
    for phase, marker in _PHASES.items():
        own = [(x, row) for x, row in zip(intensity, rows, strict=True) if row["phase"] == phase]
        if own:
            axes.scatter(
                [x for x, _ in own], [row["flops"] / row["us"] / 1e3 for _, row in own],
                s=[20 + 1200 * row["us"] / total for _, row in own], marker=marker, alpha=0.6,
                label=phase,
            )  # fmt: skip
    heavy = sorted(zip(intensity, rows, strict=True), key=lambda pair: -pair[1]["us"])[:10]
    labelled: list[tuple[float, float]] = []
    for x, row in heavy:
        y = row["flops"] / row["us"] / 1e3
        if any(max(x / a, a / x) < 4 and max(y / b, b / y) < 1.6 for a, b in labelled):
            continue
        labelled.append((x, y))
        label = f"{row['name'].split('+')[0]} {', '.join(row['layers'][:1])}"
        right = x * 4 > high  # beside the point, towards the middle
        axes.annotate(
            f"{label} {row['us'] / total:.0%}", (x, y),
            textcoords="offset points", xytext=(-9 if right else 9, -2), fontsize=6.5,
            ha="right" if right else "left",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP a byte")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(_title(r) + "\narea: share of the step's time", fontsize=9)
    axes.grid(alpha=0.25, which="both")
    legend = axes.legend(fontsize=8, loc="lower right")
    for handle in legend.legend_handles[1:]:
        handle.set_sizes([40])
    return figure
