"""Programs: a compiled graph with its storage, called with torch tensors.

    Infer      infer(x) -> logits
    Evaluate   ev(x, y) -> (loss, logits)
    Gradients  g(x, y) -> (loss, {key: gradient})
    TrainStep  step(x, y) -> loss; see training.py

A batch may be smaller than compiled: the input copy fills the rows behind it with zeros.

Programs may be called from several threads: those of one net take turns, since they share its
State, and so do calls of one program, since they share its buffers.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch

from graphnet.errors import ConfigError, DataError
from graphnet.ir.graph import Graph
from graphnet.ir.types import f32
from graphnet.passes.shard import RANK
from graphnet.runtime.group import Group
from graphnet.runtime.hypers import Hypers
from graphnet.runtime.inputs import Inputs, classes_of, least_rows
from graphnet.runtime.state import State

Prepare = Callable[..., Callable[[], None]]
_STAGES = ("traced", "joint", "fused")
Method = TypeVar("Method", bound=Callable[..., Any])


def taking_turns(call: Method) -> Method:
    """A method of a program, run by one thread at a time for all programs of its net."""

    @functools.wraps(call)
    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.state.lock:
            return call(self, *args, **kwargs)

    return cast(Method, locked)


class Program:
    """Base of the four: owns inputs, outputs and hypers, and attaches to the net's State.

    plan     the lowering plan; `graph(stage)` are the graphs on the way to it
    device   where it runs; inputs may lie there or on the CPU
    shape    the compiled input shape, batch first
    """

    def __init__(
        self,
        *,
        stages: Any,
        plan: Any,
        prepare: Prepare,
        state: State,
        target: str,
        precision: str,
        seed: int = 0,
        shared: Mapping[str, torch.Tensor] | None = None,
        group: Group | None = None,
        global_batch: int = 0,
    ) -> None:
        self.stages, self.plan, self.state = stages, plan, state
        self._shared = dict(shared or {})  # storage of inputs that belongs to another program
        self.target, self.precision, self.seed = target, precision, seed
        self.device, self.group = state.device, group
        self.global_batch = global_batch  # rows of a step on all ranks
        self._told = torch.zeros(3, dtype=torch.int32, device=self.device)
        with state.lock:
            self._attach(prepare if group is None else functools.partial(prepare, group=group))

    def _attach(self, prepare: Prepare) -> None:
        """Makes what the program owns, and meets the state."""
        stages, plan, state = self.stages, self.plan, self.state
        graph: Graph = plan.graph
        self.divided = any(i.parts > 1 for i in graph.inputs)  # ranks share the channels, not rows
        if self.divided:
            state.parts.group = self.group
        self._entries = state.attach(graph)
        self._storage = {**self._shared, **{e.name: e.tensor for e in self._entries}}
        inputs = [(i.value.name, i.value.type, i.role) for i in graph.inputs]
        numbers = [n for n, type, role in inputs if role == "hyper" and type.dtype == f32]
        self._hypers = Hypers(numbers, self.device)
        for name, type, role in inputs:
            if name in self._shared:
                continue
            if name in self._hypers:
                self._storage[name] = self._hypers.scalar(name)
            elif name == "live_all" and role == "hyper":
                self._storage[name] = self._told[0]
            elif role in ("data", "hyper"):
                self._storage[name] = self._zeros(type)
        for v in graph.returns:
            if v.name not in self._storage:
                self._storage[v.name] = self._zeros(v.type)
        self.shape = tuple(stages.traced.input("x").value.type.shape)
        self.classes = classes_of(stages.traced)
        self._returns = tuple(v.name for v in graph.returns)
        takes = stages.traced.input("x").value.type.dtype.torch
        self._inputs = Inputs(
            self._storage, takes, self.classes, least_rows(stages.traced),
            self.group is not None and not self.divided,
        )  # fmt: skip
        rank, ranks = (self.group.rank, self.group.ranks) if self.group else (0, 1)
        if self.divided:
            if RANK in self._storage:
                self._storage[RANK].fill_(rank)
            rank, ranks = 0, 1  # all have the same rows
        self._rows_before = rank * self.shape[0]
        self.global_batch = self.global_batch or ranks * self.shape[0]
        if "first_row" in self._storage:
            self._storage["first_row"].fill_(self._rows_before)
        if "seed" in self._storage:
            self._storage["seed"].fill_(_signed64(self.seed))
        targets = {old.name for old, _ in graph.commits}
        self._writes = any(e.role == "param" and e.name in targets for e in self._entries)
        self._keeps = {e.name for e in self._entries if e.role == "derived"} & targets
        if self.group is not None:
            self._join_group(self.group)
        state.acquire(self._entries, self.divided)  # a prepare that warms up reads current values
        self._prepare = prepare
        self._run = prepare(plan, self._storage)
        if hasattr(self._run, "record"):
            self._run.record()
        if hasattr(self._run, "forget"):
            state.followers.add(self._run)

    def _join_group(self, group: Group) -> None:
        """Takes over the state of rank 0, and how far it has come."""
        self.state.settle()
        cells = [e.whole for e in self._entries if e.role != "derived"]
        group.share(c.live for c in cells)
        for c in cells:
            c.touched()
        state = self.state
        counts = state.steps, state.pending, state.pending_rows
        state.steps, state.pending, state.pending_rows = group.tell(counts)

    def _zeros(self, type: Any) -> torch.Tensor:
        return type.layout.zeros(type.shape, type.dtype.torch, self.device)

    def _input(self, name: str, type: Any) -> torch.Tensor:
        """Where the step reads an input, or a place for it where it reads none of that name."""
        return self._storage[name] if name in self._storage else self._zeros(type)

    def graph(self, stage: str) -> Graph:
        """The graph after a stage: "traced", "joint" or "fused"."""
        if stage not in _STAGES:
            raise ConfigError(f"unknown stage {stage!r}", help=f"stages: {', '.join(_STAGES)}")
        return getattr(self.stages, stage)

    # ---- inputs -----------------------------------------------------------------------------

    def _feed(
        self,
        x: torch.Tensor,
        y: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
        epoch: int = 0,
    ) -> int:
        """Copies a batch in and returns its rows; with several ranks, sums these up over them."""
        first = self.state.steps * self.global_batch + self._rows_before
        rows = self._inputs.feed(x, y, index, epoch, first)
        if self.group is not None:
            self._told[0], self._told[1] = rows, int(self.group.stopping)
            sample = _sample(x, y) if self.divided else 0
            self._told[2] = sample
            self.group.sum(self._told)()
            if self.divided and not self._told.is_cuda:
                self._check_alike(rows, sample, self.group.ranks)
        return rows

    def _check_alike(self, rows: int, sample: int, ranks: int) -> None:
        """DataError on every rank where those of two towers were not given the same batch."""
        told = self._told.tolist()
        if told[0] != ranks * rows or told[2] != ranks * sample:
            raise DataError(
                "the ranks of two towers were given different batches",
                help="give every rank the same rows, in the same order, and the same labels",
            )

    def rows_of_all(self, rows: int) -> int:
        """The rows of the batch on all ranks, where this one has so many. Waits for the device."""
        return rows if self.group is None or self.divided else int(self._told[0])

    @property
    def stop_told(self) -> bool:
        """Whether a rank was `group.stopping` when it came to the latest step: all give the same
        answer. Waits for the device."""
        return bool(self._told[1])

    # ---- running ----------------------------------------------------------------------------

    def _step(self) -> None:
        self._step_with(self._run)

    def _step_with(self, run: Callable[[], None]) -> None:
        self.state.acquire(self._entries, self.divided)
        try:
            run()  # no target records gradients
        finally:
            if self.divided and self._writes:
                self.state.lead()
            others = len(self.state.derived) > len(self._keeps) or self.state.followers
            if self._writes and others:
                self.state.stale = True  # copies that this program does not keep up

    def _result(self, index: int, rows: int | None = None) -> torch.Tensor:
        """A fresh copy of a returned value, row-major, cut to the live rows."""
        out = self._storage[self._returns[index]]
        out = out if rows is None else out[:rows]
        return out.clone(memory_format=torch.contiguous_format)

    def __repr__(self) -> str:
        name = self.stages.traced.name.split(".")[0]
        shape = "x".join(map(str, self.shape))
        return f"{type(self).__name__}({name}, {shape}, {self.target}, {self.precision})"


def _sample(x: torch.Tensor, y: torch.Tensor | None) -> int:
    """A number by which batches that differ are told apart: of the labels, and of some values of
    the images. 0 where they lie on a GPU, which would have to be waited for."""
    if x.is_cuda or y is not None and y.is_cuda:
        return 0
    some = x.detach().flatten()[:: max(1, x.numel() // 64)].contiguous()
    found = zlib.crc32(some.numpy().tobytes())
    return (found if y is None else zlib.crc32(y.contiguous().numpy().tobytes(), found)) >> 2


def _signed64(seed: int) -> int:
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed


class Infer(Program):
    """infer(x) -> logits: a fresh tensor with as many rows as x, or a tuple of them where forward
    returns several. Dropout is off."""

    @taking_turns
    def __call__(self, x: torch.Tensor) -> Any:
        rows = self._feed(x)
        self._step()
        out = tuple(self._result(k, rows) for k in range(len(self._returns)))
        return out[0] if len(out) == 1 else out


class Evaluate(Program):
    """ev(x, y) -> (loss, logits): the mean loss over the rows. Dropout is off."""

    @taking_turns
    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self._feed(x, y)
        self._step()
        return self._result(0), self._result(1, rows)


class Gradients(Program):
    """g(x, y) -> (loss, {state_dict key: gradient}): training forward, nothing is updated."""

    def __init__(self, *, keys: tuple[str, ...], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.keys = keys

    @taking_turns
    def __call__(
        self, x: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self._feed(x, y)
        self._step()
        grads = {key: self._result(k) for k, key in enumerate(self.keys, 1)}
        return self._result(0), grads
