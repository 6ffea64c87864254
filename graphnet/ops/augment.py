"""Augmentation of a batch of images: one op from stored bytes to what the net reads."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from graphnet.errors import ConfigError, DTypeError, ShapeError
from graphnet.ir.op import Attrs, Op, register
from graphnet.ir.types import TensorType, f32
from graphnet.ops.philox import philox4x32

BORDERS = ("zero", "edge")
_GEOMETRY = ("rotate", "shear", "translate", "lens")
_COLOUR = ("brightness", "contrast", "pca")
WORDS = 16  # random words of a sample, see `words`
MOST_CHANNELS = 4


@dataclass(frozen=True)
class Augment(Attrs):
    """What is drawn for each image anew in each epoch. What is left out is not done.

    crop        cut the net's input from a random place of the stored image, in whole pixels;
                without it from the centre
    pad         pixels that are added on each side before the cut
    flip        probability of a mirror image
    scale       (least, most) magnification, drawn on a logarithmic scale
    stretch     largest change of the aspect ratio, both ways: 1.2 is up to a fifth
    rotate      degrees, both ways
    shear       degrees, both ways
    translate   share of the width and of the height, both ways
    lens        radial distortion: a point at distance r from the centre is read at r (1 + l r^2),
                with |l| up to this and r = 1 in the corners
    brightness  added to all values, which lie in [0, 1]; both ways
    contrast    the distance to the mean is multiplied by 1 - this to 1 + this
    pca         standard deviation, in units of the data's own, of an offset along each principal
                component of the pixels' colours
    border      what lies beyond the stored image: "zero", or the pixels at its "edge"

    Set by the Trainer (`graphnet.train.augment.known`) and by the compiler: the data's mean and std
    per channel (the result is normalised), its principal components, shape and type; the size that
    comes out. `seen` (H, W) is the size to which a stored image is resized before all else, where
    that is another than its own: bilinearly, its border pixels continued, in the same pass.
    """

    crop: bool = False
    pad: int = 0
    flip: float = 0.0
    scale: tuple[float, ...] = (1.0, 1.0)
    stretch: float = 1.0
    rotate: float = 0.0
    shear: float = 0.0
    translate: float = 0.0
    lens: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    pca: float = 0.0
    border: str = "zero"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    components: tuple[float, ...] = ()  # [C, C] by rows: column k is component k times its std
    stored: tuple[int, ...] = ()
    source: str = "u8"
    size: tuple[int, ...] = ()
    seen: tuple[int, ...] = ()
    stream: int = zlib.crc32(b"augment")

    def __post_init__(self) -> None:
        for name in ("scale", "mean", "std", "components"):
            object.__setattr__(self, name, tuple(float(v) for v in getattr(self, name)))
        for name in ("flip", "stretch", *_GEOMETRY, *_COLOUR):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        for name in ("stored", "size", "seen"):
            object.__setattr__(self, name, tuple(int(v) for v in getattr(self, name)))
        limits = {"flip": 1.0, "translate": 1.0, "lens": 0.5, "brightness": 1.0, "rotate": 180.0,
                  "shear": 80.0, "contrast": 1.0}  # fmt: skip
        for name, most in limits.items():
            if getattr(self, name) > most:
                raise ConfigError(f"augment: {name}={getattr(self, name)} is above {most:g}")
        if self.stretch < 1.0:
            raise ConfigError(f"augment: stretch={self.stretch} is below 1, which changes nothing")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise ConfigError(
                f"augment: scale={self.scale} is no range of magnifications",
                help="give (least, most): scale=(0.9, 1.1)",
            )
        if not isinstance(self.pad, int) or self.pad < 0 or (self.pad and not self.crop):
            raise ConfigError(f"augment: pad={self.pad!r}", help="pixels around a crop: crop=True")
        if self.border not in BORDERS:
            raise ConfigError(f"unknown border {self.border!r}", help=f"one of {BORDERS}")
        if self.source not in ("u8", "f32") or not all(s > 0 for s in self.std):
            raise ConfigError(f"augment: source={self.source!r}, std={self.std}")

    @property
    def warps(self) -> bool:
        """Whether pixels are read between the stored ones; else whole ones are moved."""
        return self.resizes or self.scale != (1.0, 1.0) or self.stretch != 1.0 or any(
            getattr(self, n) for n in _GEOMETRY
        )  # fmt: skip

    @property
    def resizes(self) -> bool:
        return bool(self.seen) and self.seen != self.stored[1:]

    @property
    def frame(self) -> tuple[int, ...]:
        """(H, W) of the image that is cut and warped."""
        return self.seen or self.stored[1:]

    @property
    def colours(self) -> bool:
        return any(getattr(self, n) for n in _COLOUR)

    def input_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the stored batch from which a net's input `shape` is made."""
        return (shape[0], *(self.stored or shape[1:]))

    def sized(self, shape: Sequence[int]) -> Augment:
        """The same for a net's input `shape`."""
        return replace(self, size=tuple(shape[2:]), stored=self.input_shape(shape)[1:])

    def per_channel(self, name: str, channels: int) -> tuple[float, ...]:
        """mean or std, one for each channel."""
        given = getattr(self, name)
        return given * channels if len(given) == 1 else given

    def room(self, axis: int) -> int:
        """Places of a crop along an axis (0: down, 1: across), less one."""
        return self.frame[axis] + 2 * self.pad - self.size[axis]


def _number(name: str, value: Any) -> float:
    good = isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
    if not good:
        raise ConfigError(f"augment: {name}={value!r} is not a finite number of at least 0")
    return float(value)


# ---- what is drawn ---------------------------------------------------------------------------


def words(attrs: Augment, index: Any, epoch: int, seed: int) -> np.ndarray:
    """uint32[N, 16]: the random words of samples. counter = (k // 4, index, epoch, stream).

    0 flip, 1 crop down, 2 crop across, 3 scale, 4 stretch, 5 rotate, 6 shear, 7 lens,
    8 translate down, 9 translate across, 10 brightness, 11 contrast, 12 to 15 the components
    """
    rows = np.asarray(index, dtype=np.int64).astype(np.uint64)[:, None]
    block = np.arange(WORDS // 4, dtype=np.uint64)[None, :]
    out = philox4x32(
        block, rows & np.uint64(0xFFFFFFFF), np.asarray(epoch, np.uint64),
        np.asarray(attrs.stream, np.uint64), int(seed),
    )  # fmt: skip
    return np.stack(out, 2).reshape(len(rows), WORDS)


class Pose(NamedTuple):
    """What was drawn for N images, in float64. A pixel (u, v) from the centre of the result is
    read at `at + matrix (1 + lens (u^2 + v^2)) (side u, v)`, in pixels of the frame."""

    side: np.ndarray  # [N], -1 where mirrored
    at: np.ndarray  # [N, 2], across and down
    matrix: np.ndarray  # [N, 2, 2]
    lens: np.ndarray  # [N]
    gain: np.ndarray  # [N]
    offset: np.ndarray  # [N, C]


def pose(a: Augment, index: Any, epoch: int, seed: int) -> Pose:
    """What is drawn for the rows `index` of a data set in an epoch."""
    drawn = words(a, index, epoch, seed)
    unit = (drawn >> np.uint32(8)).astype(np.float64) / 2**24  # [0, 1)
    both = 2 * unit - 1
    channels, (height, width) = a.stored[0], a.size
    side = np.where((drawn[:, 0] >> np.uint32(8)) < int(a.flip * 2**24), -1.0, 1.0)
    at = np.empty((len(drawn), 2))
    for axis, size in enumerate((height, width)):
        room = a.room(axis)
        first = (drawn[:, 1 + axis] >> np.uint32(16)).astype(np.int64) * (room + 1) >> 16
        start = first - a.pad if a.crop else room // 2
        at[:, 1 - axis] = start + size / 2 + both[:, 8 + axis] * a.translate * size
    zoom = a.scale[0] * (a.scale[1] / a.scale[0]) ** unit[:, 3]
    half = a.stretch ** (both[:, 4] / 2)
    angle = both[:, 5] * math.radians(a.rotate)
    slope = both[:, 6] * math.tan(math.radians(a.shear))
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.empty((len(drawn), 2, 2))
    # The image was magnified, then sheared, then turned: its pixels are found the way back.
    matrix[:, 0, 0], matrix[:, 0, 1] = cos + slope * sin, sin - slope * cos
    matrix[:, 1, 0], matrix[:, 1, 1] = -sin, cos
    matrix[:, 0] /= (zoom * half)[:, None]
    matrix[:, 1] /= (zoom / half)[:, None]
    lens = both[:, 7] * a.lens / ((width / 2) ** 2 + (height / 2) ** 2)
    offset = np.repeat((both[:, 10] * a.brightness)[:, None], channels, 1)
    if a.pca:
        # Two normal numbers from two uniform ones (Box and Muller 1958).
        length = np.sqrt(-2 * np.log(1 - unit[:, 12::2]))
        turn = 2 * math.pi * unit[:, 13::2]
        normal = np.stack([length * np.cos(turn), length * np.sin(turn)], 2).reshape(-1, 4)
        components = np.array(a.components).reshape(channels, channels)
        offset += a.pca * normal[:, :channels] @ components.T
    return Pose(side, at, matrix, lens, 1 + both[:, 11] * a.contrast, offset)


def _places(a: Augment, p: Pose) -> tuple[torch.Tensor, torch.Tensor]:
    """(across, down) f64[N, H, W]: where each pixel of the result is read; the own place of a pixel
    of the frame is a whole number."""
    height, width = a.size
    u = p.side[:, None, None] * (np.arange(width) + 0.5 - width / 2)[None, None]
    v = (np.arange(height) + 0.5 - height / 2)[None, :, None] + 0 * u
    bent = 1 + p.lens[:, None, None] * (u * u + v * v)
    m = p.matrix[:, :, :, None, None] * bent[:, None, None]
    across = m[:, 0, 0] * u + m[:, 0, 1] * v + p.at[:, 0, None, None] - 0.5
    down = m[:, 1, 0] * u + m[:, 1, 1] * v + p.at[:, 1, None, None] - 0.5
    return torch.from_numpy(across), torch.from_numpy(down)


def _inside(at: torch.Tensor, size: int) -> torch.Tensor:
    """How much of a place lies in the frame: 1 inside, falling to 0 within a pixel of it."""
    return (at + 1).clamp(0, 1) * (size - at).clamp(0, 1)


def _coloured(a: Augment, p: Pose, v: torch.Tensor) -> torch.Tensor:
    """((v - mean) gain + offset) / std, by channel."""
    channels = v.shape[1]
    shape = (1, channels, 1, 1)
    mean, std = (v.new_tensor(a.per_channel(n, channels)).view(shape) for n in ("mean", "std"))
    v = v - mean
    if a.colours:
        gain = torch.from_numpy(p.gain).to(v).view(-1, 1, 1, 1)
        v = v * gain + torch.from_numpy(p.offset).to(v)[:, :, None, None]
    return v / std


@register
class AugmentOp(Op):
    """y = augment(images, index, epoch, seed): see `Augment`. Nothing depends on the batch that an
    image is in. Values between pixels are bilinear; bytes are read as value / 255."""

    name = "augment"
    attrs_type = Augment
    kernel = "augment"

    def infer(self, a: Augment, *ins: TensorType) -> tuple[TensorType, ...]:
        x, index, *scalars = ins
        if len(x.shape) != 4 or len(a.size) != 2 or x.shape[1] > MOST_CHANNELS:
            raise ShapeError(f"augment takes images [N, C, H, W] of 1 to 4 channels, got {x}")
        if x.dtype.name != a.source or x.shape[1:] != a.stored:
            raise DTypeError(f"augment was set up for {a.source}{list(a.stored)}, got {x}")
        if index.shape != x.shape[:1] or any(t.shape != () for t in scalars):
            raise ShapeError(f"augment takes an index for each image, got {index}")
        if any(t.dtype.name != "i64" for t in (index, *scalars)):
            raise DTypeError("augment takes index, epoch and seed as i64")
        channels = x.shape[1]
        for axis, what in enumerate(("high", "wide")):
            if a.room(axis) < 0:
                raise ShapeError(
                    f"augment: images {a.frame[axis]} pixels {what} for a net that takes "
                    f"{a.size[axis]}",
                    help="store them larger (resize), or pad the crop",
                )
        for name in ("mean", "std"):
            if len(getattr(a, name)) not in (1, channels):
                raise ShapeError(f"augment: {name} {getattr(a, name)} for {channels} channels")
        if a.pca and len(a.components) != channels**2:
            raise ConfigError(
                f"augment: pca without the {channels} components of the data",
                help="graphnet.train.augment.known(augment, data) computes them of a Dataset",
            )
        return (TensorType(f32, (*x.shape[:2], *a.size)),)

    def reference(self, a: Augment, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, index, epoch, seed = args
        p = pose(a, index.cpu().numpy(), int(epoch), int(seed))
        across, down = (t.to(x.device) for t in _places(a, p))
        v = x.double() / 255 if a.source == "u8" else x
        high, wide = x.shape[2:]
        row = torch.arange(len(x), device=x.device)[:, None, None]
        fade = torch.ones(())
        if a.resizes:
            if a.border == "zero":
                fade = _inside(down, a.frame[0]) * _inside(across, a.frame[1])
            down = (down + 0.5) * (high / a.frame[0]) - 0.5
            across = (across + 0.5) * (wide / a.frame[1]) - 0.5
        left, top = across.floor(), down.floor()
        out = v.new_zeros(())
        for dy in (0, 1):
            for dx in (0, 1):
                i, j = (top + dy).long(), (left + dx).long()
                weight = (1 - (down - top - dy).abs()) * (1 - (across - left - dx).abs())
                if a.border == "zero" and not a.resizes:
                    weight = weight * ((i >= 0) & (i < high) & (j >= 0) & (j < wide))
                taken = v[row, :, i.clamp(0, high - 1), j.clamp(0, wide - 1)]
                out = out + (weight * fade).to(v.dtype)[..., None] * taken
        return (_coloured(a, p, out.permute(0, 3, 1, 2)).contiguous(),)

    def cpu(self, a: Augment, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, index, epoch, seed = args
        p = pose(a, index.numpy(), int(epoch), int(seed))
        v = x.float() / 255 if a.source == "u8" else x.float()
        high, wide = a.frame
        height, width = a.size
        # grid_sample counts from -1 to 1 between the outer borders of the outer pixels.
        u = torch.arange(width, dtype=torch.float32) + (0.5 - width / 2)
        w = torch.arange(height, dtype=torch.float32)[:, None] + (0.5 - height / 2)
        two = torch.tensor([2 / wide, 2 / high])
        matrix = torch.from_numpy(p.matrix).float() * two[None, :, None]
        matrix[:, :, 0] *= torch.from_numpy(p.side).float()[:, None]
        at = (torch.from_numpy(p.at).float() * two - 1)[:, None, None]
        grid = u[None, None, :, None] * matrix[:, None, None, :, 0]
        grid = grid + w[None, :, :, None] * matrix[:, None, None, :, 1]
        if a.lens:
            bend = torch.from_numpy(p.lens).float()[:, None, None]
            grid *= (1 + bend * (u * u + w * w))[..., None]
        mode = "bilinear" if a.warps else "nearest"
        border = "zeros" if a.border == "zero" and not a.resizes else "border"
        out = F.grid_sample(v, grid.add_(at), mode, border, align_corners=False)
        if a.resizes and a.border == "zero":
            across, down = ((grid[..., k] + 1) * (n / 2) - 0.5 for k, n in ((0, wide), (1, high)))
            out *= (_inside(down, high) * _inside(across, wide))[:, None]
        return (_coloured(a, p, out),)

    def flops(
        self, a: Augment, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        channels = ins[0].shape[1]
        # A place and its four weights once a pixel, four products, and the normalization.
        each = (24 + 8 * channels if a.warps else 0) + (6 if a.colours else 3) * channels
        assert outs[0] is not None
        return outs[0].numel // channels * each
