"""Runs and trainers on image files, arrays and loaders: what is left out is listed, what is wrong
ends in one line."""

import json
import warnings
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import graphnet as gn
from graphnet import config
from graphnet.cli import main
from graphnet.errors import DataError
from graphnet.lowering.build.inventory import clear, listing
from graphnet.train import run
from graphnet.train.data import Dataset, load
from graphnet.train.evaluation import evaluate_run
from graphnet.train.run import RunConfig, dry_run, run_training
from tests.image_files import make, train

ROOT = Path(__file__).resolve().parents[2]
NET = """
import graphnet as gn
net = gn.Sequential(
    gn.Conv2d(3, 4, 5, stride=4), gn.ReLU(), gn.Flatten(), gn.Linear(100, CLASSES)
)
net.input_shape = (3, 24, 24)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path):
    with config.override(CACHE_DIR=str(tmp_path / "cache")):
        yield


@pytest.fixture
def net_file(tmp_path):
    def write(classes):
        path = tmp_path / f"net{classes}.py"
        path.write_text(NET.replace("CLASSES", str(classes)))
        return f"{path}:net"

    return write


def test_a_run_lists_what_it_left_out(tmp_path, net_file, capsys):
    make(tmp_path / "d", 20)
    for name in ("train/cat/004.png", "test/dog/013.png"):
        (tmp_path / "d" / name).write_bytes(b"")
    settings = RunConfig(
        net_file(2), f"imagefolder:{tmp_path / 'd'}", epochs=2, batch=6, target="cpu", max_bad=0.05
    )
    result = run_training(settings, tmp_path / "run", quiet=True)
    lines = (tmp_path / "run/quarantine.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [r["path"][-11:] for r in rows] == ["dog/013.png", "cat/004.png"]
    assert {r["reason"] for r in rows} == {"the file is empty"}
    assert capsys.readouterr().err.count("2 image files left out") == 1
    assert result["steps"] == 8 and result["epochs"] == 2  # 19 images each time, in 4 batches
    found = evaluate_run(tmp_path / "run", model=net_file(2), target="cpu")
    assert found["images"] == 19 and found["top1_error"] == pytest.approx(result["top1_error"])


def test_a_run_with_too_many_bad_files_lists_them_all_the_same(tmp_path, net_file):
    make(tmp_path / "d", 20)
    (tmp_path / "d/train/cat/004.png").write_bytes(b"junk")
    settings = RunConfig(net_file(2), f"imagefolder:{tmp_path / 'd'}", batch=6, target="cpu")
    with pytest.raises(DataError, match="1 of 20 files"):
        run_training(settings, tmp_path / "run", quiet=True)
    assert "not an image" in (tmp_path / "run/quarantine.jsonl").read_text()


def test_resize_trains_on_crops_and_resumes(tmp_path, net_file):
    make(tmp_path / "d", 20, size=(40, 40))
    settings = RunConfig(
        net_file(2), f"imagefolder:{tmp_path / 'd'}", epochs=2, batch=6, target="cpu", resize=32,
        workers=0,
    )  # fmt: skip
    assert dry_run(settings)["images"] == 20 and listing() == []
    pair = {"a": settings, "b": replace(settings, uncached=True)}
    losses = [run_training(s, tmp_path / n, quiet=True)["train_loss"] for n, s in pair.items()]
    held = [row for row in listing() if row["kind"] == "images"]
    assert sorted(r["what"][:24] for r in held) == ["20 images [3, 32, 32] of"] * 2
    assert all(r["bytes"] >= 20 * 3 * 32 * 32 for r in held)
    assert clear(["images"])["files"] == 6 and listing() == []
    assert losses[0] == losses[1] and (tmp_path / "a/config.toml").read_text().count("resize = 32")


def test_small_images_travel_as_they_are_where_a_gpu_resizes_them(tmp_path, net_file, monkeypatch):
    """A net for 24x24 that crops from 32x32, on files of 16x12: an aspect of 1 leaves 12x12."""
    make(tmp_path / "d", 20, size=(16, 12))
    settings = RunConfig(
        net_file(2), f"imagefolder:{tmp_path / 'd'}", epochs=2, batch=6, target="cpu", resize=32,
        workers=0, augment="crop,flip=0.5,rotate=10",
    )  # fmt: skip
    plain = run_training(settings, tmp_path / "plain", quiet=True)
    monkeypatch.setattr(run, "_resizes", lambda settings: True)  # as on a GPU
    assert dry_run(settings)["images"] == 20
    result = run_training(replace(settings, epochs=1), tmp_path / "run", quiet=True)
    held = [row["what"] for row in listing() if row["kind"] == "images"]
    assert sum(w.startswith("20 images [3, 12, 12] of") for w in held) == 1  # of the training set
    about = json.loads((tmp_path / "run/augment.json").read_text())
    assert about["seen"] == [32, 32] and about["stored"] == [3, 12, 12]
    assert json.loads((tmp_path / "run/data.json").read_text())["stored"] == [3, 32, 32]
    found = evaluate_run(tmp_path / "run", model=net_file(2), target="cpu")
    assert found["top1_error"] == pytest.approx(result["top1_error"])
    # A run goes on as it was started, also where no GPU is.
    config = tmp_path / "run/config.toml"
    config.write_text(config.read_text().replace("epochs = 1", "epochs = 2"))
    (tmp_path / "run/misclassified.png").unlink()
    monkeypatch.undo()
    again = run_training(replace(settings, epochs=2), tmp_path / "run", resume=True, quiet=True)
    assert again["epochs"] == 2
    # Beside images that Pillow has resized: another filter, the same pictures.
    assert again["train_loss"] == pytest.approx(plain["train_loss"], rel=0.05)


def test_images_of_several_sizes_or_large_ones_are_resized_as_before(tmp_path):
    make(tmp_path / "d", 20, size=(16, 12))
    spec = f"imagefolder:{tmp_path / 'd'}"
    small = load(spec, "train", shape=(3, 24, 24), own=True)
    assert small.stored == (3, 12, 12) and small.seen == (3, 24, 24)
    assert small.read([0, 1]).shape == (2, 3, 12, 12)
    assert load(spec, "train", shape=(3, 24, 24)).seen is None
    assert load(spec, "train", shape=(3, 12, 12), own=True).seen is None
    Image.new("RGB", (20, 20)).save(tmp_path / "d/train/cat/000.png")
    assert load(spec, "train", shape=(3, 24, 24), own=True).stored == (3, 24, 24)


def test_the_example_with_lrn_learns(tmp_path):
    rng = np.random.default_rng(1)
    for split, name in product(("train", "test"), ("cat", "dog")):
        home = tmp_path / "d" / split / name
        home.mkdir(parents=True)
        for k in range(16):
            noise = rng.integers(0, 160, (32, 32, 3), dtype=np.uint8) + 95 * (name == "dog")
            Image.fromarray(noise.astype(np.uint8)).save(home / f"{k}.png")
    settings = RunConfig(
        f"{ROOT}/examples/cifar_cnn.py:net", f"cifar10:{tmp_path / 'd'}", epochs=6, batch=8,
        target="cpu", lr=0.05, classes=2,
    )  # fmt: skip
    history = run_training(settings, tmp_path / "run", quiet=True)["history"]
    assert history[0]["train_loss"] > 0.6 and history[-1]["val_accuracy"] == 1


def bad_data(tmp_path):
    make(tmp_path / "d", 4)
    make(tmp_path / "e", 4)
    (tmp_path / "e/train/cow").mkdir()
    return {
        "cifar:x": "unknown data 'cifar:x'; help: one of mnist:DIR, cifar10:PATH",
        f"imagefolder:{tmp_path}/no": "has no folder train",
        f"imagefolder:{tmp_path}/e": "cow holds 0 images, expected at least 1",
        f"imagefolder:{tmp_path}/d": "labels from 0 to 1, the net has 1 outputs",
        f"cifar10:{tmp_path}": "neither data_batch_1.bin nor a folder train",
        "digits": "the images of digits are 1x28x28, the net takes 3x24x24",
    }


@pytest.mark.parametrize("at", range(6))
def test_bad_data_is_one_line_exit_code_2_and_no_folder(tmp_path, net_file, capsys, at):
    spec, said = list(bad_data(tmp_path).items())[at]
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as end:
        main(["train", net_file(1), "--data", spec, "--target", "cpu", "--out", str(out)])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and said in err, err
    assert not out.exists()


# ---- what a Trainer takes --------------------------------------------------------------------


def small():
    torch.manual_seed(0)
    net = gn.Sequential(gn.Flatten(), gn.Linear(12, 3))
    return gn.Trainer(net, gn.CrossEntropyLoss(), gn.SGD(lr=0.1), target="cpu")


def test_a_trainer_takes_arrays_loaders_and_folders(tmp_path):
    x = torch.randn(30, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    y = torch.arange(30) % 3
    pairs = torch.utils.data.TensorDataset(x, y)
    in_order = [(x[at : at + 8], y[at : at + 8]) for at in range(0, 30, 8)]
    want = small().fit(in_order, epochs=2, batch=8)
    loaders = [torch.utils.data.DataLoader(pairs, 8, num_workers=n) for n in (0, 1)]
    for data in loaders:
        history = small().fit(data, data, epochs=2, batch=8)
        assert [m["train_loss"] for m in history] == [m["train_loss"] for m in want]
    losses = [
        small().fit(pair, epochs=2, batch=8)[-1]["train_loss"]
        for pair in ((x, y), (x.numpy(), y.numpy().astype(np.int16)), Dataset(x, y))
    ]
    assert losses[0] == losses[1] == losses[2]
    make(tmp_path)
    assert small().fit(train(tmp_path, (3, 2, 2)), epochs=2, batch=5)[-1]["step"] == 6
    for odd in (iter(in_order), "digits", pairs):
        with pytest.raises(DataError, match="cannot be read epoch after epoch"):
            small().fit(odd, epochs=1, batch=8)


def test_arrays_of_every_make_train_alike():
    g = np.random.default_rng(0)
    x, y = g.random((16, 3, 2, 2), dtype=np.float32), np.arange(16) % 3
    frozen = x.copy()
    frozen.flags.writeable = False
    mirrored = np.ascontiguousarray(x[..., ::-1])[..., ::-1]
    pairs = [
        (x, y), (frozen, y.astype(np.uint8)), (mirrored, y), (x.astype(">f4"), y.astype(">i2")),
        (np.asfortranarray(x), np.ascontiguousarray(y[::-1])[::-1]), (x, y.astype(np.uint64)),
        (x, y.tolist()), (torch.tensor(x).to(memory_format=torch.channels_last), torch.tensor(y)),
    ]  # fmt: skip
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pair in pairs:
            losses.append(small().fit(pair, epochs=1, batch=8)[-1]["train_loss"])
    assert losses == [losses[0]] * len(pairs)
    for wrong in (x.astype(object), x.astype(np.float64), x.astype("S4")):
        with pytest.raises(DataError, match="float32"):
            small().fit((wrong, y), epochs=1, batch=8)


def test_a_loader_gives_pairs():
    x, y = torch.zeros(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64)
    for batch, what in (((x, y, y), "a tuple of 3"), ({"x": x, "y": y}, "a dict"), (x, "a Tensor")):
        for data, val in (([batch], None), ([(x, y)], [batch])):
            with pytest.raises(DataError, match=f"a batch is {what}"):
                small().fit(data, val, epochs=1, batch=4)
