"""Images in files: conversions, quarantine, workers, resuming; what is refused and how."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import graphnet as gn
from graphnet import config
from graphnet.errors import ConfigError, DataError
from graphnet.ir.op import get_op
from graphnet.train.data import Batches, check_classes, load, permutation
from graphnet.train.decode import BadImage, decode
from graphnet.train.folder import Reading
from graphnet.train.readers import read_image
from tests import image_files
from tests.image_files import encoded, make, picture, seen, train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path):
    with config.override(CACHE_DIR=str(tmp_path / "cache")):
        yield


def pixels(data, shape):
    return np.frombuffer(b"".join(decode(data, shape)), np.uint8).reshape(shape)


# ---- one file --------------------------------------------------------------------------------


def test_what_is_converted_is_converted_right():
    rgb = picture(24, 20)
    raw = np.asarray(rgb)

    def read(data, c=3):
        return pixels(data, (c, 20, 24))

    for form in ("PNG", "BMP", "PPM", "TIFF"):
        assert (read(encoded(rgb, form)) == raw.transpose(2, 0, 1)).all(), form
    cmyk = rgb.convert("CMYK")
    assert (read(encoded(cmyk, "TIFF")) == raw.transpose(2, 0, 1)).all()
    grey = rgb.convert("L")
    assert (read(encoded(grey, "PNG")) == np.asarray(grey)).all()  # the same in each channel
    assert (read(encoded(rgb, "PNG"), 1)[0] == np.asarray(grey)).all()
    assert (read(encoded(rgb.convert("RGBA"), "PNG")) == raw.transpose(2, 0, 1)).all()
    table = rgb.quantize(16)
    want = np.asarray(table.convert("RGB")).transpose(2, 0, 1)
    assert (read(encoded(table, "PNG")) == want).all()
    deep = np.arange(480, dtype=np.uint16).reshape(20, 24) * 136
    for form in ("PNG", "TIFF", "PPM"):
        assert (read(encoded(Image.fromarray(deep), form)) == deep >> 8).all(), form
    jpeg = encoded(rgb, "JPEG", quality=90)
    want = np.asarray(Image.open(io.BytesIO(jpeg))).transpose(2, 0, 1)
    assert (read(jpeg) == want).all()


def test_the_middle_is_kept_and_large_jpegs_are_reduced_while_decoding():
    wide = Image.new("RGB", (300, 100), (255, 0, 0))
    wide.paste((0, 255, 0), (100, 0, 200, 100))
    got = pixels(encoded(wide, "PNG"), (3, 10, 10))
    assert (got[1, :, 1:-1] == 255).all() and (got[0, :, 1:-1] == 0).all()
    x = np.linspace(0, 255, 800)
    smooth = np.stack([x + 0 * x[:, None], x[:, None] + 0 * x, 255 - x + 0 * x[:, None]], 2)
    image = Image.fromarray(smooth.astype(np.uint8))
    jpeg, png = encoded(image, "JPEG", quality=95), encoded(image, "PNG")
    a, b = (pixels(d, (3, 50, 50)).astype(int) for d in (jpeg, png))
    assert np.abs(a - b).max() <= 3


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_image_is_turned_as_its_exif_says(form):
    upright = np.zeros((60, 80, 3), np.uint8)
    upright[:30, :40], upright[:30, 40:], upright[30:, :40] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    undone = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's Transpose that the tag undoes
    for orientation in range(1, 9):
        lying = Image.fromarray(upright)
        if orientation in undone:
            lying = lying.transpose(Image.Transpose(undone[orientation]))
        exif = Image.Exif()
        exif[0x0112] = orientation
        for shape in ((3, 60, 80), (3, 6, 8)):  # the latter is decoded at a fraction
            got = pixels(encoded(lying, form, exif=exif), shape)
            corners = got[:, 1 :: shape[1] - 3, 1 :: shape[2] - 3].transpose(1, 2, 0).astype(int)
            want = upright[::59, ::79].astype(int)
            assert np.abs(corners - want).max() < 60, (orientation, shape, corners)


def test_read_image_gives_what_training_reads(tmp_path):
    make(tmp_path)
    path = tmp_path / "train" / "cat" / "003.png"
    image = read_image(path, (3, 8, 8))
    assert image.dtype == torch.uint8 and image[:, 4, 4].tolist() == [3, 6, 252]
    assert torch.equal(image, train(tmp_path, (3, 8, 8)).read([3])[0])
    with pytest.raises(DataError, match=r"cannot read image .*no\.png: No such file"):
        read_image(tmp_path / "no.png", (3, 8, 8))
    held = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(DataError, match=r"cannot read image .*cat: a directory"):
            read_image(path.parent, (3, 8, 8))
    assert len(os.listdir("/proc/self/fd")) == held


@pytest.mark.parametrize("size", [(12, 9), (9, 12)])
def test_images_are_made_larger_as_the_augmenting_kernel_does(size):
    """Evaluation and training resize by one rule: at most one level apart, which Pillow rounds."""
    w, h = size
    shape = (3, 4 * h, 4 * w)
    data = encoded(picture(w, h), "PNG")
    as_tensor = lambda s: torch.stack([
        torch.frombuffer(bytearray(p), dtype=torch.uint8).view(s[1:]) for p in decode(data, s)
    ])  # fmt: skip
    augment = gn.Augment(stored=(3, h, w), seen=shape[1:]).sized((1, *shape))
    zero = torch.zeros(1, dtype=torch.int64)
    (kernels,) = get_op("augment").reference(
        augment, as_tensor((3, h, w))[None], zero, zero[0], zero[0]
    )
    assert float((kernels[0] * 255 - as_tensor(shape)).abs().max()) < 1.01


# ---- bad files -------------------------------------------------------------------------------


def special(home):
    """Things with the name of an image that are no files; {name: words of the reason}."""
    (home / "folder.jpg").mkdir()
    os.mkfifo(home / "pipe.jpg")  # opening one must not wait for a writer
    (home / "gone.jpg").symlink_to(home / "nowhere")
    return {"folder.jpg": "directory", "pipe.jpg": "not a regular file", "gone.jpg": "No such file"}


def test_120_image_files_are_left_out_with_their_reasons(tmp_path):
    home = tmp_path / "train" / "all"
    home.mkdir(parents=True)
    wanted = special(home)
    for k, (name, data, words) in enumerate(image_files.IMAGES):
        (home / f"{k:03}-{name}").write_bytes(data)
        if words is not None:
            wanted[f"{k:03}-{name}"] = words
    assert len(wanted) + len(image_files.LABELS) >= 120
    cold, again = (train(tmp_path, (3, 16, 16), max_bad=1) for _ in range(2))
    # Two workers over an empty cache; then the same, warm and in this process.
    epochs = []
    for data, workers in ((cold, 2), (again, 0)):
        batches = Batches(data, 16, seed=3, reading=Reading(workers), raw=True)
        for _ in range(2):
            rows = []
            sizes = [(rows.extend(batches.rows.tolist()), len(y))[1] for _, y in batches]
            assert set(sizes[:-1]) == {16}
            epochs.append(rows)
        found = {Path(r["path"]).name: r["reason"] for r in data.report()}
        assert found.keys() == wanted.keys()
        for name, reason in found.items():
            assert reason and "\n" not in reason and wanted[name] in reason, (name, reason)
    good = [k for k, f in enumerate(cold.files) if Path(f.path).name not in wanted]
    for epoch in range(2):
        order = permutation(len(cold), 3, epoch).tolist()
        assert epochs[epoch] == epochs[2 + epoch] == [r for r in order if r in set(good)]


@pytest.mark.parametrize("at", range(len(image_files.LABELS)))
def test_bad_label_files_are_refused_with_their_reason(tmp_path, at):
    spec, files, words = image_files.LABELS[at]
    kind, _, name = spec.partition("/")
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    with pytest.raises(DataError) as error:
        load(f"{kind}:{tmp_path}/{name}", "train")
    assert words in str(error.value)


def test_more_than_the_allowed_share_stops(tmp_path):
    make(tmp_path)
    (tmp_path / "train" / "cat" / "002.png").write_bytes(b"junk")
    (tmp_path / "train" / "dog" / "009.png").write_bytes(b"")
    for workers in (0, 2):
        with pytest.raises(DataError, match=r"(?s)[12] of 12 files .*0\.001 .*\.png: .*max_bad"):
            seen(Batches(train(tmp_path), 4, reading=Reading(workers)))
        with pytest.raises(DataError, match="2 of 12 files"):
            seen(Batches(train(tmp_path, max_bad=1.9 / 12), 4, reading=Reading(workers)))
        data = train(tmp_path, max_bad=2 / 12)
        assert sum(len(y) for y, _ in seen(Batches(data, 4, reading=Reading(workers)))) == 10
    with pytest.raises(ConfigError, match="share from 0 to 1, not -1"):
        train(tmp_path, max_bad=-1)


def test_folders_in_a_class_belong_to_it(tmp_path, monkeypatch):
    make(tmp_path)
    cat, far = tmp_path / "train/cat", tmp_path / "far"
    (cat / "2024/may").mkdir(parents=True)
    (cat / "000.png").rename(cat / "2024/may/000.PNG")
    (cat / "004.png").rename(cat / "004.JFIF")
    (cat / "0.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    (cat / ".trash").mkdir()
    (cat / "001.png").rename(cat / ".trash/001.png")
    far.mkdir()
    (cat / "002.png").rename(far / "002.png")
    (cat / "link").symlink_to(far)
    for name, to in (("again", far), ("self", "."), ("up", "../.."), ("loop", "loop")):
        (cat / name).symlink_to(to)
    monkeypatch.setenv("HOME", str(tmp_path))  # a shell leaves ~ behind a colon as it is
    data = load("imagefolder:~", "train", shape=(3, 24, 24), max_bad=1)
    names = ["/".join(Path(f.path).parts[-2:]) for f in data.files if not f.label]
    own = [f"cat/{name}" for name in ("0.HEIC", "003.png", "004.JFIF", "005.png")]
    assert names == [*own, "may/000.PNG", "again/002.png"]
    assert int(data.labels.sum()) == 6
    assert len(data.read(range(len(data)))) == 11
    assert [r["reason"][:12] for r in data.report()] == ["not an image"]


def test_folders_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(DataError, match="has no folder train"):
        train(tmp_path)
    make(tmp_path)
    with pytest.raises(DataError, match="resized to 20x20, the net takes 24x24"):
        train(tmp_path, resize=20)
    with pytest.raises(DataError, match="1 or 3 channels, the net takes 2"):
        train(tmp_path, (2, 24, 24))
    with pytest.raises(DataError, match="labels from 0 to 1, the net has 1 outputs"):
        check_classes(train(tmp_path), 1)
    (tmp_path / "train" / "cow").mkdir()
    with pytest.raises(DataError, match=r"cow holds 0 images, expected at least 1"):
        train(tmp_path)
    with pytest.raises(DataError, match="2 classes, train 3; only one has: cow"):
        load(f"imagefolder:{tmp_path}", "test", shape=(3, 8, 8))
    with pytest.raises(DataError, match="digits is not resized"):
        load("digits", "train", resize=32)


# ---- order, workers, resuming ----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 24, 24), (1, 9, 7)])
def test_workers_and_cache_change_nothing(tmp_path, shape):
    make(tmp_path)
    want = None
    for options in ({"cache": False}, {}, {}):  # without, cold, warm
        for workers, prefetch in ((0, 2), (2, 2), (3, 1)):
            data = train(tmp_path, shape, **options)
            got = seen(Batches(data, 5, seed=1, reading=Reading(workers, prefetch)))
            want = want or got
            assert got == want and [len(y) for y, _ in got] == [5, 5, 2]
    # Memory is handed out again only when nobody holds it.
    batches = Batches(data, 1, seed=1, reading=Reading(2))
    held = list(batches)
    views = [x[0, :, ::2] for x, _ in Batches(data, 1, seed=1, reading=Reading(2))]
    assert seen(held) == seen(Batches(data, 1, seed=1))
    assert all(torch.equal(v, x[0, :, ::2]) for v, (x, _) in zip(views, held, strict=True))
    # The rows of a Folder are a Dataset's: normalisation included.
    ((x, y),) = Batches(data, 12, shuffle=False)
    assert torch.equal(x, data.normalised(data.read(range(12)))) and torch.equal(y, data.labels)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("bad", [(), (1, 6, 7)])
def test_resume_inside_an_epoch_of_files(tmp_path, workers, bad):
    make(tmp_path)
    for k in bad:
        (tmp_path / "train" / ("cat", "dog")[k // 6] / f"{k:03}.png").write_bytes(b"junk")

    def fresh():
        data = train(tmp_path, max_bad=1, cache=workers == 0)
        return Batches(data, 4, seed=5, reading=Reading(workers), cut="random")

    whole = fresh()
    want = seen(whole) + seen(whole)
    for stop in range(1, len(want), 1 + workers // 2):
        first, rest = fresh(), fresh()
        taken = []
        while len(taken) < stop:
            for x, y in first:
                taken.append((y.tolist(), x.numpy().tobytes()))
                state = first.state()
                if len(taken) == stop:
                    break
        rest.load_state(json.loads(json.dumps(state)))
        rest.set_epoch(state["epoch"])
        while len(taken) < len(want):
            taken += seen(rest)
        assert taken == want


def test_crops_depend_on_seed_epoch_and_row_alone(tmp_path):
    x, y = np.meshgrid(np.arange(20), np.arange(20))
    image = Image.fromarray(np.stack([x, y, x + y], 2).astype(np.uint8))
    for k in range(40):
        home = tmp_path / "train" / "a"
        home.mkdir(parents=True, exist_ok=True)
        image.save(home / f"{k:02}.png")
    data = train(tmp_path, (3, 16, 16), resize=20)
    assert data.shape == (3, 16, 16) and data.stored == (3, 20, 20)
    whole = next(iter(Batches(data, 1, raw=True)))[0]
    assert whole.shape == (1, 3, 20, 20) and whole.dtype == torch.uint8

    def corners(batch, epoch=0, seed=1, workers=0, flip=False):
        b = Batches(data, batch, seed, cut="random", flip=flip, reading=Reading(workers))
        b.set_epoch(epoch)
        std, mean = (torch.tensor(v).view(1, 3, 1, 1) for v in (data.std, data.mean))
        found = {}
        for x, _ in b:
            pixels = (x * std + mean).mul(255).round()
            for row, p in zip(b.rows.tolist(), pixels, strict=True):
                found[row] = tuple(p[:2, 0, 0].int().tolist() + p[:1, 0, 15].int().tolist())
        return found

    first = corners(8)
    assert first == corners(3, workers=2) and len(first) == 40
    assert first != corners(8, epoch=1) and first != corners(8, seed=2)
    assert {v[0] for v in first.values()} == {v[1] for v in first.values()} == set(range(5))
    assert all(right == left + 15 for left, _, right in first.values())
    mirrored = corners(8, flip=True)
    turned = {r: v[0] > v[2] for r, v in mirrored.items()}
    assert 8 < sum(turned.values()) < 32
    for row, (left, top, right) in mirrored.items():
        assert (min(left, right), top) == first[row][:2]
    ((x, _),) = Batches(data, 40)  # the middle
    assert torch.equal(x, data.normalised(data.read(range(40))[:, :, 2:18, 2:18]))
    alone = read_image(data.files[3].path, data.shape, data.stored)
    assert torch.equal(data.normalised(alone[None]), x[:1]), "every file holds the same image"


# ---- CIFAR-10 --------------------------------------------------------------------------------


def test_cifar_in_its_three_forms(tmp_path):
    (tmp_path / "bin").mkdir()
    for name, data in {**image_files.BATCHES, "test_batch.bin": image_files._RECORDS}.items():
        (tmp_path / "bin" / name).write_bytes(data)
    packed = {f"cifar-10-batches-bin/{k}": v for k, v in image_files.BATCHES.items()}
    (tmp_path / "c.tar.gz").write_bytes(image_files.archive(packed))
    for place in ("bin", "c.tar.gz"):
        data = load(f"cifar10:{tmp_path / place}", "train", shape=(3, 32, 32))
        assert data.images.shape == (15, 3, 32, 32) and data.labels.tolist() == [0, 1, 2] * 5
        assert data.images[4].unique().tolist() == [1] and data.classes[2] == "bird"
    assert len(load(f"cifar10:{tmp_path / 'bin'}", "test")) == 3
    make(tmp_path / "folder", size=(32, 32))
    data = load(f"cifar10:{tmp_path / 'folder'}", "train")
    assert data.name == "cifar10" and data.stored == (3, 32, 32) and data.mean[0] == 0.4914


def test_unreadable_bytes_are_one_error_type():
    """Random damage: BadImage or an image, nothing else."""
    rng = np.random.default_rng(1)
    for form in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"):
        whole = encoded(picture(16, 16), form)
        for _ in range(60):
            data = bytearray(whole)
            for at in rng.integers(0, len(data), rng.integers(1, 8)):
                data[at] = rng.integers(256)
            try:
                assert pixels(bytes(data), (3, 8, 8)).size == 192
            except BadImage as error:
                assert str(error)
