"""What was measured: tables in the repository, one a GPU, and a cache on disk.

A table is JSON, `tuned/<gpu>.json`. A row says what a configuration of a variant took for a problem
on that GPU, and who measured it: "graphnet" (our kernel, in its place) or "prototype" (a kernel of
the same structure alone, without masks, bias sums and dropout). A row is advice and never expires:
it decides as long as its variant is there and accepts the equation, and its binary compiles without
spills. Whether a binary is right is another question (proof.py).

The cache holds what `graphnet tune` found on this machine, a file for each row. A damaged file
is ignored, and its problem is searched again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from graphnet.errors import CompileError, ConfigError
from graphnet.lowering.build.build import ptxas
from graphnet.lowering.launch.choice import Measured
from graphnet.lowering.launch.config import Config
from graphnet.lowering.launch.files import private_dir, write_whole
from graphnet.lowering.launch.registry import by_op
from graphnet.lowering.launch.variants import Problem

FOLDER = Path(__file__).with_name("tuned")
SOURCES = ("graphnet", "prototype")
# A GPU without rows of its own for a problem borrows those of a sibling, as "h100" for example.
SIBLINGS = {"h200": "h100"}


class TuningWarning(UserWarning):
    """A row of a table or a file of the cache was left out."""


Key = tuple[str, Problem]


@dataclass(frozen=True)
class Entry:
    """What a configuration took.

    us       median of the launches that compute the problem on `gpu`; `rule_us` with the rules'
             choice in the same rounds
    gpu      model, and processors where they are not that model's usual number
    versions Triton and assembler, for people
    """

    variant: str
    problem: Problem
    config: Config
    us: float
    source: str
    gpu: str
    date: str
    rule_us: float | None = None
    versions: str = ""

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ConfigError(
                f"unknown source {self.source!r} of a row", help=f"one of {', '.join(SOURCES)}"
            )

    @property
    def key(self) -> Key:
        return self.variant, self.problem

    def as_dict(self) -> dict[str, Any]:
        """Plain types, without the fields that are not set."""
        p = self.problem
        out = {
            "op": p.op, "shape": list(p.shape), "dtype": p.dtype, "variant": self.variant,
            "config": self.config.as_dict(), "us": self.us, "source": self.source,
            "gpu": self.gpu, "date": self.date, "rule_us": self.rule_us, "versions": self.versions,
        }  # fmt: skip
        return {k: v for k, v in out.items() if v not in (None, "")}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Entry:
        """The inverse; ConfigError where it does not hold an entry."""
        rest = dict(data)
        try:
            p = Problem(rest.pop("op"), tuple(rest.pop("shape")), rest.pop("dtype"))
            if len(p.axes) != len(p.shape):
                raise ValueError(f"{p.op} has {len(p.axes)} sizes: {', '.join(p.axes)}")
            return cls(problem=p, config=Config(**rest.pop("config")), **rest)
        except (TypeError, KeyError, ValueError) as error:
            raise ConfigError(f"no tuning entry: {error!r} in {data!r}") from None


def versions() -> str:
    """Triton and the assembler, as entries name them."""
    return f"triton {importlib.metadata.version('triton')}, ptxas {ptxas()[1]}"


# ---- files -----------------------------------------------------------------------------------


def shipped(gpu: str) -> list[Entry]:
    """The table in the repository for a GPU; empty where there is none."""
    path = FOLDER / f"{gpu}.json"
    return read(path) if path.exists() else []


def read(path: Path) -> list[Entry]:
    """The entries of a table; ConfigError for a file that is none."""
    try:
        return [Entry.from_dict(e) for e in json.loads(path.read_text())["entries"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no tuning table: {error}") from None


def write(path: Path, gpu: str, entries: Iterable[Entry]) -> None:
    """Writes a table, sorted. Of our own rows for one variant and problem the latest stays, of
    prototypes each configuration."""
    kept: dict[Any, Entry] = {}
    for e in entries:
        kept[e.source, *e.key, e.config if e.source == "prototype" else None] = e
    rows = sorted(kept.values(), key=lambda e: (str(e.problem), e.source, e.us, e.variant))
    body = ",\n  ".join(json.dumps(e.as_dict()) for e in rows)
    write_whole(path, f'{{"gpu": {json.dumps(gpu)},\n "entries": [\n  {body}\n ]}}\n'.encode())
    path.chmod(0o644)


def _cache_file(entry: Entry) -> Path:
    p = entry.problem
    about = [entry.gpu, entry.variant, p.op, list(p.shape), p.dtype]
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    return private_dir("tuning") / f"{name[:32]}.json"


def remember(entries: Iterable[Entry]) -> None:
    """Puts measured entries into the cache."""
    for e in entries:
        data = e.as_dict()
        text = {"sha256": _digest(data), "entry": data}
        write_whole(_cache_file(e), json.dumps(text, indent=1).encode())


def remembered() -> list[tuple[Path, Entry]]:
    """The rows of all sound files of the cache; a TuningWarning for each damaged file."""
    out = []
    for path in sorted(private_dir("tuning").glob("*.json")):
        try:
            data = json.loads(path.read_text())
            if data["sha256"] != _digest(data["entry"]):
                raise ValueError("it does not match its SHA-256")
            out.append((path, Entry.from_dict(data["entry"])))
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            warnings.warn(f"{path.name} is left out: {error}", TuningWarning, stacklevel=2)
    return out


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


# ---- what decides ----------------------------------------------------------------------------


def table_for(gpu: str | None) -> dict[Problem, list[Measured]]:
    """What decides on a GPU: the shipped table, what it borrows, and the cache over both."""
    if gpu is None:
        return {}
    try:
        own = [e for _, e in remembered() if e.gpu == gpu]
    except CompileError:  # no folder of ours: nothing was remembered
        own = []
    out = as_table((*shipped(gpu), *own))
    if gpu in SIBLINGS:
        for problem, rows in as_table(shipped(SIBLINGS[gpu])).items():
            best = [r for r in rows if r.source == "graphnet"] or rows
            out.setdefault(problem, []).extend(
                Measured(r.variant, r.config, r.us, SIBLINGS[gpu], r.origin) for r in best
            )
    return out


def as_table(entries: Iterable[Entry]) -> dict[Problem, list[Measured]]:
    """Rows by problem. Those of variants that no longer exist are left out, with one warning."""
    registry = by_op()
    rows: dict[Any, tuple[Problem, Measured]] = {}
    for e in entries:
        names = [v.name for v in registry.get(e.problem.kind, ())]
        if e.variant not in names:
            _gone(e.variant, e.problem.op, tuple(names))
            continue
        row = Measured(e.variant, e.config, e.us, e.source, f"{e.gpu}, {e.date}")
        rows[e.source, *e.key, e.config if e.source == "prototype" else None] = e.problem, row
    out: dict[Problem, list[Measured]] = {}
    for problem, row in rows.values():
        out.setdefault(problem, []).append(row)
    return out


@cache
def _gone(variant: str, op: str, names: tuple[str, ...]) -> None:
    known = ", ".join(names) or "none"
    warnings.warn(
        f"rows of the variant {variant!r} of {op} are left out: it is gone; there are {known}",
        TuningWarning, stacklevel=4,
    )  # fmt: skip
