"""Looking into the cache: what lies there, why a launch misses, and emptying it."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from graphnet import config
from graphnet.lowering.build.build import key_of, key_parts, request
from graphnet.lowering.launch.files import private_dir
from graphnet.lowering.launch.steps import Launch

COMPILED = ("binaries", "generated", "triton", "proven", "native")
KINDS = (*COMPILED, "tuning", "images")


def listing() -> list[dict[str, Any]]:
    """Binaries, libraries for the cpu target, tuning results and decoded image sets: kind, name,
    what it is, bytes on disk, seconds since it was made."""
    return [*_binaries(), *_native(), *_tuning(), *_images()]


def _row(kind: str, path: Path, what: str, size: int) -> dict[str, Any]:
    age = round(time.time() - path.stat().st_mtime, 1)
    return {"kind": kind, "name": path.stem, "what": what, "bytes": size, "age_s": age}


def _binaries() -> Iterator[dict[str, Any]]:
    for path in sorted(private_dir("binaries").glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            about = json.loads(path.read_text())
            parts = about.get("parts", {})
            arch = f"sm_{parts['arch']}" if "arch" in parts else "?"
            yield _row("binary", path, f"{about['name']} {arch}",
                       path.with_suffix(".cubin").stat().st_size)  # fmt: skip


def _native() -> Iterator[dict[str, Any]]:
    for path in sorted(private_dir("native").glob("*.so")):
        name, _, key = path.stem.rpartition("-")
        yield _row("native", path, f"{name}.c", path.stat().st_size) | {"name": key}


def _tuning() -> Iterator[dict[str, Any]]:
    from graphnet.lowering.tune import tables

    for path, e in tables.remembered():
        what = f"{e.problem}: {e.variant} {e.config} on {e.gpu}, {e.us} us"
        yield _row("tuning", path, what, path.stat().st_size)


def _images() -> Iterator[dict[str, Any]]:
    for path in sorted(private_dir("images").glob("*/manifest.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            about = json.loads(path.read_text())
            what = f"{about['rows']} images {about['stored']} of {about['of']}"
            blocks = (path.parent / "images.u8").stat().st_blocks  # rows that are missing take none
            yield _row("images", path.parent, what, 512 * blocks)


def why(launches: Sequence[Launch], arch: int = 90) -> list[dict[str, Any]]:
    """Per launch: hit or miss, and for a miss what sets it apart from the nearest binary."""
    folder = private_dir("binaries")
    known = []
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known.append(json.loads(path.read_text())["parts"])
    out = []
    for s in launches:
        work = request(s, arch)
        hit = (folder / f"{key_of(work)}.cubin").exists()
        row: dict[str, Any] = {"kernel": s.kernel, "layers": list(s.where.layers), "hit": hit}
        if not hit:
            row["differs"] = _nearest(key_parts(work), known)
        out.append(row)
    return out


def _nearest(parts: dict[str, Any], known: Sequence[dict[str, Any]]) -> list[str] | None:
    """What differs from the binary of the same kernel that is most alike; None without one."""
    alike = [k for k in known if k.get("kernel") == parts["kernel"]]
    return min((_differences(parts, k) for k in alike), key=len, default=None)


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    out = [k for k in a if k not in ("constants", "options") and _plain(a[k]) != _plain(b.get(k))]
    for group in ("constants", "options"):
        mine, other = _plain(a[group]), b.get(group, {})
        for name in sorted({*mine, *other}):
            if mine.get(name) != other.get(name):
                code = any(isinstance(d.get(name), dict) for d in (mine, other))
                values = "" if code else f" {other.get(name)} -> {mine.get(name)}"
                out.append(f"{name}{values}")
    return out


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value))


def clear(kinds: Sequence[str] = KINDS) -> dict[str, int]:
    """Empties the folders of these kinds; how many files and bytes went."""
    files = size = 0
    for kind in kinds:
        if not (config.cache_dir() / kind).is_dir():
            continue
        folder = private_dir(kind)  # ours, or an error
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                files, size = files + 1, size + path.stat().st_size
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    return {"files": files, "bytes": size}
