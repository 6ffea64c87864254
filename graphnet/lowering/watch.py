"""Looking at a plan while it runs: each launch against its reference, and how long it takes.

    GRAPHNET_CHECK=1   every equation of the plan in float64 on the bytes its launches found, held
                       against the bytes they left; the first bad one stops the program
    GRAPHNET_DEBUG=2   a line for each launch: time, rates, share of the GPU's roofline
    GRAPHNET_DUMP      the plan and its generated files

None of it costs anything when it is off: `watched` gives the calls back as they are.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from graphnet import config
from graphnet.errors import NumericsError
from graphnet.ir.graph import Eqn, Graph, Value
from graphnet.lowering.launch.codegen import Ref
from graphnet.lowering.launch.cost import CEILINGS, floor_us
from graphnet.lowering.launch.files import materialise
from graphnet.lowering.launch.moves import is_view
from graphnet.lowering.launch.steps import Launch, Step
from graphnet.lowering.plan.plan import Plan
from graphnet.ops.evaluate import evaluate_step, to_double
from graphnet.ops.fused import eqn_cost, run_eqn
from graphnet.passes.templates import members_of

Call = Callable[[], Any]
Buffer = Callable[[Ref], torch.Tensor]

# Relative norm of the difference, by the arithmetic of the products and the type of the result.
# TF32 operands come rounded and their products are exact: what is left are the sums (up to 2e-5 on
# an H100), and a tensor core that truncates what was not rounded (7e-4) is found.
TOLERANCE = {"ieee": 2e-5, "tf32": 2e-4, "bf16": 2e-2}
OUT_TOLERANCE = {"bf16": 1e-2}
ULPS = {"f32": 4e-7, "bf16": 8e-3}  # of a parameter, whose change is what is compared
ROUNDED = 4e-5  # of a result rounded to TF32: a few are halfway, and a last digit decides
TIES = 1e-3  # share of pool indices that may differ: a tie in float64 may be none in fp32
# Where a stage of a region rounds to bf16 what the next one reads, which the reference does not:
STAGES_TOLERANCE, STAGES_TIES = 5e-2, 2e-2
WHOLE_STEP = 3e-2  # a tie that falls differently sends a gradient elsewhere


def wanted() -> bool:
    """Whether steps have to run one by one, not as a captured graph."""
    return config.check() or config.debug() >= 2


def dump(plan: Plan) -> None:
    """Leaves the plan and the generated files in GRAPHNET_DUMP."""
    if not config.dump_dir() or plan.target == "cpu":
        return
    base = Path(config.dump_dir())
    folder = base / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    for s in plan.launches:
        for source in s.generated:
            materialise(source, folder)
    (base / f"{plan.graph.name.split('.')[0]}-plan.txt").write_text(str(plan))


def watched(plan: Plan, calls: Sequence[Call], tensor: Buffer) -> list[Call]:
    """The calls of the plan's steps with what the flags ask for around them."""
    out = list(calls)
    if config.debug() >= 2:
        out = [_timed(s, c, k) for k, (s, c) in enumerate(zip(plan.steps, out, strict=True))]
    return _checked(plan, out, tensor) if config.check() else out


# ---- time ------------------------------------------------------------------------------------


def gpu_here() -> str | None:
    """The name by which the GPU at hand is known; None without one, and for one that is not.

    A model with another number of processors is another GPU: a PCIe H100 has 114.
    """
    if not torch.cuda.is_available():
        return None
    about = torch.cuda.get_device_properties(torch.cuda.current_device())
    return gpu_named(about.name, about.multi_processor_count)


def gpu_key() -> str | None:
    """Under which name what is measured on the GPU at hand is kept; None without one."""
    if not torch.cuda.is_available():
        return None
    about = torch.cuda.get_device_properties(torch.cuda.current_device())
    return key_named(about.name, about.multi_processor_count)


def key_named(name: str, processors: int) -> str:
    """The GPU by its known name, else by model and processors: "a100-sxm4-80gb-108"."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")
    return gpu_named(name, processors) or f"{slug}-{processors}"


def gpu_named(name: str, processors: int) -> str | None:
    """The GPU that we have ceilings of, by what its driver says; None where there is none."""
    for known, ceiling in CEILINGS.items():
        if known in name.lower() and processors == ceiling.processors:
            return known
    return None


def clock(call: Call) -> float:
    """Seconds that a call takes, on the GPU where there is one."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _duration(seconds: float) -> str:
    us = 1e6 * seconds
    return f"{us:9.1f} us" if us < 1e5 else f"{us / 1e3:9.1f} ms"


def timing_line(step: Step, seconds: float, gpu: str | None) -> str:
    """One line: what ran, for which layers, how long, and at which rates."""
    if not isinstance(step, Launch):
        return f"{step}  {_duration(seconds)}"
    text = (
        f"{step.kernel:24} {', '.join(step.where.layers)[:28]:28} {_duration(seconds)}"
        f" {step.flops / seconds / 1e9:8.3g} GFLOP/s {step.bytes / seconds / 1e9:8.3g} GB/s"
    )
    if gpu is not None:
        share = floor_us(step.flops, step.bytes, step.math, gpu) / (1e6 * seconds)
        text += f" {share:5.0%} of the roofline of {gpu}"
    return text


def _timed(step: Step, call: Call, k: int) -> Call:
    gpu = gpu_here()

    def run() -> None:
        print(f"graphnet: {k:3} {timing_line(step, clock(call), gpu)}", file=sys.stderr)

    return run


def timed_task(task: Any, call: Callable[[Any], None]) -> Callable[[Any], None]:
    """A task of the cpu target with a line about its time, where GRAPHNET_DEBUG asks for it."""
    if config.debug() < 2:
        return call
    ops = "+".join(dict.fromkeys(e.op for e in task.eqns)) or "relayout"
    layers = ", ".join(dict.fromkeys(n for e in task.eqns for n in e.where.layers))
    flops = sum(eqn_cost(e).flops for e in task.eqns)

    def run(env: Any) -> None:
        seconds = clock(lambda: call(env))
        rate = f" {flops / seconds / 1e9:8.3g} GFLOP/s" if flops else ""
        print(f"graphnet: {ops[:40]:40} {layers[:28]:28} {_duration(seconds)}{rate}",
              file=sys.stderr)  # fmt: skip

    return run


# ---- reference -------------------------------------------------------------------------------


def _checked(plan: Plan, calls: list[Call], tensor: Buffer) -> list[Call]:
    """Around the first launch of each equation its operands are kept, behind each launch what it
    wrote, and behind the last all is compared: kernels overwrite state in place, and the arena
    reuses what is dead."""
    alias = {e.out: e.inputs[0] for e in plan.graph.eqns if is_view(e)}
    for e in plan.graph.eqns:
        if e.op == "all_reduce":  # in place of its operands
            pairs = zip(e.outputs, e.inputs, strict=True)
            alias |= {o: i for o, i in pairs if o is not None and o.name not in plan.types}
    old = {new: before for before, new in plan.graph.commits}

    def root(v: Value) -> Value:
        while v in alias:
            v = alias[v]
        return v

    def read(v: Value) -> torch.Tensor:
        flat = tensor(Ref(root(v).name, plan.types[root(v).name][0]))
        return v.type.layout.read(flat, v.type.shape).cpu()

    for e in plan.graph.eqns:
        own = _steps_of(e, plan.steps)
        if not own:  # a view, or a fill
            continue
        kept: dict[Value, torch.Tensor] = {}
        got: dict[Value, torch.Tensor] = {}
        # Made by a launch that took its turn before, in the same program.
        late = {*plan.steps[own[0]].writes} - {v.name for v in e.results}

        def around(
            k: int, call: Call, e: Eqn = e, own: list[int] = own, kept: dict = kept,
            got: dict = got, late: set[str] = late,
        ) -> None:  # fmt: skip
            if k == own[0]:
                kept.update((v, read(v)) for v in e.inputs)
                kept.update((v, read(old[v])) for v in e.results if v in old)
            call()
            if k == own[0]:
                kept.update((v, read(v)) for v in e.inputs if root(v).name in late)
            got.update((v, read(v)) for v in e.results if v.name in plan.steps[k].writes)
            if k == own[-1]:
                found = [None if v is None else got[v] for v in e.outputs]
                _compare(e, plan.steps[k], kept, found)
                kept.clear()

        for k in own:
            calls[k] = partial(around, k, calls[k])
    return calls


def _steps_of(eqn: Eqn, steps: Sequence[Step]) -> list[int]:
    """The launches that compute an equation: those that write its results, and those that fill
    the workspaces which they read. A group counts by its members."""
    names = {v.name for v in eqn.results}
    out: list[int] = []
    for k in range(len(steps) - 1, -1, -1):
        s = steps[k]
        own = [m for m in s.parts if names & set(m.writes)] if isinstance(s, Launch) else []
        names |= {r for m in own for r in m.reads if r.startswith(".")}
        out += [k] if own else []
    return out[::-1]


def _math(eqn: Eqn) -> str:
    found = [m for e in eqn.plain if (m := getattr(e.attrs, "math", None))]
    return max(found, key=lambda m: TOLERANCE[m], default="ieee")


def _compare(
    eqn: Eqn, step: Step, kept: Mapping[Value, torch.Tensor], got: Sequence[torch.Tensor | None]
) -> None:
    want = oracle(eqn, kept)
    if why := disagreement(eqn, got, want, kept):
        raise NumericsError(
            f"{step.kernel if isinstance(step, Launch) else step}: {why}",
            **eqn.where.located,
            help="GRAPHNET_DUMP=folder leaves the graph, the plan and the generated code",
        )


def oracle(eqn: Eqn, operands: Mapping[Value, torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    """The equation's results by its reference, in float64, from operands as they are stored."""
    values = (operands[v] for v in eqn.inputs)
    return run_eqn(eqn, [t.double() if t.is_floating_point() else t for t in values])


def disagreement(
    eqn: Eqn,
    got: Sequence[torch.Tensor | None],
    want: Sequence[torch.Tensor | None],
    old: Mapping[Value, torch.Tensor],
) -> str | None:
    """The first result that differs from its reference, and how; None where none does.

    old  the earlier value of results that replace a parameter or its momentum
    """
    most, rounded = TOLERANCE[_math(eqn)], _rounded(eqn)
    ties = TIES
    if _math(eqn) == "bf16" and len(members_of(eqn)) > 1:
        most, ties = STAGES_TOLERANCE, STAGES_TIES
    for v, g, w in zip(eqn.outputs, got, want, strict=True):
        if v is not None and g is not None and w is not None:
            bound = max(most, OUT_TOLERANCE.get(v.type.dtype.name, 0.0))
            why = _differs(g, w, old.get(v), bound, ROUNDED if v in rounded else 0.0, ties)
            if why:
                return f"{v}: {v.type} {why}"
    return None


def _rounded(eqn: Eqn) -> set[Value]:
    """The results that are rounded to TF32, in whatever layout."""
    inner = dict(zip(eqn.body.returns, eqn.results, strict=True)) if eqn.body is not None else {}
    found: set[Value] = set()
    for e in eqn.plain:
        if e.op == "round_tf32" or (e.op == "relayout" and e.inputs[0] in found):
            found.add(e.out)
    return {inner.get(v, v) for v in found}


def _differs(
    got: torch.Tensor, want: torch.Tensor, old: torch.Tensor | None, most: float,
    tie: float = 0.0, ties: float = TIES,
) -> str | None:  # fmt: skip
    """How a result differs from its reference; None where it does not.

    old  what a parameter was: then its change is held against the reference's, since the
         parameter itself hardly moves
    tie  share of the reference's norm that rounding the other way may make
    ties share of the elements of an index that may differ
    """
    if not got.is_floating_point():
        share = (got != want.to(got.dtype)).double().mean().item()
        return f"differs in {share:.2%} of its elements" if share > ties else None
    got64, want64 = got.double(), want.double()
    if not torch.equal(got64.isfinite(), want64.isfinite()):
        bad = int((got64.isfinite() != want64.isfinite()).sum())
        return f"is finite where its reference is not, or the reverse, in {bad} elements"
    got64, want64 = got64.nan_to_num(0, 0, 0), want64.nan_to_num(0, 0, 0)
    base = want64 if old is None else want64 - old.double()
    noise = tie + (0.0 if old is None else ULPS.get(_short(got.dtype), 0.0))
    bound = most * float(base.norm()) + noise * float(want64.norm())
    error = float((got64 - want64).norm())
    if error <= max(bound, 1e-30):
        return None
    at = int((got64 - want64).abs().argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(at), got.shape)]
    return (
        f"differs from its reference: norm {error:.3e}, bound {bound:.3e}; worst at {index}: "
        f"{got64.flatten()[at]:.6g}, reference {want64.flatten()[at]:.6g}"
    )


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16"}.get(dtype, "")


def check_step(graph: Graph, storage: Mapping[str, torch.Tensor], run: Call) -> Call:
    """For the cpu target, whose tasks are no launches: the whole step against the float64 graph.

    What it returns and commits must agree within a relative norm of WHOLE_STEP.
    """
    places = {v: e.where for e in graph.eqns for v in e.results}

    def checked() -> None:
        inputs = {i.value.name: storage[i.value.name].clone() for i in graph.inputs}
        run()
        returned, committed = evaluate_step(graph, to_double(inputs))
        pairs: list[tuple[Value, torch.Tensor, torch.Tensor, torch.Tensor | None]] = [
            (v, storage[v.name], w, None) for v, w in zip(graph.returns, returned, strict=True)
        ]
        pairs += [(n, storage[o.name], committed[o.name], inputs[o.name]) for o, n in graph.commits]
        for v, got, want, old in pairs:
            if why := _differs(got, want, old, WHOLE_STEP):
                where = places.get(v)
                raise NumericsError(
                    f"the step's {v}: {v.type} {why}",
                    layer=(", ".join(where.layers) or None) if where else None,
                    where=(where.place or None) if where else None,
                    help="target='interpret' with GRAPHNET_CHECK=1 checks kernel by kernel",
                )

    return checked
