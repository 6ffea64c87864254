"""The optimizer of a compiled step, whose settings the user may change between steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graphnet.errors import LARGEST, ConfigError, StateDictError, number
from graphnet.runtime.hypers import Hypers
from graphnet.runtime.state import Entry, State


class Optimizer:
    """A live view: `step.optimizer.lr = 0.001` writes the device's scalar, nothing recompiles.

    Attributes are those of the spec (`SGD`, `Adam`). The ones in `spec.knobs` may be set;
    everything else is compiled in, and so is momentum or l1 0 against non-zero: changing it raises
    ConfigError.
    """

    def __init__(
        self,
        spec: Any,
        hypers: Hypers,
        entries: Sequence[Entry],
        state: State,
        more: Mapping[str, float] | None = None,
        counts: Sequence[str] = (),
    ) -> None:
        """hypers: the device's scalars. entries: what outlives a step besides the parameters.
        more: knobs that are not of the spec, above 0. counts: numbers of `state` to be saved."""
        own = self.__dict__
        own["spec"], own["_hypers"], own["_state"] = spec, hypers, state
        own["_entries"] = {e.name: e for e in entries}
        own["_values"], own["_counts"] = {}, {"step": "done"} | {n: n for n in counts}
        own["_more"] = frozenset(more or ())
        for knob, value in ({k: getattr(spec, k) for k in spec.knobs} | dict(more or {})).items():
            self._write(knob, value)

    def _numbers(self, name: str, value: Any) -> dict[str, float]:
        """Device scalar to number; ConfigError for a bad value."""
        if name in self._more:
            return {name: number("the optimizer", name, value, above=True)}
        return self.spec.numbers(name, value)

    def _write(self, name: str, value: Any) -> None:
        numbers = self._numbers(name, value)
        with self._state.lock:
            self._put(name, value, numbers)

    def _put(self, name: str, value: Any, numbers: Mapping[str, float]) -> None:
        self._values[name] = _kept(value)
        for hyper, given in numbers.items():
            if hyper in self._hypers:
                self._hypers.set(hyper, given)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__["_values"]:
            return self.__dict__["_values"][name]
        if name.startswith("_") or not hasattr(self.__dict__["spec"], name):
            raise AttributeError(f"the optimizer has no attribute {name!r}")
        return getattr(self.__dict__["spec"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._settable(name, value):
            self._write(name, value)

    def _settable(self, name: str, value: Any) -> bool:
        """Whether a knob is to be written; ConfigError where it cannot become `value`."""
        if name in self._values:
            if name in self.spec.structural and not value:
                raise ConfigError(
                    f"{name} 0 is another graph than {name} "
                    f"{self._values[name]:g}, which this step was compiled with",
                    help=f"compile again with {name}=0",
                )
            return True
        if not hasattr(self.spec, name):
            known = ", ".join(self._values)
            raise ConfigError(f"the optimizer has no {name!r}", help=f"can be set: {known}")
        if value != getattr(self.spec, name):
            raise ConfigError(
                f"{name}={getattr(self.spec, name)!r} is compiled into this step and cannot "
                f"become {value!r}",
                help="compile again with another optimizer; the net keeps its state",
            )
        return False

    # ---- steps to come ----------------------------------------------------------------------

    def rates(self, n: int, lr: Sequence[float] | torch.Tensor | None) -> torch.Tensor:
        """f32[n, K]: the device's numbers at n steps to come, a learning rate for each. The last
        one stands from then on, once `arrived` says so."""
        table = torch.tensor(self._hypers.values).repeat(n, 1)
        if lr is not None and n:
            given = torch.as_tensor(lr, dtype=torch.float64)
            good = (given >= 0) & (given <= LARGEST)
            if not bool(good.all()):
                self._numbers("lr", float(given[int((~good).nonzero()[0])]))
            table[:, self._hypers.at["lr"]] = given.to(table.dtype)
            self._values["lr"] = float(given[-1])
        return table

    def turned(self, turns: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """f32[n, K]: the device's numbers at steps to come, before each of which a schedule sets
        these knobs. They stand as the last one leaves them, once `arrived` says so."""
        now, rows, at = list(self._hypers.values), [], self._hypers.at
        for turn in turns:
            for knob, value in turn.items():
                if self._settable(knob, value):
                    for hyper, given in self._numbers(knob, value).items():
                        if hyper in at:
                            now[at[hyper]] = given
                    self._values[knob] = _kept(value)
            rows.append(tuple(now))
        return torch.tensor(rows, dtype=torch.float32).reshape(len(turns), len(now))

    def arrived(self, last: torch.Tensor) -> None:
        """Says that the device has taken the numbers of a step, f32[K], by itself."""
        self._hypers.values[:] = last.tolist()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Buffers by name (`0.weight.momentum_buffer`), knobs and `step`, on the CPU, row-major."""
        with self._state.lock:
            self._state.settle()
            out = {n: e.cell.snapshot() for n, e in self._entries.items()}
            out |= {n: torch.tensor(v, dtype=torch.float64) for n, v in self._values.items()}
            for key, name in self._counts.items():
                out[key] = torch.tensor(getattr(self._state, name))
        return out

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `state_dict`; StateDictError lists every key that does not fit. Nothing is
        loaded then, nor where a number is bad."""
        want = {*self._entries, *self._values, *self._counts}
        problems = [f"missing {k}" for k in sorted(want - set(state))]
        problems += [f"unexpected {k}" for k in sorted(set(state) - want)]
        problems += [
            f"{k}: the step has {list(e.global_shape)}, the dict {list(state[k].shape)}"
            for k, e in self._entries.items()
            if k in state and tuple(state[k].shape) != e.global_shape
        ]
        if problems:
            raise StateDictError("optimizer state does not fit:\n  " + "\n  ".join(problems))
        for key in self._values:
            self._numbers(key, state[key].tolist())
        with self._state.lock:
            for key, entry in self._entries.items():
                entry.cell.load(state[key])
            self._state.stepped.update(self._entries)
            for key in self._values:
                setattr(self, key, state[key].tolist())
            for key, name in self._counts.items():
                setattr(self._state, name, int(state[key]))
            self._state.entries["step"].cell.live.fill_(self._state.steps)

    def __repr__(self) -> str:
        knobs = ", ".join(f"{k}={v}" for k, v in self._values.items())
        return f"{type(self.spec).__name__}({knobs})"


def _kept(value: Any) -> float | tuple[float, ...]:
    """A knob's value as it is read back."""
    return tuple(value) if isinstance(value, (tuple, list)) else float(value)
