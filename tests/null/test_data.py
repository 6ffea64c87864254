"""Readers: what they give, and that damage of every kind is a DataError that says where."""

import contextlib
import gzip
import struct

import numpy as np
import pytest
import torch

from graphnet import config
from graphnet.errors import ConfigError, DataError
from graphnet.train.data import Batches, Dataset, load, permutation
from graphnet.train.folder import Reading
from graphnet.train.readers import read_idx


def idx(dims, magic=None, body=None):
    head = struct.pack(f">I{len(dims)}I", magic or (0x0800 | len(dims)), *dims)
    size = int(np.prod(dims))
    return head + (bytes(k % 10 for k in range(size)) if body is None else body)


def write_mnist(folder, n=12, suffix=".gz", **replace):
    files = {
        "train-images-idx3-ubyte": idx((n, 28, 28)), "train-labels-idx1-ubyte": idx((n,)),
        "t10k-images-idx3-ubyte": idx((n // 2, 28, 28)), "t10k-labels-idx1-ubyte": idx((n // 2,)),
    }  # fmt: skip
    for name, data in {**files, **replace}.items():
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(data) if suffix else data)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_reads_both_forms(tmp_path, suffix):
    write_mnist(tmp_path, suffix=suffix)
    data = load(f"mnist:{tmp_path}", "train")
    assert data.images.shape == (12, 1, 28, 28) and data.images.dtype == torch.uint8
    assert data.images[0, 0, 0].tolist() == [k % 10 for k in range(28)]
    assert data.labels.tolist() == [k % 10 for k in range(12)] and len(data.classes) == 10
    assert len(load(f"mnist:{tmp_path}", "test")) == 6


LABELS, IMAGES = "train-labels-idx1-ubyte", "train-images-idx3-ubyte"


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        (IMAGES, idx((12, 28, 28), magic=0x0D03), ["0x00000d03", "0x00000803"]),
        (IMAGES, idx((12,)), ["0x00000801", "0x00000803"]),
        (IMAGES, idx((12, 28, 28))[:100], ["84 bytes", "9408"]),
        (IMAGES, idx((12, 28, 28))[:10], ["10 bytes", "16"]),
        (IMAGES, b"", ["0 bytes", "16"]),
        (IMAGES, idx((12, 28, 28)) + b"x", ["more than 9408", "9408"]),
        (IMAGES, idx((12, 27, 28)), ["27x28", "28x28"]),
        (IMAGES, idx((0, 28, 28)), ["0x28x28"]),
        (IMAGES, idx((2**32 - 1, 28, 28), body=b""), ["4294967295x28x28"]),
        (LABELS, idx((11,)), ["12 images", "11 labels"]),
        (LABELS, idx((12,), body=b"\x0a" * 12), ["label 10", "9"]),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_damage(tmp_path, suffix, name, data, says):
    write_mnist(tmp_path, suffix=suffix, **{name: data})
    with pytest.raises(DataError) as error:
        load(f"mnist:{tmp_path}", "train")
    for text in [name, *says]:
        assert text in str(error.value)


def test_every_truncation_and_flip_of_a_gzip_is_typed(tmp_path):
    whole = gzip.compress(idx((2, 28, 28)))
    path = tmp_path / "x.gz"
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError):
            read_idx(path, 3)
    expected = idx((2, 28, 28))[16:]
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with contextlib.suppress(DataError):
            # Flips in gzip's own header (name, time, system) leave the content as it is.
            assert read_idx(path, 3).tobytes() == expected


def test_mnist_folder_missing_or_empty(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        load(f"mnist:{tmp_path / 'no'}", "train")
    with pytest.raises(DataError, match="neither train-images-idx3-ubyte nor"):
        load(f"mnist:{tmp_path}", "train")


@pytest.mark.parametrize("spec", ["", "cifar:x", "mnst", "digits:x", "synthetic:3", "MNIST:x"])
def test_unknown_spec_lists_the_valid_ones(spec):
    with pytest.raises(DataError, match=r"(?s)help: one of mnist:DIR, cifar10:PATH, digits, sy"):
        load(spec, "train")


def test_spec_without_folder_split_and_shape():
    for spec in ("mnist", "mnist:", "imagefolder", "cifar10:"):
        with pytest.raises(DataError, match="names no folder"):
            load(spec, "train")
    with pytest.raises(DataError, match="unknown split 'val'"):
        load("digits", "val")
    with pytest.raises(DataError, match="1x28x28, the net takes 3x227x227"):
        load("digits", "train", shape=(3, 227, 227))


def test_digits_split_is_fixed_disjoint_and_stratified():
    train, test = load("digits", "train"), load("digits", "test")
    assert (len(train), len(test)) == (1438, 359)
    assert train.shape == (1, 28, 28) and train.images.dtype == torch.float32
    assert float(train.images.min()) >= 0 and float(train.images.max()) <= 1
    share = test.labels.bincount() / (test.labels.bincount() + train.labels.bincount())
    assert float((share - 0.2).abs().max()) < 0.01
    assert torch.equal(load("digits", "test").images, test.images)
    seen = {i.numpy().tobytes() for i in train.images}
    assert not any(i.numpy().tobytes() in seen for i in test.images)


def test_synthetic_is_seeded_and_takes_a_shape():
    a, b = load("synthetic", "train"), load("synthetic", "train")
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert not torch.equal(a.images[:512], load("synthetic", "test").images)
    assert load("synthetic", "test", shape=(3, 64, 48)).shape == (3, 64, 48)
    assert a.labels.bincount().min() > 100


def test_dataset_checks():
    x, y = torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)
    bad = [
        (x.double(), y), (x[0], y), (x, y[:3]), (x, y.int()), (x[:0], y[:0]),
        (x, y + 2, ("a", "b")), (x, y, (), "n", (0.0, 1.0)), (x, y, (), "n", (0.0,), (0.0,)),
    ]  # fmt: skip
    for arguments in bad:
        with pytest.raises(DataError):
            Dataset(*arguments)


# ---- batches ---------------------------------------------------------------------------------


def numbered(n=10, dtype=torch.float32):
    return Dataset(torch.arange(n).reshape(n, 1, 1, 1).to(dtype), torch.arange(n))


def order(batches):
    return [y.tolist() for _, y in batches]


def test_batches_cover_an_epoch_and_end_with_a_smaller_one():
    b = Batches(numbered(), 4, seed=3)
    first, second = order(b), order(b)
    assert [len(r) for r in first] == [4, 4, 2] and len(b) == 3
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(10))
    assert first != second and order(Batches(numbered(), 4, seed=3)) == first
    assert order(Batches(numbered(), 4, seed=4)) != first
    b.set_epoch(0)
    assert order(b) == first
    assert order(Batches(numbered(), 4, shuffle=False)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_the_order_is_pinned():
    # Raw Philox words, sorted: a change here would reorder every run that is resumed.
    assert permutation(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert permutation(5, -1, 2).tolist() == permutation(5, (1 << 64) - 1, 2).tolist()
    large = {tuple(permutation(50, (1 << 63) + k, 0).tolist()) for k in range(4)}
    assert len(large) == 4


@pytest.mark.parametrize("at_once", [True, False])
def test_normalisation(monkeypatch, at_once):
    if not at_once:
        monkeypatch.setattr("graphnet.train.data._NORMALISE_AT_ONCE", 0)
    images = torch.randint(0, 256, (6, 2, 3, 3), dtype=torch.uint8)
    data = Dataset(images, torch.arange(6), mean=(0.1, 0.2), std=(0.3, 0.4))
    ((x, y),) = Batches(data, 6, seed=1)
    mean, std = torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4])
    want = (images[y].double() / 255 - mean[:, None, None]) / std[:, None, None]
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), want, rtol=1e-6, atol=1e-6)
    floats = Dataset(torch.ones(2, 1, 1, 1), torch.arange(2), mean=(0.5,), std=(2.0,))
    assert next(iter(Batches(floats, 2)))[0].flatten().tolist() == [0.25, 0.25]
    assert floats.images.flatten().tolist() == [1, 1]


@pytest.mark.parametrize("stop", range(7))
def test_resume_gives_what_is_left(stop):
    whole, taken = Batches(numbered(), 4, seed=5), []
    expected = [*order(whole), *order(whole), *order(whole)]
    b = Batches(numbered(), 4, seed=5)
    state = b.state()
    while len(taken) < stop:
        for _, y in b:
            taken.append(y.tolist())
            state = b.state()
            if len(taken) == stop:
                break
    fresh = Batches(numbered(), 4, seed=5)
    fresh.load_state(state)
    fresh.set_epoch(state["epoch"])  # as the trainer does: keeps the place
    rest = []
    while len(taken) + len(rest) < 9:
        rest += order(fresh)
    assert taken + rest == expected


def test_looking_at_the_first_batch_skips_nothing():
    b = Batches(numbered(), 4, seed=5)
    for _ in b:
        break
    b.set_epoch(0)
    assert b.state()["cursor"] == 0 and sum(map(len, order(b))) == 10


def test_state_of_something_else_is_refused():
    state = Batches(numbered(), 4, seed=5).state()
    bad = [{"seed": 6}, {"samples": 11}, {"shuffle": False}, {"cursor": 10}, {"epoch": -1}]
    for change in bad:
        with pytest.raises(DataError):
            Batches(numbered(), 4, seed=5).load_state({**state, **change})
    with pytest.raises(DataError, match="lacks cursor"):
        Batches(numbered(), 4, seed=5).load_state({k: state[k] for k in state if k != "cursor"})
    for batch in (0, -1, 2.5):
        with pytest.raises(ConfigError):
            Batches(numbered(), batch)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="pinned memory.*none is here"):
            Reading(pin=True)


@pytest.mark.data
@pytest.mark.skipif(
    config.data_dir() is None or not (config.data_dir() / "mnist").is_dir(),
    reason="GRAPHNET_DATA has no mnist",
)
def test_real_mnist():
    train, test = (load(f"mnist:{config.data_dir()}/mnist", s) for s in ("train", "test"))
    assert (len(train), len(test)) == (60000, 10000)
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    values = train.images.float() / 255
    assert abs(float(values.mean()) - train.mean[0]) < 1e-4
    assert abs(float(values.std()) - train.std[0]) < 1e-4
