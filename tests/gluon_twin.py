"""Gluon kernels without a GPU: their own text, run by a stand-in for what they import from Gluon.

Triton does not interpret Gluon. So the kernels' files are executed here with other names behind
`gl`, `tma`, `mbarrier` and the products. Every partition is a thread, shared memory is full of NaN,
a barrier counts arrivals and bytes, and a product is worked out as late as its wait allows: what is
given back too early is overwritten, what is waited for in vain ends in `Stuck`. Layouts mean
nothing here, and neither does timing.
"""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable
from functools import cache
from math import prod
from types import SimpleNamespace

import torch

from graphnet.lowering.build.descriptors import WIDEST
from graphnet.lowering.build.tools import package
from graphnet.lowering.launch.files import Source
from graphnet.lowering.launch.steps import Box, Launch, Table, bind
from graphnet.lowering.targets import interpret

SECONDS = 20.0  # after which a wait is in vain
_own = threading.local()  # program number and products under way of a thread


class Stuck(RuntimeError):
    """A partition waits for what nobody sends."""


class Number(int):
    """A constexpr."""

    @property
    def value(self) -> int:
        return int(self)


class Tile(torch.Tensor):
    """A distributed tensor."""

    @property
    def type(self):
        return SimpleNamespace(layout=None)

    def split(self):
        return self[..., 0], self[..., 1]


def tile(t: torch.Tensor) -> Tile:
    return t.as_subclass(Tile)


class Pointer:
    """An address in a flat tensor."""

    def __init__(self, base: torch.Tensor, at=0) -> None:
        self.base, self.at = base, at

    def __add__(self, offset) -> Pointer:
        return Pointer(self.base, self.at + offset)


def load(p: Pointer, mask=None, other=0):
    if not isinstance(p.at, torch.Tensor):
        return p.base[p.at].item()
    at, mask = torch.broadcast_tensors(p.at, torch.tensor(True) if mask is None else mask)
    out = torch.full(at.shape, other, dtype=p.base.dtype)
    out[mask] = p.base[at[mask]]
    return tile(out)


def store(p: Pointer, value: torch.Tensor, mask=None) -> None:
    mask = torch.tensor(True) if mask is None else mask
    at, value, mask = torch.broadcast_tensors(p.at, value, mask)
    kept = at[mask]
    assert kept.unique().numel() == kept.numel(), "two threads write one element"
    p.base[kept] = value[mask].to(p.base.dtype)


class Barrier:
    """Counts arrivals and bytes of one phase after another."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.bytes = self.phase = 0

    def start(self, arrivals: int) -> None:
        self.arrivals = self.missing = arrivals

    def change(self, arrivals: int, moved: int) -> None:
        with self.changed:
            self.missing -= arrivals
            self.bytes += moved
            assert self.missing >= 0, "one arrival too many"
            if self.missing == self.bytes == 0:
                self.phase, self.missing = self.phase + 1, self.arrivals
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase & 1 != parity, SECONDS):
                raise Stuck(f"phase {self.phase} of a barrier, {self.missing} arrivals missing")


class Shared:
    """Shared memory: a view of a tensor, or barriers."""

    def __init__(self, held) -> None:
        self.held = held

    def index(self, i: int):
        held = self.held[i]
        return held if isinstance(held, Barrier) else Shared(held)

    def reshape(self, shape) -> Shared:
        return Shared(self.held.view(shape))  # of what lies so: no copy

    def permute(self, order) -> Shared:
        return Shared(self.held.permute(order))

    def slice(self, start: int, length: int, dim: int) -> Shared:
        return Shared(self.held.narrow(dim, start, length))


class Described:
    """A tensor descriptor."""

    layout = None

    def __init__(self, base: torch.Tensor, box: Box) -> None:
        assert box.gluon and max(box.block) <= WIDEST
        assert all(s * base.element_size() % 16 == 0 for s in box.steps[:-1]) and box.steps[-1] == 1
        self.base, self.box, self.dtype = base, box, base.dtype

    def fetch(self, at) -> torch.Tensor:
        offset, inside = torch.tensor(0), torch.tensor(True)
        for d, (first, wide) in enumerate(zip(at, self.box.block, strict=True)):
            i = first + torch.arange(wide)
            i = i.view([-1 if k == d else 1 for k in range(len(at))])
            offset, inside = offset + i * self.box.steps[d], inside & (i >= 0) & (
                i < self.box.size[d])  # fmt: skip
        values = self.base[offset.clamp(0, len(self.base) - 1)]
        return torch.where(inside, values, torch.zeros((), dtype=values.dtype))


def copy(box: Described, at, bar: Barrier, into: Shared) -> None:
    values = box.fetch(at)
    assert values.shape == into.held.shape, (values.shape, into.held.shape)
    into.held.copy_(values)
    bar.change(0, -values.numel() * values.element_size())


class Product:
    """An accumulator whose product is under way."""

    def __init__(self, a: Shared, b: Shared, into) -> None:
        self.parts, self.done = (a, b, into), None
        rows, columns = a.held.shape[0], b.held.shape[1]
        assert rows % 64 == 0 and columns % 8 == 0 and a.held.shape[1] % 16 == 0
        assert tuple(into.shape) == (rows, columns), "an accumulator of another shape"
        self.shape = into.shape

    def end(self):
        if self.done is None:
            a, b, into = self.parts
            into = into.end() if isinstance(into, Product) else into
            self.done = tile(into + a.held.float() @ b.held.float())
        return self.done


def product(a: Shared, b: Shared, acc, is_async: bool):
    made = Product(a, b, acc)
    _own.under_way.append(made)
    return made


def wait_for(left: int, deps):
    while len(_own.under_way) > left:
        _own.under_way.pop(0).end()
    done = [d if isinstance(d, Product) and d.done is None else getattr(d, "done", d) for d in deps]
    return done[0] if len(done) == 1 else tuple(done)


def specialise(parts, warps, registers) -> None:
    assert warps == [4, 1] and registers[0] * 2 + registers[1] <= 504
    failed: list[BaseException] = []
    program = _own.program

    def run(function: Callable, args) -> None:
        _own.program, _own.under_way = program, []
        try:
            function(*args)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=part, daemon=True) for part in parts]
    for t in threads:
        t.start()
    for t in threads:
        t.join(2 * SECONDS)
    if failed:
        raise failed[0]


def allocate(dtype, shape, layout, value=None) -> Shared:
    if layout == "barriers":
        return Shared([Barrier() for _ in range(shape[0])])
    held = torch.full([int(n) for n in shape], float("nan"), dtype=dtype)
    return Shared(held if value is None else held.copy_(value))


def _names() -> dict:
    """What the kernels' files import."""
    nothing = lambda *a, **k: None
    tl = SimpleNamespace(
        constexpr=Number, int64=torch.int64, uint64=torch.int64, int32=torch.int32,
        float32=torch.float32, bfloat16=torch.bfloat16, load=load, store=store,
        cdiv=lambda a, b: -(-a // b), maximum=max, minimum=min, static_range=range,
        where=torch.where, exp=torch.exp, abs=torch.abs, program_id=lambda axis: _own.program,
        zeros=lambda shape, dtype, layout=None: tile(torch.zeros(shape, dtype=dtype)),
        full=lambda shape, value, dtype, layout: tile(torch.full(shape, value, dtype=dtype)),
        arange=lambda a, b, layout: tile(torch.arange(a, b)), allocate_shared_memory=allocate,
        convert_layout=lambda x, layout: x, warp_specialize=specialise, SliceLayout=nothing,
        BlockedLayout=nothing, NVMMADistributedLayout=nothing,
        NVMMASharedLayout=SimpleNamespace(get_default_for=nothing),
    )  # fmt: skip
    same = lambda f: f
    return {
        "gl": tl, "tl": tl, "triton": SimpleNamespace(jit=same),
        "gluon": SimpleNamespace(jit=same, constexpr_function=same),
        "tma": SimpleNamespace(async_copy_global_to_shared=copy), "fence_async_shared": nothing,
        "warpgroup_mma": product, "warpgroup_mma_wait": wait_for,
        "cast_store": store, "maximum_nan": lambda a, b: torch.clamp_min(a, b),
        "mbarrier": SimpleNamespace(
            MBarrierLayout=lambda: "barriers",
            init=lambda bar, count: bar.start(count), wait=lambda bar, parity: bar.wait(parity),
            expect=lambda bar, size: bar.change(1, size),
            arrive=lambda bar, pred=True: bar.change(1, 0) if pred else None,
        ),
    }  # fmt: skip


def _run(text: str, names: dict) -> dict:
    """Executes a file without its imports."""
    tree = ast.parse(text)
    tree.body = [n for n in tree.body if not isinstance(n, ast.Import | ast.ImportFrom)]
    exec(compile(tree, "<twin>", "exec"), names)
    return names


@cache
def _kernels() -> dict:
    names = _names()
    folder = package("graphnet.kernels")
    common = ast.parse((folder / "common.py").read_text())
    common.body = [n for n in common.body if getattr(n, "name", "") == "inside"]
    exec(compile(common, "<twin>", "exec"), names)
    for file in ("conv_rows", "wgrad_rows", "gl_conv", "gl_wgrad"):
        _run((folder / f"{file}.py").read_text(), names)
    return names


def call(launch: Launch, tensor: Callable) -> Callable[[], None]:
    """A launch of a Gluon kernel as a call."""
    args, constants, options = bind(launch)
    assert options["num_warps"] == 4
    kernel = _kernels()[launch.kernel]

    def real(a):
        if isinstance(a, tuple):
            return tuple(map(real, a))
        if isinstance(a, Box):
            return Described(tensor(a.ref), a)
        return None if a is None else Pointer(tensor(a.ref if isinstance(a, Table) else a))

    values = {
        k: _run(v.text, _names())[v.function] if isinstance(v, Source)
        else Number(v) if type(v) is int else v
        for k, v in constants.items()
    }  # fmt: skip

    def run() -> None:
        for program in range(prod(launch.grid)):
            _own.program, _own.under_way = program, []
            kernel(*map(real, args), **values)

    return run


def calls(plan, tensor) -> list[Callable]:
    """A plan's steps as calls: Gluon kernels here, the others in Triton's interpreter."""
    gluon = lambda s: isinstance(s, Launch) and ".gl_" in s.module
    with interpret.interpreted():
        return [call(s, tensor) if gluon(s) else interpret._call(s, tensor, plan)
                for s in plan.steps]  # fmt: skip


buffers = interpret.buffers
