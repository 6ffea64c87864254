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

import contextlib
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch

from graphnet.errors import ConfigError, NumericsError
from graphnet.ir.graph import Graph
from graphnet.ir.types import f32
from graphnet.runtime.bound import TABLE, Bound, Draws, Order, check_bound
from graphnet.runtime.hypers import Hypers
from graphnet.runtime.inputs import Inputs
from graphnet.runtime.optim import Optimizer
from graphnet.runtime.state import Entry, State

RING = 4096  # losses kept on the device; as in passes/autodiff
_OURS = ("ring", "step", "held")  # counters that belong to the step, whatever its optimizer
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
        shared: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.stages, self.plan, self.state = stages, plan, state
        self._shared = dict(shared or {})  # storage of inputs that belongs to another program
        self.target, self.precision, self.seed = target, precision, seed
        self.device = state.device
        with state.lock:
            self._attach(prepare)

    def _attach(self, prepare: Prepare) -> None:
        """Makes what the program owns, and meets the state."""
        stages, plan, state = self.stages, self.plan, self.state
        graph: Graph = plan.graph
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
            elif role in ("data", "hyper"):
                self._storage[name] = self._zeros(type)
        for v in graph.returns:
            if v.name not in self._storage:
                self._storage[v.name] = self._zeros(v.type)
        self.shape = tuple(stages.traced.input("x").value.type.shape)
        self.classes = _classes(stages.traced)
        self._returns = tuple(v.name for v in graph.returns)
        takes = stages.traced.input("x").value.type.dtype.torch
        self._inputs = Inputs(self._storage, takes, self.classes)
        if "seed" in self._storage:
            self._storage["seed"].fill_(_signed64(self.seed))
        targets = {old.name for old, _ in graph.commits}
        self._writes = any(e.role == "param" and e.name in targets for e in self._entries)
        self._keeps = {e.name for e in self._entries if e.role == "derived"} & targets
        state.acquire(self._entries)  # a prepare that warms up reads current values
        self._prepare = prepare
        self._run = prepare(plan, self._storage)
        if hasattr(self._run, "record"):
            self._run.record()

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
        """Copies a batch in and returns its rows."""
        first = self.state.steps * self.shape[0]
        return self._inputs.feed(x, y, index, epoch, first)

    # ---- running ----------------------------------------------------------------------------

    def _step(self) -> None:
        self._step_with(self._run)

    def _step_with(self, run: Callable[[], None]) -> None:
        self.state.acquire(self._entries)
        try:
            run()  # no target records gradients
        finally:
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


class TrainStep(Program):
    """step(x, y) -> loss before the update, the mean over the rows, still on the device.

    Each loss is a tensor of its own, overwritten 4,096 steps later; only float() synchronises.
    With `nonfinite="auto"` a loss that is not finite raises NumericsError and leaves the state as
    it was: at once on the CPU; on a GPU in a later call, and the steps between change nothing.
    optimizer  the live view: set `lr`, `momentum`, `weight_decay` ... between steps

    A step that augments draws for each row by `index`, int64[N], its place in the data, and the
    epoch; without an index no place comes twice.
    """

    counts: tuple[str, ...] = ()  # numbers of the state that its optimizer saves

    def __init__(
        self,
        *,
        optimizer: Any,
        knobs: dict[str, float] | None = None,
        net: Any = None,
        **kwargs: Any,
    ) -> None:
        """net: a weak reference to the net, whose attribute paths errors name."""
        super().__init__(**kwargs)
        self._net = net
        self._itself = weakref.ref(self)
        self._sticky = "held" in self._storage
        if self._sticky:
            self.state.hold(self._storage["held"])
        own = [e for e in self._entries if e.role in ("slot", "counter") and e.name not in _OURS]
        self._unmet: Sequence[Entry] = own
        self.optimizer = Optimizer(
            optimizer, self._hypers, own, self.state, knobs, self.counts
        )  # fmt: skip
        self._bound: Bound | None = None
        self._draws: Draws | None = None

    def _step_with(self, run: Callable[[], None]) -> None:
        self._join()
        super()._step_with(run)

    def look(self) -> None:
        """After steps: NumericsError if it is known by now that one of them was not finite."""
        if self._sticky:
            assert self.state.held is not None
            self.state.held.program = self._itself
            self._hear()

    def _take_over(self) -> None:
        """Before a step that looks at no flag: hears of the steps of another program, which must
        not be held back any more."""
        if not self._sticky and self.state.held is not None and self.state.held.behind:
            self._hear(wait=True)

    def _hear(self, *, wait: bool = False) -> None:
        """NumericsError once it is known that a step was not finite. The step counts as not done,
        nor do those behind it, and the next call starts from the state before it."""
        state = self.state
        assert state.held is not None
        held, steps = state.held.heard(state.steps, wait=wait)
        if not held:
            return
        from graphnet.runtime.diagnose import first_nonfinite, not_finite

        first = steps - held
        text = f"the loss is {float(self._storage['ring'][first % RING])} at step {first}"
        if since := state.steps - first - 1:
            text += f" ({since} more {'has' if since == 1 else 'have'} run since, changing nothing)"
        ran = state.held.program()
        error = not_finite(text, None if ran is None else first_nonfinite(ran))
        state.done = first
        if self._draws is not None:
            self._draws.back_to(first)
        net = self._net() if self._net is not None else None
        with net.locating() if net is not None else contextlib.nullcontext():
            raise error

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
        self._take_over()
        self._feed(x, y, index, epoch)
        self._step()
        at = self.state.steps % RING
        self.state.steps += 1
        self.look()
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
        seed, n = self.seed if seed is None else seed, images.shape[0]

        def order(epoch: int) -> torch.Tensor:
            g = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
            return torch.randperm(n, generator=g)

        self._bind(images, labels, order if shuffle else None)
        return self

    @taking_turns
    def _bind(
        self, images: torch.Tensor, labels: torch.Tensor, order: Order | None,
        levels: torch.Tensor | None = None,
    ) -> Bound:  # fmt: skip
        """Puts data on the device. `levels` f32[C, 256] are what a net without augmentation reads
        for the bytes of each channel: value / 255 by default."""
        inputs = self._inputs
        if images.dtype == torch.uint8 and inputs.takes == torch.float32 and levels is None:
            levels = (torch.arange(256).float() / 255).expand(images.shape[1], 256)
        here = lambda t: t.detach().to(self.device).contiguous()
        as_read = lambda t: here(t.to(inputs.x.dtype) if t.dtype == torch.float32 else t)
        bound = self._bound = Bound(
            as_read(images), here(labels.to(torch.int64)), self.shape[0], order,
            None if levels is None else as_read(levels),
        )  # fmt: skip
        self._draws = self._drawing(bound)
        return bound

    def _drawing(self, bound: Bound) -> Draws | None:
        """What runs steps over the data; None where each is called."""
        return Draws(self, bound)

    def run(self, n: int, lr: Sequence[float] | None = None) -> torch.Tensor:
        """n steps over the bound data, epoch after epoch; their n losses, on the device.

        lr  a learning rate for each step; the optimizer's own by default

        The last batch of an epoch may be smaller. The next call goes on where this one stopped.
        Losses, parameters and order are those of n calls, in every bit. On a GPU the host does no
        work for each step: it replays graphs of up to 64 steps, and sends an order for each epoch
        and a table of learning rates for each 1,024 steps.
        """
        self._ready(n, lr)
        losses = torch.empty(n, device=self.device)
        for at in range(0, n, TABLE):
            to = min(n, at + TABLE)
            with self.state.lock:
                if self._draws is None:
                    self._call(losses[at:to], None if lr is None else lr[at:to])
                else:
                    mine = None if lr is None else lr[at:to]
                    self._ahead(self.optimizer.rates(to - at, mine))
                    self._copy_losses(losses[at:to])
        return losses

    def _ahead(self, table: torch.Tensor) -> None:
        """Steps over the bound data, of which each draws its batch: one for each row of f32[n, K],
        the device's numbers."""
        draws = self._draws
        assert draws is not None and len(table) <= TABLE
        draws.send(table)
        self._take_over()
        try:
            self._step_with(functools.partial(draws.go, len(table)))
        except NumericsError:  # somewhere between: the numbers become those of the end
            self._hypers.tensor.copy_(table[-1][:, None])
            raise
        finally:
            self._inputs.drawn(*draws.bound.latest)
            self.optimizer.arrived(table[-1])

    @taking_turns
    def ahead(self, table: torch.Tensor) -> list[torch.Tensor]:
        """Steps over bound data, one for each row of f32[n, K] (`optimizer.rates` or `turned`); the
        loss of each, as a call gives it."""
        self._ahead(table)
        return [loss for part in self._latest(len(table)) for loss in part.unbind()]

    def _latest(self, n: int) -> list[torch.Tensor]:
        """The losses of the latest n steps, up to 4,096 of them, as parts of the ring."""
        ring = self._storage["ring"]
        first = (self.state.steps - n) % RING
        parts = ring[first : first + n], ring[: max(0, first + n - RING)]
        return [part for part in parts if len(part)]

    def _copy_losses(self, into: torch.Tensor) -> None:
        """Copies the losses of the latest steps out of the ring."""
        at = 0
        for part in self._latest(len(into)):
            into[at : at + len(part)].copy_(part)
            at += len(part)

    def _call(self, losses: torch.Tensor, lr: Sequence[float] | None) -> None:
        """The same steps, call by call."""
        bound = self._bound
        assert bound is not None
        for k in range(len(losses)):
            if lr is not None:
                self.optimizer.lr = float(lr[k])
            batch = bound.stored() if "index" in self._storage else bound.next()
            losses[k].copy_(self(*batch))

    def _ready(self, n: int, lr: Sequence[float] | None) -> None:
        """ConfigError unless data are bound and the arguments of `run` sound."""
        if self._bound is None:
            raise ConfigError("run without data", help="step.bind(images, labels) first")
        if not isinstance(n, int) or n < 0:
            raise ConfigError(f"run takes a number of steps, not {n!r}")
        if lr is not None and len(lr) != n:
            raise ConfigError(f"{len(lr)} learning rates for {n} steps", help="one for each step")
