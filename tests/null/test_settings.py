"""Settings of a run: options, files, what they build, and what is refused."""

import json
import os

import pytest
import torch

import graphnet as gn
from graphnet.cli import main
from graphnet.errors import ConfigError
from graphnet.train import building, settings
from graphnet.train.run import RunConfig, dry_run, run_training
from graphnet.train.schedule import Plateau

BASE = {"model": "lenet5", "data": "digits"}


def config(**values):
    return RunConfig(**BASE | values)


def run(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        main(list(argv))
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


@pytest.mark.parametrize(
    "values, says",
    [
        ({"lr": float("nan")}, "lr=nan is not a finite number"),
        ({"weight_decay": 1e39}, "weight_decay=1e+39 is not a finite number in fp32"),
        ({"seed": 2**64}, "has more than 64 bits"),
        ({"optimizer": "sdg"}, "unknown optimizer 'sdg'\n  help: one of sgd, adam, adamw"),
        ({"schedule": "zigzag"}, "one of constant, cosine, step"),
        ({"loss": "l2"}, "one of cross_entropy, hinge"),
        ({"init": "orthogonal"}, "one of torch, gaussian, he, xavier"),
        ({"nonfinite": "pray"}, "one of stop, skip"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0 is not at least 0"),
        ({"max_bad": 2.0}, "max_bad=2.0 is not from 0.0 to 1.0"),
        ({"epochs": 0}, "epochs=0 is not at least 1"),
    ],
)
def test_what_is_wrong_is_named(values, says):
    with pytest.raises(ConfigError) as error:
        config(**values)
    assert says in str(error.value)


def test_every_setting_has_its_option_and_its_help(capsys):
    code, text, _ = run(capsys, "train", "--help")
    assert code == 0
    for f in settings.settings():
        assert f.metadata["help"], f.name
        if f.name != "model":
            assert f"--{f.name.replace('_', '-')}" in text, f.name


def test_a_file_gives_settings_and_options_win(tmp_path, capsys):
    file = tmp_path / "c.toml"
    file.write_text('model = "lenet5"\ndata = "digits"\nlr = 1\nbatch = 64\ntarget = "cpu"\n')
    assert settings.read_config_file(file)["lr"] == 1.0
    code, text, err = run(
        capsys, "train", "--config", str(file), "--dry-run", "--json", "--lr", "0.02",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(text)
    assert found["batches"] == 23 and found["images"] == 1438 and found["step_s"] > 0
    for text, says in (
        ("lr = 'x'", "lr = 'x' is no float"), ("rate = 1", "unknown setting 'rate'"),
        ("a = = 1", "is no TOML"), ("nesterov = 1", "nesterov = 1 is no bool"),
    ):  # fmt: skip
        file.write_text(text)
        code, _, err = run(capsys, "train", "--config", str(file), "--out", str(tmp_path / "x"))
        assert code == 2 and says in err and err.count("\n") == 1, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.toml"]


def test_usage_errors_are_one_line(tmp_path, capsys):
    out = str(tmp_path / "x")
    for argv, says in (
        (["train"], "no model is given"),
        (["train", "lenet5", "--out", out], "no data is given"),
        (["train", "--resume"], "which run goes on? --out RUN"),
        (["train", "lenet5", "--data", "digits", "--out", out, "--epochs", "0"], "epochs"),
        (["train", "lenet5", "--data", "digits", "--out", out, "--lr", "nan"], "lr=nan"),
        (["train", "lenet5", "--data", "digits", "--out", out, "--freeze", "conv9"], "conv9"),
        (["train", "lenet5", "--data", "digits", "--out", out, "--warmup", "9"], "warmup=9"),
    ):
        code, _, err = run(capsys, *argv)
        assert code == 2 and says in err and err.count("\n") == 1, (argv, err)
    assert not list(tmp_path.iterdir())


def test_what_the_settings_build():
    sgd = building.make_optimizer(config(l1=1e-4, form="classic", nesterov=True))
    assert (sgd.l1, sgd.form, sgd.nesterov) == (1e-4, "classic", True)
    adamw = building.make_optimizer(config(optimizer="adamw", amsgrad=True))
    assert isinstance(adamw, gn.AdamW) and adamw.amsgrad
    for wrong in (
        {"amsgrad": True}, {"optimizer": "adam", "nesterov": True},
        {"optimizer": "adamw", "form": "classic"}, {"optimizer": "adam", "momentum": 0.5},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="belongs to"):
            building.make_optimizer(config(**wrong))
    assert isinstance(building.make_loss(config(loss="hinge")), gn.MulticlassHingeLoss)
    assert building.make_loss(config(label_smoothing=0.1)).label_smoothing == 0.1
    with pytest.raises(ConfigError, match="belongs to cross_entropy"):
        building.make_loss(config(loss="hinge", label_smoothing=0.1))
    rate = building.make_schedule(config(schedule="plateau", warmup=1.0, lr=0.5), 10)
    assert isinstance(rate, Plateau) and rate(0) < rate(9) <= rate(10) == 0.5
    cosine = building.make_schedule(config(warmup=1.0, epochs=3, lr=0.5), 10)
    assert cosine(0) < cosine(8) and cosine(29) < 0.05
    # One warm-up is enough: cosine has none of its own behind another.
    cosine = building.make_schedule(config(warmup=1.0, epochs=3, lr=0.5), 100)
    assert cosine(0) == 0.05 and cosine(99) == pytest.approx(0.5, rel=0.02) and cosine(100) == 0.5
    with pytest.raises(ConfigError, match="accumulate=31 batches make an update.* has 30"):
        building.make_schedule(config(accumulate=31, epochs=3), 10)


def test_the_names_are_those_of_what_is_built():
    assert settings.INITS == gn.init.NAMES


def test_prepare_sets_values_multipliers_and_what_is_frozen():
    net = building.prepare(
        gn.models.lenet5(), config(init="gaussian", bias_lr=2.0, bias_decay=0.0, freeze="conv*,fc3")
    )
    for key, p in net.named_parameters():
        bias = key.endswith("bias")
        assert (p.lr_mult, p.decay_mult) == ((2.0, 0.0) if bias else (1.0, 1.0))
        if not bias:
            assert 0.005 < float(p.data.std()) < 0.02, key
    trained = [k for k, p in net.named_parameters() if p.trainable]
    assert trained == ["7.weight", "7.bias", "9.weight", "9.bias"]
    step = gn.compile(
        net, (2, 1, 28, 28), target="cpu", loss=gn.CrossEntropyLoss(), optimizer=gn.SGD(0.1)
    )
    assert "conv2d_wgrad" not in str(step.graph("joint"))


def test_workers_are_the_processors_unless_a_number_is_given(tmp_path):
    assert config().workers == "auto"
    assert building.workers_of(config()) == len(os.sched_getaffinity(0))
    assert building.workers_of(config(workers=3)) == building.workers_of(config(workers="3")) == 3
    (tmp_path / "c.toml").write_text("workers = 2")  # of an older version
    assert settings.read_config_file(tmp_path / "c.toml") == {"workers": "2"}
    for wrong in ("-1", -1, "two", ""):
        with pytest.raises(gn.ConfigError, match="workers"):
            config(workers=wrong)


def test_a_net_fits_a_few_batches_by_heart(tmp_path):
    found = run_training(
        config(overfit_batches=2, epochs=30, batch=16, lr=0.05, target="cpu", workers=0),
        tmp_path / "r", quiet=True,
    )  # fmt: skip
    assert found["steps"] == 60 and found["top1_error"] == 0.0 and found["train_loss"] < 0.1


def test_a_dry_run_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = dry_run(config(target="cpu", batch=32, lr=0.05))
    assert found["next_loss"] < found["loss"] and found["launches"] == 0
    assert not list(tmp_path.iterdir())
