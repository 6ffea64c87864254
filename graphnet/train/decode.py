"""One image file to bytes: strict about what it is, and `BadImage` is all that it raises.

Used by the decode workers, so it imports Pillow and neither torch nor NumPy.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Sequence
from io import BytesIO
from typing import Any

from graphnet import disk

MAX_PIXELS = 25_000_000  # an image file of 1 MB may claim a gigapixel
MAX_BYTES = 512 << 20
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "GIF", "TIFF")
SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".gif", ".tif", ".tiff",
)  # fmt: skip
_DEEP = ("I;16", "I;16B", "I;16L", "I;16N")


class BadImage(Exception):
    """Why a file is no image that can be used."""


def decode(source: str | os.PathLike[str] | bytes, shape: Sequence[int]) -> list[bytes]:
    """The planes of an image, H x W bytes each: cropped to the aspect ratio in its middle, then
    resized. A larger one is made smaller by Pillow's bicubic filter, a smaller one larger
    bilinearly, as `augment` does.

    CMYK, palette, 16-bit and grey images are converted, alpha is dropped, the content decides
    about the format and not the name. An image is turned as its EXIF says, so it is what a viewer
    shows. A JPEG of at least four times the size is decoded at a fraction of its resolution, never
    below twice what is needed.
    BadImage for everything that cannot be read whole, and for animations, images of more than
    25 million pixels or with a side of one.
    """
    from PIL import Image, ImageOps

    c, h, w = shape
    try:
        with warnings.catch_warnings():  # damaged EXIF, for example: the pixels are what counts
            warnings.simplefilter("ignore")
            with Image.open(_stream(source), formats=FORMATS) as image:
                _check(image)
                if image.format == "JPEG":
                    image.draft(None, (2 * max(h, w),) * 2)  # it may lie on its side
                _turn(image)
                ready = converted(image, c)
                if ready.size != (w, h):
                    ready = ImageOps.fit(ready, (w, h), _filter(ready.size, (w, h)))
                return [ready.tobytes("raw", band) for band in ready.getbands()]
    except BadImage:
        raise
    # Pillow's decoders raise many types on damaged files, SyntaxError and struct.error among them.
    except Exception as error:
        said = getattr(error, "strerror", None) or str(error)  # an OSError's own repeats the path
        text = " ".join(said.split()) or type(error).__name__
        raise BadImage(_REASONS.get(type(error).__name__, text)) from None


def _filter(size: tuple[int, int], wanted: tuple[int, int]) -> Any:
    """Pillow's filter that makes an image of `size` (W, H) one of the size wanted."""
    from PIL import Image

    larger = _scale(size, wanted) < 1
    return Image.Resampling.BILINEAR if larger else Image.Resampling.BICUBIC


def _scale(size: tuple[int, int], wanted: tuple[int, int]) -> float:
    """By what the part of an image that is used is divided when it gets the size wanted."""
    return min(size[0] / wanted[0], size[1] / wanted[1])


def own_size(paths: Sequence[str], frame: Sequence[int]) -> tuple[int, int] | None:
    """(H, W) of what is cut from images in the shape of a `frame` (H, W), where all of them have
    one size and that is smaller; else None."""
    from PIL import Image

    sizes = set()
    for path in paths:
        with contextlib.suppress(Exception), Image.open(_stream(path), formats=FORMATS) as image:
            sizes.add(image.size)
    if len(sizes) != 1:
        return None
    ((w, h),) = sizes
    scale = _scale((w, h), (frame[1], frame[0]))
    own = max(2, round(scale * frame[0])), max(2, round(scale * frame[1]))
    return own if scale < 1 else None


_REASONS = {"UnidentifiedImageError": f"not an image of the formats {', '.join(FORMATS)}"}


def _stream(source: str | os.PathLike[str] | bytes) -> BytesIO:
    if isinstance(source, bytes):
        return BytesIO(source)
    data = disk.read(source, MAX_BYTES)
    if not data:
        raise BadImage("the file is empty")
    return BytesIO(data)


def _check(image: Any) -> None:
    w, h = image.size
    if w * h > MAX_PIXELS:
        raise BadImage(f"{w}x{h} = {w * h} pixels, at most {MAX_PIXELS}")
    if min(w, h) < 2:
        raise BadImage(f"{w}x{h} pixels: a side of one shows nothing")
    # A camera's MPO is a JPEG with previews behind it; Pillow calls it animated.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise BadImage(f"animated: {image.n_frames} frames")


def _turn(image: Any) -> None:
    """Turns the image in place as its EXIF says; damaged EXIF says nothing."""
    from PIL import ImageOps

    image.load()
    # To ask costs a twentieth of decoding a small file, and most JPEGs in a data set have none.
    if image.format == "JPEG" and not {"exif", "xmp"} & image.info.keys():
        return
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def converted(image: Any, channels: int) -> Any:
    """The image in RGB or, for one channel, in grey: 8 bits each."""
    from PIL import Image

    wanted = "RGB" if channels == 3 else "L"
    if image.mode == wanted:
        image.load()
        return image
    if image.mode in _DEEP or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # The high byte, as Pillow itself takes it from 16-bit colour.
        high = image.convert("I").tobytes()[1::4]
        image = Image.frombytes("L", image.size, high)
    elif image.mode in ("I", "F"):
        raise BadImage(f"mode {image.mode}: numbers whose range is not known")
    elif image.mode in ("P", "CMYK", "YCbCr", "HSV", "LAB"):
        image = image.convert("RGB")
    return image.convert(wanted)
