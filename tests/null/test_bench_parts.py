"""The parts of the benchmark harness: twins, rounds, baselines, counts, times by layer."""

import time
from contextlib import contextmanager, nullcontext

import jsonschema
import pytest
import torch

import graphnet as gn
from graphnet.bench import counts, facts, layers, peers, rounds
from graphnet.bench.peers import Variant, Work
from graphnet.bench.result import layer_table
from graphnet.bench.rounds import Contestant, Quartiles, Timing, measure, ratio
from graphnet.bench.twin import torch_twin
from graphnet.errors import UnsupportedOpError
from tests.benching import CPU, SCHEMA, every_layer, one_thread, work  # noqa: F401

# ---- the twin --------------------------------------------------------------------------------


def test_the_twin_computes_the_same_under_the_same_keys():
    net = every_layer()
    twin = torch_twin(net).eval()
    assert list(twin.state_dict()) == list(net.state_dict())
    x = torch.randn(2, 3, 21, 21)
    infer = gn.compile(net, (2, 3, 21, 21), target="cpu")
    torch.testing.assert_close(infer(x), twin(x), rtol=1e-5, atol=1e-6)


def test_a_module_of_ones_own_has_a_twin_if_its_forward_runs_on_tensors():
    class Own(gn.Module):
        def __init__(self, relu):
            super().__init__()
            self.relu, self.times, self.inner = relu, 3, gn.Linear(4, 2)

        def forward(self, x):
            return self.relu(self.inner(x)) * self.times

    x = torch.randn(5, 4)
    net = gn.Sequential(Own(torch.relu))
    got = gn.compile(net, (5, 4), target="cpu")(x)
    torch.testing.assert_close(torch_twin(net)(x), got)
    twin = torch_twin(gn.Sequential(Own(gn.relu)))
    with pytest.raises(UnsupportedOpError, match="no torch twin for Own: .*relu was called outsi"):
        twin(x)
    net = Own(torch.relu)
    net.scale = gn.Parameter(torch.ones(3))
    with pytest.raises(UnsupportedOpError, match="Own, which has parameters of its own"):
        torch_twin(net)


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


# ---- baselines -------------------------------------------------------------------------------


def names(kind, device, mode="train", precision="bf16", like=""):
    class On(Work):
        @property
        def device(self):
            return torch.device(device)

    w = work(mode, precision)
    w = On(w.net, w.x, w.y, mode, w.sgd, precision)
    return [v.name for v in peers.variants(kind, w, like)[0]]


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


def test_what_is_compiled_can_be_like_the_best_of_eager():
    like = "eager channels_last fused autocast"
    assert names("compile", "cuda", like=like) == [
        "compile channels_last fused autocast default",
        "compile channels_last fused autocast reduce-overhead",
    ]
    assert names("compile-max", "cuda", like=like) == [
        "compile-max channels_last fused autocast max-autotune"
    ]
    assert len(names("eager-graph", "cuda", like=like)) == 12  # nothing to compile
    # An update that is never compiled stands for the first that is.
    assert names("compile-max", "cuda", like="eager nchw plain pure") == [
        "compile-max nchw fused pure max-autotune"
    ]
    assert names("compile", "cpu", "infer", "fp32", "eager nchw") == ["compile nchw default"]


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
