"""The benchmark harness: twins, interleaved rounds, parity before speed, failures as rows."""

import json
import time

import pytest
import torch

import graphnet as gn
from graphnet.bench import bench, parity, peers
from graphnet.bench.rounds import Quartiles, Timing, measure, ratio
from graphnet.bench.twin import torch_twin
from graphnet.cli import main
from graphnet.errors import ConfigError, NumericsError, UnsupportedOpError

QUICK = ["--batch", "4", "--target", "cpu", "--rounds", "2", "--seconds", "0.2", "--parity", "5"]


def every_layer():
    return gn.Sequential(
        gn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1), gn.ReLU(), gn.MaxPool2d(3, 2),
        gn.Conv2d(8, 8, 3, padding="same", groups=2, bias=False), gn.Tanh(), gn.AvgPool2d(2),
        gn.Sigmoid(), gn.AdaptiveAvgPool2d(2), gn.Flatten(),
        gn.Sequential(gn.Linear(32, 16), gn.Dropout(0.5, mode="vanilla")), gn.Linear(16, 5),
    )  # fmt: skip


def test_the_twin_computes_the_same_under_the_same_keys():
    net = every_layer()
    twin = torch_twin(net).eval()
    assert list(twin.state_dict()) == list(net.state_dict())
    x = torch.randn(2, 3, 21, 21)
    infer = gn.compile(net, (2, 3, 21, 21), target="cpu")
    torch.testing.assert_close(infer(x), twin(x), rtol=1e-5, atol=1e-6)


def test_a_module_of_ones_own_has_no_twin():
    class Own(gn.Module):
        def forward(self, x):
            return gn.relu(x)

    with pytest.raises(UnsupportedOpError, match="no torch twin for Own"):
        torch_twin(gn.Sequential(Own()))


def test_rounds_interleave_and_ratios_are_taken_within_a_round():
    order, cost = [], {"a": 0.001, "b": 0.002}

    def contestant(name):
        def run(steps):
            order.append(name)
            time.sleep(steps * cost[name])

        return run

    seen = []
    times = measure(
        {n: contestant(n) for n in cost}, rounds=4, seconds=0.1, on_round=lambda t: seen.append(t)
    )
    assert order[-8:] == ["a", "b", "b", "a", "a", "b", "b", "a"]  # rotated
    assert [len(t["a"].ms) for t in seen] == [1, 2, 3, 4]
    assert 1.3 < ratio(times["b"], times["a"]).median < 2.5
    drift = Timing(0, 0, (1.0, 10.0, 100.0)), Timing(0, 0, (2.0, 20.0, 200.0))
    assert ratio(drift[1], drift[0]) == Quartiles(2.0, 2.0, 2.0)


def test_the_command_prints_parity_and_ratio_and_writes_json(tmp_path, capsys):
    out = tmp_path / "r.json"
    with pytest.raises(SystemExit) as done:
        main(["bench", "lenet5", *QUICK, "--ablate", "update-fusion", "--json", str(out)])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "parity over 5 steps" in text and "eager's best is eager " in text
    found = json.loads(out.read_text())
    assert found["schema"] == bench.SCHEMA and found["rounds"] == 2 and found["parity"]["ok"]
    names = [row["name"] for row in found["rows"]]
    assert names[:2] == ["graphnet", "graphnet without update-fusion"] and len(names) == 2 + 6
    assert found["best"]["eager"] in names
    q = found["ratio"]["eager"]
    assert 0 < q["low"] <= q["median"] <= q["high"]


def test_inference(tmp_path):
    out = tmp_path / "r.json"
    with pytest.raises(SystemExit) as done:
        main(["bench", "lenet5", "--infer", *QUICK, "--json", str(out)])
    assert done.value.code == 0
    found = json.loads(out.read_text())
    assert found["mode"] == "infer" and len(found["rows"]) == 3 and found["parity"] is None


def test_a_baseline_that_fails_is_a_row_and_the_others_run(monkeypatch, tmp_path):
    real = peers._train

    def fails(work, layout, how, wrap):
        if layout == "channels_last":
            raise RuntimeError("out\nof memory")
        return real(work, layout, how, wrap)

    monkeypatch.setattr(peers, "_train", fails)
    c = bench.BenchConfig("lenet5", 4, target="cpu", rounds=2, seconds=0.1, parity_steps=2)
    found = bench.run_bench(c)
    failed = [row for row in found["rows"] if row["failure"]]
    assert len(failed) == 3 and failed[0]["failure"] == "RuntimeError: out of memory"
    assert found["best"]["eager"].startswith("eager nchw")
    assert "failed: RuntimeError" in bench.table(found)


def test_no_speed_for_wrong_results(monkeypatch, tmp_path):
    real = gn.compile

    def slower_learner(net, shape, **kw):
        if "optimizer" in kw:
            kw["optimizer"] = gn.SGD(lr=0.02, momentum=0.9, weight_decay=5e-4)
        return real(net, shape, **kw)

    monkeypatch.setattr(bench.gn, "compile", slower_learner)
    c = bench.BenchConfig("lenet5", 8, target="cpu", rounds=1, seconds=0.1, parity_steps=30)
    with pytest.raises(NumericsError, match="THE TWO DIFFER"):
        bench.run_bench(c, tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["rows"] == []


def test_an_interrupted_bench_keeps_the_finished_rounds(monkeypatch, tmp_path):
    real, out = bench._rows, tmp_path / "r.json"

    def stop_in_second(times, *rest):
        if len(times["graphnet"].ms) == 2:
            raise KeyboardInterrupt
        return real(times, *rest)

    monkeypatch.setattr(bench, "_rows", stop_in_second)
    c = bench.BenchConfig("lenet5", 4, target="cpu", rounds=3, seconds=0.1, parity_steps=0)
    with pytest.raises(KeyboardInterrupt):
        bench.run_bench(c, out)
    found = json.loads(out.read_text())
    assert found["rounds"] == 1 and len(found["rows"]) == 7


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"against": ("eagre",)}, "unknown baseline 'eagre'.*eager, compile"),
        ({"ablate": ("fusio",)}, "unknown ablation 'fusio'"),
        ({"model": "lenet6"}, "lenet6"),
        ({"precision": "fp8"}, "fp32"),
    ],
)
def test_wrong_names_list_the_valid_ones(changes, match):
    with pytest.raises(ConfigError, match=f"(?s){match}"):
        bench.run_bench(bench.BenchConfig(**{"model": "lenet5", "target": "cpu", **changes}))


def test_parity_without_dropout_leaves_the_net_alone():
    net = every_layer()
    assert [m.p for m in parity.without_dropout(net).modules() if hasattr(m, "p")] == [0.0]
    assert [m.p for m in net.modules() if hasattr(m, "p")] == [0.5]
