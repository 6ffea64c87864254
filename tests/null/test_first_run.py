"""A first run: what it asks for, where it goes, and which nets fit which data."""

import re
import tomllib
from dataclasses import replace

import pytest
import torch

from graphnet.errors import ConfigError, DataError
from graphnet.frontends.loading import load_model
from graphnet.train import building, run
from graphnet.train.data import ClassesWarning
from graphnet.train.evaluation import evaluate_run, load_trained, predict
from graphnet.train.run import RunConfig, run_training
from tests.image_files import make

NET = """
import graphnet as gn

def net(num_classes=10):
    made = gn.Sequential(gn.Conv2d(3, 4, 5, stride=4), gn.Flatten(), gn.Linear(100, num_classes))
    made.input_shape = (3, 24, 24)
    return made

fixed = net(3)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a net in a file, and two classes of images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.py").write_text(NET)
    make(tmp_path / "d", 6)
    return RunConfig("m.py:net", "imagefolder:d", epochs=1, batch=4, target="cpu", uncached=True)


def test_outputs_are_the_classes_of_the_data(here, tmp_path):
    with pytest.raises(DataError) as caught:
        run_training(here, tmp_path / "r", quiet=True)
    assert str(caught.value).startswith("layer 'fc1', net.2 (m.py:")
    assert "has 2 classes, the net has 10 outputs" in str(caught.value)
    assert "make it 2 in the last layer of m.py:net" in str(caught.value)
    assert not (tmp_path / "r").exists()
    result = run_training(replace(here, classes=2), tmp_path / "r", quiet=True)
    trained = load_trained(tmp_path / "r", "m.py:net").net.state_dict()
    assert result["epochs"] == 1 and len(trained["2.bias"]) == 2
    with pytest.raises(ConfigError, match="m.py:fixed takes no number of classes, and --classes"):
        load_model("m.py:fixed", 2)


def test_a_named_model_takes_a_number_of_classes(cli, tmp_path):
    code, _, err = cli("train", "lenet5", "--data", "digits", "--classes", 12, "--dry-run")
    assert code == 2 and "layer 'fc3', net.11 (lenet.py:" in err
    assert "digits has 10 classes, the net has 12 outputs; help: --classes 10" in err
    assert len(load_model("lenet5", 12).state_dict()["11.bias"]) == 12
    # A file of tensors that lies in no run says itself how many.
    from safetensors.torch import save_file

    save_file(load_model("lenet5", 12).state_dict(), tmp_path / "t.safetensors")
    assert len(load_trained(tmp_path / "t.safetensors", "lenet5").net.state_dict()["11.bias"]) == 12


def test_an_old_run_with_more_outputs_only_warns(here, tmp_path, monkeypatch):
    with monkeypatch.context() as old:
        old.setattr(run, "check_outputs", lambda *given, **named: None)
        run_training(here, tmp_path / "r", quiet=True)
        config = tmp_path / "r/config.toml"
        config.write_text(config.read_text().replace("epochs = 1", "epochs = 2"))
    with pytest.warns(ClassesWarning, match="has 2 classes, the net has 10 outputs"):
        result = run_training(here, tmp_path / "r", resume=True, quiet=True, given={"model"})
    assert result["epochs"] == 2
    with pytest.warns(ClassesWarning, match="those from 2 on stand for nothing"):
        assert evaluate_run(tmp_path / "r", model="m.py:net", target="cpu")["images"] > 0
    image = next((tmp_path / "d/test").rglob("*.png"))
    with pytest.warns(ClassesWarning, match="10 outputs for 2 classes"):
        (row,) = predict(tmp_path / "r", [image], model="m.py:net", target="cpu")
    assert {c["name"] for c in row["classes"]} == {"cat", "dog"}


def test_what_is_missing_is_listed_and_a_run_finds_a_place(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = cli("train", "lenet5")
    assert code == 2 and "--data mnist:DIR, cifar10:PATH, digits, synthetic or imagefold" in err
    code, _, err = cli("train")
    assert code == 2 and "alexnet, alexnet_2012" in err and "FILE.py:ATTRIBUTE" in err
    assert not list(tmp_path.iterdir())
    code, out, err = cli("train", "lenet5", "--data", "digits", "--epochs", 1, "--batch", 2000)
    (made,) = (tmp_path / "runs").iterdir()
    assert code == 0 and re.fullmatch(r"lenet5-\d{8}-\d{6}", made.name)
    assert f"the run folder is runs/{made.name}" in err and f"runs/{made.name}: 1 epochs" in out
    assert "a batch of 2,000 is more than the 1,438 training images: each epoch is one step" in err
    assert run.default_folder("some/own.py:net").name.startswith("own-net-")


def test_threads_follow_from_the_work_and_stay_with_the_run(tmp_path, monkeypatch):
    of = building.threads_for
    assert [of(f, 8) for f in (0, 73e6, 199e6, 293e6, 1e12)] == [1, 1, 1, 2, 8]
    assert of(1e12, 1) == 1
    seen = []
    fit = run.Trainer.fit
    monkeypatch.setattr(run, "processors", lambda: 2)
    monkeypatch.setattr(
        run.Trainer, "fit", lambda *a: (seen.append(torch.get_num_threads()), fit(*a))[1]
    )
    before = torch.get_num_threads()
    settings = RunConfig(
        "lenet5", "digits", epochs=1, batch=256, target="cpu", overfit_batches=1
    )
    run_training(settings, tmp_path / "r", quiet=True)
    config = tmp_path / "r/config.toml"
    assert tomllib.loads(config.read_text())["threads"] == 2 == seen[-1]
    assert torch.get_num_threads() == before
    monkeypatch.setattr(run, "processors", lambda: 1)  # taken up again on another machine
    config.write_text(config.read_text().replace("epochs = 1", "epochs = 2"))
    run_training(settings, tmp_path / "r", resume=True, quiet=True, given=set())
    assert seen == [2, 2] and torch.get_num_threads() == before
