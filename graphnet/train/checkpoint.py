"""Checkpoints that survive a crash at any moment, and say so when they are damaged.

    checkpoints/step-00000120.safetensors   the tensors; any safetensors reader opens it
    checkpoints/step-00000120.json          the manifest: SHA-256 of the file, of each tensor and
                                            of itself, step, state; a checkpoint exists once
                                            its manifest does
    checkpoints/last.json, best.json        {"step", "file"}: which one

Nothing is pickled. A file appears under its name whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

from graphnet import disk
from graphnet.errors import CheckpointError

FOLDER = "checkpoints"
_FORMAT = 1
_MAX_MANIFEST, _MAX_POINTER = 64 << 20, 1 << 16
_STALE = 3600.0  # seconds after which another writer's temporary file is taken for a leftover
_NAME = re.compile(r"step-(\d{8,})\.json")
_HELP = "resume from an earlier checkpoint, or delete this one"


class CheckpointWarning(UserWarning):
    """The newest checkpoint is damaged and an earlier one was taken."""


@dataclass(frozen=True)
class Checkpoint:
    """What `save` was given, read back and verified."""

    path: Path
    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


# ---- files -----------------------------------------------------------------------------------


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file so that it holds either what it held before or all of `data`, also after a
    power cut. CheckpointError where it cannot be done, DiskError where the disk is at fault."""
    try:
        disk.write(path, data, durable=True, mode=0o644)
    except OSError as error:
        raise disk.unwritten(path, error, f" ({len(data)} bytes)") from None


# ---- saving ----------------------------------------------------------------------------------


def save(
    run: str | os.PathLike[str],
    step: int,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any] | None = None,
    *,
    keep: int = 2,
    best: bool = False,
) -> Path:
    """Saves into RUN/checkpoints and returns the tensor file's path.

    state  any JSON: progress, place in the data, seeds, the best metric
    keep   how many of the newest stay; those that last.json and best.json point to always do
    best   point best.json to this one
    """
    if step < 0 or keep < 1:
        raise CheckpointError(f"step {step} and keep {keep}: step is at least 0, keep at least 1")
    folder = Path(run) / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make {folder}: {error.strerror or error}") from None
    whole = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    data = to_bytes(whole)
    path = folder / f"step-{step:08d}.safetensors"
    manifest: dict[str, Any] = {
        "format": _FORMAT,
        "step": step,
        "file": path.name,
        "bytes": len(data),
        "sha256": _sha(data),
        "tensors": {
            k: {"dtype": str(t.dtype), "shape": list(t.shape), "sha256": _tensor_sha(t)}
            for k, t in sorted(whole.items())
        },
        "state": dict(state or {}),
    }
    try:
        manifest["manifest_sha256"] = _sha(_canonical(manifest))
        text = json.dumps(manifest, indent=1, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the state of step {step} is no JSON: {error}",
            help="use str, int, bool, None, finite float, list and dict",
        ) from None
    # The manifest comes last: until it stands, the new file counts for nothing. A step that is
    # saved again with the same tensors keeps its file, so that it is whole at every moment.
    if not _same(path, data):
        atomic_write(path, data)
    atomic_write(path.with_suffix(".json"), text.encode())
    pointer = json.dumps({"step": step, "file": path.name}).encode()
    if best:
        atomic_write(folder / "best.json", pointer)
    atomic_write(folder / "last.json", pointer)
    _prune(folder, path.stem, keep)
    return path


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _tensor_sha(t: torch.Tensor) -> str:
    return _sha(t.reshape(-1).view(torch.uint8).numpy().tobytes())


def _canonical(manifest: Mapping[str, Any]) -> bytes:
    rest = {k: v for k, v in manifest.items() if k != "manifest_sha256"}
    return json.dumps(rest, sort_keys=True, allow_nan=False).encode()


def _same(path: Path, data: bytes) -> bool:
    try:
        return path.stat().st_size == len(data) and disk.read(path) == data
    except OSError:
        return False


def _steps(folder: Path) -> list[str]:
    """Stems of the manifests, newest step first."""
    try:
        found = [m for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    except OSError:
        return []
    return [m[0].removesuffix(".json") for m in sorted(found, key=lambda m: -int(m[1]))]


def _prune(folder: Path, mine: str, keep: int) -> None:
    """Deletes what is old; quietly leaves what it may not delete, since the save is done."""
    stems = _steps(folder)
    safe = {mine, _pointed(folder, "best"), _pointed(folder, "last")}
    # Newer than mine are leftovers of a run that was taken up again further back.
    older = [s for s in stems if int(s[5:]) <= int(mine[5:])]
    safe |= set(older[:keep])
    with contextlib.suppress(OSError):
        for stem in older:
            if stem not in safe:
                # The manifest first: a crash in between leaves no checkpoint without tensors.
                (folder / f"{stem}.json").unlink(missing_ok=True)
                (folder / f"{stem}.safetensors").unlink(missing_ok=True)
        for partial in folder.glob(".tmp-*"):
            if time.time() - partial.stat().st_mtime > _STALE:
                partial.unlink(missing_ok=True)


# ---- loading ---------------------------------------------------------------------------------


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads and verifies one checkpoint, by its tensor file or its manifest.

    CheckpointError for anything missing, damaged, or mixed from two saves.
    """
    path = Path(path).with_suffix(".safetensors")
    manifest = _manifest(path.with_suffix(".json"))
    if manifest["file"] != path.name:
        raise CheckpointError(
            f"{path.with_suffix('.json')} is the manifest of {manifest['file']}", help=_HELP
        )
    data = _read(path)
    if len(data) != manifest["bytes"]:
        raise CheckpointError(
            f"{path} has {len(data)} bytes, its manifest says {manifest['bytes']}", help=_HELP
        )
    try:
        tensors = from_bytes(data)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}", help=_HELP) from None
    found = {
        k: {"dtype": str(t.dtype), "shape": list(t.shape), "sha256": _tensor_sha(t)}
        for k, t in tensors.items()
    }
    if bad := [k for k in {**found, **manifest["tensors"]} if _differ(k, found, manifest)]:
        raise CheckpointError(
            f"{path}: {len(bad)} of {len(found)} tensors differ from the manifest, "
            f"the first is {bad[0]!r}",
            help=_HELP,
        )
    if (sha := _sha(data)) != manifest["sha256"]:
        raise CheckpointError(
            f"{path}: SHA-256 {sha[:16]}..., its manifest says {manifest['sha256'][:16]}...",
            help=_HELP,
        )
    return Checkpoint(path, manifest["step"], tensors, manifest["state"])


def _differ(key: str, found: Mapping[str, Any], manifest: Mapping[str, Any]) -> bool:
    return found.get(key) != manifest["tensors"].get(key)


def _read(path: Path, most: int | None = None) -> bytes:
    try:
        return disk.read(path, most)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(_read(path, _MAX_MANIFEST))
        sound = isinstance(manifest, dict) and manifest["manifest_sha256"] == _sha(
            _canonical(manifest)
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no whole manifest: {error!r}", help=_HELP) from None
    if sound and not (
        isinstance(manifest.get("tensors"), dict)
        and isinstance(manifest.get("state"), dict)
        and all(isinstance(manifest.get(k), int) for k in ("format", "step", "bytes"))
        and all(isinstance(manifest.get(k), str) for k in ("file", "sha256"))
    ):
        raise CheckpointError(f"{path} lacks entries of a manifest", help=_HELP)
    if not sound:
        raise CheckpointError(f"{path} does not match its own SHA-256", help=_HELP)
    if manifest["format"] != _FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest['format']}, this version reads {_FORMAT}"
        )
    return manifest


def _pointed(folder: Path, which: str) -> str | None:
    """Stem of the checkpoint that last.json or best.json names; None without a sound pointer."""
    try:
        stem = Path(str(json.loads(_read(folder / f"{which}.json", _MAX_POINTER))["file"])).stem
    except (CheckpointError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return stem if _NAME.fullmatch(f"{stem}.json") else None


def load_latest(run: str | os.PathLike[str]) -> Checkpoint | None:
    """The checkpoint of last.json, else the newest sound one with a CheckpointWarning.

    None where the run has none at all; CheckpointError where none is sound.
    """
    folder = Path(run) / FOLDER
    stems = _steps(folder)
    last = _pointed(folder, "last")
    if last in stems:
        # Newer ones come last: they may belong to a run that was taken up again further back.
        newer = [s for s in stems if int(s[5:]) > int(last[5:])]
        order = [last, *[s for s in stems if s not in (*newer, last)], *newer]
    else:
        order = stems
    failures = []
    for stem in order:
        try:
            found = load(folder / f"{stem}.safetensors")
        except CheckpointError as error:
            failures.append(error.message)
            continue
        if failures:
            warnings.warn(f"took {found.path.name}: {failures[0]}", CheckpointWarning, stacklevel=2)
        return found
    if not failures:
        return None
    raise CheckpointError(
        f"none of the {len(failures)} checkpoints in {folder} is whole; the newest: {failures[0]}",
        help="start a new run",
    )


def load_best(run: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint of best.json; CheckpointError where there is none or it is damaged."""
    folder = Path(run) / FOLDER
    stem = _pointed(folder, "best")
    if stem is None:
        raise CheckpointError(f"{folder / 'best.json'} names no checkpoint")
    return load(folder / f"{stem}.safetensors")
