"""State: everything outside the arena that outlives a step, one object per (net, device).

Every program compiled from a net on a device attaches to the same State, so that inference sees
what training learned. A `Cell` is one value wherever it lives at present; the States of other
devices fetch it when one of their programs runs next.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from graphnet.errors import GraphError
from graphnet.ir.graph import Graph, Input, Value
from graphnet.ir.types import ROW, Layout, TensorType
from graphnet.passes.precision import derived
from graphnet.runtime.held import Held
from graphnet.runtime.parts import Parts


class Cell:
    """One value of a net's state: `live` is the tensor, on whatever device, that is up to date."""

    def __init__(self, live: torch.Tensor) -> None:
        self.live = live
        self._watchers: weakref.WeakSet[State] = weakref.WeakSet()

    def snapshot(self) -> torch.Tensor:
        """A copy as torch would keep it: row-major, on the CPU."""
        return torch.empty(self.live.shape, dtype=self.live.dtype).copy_(self.live.detach())

    def load(self, value: torch.Tensor) -> None:
        """Takes over values of the shape of `snapshot`."""
        self.live.copy_(value)

    def clear(self) -> None:
        """Sets all values to zero."""
        self.live.zero_()

    def touched(self) -> None:
        """Says that the values changed outside a program: parts and derived copies follow."""
        for state in self._watchers:
            state.parts.changed(self)
            state.stale = True


class Part(Cell):
    """The part of a cell that a rank holds, along axis 0. Seen from outside it is the whole."""

    def __init__(self, whole: Cell, at: slice, device: torch.device) -> None:
        own = device.type != "cpu"
        super().__init__(whole.live.detach()[at].to(device, copy=own))
        self.whole = whole

    def snapshot(self) -> torch.Tensor:
        """All of it, as it was when the parts were last gathered."""
        return self.whole.snapshot()

    def load(self, value: torch.Tensor) -> None:
        self.whole.load(value)
        self.whole.touched()

    def clear(self) -> None:
        self.whole.clear()
        self.whole.touched()


@dataclass
class Entry:
    """A cell as one device sees it.

    tensor        fixed storage on the device, of the logical shape; flat where the layout is packed
    role, of      as in the graph; `of` is the parameter that a slot or copy belongs to
    global_shape  the logical shape over all ranks; `shard` is what a rank holds of axis 0, None
                  where it holds all
    """

    name: str
    role: str
    of: str
    cell: Cell
    tensor: torch.Tensor
    trainable: bool
    global_shape: tuple[int, ...]
    shard: slice | None = None
    source: Cell | None = None  # what a derived entry is a copy of
    layout: Layout = ROW

    @property
    def whole(self) -> Cell:
        """The cell of all ranks."""
        return self.cell.whole if isinstance(self.cell, Part) else self.cell


class _Bank:
    """What all States of one net have in common. Holds no reference to the net."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.cells: dict[str, Cell] = {}
        self.states: dict[torch.device, State] = {}
        self.steps = 0  # the host's copy of the step counter, with steps that are held back
        self.pending = 0  # steps summed up since the last update, and their rows
        self.pending_rows = 0
        self.stepped: set[str] = set()
        self.ahead: Parts | None = None  # those that are newer than the whole cells

    def settle(self) -> None:
        """Makes current what is whole."""
        if self.ahead is not None:
            self.ahead.gather()
            self.ahead = None

    def divide(self, parts: Parts) -> bool:
        """Makes the parts of one device current; whether they were not."""
        if self.ahead is parts:
            return False
        self.settle()
        return parts.spread()

    def join(self) -> None:
        """Makes current what is whole, for a program that may write it."""
        self.settle()
        for state in self.states.values():
            state.parts.current = False

    @property
    def done(self) -> int:
        """The steps that changed something: those that are held back do not count. Waits for the
        device."""
        held = self.cells.get("held")
        return self.steps - (0 if held is None else int(held.live))

    def release(self, done: int) -> None:
        """Nothing is held back any more, and so many steps are done."""
        self.steps = done
        if "held" in self.cells:
            self.cells["held"].live.zero_()
        for state in self.states.values():
            if state.held is not None:
                state.held.forget()


_BANKS: weakref.WeakKeyDictionary[Any, _Bank] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def _key(i: Input) -> str:
    """Programs may keep a derived copy in layouts of their own, and a part beside the whole."""
    layout = i.value.type.layout
    own = i.role == "derived" and not layout.is_default
    name = f"{i.value.name}/{i.parts}" if i.parts > 1 else i.value.name
    return f"{name}{{{layout}}}" if own else name


def _bank_of(net: Any) -> _Bank:
    with _making:
        return _BANKS.setdefault(net, _Bank())


def lock_of(net: Any) -> threading.RLock:
    """The lock that a thread holds while it reads or changes the state of a net, on any device."""
    return _bank_of(net).lock


def settle(net: Any) -> None:
    """Brings the parts of a net that ranks hold together. All ranks come here, or none has stepped
    with parts since the last time."""
    _bank_of(net).settle()


def release_held(net: Any) -> None:
    """Lets the net's steps run again behind one that was not finite: other values were put in."""
    bank = _bank_of(net)
    bank.release(bank.done)


def state_of(net: Any, device: torch.device) -> State:
    """The State of a net on a device, made at the first call."""
    bank = _bank_of(net)
    with bank.lock:
        if device not in bank.states:
            bank.states[device] = State(bank, device)
        state = bank.states[device]
        state.params = dict(net.named_parameters())
        state.buffers = dict(net.named_buffers())
    return state


class State:
    """Storage of one net on one device, by graph-input name."""

    def __init__(self, bank: _Bank, device: torch.device) -> None:
        self.device = device
        self.params: dict[str, Any] = {}
        self.buffers: dict[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        self.stale = False
        self.parts = Parts(Part)
        self._derived: list[Entry] | None = None  # those of `entries`, while they are known
        # Steps that keep what they have made of parameters; `forget` makes them do it again.
        self.followers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.held: Held | None = None  # steps held back, where a program holds them
        self.lock = bank.lock  # of the net: a program runs while its thread holds it
        self._bank = bank

    @property
    def steps(self) -> int:
        """Training steps done by all programs of the net."""
        return self._bank.steps

    @steps.setter
    def steps(self, value: int) -> None:
        self._bank.steps = value

    @property
    def pending(self) -> int:
        """Steps whose gradients are summed up and not applied yet."""
        return self._bank.pending

    @pending.setter
    def pending(self, value: int) -> None:
        self._bank.pending = value

    @property
    def pending_rows(self) -> int:
        """The live rows of these steps."""
        return self._bank.pending_rows

    @pending_rows.setter
    def pending_rows(self, value: int) -> None:
        self._bank.pending_rows = value

    @property
    def stepped(self) -> set[str]:
        """Names of the slots and counters that an update has moved, or that were loaded."""
        return self._bank.stepped

    def hold(self, count: torch.Tensor) -> None:
        """Says that a program counts the steps that it holds back, and where."""
        if self.held is None or self.held.count is not count:
            self.held = Held(count)

    @property
    def done(self) -> int:
        """The steps that changed something. Reading it waits for the device; setting it lets steps
        run again that were held back."""
        return self._bank.done

    @done.setter
    def done(self, value: int) -> None:
        self._bank.release(value)

    @property
    def derived(self) -> list[Entry]:
        if self._derived is None:
            self._derived = [e for e in self.entries.values() if e.role == "derived"]
        return self._derived

    def attach(self, graph: Graph) -> list[Entry]:
        """The entries that a graph reads or commits, in input order, made where missing."""
        return [self._entry(i) for i in graph.inputs if i.role not in ("data", "hyper")]

    def missing_bytes(self, graph: Graph) -> int:
        """What `attach` would have to allocate for a graph."""
        kept = [i for i in graph.inputs if i.role not in ("data", "hyper")]
        there = {_key(i) for i in kept if _key(i) in self.entries}
        there |= {_key(i) for i in kept if i.parts == 1 and self._shared(i)}
        return sum(i.value.type.bytes for i in kept if _key(i) not in there)

    def _own(self, role: str) -> dict[str, Any]:
        """The cells of a role that belong to the net itself, by name."""
        return {"param": self.params, "buffer": self.buffers}.get(role, {})

    def _shared(self, i: Input) -> bool:
        """Whether the tensor of a parameter or buffer lies on this device already."""
        cell = self._own(i.role).get(i.value.name)
        return cell is not None and cell.live.device == self.device

    def _entry(self, i: Input) -> Entry:
        name, shape, layout = i.value.name, tuple(i.value.type.shape), i.value.type.layout
        key, parts, shard = _key(i), i.parts, None
        if parts > 1 and i.role != "derived":
            shape = (parts * shape[0], *shape[1:])
            i = replace(i, value=Value(name, TensorType(i.value.type.dtype, shape, layout)))
        cell = self._cell(i)
        if not layout.packed and tuple(cell.live.shape) != shape:
            raise GraphError(
                f"state {name} has shape {list(cell.live.shape)}, the graph wants {list(shape)}"
            )
        if parts > 1 and i.role != "derived":
            cell._watchers.add(self)
            cell, shard = self.parts.of(name, cell, parts, self.device)
        have = self.entries.get(key)
        if have is not None and have.cell is cell and have.global_shape == shape:
            return have
        # On the cell's own device the storage is shared: a net inside another net, for example.
        tensor = cell.live.to(self.device)
        param = self.params.get(i.of or name)
        trainable = bool(getattr(param, "trainable", False))
        made = Entry(name, i.role, i.of, cell, tensor, trainable, shape, shard, layout=layout)
        self.entries[key], self._derived = made, None
        if i.role == "derived":
            whole = made.source = self.params[i.of]
            whole._watchers.add(self)
            if parts > 1:
                made.source, _ = self.parts.of(i.of, whole, parts, self.device)
            self.stale = True
        return made

    def _cell(self, i: Input) -> Cell:
        name, type = i.value.name, i.value.type
        if i.role in ("param", "buffer"):
            if name not in self._own(i.role):
                raise GraphError(f"the net has no {i.role} {name}")
            return self._own(i.role)[name]
        if i.role == "derived":  # belongs to the device: rebuilt there, never moved
            have = self.entries.get(_key(i))
            same = have is not None and have.global_shape == tuple(type.shape)
            if have is not None and same:
                return have.cell
            return Cell(type.layout.zeros(type.shape, type.dtype.torch, self.device))
        cell = self._bank.cells.get(name)
        if cell is None or tuple(cell.live.shape) != tuple(type.shape):
            device = self.device if i.parts == 1 else torch.device("cpu")  # parts lie on the device
            zeros = type.layout.zeros(type.shape, type.dtype.torch, device)
            cell = self._bank.cells[name] = Cell(zeros)
        return cell

    def settle(self) -> None:
        """Brings the parts of all ranks together, where they are ahead of what is whole."""
        self._bank.settle()

    def lead(self) -> None:
        """Says that a program has written the parts."""
        self._bank.ahead = self.parts

    def acquire(self, entries: Iterable[Entry], divided: bool = False) -> None:
        """Makes the entries current: fetches what another device or rank wrote, rebuilds copies.
        `divided`: some of them are parts."""
        if divided:
            self.stale |= self._bank.divide(self.parts)
        else:
            self._bank.join()
        for e in entries:
            if e.cell.live is not e.tensor:
                e.tensor.copy_(e.cell.live)
                e.cell.live = e.tensor
                self.stale = True
        if self.stale:
            self.rebuild()

    def rebuild(self) -> None:
        """Derives the copies from the parameters again, and has others do so at their next run."""
        for step in self.followers:
            step.forget()
        for e in self.derived:
            if e.source is None:
                continue
            copy = derived(e.name, e.source.live.detach())
            if e.layout.packed:
                e.layout.write(copy, e.tensor)
            else:
                e.tensor.copy_(copy)
        self.stale = False
