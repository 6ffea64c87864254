"""Ten crops, ensembles, predictions of image files, and the pictures of a run."""

import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import graphnet as gn
from graphnet import config
from graphnet.cli import main
from graphnet.errors import CheckpointError, ConfigError, DataError
from graphnet.frontends.loading import load_model
from graphnet.train import demos, evaluation, plots
from graphnet.train.data import Batches, load
from graphnet.train.evaluation import Tally, averaged, evaluate_run, predict, ten_crops
from graphnet.train.run import RunConfig, run_training

MODEL = """
import graphnet as gn
net = gn.Sequential(gn.Conv2d(3, 4, 3), gn.ReLU(), gn.MaxPool2d(2), gn.Flatten(), gn.Linear(196, 3))
net.input_shape = (3, 16, 16)
"""
COLOURS = {"blue": (20, 40, 220), "green": (30, 200, 40), "red": (230, 30, 20)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two short runs on coloured squares, and the folder of images."""
    base = tmp_path_factory.mktemp("eval")
    (base / "net.py").write_text(MODEL)
    g = torch.Generator().manual_seed(0)
    for split, count in (("train", 24), ("test", 8)):
        for name, colour in COLOURS.items():
            folder = base / "data" / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                noise = torch.randint(-40, 40, (20, 20, 3), generator=g)
                pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{k:02d}.png")
    settings = {
        "model": f"{base / 'net.py'}:net", "data": f"imagefolder:{base / 'data'}", "epochs": 3,
        "batch": 12, "target": "cpu", "lr": 0.05, "workers": 0, "resize": 20,
    }  # fmt: skip
    results = [
        run_training(RunConfig(**settings, seed=s), base / f"run{s}", quiet=True) for s in (0, 1)
    ]
    return base, results


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr("graphnet.train.run._pictures", lambda *parts: None)


def model_of(base):
    """What has to be named, since it would be run."""
    return f"{base / 'net.py'}:net"


def test_ten_crops_are_corners_centre_and_mirrors():
    x = torch.arange(25.0).reshape(1, 1, 5, 5)
    crops = list(ten_crops(x, (3, 3)))
    assert [int(c[0, 0, 0, 0]) for c in crops[::2]] == [0, 2, 10, 12, 6]
    assert all(torch.equal(m, c.flip(-1)) for c, m in zip(crops[::2], crops[1::2], strict=True))


def test_members_and_crops_are_averaged_after_softmax():
    members = [lambda x: x.flatten(1)[:, :3], lambda x: -2 * x.flatten(1)[:, :3]]
    x = torch.randn(4, 1, 2, 2)
    want = (torch.softmax(members[0](x), 1) + torch.softmax(members[1](x), 1)) / 2
    assert torch.allclose(averaged(members)(x), want)
    big = torch.randn(2, 1, 4, 4)
    views = [torch.softmax(members[0](v), 1) for v in ten_crops(big, (2, 2))]
    assert torch.allclose(averaged(members[:1], (2, 2))(big), torch.stack(views).mean(0))


def test_evaluation_in_every_way(runs):
    base, results = runs
    how = {"model": model_of(base), "target": "cpu"}
    one = evaluate_run(base / "run0", **how)
    assert one["images"] == 24 and one["top1_error"] == pytest.approx(results[0]["top1_error"])
    assert evaluate_run(base / "run0", **how, batch=10**9)["top1_error"] == one["top1_error"]
    crops = evaluate_run(base / "run0", **how, ten_crop=True)
    both = evaluate_run(base / "run0", **how, ensemble=[base / "run1"])
    assert crops["ten_crop"] and both["members"] == 2
    for found in (one, crops, both):
        assert found["top1_error"] < 20 and sum(map(sum, found["confusion"])) == 24
    with pytest.raises(ConfigError, match="from images of the same size are one"):
        evaluate_run(base / "run0", **how, ten_crop=True, resize=16)
    with pytest.raises(CheckpointError):
        evaluate_run(base / "run0", **how, ensemble=[base / "nothing.safetensors"])


def test_predictions_name_the_classes(runs, tmp_path, capsys):
    base, _ = runs
    files = []
    for name, colour in COLOURS.items():
        files.append(tmp_path / f"{name}.jpg")
        Image.new("RGB", (31, 24), colour).save(files[-1])
    rows = predict(base / "run0", files, model=model_of(base), target="cpu", top=2)
    assert [r["classes"][0]["name"] for r in rows] == list(COLOURS)
    for r in rows:
        assert len(r["classes"]) == 2 and r["classes"][0]["p"] > r["classes"][1]["p"] >= 0
    (tmp_path / "broken.png").write_bytes(b"no image")
    argv = ["predict", str(base / "run0"), str(files[0]), str(tmp_path / "broken.png"), "--json"]
    with pytest.raises(SystemExit) as end:
        main([*argv, "--target", "cpu", "--model", model_of(base)])
    said = json.loads(capsys.readouterr().out)["images"]
    assert end.value.code == 2 and said[0]["classes"][0]["name"] == "blue" and said[1]["error"]


def test_a_run_leaves_its_pictures_and_tables(runs):
    base, _ = runs
    for name in ("confusion.png", "misclassified.png", "curves.png", "filters.png"):
        assert (base / "run0" / name).read_bytes().startswith(b"\x89PNG"), name
    lines = (base / "run0/metrics.csv").read_text().splitlines()
    assert lines[0].startswith("epoch,step,lr,train_loss") and len(lines) == 4
    assert json.loads((base / "run0/data.json").read_text())["classes"] == list(COLOURS)
    assert json.loads((base / "run0/test.json").read_text())["images"] == 24


def test_the_surest_mistakes_are_kept(tmp_path):
    tally = Tally(3)
    p = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.4, 0.0, 0.6], [0.0, 0.0, 1.0]])
    images = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 1, 2, 2)
    tally.add(p, torch.tensor([1, 1, 0, 0]), images)
    kept = [(round(sure, 1), y, k) for sure, _, y, k in tally.shown]
    assert kept == [(1.0, 0, 2), (0.9, 1, 0), (0.6, 0, 2)]
    assert tally.as_dict()["top1_error"] == 75.0
    assert tally.as_dict()["loss"] == pytest.approx(
        -torch.tensor([0.1, 0.8, 0.4, 1e-38]).log().mean().item()
    )
    plots.misclassified(tmp_path / "m.png", tally.shown, ["a", "b", "c"])
    plots.misclassified(tmp_path / "none.png", [], ["a"])
    assert {p.name for p in tmp_path.iterdir()} == {"m.png", "none.png"}


# ---- demonstrations --------------------------------------------------------------------------


def test_paths_are_those_of_torch():
    bowl = demos.SURFACES[0]
    for spec in demos.optimizers(bowl.lr).values():
        w = torch.tensor(bowl.start, requires_grad=True)
        twin = torch.optim.SGD([w], lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov)
        path = demos.descend(spec, bowl, 30)
        for k in range(30):
            assert torch.allclose(path[k], w.detach(), rtol=1e-4, atol=1e-6), k
            w.grad = bowl.gradient(w.detach())
            twin.step()


def test_what_the_demonstrations_teach(tmp_path):
    rows = {(r["surface"], r["optimizer"]): r for r in demos.demo_optimizers(tmp_path / "o.png")}
    bowl, saddle, _ = (s.name for s in demos.SURFACES)
    assert rows[bowl, "momentum 0.9"]["loss"] < rows[bowl, "SGD"]["loss"] / 100
    assert (
        rows[saddle, "Nesterov 0.9"]["steps_to_95_percent"]
        < rows[saddle, "SGD"]["steps_to_95_percent"]
    )
    for row in demos.demo_dropout(tmp_path / "d.png", masks=300):
        assert abs(row["mean"] - row["test"]) < 4 * row["standard_error"] and row["spread"] > 0.01
    assert {p.name for p in tmp_path.iterdir()} == {"o.png", "d.png"}


def test_demo_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["demo", "optimizers", "--steps", "5"])
    assert end.value.code == 0 and "Nesterov" in capsys.readouterr().out
    assert (tmp_path / "optimizers.png").exists()


def test_a_checkpoint_in_no_run_needs_its_model(tmp_path):
    gn.save(tmp_path / "n.safetensors", gn.models.lenet5())
    with pytest.raises(ConfigError, match="--model"):
        evaluation.load_trained(tmp_path / "n.safetensors")
    trained = evaluation.load_trained(tmp_path / "n.safetensors", "lenet5")
    assert trained.about == {} and trained.name == "lenet5"


# ---- one set, one answer ---------------------------------------------------------------------


def test_what_a_net_was_trained_on_decides_how_it_sees(runs):
    """The same files under another name have another mean, the net its own."""
    base, _ = runs
    how = {"model": model_of(base), "target": "cpu", "workers": 0, "ten_crop": True}
    one = evaluate_run(base / "run0", **how)
    other = evaluate_run(base / "run0", f"cifar10:{base / 'data'}", resize=20, **how)
    assert one["loss"] == other["loss"] and one["left_out"] == []


def test_a_set_for_tests_may_stand_alone(runs, tmp_path):
    base, _ = runs
    shutil.copytree(base / "data/test", tmp_path / "val")
    how = {"model": model_of(base), "target": "cpu", "workers": 0, "resize": 20}
    alone = evaluate_run(base / "run0", f"imagefolder:{tmp_path}", **how)
    assert alone["loss"] == evaluate_run(base / "run0", **how)["loss"]
    with pytest.raises(DataError, match="has no folder train"):
        load(f"imagefolder:{tmp_path}", "train", shape=(3, 16, 16))


def test_prediction_agrees_with_a_loader_of_torch(runs, tmp_path):
    """One that turns its photographs, and gives values in [0, 1]."""
    base, _ = runs
    exif = Image.Exif()
    g = np.random.default_rng(3)
    for k, orientation in enumerate((1, 6, 3, 8)):
        exif[0x0112] = orientation
        pixels = g.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{k}.png", exif=exif)
    files = sorted(tmp_path.iterdir())

    class Photographs(torch.utils.data.Dataset):
        def __len__(self):
            return len(files)

        def __getitem__(self, k):
            with Image.open(files[k]) as image:
                pixels = np.asarray(ImageOps.exif_transpose(image))
            return torch.tensor(pixels.transpose(2, 0, 1)) / 255, k % 3

    loader = torch.utils.data.DataLoader(Photographs(), 4)
    trainer = gn.Trainer(
        load_model(f"{base / 'net.py'}:net"), gn.CrossEntropyLoss(), gn.SGD(0.1), target="cpu"
    )  # fmt: skip
    trainer.fit(loader, epochs=3, batch=4)
    gn.save(tmp_path / "net.safetensors", trainer.net)
    want = torch.softmax(gn.compile(trainer.net, (4, 3, 16, 16))(next(iter(loader))[0]), 1)
    rows = predict(
        tmp_path / "net.safetensors", files, model=f"{base / 'net.py'}:net", top=3, target="cpu"
    )  # fmt: skip
    for row, p in zip(rows, want, strict=True):
        got = {c["index"]: c["p"] for c in row["classes"]}
        assert [got[k] for k in range(3)] == pytest.approx(p.tolist(), abs=1e-5)


def test_other_classes_are_not_the_same_numbers(runs, tmp_path):
    base, _ = runs
    for split in ("train", "test"):
        for name in ("blue", "cyan", "red"):
            source = base / "data" / split / (name if name != "cyan" else "green")
            shutil.copytree(source, tmp_path / split / name)
    with pytest.raises(DataError, match="class 1 is 'cyan' there, 'green' here"):
        evaluate_run(
            base / "run0", f"imagefolder:{tmp_path}", model=model_of(base), target="cpu", resize=20
        )
    (base / "wide.py").write_text(MODEL.replace("196, 3", "196, 5"))
    wide = load_model(f"{base / 'wide.py'}:net")
    gn.save(tmp_path / "wide.safetensors", wide)
    with pytest.raises(ConfigError, match="tells 3 classes apart.*wide.safetensors 5"):
        evaluate_run(
            tmp_path / "wide.safetensors", f"imagefolder:{base / 'data'}", target="cpu",
            model=f"{base / 'wide.py'}:net", ensemble=[base / "run0"], trusted=[model_of(base)],
        )  # fmt: skip


def test_prediction_agrees_with_the_training_of_a_few_batches(runs, tmp_path, no_pictures):
    """`overfit_batches` trains on a set of its own: it is normalised as the whole one is."""
    base, _ = runs
    settings = RunConfig(
        f"{base / 'net.py'}:net", f"imagefolder:{base / 'data'}", epochs=4, batch=12, lr=0.05,
        target="cpu", workers=0, resize=20, overfit_batches=2,
    )  # fmt: skip
    out = tmp_path / "run"
    run_training(settings, out, quiet=True)
    data = load(settings.data, "train", shape=(3, 16, 16), resize=20)
    net = evaluation.load_trained(out, settings.model).net
    program = gn.compile(net, (72, 3, 16, 16), target="cpu")
    ((x, _),) = Batches(data, 72, shuffle=False)
    want = torch.softmax(program(x), 1)
    files = [f.path for f in data.files]
    rows = predict(out, files, model=settings.model, target="cpu", top=3)
    got = torch.tensor([[c["p"] for c in sorted(r["classes"], key=lambda c: c["index"])]
                        for r in rows])  # fmt: skip
    assert torch.allclose(got, want, atol=1e-4) and rows[0]["classes"][0]["name"] in COLOURS


def test_a_run_without_its_data_json_predicts_nothing(runs, tmp_path):
    base, _ = runs
    shutil.copytree(base / "run0", tmp_path / "run")
    for text in (None, "{", '{"mean": [0.5]}'):
        (tmp_path / "run/data.json").unlink()
        if text is not None:
            (tmp_path / "run/data.json").write_text(text)
        with pytest.raises(CheckpointError, match="data.json, by which images are normalised"):
            predict(tmp_path / "run", [], model=model_of(base), target="cpu")
        (tmp_path / "run/data.json").touch()


def test_a_run_is_not_taken_up_again_on_other_classes(runs, tmp_path, no_pictures):
    base, _ = runs
    shutil.copytree(base / "data", tmp_path / "data")
    settings = RunConfig(
        f"{base / 'net.py'}:net", f"imagefolder:{tmp_path / 'data'}", epochs=1, batch=12, lr=0.05,
        target="cpu", workers=0,
    )  # fmt: skip
    out = tmp_path / "run"
    run_training(settings, out, quiet=True)
    text = (out / "config.toml").read_text()
    (out / "config.toml").write_text(text.replace("epochs = 1", "epochs = 2"))
    more = replace(settings, epochs=2)
    for split in ("train", "test"):  # as many, but what was 0 is 2
        (tmp_path / "data" / split / "blue").rename(tmp_path / "data" / split / "violet")
    with pytest.raises(DataError, match="class 0 is 'green' there, 'blue' here"):
        run_training(more, out, resume=True, quiet=True)
    for split in ("train", "test"):
        (tmp_path / "data" / split / "violet").rename(tmp_path / "data" / split / "blue")
    (out / "data.json").unlink()  # killed before it had one
    assert run_training(more, out, resume=True, quiet=True)["epochs"] == 2
    assert json.loads((out / "data.json").read_text())["classes"] == list(COLOURS)


def test_an_evaluation_says_what_it_left_out_and_keeps_nothing_uncached(runs, tmp_path, capsys):
    base, _ = runs
    shutil.copytree(base / "data", tmp_path / "data")
    shutil.copytree(base / "run0", tmp_path / "run")
    config_file = tmp_path / "run/config.toml"
    text = config_file.read_text().replace("uncached = false", "uncached = true")
    config_file.write_text(text.replace("max_bad = 0.001", "max_bad = 0.1"))
    (tmp_path / "data/test/red/03.png").write_bytes(b"junk")
    with config.override(CACHE_DIR=str(tmp_path / "cache")), pytest.raises(SystemExit) as end:
        main(["eval", str(tmp_path / "run"), "--data", f"imagefolder:{tmp_path / 'data'}",
              "--model", model_of(base)])  # fmt: skip
    said = capsys.readouterr()
    assert end.value.code == 0 and "23 images" in said.out
    assert "1 image files left out, the first:" in said.err and "red/03.png: not an" in said.err
    assert not (tmp_path / "cache/images").exists()


def test_names_of_classes_are_no_formulas(tmp_path):
    names = ["cost_$5_$10", "a^b_{$x$", "\N{CJK UNIFIED IDEOGRAPH-732B}", "b\udcff\nx"]
    rows = [(0.9, torch.rand(3, 4, 4), 0, 1), (0.8, torch.rand(1, 4, 4), 2, 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.misclassified(tmp_path / "m.png", rows, names)
        plots.confusion(tmp_path / "c.png", torch.eye(4, dtype=torch.int64), names)
        plots.curves(tmp_path / "l.png", [{"epoch": 1, "train_loss": 1.0}], "on $x_$^/data")
    assert len(list(tmp_path.iterdir())) == 3
