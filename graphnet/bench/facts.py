"""What a result has to say about where it was measured: machine, versions, clocks, ceilings."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from graphnet import __version__
from graphnet.bench.rounds import wait
from graphnet.errors import GraphnetError
from graphnet.lowering.build import native

_ROOT = Path(__file__).resolve().parents[2]
_CLOCKS = (
    "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu",
    "power.draw", "power.limit",
)  # fmt: skip


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _said(*command: str, cwd: Path | None = None) -> str:
    """What a program prints; empty where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, cwd=cwd, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def machine(device: torch.device) -> dict[str, Any]:
    """The processor, and the GPU where the work runs on one."""
    facts: dict[str, Any] = {
        "device": "cpu", "threads": torch.get_num_threads(), "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    if device.type == "cpu":  # None: torch's kernels run in place of those in C
        facts["cc"] = native.compiler_of("batch_norm")
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        facts |= {
            "device": about.name, "arch": f"sm_{about.major}{about.minor}",
            "processors": about.multi_processor_count, "memory": about.total_memory,
            "driver": _smi("driver_version").get("driver_version"),
        }  # fmt: skip
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "")


def versions() -> dict[str, Any]:
    """Everything that decides what code runs; None for what is not there."""
    import numpy

    facts: dict[str, Any] = {
        "graphnet": __version__, "torch": torch.__version__, "numpy": numpy.__version__,
        "python": platform.python_version(), "cuda": torch.version.cuda, "cudnn": None,
        "triton": None, "ptxas": None, "commit": commit(),
    }  # fmt: skip
    if torch.cuda.is_available():
        facts["cudnn"] = torch.backends.cudnn.version()
    try:
        import triton

        from graphnet.lowering.build.build import ptxas

        facts |= {"triton": triton.__version__, "ptxas": ptxas()[1]}
    except (ImportError, GraphnetError):
        pass  # not needed on a CPU
    return facts


def commit() -> str | None:
    """The commit of a checkout, with "+" behind it where sources differ from it."""
    found = _said("git", "rev-parse", "--short=12", "HEAD", cwd=_ROOT)
    if not found:
        return None
    sources = ("graphnet", "kernels", "frontends")
    changed = _said("git", "status", "--porcelain", "--", *sources, cwd=_ROOT)
    return found + ("+" if changed else "")


def _smi(*names: str) -> dict[str, str]:
    at = str(torch.cuda.current_device())
    text = _said("nvidia-smi", "-i", at, f"--query-gpu={','.join(names)}", "--format=csv,noheader")
    parts = [part.strip() for part in text.split(",")]
    return dict(zip(names, parts, strict=True)) if len(parts) == len(names) and text else {}


def clocks(device: torch.device) -> dict[str, str] | None:
    """Clocks, temperature and power now; None without a GPU or nvidia-smi."""
    if device.type != "cuda":
        return None
    return {"at": now(), **found} if (found := _smi(*_CLOCKS)) else None


def flags() -> dict[str, Any]:
    """The settings of torch that the baselines run with."""
    return {
        "matmul_allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "grad_mode": "training: on; inference: torch.inference_mode()",
        "kernel_caches": "as they were found: cold_s may load what an earlier run compiled",
    }


def ceilings(device: torch.device, precision: str) -> dict[str, float]:
    """FLOP/s of a large matrix product and bytes/s of a large copy, measured here and now.

    The product runs in `precision` on random data; the copy counts bytes read and written.
    """
    gpu = device.type == "cuda"
    n = 8192 if gpu else 1536
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in "ab")
    c = torch.empty_like(a)
    flops = 2 * n**3 / _least(lambda: torch.mm(a, b, out=c), device)
    source = torch.randn((1 << 30) if gpu else (1 << 25), device=device)  # 4 GiB, 128 MiB
    into = torch.empty_like(source)
    moved = 2 * source.nbytes / _least(lambda: into.copy_(source), device)
    return {"flops": flops, "bandwidth": moved}


def _least(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the quickest of a few calls: a ceiling is what nothing disturbed."""
    call()
    wait(device)
    out = []
    for _ in range(5):
        begin = time.perf_counter()
        call()
        wait(device)
        out.append(time.perf_counter() - begin)
    return min(out)


# ---- names of files --------------------------------------------------------------------------


def slug(text: str) -> str:
    """A name in lower case, without anything that a file's name should not hold."""
    return re.sub(r"[^a-z0-9_.]+", "_", text.lower()).strip("_.") or "unnamed"


def gpu_slug(device: str) -> str:
    """ "NVIDIA H200 NVL" becomes h200; "cpu" stays."""
    words = [w for w in device.lower().split() if w not in ("nvidia", "geforce", "tesla", "amd")]
    return slug(words[0].split("-")[0]) if words else "gpu"


def file_name(result: dict[str, Any]) -> str:
    """<gpu>-<model>-<train|infer|grads>-b<batch>-<precision>-<date>.json"""
    model = slug(result["model"].rpartition(":")[2])
    parts = (
        gpu_slug(result["machine"]["device"]), model, result["mode"], f"b{result['batch']}",
        result["precision"], result["date"][:10],
    )  # fmt: skip
    return "-".join(parts) + ".json"
