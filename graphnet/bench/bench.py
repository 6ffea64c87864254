"""`graphnet bench`: one net, our step beside torch's, as a table and as JSON.

The file is rewritten after every round, so that an interrupted run keeps what it has.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import graphnet as gn
from graphnet import __version__, config
from graphnet.api import _device, _resolve
from graphnet.bench import parity
from graphnet.bench.peers import KINDS, Work, peers
from graphnet.bench.rounds import Run, Timing, measure, ratio
from graphnet.errors import ConfigError, NumericsError
from graphnet.frontends.loading import input_shape, load_model
from graphnet.train.checkpoint import atomic_write

SCHEMA = 1
OURS = "graphnet"
# What is left out, by the names of the passes.
ABLATIONS = {
    "fusion": "fuse_pairs,fuse_epilogues,fuse_updates,fuse_copies,fuse_chains",
    "update-fusion": "fuse_updates,fuse_copies",
    "layout": "layout",
}


@dataclass(frozen=True)
class BenchConfig:
    """What `graphnet bench` was asked for."""

    model: str
    batch: int = 128
    train: bool = True
    precision: str = "fp32"
    target: str = "auto"
    against: tuple[str, ...] = ("eager",)
    ablate: tuple[str, ...] = ()
    rounds: int = 15
    seconds: float = 20.0
    parity_steps: int = 100


def _one_of(what: str, names: tuple[str, ...], known: Any) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown {what} {name!r}", help=f"one of {', '.join(known)}")


def _loop(call: Callable[[], Any], device: torch.device) -> Run:
    def run(steps: int) -> None:
        for _ in range(steps):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def _ours(c: BenchConfig, work: Work, target: str, off: str = "") -> Run:
    """Our step or inference on the batch, through the public call."""
    shape = tuple(work.x.shape)
    sgd = {"loss": gn.CrossEntropyLoss(), "optimizer": work.sgd} if work.training else {}
    with config.override(DISABLE=off):
        program: Any = gn.compile(
            work.net.copy(), shape, target=target, precision=c.precision, **sgd
        )
    feed = (work.x, work.y) if work.training else (work.x,)
    return _loop(lambda: program(*feed), program.device)


def _machine(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "device": "cpu", "threads": torch.get_num_threads(), "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    if device.type == "cuda":
        facts |= {"device": torch.cuda.get_device_name(device)}
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "")


def _flags() -> dict[str, Any]:
    return {
        "matmul_allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "grad_mode": "training: on; inference: torch.inference_mode()",
    }


def run_bench(
    c: BenchConfig, out: Path | None = None, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Runs the benchmark and returns what the JSON file holds.

    NumericsError where the two sides do not learn the same: no speed is reported then.
    """
    _one_of("baseline", c.against, KINDS)
    _one_of("ablation", c.ablate, ABLATIONS)
    target = _resolve(c.target)
    device = _device(target)
    if c.precision != "fp32" or target != "cpu":
        raise ConfigError(
            "baselines exist for the cpu target in fp32", help="--target cpu --precision fp32"
        )
    net = load_model(c.model)
    shape = input_shape(net, c.batch)
    classes = net.summary((1, *shape[1:])).rows[-1].output[-1]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g)
    y = torch.randint(0, classes, (c.batch,), generator=g)
    sgd = gn.SGD(lr=0.01, momentum=0.9, weight_decay=5e-4) if c.train else None
    work = Work(net, x.to(device), y.to(device), sgd)
    result: dict[str, Any] = {
        "schema": SCHEMA, "model": c.model, "batch": c.batch,
        "mode": "train" if c.train else "infer", "precision": c.precision, "target": target,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "machine": _machine(device),
        "versions": {
            "graphnet": __version__, "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "flags": _flags(), "parity": None, "rounds": 0, "rows": [], "best": None, "ratio": None,
    }  # fmt: skip

    def save() -> None:
        if out is not None:
            atomic_write(out, (json.dumps(result, indent=1) + "\n").encode())

    if c.train and c.parity_steps:
        compiled = lambda twin: gn.compile(
            twin, shape, target=target, precision=c.precision, loss=gn.CrossEntropyLoss(),
            optimizer=sgd,
        )  # fmt: skip
        found = parity.check(
            net, shape, compiled, sgd, c.precision, c.parity_steps, classes, device
        )
        result["parity"] = {**asdict(found), "ok": found.ok}
        save()
        say(str(found))
        if not found.ok:
            raise NumericsError(str(found), help="no speed is reported for wrong results")
    contestants = {OURS: _ours(c, work, target)}
    contestants |= {
        f"{OURS} without {name}": _ours(c, work, target, ABLATIONS[name]) for name in c.ablate
    }
    tried = peers(work, c.against)
    contestants |= {p.name: p.run for p in tried if p.run is not None}
    kinds = {p.name: p.kind for p in tried}
    failed = [_failure(p.name, p.kind, p.failure) for p in tried if p.run is None]

    def note(times: dict[str, Timing]) -> None:
        result["rows"] = _rows(times, kinds, c.batch) + failed
        result["rounds"] = len(times[OURS].ms)
        result["best"] = _best(times, kinds)
        result["ratio"] = {
            kind: asdict(ratio(times[name], times[OURS])) for kind, name in result["best"].items()
        }
        save()

    note(measure(contestants, rounds=c.rounds, seconds=c.seconds, on_round=note))
    say(table(result))
    return result


def _failure(name: str, kind: str, why: str) -> dict[str, Any]:
    return {"name": name, "kind": kind, "failure": why}


def _rows(times: dict[str, Timing], kinds: dict[str, str], batch: int) -> list[dict[str, Any]]:
    out = []
    for name, t in times.items():
        q = t.steady
        out.append({
            "name": name, "kind": kinds.get(name, OURS), "cold_s": t.cold_s, "warm_s": t.warm_s,
            "ms": asdict(q), "images_per_s": 1e3 * batch / q.median,
            "ratio": asdict(ratio(t, times[OURS])), "failure": "",
        })  # fmt: skip
    return out


def _best(times: dict[str, Timing], kinds: dict[str, str]) -> dict[str, str]:
    """The quickest variant of each kind."""
    out: dict[str, str] = {}
    for name, kind in kinds.items():
        if name in times and (
            kind not in out or times[name].steady.median < times[out[kind]].steady.median
        ):
            out[kind] = name
    return out


def _span(q: dict[str, float], digits: int) -> str:
    low, high = (f"{q[k]:.{digits}f}" for k in ("low", "high"))
    return f"{q['median']:.{digits}f} ({low}-{high})"


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    r = result
    lines = [
        f"{r['model']} {r['mode']}, batch {r['batch']}, {r['precision']}, target {r['target']}, "
        f"{r['machine']['threads']} threads, {r['rounds']} interleaved rounds; median (quartiles)",
        f"{'':34} {'ms':>22} {'images/s':>10} {'/ ours':>20} {'first s':>8}",
    ]
    best = set((r["best"] or {}).values())
    for row in sorted(r["rows"], key=lambda row: row.get("ms", {}).get("median", float("inf"))):
        mark = "*" if row["name"] in best else " "
        if row["failure"]:
            lines.append(f"{mark} {row['name']:<32} failed: {row['failure']}")
            continue
        lines.append(
            f"{mark} {row['name']:<32} {_span(row['ms'], 3):>22} {row['images_per_s']:>10,.0f} "
            f"{_span(row['ratio'], 3):>20} {row['cold_s']:>8.2f}"
        )
    lines += [
        f"{kind}'s best is {name}: {_span(r['ratio'][kind], 3)} times our time"
        for kind, name in (r["best"] or {}).items()
    ]
    return "\n".join(lines)
