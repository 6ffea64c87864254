"""Compiles kernels without a device: `python -m graphnet.lowering.build.worker LAUNCHERS`.

Requests come as JSON lines on stdin, answers leave as JSON lines on stdout. Triton's own path is
used, `JITFunction.warmup` under a driver that only names the target, so that specialisation
(alignment, integers equal to 1) is exactly that of a launch. torch is left out: importing it
takes as long as compiling four kernels, so templates are to do without it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any


class _Driver:
    """Names a target; there is no device behind it."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        return None


class _Type:
    """Stands for torch's element type: Triton reads its name and its size."""

    def __init__(self, name: str) -> None:
        from graphnet.ir.types import DTYPES

        self.name, self.itemsize = f"torch.{DTYPES[name].torch_name}", DTYPES[name].itemsize

    def __str__(self) -> str:
        return self.name


_type = cache(_Type)  # one object for each: Triton remembers types by identity


class Pointer:
    """Stands for a tensor: an element type and the arena's 256-byte alignment."""

    def __init__(self, dtype: str) -> None:
        self.dtype = _type(dtype)

    def data_ptr(self) -> int:
        return 256

    def ptr_range(self) -> int:
        return 0

    def stride(self) -> tuple[int, ...]:
        return (1,)


def _argument(a: Any) -> Any:
    if isinstance(a, list):
        return tuple(_argument(v) for v in a)
    if isinstance(a, dict):
        from graphnet.lowering.build.descriptors import descriptor

        return descriptor(Pointer(a["dtype"]), a)
    return None if a is None else Pointer(a)


def _constant(value: Any) -> Any:
    from graphnet.lowering.launch.files import Source, load

    return load(Source(value["epilogue"])) if isinstance(value, dict) else value


def _kernel(request: dict[str, Any]) -> Any:
    if "driver" in request:
        return _constant({"epilogue": request["driver"]})
    return getattr(importlib.import_module(request["module"]), request["kernel"])


def compile_one(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request: binary, text and counts."""
    from triton.runtime.driver import driver

    from graphnet.lowering.build.loading import specialised

    driver.set_active(_Driver(request["arch"]))
    kernel = _kernel(request)
    args = [_argument(a) for a in request["args"]]
    constants = {k: _constant(v) for k, v in request["constants"].items()}
    start = time.perf_counter()
    compiled = kernel.warmup(*args, grid=tuple(request["grid"]), **constants, **request["options"])
    _build_launcher(compiled)
    seconds = time.perf_counter() - start
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    group = compiled.metadata_group.items()
    described = next(Path(path) for name, path in group if name.endswith(".json"))
    metadata = described.read_text()
    return {
        "cubin": base64.b64encode(cubin).decode(),
        "ptx": ptx,
        "metadata": metadata,
        "source": specialised(compiled.src),
        "name": compiled.metadata.name,
        "shared_bytes": compiled.metadata.shared,
        "compile_s": round(seconds, 4),
        "sha256": hashlib.sha256(cubin).hexdigest(),
        **resources(cubin),
        **counts(ptx),
    }


def _build_launcher(compiled: Any) -> None:
    """Where Triton launches each signature through C code of its own (3.6), compiles that, too.

    It is linked against the driver's library, so there must be one here. It goes where the process
    that launches looks for it, the folder that the command line names. That process compiles it
    where we cannot, so no failure here is the kernel's.
    """
    import triton
    from triton.backends.nvidia import driver

    if not hasattr(driver, "make_launcher"):
        return
    with contextlib.suppress(Exception), triton.knobs.cache.scope():
        triton.knobs.cache.dir = sys.argv[1]
        driver.CudaLauncher(compiled.src, compiled.metadata)


def _spare_the_key() -> None:
    """Our own key names a binary. Triton's reads its library of 460 MB first."""
    import triton
    from triton.runtime import cache as files

    if hasattr(files, "triton_key"):
        files.triton_key = lambda: triton.__version__


def counts(ptx: str) -> dict[str, int]:
    """Instructions that say how a kernel feeds its products, and atomics on floats."""

    def count(pattern: str) -> int:
        return len(re.findall(pattern, ptx))

    return {
        "wgmma": count(r"wgmma\.mma_async"),
        "mma": count(r"\bmma\.sync"),
        "tma": count(r"cp\.async\.bulk\.tensor"),
        "cp_async": count(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (?:0x)?10?6?,"),
        "float_atomics": count(r"\b(?:atom|red)\.[\w.:]*\.(?:f16|bf16|f32|f64|f16x2|bf16x2)\b"),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes that spill, as the assembler's own tool reports them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    local = re.search(r"LOCAL:(\d+)", text)
    if found is None:
        raise ValueError(f"no resource usage in {text!r}")
    spilled = int(found[2]) + (int(local[1]) if local else 0)
    return {"registers": int(found[1]), "spill_bytes": spilled}


def _explained(error: BaseException) -> str:
    """The error with what caused it: Triton wraps the reason once a call level."""
    lines = [f"{type(error).__name__}: {error}"]
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
        lines.append(f"{type(error).__name__}: {error}")
    return "\n".join(dict.fromkeys(lines))


_busy = threading.Event()


def _requests() -> Iterator[dict[str, Any]]:
    """What comes on stdin. Where that ends while a request is being answered, whoever has asked is
    gone: then so are we, with the assembler."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            _busy.set()
            lines.put(line)
        if _busy.is_set() and os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (line := lines.get()) is not None:
        yield json.loads(line)


def main() -> int:
    """Serves requests until stdin ends. A failed one answers with `error`."""
    os.environ.pop("TRITON_INTERPRET", None)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Triton prints must not mix with answers
    sys.modules["torch"] = None  # type: ignore[assignment]  # Triton does without
    _spare_the_key()
    for request in _requests():
        try:
            answer = compile_one(request)
        except Exception as error:  # the parent raises it, with the launch's provenance
            answer = {"error": _explained(error)}
        _busy.clear()
        answers.write(json.dumps({"id": request["id"], **answer}) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
