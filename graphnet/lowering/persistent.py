"""A whole training step, many times, in one kernel: the plan's launches become its phases.

Every launch of the plan is a loop over its programs, as a device function (see device.py). Launches
that do not depend on each other share a phase; between phases all programs wait for each other.
The programs are as many as the GPU holds at once. The arithmetic is that of the launches, in their
order, so the result has the same bits.

With `Take` the kernel also draws its own batches from a data set on the device, so that a run of
many steps needs the host once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphnet.errors import ConfigError
from graphnet.ir.graph import NOWHERE
from graphnet.lowering.codegen import Ref, Source
from graphnet.lowering.cost import floor_us
from graphnet.lowering.device import Functions
from graphnet.lowering.plan import Plan
from graphnet.lowering.steps import Box, Fill, Launch
from graphnet.lowering.tuning import PROCESSORS

RUN = 1024  # steps of one launch at most
SYNC, STEPS = ".sync", ".steps"
LIMIT = 1 << 22  # looks at a barrier, some seconds
MOST_US = 100  # of the plan's floors; LeNet-5 has 5
TAKEN = (".images", ".all_labels", ".order", ".counts", ".rates")


@dataclass(frozen=True)
class Take:
    """A data set to draw from: `dtype` and count of its images, "u8" or "f32"."""

    dtype: str
    images: int


def levels(plan: Plan) -> list[list[int]]:
    """The steps by the length of the longest path to them: those of a level are independent."""
    level = [0] * len(plan.steps)
    for k in range(len(plan.steps)):
        level[k] = max((level[a] + 1 for a, b in plan.edges if b == k), default=0)
    return [[k for k, at in enumerate(level) if at == n] for n in range(max(level) + 1)]


def refusal(plan: Plan) -> str | None:
    """Why a plan cannot become one kernel; None where it can."""
    for s in plan.steps:
        if not isinstance(s, Launch):
            return f"{s} is no kernel of ours"
        if any(isinstance(a, Box) for a in s.args):
            return f"{s.kernel} reads through descriptors, which no grid barrier orders"
    warps = {s.num_warps for s in plan.launches if s.programs > 1}
    if len(warps) > 1:
        return f"its launches have {sorted(warps)} warps, and the arithmetic would change"
    floor = sum(floor_us(s.flops, s.bytes, s.math) for s in plan.launches)
    if floor > MOST_US:
        return (
            f"its launches take {floor:.0f} us at the least (more than {MOST_US}): "
            "starting them is not what it waits for"
        )
    return None


def fold(plan: Plan, *, programs: int = PROCESSORS, take: Take | None = None) -> Plan:
    """The plan with one launch in place of all.

    plan      made with `parallel=True`, so that memory is shared along true dependencies only
    programs  how many run at once; no more than the GPU holds
    take      also draw each step's batch

    ConfigError where the plan holds what cannot be a phase.
    """
    if why := refusal(plan):
        raise ConfigError(f"persistent=True: {why}", help="leave persistent out")
    types = {**plan.types, SYNC: ("i32", 2), STEPS: ("i32", 1)}
    storage = {**plan.storage, STEPS: STEPS, SYNC: SYNC}
    if take is not None:
        batch = plan.graph.input("x").value.type.shape[0]
        size = plan.graph.input("x").value.type.numel // batch
        sizes = (take.images * size, take.images, RUN * batch, RUN, RUN)
        kinds = (take.dtype, "i64", "i64", "i32", "f32")
        types.update(zip(TAKEN, zip(kinds, sizes, strict=True), strict=True))
        storage.update((n, n) for n in TAKEN)
    launch = _Writer(plan, types, take).launch(programs)
    return replace(
        plan, steps=(Fill(SYNC, 0), launch), edges=((0, 1),), streams=(0, 0), storage=storage,
        types=types, inner=plan,
    )  # fmt: skip


class _Writer:
    """Writes the kernel: its pointers, its phases, and the barriers between them."""

    def __init__(self, plan: Plan, types: dict[str, tuple[str, int]], take: Take | None) -> None:
        self.plan, self.types, self.take = plan, types, take
        self.functions = Functions()
        self.pointers: dict[str, str] = {}  # buffer to parameter
        self.epilogues: dict[str, Source] = {}

    def pointer(self, name: str) -> str:
        return self.pointers.setdefault(name, f"p{len(self.pointers)}")

    def launch(self, programs: int) -> Launch:
        phases = ([self._take()] if self.take else []) + [
            self._phase(group) for group in levels(self.plan)
        ]
        body = self._body(phases)
        names = list(self.pointers)
        source = Source(f"{self.functions.text()}\n\n\n{body}")
        constants: dict[str, Any] = {
            "PROGRAMS": programs, "PHASE": -1, "LIMIT": LIMIT, **self.epilogues
        }  # fmt: skip
        own = self.plan.launches
        layers = tuple(dict.fromkeys(n for s in own for n in s.where.layers))
        return Launch(
            "persistent", "graphnet.kernels.persistent",
            tuple(Ref(n, self.types[n][0]) for n in names), tuple(constants.items()),
            (programs, 1, 1), tuple(names), tuple(dict.fromkeys(w for s in own for w in s.writes)),
            num_warps=max(s.num_warps for s in own), num_stages=max(s.num_stages for s in own),
            flops=sum(s.flops for s in own), bytes=sum(s.bytes for s in own),
            math=max((s.math for s in own), key=("ieee", "tf32", "bf16").index),
            where=replace(NOWHERE, layers=layers), code=source, cooperative=True,
            phases=len(phases),
        )  # fmt: skip

    def _take(self) -> list[str]:
        x = self.plan.graph.input("x").value.type
        batch = x.shape[0]
        inputs = {i.value.name for i in self.plan.graph.inputs}
        labels = "labels" in inputs
        function = self.functions.need("persistent", "take_rows")
        pointers = [self.pointer(n) for n in TAKEN[:4]]
        pointers += ["step", self.pointer("x"), self.pointer("labels") if labels else "None"]
        call = f"{function}(t, 0, 0, {', '.join(pointers)}, {self.pointer('live')}, "
        call += f"{batch}, {x.numel // batch}, {labels}, 1024)"
        lines = [f"# a batch of {batch}", *_tasks(batch), f"    {call}"]
        if "lr" in inputs:
            rate = f"tl.load({self.pointer('.rates')} + step)"
            lines += ["if me == 0:", f"    tl.store({self.pointer('lr')}, {rate})"]
        return lines

    def _phase(self, group: Sequence[int]) -> list[str]:
        launches = [self.plan.launches[k] for k in group]
        total = sum(s.programs for s in launches)
        what = "; ".join(f"{s.kernel} ({', '.join(s.where.layers) or '-'})" for s in launches)
        lines = [f"# {what}", *_tasks(total)]
        first = 0
        for k, s in enumerate(launches):
            task = f"t - {first}" if first else "t"
            call = self._call(s, f"({task})" if first else task)
            first += s.programs
            if len(launches) == 1:
                lines.append(f"    {call}")
            elif k == len(launches) - 1:
                lines += ["    else:", f"        {call}"]
            else:
                lines += [f"    {'if' if k == 0 else 'elif'} t < {first}:", f"        {call}"]
        return lines

    def _call(self, s: Launch, task: str) -> str:
        g0, g1, g2 = s.grid
        ids = [f"{task} % {g0}" if g1 * g2 > 1 else task, "0", "0"]
        if g1 > 1:
            ids[1] = f"{task} // {g0} % {g1}" if g2 > 1 else f"{task} // {g0}"
        if g2 > 1:
            ids[2] = f"{task} // {g0 * g1}"
        module = s.module.rpartition(".")[2]
        function = self.functions.need(module, s.kernel)
        takes = self.functions.parameters(module, s.kernel)
        args = [*ids, *(self._argument(a) for a in s.args)]
        args += [f"{k}={self._constant(v)}" for k, v in s.constants if k in takes]
        return f"{function}({', '.join(args)})"

    def _argument(self, a: Any) -> str:
        if isinstance(a, tuple):
            inner = ", ".join(self.pointer(r.name) for r in a)
            return f"({inner},)" if len(a) == 1 else f"({inner})"
        return "None" if a is None else self.pointer(a.name)

    def _constant(self, value: Any) -> str:
        if not isinstance(value, Source):
            return repr(value)
        for name, known in self.epilogues.items():
            if known == value:
                return name
        name = f"E{len(self.epilogues)}"
        self.epilogues[name] = value
        return name

    def _body(self, phases: Sequence[Sequence[str]]) -> str:
        barrier = self.functions.use("persistent", "grid_barrier")
        steps, sync = self.pointer(STEPS), self.pointer(SYNC)
        ring = [n for n in self.pointers if self.plan.storage.get(n) == "ring"]
        lines = ["me = tl.program_id(0)", "turn = 0", "alive = me >= 0"]
        lines.append(f"for step in range(tl.load({steps})):")
        for n, phase in enumerate(phases):
            lines += [f"    if PHASE < 0 or PHASE == {n}:", *(f"        {p}" for p in phase)]
            lines += [
                "    if PHASE < 0:",
                "        turn += 1",
                f"        alive = {barrier}({sync}, turn, alive, PROGRAMS, LIMIT)",
            ]
        if ring:  # nobody takes what a broken barrier left for a loss
            count = self.types[ring[0]][1]
            lines += [
                "if PHASE < 0 and me == 0:",
                f"    if tl.load({sync} + 1, volatile=True) > 0:",
                f"        for k in range({count}):",
                f'            tl.store({self.pointer(ring[0])} + k, float("nan"))',
            ]
        names = ", ".join(self.pointers.values())
        constants = ["PROGRAMS", "PHASE", "LIMIT", *self.epilogues]
        head = f"def persistent(\n    {names},\n"
        head += "    " + ", ".join(f"{c}: tl.constexpr" for c in constants) + ",\n):"
        about = [f"#     {p} {n}: {self.types[n][0]}[{self.types[n][1]}]"
                 for n, p in self.pointers.items()]  # fmt: skip
        text = "\n".join([head, *(f"    {line}" for line in lines)])
        return f"@triton.jit\n{text}\n\n\n# pointers:\n" + "\n".join(about) + "\n"


def _tasks(count: int) -> list[str]:
    """The head of a loop over this program's share of `count` tasks."""
    # The interpreter's ranges count in Python's ints, templates want tensors.
    return [f"for task in range(me, {count}, PROGRAMS):", "    t = me * 0 + task"]


def programs_here(target: str) -> int:
    """How many programs of a persistent kernel the target holds at once: one a processor."""
    if target != "cuda":
        return 1
    import torch

    if not torch.cuda.is_available():
        return PROCESSORS
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
