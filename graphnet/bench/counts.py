"""What one step does, by torch's profiler: launches on a GPU, operators and memory on a CPU.

Measured after everything is timed: a profiler leaves hooks behind that cost time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from graphnet.bench.rounds import Run, wait


@dataclass(frozen=True)
class Counts:
    """What one step does; None where the profiler does not see it.

    launches     kernels, fills and copies on the GPU
    operators    calls of torch's operators on the CPU that call no other operator
    step_bytes   most memory on the CPU at once beyond what was held when the step began
    """

    launches: int | None = None
    operators: int | None = None
    step_bytes: int | None = None


def count(run: Run, device: torch.device) -> Counts:
    """Profiles one step."""
    from torch.profiler import ProfilerActivity, profile

    gpu = device.type == "cuda"
    kinds = [ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]
    try:
        with _quiet(), profile(activities=kinds, profile_memory=not gpu) as found:
            run(1)
            wait(device)
    except RuntimeError:  # no access to the GPU's counters
        return Counts()
    if gpu:
        events = found.profiler.kineto_results.events()
        return Counts(launches=sum(_on_gpu(e) for e in events) or None)
    leaves = [e for e in found.events() if e.name.startswith("aten::") and not e.cpu_children]
    return Counts(operators=len(leaves), step_bytes=_peak(found.profiler.kineto_results.events()))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the profiler's remarks on stderr, which its C++ part writes past Python."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _on_gpu(event: Any) -> bool:
    """Whether an event of the profiler is work of the GPU, not a call or an annotation."""
    on = event.device_type() == torch.autograd.DeviceType.CUDA
    return on and not event.is_user_annotation()


def _peak(events: Any) -> int:
    """The highest level of the allocations and releases, in order of time."""
    level = most = 0
    for e in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        level += e.nbytes()
        most = max(most, level)
    return most
