"""Image files for tests: a good data set, and more than 120 files that cannot be used beside 30
odd ones that can, with what has to become of each.

`IMAGES`: (name, bytes, words of the reason; None where the image is converted and used).
`LABELS`: (spec, {file: bytes}, words of the error).
"""

import gzip
import io
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image

from graphnet.train.data import load

RNG = np.random.default_rng(20_240_901)


def make(root, count=12, size=(24, 24), splits=("train", "test")):
    """Two classes of PNGs; the number of an image is its colour."""
    for split in splits:
        for k in range(count):
            home = root / split / ("cat", "dog")[k * 2 // count]
            home.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, (k, 2 * k, 255 - k)).save(home / f"{k:03}.png")


def train(root, shape=(3, 24, 24), **options):
    return load(f"imagefolder:{root}", "train", shape=shape, **options)


def seen(batches):
    """[(labels, bytes)] of an epoch."""
    return [(y.tolist(), x.numpy().tobytes()) for x, y in batches]


def picture(w=40, h=32):
    return Image.fromarray(RNG.integers(0, 256, (h, w, 3), dtype=np.uint8))


def encoded(image, form, **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def png(w, h, depth=8, colour=2, data=b""):
    """A PNG of any size that holds only `data`."""

    def chunk(kind, body):
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    head = struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _converted():
    rgb = picture()
    wide = Image.fromarray(RNG.integers(0, 65536, (32, 40), dtype=np.uint16))
    for mode in ("L", "CMYK", "1", "YCbCr"):
        yield f"{mode}.jpg", encoded(rgb.convert(mode if mode != "1" else "L"), "JPEG")
    for mode in ("L", "LA", "P", "RGBA", "1"):
        yield f"{mode}.png", encoded(rgb.convert(mode), "PNG")
    for mode in ("CMYK", "P", "RGBA", "L", "LAB"):
        yield f"{mode}.tif", encoded(rgb.convert(mode), "TIFF")
    for form, end in (("PNG", "png"), ("TIFF", "tif"), ("PPM", "pgm")):
        yield f"deep.{end}", encoded(wide, form)
    yield "deep-colour.png", png(8, 8, 16, 2, (b"\0" + bytes(48)) * 8)
    clear = rgb.convert("P")
    yield "palette-with-alpha.png", encoded(clear, "PNG", transparency=bytes(range(256)))
    yield "one-frame.gif", encoded(rgb, "GIF")
    yield "lossless.webp", encoded(rgb, "WEBP", lossless=True)
    for true, named in (("PNG", "jpg"), ("JPEG", "png"), ("GIF", "jpeg"), ("BMP", "png")):
        yield f"{true}-named.{named}", encoded(rgb, true)
    yield "progressive.jpg", encoded(rgb, "JPEG", progressive=True)
    whole = encoded(rgb, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + b"\xff" * 40)
    yield "bad-exif.jpg", whole
    yield "bad-exif-2.jpg", encoded(rgb, "JPEG", exif=b"Exif\0\0" + b"\x00" * 8)
    yield "tail.jpg", encoded(rgb, "JPEG") + b"\0" * 100
    yield "narrow.png", encoded(picture(2, 900), "PNG")
    yield "huge-but-allowed.png", encoded(Image.new("1", (5000, 4990)), "PNG")


def _bad():
    rgb = picture()
    for end in ("jpg", "png", "gif", "bmp", "webp", "tif"):
        yield f"empty.{end}", b"", "empty"
    for k, junk in enumerate((b"\0", b"no image", bytes(4096), RNG.bytes(5000), b"<svg/>")):
        yield f"junk-{k}.jpg", junk, "not an image"
    yield "program.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"
    yield "pickle.png", b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00.", "not an image"
    yield "packed.jpg", gzip.compress(encoded(rgb, "JPEG")), "not an image"
    yield "photoshop.tif", b"8BPS\0\1" + bytes(60), "not an image"
    for form, end, least in (
        ("JPEG", "jpg", 0), ("PNG", "png", 0), ("BMP", "bmp", 0), ("PPM", "ppm", 0.1),
        ("TIFF", "tif", 0.1), ("GIF", "gif", 0.6), ("WEBP", "webp", 1),
    ):  # fmt: skip
        whole = encoded(rgb, form)
        for share in (0.02, 0.1, 0.25, 0.4, 0.6, 0.75, 0.9):
            # Below `least` the format cannot be told, or its decoder has words of its own.
            words = "runcated" if share >= least else ""
            yield f"cut-{share}.{end}", whole[: int(len(whole) * share)], words
    for k, (w, h) in enumerate(((30_000, 30_000), (5000, 5001), (25_000_001, 1), (65_000, 65_000))):
        yield f"bomb-{k}.png", png(w, h), "pixels"
    bomb = b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 9000, 9000, 1, 24, 0, *[0] * 5)
    yield "bomb.bmp", bomb, "at most 25000000"
    yield "bomb.ppm", b"P6 40000 40000 255\n", "pixels"
    for w, h in ((1, 1), (1, 50), (50, 1)):
        yield f"thin-{w}x{h}.png", encoded(picture(w, h), "PNG"), "a side of one"
    for form, end in (("GIF", "gif"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif")):
        frames = [picture(), picture(), picture()]
        film = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        yield f"film.{end}", film, "animated: 3 frames"
    yield "floats.tif", encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "mode F"
    yield "ints.tif", encoded(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"), "mode I"
    for at in (1, 13, 30, 60, 200, 900):
        whole = bytearray(encoded(rgb, "PNG"))
        whole[at] ^= 0xFF
        yield f"flipped-{at}.png", bytes(whole), ""
    yield "no-pixels.png", png(16, 16), "truncated"
    yield "size-of-zero.png", png(0, 16), "not an image"
    yield "head-only.jpg", encoded(rgb, "JPEG")[:200], "runcated"


def _idx(dims, magic=None, body=None):
    head = struct.pack(f">I{len(dims)}I", magic or (0x0800 | len(dims)), *dims)
    return head + (bytes(k % 10 for k in range(int(np.prod(dims)))) if body is None else body)


IDX_IMAGES, IDX_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
_GOOD = {IDX_IMAGES: _idx((4, 28, 28)), IDX_LABELS: _idx((4,))}
_RECORDS = b"".join(bytes([k]) + bytes([k]) * 3072 for k in range(3))
BATCHES = {f"data_batch_{k}.bin": _RECORDS for k in range(1, 6)}


def archive(files):
    """A .tar.gz of files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def _labels():
    wrong = [
        (IDX_IMAGES, _idx((4, 28, 28), magic=0x0D03), "magic number 0x00000d03"),
        (IDX_IMAGES, _idx((4,)), "magic number 0x00000801"),
        (IDX_IMAGES, encoded(picture(), "PNG"), "magic number 0x89504e47"),
        (IDX_IMAGES, _idx((4, 28, 28))[:-1], "3135 bytes behind the header"),
        (IDX_IMAGES, _idx((4, 28, 28)) + b"x", "more than 3136 bytes"),
        (IDX_IMAGES, b"\0\0\x08\x03\0", "the header has 5 bytes"),
        (IDX_IMAGES, b"", "the header has 0 bytes"),
        (IDX_IMAGES, _idx((2**32 - 1, 28, 28), body=b""), "claims 4294967295x28x28"),
        (IDX_IMAGES, _idx((4, 32, 32)), "images of 32x32"),
        (IDX_LABELS, _idx((3,)), "4 images, "),
        (IDX_LABELS, _idx((5,)), "4 images, "),
        (IDX_LABELS, _idx((4,))[:-1], "3 bytes behind the header"),
        (IDX_LABELS, _idx((4,), magic=0x0C01), "magic number 0x00000c01"),
        (IDX_LABELS, _idx((4,), body=b"\0\1\x0a\3"), "label 10"),
        (IDX_LABELS, _idx((4,), body=b"\0\1\xff\3"), "label 255"),
        (IDX_LABELS, _idx((4, 1)), "magic number 0x00000802"),
    ]
    for name, data, words in wrong:
        yield "mnist", {**_GOOD, name: data}, words
    good = {IDX_LABELS: _GOOD[IDX_LABELS]}
    yield "mnist", {**good, f"{IDX_IMAGES}.gz": b"\x1f\x8b\x08junk"}, "no whole gzip file"
    yield "mnist", {IDX_LABELS: _idx((4,))}, "neither"
    packed = gzip.compress(_GOOD[IDX_LABELS])
    for cut in (5, 20, len(packed) - 4):
        yield "mnist", {IDX_IMAGES: _GOOD[IDX_IMAGES], f"{IDX_LABELS}.gz": packed[:cut]}, "gzip"
    last = "data_batch_5.bin"
    yield "cifar10", {**BATCHES, last: _RECORDS[:-1]}, "9218 bytes are no whole number of 3073"
    yield "cifar10", {**BATCHES, last: b""}, "0 bytes"
    yield "cifar10", {**BATCHES, last: b"\x0a" + _RECORDS[1:]}, "record 0 has label 10"
    yield "cifar10", {k: BATCHES[k] for k in list(BATCHES)[:4]}, "cannot read"
    yield "cifar10", {"data_batch_1": b"\x80\x04."}, "pickled"
    yield "cifar10", {"readme.txt": b""}, "neither data_batch_1.bin nor"
    whole = archive(BATCHES)
    yield "cifar10/x.tar.gz", {"x.tar.gz": whole[: len(whole) // 2]}, "no whole tar file"
    yield "cifar10/x.tar.gz", {"x.tar.gz": b"no tar"}, "no whole tar file"
    yield "cifar10/x.tar.gz", {"x.tar.gz": archive({"c/data_batch_1": b"\x80."})}, "has no data_b"
    pictures = archive({"train/cat/1.jpg": encoded(picture(), "JPEG")})
    yield "cifar10/x.tar.gz", {"x.tar.gz": pictures}, "unpack it"


IMAGES = [(n, d, None) for n, d in _converted()] + list(_bad())
LABELS = list(_labels())
