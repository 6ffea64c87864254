"""Compiles every launch of a plan for a GPU that need not be there, and reports what came out.

Binaries are cached on disk by everything that goes into them, and verified by SHA-256 when they
are read. A build that finds all of them starts no worker and imports no Triton.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import re
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphnet.errors import CompileError, ConfigError
from graphnet.lowering.build.descriptors import passed_box
from graphnet.lowering.build.pool import Pool
from graphnet.lowering.build.tools import arch_number, kernels_hash, ptxas
from graphnet.lowering.launch.cost import floor_us
from graphnet.lowering.launch.files import Source, materialise, private_dir, write_whole
from graphnet.lowering.launch.steps import Arg, Box, Launch, Table, bind
from graphnet.lowering.plan.plan import Plan

_COUNTS = (
    "registers", "spill_bytes", "shared_bytes", "wgmma", "mma", "tma", "cp_async",
    "float_atomics", "compile_s", "name",
)  # fmt: skip
_FILES = ("cubin", "ptx", "meta")  # the binary, its text, and what Triton's launcher must know

_REPORTED = (
    "binary", "config", "registers", "spill_bytes", "shared_bytes", "wgmma", "tma", "cp_async",
    "float_atomics",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One launch and its binary.

    binary     names the code: SHA-256 of everything that decides it (`key_of`)
    config     tile sizes, warps and stages
    cached     it was not compiled now; `compile_s` is what that took when it was
    floor_us   on an H200
    """

    kernel: str
    layers: tuple[str, ...]
    binary: str
    config: dict[str, int]
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    flops: int
    bytes: int
    floor_us: float
    registers: int
    spill_bytes: int
    shared_bytes: int
    wgmma: int
    mma: int
    tma: int
    cp_async: int
    float_atomics: int
    compile_s: float
    name: str
    sha256: str
    cached: bool
    path: str

    def as_dict(self) -> dict[str, Any]:
        """The row in plain types, for JSON; a binary from the cache took no time to compile."""
        about = {k: getattr(self, k) for k in _REPORTED}
        seconds = 0.0 if self.cached else self.compile_s
        return {"name": self.kernel, "layers": list(self.layers), **about, "compile_s": seconds}


@dataclass(frozen=True)
class Report:
    """What a build made: one row per launch; launches that are alike share a binary."""

    arch: str
    precision: str
    rows: tuple[Row, ...]
    ptxas: str
    triton: str
    seconds: float
    peak_bytes: int

    @property
    def binaries(self) -> int:
        return len({r.sha256 for r in self.rows})

    @property
    def cache_hits(self) -> int:
        return sum(r.cached for r in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """The report in plain types, for JSON: what was asked of this build, and what it took."""
        return {
            "arch": self.arch, "precision": self.precision, "triton": self.triton,
            "ptxas": self.ptxas, "kernels": [r.as_dict() for r in self.rows],
            "total_s": round(self.seconds, 4), "cache_hits": self.cache_hits,
        }  # fmt: skip

    def __str__(self) -> str:
        head = (
            f"{len(self.rows)} launches, {self.binaries} binaries for {self.arch},"
            f" {self.precision}, triton {self.triton}, ptxas {self.ptxas},"
            f" {self.seconds:.2f} s, peak {self.peak_bytes / 2**20:.1f} MiB"
        )
        lines = [
            f"{'kernel':24} {'layers':20} {'grid':>12} {'warps':>5} {'regs':>4} {'spill':>5}"
            f" {'shared':>7} {'wgmma':>5} {'async':>5} {'tma':>3} {'floor us':>8}"
        ]
        for r in self.rows:
            grid = "x".join(map(str, r.grid))
            lines.append(
                f"{r.kernel:24} {', '.join(r.layers)[:20]:20} {grid:>12} {r.num_warps:>5}"
                f" {r.registers:>4} {r.spill_bytes:>5} {r.shared_bytes:>7} {r.wgmma:>5}"
                f" {r.cp_async:>5} {r.tma:>3} {r.floor_us:>8.2f}"
            )
        return "\n".join([head, *lines])


# ---- one launch -----------------------------------------------------------------------------


def _passed(a: Arg) -> Any:
    if isinstance(a, tuple):
        return [r.dtype for r in a]
    if isinstance(a, Box):
        return passed_box(a)
    if isinstance(a, Table):
        return a.ref.dtype
    return None if a is None else a.dtype


def request(launch: Launch, arch: int) -> dict[str, Any]:
    """A launch as the worker takes it: types of the pointers in place of names."""
    args, constants, options = bind(launch)
    driver = {"driver": launch.driver.text} if launch.driver else {}
    return {
        "module": launch.module,
        "kernel": launch.kernel,
        **driver,
        "args": [_passed(a) for a in args],
        "constants": {
            k: {"epilogue": v.text} if isinstance(v, Source) else v for k, v in constants.items()
        },
        "options": options,
        "grid": [1, 1, 1],  # no part of a binary
        "arch": arch,
    }


# Sizes of tiles begin with B; beside them stands how the work is shared out.
_TUNED = re.compile(r"B[A-Z]|BLOCK|SPLIT|PROGRAMS|ROWS|TILE|V")


def _config(launch: Launch) -> dict[str, int]:
    """What was chosen for a launch: tiles, shares of the work, warps and stages."""
    sizes = {k: v for k, v in launch.constants if type(v) is int and _TUNED.fullmatch(k)}
    return {**sizes, "num_warps": launch.num_warps, "num_stages": launch.num_stages}


def key_parts(work: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides the binary of a request, by name."""
    versions = {
        "templates": kernels_hash(), "triton": importlib.metadata.version("triton"),
        "ptxas": ptxas()[1],
    }  # fmt: skip
    return {**work, **versions}


def key_of(work: dict[str, Any]) -> str:
    """SHA-256 of everything that decides the binary."""
    return hashlib.sha256(json.dumps(key_parts(work), sort_keys=True).encode()).hexdigest()


def _seal(about: dict[str, Any]) -> str:
    """SHA-256 of an index entry, without the seal itself."""
    rest = {k: v for k, v in about.items() if k != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _cached(folder: Path, key: str) -> dict[str, Any] | None:
    """The index entry of a key, if it is whole and so are the files that it vouches for."""
    try:
        about = json.loads((folder / f"{key}.json").read_text())
        whole = about["seal"] == _seal(about) and all(
            hashlib.sha256((folder / f"{key}.{f}").read_bytes()).hexdigest() == about["files"][f]
            for f in _FILES
        )
        return about if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(folder: Path, key: str, answer: dict[str, Any], work: dict[str, Any]) -> dict[str, Any]:
    """Files what a worker has made; the index entry comes last, since it vouches for the rest.

    sha256   of the binary: what a proof on a GPU is about
    source   of what it was compiled: a launch that asks for anything else does not get it
    """
    texts = (answer["ptx"].encode(), answer["metadata"].encode())
    made = dict(zip(_FILES, (base64.b64decode(answer["cubin"]), *texts), strict=True))
    files = {f: hashlib.sha256(data).hexdigest() for f, data in made.items()}
    for f, data in made.items():
        write_whole(folder / f"{key}.{f}", data)
    about = {
        **{c: answer[c] for c in _COUNTS}, "sha256": files["cubin"], "source": answer["source"],
        "files": files, "parts": key_parts(work),
    }  # fmt: skip
    about = json.loads(json.dumps({**about, "seal": ""}))  # as it will be read
    about["seal"] = _seal(about)
    write_whole(folder / f"{key}.json", json.dumps(about, indent=1).encode())
    return about


def answers(
    launches: Sequence[Launch], arch: int
) -> tuple[list[tuple[str, dict[str, Any]]], set[str]]:
    """((key, what is known of the binary, or its "error") per launch, keys compiled now)."""
    folder = private_dir("binaries")
    work = [request(s, arch) for s in launches]
    keys = [key_of(w) for w in work]
    known = {k: _cached(folder, k) for k in dict.fromkeys(keys)}
    missing = {k: w for k, w in zip(keys, work, strict=True) if known[k] is None}
    # The longest compiles first: products, whose loops take the time.
    heavy = lambda p: 0 if p[1]["kernel"].startswith(("conv", "linear")) else 1

    def answered(key: str, answer: dict[str, Any]) -> None:  # at once: a stop loses what is open
        known[key] = answer if "error" in answer else _keep(folder, key, answer, missing[key])

    if missing:
        Pool(sorted(missing.items(), key=heavy), answered).run()
    return [(k, known[k] or {}) for k in keys], set(missing)


def compile_launches(
    launches: Sequence[Launch], arch: int = 90
) -> tuple[list[tuple[str, dict[str, Any]]], set[str]]:
    """((key, what is known of the binary) per launch, keys that were compiled now)."""
    found, fresh = answers(launches, arch)
    for s, (_, about) in zip(launches, found, strict=True):
        if "error" in about:
            raise CompileError(f"{s.kernel} does not compile: {about['error']}", **s.where.located)
    return found, fresh


def try_launches(launches: Sequence[Launch], arch: int = 90) -> list[dict[str, Any]]:
    """The facts about each launch's binary; for one that does not compile, "error" says why."""
    return [about for _, about in answers(launches, arch)[0]]


def build_plan(
    plan: Plan,
    *,
    arch: str = "sm_90",
    precision: str = "fp32",
    out: Any = None,
    start: float | None = None,
    before: Set[str] = frozenset(),
) -> Report:
    """Compiles the plan's launches; `out` receives binaries, PTX and generated files.

    The report's seconds count from `start`, a reading of `time.perf_counter`; `before` are keys
    that were compiled since.
    """
    start = time.perf_counter() if start is None else start
    number = arch_number(arch)
    into = _receiving(out) if out is not None else None
    found, compiled = compile_launches(plan.launches, number)
    fresh = compiled | before
    folder = private_dir("binaries")
    rows = []
    for s, (key, about) in zip(plan.launches, found, strict=True):
        rows.append(
            Row(
                s.kernel, s.where.layers, key, _config(s), s.grid, s.num_warps, s.num_stages,
                s.flops, s.bytes, floor_us(s.flops, s.bytes, s.math),
                **{c: about[c] for c in (*_COUNTS, "sha256")},
                cached=key not in fresh, path=str(folder / f"{key}.cubin"),
            )
        )  # fmt: skip
    if into is not None:
        _export(into, plan, found, folder)
    seconds = time.perf_counter() - start
    version = importlib.metadata.version("triton")
    report = Report(
        arch, precision, tuple(rows), ptxas()[1], version, seconds, plan.peak_bytes
    )  # fmt: skip
    if into is not None:
        write_whole(into / "report.json", json.dumps(report.as_dict(), indent=1).encode())
    return report


def _receiving(out: Any) -> Path:
    """The folder for the output, made before anything is compiled for it."""
    try:
        (Path(out) / "generated").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write to {out}: {error.strerror}", help="name another folder"
        ) from error
    return Path(out)


def _export(out: Path, plan: Plan, found: list[tuple[str, dict[str, Any]]], folder: Path) -> None:
    """Numbered binaries beside the generated files and the plan."""
    for k, (s, (key, _)) in enumerate(zip(plan.launches, found, strict=True)):
        for suffix in ("cubin", "ptx"):
            write_whole(
                out / f"{k:02d}-{s.kernel}.{suffix}", (folder / f"{key}.{suffix}").read_bytes()
            )
        for source in s.generated:
            materialise(source, out / "generated")
    write_whole(out / "plan.txt", str(plan).encode())
