"""`graphnet bench`: parity before speed, failures as rows, what an early end leaves."""

import json
import signal
import weakref

import jsonschema
import pytest
import torch

import graphnet as gn
from graphnet.bench import bench, counts, layers, ours, parity, peers
from graphnet.bench.peers import Variant, Work
from graphnet.bench.result import table
from graphnet.cli import main
from graphnet.errors import ConfigError, NumericsError
from tests.benching import SCHEMA, every_layer, one_thread, quick, work  # noqa: F401

QUICK = ["--batch", "4", "--target", "cpu", "--rounds", "2", "--seconds", "0.2", "--parity", "5"]


def interrupt(number, frame):
    """Python's own handler, which a process that was started in the background lacks."""
    raise KeyboardInterrupt


def ended(*argv):
    """The exit code of `graphnet bench`."""
    with pytest.raises(SystemExit) as done:
        main(["bench", *argv])
    return done.value.code


# ---- the command -----------------------------------------------------------------------------


def test_the_command_prints_parity_and_ratio_and_writes_json(tmp_path, capsys):
    asked = ["--against", "eager,eager-graph", "--ablate", "update-fusion,cudagraph,layout,native"]
    assert ended("lenet5", *QUICK, *asked, "--json", str(tmp_path)) == 0
    text = capsys.readouterr().out
    assert "TF32 in matrix products off, in cuDNN off, cudnn.benchmark on" in text
    assert "parity of what a step changes over 5 batches" in text
    assert "eager's best is eager " in text
    (path,) = tmp_path.iterdir()  # a folder: the name says what was measured
    found = json.loads(path.read_text())
    assert path.name == f"cpu-lenet5-train-b4-fp32-{found['date'][:10]}.json"
    jsonschema.validate(found, SCHEMA)
    assert found["complete"] and found["parity"]["ok"] and found["parity"]["steps"] == 5
    errors = {e["name"]: e for e in found["parity"]["errors"]}
    assert len(errors) == 11 and 0 < errors["0.weight"]["ours"] < 1e-5  # ten parameters, the loss
    assert all(f"{e['name']:9} {e['ours']:9.1e} {e['torch']:9.1e}" in text for e in errors.values())
    rows = {row["name"]: row for row in found["rows"]}
    timed = [name for name, row in rows.items() if not row["failure"]]
    assert timed[:2] == ["graphnet", "graphnet bind/run"] and len(timed) == 2 + 6 + 1
    assert "a CUDA graph needs a GPU" in rows["eager-graph"]["failure"]
    assert "no CUDA graph" in rows["graphnet without cudagraph"]["failure"]
    assert "the same without it" in rows["graphnet without layout"]["failure"]
    assert "no batch normalization" in rows["graphnet without native"]["failure"]
    best = rows[found["best"]["eager"]]
    assert best["operators"] > 50 and best["step_bytes"] > 4 * 6 * 28 * 28 * 4
    assert best["cold_s"] > 0 and len(best["warm_ms"]) > 1
    q = found["ratio"]["eager"]
    assert 0 < q["low"] <= q["median"] <= q["high"] and q == best["ratio"]
    # Where the time goes: every layer of torch's, every task of ours.
    names = [row["layer"] for row in found["layers"]["torch"]]
    assert names[:3] == ["conv1", "relu1", "pool1"] and names[-2:] == ["fc3", "loss"]
    layered = {name for row in found["layers"]["graphnet"] for name in row["layers"]}
    assert {"conv1", "fc3", "loss"} <= layered
    assert "ours by launch" in text and found["ceilings"]["bandwidth"] > 1e8


@pytest.mark.parametrize("mode, what", [("infer", "logits"), ("grads", "loss and gradients")])
def test_without_an_update(mode, what):
    found = bench.run_bench(quick(mode=mode))
    jsonschema.validate(found, SCHEMA)
    assert found["mode"] == mode and len(found["rows"]) == 3  # ours, and two layouts
    parity = found["parity"]
    assert parity["what"] == what and parity["reference"] == "float64"
    assert all(e["ours"] < 1e-5 for e in parity["errors"])


def test_bf16_is_tried_as_autocast_and_pure():
    found = bench.run_bench(quick(precision="bf16"))
    jsonschema.validate(found, SCHEMA)
    eager = [row["name"] for row in found["rows"] if row["kind"] == "eager"]
    assert len(eager) == 12 and sum(name.endswith(" pure") for name in eager) == 6
    assert not any(row["failure"] for row in found["rows"])


def test_pure_bf16_keeps_fp32_parameters(monkeypatch):
    made = []

    class Seen(peers._Master):
        def __init__(self, module):
            super().__init__(module)
            made.append(self)

    monkeypatch.setattr(peers, "_Master", Seen)
    w = work(precision="bf16")
    tiny = Work(w.net, w.x, w.y, "train", gn.SGD(lr=1e-4), "bf16")
    step = peers._whole_step(tiny, Variant("eager", "nchw", "plain", "pure"))
    (master,) = made
    before = [p.detach().clone() for p in master.high]
    step()
    moved = [float((a.detach() - b).abs().max()) for a, b in zip(master.high, before, strict=True)]
    # Steps far below bf16's resolution are kept in fp32; what computes is their rounding.
    assert all(0 < m < 2**-9 for m in moved)
    for low, high in zip(master.low, master.high, strict=True):
        assert low.dtype == torch.bfloat16 and torch.equal(low, high.bfloat16())


def test_a_baseline_that_fails_is_a_row_and_the_others_run(monkeypatch):
    real = peers.build

    def fails(work, v):
        if v.layout == "channels_last":
            raise RuntimeError("out\nof memory")
        return real(work, v)

    monkeypatch.setattr(peers, "build", fails)
    found = bench.run_bench(quick())
    jsonschema.validate(found, SCHEMA)
    failed = [row for row in found["rows"] if row["failure"]]
    assert len(failed) == 3 and failed[0]["failure"] == "RuntimeError: out of memory"
    assert found["best"]["eager"].startswith("eager nchw")
    assert "failed: RuntimeError" in table(found)


def test_no_speed_for_wrong_results(monkeypatch, tmp_path):
    real = gn.compile

    def slower_learner(net, shape, **kw):
        if "optimizer" in kw:
            kw["optimizer"] = gn.SGD(lr=0.02, momentum=0.9, weight_decay=5e-4)
        return real(net, shape, **kw)

    monkeypatch.setattr(ours.gn, "compile", slower_learner)
    with pytest.raises(NumericsError, match="(?s)THE TWO DIFFER"):
        bench.run_bench(quick(batch=8, parity_batches=3), tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    jsonschema.validate(found, SCHEMA)
    assert found["rows"] == [] and not found["parity"]["ok"] and not found["complete"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_bench_keeps_the_finished_rounds(number, monkeypatch, tmp_path, capsys):
    real, out = bench._Bench.save, tmp_path / "r.json"
    handlers = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGINT, interrupt)

    def stop_in_second(self):
        real(self)
        if self.found.groups and len(self.found.groups[-1]["graphnet"].ms) == 2:
            signal.raise_signal(number)

    monkeypatch.setattr(bench._Bench, "save", stop_in_second)
    asked = ["--rounds", "3", "--parity", "0", "--json", str(out)]
    try:
        assert ended("lenet5", *QUICK, *asked) == 128 + number
    finally:
        signal.signal(signal.SIGINT, handlers[1])
    assert signal.getsignal(signal.SIGTERM) == handlers[0]
    said = capsys.readouterr()
    assert "eager's best is" in said.out and "interrupted" in said.err
    found = json.loads(out.read_text())
    jsonschema.validate(found, SCHEMA)
    assert {row["rounds"] for row in found["rows"]} == {2} and len(found["rows"]) == 8
    assert not found["complete"]


def test_one_kind_after_the_other_so_a_late_end_keeps_the_first(monkeypatch, tmp_path):
    real = peers.start_all

    def second_ends(work, kind, like):
        if kind == "compile":
            raise KeyboardInterrupt
        return real(work, kind, like)

    monkeypatch.setattr(peers, "start_all", second_ends)
    with pytest.raises(KeyboardInterrupt):
        bench.run_bench(quick(against=("eager", "compile")), tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["best"]["eager"] and found["ratio"]["eager"]["median"] > 0


def test_a_kind_lets_go_of_its_memory_before_the_next_is_built(monkeypatch):
    real, held = peers.start_all, []

    def tracked(work, kind, like):
        alive = [ref for ref in held if ref() is not None]
        assert len(alive) <= 1, "only the quickest of a kind stays"
        started, failures = real(work, "eager")
        for c in started:
            c.name, c.kind = c.name.replace("eager", kind), kind
        held.extend(weakref.ref(c.run) for c in started)
        return started, failures

    monkeypatch.setattr(peers, "start_all", tracked)
    bench.run_bench(quick(mode="infer", against=("eager", "compile")))
    assert len(held) == 4


def test_what_is_beside_the_ratios_cannot_stop_them(monkeypatch):
    def broken(*a):
        raise RuntimeError("no access to counters")

    monkeypatch.setattr(layers, "launch_times", broken)
    monkeypatch.setattr(counts, "count", broken)
    found = bench.run_bench(quick(mode="infer", by_layer=True))
    jsonschema.validate(found, SCHEMA)
    assert found["complete"] and found["layers"] is None and found["ratio"]["eager"]
    assert [note.split(":")[0] for note in found["notes"]] == [
        "no times by layer", "no counts of launches"
    ]  # fmt: skip


def test_our_first_step_is_timed_before_the_check_can_warm_it_up(monkeypatch):
    order = []
    start, check = ours.start_all, parity.check
    monkeypatch.setattr(ours, "start_all", lambda *a: order.append("start") or start(*a))
    monkeypatch.setattr(parity, "check", lambda *a: order.append("check") or check(*a))
    bench.run_bench(quick(mode="infer"))
    assert order == ["start", "check"]


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"against": ("eagre",)}, "unknown baseline 'eagre'.*eager, eager-graph, compile, comp"),
        ({"ablate": ("fusio",)}, "unknown ablation 'fusio'.*fusion, cudagraph, layout, update-f"),
        ({"model": "lenet6"}, "unknown model 'lenet6'.*alexnet.*lenet5"),
        ({"precision": "fp8"}, "unknown precision 'fp8'.*auto, fp32, tf32, bf16"),
        ({"precision": "tf32"}, "a CPU would compute fp32"),
        ({"target": "interpret"}, "unknown target 'interpret'.*cuda, cpu"),
    ],
)
def test_wrong_names_list_the_valid_ones(changes, match):
    with pytest.raises(ConfigError, match=f"(?s){match}"):
        bench.run_bench(quick(**changes))


def test_bad_input_exits_2_on_one_line(capsys):
    assert ended("lenet5", "--against", "eagre") == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
