"""Types of the IR: element types, storage layouts and tensor types.

Shapes are logical and follow torch: activations NCHW, convolution weights OIHW. How a value lies
in memory is its `Layout`, a part of the type, printed behind the shape and row-major by default.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from graphnet.errors import ParseError, ShapeError

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class DType:
    """An element type: `name` as the IR prints it, `itemsize` in bytes."""

    name: str
    itemsize: int
    is_float: bool

    def __str__(self) -> str:
        return self.name

    @property
    def torch_name(self) -> str:
        """The name of the torch dtype of the same meaning."""
        return _TORCH_NAMES[self.name]

    @property
    def torch(self) -> torch.dtype:
        """The torch dtype of the same meaning."""
        import torch

        return getattr(torch, self.torch_name)


_TORCH_NAMES = {
    "f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16",
    "i64": "int64", "i32": "int32", "u8": "uint8", "i1": "bool",
}  # fmt: skip

f64 = DType("f64", 8, True)
f32 = DType("f32", 4, True)
f16 = DType("f16", 2, True)
bf16 = DType("bf16", 2, True)
i64 = DType("i64", 8, False)
i32 = DType("i32", 4, False)
u8 = DType("u8", 1, False)
i1 = DType("i1", 1, False)
DTYPES = {d.name: d for d in (f64, f32, f16, bf16, i64, i32, u8, i1)}


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory.

    order  "row" (row-major), "nhwc" (channels innermost; four dimensions) or "hwcn" (images
           innermost: [H, W, C, N], and [C, N] of a matrix [N, C]). "hwcn" is the transpose of
           "nhwc", seen as a matrix with one row an image
    flat   p of the padded-flat-shift layout: images are stored as (H+p) x (W+p) pixels that share
           one zero column and row, between guards of p*(W+p)+p pixels; None for no padding
    s2d    block b of space-to-depth: b x b pixels become channels, 0 for none

    Pad positions hold zeros, written by the producer.
    """

    order: str = "row"
    flat: int | None = None
    s2d: int = 0

    def __str__(self) -> str:
        parts = [] if self.order == "row" else [self.order]
        if self.flat is not None:
            parts.append(f"flat(p={self.flat})")
        if self.s2d:
            parts.append(f"s2d{self.s2d}")
        return ",".join(parts)

    @property
    def is_default(self) -> bool:
        return self == ROW

    def _check(self, shape: Shape) -> None:
        if not self.is_default and len(shape) != 4 and (self.order, len(shape)) != ("hwcn", 2):
            raise ShapeError(
                f"layout {{{self}}} needs 4 dimensions, the shape {list(shape)} has {len(shape)}",
                help="keep tensors of other ranks row-major",
            )

    def stored(self, shape: Shape) -> Shape:
        """The sizes of the stored array, outermost first, guards left out."""
        self._check(shape)
        if self.is_default:
            return shape
        if self.order == "hwcn":
            n, *rest = shape if len(shape) == 2 else self._images_first.stored(shape)
            return (*rest, n)
        n, c, h, w = shape
        if self.s2d:
            b = self.s2d
            h, w, c = -(-h // b), -(-w // b), c * b * b
        if self.flat is not None:
            h, w = h + self.flat, w + self.flat
        return (n, h, w, c) if self.order == "nhwc" or self.s2d else (n, c, h, w)

    @property
    def _images_first(self) -> Layout:
        """The layout whose transpose this one is, as a matrix of one row an image."""
        return replace(self, order="nhwc")

    def guard(self, shape: Shape) -> int:
        """Elements in front of the first and behind the last pixel."""
        if self.flat is None:
            return 0
        if self.order == "hwcn":
            raise ShapeError(f"layout {{{self}}} has no guards", help="pad {nhwc} or row-major")
        _, _, w, c = self.stored(shape)
        return (self.flat * w + self.flat) * c

    def numel(self, shape: Shape) -> int:
        """Stored elements, padding and guards counted."""
        return prod(self.stored(shape)) + 2 * self.guard(shape)

    def strides(self, shape: Shape) -> Shape:
        """Element stride of each logical dimension. Not defined for space-to-depth."""
        self._check(shape)
        if self.s2d:
            raise ShapeError(f"layout {{{self}}} has no strides", help="use offset(shape, index)")
        if self.order == "hwcn":
            rest = (1,) if len(shape) == 2 else self._images_first.strides(shape)[1:]
            return (1, *(shape[0] * s for s in rest))
        if self.order == "nhwc":
            n, h, w, c = self.stored(shape)
            return (h * w * c, 1, w * c, c)
        out, step = [], 1
        for size in reversed(self.stored(shape)):
            out.append(step)
            step *= size
        return tuple(reversed(out))

    def offset(self, shape: Shape, index: Shape) -> int:
        """Position of the element with logical `index`, in elements from the start of storage."""
        if not self.s2d:
            return self.guard(shape) + sum(
                i * s for i, s in zip(index, self.strides(shape), strict=True)
            )
        b, (n, c, h, w) = self.s2d, index
        if self.order == "hwcn":
            return self._images_first.offset(shape, (0, c, h, w)) * shape[0] + n
        _, sh, sw, sc = self.stored(shape)
        inner = ((h % b) * b + w % b) * shape[1] + c
        return ((n * sh + h // b) * sw + w // b) * sc + inner

    def bytes(self, shape: Shape, dtype: DType) -> int:
        return self.numel(shape) * dtype.itemsize

    # ---- torch tensors -----------------------------------------------------------------------

    @property
    def packed(self) -> bool:
        """Whether no strides say where elements lie: such a tensor is kept as flat storage."""
        return bool(self.s2d) or self.flat is not None

    def zeros(self, shape: Shape, dtype: torch.dtype, device: Any = None) -> torch.Tensor:
        """A tensor of `shape` that lies so, every stride as `strides` has it, those of sizes of 1
        included; packed, its flat storage."""
        import torch

        if self.packed:
            return torch.zeros(self.numel(shape), dtype=dtype, device=device)
        return self._logical(torch.zeros(self.stored(shape), dtype=dtype, device=device))

    def lies(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's memory is in the order of this layout, without gaps."""
        return tensor.ndim == 1 if self.packed else self._ordered(tensor).is_contiguous()

    def elements(self, tensor: torch.Tensor) -> torch.Tensor:
        """[numel] in the order of storage: a view where the tensor lies so, else a copy."""
        return tensor if self.packed else self._ordered(tensor).reshape(-1)

    def _ordered(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.order == "hwcn":
            return tensor.permute(2, 3, 1, 0) if tensor.ndim == 4 else tensor.t()
        return tensor.permute(0, 2, 3, 1) if self.order == "nhwc" else tensor

    def _logical(self, stored: torch.Tensor) -> torch.Tensor:
        if self.order == "hwcn":
            return stored.permute(3, 2, 0, 1) if stored.ndim == 4 else stored.t()
        return stored.permute(0, 3, 1, 2) if self.order == "nhwc" else stored

    def write(self, source: torch.Tensor, storage: torch.Tensor) -> None:
        """Copies a tensor into flat storage that has this layout; pad positions are left alone."""
        for logical, stored in self._parts(source, storage):
            stored.copy_(logical)

    def read(self, storage: torch.Tensor, shape: Shape) -> torch.Tensor:
        """The logical tensor that lies in flat storage of this layout, as a copy."""
        out = storage.new_empty(shape)
        for logical, stored in self._parts(out, storage):
            logical.copy_(stored)
        return out

    def _parts(
        self, tensor: torch.Tensor, storage: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Views of the logical tensor, each with the view of the storage that holds it."""
        shape = tuple(tensor.shape)
        if not self.s2d:
            yield tensor, storage.as_strided(
                shape, self.strides(shape), storage.storage_offset() + self.guard(shape)
            )
            return
        b, (n, c, _, _) = self.s2d, shape
        _, rows, cols, _ = self._images_first.stored(shape)
        image = storage.view(-1, n).t() if self.order == "hwcn" else storage.view(n, -1)
        blocks = image.unflatten(1, (rows, cols, b, b, c)).permute(0, 5, 1, 3, 2, 4)
        # Row i of the image is row i % b of block i // b.
        for i in range(b):
            for j in range(b):
                part = tensor[:, :, i::b, j::b]
                yield part, blocks[:, :, : part.shape[2], i, : part.shape[3], j]


ROW = Layout()
NHWC = Layout("nhwc")
HWCN = Layout("hwcn")


def layout_of_parameter(shape: Shape) -> Layout:
    """How a parameter and its slots are stored: filters as (O, R, S, I), the order in which kernels
    read them, all else row-major. Only `state_dict` and files have torch's order."""
    return NHWC if len(shape) == 4 else ROW


def parse_layout(text: str) -> Layout:
    """The inverse of `str(layout)`."""
    layout = ROW
    for part in filter(None, text.split(",")):
        if part == "nhwc":
            layout = replace(layout, order="nhwc")
        elif part == "hwcn":
            layout = replace(layout, order="hwcn")
        elif m := re.fullmatch(r"flat\(p=(\d+)\)", part):
            layout = replace(layout, flat=int(m[1]))
        elif m := re.fullmatch(r"s2d(\d+)", part):
            layout = replace(layout, s2d=int(m[1]))
        else:
            raise ParseError(f"unknown layout {part!r}", help="use nhwc, hwcn, flat(p=N) or s2dN")
    return layout


@dataclass(frozen=True)
class TensorType:
    """dtype, logical shape and layout of a value. A scalar has shape ()."""

    dtype: DType
    shape: Shape
    layout: Layout = ROW

    def __str__(self) -> str:
        dims = ",".join(map(str, self.shape))
        tail = "" if self.layout.is_default else f"{{{self.layout}}}"
        return f"{self.dtype}[{dims}]{tail}"

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.layout.bytes(self.shape, self.dtype)

    @property
    def strides(self) -> Shape:
        return self.layout.strides(self.shape)

    def with_dtype(self, dtype: DType) -> TensorType:
        return replace(self, dtype=dtype)

    def with_shape(self, shape: Shape) -> TensorType:
        """The same dtype with another shape, row-major."""
        return TensorType(self.dtype, tuple(shape))

    def with_layout(self, layout: Layout) -> TensorType:
        return replace(self, layout=layout)
