"""What a bench found, as JSON and as text. `benchmarks/schema.json` describes the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from graphnet.bench.counts import Counts
from graphnet.bench.ours import OURS
from graphnet.bench.rounds import Contestant, Quartiles, Timing, best, ratio

SCHEMA = 2


@dataclass
class Found:
    """The measurements: by group of contestants that ran in the same rounds.

    kinds     of every contestant
    groups    times by name; ours are in each group
    failures  why a contestant has no times
    """

    batch: int
    kinds: dict[str, str] = field(default_factory=dict)
    started: dict[str, Contestant] = field(default_factory=dict)  # without what they hold
    groups: list[dict[str, Timing]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    counts: dict[str, Counts] = field(default_factory=dict)

    def all_times(self, name: str) -> Timing:
        """The times of a contestant over all groups."""
        parts = [g[name] for g in self.groups if name in g]
        return Timing([t for p in parts for t in p.ms], [t for p in parts for t in p.host_us])

    def names(self, kind: str) -> list[str]:
        timed = {name for g in self.groups for name in g}
        return [name for name, k in self.kinds.items() if k == kind and name in timed]

    def best(self) -> dict[str, str]:
        """The quickest of each kind, ours first."""
        kinds = [k for k in dict.fromkeys(self.kinds.values()) if k != "ablation"]
        times = {name: self.all_times(name) for name in self.kinds}
        return {k: best(times, names) for k in kinds if (names := self.names(k))}

    def ratio(self, name: str) -> Quartiles:
        """Its time over that of our best, within each round."""
        ours = self.best()[OURS]
        group = next(g for g in self.groups if name in g)
        if self.kinds[name] == OURS:
            return ratio(self.all_times(name), self.all_times(ours))
        return ratio(group[name], group[ours])

    def as_dict(self) -> dict[str, Any]:
        """The part of the result that the measurements are."""
        top = self.best()
        return {
            "rows": [self._row(n) for k in [*top, "ablation"] for n in self.names(k)]
            + [self._failed(name, why) for name, why in self.failures.items()],
            "best": top,
            "ratio": {k: asdict(self.ratio(n)) for k, n in top.items() if k != OURS},
        }

    def _row(self, name: str) -> dict[str, Any]:
        t, c = self.all_times(name), self.started[name]
        q = t.steady
        return {
            "name": name, "kind": self.kinds[name], "failure": "", "cold_s": c.cold_s,
            "warm_ms": list(c.warm_ms), "ms": asdict(q), "rounds": len(t.ms),
            "images_per_s": 1e3 * self.batch / q.median,
            "host_us": asdict(Quartiles.of(t.host_us)) if t.host_us else None,
            "peak_bytes": c.peak_bytes, **asdict(self.counts.get(name, Counts())),
            "ratio": asdict(self.ratio(name)),
        }  # fmt: skip

    def _failed(self, name: str, why: str) -> dict[str, Any]:
        return {"name": name, "kind": self.kinds[name], "failure": why}


# ---- text ------------------------------------------------------------------------------------


def span(q: Mapping[str, float], digits: int) -> str:
    """ "1.25 (1.21-1.30)": median and quartiles."""
    low, high = (f"{q[k]:.{digits}f}" for k in ("low", "high"))
    return f"{q['median']:.{digits}f} ({low}-{high})"


def _milliseconds(q: Mapping[str, float]) -> str:
    return span(q, 4 if q["median"] < 0.1 else 3)


def table(result: Mapping[str, Any]) -> str:
    """The result as text: contestants from quickest to slowest, then the ratios."""
    r = result
    where = r["machine"]["device"]
    where = f"{r['machine']['threads']} threads" if where == "cpu" else where
    lines = [
        f"{r['model']} {r['mode']}, batch {r['batch']}, {r['precision']}, target {r['target']}, "
        f"{where}, interleaved rounds; median (quartiles)",
        f"{'':42} {'ms':>24} {'images/s':>10} {'/ ours':>20} {'first s':>8} {'warm ms':>9}"
        f" {'host us':>8} {'peak MB':>8} {'launches':>8}",
    ]
    lines.insert(1, _setting(r))
    top = set((r["best"] or {}).values())
    for row in sorted(r["rows"], key=lambda row: row.get("ms", {}).get("median", float("inf"))):
        mark = "*" if row["name"] in top else " "
        if row["failure"]:
            why = row["failure"]
            why = why if why.startswith("not applicable") else f"failed: {why}"
            lines.append(f"{mark} {row['name']:<40} {why}")
            continue
        warm = sorted(row["warm_ms"])[len(row["warm_ms"]) // 2]
        count = row["launches"] if row["launches"] is not None else row["operators"]
        lines.append(
            f"{mark} {row['name']:<40} {_milliseconds(row['ms']):>24} {row['images_per_s']:>10,.0f}"
            f" {span(row['ratio'], 3):>20} {row['cold_s']:>8.2f} {warm:>9.3f}"
            f" {_cell(row['host_us'] and row['host_us']['median'], 1):>8}"
            f" {_cell(row['peak_bytes'] and row['peak_bytes'] / 1e6, 0):>8} {_cell(count, 0):>8}"
        )
    if r["target"] == "cpu":
        lines.append("launches: on a CPU the operators of torch that a step calls")
    lines += [
        f"{kind}'s best is {name}: {span(r['ratio'][kind], 3)} times our time"
        for kind, name in (r["best"] or {}).items()
        if kind in r["ratio"]
    ]
    return "\n".join(lines)


def _setting(r: Mapping[str, Any]) -> str:
    """Versions and flags, as far as they decide how quick torch is."""
    on = lambda name: "on" if r["flags"][name] else "off"
    parts = [f"torch {r['versions']['torch']}"]
    if r["target"] == "cuda":
        parts += [f"driver {r['machine']['driver']}", f"ptxas {r['versions']['ptxas']}"]
        parts += [f"{c['clocks.sm']}, {c['power.draw']}" for c in r["clocks"][-1:]]
    parts.append(f"TF32 in matrix products {on('matmul_allow_tf32')}")
    parts.append(f"in cuDNN {on('cudnn_allow_tf32')}, cudnn.benchmark {on('cudnn_benchmark')}")
    return ", ".join(parts)


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def layer_table(layers: Mapping[str, Any]) -> str:
    """Where the time goes: torch's layers, then our launches."""
    lines = [f"{layers['variant']} by layer, us:"]
    lines += _columns(
        ["", "forward", "backward"],
        [
            [row["layer"], f"{row['forward_us']:.1f}", _cell(row.get("backward_us"), 1)]
            for row in layers["torch"]
        ],
    )
    lines.append("ours by launch, us:")
    total = sum(row["us"] for row in layers["graphnet"])
    lines += _columns(
        ["", "layers", "us", "share", "GFLOP/s", "GB/s"],
        [
            [row["name"], ", ".join(row["layers"]) or "-", f"{row['us']:.1f}",
             f"{row['us'] / total:.0%}", f"{row['flops'] / row['us'] / 1e3:.0f}",
             f"{row['bytes'] / row['us'] / 1e3:.0f}"]
            for row in layers["graphnet"]
        ],
    )  # fmt: skip
    return "\n".join(lines)


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [head, *([c if len(c) <= 40 else c[:37] + "..." for c in row] for row in rows)]
    width = [max(map(len, column)) for column in zip(*cells, strict=True)]
    text = 2 if len(head) > 3 else 1  # columns of text, then of numbers
    return [
        "  "
        + "  ".join(
            c.ljust(w) if k < text else c.rjust(w)
            for k, (c, w) in enumerate(zip(row, width, strict=True))
        ).rstrip()
        for row in cells
    ]
