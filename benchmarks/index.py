"""The tables of benchmarks/README.md and docs/benchmarks.md, written from the results."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.goals import GOALS, GPUS, ours_ms, seed_groups
from benchmarks.published import WORKLOADS, Workload
from graphnet.bench.peers import KINDS
from graphnet.bench.result import span
from graphnet.lowering.tune.model import rank_correlation

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PLOTS = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "plots"
PAGES = (ROOT / "benchmarks" / "README.md", ROOT / "docs" / "benchmarks.md")
Results = Mapping[str, Mapping[str, Any]]  # by file stem
NOT_MEASURED = "not measured"
_GPU = " or ".join(GPUS)


def read(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Every result, by the stem of its file."""
    return {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}


def of_kind(results: Results, kind: str) -> dict[str, Mapping[str, Any]]:
    return {stem: r for stem, r in results.items() if r["kind"] == kind}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def machine(result: Mapping[str, Any]) -> str:
    m = result["machine"]
    if m["device"] == "cpu":
        return f"{m['threads']} CPU threads, {m['capability']}"
    return m["device"].removeprefix("NVIDIA ")


def _link(stem: str, text: str) -> str:
    return f"[{text}](results/{stem}.json)"


def benches(results: Results) -> str:
    """One line for each bench; a ratio is how many times our time the best of a kind takes."""
    kinds = list(KINDS)
    rows = []
    for stem, r in of_kind(results, "bench").items():
        ours = ours_ms(r)
        mode = f"{r['mode']}{'' if r['dropout'] else ', no dropout'}"
        rows.append([
            _link(stem, r["model"].rpartition(":")[2]), mode, str(r["batch"]), r["precision"],
            machine(r), NOT_MEASURED if ours is None else f"{ours:.4g}",
            *(span(r["ratio"][k], 2) if k in r["ratio"] else "-" for k in kinds),
            r["date"][:10] + ("" if r["complete"] else ", cut off"),
        ])  # fmt: skip
    ratios = [f"{k} / ours" for k in kinds]
    head = ["model", "mode", "batch", "precision", "machine", "our ms", *ratios, "date"]
    return table(head, rows)


def goals(results: Results) -> str:
    text = table(["goal", "figure", *GPUS], (g.row(list(results.values())) for g in GOALS))
    if all(r["machine"]["device"] == "cpu" for r in results.values()):
        text += (
            "\n\nNo result of a GPU has been committed yet; what was measured on one beside the"
            "\nharness stands in [docs/benchmarks.md](../docs/benchmarks.md#on-a-gpu)."
        )
    return text


def mnist(results: Results) -> str:
    """One line for each way and batch of each run."""
    rows = []
    for stem, r in of_kind(results, "mnist99").items():
        for (way, batch), own in seed_groups(r).items():
            times = [row["train_s"] for row in own]
            reached = sum(row["accuracy"] >= 0.99 for row in own)
            rows.append([
                _link(stem, machine(r)), way, r["precision"], str(batch), str(own[0]["steps"]),
                f"{statistics.median(times):.4g}", f"{reached} of {len(times)}",
                f"{min(row['accuracy'] for row in own):.2%}", r["date"][:10],
            ])  # fmt: skip
    if not any(r["target"] == "cuda" for r in of_kind(results, "mnist99").values()):
        rows.append([_GPU, "-", "fp32", "128", "1407", NOT_MEASURED, "-", "-", "-"])
    head = ["machine", "way", "precision", "batch", "steps", "median s", "seeds at 99 %", "worst"]
    return table([*head, "date"], rows)


def order(rows: Iterable[Mapping[str, Any]]) -> tuple[float | None, int]:
    """Rank correlation between predicted and measured times of a tuner run, mean over its keys; and
    how many keys had enough measured configurations to be ordered."""
    keys: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["predicted_us"] is not None and row["median_us"] is not None:
            key = json.dumps([row["kernel"], row["shape"], row.get("precision")])
            keys.setdefault(key, []).append((row["predicted_us"], row["median_us"]))
    found = [rank_correlation(*zip(*pairs, strict=True)) for pairs in keys.values()]
    known = [rho for rho in found if rho is not None]
    return (statistics.mean(known) if known else None), len(known)


def tuning(results: Results) -> str:
    """How well the cost model orders what the tuner measured on a GPU."""
    rows = []
    for stem, r in of_kind(results, "tune").items():
        if r["machine"]["device"] == "cpu":
            continue  # the interpreter's times order nothing
        value, keys = order(r["rows"])
        timed = sum(row["median_us"] is not None for row in r["rows"])
        wrong = sum(row["verdict"] == "wrong" for row in r["rows"])
        rows.append([
            _link(stem, stem), machine(r), str(len(r["rows"])), str(timed), str(wrong),
            NOT_MEASURED if value is None else f"{value:.2f} over {keys} keys",
        ])  # fmt: skip
    if not rows:
        rows.append(["-", _GPU, "-", "-", "-", NOT_MEASURED])
    head = ["run", "machine", "configurations", "timed", "wrong", "rank correlation"]
    return table(head, rows)


def steps(results: Results) -> str:
    """One line for each run of benchmarks/steps.py on a GPU."""
    rows = []
    for stem, r in of_kind(results, "steps").items():
        if r["machine"]["device"] == "cpu":
            continue
        rows += [_run(stem, machine(r), run) for run in r["runs"] if not run.get("streams")]
    if not rows:
        rows.append(["-", "-", "-", _GPU, NOT_MEASURED, *["-"] * 6])
    head = ["model", "batch", "precision", "machine", "replay ms", "call ms", "eager / ours",
            "launches", "their sum ms", "floor ms", "date"]  # fmt: skip
    return table(head, rows)


def _run(stem: str, where: str, run: Mapping[str, Any]) -> list[str]:
    ways, launches = run["ways"], run["launches"] or []
    ms = [f"{ways[n]['ms']['median']:.4g}" if n in ways else "-" for n in ("replay", "graphnet")]
    eager = next((span(w["ratio"], 2) for n, w in ways.items() if n.startswith("eager")), "-")
    sums = [f"{sum(row[k] or 0.0 for row in launches) / 1e3:.4g}" for k in ("us", "floor_us")]
    return [
        _link(stem, run["model"]), str(run["batch"]), run["precision"], where, *ms, eager,
        *([str(len(launches)), *sums] if launches else ["-"] * 3),
        run["failure"] or run["date"][:10],
    ]  # fmt: skip


STREAMS = (0, 1, 16, 32, 48)  # what `gpu.sh --part streams` replays


def streams(results: Results) -> str:
    """One line for each run of benchmarks/steps.py that replays under several GRAPHNET_STREAMS."""
    rows = []
    for stem, r in of_kind(results, "steps").items():
        for run in r["runs"]:
            if r["machine"]["device"] == "cpu" or not run.get("streams"):
                continue
            ways = [run["ways"].get(f"streams {n}") for n in STREAMS]
            ms = ["-" if w is None else span(w["ms"], 3) for w in ways]
            rows.append([_link(stem, run["model"]), str(run["batch"]), run["precision"],
                         machine(r), *ms, run["failure"] or run["date"][:10]])  # fmt: skip
    if not rows:
        rows.append(["alexnet", "128", "bf16, tf32", _GPU, *[NOT_MEASURED] * len(STREAMS), "-"])
    head = ["model", "batch", "precision", "machine", *(f"{n}, ms" for n in STREAMS), "date"]
    return table(head, rows)


def jax(results: Results) -> str:
    """One line for each row of benchmarks/jax_peer.py on a GPU."""
    rows = []
    for stem, r in of_kind(results, "jax").items():
        if r["machine"]["device"] == "cpu":
            continue
        for row in r["rows"]:
            scan = f"{row['scan']} steps a call" if row["scan"] > 1 else "a call"
            ms = row["failure"] or f"{row['ms']:.4g}"
            rows.append([_link(stem, row["model"]), str(row["batch"]), row["precision"], scan,
                         machine(r), ms, r["date"][:10]])  # fmt: skip
    if not rows:
        rows.append(["-", "-", "-", "-", _GPU, NOT_MEASURED, "-"])
    return table(["model", "batch", "precision", "way", "machine", "ms a step", "date"], rows)


def pictures(stems: Iterable[str]) -> str:
    """The plots of each result, as images."""
    return "\n\n".join(f"![{stem}](plots/{stem}.png)" for stem in sorted(stems)) or "none"


# ---- published figures -----------------------------------------------------------------------


def _ours(results: Results, w: Workload) -> list[list[str]]:
    model, mode, batch, precisions, dropout = w.match
    rows = []
    for precision in precisions:
        fits = [
            r for r in of_kind(results, "bench").values()
            if r["machine"]["device"] != "cpu" and r["dropout"] == dropout and r["rows"]
            and (r["model"].rpartition(":")[2], r["mode"], r["batch"], r["precision"])
            == (model, mode, batch, precision)
        ]  # fmt: skip
        found = max(fits, key=lambda r: r["date"], default=None)
        ms = ours_ms(found) if found else None
        if found is None or ms is None:
            rows.append([f"**graphnet, {precision}**", NOT_MEASURED, "-", "-"])
            continue
        for name, value in [("graphnet", ms), *_peers(found)]:
            rows.append([
                f"**{name}, {precision}, {machine(found)}**", f"{value:.4g}", "-",
                f"{1e3 * batch / value:,.0f}",
            ])  # fmt: skip
    return rows


def _peers(result: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Torch's bests in our own run."""
    ms = {row["name"]: row["ms"]["median"] for row in result["rows"] if not row["failure"]}
    return [(f"torch: {n}", ms[n]) for k, n in result["best"].items() if k != "graphnet"]


def history(results: Results) -> str:
    """Published figures beside ours, workload by workload."""
    parts = []
    for w in WORKLOADS:
        rows = _ours(results, w)
        for f in w.figures:
            pair = f"{f.parts[0]:g} / {f.parts[1]:g}" if f.parts else "-"
            rows.append([f.who, f"{f.ms:g}", pair, f"{1e3 * w.images / f.ms:,.0f}"])
        head = ["who", "ms", "forward / backward", "images/s"]
        said = f"Published in {w.source}. {w.note}".rstrip()
        parts += [f"### {w.title}", table(head, rows), said, f"```\n{w.command}\n```"]
    return "\n\n".join(parts)


# ---- pages -----------------------------------------------------------------------------------


def sections(results: Results) -> dict[str, str]:
    """What stands between the markers, by name."""
    from benchmarks.plots import wanted

    return {
        "results": benches(results), "goals": goals(results), "mnist": mnist(results),
        "tuning": tuning(results), "steps": steps(results), "jax": jax(results),
        "streams": streams(results), "plots": pictures(wanted(results)),
        "history": history(results),
    }  # fmt: skip


def renewed(page: str, found: Mapping[str, str]) -> str:
    """The page with what its markers `<!-- name -->` to `<!-- /name -->` enclose replaced."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{found[match[1]]}\n<!-- /{match[1]} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", fill, page, flags=re.S)


def stale(results: Results | None = None) -> list[Path]:
    """The pages that differ from what the results say."""
    found = sections(read() if results is None else results)
    return [p for p in PAGES if renewed(p.read_text(), found) != p.read_text()]
