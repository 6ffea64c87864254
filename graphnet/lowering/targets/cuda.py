"""The cuda target: compiled launches, captured once in a CUDA graph and replayed.

Everything a step touches has a fixed address: state and inputs in the caller's storage, the rest
in one arena. So a step is one graph launch, and schedules change device scalars only.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from graphnet import config
from graphnet.errors import BackendUnavailableError, CompileError, OutOfMemoryPlanError
from graphnet.lowering.build.build import compile_launches, try_launches
from graphnet.lowering.build.loading import loaded
from graphnet.lowering.build.pool import launchers
from graphnet.lowering.build.tools import ptxas
from graphnet.lowering.launch.codegen import Ref
from graphnet.lowering.launch.files import Source, load
from graphnet.lowering.launch.steps import Collective, Copy, Fill, Launch, Step, bind
from graphnet.lowering.plan.plan import Plan
from graphnet.lowering.targets.collectives import Group, collective
from graphnet.lowering.targets.cuda_ranks import Segmented, segments_of
from graphnet.lowering.targets.interpret import MODE, Storage, buffers, laid, operands
from graphnet.lowering.watch import wanted, watched

Call = Callable[[], Any]


def require(plan: Plan, beside: int = 0, again: Callable[[int], Plan] | None = None) -> None:
    """Refuses before anything is allocated: no GPU, an interpreted Triton, too little memory.

    beside  bytes of state, inputs and outputs that do not exist yet either
    again   the plan for another batch, with which the batch that fits is tried out
    """
    if not torch.cuda.is_available():
        raise BackendUnavailableError(
            "target 'cuda' needs a GPU, and torch sees none",
            help="use target='cpu', or gn.build(...) to compile kernels without a device",
        )
    if os.environ.get("TRITON_INTERPRET") not in (None, "", "0"):
        raise BackendUnavailableError(
            "TRITON_INTERPRET is set: Triton would not compile", help="unset TRITON_INTERPRET"
        )
    free, total = torch.cuda.mem_get_info()
    # Memory that torch keeps but does not use can be handed out again.
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    needed = plan.arena_bytes + beside
    if needed > free:
        memory = free + plan.peak_bytes - needed  # with what other programs of the net hold
        fits = plan.largest_batch(memory)
        while again and fits and (smaller := again(fits)).peak_bytes > memory:
            fits = min(fits - 1, smaller.largest_batch(memory))
        names = "; ".join(f"{n} {b / 2**20:.0f} MiB" for n, b in plan.largest())
        raise OutOfMemoryPlanError(
            f"the program needs {needed / 2**30:.2f} GiB more ({plan.peak_bytes / 2**30:.2f} in"
            f" all, its arena {plan.arena_bytes / 2**30:.2f}), {free / 2**30:.2f} of"
            f" {total / 2**30:.2f} GiB are free; largest: {names}",
            help=f"a batch of {fits} fits" if fits else "no batch fits beside what is there",
        )


def compile_together(plans: Sequence[Plan]) -> None:
    """Compiles what several programs launch, all in one go, into the cache that `prepare` reads.
    What does not compile is an error only for the program that needs it."""
    try_launches([s for plan in plans for s in plan.launches], _arch())


def _arch() -> int:
    """90 for sm_90, of the device at hand."""
    from triton.runtime.driver import driver

    return driver.active.get_current_target().arch


def _loaded(
    step: Launch, tensor: Callable[[Ref], torch.Tensor], key: str, about: Mapping[str, Any]
) -> Call:
    """A launch as a call. Its binary is loaded now, since capture must not do that."""
    args, constants, options = bind(step)
    real = operands(args, tensor)
    values = {k: load(v) if isinstance(v, Source) else v for k, v in constants.items()}
    if step.driver is not None:
        kernel = load(step.driver)
    else:
        kernel = getattr(importlib.import_module(step.module), step.kernel)
    try:
        binary = loaded(kernel, step.grid, real, {**values, **options}, key, about)
        binary._init_handles()
    except Exception as error:
        raise CompileError(
            f"{step.kernel} does not load: {type(error).__name__}: {error}",
            **step.where.located,
        ) from error
    launch = kernel[step.grid]
    return lambda: launch(*real, **values, **options)


def calls(
    plan: Plan, tensor: Callable[[Ref], torch.Tensor], group: Group | None = None
) -> list[Call]:
    """The plan's steps as calls, compiled by the workers where need be, and loaded."""
    _pin_tools()
    found = iter(compile_launches(plan.launches, _arch())[0])
    out: list[Call] = []
    ref = lambda name: Ref(name, plan.types[name][0])
    for step in plan.steps:
        if isinstance(step, Fill):
            into, value = tensor(ref(step.buffer)), step.value
            out.append(partial(into.fill_, value))
        elif isinstance(step, Copy):
            a, b = tensor(ref(step.source)), tensor(ref(step.target))
            out.append(partial(b.copy_, a, non_blocking=True))
        elif isinstance(step, Collective):
            out.append(collective(step, tensor, group))
        else:
            with MODE:
                out.append(_loaded(step, tensor, *next(found)))
    return out


def _waits(plan: Plan) -> list[tuple[int, ...]]:
    """Per step the last step of the other stream that it has to wait for, if any."""
    out: list[tuple[int, ...]] = []
    for k, stream in enumerate(plan.streams):
        other = [a for a, b in plan.edges if b == k and plan.streams[a] != stream]
        out.append((max(other),) if other else ())
    return out


def _run(
    calls: list[Call], streams: tuple[int, ...], waits: list[tuple[int, ...]], beside: Any
) -> None:
    """The calls in order, those of stream 1 beside the others; ends when both have ended."""
    main = torch.cuda.current_stream()
    signals = {a for step in waits for a in step}
    events: dict[int, Any] = {}
    forked = False
    for k, (call, stream) in enumerate(zip(calls, streams, strict=True)):
        on = beside if stream else main
        if stream and not forked:  # joins the capture, and starts behind what came before
            beside.wait_stream(main)
            forked = True
        for a in waits[k]:
            on.wait_event(events[a])
        with torch.cuda.stream(on):
            call()
        if k in signals:
            events[k] = torch.cuda.Event()
            events[k].record(on)
    if forked:
        main.wait_stream(beside)


def _pin_tools() -> None:
    """torch.compile changes the assembler inside a process; ours is chosen before we compile. What
    Triton compiles to launch kernels is shared with the workers."""
    import triton

    os.environ["TRITON_PTXAS_PATH"] = str(ptxas()[0])
    if "TRITON_CACHE_DIR" not in os.environ:
        triton.knobs.cache.dir = launchers()


class Replayed:
    """A step on fixed storage, recorded in a CUDA graph that every call replays.

    once  the launches of the step, one by one
    keep  what must live as long as the graph, which holds addresses alone
    Recording runs nothing, so no state is touched; the first call records unless `record` was
    called before.
    """

    def __init__(self, once: Call, device: torch.device, keep: object = ()) -> None:
        self.once, self.device, self.keep = once, device, keep
        self._graph: torch.cuda.CUDAGraph | None = None

    def record(self) -> torch.cuda.CUDAGraph:
        """Records the step, once."""
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with MODE, torch.cuda.device(self.device), torch.no_grad():
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.graph(graph, stream=side):
                    self.once()
                torch.cuda.current_stream().wait_stream(side)
            self._graph = graph
        return self._graph

    def __call__(self) -> None:
        (self._graph or self.record()).replay()

    def behind(self, first: Replayed, times: int) -> Replayed:
        """`first` and then this step, so many times, as one graph."""

        def once() -> None:
            for _ in range(times):
                first.once()
                self.once()

        return Replayed(once, self.device, (first, self))


def prepare(
    plan: Plan,
    storage: Storage,
    *,
    capture: bool = True,
    around: Callable[[Step, Call], Call] = lambda step, call: call,
    group: Group | None = None,
) -> Callable[[], None]:
    """The step as a callable over fixed storage, by name of input and of returned value.

    capture  a `Replayed`; False launches step by step, for debugging, and so do GRAPHNET_CHECK and
             GRAPHNET_DEBUG=2
    around   is given each step with its call and returns what is called instead: to time it
    group    the processes that take part, where there are several. With GRAPHNET_NCCL_CAPTURE=1
             their collectives are recorded with the step, else they run between its graphs
    Nothing runs before the first call.
    """
    require(plan)
    device = next((t.device for t in storage.values()), torch.device("cuda"))
    with torch.cuda.device(device):
        arena = torch.empty(max(plan.arena_bytes, 1), dtype=torch.uint8, device=device)
        held, moved = laid(plan, storage)
        tensor = buffers(plan, held, arena)
        program = watched(plan, calls(plan, tensor, group), tensor)
        program = [around(step, call) for step, call in zip(plan.steps, program, strict=True)]

    beside = torch.cuda.Stream(device)
    waits = _waits(plan)

    def segment(steps: Sequence[int]) -> Replayed | Call:
        """Some of the steps: a collective as it is, launches recorded."""
        if isinstance(plan.steps[steps[0]], Collective):
            return program[steps[0]]
        at = {k: n for n, k in enumerate(steps)}
        inner = [tuple(at[a] for a in waits[k] if a in at) for k in steps]
        some, on = [program[k] for k in steps], tuple(plan.streams[k] for k in steps)
        return Replayed(lambda: _run(some, on, inner, beside), device)

    def once() -> None:
        for original, twin in moved:
            twin.copy_(original)
        _run(program, plan.streams, waits, beside)
        for original, twin in moved:
            original.copy_(twin)

    if not capture or wanted():

        @torch.no_grad()
        def run() -> None:
            with MODE, torch.cuda.device(device):
                once()

        return run

    if plan.collectives and not config.nccl_capture():
        return Segmented(segments_of(plan), segment, device, moved, (arena, held, program))
    # The calls hold the tables that launches read, and their descriptors.
    return Replayed(once, device, (arena, held, program))
