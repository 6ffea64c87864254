"""Programs: a compiled graph with its storage, called with torch tensors.

    Infer      infer(x) -> logits
    Evaluate   ev(x, y) -> (loss, logits)
    Gradients  g(x, y) -> (loss, {key: gradient})
    TrainStep  step(x, y) -> loss

A batch may be smaller than compiled: the input copy fills the rows behind it with zeros.

Programs may be called from several threads: those of one net take turns, since they share its
State, and so do calls of one program, since they share its buffers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch

from graphnet.errors import ConfigError, DataError, DTypeError, ShapeError
from graphnet.ir.graph import Graph
from graphnet.runtime.bound import Bound, check_bound, check_labels
from graphnet.runtime.optim import Optimizer
from graphnet.runtime.state import Entry, State

RING = 4096  # losses kept on the device; as in passes/autodiff
_OURS = ("ring", "step")  # counters that belong to every step, whatever its optimizer
Prepare = Callable[[Any, dict[str, torch.Tensor]], Callable[[], None]]
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
    ) -> None:
        self.stages, self.plan, self.state = stages, plan, state
        self.target, self.precision, self.seed = target, precision, seed
        self.device = state.device
        with state.lock:
            self._attach(prepare)

    def _attach(self, prepare: Prepare) -> None:
        """Makes what the program owns, and meets the state."""
        stages, plan, state = self.stages, self.plan, self.state
        graph: Graph = plan.graph
        self._entries = state.attach(graph)
        self._storage = {e.name: e.tensor for e in self._entries}
        inputs = [(i.value.name, i.value.type, i.role) for i in graph.inputs]
        for name, type, role in inputs:
            if role in ("data", "hyper"):
                self._storage[name] = self._zeros(type)
        for v in graph.returns:
            if v.name not in self._storage:
                self._storage[v.name] = self._zeros(v.type)
        self.shape = tuple(stages.traced.input("x").value.type.shape)
        self.classes = _classes(stages.traced)
        self._returns = tuple(v.name for v in graph.returns)
        self._live = self._epoch = 0
        self._takes = stages.traced.input("x").value.type.dtype.torch
        if "seed" in self._storage:
            self._storage["seed"].fill_(_signed64(self.seed))
        targets = {old.name for old, _ in graph.commits}
        self._writes = any(e.role == "param" and e.name in targets for e in self._entries)
        self._keeps = {e.name for e in self._entries if e.role == "derived"} & targets
        state.acquire(self._entries)  # a prepare that warms up reads current values
        self._run = prepare(plan, self._storage)

    def _zeros(self, type: Any) -> torch.Tensor:
        return type.layout.zeros(type.shape, type.dtype.torch, self.device)

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
        """Copies a batch in and returns its rows."""
        rows = self._check_x(x)
        if y is not None:
            self._check_y(y, rows)
        self._place(index, epoch, rows)
        self._copy("x", x, rows)
        if y is not None and "labels" in self._storage:
            self._copy("labels", y, rows)
        if rows != self._live:
            self._live = rows
            if "live" in self._storage:
                self._storage["live"].fill_(rows)
        return rows

    def _place(self, index: torch.Tensor | None, epoch: int, rows: int) -> None:
        """Where the rows stand in the data and in its epochs: what an augmentation draws by."""
        if "index" not in self._storage:
            if index is not None:
                raise ConfigError(
                    "this program draws nothing by index", help="compile it with augment="
                )
            return
        if index is None:  # no row twice
            first = self.state.steps * self.shape[0]
            index = torch.arange(first, first + rows)
        if index.dtype != torch.int64 or tuple(index.shape) != (rows,):
            raise ShapeError(f"index {index.dtype}{list(index.shape)} for {rows} rows")
        self._copy("index", index, rows)
        if epoch != self._epoch:
            self._epoch = epoch
            self._storage["epoch"].fill_(epoch)

    def _copy(self, name: str, source: torch.Tensor, rows: int) -> None:
        into = self._storage[name]
        into[:rows].copy_(source.detach(), non_blocking=True)
        if rows < into.shape[0]:
            into[rows:].zero_()

    def _check_x(self, x: torch.Tensor) -> int:
        if not isinstance(x, torch.Tensor):
            raise DataError(
                f"the input is a {type(x).__name__}", help="give a torch tensor: torch.as_tensor(x)"
            )
        if x.dtype != self._takes:
            raise DTypeError(
                f"the input has dtype {x.dtype}, not {self._takes}",
                help="x.float()" if self._takes == torch.float32 else "images as they are stored",
            )
        want = ", ".join(map(str, self.shape[1:]))
        if x.ndim != len(self.shape) or tuple(x.shape[1:]) != self.shape[1:]:
            raise ShapeError(f"the input has shape {list(x.shape)}, compiled for [N, {want}]")
        if not 1 <= x.shape[0] <= self.shape[0]:
            raise ShapeError(
                f"a batch of {x.shape[0]} rows, compiled for 1 to {self.shape[0]}",
                help="split the batch, or compile for a larger one",
            )
        self._check_device("input", x)
        return x.shape[0]

    def _check_y(self, y: torch.Tensor, rows: int) -> None:
        if not isinstance(y, torch.Tensor):
            raise DataError(
                f"the labels are a {type(y).__name__}",
                help="give a torch tensor: torch.as_tensor(y)",
            )
        if y.dtype.is_floating_point or y.dtype.is_complex or y.dtype == torch.bool:
            raise DTypeError(
                f"the labels have dtype {y.dtype}, not torch.int64", help="y.long()"
            )  # fmt: skip
        if tuple(y.shape) != (rows,):
            raise ShapeError(f"labels of shape {list(y.shape)} for {rows} rows; wanted [{rows}]")
        self._check_device("labels", y)
        # Labels on the GPU are not checked: that would wait for the device at every step.
        if y.device.type == "cpu" and self.classes:
            check_labels(y, self.classes)

    def _check_device(self, what: str, t: torch.Tensor) -> None:
        if t.device.type != "cpu" and t.device != self.device:
            raise DataError(
                f"the {what} lies on {t.device}, the program runs on {self.device}",
                help="move it: .cpu()" if self.device.type == "cpu" else f".to('{self.device}')",
            )

    # ---- running ----------------------------------------------------------------------------

    def _step(self) -> None:
        self._step_with(self._run)

    def _step_with(self, run: Callable[[], None]) -> None:
        self.state.acquire(self._entries)
        with torch.no_grad():
            run()
        if self._writes and len(self.state.derived) > len(self._keeps):
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


def _classes(traced: Graph) -> int:
    """Width of the logits that the loss reads, 0 without a loss."""
    made = traced.producers().get(traced.returns[0])
    if made is None or traced.returns[0].type.shape != ():
        return 0
    return made.inputs[0].type.shape[-1]


def _signed64(seed: int) -> int:
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed


class Infer(Program):
    """infer(x) -> logits: a fresh tensor with as many rows as x. Dropout is off."""

    @taking_turns
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = self._feed(x)
        self._step()
        return self._result(0, rows)


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


class TrainStep(Program):
    """step(x, y) -> loss before the update, the mean over the rows, still on the device.

    Each loss is a tensor of its own, overwritten 4,096 steps later; only float() synchronises.
    optimizer  the live view: set `lr`, `momentum`, `weight_decay` ... between steps

    A step that augments draws for each row by `index`, int64[N], its place in the data, and the
    epoch; without an index no place comes twice.
    """

    counts: tuple[str, ...] = ()  # numbers of the state that its optimizer saves

    def __init__(
        self, *, optimizer: Any, knobs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        own = [e for e in self._entries if e.role in ("slot", "counter") and e.name not in _OURS]
        self._unmet: Sequence[Entry] = own
        self.optimizer = Optimizer(
            optimizer, self._storage, own, self.state, knobs, self.counts
        )  # fmt: skip
        self._bound: Bound | None = None

    def _step_with(self, run: Callable[[], None]) -> None:
        self._join()
        super()._step_with(run)

    def _join(self) -> None:
        """Before the first step: clears the state of an optimizer that counts its steps where a
        parameter joins it (a layer thaws). All slots share one count, so a new slot would be
        corrected for its start as an old one is."""
        if not self._unmet:
            return
        spec, stepped = self.optimizer.spec, self.state.stepped
        counters = [e for e in self._unmet if e.role == "counter"]
        slots = [e for e in self._unmet if e.name in {f"{e.of}.{s}" for s in spec.slots}]
        new = [e for e in slots if e.name not in stepped]
        if new and any(e.name in stepped for e in counters):
            for e in (*counters, *slots):
                e.cell.live.zero_()
        stepped.update(e.name for e in (*counters, *slots))
        self._unmet = ()

    @property
    def ran(self) -> Program:
        """The program whose buffers hold the latest step."""
        return self

    @taking_turns
    def __call__(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        index: torch.Tensor | None = None,
        epoch: int = 0,
    ) -> torch.Tensor:
        self._feed(x, y, index, epoch)
        self._step()
        at = self.state.steps % RING
        self.state.steps += 1
        return self._storage["ring"][at]

    def bind(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        shuffle: bool = True,
        seed: int | None = None,
    ) -> TrainStep:
        """Puts a data set on the device for `run`; returns the step.

        images  u8[N, C, H, W], read as value / 255, or f32 as they are
        labels  integers [N]
        seed    of the order of each epoch; the step's own seed by default
        """
        check_bound(images, labels, self.shape, self.classes)
        self._bound = Bound(
            images.detach().to(self.device),
            labels.detach().to(self.device, torch.int64),
            self.shape[0],
            self.seed if seed is None else seed,
            shuffle,
        )
        return self

    def run(self, n: int, lr: Sequence[float] | None = None) -> torch.Tensor:
        """n steps over the bound data, epoch after epoch; their n losses, on the device.

        lr  a learning rate for each step; the optimizer's own by default

        The last batch of an epoch may be smaller. The next call goes on where this one stopped.
        """
        bound = self._ready(n, lr)
        losses = torch.empty(n, device=self.device)
        for k in range(n):
            with self.state.lock:
                if lr is not None:
                    self.optimizer.lr = float(lr[k])
                batch = bound.stored() if "index" in self._storage else bound.next()
                losses[k].copy_(self(*batch))
        return losses

    def _ready(self, n: int, lr: Sequence[float] | None) -> Bound:
        """The bound data, once the arguments of `run` are sound."""
        if self._bound is None:
            raise ConfigError("run without data", help="step.bind(images, labels) first")
        if not isinstance(n, int) or n < 0:
            raise ConfigError(f"run takes a number of steps, not {n!r}")
        if lr is not None and len(lr) != n:
            raise ConfigError(f"{len(lr)} learning rates for {n} steps", help="one for each step")
        return self._bound
