"""Run folders: config.toml, metrics.jsonl, checkpoints/ and whatever a run leaves beside them."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import math
import os
import shutil
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from graphnet import disk
from graphnet.errors import ConfigError, DataError, RunExistsError
from graphnet.train.checkpoint import atomic_write

CONFIG, METRICS = "config.toml", "metrics.jsonl"
_MAX_CONFIG = 1 << 20


def create(path: str | os.PathLike[str], config: Mapping[str, Any]) -> Path:
    """Makes a run folder that holds config.toml from its first moment on.

    A temporary folder beside it is filled and renamed, so a crash leaves no half a run.
    RunExistsError where something stands at `path` (an empty folder may).
    """
    path = Path(path)
    check_free(path)
    text = toml(config).encode()
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
        os.chmod(partial, 0o755)
        atomic_write(partial / CONFIG, text)
        # rename(2) itself refuses a folder that is not empty: two runs cannot both pass a check.
        os.rename(partial, path)
        partial = None
        disk.sync_folder(path.parent)
    except OSError as error:
        if path.exists():
            raise _taken(path) from None
        raise ConfigError(f"cannot make run folder {path}: {error.strerror or error}") from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return path


def check_free(path: Path) -> None:
    """RunExistsError where `create` would find something at `path`."""
    try:
        if any(path.iterdir()):
            raise _taken(path)
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        if path.exists():
            raise _taken(path) from None
    except OSError as error:
        raise ConfigError(f"cannot make run folder {path}: {error.strerror or error}") from None


def _taken(path: Path) -> RunExistsError:
    if (path / CONFIG).exists():
        return RunExistsError(
            f"{path} already exists and holds a run",
            help="add --resume to go on with it, or choose another --out",
        )
    return RunExistsError(
        f"{path} already exists and holds something that is no run", help="choose another --out"
    )


@contextlib.contextmanager
def locked(run: str | os.PathLike[str]) -> Iterator[None]:
    """While entered, no other process trains this run; the lock ends with the process.

    ConfigError where one does. File systems that know no locks let everyone in.
    """
    with open(Path(run) / CONFIG, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process is training {run}", help="wait for its end, or stop it"
            ) from None
        except OSError:
            pass
        yield


def read_config(run: str | os.PathLike[str]) -> dict[str, Any]:
    """What `create` was given; ConfigError where the folder is no run."""
    path = Path(run) / CONFIG
    try:
        return tomllib.loads(disk.read(path, _MAX_CONFIG).decode())
    except OSError as error:
        raise ConfigError(
            f"{run} is no run folder: {CONFIG}: {error.strerror or error}",
            help="give the --out folder of a run",
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from None


def toml(config: Mapping[str, Any]) -> str:
    """Flat values, lists of them and one level of tables, as TOML; None is left out."""
    lines, tables = [], []
    for key, value in config.items():
        if isinstance(value, Mapping):
            rows = [f"{_key(k)} = {_value(k, v)}" for k, v in value.items() if v is not None]
            tables.append("\n".join(["", f"[{_key(key)}]", *rows]))
        elif value is not None:
            lines.append(f"{_key(key)} = {_value(key, value)}")
    return "\n".join([*lines, *tables]) + "\n"


def _key(key: str) -> str:
    plain = key.replace("_", "").replace("-", "")
    return key if plain.isascii() and plain.isalnum() else _value(key, key)


def _value(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)  # also inf and nan, which TOML knows by these names
    if isinstance(value, str | os.PathLike):
        # JSON's escapes are TOML's, but for DEL; ensure_ascii would write surrogate pairs.
        return json.dumps(os.fspath(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(key, v) for v in value)}]"
    raise ConfigError(f"{key} = {value!r} has no form in TOML", help="use str, int, float or bool")


# ---- metrics ---------------------------------------------------------------------------------


class MetricsLog:
    """Appends records to metrics.jsonl, one JSON object per line.

    Opening it cuts off a last line that a crash tore, or the next record would be glued to it.
    Values that are not finite become null: JSON has no NaN.
    """

    def __init__(self, run: str | os.PathLike[str]) -> None:
        path = self._path = Path(run) / METRICS
        try:
            self._file = open(path, "a+b", opener=_plain)  # noqa: SIM115 - open for the whole run
            self._file.seek(0)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None
        whole, _ = _whole_lines(path, self._file.read())
        self._file.truncate(whole)

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a record; it is with the operating system when this returns."""
        try:
            self._file.write(json.dumps(finite(record)).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise disk.unwritten(self._path, error) from None

    def close(self) -> None:
        """Makes the records durable and closes the file."""
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())
        with contextlib.suppress(OSError):  # what a full disk refused is tried once more here
            self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _plain(path: str, flags: int) -> int:
    """Opens a file, but none elsewhere: a run of others may hold a link. Nor does it wait for the
    other end of a named pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)


def write_csv(run: str | os.PathLike[str], history: Sequence[Mapping[str, Any]]) -> None:
    """metrics.csv: a line for each epoch, for a spreadsheet; metrics.jsonl says more."""
    columns = list(dict.fromkeys(k for row in history for k in row))
    text = io.StringIO()
    out = csv.DictWriter(text, columns, lineterminator="\n")
    out.writeheader()
    out.writerows(history)
    atomic_write(Path(run) / "metrics.csv", text.getvalue().encode())


def read_metrics(run: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All records; [] without a file. A torn last line is ignored, a torn other one DataError."""
    path = Path(run) / METRICS
    try:
        return _whole_lines(path, disk.read(path))[1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def _whole_lines(path: Path, data: bytes) -> tuple[int, list[dict[str, Any]]]:
    """(bytes of the whole lines, their records). What has no newline at its end is torn."""
    lines = data.split(b"\n")[:-1]
    records, size = [], 0
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("no object")
        except (ValueError, RecursionError):
            if number < len(lines):
                raise DataError(
                    f"{path}: line {number} of {len(lines)} is no JSON object",
                    help="only the last line may be torn; restore or delete the file",
                ) from None
            break
        records.append(record)
        size += len(line) + 1
    return size, records


def finite(value: Any) -> Any:
    """The value with null for each float that is not finite: JSON has no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value
