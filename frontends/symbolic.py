"""Symbolic values: what `forward` computes with while a net is traced.

A `Symbol` stands for one value of the graph under construction. Layers and the functions below
append equations to the active `Tracer`; nothing is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from graphnet.errors import MissingError, ShapeError, UnsupportedOpError
from graphnet.frontends.foreign import instead_of_function
from graphnet.frontends.tracer import Tracer, active_tracer, mixed, user_place
from graphnet.ir.graph import Value
from graphnet.ir.types import Shape


def _no(sign: str) -> Any:
    """The method of an operator that symbolic values do not have."""

    def refuse(self: Symbol, other: Any = None) -> Any:
        with_what = "" if other is None else f" with {_told(other)}"
        raise UnsupportedOpError(
            f"{sign} of {_told(self)}{with_what} cannot be traced", where=user_place() or None,
            help=instead_of_function(sign),
        )  # fmt: skip

    return refuse


def _told(x: Any) -> str:
    return f"a value of shape {list(x.shape)}" if isinstance(x, Symbol) else f"{x!r:.40}"


class Symbol:
    """One value of the graph being traced: it has a `shape`, and behaves like a tensor. Arithmetic,
    slices, a tensor's methods and torch's functions make more (`functions.py` lists them)."""

    __slots__ = ("tracer", "value")
    __array_ufunc__ = None  # NumPy's operators leave theirs to ours

    def __init__(self, tracer: Tracer, value: Value) -> None:
        self.tracer = tracer
        self.value = value

    @property
    def shape(self) -> Shape:
        """The sizes, the batch first."""
        return self.value.type.shape

    def size(self, dim: int | None = None) -> Any:
        """All sizes, or that of one axis."""
        return self.shape if dim is None else self.shape[dim]

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def _binary(self, op: str, other: Any, turned: bool = False) -> Symbol:
        if isinstance(other, (bool, complex)):
            raise mixed(other)
        mine = self._against(other)
        other = other._against(self) if isinstance(other, Symbol) else other
        return self.tracer.emit(op, [other, mine] if turned else [mine, other], kind=op)

    def _against(self, other: Any) -> Symbol:
        """This value as an operand of an elementwise op beside another one."""
        return self

    def __add__(self, other: Any) -> Symbol:
        return self._binary("add", other)

    def __sub__(self, other: Any) -> Symbol:
        return self._binary("sub", other)

    def __mul__(self, other: Any) -> Symbol:
        return self._binary("mul", other)

    def __truediv__(self, other: Any) -> Symbol:
        return self._binary("div", other)

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Any) -> Symbol:
        return self._binary("sub", other, turned=True)

    def __rtruediv__(self, other: Any) -> Symbol:
        return self._binary("div", other, turned=True)

    def __neg__(self) -> Symbol:
        return self.tracer.emit("neg", [self], kind="neg")

    def __abs__(self) -> Symbol:
        return self.tracer.emit("abs", [self], kind="abs")

    def __pos__(self) -> Symbol:
        return self

    def __pow__(self, exponent: Any) -> Symbol:
        return power(self, exponent)

    __rpow__ = _no("**")
    __matmul__, __rmatmul__ = _no("@"), _no("@")
    __mod__, __floordiv__ = _no("%"), _no("//")

    def __len__(self) -> int:
        return self.shape[0]

    if not TYPE_CHECKING:  # or every attribute of a value would exist

        def __getattr__(self, name: str) -> Any:
            """A tensor's method of that name, where it can be traced."""
            if name.startswith("__"):  # Python asks for names of its own
                raise AttributeError(f"'Symbol' object has no attribute {name!r}")
            from graphnet.frontends.functions import METHODS

            if name in METHODS:
                return functools.partial(METHODS[name], self)
            raise MissingError(
                f"a symbolic value has no {name!r}", where=user_place() or None,
                help=instead_of_function(name),
            )  # fmt: skip

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What torch calls when one of its functions is given a symbolic value: ours of that
        name."""
        import torch

        from graphnet.frontends.functions import FUNCTIONS

        for x in (*args, *(kwargs or {}).values()):
            if isinstance(x, torch.Tensor):
                raise mixed(x)
        if function in FUNCTIONS:
            made = FUNCTIONS[function](*args, **(kwargs or {}))
            if function.__name__.endswith("_") or (kwargs or {}).get("inplace"):
                args[0].value = made.value  # from here on the operand is the result, as in torch
                return args[0]
            return made
        name = torch.overrides.resolve_name(function) or function.__name__
        raise UnsupportedOpError(
            f"{name} cannot be traced", where=user_place() or None,
            help=instead_of_function(function.__name__),
        )  # fmt: skip

    def __getitem__(self, index: Any) -> Symbol:
        items = index if isinstance(index, tuple) else (index,)
        if Ellipsis in items:
            at = items.index(Ellipsis)
            fill = (slice(None),) * (self.ndim - len(items) + 1)
            items = items[:at] + fill + items[at + 1 :]
        if len(items) > self.ndim:
            raise ShapeError(f"{len(items)} indices for a value of shape {list(self.shape)}")
        out = self
        for axis, item in enumerate(items):
            if not isinstance(item, slice) or item.step not in (None, 1):
                raise UnsupportedOpError(
                    f"index {item!r} on axis {axis}: only slices with step 1 can be traced",
                    where=user_place(),
                    help="write x[:, a:b]",
                )
            size = self.shape[axis]
            start, stop, _ = item.indices(size)
            if start >= stop:
                raise ShapeError(
                    f"slice {start}:{stop} of axis {axis} is empty (size {size})",
                    where=user_place(),
                )
            if (start, stop) != (0, size):
                cut = {"axis": axis, "start": start, "stop": stop}
                out = out.tracer.emit("slice", [out], kind="slice", **cut)
        return out

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Symbol:
        """The axes from start_dim to end_dim as one; the batch has to stay an axis of its own."""
        return flatten(self, start_dim, end_dim)

    def reshape(self, *shape: Any) -> Symbol:
        """The same elements in another shape; one size may be -1."""
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        total, known = self.value.type.numel, 1
        for s in sizes:
            known *= 1 if s == -1 else s
        full = tuple(total // max(known, 1) if s == -1 else s for s in sizes)
        return self.tracer.emit("reshape", [self], kind="reshape", shape=full)

    view = reshape

    def _concrete(self, *_: Any) -> Any:
        raise UnsupportedOpError(
            "forward runs once on symbolic values: it cannot branch on data or read numbers",
            where=user_place(),
            help="branch on shapes or on attributes of the module instead",
        )

    __bool__ = __float__ = __int__ = __iter__ = __index__ = __array__ = _concrete
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _concrete
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"Symbol({self.value}: {self.value.type})"


class Repeated(Symbol):
    """[N, C, 1, 1] repeated over pixels. Elementwise code broadcasts the small value; what needs
    the whole one, like a concatenation, has it made."""

    __slots__ = ("pixels", "small", "whole")

    def __init__(self, small: Symbol, pixels: Sequence[int]) -> None:
        self.tracer, self.small, self.pixels = small.tracer, small, tuple(pixels)
        self.whole: Value | None = None

    @property
    def shape(self) -> Shape:
        return (*self.small.shape[:2], *self.pixels)

    @property
    def value(self) -> Value:  # type: ignore[override]
        """The whole value, written when it is first read."""
        if self.whole is None:  # the mean of one pixel, in as many windows as there are pixels
            self.whole = self.tracer.emit(
                "adaptive_avgpool2d", [self.small], kind="expand", output_size=self.pixels
            ).value
        return self.whole

    @value.setter
    def value(self, value: Value) -> None:
        self.whole = value

    def _against(self, other: Any) -> Symbol:
        fits = isinstance(other, Symbol) and other.shape == self.shape
        alone = self.whole is None and not isinstance(other, Repeated)
        return self.small if fits and alone else self


def expand(x: Symbol, *sizes: Any) -> Symbol:
    """torch's expand, over the pixels of [N, C, 1, 1]; -1 leaves a size as it is."""
    wanted = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    full = wanted
    if len(wanted) == x.ndim:
        full = tuple(s if w == -1 else w for w, s in zip(wanted, x.shape, strict=True))
    if full == x.shape:
        return x
    if x.ndim != 4 or x.shape[2:] != (1, 1) or full[:2] != x.shape[:2] or len(full) != 4:
        raise UnsupportedOpError(
            f"expand of a value of shape {list(x.shape)} to {list(wanted)}",
            where=user_place() or None,
            help="+, -, * and / broadcast by themselves; else [N, C, 1, 1] over the pixels alone",
        )
    return Repeated(x, full[2:])


def power(x: Any, exponent: Any) -> Any:
    """x ** exponent for the exponents that products, quotients and roots give."""
    if exponent in (1, 2, 3):
        out = x
        for _ in range(int(exponent) - 1):
            out = out * x
        return out
    if exponent in (0.5, -0.5, -1):
        root = x if exponent == -1 else x.tracer.emit("sqrt", [x], kind="sqrt")
        return root if exponent > 0 else 1.0 / root
    raise UnsupportedOpError(
        f"** of {_told(x)} with {_told(exponent)} cannot be traced", where=user_place() or None,
        help="exponents are 1, 2, 3, 0.5, -0.5 and -1",
    )  # fmt: skip


def cat(tensors: Sequence[Symbol], dim: int = 0) -> Symbol:
    """Values joined along axis `dim`; their other sizes must agree."""
    tensors = list(tensors)
    if not tensors:
        raise ShapeError("gn.cat of no values", where=user_place())
    axis = _axis(dim, tensors[0].ndim)
    return active_tracer("gn.cat").emit("concat", tensors, kind="cat", axis=axis)


def flatten(x: Symbol, start_dim: int = 0, end_dim: int = -1) -> Symbol:
    """Axes start_dim..end_dim (both included) joined into one, as torch.flatten."""
    first, last = _axis(start_dim, x.ndim), _axis(end_dim, x.ndim)
    if first > last:
        raise ShapeError(f"flatten: start_dim {start_dim} comes after end_dim {end_dim}")
    joined = 1
    for s in x.shape[first : last + 1]:
        joined *= s
    shape = (*x.shape[:first], joined, *x.shape[last + 1 :])
    if shape == x.shape:
        return x
    return x.tracer.emit("reshape", [x], kind="flatten", shape=shape)


def softmax_along(op: str, x: Symbol, dim: int | None) -> Symbol:
    """softmax or log_softmax along an axis; without one, along axis 1 of [N, C] and [N, C, H, W],
    as torch."""
    axis = _axis(int(x.ndim not in (0, 1, 3)) if dim is None else dim, x.ndim)
    if axis == 0:
        raise UnsupportedOpError(
            f"{op} over dim={dim!r} of a value of shape {list(x.shape)}: axis 0 is the batch",
            where=user_place() or None,
            help="the samples of a batch do not see each other: dim=1, dim=-1 or another axis",
        )
    if x.ndim <= 4:
        return x.tracer.emit(op, [x], kind=op, axis=axis)
    n, length = x.shape[0], x.shape[axis]
    rows = x.reshape(n, prod(x.shape[1:axis]), length, prod(x.shape[axis + 1 :]))
    return x.tracer.emit(op, [rows], kind=op, axis=2).reshape(*x.shape)


def padded(x: Symbol, sides: Sequence[int], value: float = 0.0) -> Symbol:
    """x with `value` around it: two numbers an axis, the last axis first, as in torch; negative
    ones cut off."""
    if len(sides) % 2 or len(sides) > 2 * x.ndim:
        raise ShapeError(
            f"pad by {list(sides)} of a value of shape {list(x.shape)}", where=user_place(),
            help="two numbers an axis, the last axis first",
        )  # fmt: skip
    whole = [*sides, *[0] * (2 * x.ndim - len(sides))]
    before, after = whole[0::2][::-1], whole[1::2][::-1]
    ends = zip(before, after, x.shape, strict=True)
    inner = x[tuple(slice(max(0, -b), s - max(0, -a)) for b, a, s in ends)]
    if max(whole) <= 0:
        return inner
    return x.tracer.emit(
        "pad", [inner], kind="pad", before=tuple(max(0, b) for b in before),
        after=tuple(max(0, a) for a in after), value=value,
    )  # fmt: skip


def _axis(dim: int, ndim: int) -> int:
    if not -ndim <= dim < ndim:
        raise ShapeError(f"axis {dim} of a value with {ndim} dimensions", where=user_place())
    return dim % ndim


def images(what: str, x: Symbol) -> None:
    """ShapeError for what is no batch of images."""
    if x.ndim != 4:
        raise ShapeError(
            f"{what} takes [N, C, H, W], got {list(x.shape)}",
            help=f"the batch comes first: {(32, *x.shape)}" if x.ndim == 3 else None,
        )
