"""What was measured: tables in the repository, one a GPU, and a cache on disk.

A table is JSON, `tuned/<gpu>.json`: the keys of the headline workloads, each with its
configuration and where it comes from. "analytic" entries repeat the rules of tuning.py, for people
to read; only "measured" ones decide, and only where the templates, Triton and the assembler are
those that were measured and found right. Anything else falls back to the rules.

The cache holds what `graphnet tune` found on this machine, a file for each key. A damaged file
counts for nothing and is searched again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from graphnet.errors import CompileError, ConfigError
from graphnet.lowering.build.build import kernels_hash, ptxas
from graphnet.lowering.launch.codegen import private_dir, write_whole
from graphnet.lowering.launch.config import Config, Key

FOLDER = Path(__file__).with_name("tuned")


class TuningWarning(UserWarning):
    """A file of the tuning cache is damaged and was left out."""


@dataclass(frozen=True)
class Entry:
    """A configuration for a key.

    source       "analytic" or "measured"; what follows belongs to a measured one
    us           median of the launches that the key decides, `analytic_us` with the rules' choice
    environment  gpu, triton, ptxas and the hash of the templates: where it was found right
    """

    kind: str
    shape: tuple[int, ...]
    precision: str
    config: Config
    source: str = "analytic"
    us: float | None = None
    analytic_us: float | None = None
    date: str | None = None
    environment: Mapping[str, str] | None = None

    @property
    def key(self) -> Key:
        return self.kind, self.shape, self.precision

    def as_dict(self) -> dict[str, Any]:
        """Plain types, what says nothing left out."""
        config = {
            f.name: v for f in fields(Config) if (v := getattr(self.config, f.name)) != f.default
        }
        known = {k: v for k, v in asdict(self).items() if v is not None and k != "config"}
        return {**known, "shape": list(self.shape), "config": config}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Entry:
        """The inverse; ConfigError where it does not hold an entry."""
        try:
            config = Config(**data["config"])
            return cls(**{**data, "shape": tuple(data["shape"]), "config": config})
        except (TypeError, KeyError) as error:
            raise ConfigError(f"no tuning entry: {error!r} in {data!r}") from None


# ---- where an entry holds --------------------------------------------------------------------


def environment(gpu: str) -> dict[str, str]:
    """What a measured result depends on besides the key."""
    return {
        "gpu": gpu, "triton": importlib.metadata.version("triton"), "ptxas": ptxas()[1],
        "templates": kernels_hash(),
    }  # fmt: skip


def measured(entries: Iterable[Entry], gpu: str) -> dict[Key, Config]:
    """The configurations that decide on this GPU, with these versions."""
    here = environment(gpu)
    return {e.key: e.config for e in entries if e.source == "measured" and e.environment == here}


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
    """Writes a table, sorted; of two entries for one key a measured one stays, else the later."""
    kept: dict[Key, Entry] = {}
    for e in entries:
        if e.key not in kept or e.source == "measured" or kept[e.key].source == "analytic":
            kept[e.key] = e
    rows = [json.dumps(kept[k].as_dict()) for k in sorted(kept)]
    body = ",\n  ".join(rows)
    write_whole(path, f'{{"gpu": {json.dumps(gpu)},\n "entries": [\n  {body}\n ]}}\n'.encode())
    path.chmod(0o644)


def _cache_file(entry: Entry) -> Path:
    about = [list(entry.key[1]), entry.kind, entry.precision, entry.environment]
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return private_dir("tuning") / f"{name[:32]}.json"


def remember(entries: Iterable[Entry]) -> None:
    """Puts measured entries into the cache."""
    for e in entries:
        data = e.as_dict()
        text = {"sha256": _digest(data), "entry": data}
        write_whole(_cache_file(e), json.dumps(text, indent=1).encode())


def remembered() -> list[tuple[Path, Entry]]:
    """What lies whole in the cache; a TuningWarning for each file that does not."""
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


def table_for(gpu: str | None) -> dict[Key, Config]:
    """What decides on a GPU: the shipped table, and the cache over it."""
    if gpu is None:
        return {}
    try:
        own = [e for _, e in remembered()]
    except CompileError:  # no folder of ours: nothing was remembered
        own = []
    found = [e for e in (*shipped(gpu), *own) if e.source == "measured"]
    return measured(found, gpu) if found else {}
