#!/usr/bin/env python3
"""How long our step takes, and each launch in it.

    python benchmarks/steps.py alexnet --batch 128 --precision bf16 --json FILE
    python benchmarks/steps.py alexnet --batch 32,64,128 --precision bf16 --no-launches --beside

One run for each batch: replays of the captured step, calls, `step.run`, the time of the host, and a
table of launches. FILE keeps the runs of several processes; a run of the same work is replaced.
A launch is timed twice: in its step between two events (`us`), and alone in a graph of repetitions
(`alone_us`), where what it reads may still lie in the cache. `share` is that of its time which the
GPU's arithmetic or memory needs at the least. `--streams 0,1,16` replays the step under each of
these GRAPHNET_STREAMS in the same rounds, once they have been seen to compute the same bits.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import graphnet as gn  # noqa: E402
from graphnet import config  # noqa: E402
from graphnet.bench import facts, layers, ours, peers  # noqa: E402
from graphnet.bench.peers import Variant, Work  # noqa: E402
from graphnet.bench.result import SCHEMA  # noqa: E402
from graphnet.bench.rounds import (  # noqa: E402
    Contestant,
    Quartiles,
    Run,
    measure,
    ratio,
    sentence,
    start,
)
from graphnet.errors import GraphnetError, NumericsError  # noqa: E402
from graphnet.frontends.loading import input_shape, load_model  # noqa: E402
from graphnet.lowering.launch.cost import CEILINGS, floor_us  # noqa: E402
from graphnet.lowering.launch.steps import Launch  # noqa: E402
from graphnet.lowering.watch import gpu_here  # noqa: E402
from graphnet.train.checkpoint import atomic_write  # noqa: E402

REPEATS = 20  # of a launch in its graph
ROUNDS = 9


def work_of(model: str, batch: int, precision: str, mode: str, device: torch.device) -> Work:
    """The net and one batch of random images on the device."""
    net = load_model(model)
    shape = input_shape(net, batch)
    classes = net.summary((1, *shape[1:])).rows[-1].output[-1]
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(shape, generator=g), torch.randint(0, classes, (batch,), generator=g)
    sgd = gn.SGD(lr=0.01, momentum=0.9, weight_decay=5e-4) if mode == "train" else None
    return Work(net, x.to(device), y.to(device), mode, sgd, precision)


# ---- the step --------------------------------------------------------------------------------


def replays(program: Any) -> Run:
    """The captured step alone."""

    def replay(steps: int) -> None:
        for _ in range(steps):
            program._run()

    return replay


def step_times(
    work: Work, target: str, program: Any, seconds: float, beside: bool, streams: list[int]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """(a row for each way to step: replay, call, run, under other GRAPHNET_STREAMS, torch's eager;
    failures by name)."""
    mine, failures = ours.start_all(work, target)
    ways = [start("replay", "replay", lambda: replays(program), work.device), *mine]
    under, why = start_streams(work, target, streams)
    ways, failures = ways + under, failures | why
    if beside:
        try:
            ways.append(start_eager(work))
        except Exception as error:  # torch's failure is a result
            failures["eager"] = sentence(error)
    times = measure(ways, rounds=ROUNDS, seconds=seconds)
    rows = {c.name: row_of_way(c, times, work.x.shape[0]) for c in ways}
    return rows, failures


def start_streams(
    work: Work, target: str, streams: list[int]
) -> tuple[list[Contestant], dict[str, str]]:
    """Replays of the step under each GRAPHNET_STREAMS; why one is missing, by name: also where its
    first step leaves other bits than that of the first one."""
    out, failures = [], {}
    want: dict[str, torch.Tensor] = {}
    for n in streams:
        name, net = f"streams {n}", work.net.copy()
        try:
            with config.override(STREAMS=str(n)):
                program = ours.compiled(replace(work, net=net), target, alone=False)
            found = {"loss": answer(program, work)} | net.state_dict()
            want = want or found
            if wrong := [k for k, v in found.items() if not torch.equal(v, want[k])]:
                raise NumericsError(f"other bits than streams {streams[0]}: {', '.join(wrong)}")
            out.append(start(name, "replay", lambda p=program: replays(p), work.device))  # type: ignore[misc]
        except Exception as error:  # the others are still measured
            failures[name] = sentence(error)
    return out, failures


def answer(program: Any, work: Work) -> torch.Tensor:
    """What the program returns for the batch, its loss where there is one."""
    made = program(work.x) if work.mode == "infer" else program(work.x, work.y)
    return (made[0] if isinstance(made, tuple) else made).clone()


def start_eager(work: Work) -> Contestant:
    """What was the best of torch's eager variants wherever all were measured."""
    sgd = "fused" if work.mode == "train" else ""
    v = Variant("eager", "channels_last", sgd, "autocast" if work.precision == "bf16" else "")
    return start(v.name, "eager", lambda: peers.build(work, v), work.device)


def row_of_way(c: Contestant, times: Any, batch: int) -> dict[str, Any]:
    t = times[c.name]
    return {
        "ms": asdict(t.steady), "images_per_s": 1e3 * batch / t.steady.median,
        "host_us": asdict(Quartiles.of(t.host_us)) if t.host_us else None,
        "first_s": c.cold_s, "peak_bytes": c.peak_bytes,
        "ratio": asdict(ratio(t, times[ours.OURS])),
    }  # fmt: skip


def compile_seconds(
    args: argparse.Namespace, batch: int
) -> tuple[dict[str, float] | None, dict[str, str]]:
    """Seconds of import and compilation in a process of its own, over empty caches and again; and
    why there are none."""
    out = {}
    with tempfile.TemporaryDirectory() as caches:
        fresh = {"GRAPHNET_CACHE_DIR": f"{caches}/graphnet", "TRITON_CACHE_DIR": f"{caches}/triton"}
        for name in ("cold_s", "warm_s"):
            command = [
                sys.executable, __file__, args.model, "--batch", str(batch), "--precision",
                args.precision, "--mode", args.mode, "--target", args.target, "--warm",
            ]  # fmt: skip
            done = subprocess.run(
                command, env={**os.environ, **fresh}, capture_output=True, text=True
            )
            if done.returncode:
                said = " ".join(done.stderr.split())[-200:]
                return None, {"compile": f"exit {done.returncode}: {said}"}
            out[name] = float(done.stdout.split()[-1])
    return out, {}


# ---- its launches ----------------------------------------------------------------------------


def launch_rows(program: Any, feed: tuple[torch.Tensor, ...], alone: bool) -> list[dict[str, Any]]:
    """A row for each launch, fill, copy or task, in order."""
    gpu = gpu_here() or next(iter(CEILINGS))
    rows = []
    for part, us, call in layers.times_of(program, feed):
        row = layers.row_of(part, program.plan) | {"us": round(us, 3), **chosen(part)}
        row["alone_us"] = alone_us(call) if alone and program.target == "cuda" else None
        row["floor_us"] = None
        if program.target == "cuda":  # the ceilings that are known are those of GPUs
            math = getattr(part, "math", "ieee")
            row["floor_us"] = round(floor_us(row["flops"], row["bytes"], math, gpu), 3)
        rows.append(row)
    return rows


def chosen(part: Any) -> dict[str, Any]:
    """The variant and the configuration of a launch, as far as it has any."""
    if not isinstance(part, Launch):
        return {"variant": "", "config": {}, "source": "", "grid": []}
    options = {"num_warps": part.num_warps, "num_stages": part.num_stages}
    found = {"variant": "", "config": options, "source": "", "grid": list(part.grid)}
    if (c := part.choice) is not None:
        config = c.config.as_dict() | options
        found |= {"variant": c.variant.name, "config": config, "source": c.origin or c.source}
    return found


def alone_us(call: Any) -> float:
    """Microseconds of a launch, by replays of a graph that holds it many times."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.graph(graph, stream=side):
        for _ in range(REPEATS):
            call()
    graph.replay()
    found = []
    for _ in range(5):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        a.record()
        graph.replay()
        b.record()
        b.synchronize()
        found.append(1e3 * a.elapsed_time(b) / REPEATS)
    return round(statistics.median(found), 3)


# ---- runs ------------------------------------------------------------------------------------


def run(args: argparse.Namespace, batch: int, device: torch.device) -> dict[str, Any]:
    """Everything about one batch; what cannot be measured says why."""
    result: dict[str, Any] = {
        "model": args.model, "batch": batch, "mode": args.mode, "precision": args.precision,
        "target": args.target, "date": facts.now(), "failure": "", "compile": None, "ways": {},
        "failures": {}, "launches": None, "plan_bytes": None, "clocks": None,
        "streams": args.streams,
    }  # fmt: skip
    try:
        if args.cold:
            result["compile"], result["failures"] = compile_seconds(args, batch)
        work = work_of(args.model, batch, args.precision, args.mode, device)
        with peers.torch_flags(args.precision):
            program = ours.compiled(work, args.target)
            feed = (work.x,) if work.mode == "infer" else (work.x, work.y)
            program(*feed)
            result["plan_bytes"] = program.plan.peak_bytes or None
            result["ways"], failures = step_times(
                work, args.target, program, args.seconds, args.beside, args.streams
            )
            result["failures"] |= failures
            result["clocks"] = facts.clocks(device)
            if args.launches:
                result["launches"] = launch_rows(program, feed, args.alone)
    except Exception as error:  # the other batches still run
        result["failure"] = sentence(error)
    return result


def text(r: dict[str, Any]) -> str:
    """A run as a table, the slowest launch first."""
    lines = [f"{r['model']} {r['mode']}, batch {r['batch']}, {r['precision']}, {r['target']}"]
    if r["compile"]:
        c = r["compile"]
        lines.append(f"  compile in a new process: {c['cold_s']:.1f} s, again {c['warm_s']:.1f} s")
    for name, w in r["ways"].items():
        host = "" if w["host_us"] is None else f", host {w['host_us']['median']:.0f} us"
        lines.append(
            f"  {name:40} {w['ms']['median']:9.4f} ms {w['images_per_s']:11,.0f} images/s"
            f" {w['ratio']['median']:6.2f} x ours{host}"
        )
    lines += [f"  {name}: {why}" for name, why in r["failures"].items()]
    if r["failure"]:
        lines.append(f"  failed: {r['failure']}")
    if r["launches"]:
        lines += launch_table(r["launches"])
    return "\n".join(lines)


def launch_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"  {'launch':26} {'layers':22} {'us':>8} {'alone':>8} {'TFLOP/s':>8} {'GB/s':>6}"
             f" {'floor':>7} {'share':>5}  configuration"]  # fmt: skip
    for row in sorted(rows, key=lambda row: -row["us"]):
        config = " ".join(f"{k}{v}" for k, v in row["config"].items())
        us, floor = max(row["us"], 1e-3), row["floor_us"]
        share = "-" if floor is None else f"{floor / us:.0%}"
        lines.append(
            f"  {row['name'][:26]:26} {', '.join(row['layers'])[:22]:22} {us:8.1f}"
            f" {_cell(row['alone_us'], 8)} {row['flops'] / us / 1e6:8.1f}"
            f" {row['bytes'] / us / 1e3:6.0f} {_cell(floor, 7)} {share:>5}"
            f"  {row['variant']} {config}".rstrip()
        )
    sums = [sum(row[k] or 0.0 for row in rows) for k in ("us", "alone_us", "floor_us")]
    all_of_them = f"{len(rows)} in all"
    lines.append(f"  {all_of_them:49} {sums[0]:8.1f} {sums[1]:8.1f} {'':15} {sums[2]:7.1f}")
    return lines


def _cell(value: float | None, width: int) -> str:
    return "-".rjust(width) if value is None else f"{value:{width}.1f}"


def add(path: Path, machine: dict[str, Any], found: dict[str, Any]) -> None:
    """Adds a run to a file that other processes add to as well."""
    work = ("model", "batch", "mode", "precision", "target")
    key = lambda r: [*(r[k] for k in work), bool(r.get("streams"))]
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = {
            "schema": SCHEMA, "kind": "steps", "date": facts.now(), "machine": machine,
            "versions": facts.versions(), "runs": [],
        }  # fmt: skip
        if path.exists():
            result["runs"] = [
                r for r in json.loads(path.read_text())["runs"] if key(r) != key(found)
            ]
        result["runs"].append(found)
        atomic_write(path, (json.dumps(result, indent=1) + "\n").encode())
    path.with_suffix(".lock").unlink(missing_ok=True)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    given = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    yes_no = argparse.BooleanOptionalAction
    given.add_argument("model", help="a name, FILE.py:ATTRIBUTE or FILE.onnx")
    batches = lambda t: [int(b) for b in t.split(",")]  # and other numbers
    given.add_argument("--batch", type=batches, default=[128], help="one, or several: 32,64,128")
    given.add_argument("--precision", default="bf16", choices=("fp32", "tf32", "bf16"))
    given.add_argument("--mode", default="train", choices=peers.MODES)
    given.add_argument("--target", default="auto", choices=("auto", "cuda", "cpu"))
    given.add_argument("--seconds", type=float, default=4.0, help="of the rounds of a batch")
    given.add_argument("--launches", action=yes_no, default=True, help="time each launch")
    given.add_argument("--alone", action=yes_no, default=True, help="time launches alone as well")
    given.add_argument("--beside", action="store_true", help="torch's eager in the same rounds")
    given.add_argument("--streams", type=batches, default=[], help="under GRAPHNET_STREAMS: 0,1,16")
    given.add_argument("--cold", action="store_true", help="compile over empty caches, too")
    given.add_argument("--warm", action="store_true", help="compile, print the seconds, and end")
    given.add_argument("--json", type=Path, help="file to add to, or a folder for it")
    args = given.parse_args(argv)
    if args.target == "auto":
        args.target = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    device = torch.device(args.target)
    if args.warm:
        for batch in args.batch:
            work = work_of(args.model, batch, args.precision, args.mode, device)
            for n in args.streams or [config.streams()]:
                with config.override(STREAMS=str(n)):
                    ours.compiled(work, args.target)
        print(f"{time.perf_counter() - BEGAN:.2f}")
        return 0
    machine = facts.machine(device)
    path = args.json
    if path is not None and path.is_dir():
        path = path / f"{facts.gpu_slug(machine['device'])}-steps-{facts.now()[:10]}.json"
    failed = False
    for batch in args.batch:
        found = run(args, batch, device)
        failed |= bool(found["failure"])
        print(text(found), flush=True)
        if path is not None:
            add(path, machine, found)
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GraphnetError as error:
        print(f"steps: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
