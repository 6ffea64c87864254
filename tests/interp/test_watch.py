"""What GRAPHNET_CHECK, GRAPHNET_DEBUG and GRAPHNET_DUMP show, and that the check can fail."""

import pytest
import torch

import graphnet as gn
from graphnet import config
from graphnet.errors import ConfigError, NumericsError
from graphnet.ops.activation import Relu
from graphnet.ops.update import SGDUpdate


def step(target="interpret", precision="fp32"):
    torch.manual_seed(0)
    net = gn.Sequential(
        gn.Conv2d(2, 4, 3, padding=1), gn.ReLU(), gn.MaxPool2d(2), gn.Flatten(), gn.Linear(36, 5)
    )
    return gn.compile(
        net, (4, 2, 6, 6), target=target, precision=precision, loss=gn.CrossEntropyLoss(),
        optimizer=gn.SGD(lr=0.05, momentum=0.9, weight_decay=0.1),
    )  # fmt: skip


def batch():
    g = torch.Generator().manual_seed(1)
    return torch.randn(4, 2, 6, 6, generator=g), torch.randint(0, 5, (4,), generator=g)


@pytest.mark.parametrize(
    "target, precision", [("interpret", "fp32"), ("interpret", "bf16"), ("cpu", "fp32")]
)
def test_a_right_step_passes_the_check(target, precision):
    with config.override(CHECK="1"):
        checked = step(target, precision)
        losses = [float(checked(*batch())) for _ in range(3)]
    plain = step(target, precision)
    assert losses == [float(plain(*batch())) for _ in range(3)]


def test_a_wrong_epilogue_is_named(monkeypatch):
    monkeypatch.setattr(Relu, "emit", lambda self, expr, attrs, ctx: [f"({expr[0]} * 1.001)"])
    with config.override(CHECK="1"):
        wrong = step()
        with pytest.raises(NumericsError, match=r"layer 'conv1, relu1.*differs from its ref"):
            wrong(*batch())


def test_a_dropped_weight_decay_is_found_in_the_change_of_a_parameter(monkeypatch):
    right = SGDUpdate.emit

    def emit(self, expr, attrs, ctx):
        return right(self, [*expr[:-1], "0.0"], attrs, ctx)

    monkeypatch.setattr(SGDUpdate, "emit", emit)
    with config.override(CHECK="1"):
        wrong = step()
        with pytest.raises(NumericsError, match="linear_wgrad|split_reduce|conv2d_wgrad"):
            wrong(*batch())


def test_a_wrong_cpu_step_is_found(monkeypatch):
    with config.override(CHECK="1"):
        wrong = step("cpu")
        monkeypatch.setattr(
            SGDUpdate, "reference", lambda self, attrs, *args: (args[0], args[2] + 1)
        )
        with pytest.raises(NumericsError, match="the step's .* differs from its reference"):
            wrong(*batch())


@pytest.mark.parametrize("target", ["interpret", "cpu"])
def test_a_line_for_each_launch(target, capsys):
    with config.override(DEBUG="2"):
        timed = step(target)
        capsys.readouterr()
        timed(*batch())
    lines = capsys.readouterr().err.splitlines()
    assert any("conv1, relu1" in line and "GFLOP/s" in line for line in lines)
    if target == "interpret":
        assert len(lines) == len(timed.plan.steps)


def test_passes_hits_and_refusals(capsys):
    with config.override(DEBUG="1"):
        step()
    one = capsys.readouterr().err
    assert "pass  1 autodiff: 6 -> " in one and "relu(conv2d(...)) => fused" not in one
    with config.override(DEBUG="3"):
        step()
    assert "1 x relu(conv2d(...)) => fused" in capsys.readouterr().err
    with config.override(DEBUG="4"):
        step()
    assert "graph sequential.traced(" in capsys.readouterr().err


def test_a_dump_holds_graphs_differences_plan_and_code(tmp_path):
    with config.override(DUMP=str(tmp_path / "d")):
        made = step()
    names = {p.name.removeprefix("sequential-") for p in (tmp_path / "d").iterdir()}
    assert {"00-traced.txt", "00-traced.dot", "01-autodiff.diff", "plan.txt"} <= names
    assert (tmp_path / "d/sequential-plan.txt").read_text() == str(made.plan)
    generated = {p.name for p in (tmp_path / "d/generated").iterdir()}
    assert {f"{s.name}.py" for launch in made.plan.launches for s in launch.generated} == generated
    (tmp_path / "file").write_text("")
    with config.override(DUMP=str(tmp_path / "file")), pytest.raises(ConfigError, match="DUMP"):
        step()
