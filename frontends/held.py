"""What a net keeps between calls: parameters, which an optimizer trains, and buffers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from graphnet.errors import ConfigError, DTypeError, ShapeError
from graphnet.frontends.symbolic import Symbol
from graphnet.frontends.tracer import active_tracer
from graphnet.ir.types import DTYPES, DType, layout_of_parameter
from graphnet.runtime.state import Cell

BUFFERS = (torch.float32, torch.int64)  # what a buffer may hold


class Held(Cell):
    """Base of both. In `forward` it behaves like a symbolic value."""

    title = "value"

    @property
    def data(self) -> torch.Tensor:
        """The values, wherever they live at present; filters have channels-last strides."""
        return self.live

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        value = torch.as_tensor(value)
        if tuple(value.shape) != self.shape:
            raise ShapeError(
                f"a {self.title} of shape {list(self.shape)} was assigned a tensor of shape "
                f"{list(value.shape)}"
            )
        self.live.copy_(value.detach())
        self.touched()

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes, as torch orders them."""
        return tuple(self.live.shape)

    def numel(self) -> int:
        """The number of elements."""
        return self.live.numel()

    def _symbol(self) -> Symbol:
        tracer = active_tracer(f"arithmetic on a gn.{type(self).__name__}")
        return Symbol(tracer, tracer.value(self))

    def reshape(self, *shape: Any) -> Symbol:
        """In `forward`: the same elements in another shape."""
        return self._symbol().reshape(*shape)

    view = reshape

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return Symbol.__torch_function__(function, types, args, kwargs)


def _as_symbol(name: str) -> Callable[..., Any]:
    """The method of a symbolic value, on what the value is in the trace in progress."""

    def call(self: Held, *args: Any) -> Any:
        return getattr(self._symbol(), name)(*args)

    return call


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg"):
    setattr(Held, f"__{_name}__", _as_symbol(f"__{_name}__"))


class Parameter(Held):
    """A trained fp32 tensor.

    data       the live tensor; assigning copies into it. After a program ran on the GPU it is
               there, and shared with the program. Copies that programs derive from it (bf16)
               follow an assignment and `load_state_dict`, not in-place arithmetic on it. Filters
               have torch's shape (O, I, R, S) and channels-last strides.
    trainable  False freezes it in programs compiled from then on
    lr_mult, decay_mult  factors of the learning rate, and of weight decay and L1, in programs
               compiled from then on; see `Module.set_multipliers`
    """

    title = "parameter"

    def __init__(
        self,
        data: torch.Tensor,
        trainable: bool = True,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        if not isinstance(data, torch.Tensor):
            raise ConfigError(f"a Parameter takes a torch tensor, not a {type(data).__name__}")
        shape = tuple(data.shape)
        super().__init__(layout_of_parameter(shape).zeros(shape, torch.float32))
        self.live.copy_(data.detach())
        self.trainable = trainable
        self.lr_mult, self.decay_mult = lr_mult, decay_mult

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("lr_mult", "decay_mult"):
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise ConfigError(f"{name}={value!r} is not a finite number of at least 0")
            value = float(value)
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Parameter:
        made = Parameter(self.live, self.trainable, self.lr_mult, self.decay_mult)
        memo[id(self)] = made
        return made

    def __repr__(self) -> str:
        frozen = "" if self.trainable else ", trainable=False"
        return f"Parameter({list(self.shape)}{frozen})"


class Buffer(Held):
    """A tensor that no optimizer trains, such as a running mean: fp32 or int64.

    It stands in `state_dict` and in checkpoints, unless it is not `persistent`, and is the same for
    all programs of its net. What training does to it, `update` says.
    """

    title = "buffer"

    def __init__(self, data: torch.Tensor, persistent: bool = True) -> None:
        self.persistent = persistent
        if not isinstance(data, torch.Tensor):
            raise ConfigError(f"a Buffer takes a torch tensor, not a {type(data).__name__}")
        if data.dtype not in BUFFERS:
            raise DTypeError(
                f"a buffer of {data.dtype}: buffers are float32 or int64", help="data.float()"
            )
        shape = tuple(data.shape)
        super().__init__(layout_of_parameter(shape).zeros(shape, data.dtype))
        self.live.copy_(data.detach())

    @property
    def dtype(self) -> DType:
        """The element type, as graphs call it."""
        return next(d for d in DTYPES.values() if d.torch == self.live.dtype)

    def update(self, value: Symbol) -> None:
        """In `forward`: a training step ends with this value in the buffer; who reads the buffer
        from here on reads it, too. In inference nothing changes."""
        tracer = active_tracer("the update of a gn.Buffer")
        tracer.replace(self, tracer.value(value))

    def __deepcopy__(self, memo: dict[int, Any]) -> Buffer:
        made = Buffer(self.live, self.persistent)
        memo[id(self)] = made
        return made

    def __repr__(self) -> str:
        return f"Buffer({list(self.shape)}, {self.dtype})"
