"""The benchmark harness: twins, interleaved rounds, parity before speed, failures as rows."""

import json
import signal
import time
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch

import graphnet as gn
from graphnet.bench import bench, counts, facts, layers, ours, parity, peers, rounds
from graphnet.bench.peers import Variant, Work
from graphnet.bench.result import layer_table, table
from graphnet.bench.rounds import Contestant, Quartiles, Timing, measure, ratio
from graphnet.bench.twin import torch_twin
from graphnet.cli import main
from graphnet.errors import ConfigError, NumericsError, UnsupportedOpError

SCHEMA = json.loads((Path(__file__).parents[2] / "benchmarks" / "schema.json").read_text())
QUICK = ["--batch", "4", "--target", "cpu", "--rounds", "2", "--seconds", "0.2", "--parity", "5"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads wait for each other for long where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quick(**changes):
    plain = {"batch": 4, "target": "cpu", "rounds": 2, "seconds": 0.1, "parity_steps": 2}
    return bench.BenchConfig(**{"model": "lenet5", "by_layer": False, **plain, **changes})


def interrupt(number, frame):
    """Python's own handler, which a process that was started in the background lacks."""
    raise KeyboardInterrupt


def ended(*argv):
    """The exit code of `graphnet bench`."""
    with pytest.raises(SystemExit) as done:
        main(["bench", *argv])
    return done.value.code


def work(mode="train", precision="fp32", net=None):
    net = net or gn.models.lenet5()
    sgd = gn.SGD(lr=0.01, momentum=0.9, weight_decay=5e-4) if mode == "train" else None
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 1, 28, 28, generator=g), torch.randint(0, 10, (4,), generator=g)
    return Work(net, x, y, mode, sgd, precision)


def every_layer():
    return gn.Sequential(
        gn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1), gn.ReLU(), gn.MaxPool2d(3, 2),
        gn.Conv2d(8, 8, 3, padding="same", groups=2, bias=False), gn.Tanh(), gn.AvgPool2d(2),
        gn.Sigmoid(), gn.AdaptiveAvgPool2d(2), gn.Flatten(),
        gn.Sequential(gn.Linear(32, 16), gn.Dropout(0.5, mode="vanilla")), gn.Linear(16, 5),
    )  # fmt: skip


# ---- the twin --------------------------------------------------------------------------------


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


# ---- rounds ----------------------------------------------------------------------------------


def contestant(name, run, kind="eager", guess_ms=1.0):
    return Contestant(name, kind, run, CPU, warm_ms=(guess_ms,))


def test_rounds_interleave_and_ratios_are_taken_within_a_round():
    order, cost = [], {"a": 0.001, "b": 0.002}

    def sleeping(name):
        def run(steps):
            order.append(name)
            time.sleep(steps * cost[name])

        return contestant(name, run, guess_ms=1e3 * cost[name])

    seen = []
    times = measure(
        [sleeping(n) for n in cost], rounds=4, seconds=0.1,
        on_round=lambda t: seen.append(len(t["a"].ms)),
    )  # fmt: skip
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]  # rotated
    assert seen == [1, 2, 3, 4]
    assert 1.3 < ratio(times["b"], times["a"]).median < 2.5
    drift = Timing([1.0, 10.0, 100.0]), Timing([2.0, 20.0, 200.0])
    assert ratio(drift[1], drift[0]) == Quartiles(2.0, 2.0, 2.0)


def test_a_contestant_that_fails_in_a_round_leaves_and_the_others_go_on():
    calls = []

    def breaks(steps):
        calls.append(steps)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    lost = []
    both = [contestant("good", lambda n: None), contestant("bad", breaks)]
    times = measure(both, rounds=3, seconds=0.01, on_failure=lambda c, e: lost.append((c.name, e)))
    assert [name for name, _ in lost] == ["bad"] and len(calls) == 2
    assert list(times) == ["good"] and len(times["good"].ms) == 3
    calls.clear()
    with pytest.raises(RuntimeError, match="out of memory"):
        measure(both, rounds=3, seconds=0.01)


# ---- the command -----------------------------------------------------------------------------


def test_the_command_prints_parity_and_ratio_and_writes_json(tmp_path, capsys):
    asked = ["--against", "eager,eager-graph", "--ablate", "update-fusion,cudagraph,layout"]
    assert ended("lenet5", *QUICK, *asked, "--json", str(tmp_path)) == 0
    text = capsys.readouterr().out
    assert "TF32 in matrix products off, in cuDNN off, cudnn.benchmark on" in text
    assert "parity of losses over 5 steps" in text and "eager's best is eager " in text
    (path,) = tmp_path.iterdir()  # a folder: the name says what was measured
    found = json.loads(path.read_text())
    assert path.name == f"cpu-lenet5-train-b4-fp32-{found['date'][:10]}.json"
    jsonschema.validate(found, SCHEMA)
    assert found["complete"] and found["parity"]["ok"] and found["parity"]["steps"] == 5
    rows = {row["name"]: row for row in found["rows"]}
    timed = [name for name, row in rows.items() if not row["failure"]]
    assert timed[:2] == ["graphnet", "graphnet bind/run"] and len(timed) == 2 + 6 + 1
    assert "a CUDA graph needs a GPU" in rows["eager-graph"]["failure"]
    assert "no CUDA graph" in rows["graphnet without cudagraph"]["failure"]
    assert "the same without it" in rows["graphnet without layout"]["failure"]
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
    assert found["parity"]["what"] == what and found["parity"]["error"] < 1e-4


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
    with pytest.raises(NumericsError, match="THE TWO DIFFER"):
        bench.run_bench(quick(batch=8, parity_steps=30), tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    jsonschema.validate(found, SCHEMA)
    assert found["rows"] == [] and not found["parity"]["ok"] and not found["complete"]


@pytest.mark.parametrize("mode", ["infer", "grads"])
def test_wrong_logits_and_gradients_are_no_parity(mode):
    w = work(mode)

    def off_by_a_percent(work):
        program = ours.compiled(work, "cpu")

        def run(*feed):
            out = program(*feed)
            if mode == "infer":
                return 1.01 * out
            return out[0], {k: 1.01 * g if k == "0.weight" else g for k, g in out[1].items()}

        return run

    assert parity.check(w, lambda w: ours.compiled(w, "cpu"), 1).ok
    assert not parity.check(w, off_by_a_percent, 1).ok


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

    def second_ends(work, kind):
        if kind == "compile":
            raise KeyboardInterrupt
        return real(work, kind)

    monkeypatch.setattr(peers, "start_all", second_ends)
    with pytest.raises(KeyboardInterrupt):
        bench.run_bench(quick(against=("eager", "compile")), tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["best"]["eager"] and found["ratio"]["eager"]["median"] > 0


def test_a_kind_lets_go_of_its_memory_before_the_next_is_built(monkeypatch):
    real, held = peers.start_all, []

    def tracked(work, kind):
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
        ({"precision": "fp8"}, "unknown precision 'fp8'.*fp32, tf32, bf16"),
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


def test_parity_without_dropout_leaves_the_net_alone():
    net = every_layer()
    assert [m.p for m in parity.without_dropout(net).modules() if hasattr(m, "p")] == [0.0]
    assert [m.p for m in net.modules() if hasattr(m, "p")] == [0.5]


def test_the_step_as_one_kernel_must_have_the_same_losses(monkeypatch):
    monkeypatch.setattr(ours, "SAME_STEPS", 2)
    tiny = gn.Sequential(gn.Flatten(), gn.Linear(784, 10))
    run = ours._persistent(work(net=tiny), "interpret")
    assert torch.isfinite(run(1)).all()
    real = ours.compiled

    def other_rate(w, target, persistent):
        return real(replace(w, sgd=gn.SGD(lr=0.02)) if persistent else w, target)

    monkeypatch.setattr(ours, "compiled", other_rate)
    with pytest.raises(NumericsError, match="in step 1 its loss is"):
        ours._persistent(work(net=tiny), "cpu")


def test_a_net_too_large_for_one_kernel_is_a_row_that_says_so(monkeypatch, fake_cuda):
    real = ours.compiled

    def on_cpu(w, target, **more):
        if more.get("persistent"):
            raise ConfigError("too large for one kernel")
        return real(w, "cpu")

    monkeypatch.setattr(ours, "compiled", on_cpu)
    started, failures = ours.start_all(work(), "cuda")
    assert [c.name for c in started] == ["graphnet", "graphnet bind/run"]
    assert failures == {"graphnet persistent": "not applicable: too large for one kernel"}


# ---- baselines -------------------------------------------------------------------------------


def names(kind, device, mode="train", precision="bf16"):
    class On(Work):
        @property
        def device(self):
            return torch.device(device)

    w = work(mode, precision)
    return [v.name for v in peers.variants(kind, On(w.net, w.x, w.y, mode, w.sgd, precision))[0]]


def test_which_baselines_make_sense_where():
    assert len(names("eager", "cuda")) == len(names("eager-graph", "cuda")) == 12
    assert len(names("eager", "cuda", precision="tf32")) == 6
    assert names("eager", "cuda", "infer", "fp32") == ["eager nchw", "eager channels_last"]
    compiled = names("compile", "cuda")
    assert "compile nchw compiled pure reduce-overhead" in compiled and len(compiled) == 16
    # A CPU has no CUDA graphs, by whichever name.
    assert names("eager-graph", "cpu") == []
    assert not any("reduce-overhead" in n or "compiled" in n for n in names("compile", "cpu"))
    assert all("max-autotune" in n for n in names("compile-max", "cpu"))


def test_the_flags_of_a_precision_stand_inside_only():
    at = lambda: (
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
    )  # fmt: skip
    before = at()
    with peers.torch_flags("fp32"):
        assert at() == (False, False, True)
    with peers.torch_flags("tf32"):
        assert at() == (True, True, True) and facts.flags()["matmul_allow_tf32"]
    assert at() == before


def test_every_compiled_variant_is_compiled(monkeypatch):
    """torch.compile gives up behind eight functions of one code object, and says nothing."""
    seen = []
    monkeypatch.setattr(torch, "compile", lambda f, mode=None: seen.append(f) or f)
    for layout in peers.LAYOUTS:
        peers._whole_step(work(), Variant("compile", layout, "compiled", "", "default"))()
    assert len(seen) == 4 and len({id(f.__code__) for f in seen}) == 4  # losses and updates
    assert len({f.__code__.co_name for f in seen}) == 4


# ---- on a GPU, by a stand-in -----------------------------------------------------------------


class Event:
    clock = 0.0

    def __init__(self, **kw):
        pass

    def record(self):
        Event.clock += 1.0
        self.at = Event.clock

    def elapsed_time(self, other):
        return other.at - self.at


@pytest.fixture
def fake_cuda(monkeypatch):
    """What the harness asks of torch.cuda, written down instead of done."""
    calls = []

    class Graph:
        def replay(self):
            calls.append("replay")

    @contextmanager
    def graph(into):
        calls.append("capture")
        yield
        calls.append("captured")

    class Stream:
        def wait_stream(self, other):
            pass

    fakes = {
        "synchronize": lambda device=None: calls.append("wait"), "CUDAGraph": Graph,
        "graph": graph, "Stream": Stream, "current_stream": Stream, "Event": Event,
        "stream": lambda s: nullcontext(), "_sleep": lambda ticks: calls.append("busy"),
        "memory_allocated": lambda device=None: 100, "max_memory_allocated": lambda device: 350,
        "reset_peak_memory_stats": lambda device: None, "current_device": lambda: 0,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return calls


GPU = torch.device("cuda", 0)


def test_eager_graph_captures_a_warm_step_and_replays_it(fake_cuda):
    fake_cuda.clear()
    replay = peers._captured(lambda: fake_cuda.append("step"))
    assert fake_cuda == ["step"] * 3 + ["capture", "step", "captured"]
    replay()
    assert fake_cuda[-1] == "replay"


def test_a_gpu_contestant_is_waited_for_and_its_memory_and_host_time_are_its_own(fake_cuda):
    def build():
        return lambda steps: fake_cuda.append(f"run {steps}")

    made = rounds.start("x", "eager", build, GPU)
    assert made.peak_bytes == 250
    assert fake_cuda[:2] == ["run 1", "wait"]  # cold ends when the device is done
    fake_cuda.clear()
    assert made.host_us() > 0 and fake_cuda == ["wait", f"run {rounds.HOST_STEPS}", "wait"]
    fake_cuda.clear()
    made.seconds(7)
    assert fake_cuda == ["run 7", "wait"]
    times = measure([made], rounds=3, seconds=1e-3)
    assert len(times["x"].host_us) == len(times["x"].ms) == 3


def test_on_a_gpu_layers_are_timed_between_events_behind_a_busy_device(fake_cuda):
    clock = layers.Clock(GPU)

    def run():
        a, b, c = clock.stamp(), clock.stamp(), clock.stamp()
        return [(a, b), (a, c)]

    assert layers._medians(clock, run) == [1e3, 2e3]  # events tell milliseconds
    assert fake_cuda == ["busy", "wait"] * (layers.REPEATS + 1)


def test_clocks_and_driver_come_from_nvidia_smi(fake_cuda, monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\n"
        'case "$*" in *driver_version*) echo 580.95.05;; '
        "*) echo '1980 MHz, 3201 MHz, 1980 MHz, 3201 MHz, 41, 120.5 W, 700.00 W';; esac\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = facts.clocks(GPU)
    assert found["clocks.sm"] == "1980 MHz" and found["power.limit"] == "700.00 W"
    about = type("P", (), {"name": "NVIDIA H200", "major": 9, "minor": 0,
                           "multi_processor_count": 132, "total_memory": 1 << 37})  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    machine = facts.machine(GPU)
    assert machine["driver"] == "580.95.05" and machine["arch"] == "sm_90"
    jsonschema.validate(machine, {**SCHEMA["$defs"]["machine"], "$defs": SCHEMA["$defs"]})
    smi.write_text("#!/bin/sh\nexit 9\n")  # no permission, no driver
    assert facts.clocks(GPU) is None and facts.machine(GPU)["driver"] is None
    assert facts.clocks(CPU) is None


# ---- facts, counts, layers -------------------------------------------------------------------


@pytest.mark.parametrize(
    "device, slug",
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("cpu", "cpu"),
     ("NVIDIA A100-SXM4-80GB", "a100"), ("Tesla V100-PCIE-16GB", "v100")],
)  # fmt: skip
def test_the_name_of_a_result(device, slug):
    result = {
        "machine": {"device": device}, "model": "some/File.py:Net", "mode": "infer", "batch": 8,
        "precision": "bf16", "date": "2026-11-24T01:02:03Z",
    }  # fmt: skip
    assert facts.file_name(result) == f"{slug}-net-infer-b8-bf16-2026-11-24.json"


def test_the_operators_and_the_memory_of_a_step():
    kept = torch.ones(1 << 16)

    def run(steps):
        for _ in range(steps):
            a = kept + 1.0
            b = a * 2.0
            del a
            b.sum()

    found = counts.count(run, CPU)
    assert found.launches is None and found.operators >= 3
    assert 2 * kept.nbytes <= found.step_bytes < 2.5 * kept.nbytes


def test_layers_and_launches_have_their_own_times():
    torch.manual_seed(0)
    slow = gn.Sequential(gn.Flatten(), gn.Linear(784, 2000), gn.ReLU(), gn.Linear(2000, 10))
    rows = layers.layer_times(work(net=slow), Variant("eager", "nchw", "plain"))
    times = {row["layer"]: (row["forward_us"], row["backward_us"]) for row in rows}
    assert list(times) == ["flatten1", "fc1", "relu1", "fc2", "loss"]
    assert times["fc1"][0] == max(f for f, _ in times.values())
    assert times["fc1"][1] == max(b for _, b in times.values())
    mine = layers.launch_times(work(net=slow), "cpu")
    assert [r["phase"] for r in mine] == sorted(
        (r["phase"] for r in mine), key=["forward", "loss", "backward"].index
    )
    flops = {tuple(r["layers"]): r["flops"] for r in mine if r["phase"] == "forward"}
    assert flops[("fc1", "relu1")] >= 2 * 4 * 784 * 2000
    inference = layers.layer_times(work("infer", net=slow), Variant("eager", "nchw"))
    assert [r["layer"] for r in inference] == list(times)[:-1]
    text = layer_table({"variant": "eager nchw", "torch": inference, "graphnet": mine})
    assert "linear+relu" in text and "fc1, relu1" in text
