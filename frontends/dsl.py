"""Modules and parameters: nets are built, named and saved as in torch.

`forward` runs once, on symbolic values, when the net is compiled. Parameters are fp32 and live
where the last compiled program put them; `state_dict()` is always what that program learned.
"""

from __future__ import annotations

import copy
import fnmatch
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from graphnet.errors import (
    ConfigError,
    GraphnetError,
    MissingError,
    StateDictError,
)
from graphnet.frontends.foreign import called, instead_on_module, ours
from graphnet.frontends.held import Buffer, Held, Parameter
from graphnet.frontends.symbolic import Symbol
from graphnet.frontends.tracer import active_tracer, tracing, user_place
from graphnet.runtime.state import lock_of, release_held, settle

if TYPE_CHECKING:
    from graphnet.frontends.summary import Summary


class Incompatible(NamedTuple):
    """What `load_state_dict` left alone: keys the net has alone, keys the dict has alone."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Module:
    """A net or a part of one. Submodules and parameters are attributes; write `forward(self, x)`.

    name         display name; empty for type and ordinal (conv1, fc2)
    input_shape  shape of one sample, where the net knows it (`summary` and error texts use it)
    place        `file:line` where it was made
    loss_weights  what each value counts in the loss, where `forward` returns several
    """

    kind: ClassVar[str] = ""  # stem of the display name; only layers have one
    drawn: ClassVar[bool] = True  # whether `gn.init` draws its parameters
    name: str = ""
    input_shape: tuple[int, ...] | None = None
    place: str = ""
    loss_weights: tuple[float, ...] | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Module:
        self = super().__new__(cls)
        self.__dict__["place"] = user_place()
        return self

    def forward(self, *args: Any) -> Symbol:
        raise ConfigError(
            f"{type(self).__name__} has no forward", help="define forward(self, x) on it"
        )

    def __call__(self, *args: Any) -> Symbol:
        tracer = active_tracer(type(self).__name__)
        tracer.stack.append(self)
        tracer.calls[self] = tracer.calls.get(self, 0) + 1
        try:
            return self.forward(*args)
        except GraphnetError as error:
            if self in tracer.names:  # the innermost layer is where it went wrong
                if not error.layer:
                    error.layer, error.path = tracer.names[self], tracer.paths.get(self)
                error.where = error.where or self.place
            raise
        finally:
            tracer.stack.pop()

    if not TYPE_CHECKING:  # or every attribute of a net would exist

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):  # Python asks for names of its own
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            raise MissingError(
                f"{type(self).__name__} has no {name!r}", where=user_place() or None,
                help=instead_on_module(name, dir(self)),
            )  # fmt: skip

    @property
    def training(self) -> bool:
        """In `forward`: whether the program that is traced trains. A net itself has no mode."""
        tracer = tracing()
        if tracer is None:
            raise AttributeError("training")  # __getattr__ says what to do instead
        return tracer.training

    # ---- the tree ---------------------------------------------------------------------------

    def _own(self, kind: type) -> Iterator[tuple[str, Any]]:
        for key, value in vars(self).items():
            if isinstance(value, kind):
                yield key, value

    def _paths(self, prefix: str, seen: set[Module] | None) -> Iterator[tuple[str, Module]]:
        if seen is not None:
            if self in seen:
                return
            seen.add(self)
        yield prefix, self
        for key, child in self._own(Module):
            yield from child._paths(f"{prefix}.{key}" if prefix else key, seen)

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        """(attribute path, module), this one first under ''; a shared module once."""
        return self._paths("", set())

    def modules(self) -> Iterator[Module]:
        """This module and all inside it, a shared one once."""
        return (m for _, m in self.named_modules())

    def _keys(self) -> Iterator[tuple[str, Held]]:
        """Every key, as torch orders them: of each module the parameters, then the buffers. What is
        shared stands under each of its paths."""
        for path, module in self._paths("", None):
            for key, p in (*module._own(Parameter), *module._own(Buffer)):
                yield (f"{path}.{key}" if path else key), p

    def _saved(self) -> Iterator[tuple[str, Held]]:
        """The keys of the state dict: all but those of buffers that are not persistent."""
        return ((k, p) for k, p in self._keys() if not isinstance(p, Buffer) or p.persistent)

    def _named(self, kind: type) -> Iterator[tuple[str, Any]]:
        seen: set[Held] = set()
        for key, p in self._keys():
            if isinstance(p, kind) and p not in seen:
                seen.add(p)
                yield key, p

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(state_dict key, parameter) in state_dict order; a shared parameter once."""
        return self._named(Parameter)

    def named_buffers(self) -> Iterator[tuple[str, Buffer]]:
        """(state_dict key, buffer) in state_dict order; a shared buffer once."""
        return self._named(Buffer)

    def buffers(self) -> Iterator[Buffer]:
        """The buffers in state_dict order, a shared one once."""
        return (b for _, b in self.named_buffers())

    def register_buffer(self, name: str, tensor: torch.Tensor, persistent: bool = True) -> None:
        """Keeps a tensor that no optimizer trains: `forward` may read it and, in training, replace
        it (`self.name.update(value)`). It stands in `state_dict` where it is persistent."""
        setattr(self, name, Buffer(tensor, persistent))

    def parameters(self) -> Iterator[Parameter]:
        """The parameters in state_dict order, a shared one once."""
        return (p for _, p in self.named_parameters())

    def layer_names(self) -> dict[Module, str]:
        """Layer to display name: its `name`, else type and ordinal. ConfigError for a double."""
        layers = [m for m in self.modules() if m.kind]
        names: dict[Module, str] = {}
        for m in layers:
            if m.name:
                if m.name in names.values():
                    raise ConfigError(
                        f"two layers are named {m.name!r}",
                        where=m.place,
                        help="names are unique in a net: they seed dropout and label kernels",
                    )
                names[m] = m.name
        count: dict[str, int] = {}
        for m in layers:
            while m not in names:
                count[m.kind] = count.get(m.kind, 0) + 1
                if f"{m.kind}{count[m.kind]}" not in names.values():
                    names[m] = f"{m.kind}{count[m.kind]}"
        return {m: names[m] for m in layers}

    def path_of(self, layers: str | None) -> str | None:
        """Attribute path of a layer, by its display name; of several ("conv1, relu1") of each."""
        paths = {m: path for path, m in self.named_modules()}
        named = {name: paths[m] for m, name in self.layer_names().items()}
        found = [named[n] for n in (layers or "").split(", ") if n in named]
        return ", ".join(found) or None

    @contextmanager
    def locating(self) -> Iterator[None]:
        """Adds the attribute path to the errors that name a layer of this net."""
        try:
            yield
        except GraphnetError as error:
            error.path = error.path or self.path_of(error.layer)
            raise

    def set_multipliers(
        self, pattern: str, lr: float | None = None, decay: float | None = None
    ) -> list[str]:
        """Sets lr_mult and decay_mult of the parameters whose key fits a shell pattern.

        `net.set_multipliers("*bias", lr=2, decay=0)` is the recipe of Caffe's AlexNet. Returns the
        keys; ConfigError where none fits.
        """
        keys = [k for k, _ in self.named_parameters() if fnmatch.fnmatchcase(k, pattern)]
        if not keys:
            raise ConfigError(f"no parameter fits {pattern!r}", help='keys look like "0.weight"')
        for key, p in self.named_parameters():
            if key in keys:
                p.lr_mult = p.lr_mult if lr is None else lr
                p.decay_mult = p.decay_mult if decay is None else decay
        return keys

    # ---- state ------------------------------------------------------------------------------

    def state_dict(self) -> OrderedDict[str, torch.Tensor]:
        """A snapshot of all parameters and buffers on the CPU: torch's keys, order and layout;
        parameters are fp32."""
        with lock_of(self):
            settle(self)
            return OrderedDict((key, p.snapshot()) for key, p in self._saved())

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Incompatible:
        """Copies tensors in, by key; compiled programs see them at their next call.

        Nothing is copied unless everything fits: StateDictError lists all missing, unexpected and
        ill-shaped keys at once. `strict=False` allows missing and unexpected ones.
        """
        mine = dict(self._saved())
        missing = [k for k in mine if k not in state]
        unexpected = [k for k in state if k not in mine]
        loaded = {k: torch.as_tensor(state[k]) for k in mine if k in state}
        problems = [
            f"{k}: the net has {list(mine[k].shape)}, the dict {list(t.shape)}"
            for k, t in loaded.items()
            if tuple(t.shape) != mine[k].shape
        ]
        problems += [
            f"{k}: dtype {t.dtype} where the net has {mine[k].live.dtype}"
            for k, t in loaded.items()
            if t.is_floating_point() != mine[k].live.is_floating_point()
        ]
        if strict:
            problems = [f"missing {k}" for k in missing] + [
                f"unexpected {k}" for k in unexpected
            ] + problems  # fmt: skip
        if problems:
            raise StateDictError(
                f"state dict does not fit {self._title()}:\n  " + "\n  ".join(problems),
                help="strict=False ignores missing and unexpected keys" if strict else None,
            )
        with lock_of(self):
            for key, tensor in loaded.items():
                mine[key].data = tensor
            release_held(self)
        return Incompatible(missing, unexpected)

    def copy(self) -> Module:
        """An independent net with equal parameters; programs of this one do not touch it."""
        with lock_of(self):
            settle(self)
            return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Module:
        made = object.__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    # ---- printing ---------------------------------------------------------------------------

    def summary(self, shape: tuple[int, ...] | None = None) -> Summary:
        """A table of layers, output shapes, parameters and multiply-adds; prints as text.

        `shape` is the input shape with its batch; without it, one sample of `input_shape`.
        """
        from graphnet.frontends.summary import summarize

        return summarize(self, shape)

    def _title(self) -> str:
        return re.sub(r"\W", "_", self.name or type(self).__name__.lower())

    def extra_repr(self) -> str:
        """What stands in the parentheses of a layer's repr."""
        return ""

    def __repr__(self) -> str:
        children = list(self._own(Module))
        if not children:
            return f"{type(self).__name__}({self.extra_repr()})"
        lines = []
        for key, child in children:
            lines += f"({key}): {child!r}".splitlines()
        return "\n".join([f"{type(self).__name__}(", *(f"  {line}" for line in lines), ")"])


class Sequential(Module):
    """Modules called one after the other; nests. Keys are 0, 1, ... or those of an OrderedDict."""

    def __init__(self, *modules: Any) -> None:
        if len(modules) == 1 and isinstance(modules[0], Mapping):
            pairs = [(str(k), m) for k, m in modules[0].items()]
        else:
            pairs = [(str(i), m) for i, m in enumerate(modules)]
        for key, module in pairs:
            self._put(key, module)

    def _put(self, key: str, module: Any) -> None:
        if not isinstance(module, Module):
            twin = ours(module)
            if isinstance(module, type):
                fix = f"call it: {module.__name__}(...)"
            elif twin:
                fix = f"{twin} takes the same arguments"
            elif callable(module):
                fix = "call it in the forward of a gn.Module of your own"
            else:
                fix = "gn.Conv2d(...), gn.ReLU() and so on, one after the other"
            raise ConfigError(
                f"Sequential takes modules of graphnet; item {key} is {called(module)}",
                where=user_place() or None, help=fix,
            )  # fmt: skip
        if hasattr(Sequential, key) or "." in key or not key:
            raise ConfigError(f"{key!r} cannot be the key of a submodule")
        self.__dict__[key] = module

    def append(self, module: Module) -> Sequential:
        """Adds a module at the end and returns the container."""
        self._put(str(len(self)), module)
        return self

    def __len__(self) -> int:
        return sum(1 for _ in self._own(Module))

    def __iter__(self) -> Iterator[Module]:
        return (m for _, m in self._own(Module))

    def __getitem__(self, index: Any) -> Any:
        modules = list(self)
        return Sequential(*modules[index]) if isinstance(index, slice) else modules[index]

    def __bool__(self) -> bool:
        return True  # an empty container is still a module

    def forward(self, x: Symbol) -> Symbol:
        for module in self:
            x = module(x)
        return x
