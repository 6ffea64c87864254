"""Augmentation in the step, in the trainer, by name, and what it knows of the data."""

import json
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image

import graphnet as gn
from graphnet import cli, config
from graphnet.errors import ConfigError, DTypeError, ShapeError
from graphnet.ir.op import get_op
from graphnet.ops.augment import pose, words
from graphnet.train import augment, checkpoint
from graphnet.train.callbacks import Checkpoints, restore
from graphnet.train.data import Dataset
from graphnet.train.run import RunConfig, _build, dry_run, run_training
from graphnet.train.trainer import Callback
from tests.cases_augment import COMPONENTS, words_of
from tests.image_files import make

WARP = gn.Augment(rotate=20, scale=(0.8, 1.2), translate=0.1, flip=0.5)


def data(n=40, channels=1):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, channels, 8, 8), generator=g).to(torch.uint8)
    return Dataset(images, torch.randint(0, 10, (n,), generator=g), mean=(0.5,), std=(0.25,))


def net():
    torch.manual_seed(3)
    return gn.Sequential(
        gn.Conv2d(1, 4, 3), gn.ReLU(), gn.MaxPool2d(2), gn.Flatten(), gn.Linear(36, 10)
    )


def compiled(a, target="cpu", batch=8, **how):
    made = net()
    step = gn.compile(
        made, (batch, 1, 8, 8), target=target, seed=11, loss=gn.CrossEntropyLoss(),
        optimizer=gn.SGD(lr=0.1, momentum=0.9), augment=a, **how,
    )  # fmt: skip
    return made, step


def seen(a, images, index, epoch, seed):
    """What the net reads, by the oracle."""
    a = a.sized((len(images), 1, 8, 8))
    scalars = (torch.tensor(epoch), torch.tensor(seed))
    return get_op("augment").reference(a, images, index, *scalars)[0].float()


def test_a_step_learns_from_what_was_drawn():
    d, index = data(), torch.tensor([30, 2, 7, 9, 11, 0, 1, 39])
    a = augment.known(WARP, d)
    made, step = compiled(a)
    plain_net, plain = compiled(None)
    for epoch in (0, 4):
        loss = step(d.images[index], d.labels[index], index, epoch)
        want = plain(seen(a, d.images[index], index, epoch, 11), d.labels[index])
        assert float(loss) == pytest.approx(float(want), rel=1e-5)
    for key, p in made.state_dict().items():
        torch.testing.assert_close(p, plain_net.state_dict()[key], rtol=1e-4, atol=1e-6)


def test_a_draw_belongs_to_its_image_not_to_its_batch():
    d = data()
    whole = augment.drawn(WARP, d, range(40), 2, 5)
    part = augment.drawn(WARP, d, [33, 4], 2, 5)
    assert torch.equal(part, whole[[33, 4]])
    for other in (augment.drawn(WARP, d, [33, 4], 3, 5), augment.drawn(WARP, d, [33, 4], 2, 6)):
        assert not torch.equal(part, other)


def test_the_words_are_philox_by_seed_epoch_and_place():
    for index, epoch, seed in ((0, 0, 0), (2**33 + 7, 3, -5), (59_999, 19, 2**63 - 1)):
        assert words(WARP, [index], epoch, seed)[0].tolist() == words_of(WARP, index, epoch, seed)


def test_draws_fill_their_ranges():
    a = gn.Augment(
        flip=0.3, crop=True, pad=2, scale=(0.5, 2.0), rotate=30, contrast=0.5, brightness=0.2,
        pca=1.0, components=COMPONENTS, stored=(3, 8, 8), size=(8, 8),
    )  # fmt: skip
    p = pose(a, range(4000), 0, 1)
    assert 0.27 < (p.side < 0).mean() < 0.33
    determinant = p.matrix[:, 0, 0] * p.matrix[:, 1, 1] - p.matrix[:, 0, 1] * p.matrix[:, 1, 0]
    zoom = 1 / determinant**0.5
    assert 0.5 <= zoom.min() < 0.51 and 1.95 < zoom.max() < 2.0
    assert abs((zoom < 1).mean() - 0.5) < 0.03  # as often smaller as larger
    assert set(p.at.flatten()) == {2.0, 3.0, 4.0, 5.0, 6.0}  # every whole place, no other
    assert 0.5 <= p.gain.min() < 0.52 and 1.48 < p.gain.max() < 1.5
    drift = p.offset - p.offset.mean(0)
    want = torch.tensor(COMPONENTS).reshape(3, 3).double()
    want = want @ want.T + 0.2**2 / 3  # the components, and one brightness for all channels
    torch.testing.assert_close(torch.tensor(drift.T @ drift / 4000), want, rtol=0.1, atol=0.006)


def test_uneven_batches_accumulate_and_bound_data_draw_alike():
    d = data(20)
    a = augment.known(WARP, d)
    _, step = compiled(a)
    losses = step.bind(d.images, d.labels, shuffle=False).run(6)  # 8, 8, 4, and again
    _, other = compiled(a)
    for k, rows in enumerate(torch.arange(20).split(8) * 2):
        loss = other(d.images[rows], d.labels[rows], rows, k // 3)
        assert float(loss) == float(losses[k])
    _, summed = compiled(a, accumulate=2)
    _, large = compiled(a, batch=16)
    for epoch in (0, 1):
        parts = [summed(d.images[r], d.labels[r], r, epoch) for r in torch.arange(16).split(8)]
        whole = large(d.images[:16], d.labels[:16], torch.arange(16), epoch)
        assert float(sum(parts) / 2) == pytest.approx(float(whole), rel=1e-5)


def test_without_an_index_no_place_comes_twice():
    d = data(8)
    _, step = compiled(augment.known(WARP, d))
    step.optimizer.lr = 0.0
    assert len({float(step(d.images, d.labels)) for _ in range(3)}) == 3


def trainer(*callbacks):
    return gn.Trainer(
        net(), gn.CrossEntropyLoss(), gn.SGD(lr=0.05, momentum=0.9), callbacks=callbacks,
        target="cpu", seed=5, augment=WARP,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole():
    made = trainer()
    made.fit(data(), data(), epochs=2, batch=8)
    return made


@pytest.mark.parametrize("stop", [3, 7])
def test_a_stopped_run_with_augmentation_goes_on_bit_for_bit(stop, whole, tmp_path):
    class StopAt(Callback):
        def on_step(self, trainer, loss):
            trainer.stop = trainer.step == stop

    first = trainer(Checkpoints(tmp_path), StopAt())
    first.fit(data(), data(), epochs=2, batch=8)
    assert first.step == stop
    second = trainer()
    second.augment = augment.known(WARP, data())
    second.compile((8, 1, 8, 8))
    restore(second, checkpoint.load_latest(tmp_path))
    again = second.fit(data(), data(), epochs=2, batch=8)
    assert again[-1]["val_loss"] == whole.history[-1]["val_loss"]
    for key, p in whole.net.state_dict().items():
        assert torch.equal(second.net.state_dict()[key], p), key


def test_the_evaluation_sees_images_as_they_are():
    d = data()
    trainer = gn.Trainer(
        net(), gn.CrossEntropyLoss(), gn.SGD(lr=0.0), target="cpu", augment=WARP
    )  # fmt: skip
    trainer.fit(d, d, epochs=1, batch=8)
    assert trainer.augment.stored == (1, 8, 8) and trainer.augment.mean == (0.5,)
    logits = gn.compile(trainer.net, (40, 1, 8, 8), target="cpu")(d.normalised(d.images))
    want = torch.nn.functional.cross_entropy(logits, d.labels)
    assert trainer.history[0]["val_loss"] == pytest.approx(float(want), rel=1e-5)
    assert trainer.history[0]["train_loss"] != pytest.approx(float(want), rel=1e-3)


def test_images_that_are_stored_larger_are_cut():
    a = gn.Augment(crop=True, stored=(1, 10, 12))
    _, step = compiled(a)
    x, y = torch.zeros(8, 1, 10, 12, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64)
    assert math.isfinite(float(step(x, y)))
    with pytest.raises(ShapeError, match="compiled for"):
        step(x[..., :8], y)
    with pytest.raises(DTypeError, match="images as they are stored"):
        step(x.float(), y)
    with pytest.raises(ShapeError, match="index"):
        step(x, y, torch.arange(4))


# ---- what it knows of the data ---------------------------------------------------------------


def test_principal_components_are_those_of_the_pixels():
    d = data(30, channels=3)
    mixed = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.2, 0.2, 0.6]])
    images = torch.einsum("dc,nchw->ndhw", mixed, d.images.float()).round().to(torch.uint8)
    d = Dataset(images, d.labels)
    found = torch.tensor(augment.principal(d)).double().reshape(3, 3)
    pixels = (images.double() / 255).transpose(0, 1).reshape(3, -1)
    torch.testing.assert_close(found @ found.T, pixels.cov(correction=0), rtol=1e-5, atol=1e-8)
    gram = found.T @ found  # orthogonal, the longest first
    torch.testing.assert_close(gram, gram.diag().diag(), rtol=0, atol=1e-8)
    assert gram[0, 0] > gram[1, 1] > gram[2, 2] and all(c.abs().max() == c.max() for c in found.T)


def test_a_run_folder_gives_back_the_same_augmentation(tmp_path):
    d = data(30, channels=3)
    a = augment.known(augment.parse("photos"), d)
    augment.save(tmp_path, a)
    assert augment.stored(tmp_path) == a and augment.known(a, None) is a


# ---- by name ---------------------------------------------------------------------------------


def test_names_and_values_are_read():
    assert augment.parse("flip,crop,pad=4") == augment.parse("cifar")
    assert augment.parse("digits,rotate=5").rotate == 5.0
    assert augment.parse("digits,rotate=5").shear == augment.PRESETS["digits"]["shear"]
    assert augment.parse("scale=0.5:2,border=edge") == gn.Augment(scale=(0.5, 2.0), border="edge")


@pytest.mark.parametrize("text, words", [
    ("flop", "unknown augmentation 'flop'.*a preset"), ("rotate", "unknown augmentation"),
    ("rotate=much", "takes a number"), ("scale=2", "least, most"), ("pad=2", "crop=True"),
    ("crop=maybe", "true or false"), ("flip=1.5", "above 1"), ("rotate=nan", "finite"),
    ("stretch=0.5", "below 1"), ("border=wrap", "one of"), ("", "unknown augmentation"),
    ("mean=0.5", "unknown augmentation"), ("flip,digits", "unknown augmentation"),
])  # fmt: skip
def test_what_is_no_augmentation_is_refused(text, words):
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        augment.parse(text)


def test_where_it_has_no_place_it_is_refused():
    shape, loss, sgd = (8, 1, 8, 8), gn.CrossEntropyLoss(), gn.SGD(lr=0.1)
    for how, why in (
        ({"augment": WARP, "loss": loss}, "training steps"),
        ({"augment": "flip", "loss": loss, "optimizer": sgd}, "no augmentation"),
        ({"augment": gn.Augment(pca=0.1), "loss": loss, "optimizer": sgd}, "components"),
    ):
        with pytest.raises(ConfigError, match=why):
            gn.compile(net(), shape, target="cpu", **how)
    with pytest.raises(ShapeError, match="6 pixels high.*takes 8"):
        compiled(gn.Augment(stored=(1, 6, 8)))
    _, step = compiled(None)
    with pytest.raises(ConfigError, match="augment="):
        step(torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64), torch.arange(8))


# ---- from the command line -------------------------------------------------------------------


def test_a_run_keeps_what_it_drew_by(tmp_path, monkeypatch):
    monkeypatch.setattr("graphnet.train.run._pictures", lambda *parts: None)  # test_run's business
    settings = RunConfig(
        "lenet5", "digits", epochs=1, batch=256, target="cpu", lr=0.05, augment="digits,pca=0.1"
    )
    out = tmp_path / "a"
    run_training(settings, out, quiet=True)
    a = augment.stored(out)
    assert a.rotate == 10.0 and a.pca == 0.1 and len(a.components) == 1 and a.components[0] > 0
    drawn = dry_run(settings)  # on whole bytes: the run's step takes nothing else
    assert math.isfinite(drawn["loss"]) and drawn["loss"] != drawn["test_loss"]
    # The run's own components, not those of the data as they are now.
    altered = {**json.loads((out / augment.FILE).read_text()), "components": [0.5]}
    (out / augment.FILE).write_text(json.dumps(altered))
    assert _build(settings, out).trainer.augment.components == (0.5,)
    (out / augment.FILE).unlink()  # killed between the folder and this file
    assert _build(settings, out).trainer.augment == a
    with pytest.raises(ConfigError, match="unknown augmentation"):
        run_training(
            RunConfig(**settings.__dict__ | {"augment": "warp"}), tmp_path / "c", quiet=True
        )  # fmt: skip
    assert not (tmp_path / "c").exists()


def test_the_preview_shows_each_draw(tmp_path, capsys):
    path = tmp_path / "sheet.png"
    asked = ["augment", "--data", "digits", "--augment", "digits", "--images", "2", "--draws", "3"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*asked, "--preview", "--out", str(path), "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["draws"] == 3
    with Image.open(path) as picture:
        grey = np.asarray(picture.convert("L"))
    assert 0.2 < (grey < 60).mean() < 0.95  # digits on black, not an empty page
    with pytest.raises(SystemExit) as ended:
        cli.main([*asked[:3], "--augment", "flop", "--out", str(path)])
    assert ended.value.code == 2 and "unknown augmentation 'flop'" in capsys.readouterr().err


def test_the_preview_leaves_out_what_is_no_image_and_says_what_is_idle(tmp_path, capsys):
    make(tmp_path, splits=("train",))
    (tmp_path / "train/cat/000.png").write_bytes(b"junk")

    def preview(*more):
        argv = ["augment", "--data", f"imagefolder:{tmp_path}", "--augment", "photos", "--draws"]
        with (
            config.override(CACHE_DIR=str(tmp_path / "cache")), pytest.raises(SystemExit) as ended
        ):  # fmt: skip
            cli.main([*argv, "2", "--size", "16", "--out", str(tmp_path / "s.png"), *more])
        return ended.value.code, *capsys.readouterr()

    code, out, err = preview("--images", "64")
    assert code == 0 and "11 images" in out and "the crop has no room, images of 16x16" in err
    code, out, err = preview("--images", "2", "--out", str(tmp_path / "s.mp3"))
    assert code == 2 and "no picture ends in .mp3" in err
    code, out, err = preview("--resize", "20", "--images", "3")
    assert code == 0 and "2 images" in out and not err  # the first, of three, is no image
    for path in (tmp_path / "train").glob("*/*.png"):
        path.write_bytes(b"")
    code, out, err = preview()
    assert code == 2 and "none is an image" in err and err.count("\n") == 1


@pytest.mark.data
@pytest.mark.slow
def test_distortions_help_on_mnist(tmp_path):
    """LeCun et al. 1998: 0.95 % without distortions, 0.8 % with them."""
    means = {}
    for what in ("digits", ""):
        errors = []
        for seed in range(3):
            settings = RunConfig(
                "lenet5", f"mnist:{os.environ['GRAPHNET_DATA']}/mnist", epochs=20, target="cpu",
                lr=0.05, seed=seed, augment=what,
            )  # fmt: skip
            out = tmp_path / f"{what or 'plain'}-{seed}"
            errors.append(run_training(settings, out, quiet=True)["top1_error"])
        means[what] = sum(errors) / 3
    assert means["digits"] <= 0.60 and means[""] - means["digits"] >= 0.10, means
