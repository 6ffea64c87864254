"""GRAPHNET_STREAMS: updates of fully connected layers beside the rest, as wide as ever or by N
programs that walk. Every setting has the same bits."""

import functools
from dataclasses import replace

import pytest
import torch

import graphnet as gn
from graphnet import config
from graphnet.api import lower
from graphnet.lowering.build.build import compile_launches
from graphnet.lowering.launch import aside
from graphnet.lowering.launch.codegen import Ref
from graphnet.lowering.launch.config import Config
from graphnet.lowering.targets.interpret import interpreted
from graphnet.lowering.tune import proof
from graphnet.lowering.tune.alone import Alone
from tests.interp.test_linear import apart, places, ptx, step, variant

ALEXNET = {"fc6": (9216, 4096), "fc7": (4096, 4096), "fc8": (4096, 1000)}
SGD = gn.SGD(lr=0.01, momentum=0.9, weight_decay=5e-4)


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with config.override(CACHE_DIR=str(tmp_path_factory.mktemp("cache"))):
        yield


def updates(graph, eqns):
    return [e for e in eqns if apart(e).anchor.op == "linear_wgrad"]


def walked(launch, programs):
    """The launch with so many programs, however long it is."""
    constants = tuple((k, programs if k == "PROGRAMS" else v) for k, v in launch.constants)
    return replace(launch, grid=(programs, 1, 1), constants=constants)


def bits_of(graph, eqn, steps):
    """What launches of an equation leave, once they are right, from memory full of NaN."""
    alone = Alone(graph, eqn, "interpret")
    with interpreted():
        run, tensor = alone.prepare(steps)
        assert alone.verdict(run, tensor) is None
        refs = [Ref(v.name, v.type.dtype.name) for v in eqn.results]
        return [tensor(r).clone().view(torch.uint8) for r in refs]


# ---- the kernel ------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, sizes", [(40, (48, 24)), (64, (64, 64)), (5, (33, 17))], ids=str)
@pytest.mark.parametrize("name, precision", [("pointers", "bf16"), ("boxes", "bf16"),
                                             ("pointers", "fp32")])  # fmt: skip
def test_walking_programs_leave_the_bits_of_one_a_tile(rows, sizes, name, precision):
    """Tiles that divide the weight and tiles that do not, bias sums, masters and copies; fewer
    programs than tiles, and as many."""
    if name == "boxes" and sizes == (33, 17):
        return  # rows are no multiple of 16 bytes
    graph, eqns = step(rows, *sizes, precision=precision)
    tile = 32 if rows == 64 else 16
    for e in updates(graph, eqns):
        (plain,) = variant("linear_wgrad", name).launch(apart(e), Config(tile, tile, 16))
        want = bits_of(graph, e, [plain])
        for programs in (3, plain.programs):
            got = bits_of(graph, e, [walked(plain, programs)])
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), programs


@pytest.mark.parametrize("optimizer", [
    gn.Adam(lr=1e-3, weight_decay=0.1), gn.AdamW(lr=1e-3, amsgrad=True), gn.SGD(lr=0.1),
], ids=["adam", "amsgrad", "sgd"])  # fmt: skip
def test_other_updates(optimizer):
    graph, eqns = step(20, 40, 24, optimizer=optimizer)
    for e in updates(graph, eqns)[:1]:
        (plain,) = variant("linear_wgrad", "pointers").launch(apart(e), Config(16, 16, 16))
        want, got = bits_of(graph, e, [plain]), bits_of(graph, e, [walked(plain, 2)])
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_parts_of_a_reduction_are_tiles_too():
    graph, eqns = step(40, 48, 24)
    e = updates(graph, eqns)[0]
    parts = Config(16, 16, 16, SPLIT=3)
    first, second = variant("linear_wgrad", "pointers").launch(apart(e), parts)
    want = bits_of(graph, e, [first, second])
    got = bits_of(graph, e, [walked(first, 4), second])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_program_that_stops_early_is_noticed():
    """The comparison is one: programs that leave out their last tiles leave NaN there."""
    graph, eqns = step(40, 48, 24)
    e = updates(graph, eqns)[0]
    (plain,) = variant("linear_wgrad", "pointers").launch(apart(e), Config(16, 16, 16))
    short = replace(walked(plain, 3), grid=(2, 1, 1))
    with pytest.raises(AssertionError):
        bits_of(graph, e, [short])


# ---- the switch ------------------------------------------------------------------------------


def alexnet(streams, precision="bf16", **how):
    with config.override(STREAMS=streams):
        return lower(gn.models.alexnet(), (128, 3, 227, 227), target="cuda", precision=precision,
                     loss=gn.CrossEntropyLoss(), **how)  # fmt: skip


@functools.cache
def trained(streams, precision="bf16"):
    return alexnet(streams, precision, optimizer=SGD)


def beside(plan):
    return [s for s, n in zip(plan.steps, plan.streams, strict=True) if n == 1]


def test_what_runs_beside_what():
    one, today, some = (trained(n).plan for n in ("0", "1", "32"))
    assert set(one.streams) == {0} and len(one.steps) == len(today.steps) == len(some.steps)
    # Updates wait for the record, which counts the step that dropout's gradients still read.
    assert [s.where.layers[0] for s in beside(today)] == ["fc7", "fc8", "fc6"]
    assert today.streams == some.streams and one.arena_bytes <= today.arena_bytes
    for s, confined in zip(beside(today), beside(some), strict=True):
        assert dict(s.constants)["PROGRAMS"] == 0 and s.programs > 1000
        assert dict(confined.constants)["PROGRAMS"] == 32 and confined.grid == (32, 1, 1)
        assert confined.choice.config == s.choice.config
        assert (confined.flops, confined.bytes) == (s.flops, s.bytes)
    rest = lambda plan: [s for s, n in zip(plan.steps, plan.streams, strict=True) if n == 0]
    assert [s.grid for s in rest(some)] == [s.grid for s in rest(today)]


def test_only_updates_are_confined():
    """A gradient that is written out, or read by the norm of all, goes at full width."""
    for how in ({"grads": True}, {"optimizer": SGD, "clip_norm": 1.0}):
        launches = alexnet("32", **how).plan.launches
        found = [s for s in launches if s.kernel == "linear_wgrad"]
        assert len(found) == 3 and all(s.programs > 1000 for s in found)


def test_narrow_layers_stay_as_they_are():
    with config.override(STREAMS="2"):
        plan = lower(gn.models.lenet5(), (128, 1, 28, 28), target="cuda",
                     loss=gn.CrossEntropyLoss(), optimizer=SGD).plan  # fmt: skip
    found = [s for s in plan.parts if s.kernel == "linear_wgrad"]
    assert found and all(dict(s.constants)["PROGRAMS"] == 0 for s in found)
    assert set(plan.streams) == {0}


def test_a_launch_of_fewer_tiles_than_programs():
    (s, *_) = beside(trained("1").plan)
    with config.override(STREAMS="1024"):
        small = replace(s, grid=(7, 3, 1))
        assert aside.confined(small).grid == (21, 1, 1)


def test_what_is_proven_on_a_gpu_is_what_runs_there():
    low = trained("32")
    with config.override(STREAMS="32"):
        grids = {s.grid for _, steps in proof.computed(low) for s in steps}
    assert (32, 1, 1) in grids


@pytest.mark.parametrize("value", ["-1", "two", "1025", "0.5"])
def test_a_wrong_value_is_a_typed_error(value):
    with config.override(STREAMS=value), pytest.raises(gn.ConfigError, match="STREAMS.*") as e:
        lower(gn.models.lenet5(), (2, 1, 28, 28), target="cuda", **{
            "loss": gn.CrossEntropyLoss(), "optimizer": SGD})  # fmt: skip
    assert "use a number from 0 to 1024" in str(e.value)


def test_a_step_has_the_same_bits_under_every_setting(monkeypatch):
    monkeypatch.setattr(aside, "goes_aside", lambda launch: launch.kernel == "linear_wgrad")
    monkeypatch.setattr("graphnet.lowering.plan.schedule.goes_aside", aside.goes_aside)
    found = {}
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(6)
    for streams in ("0", "1", "2", "9"):
        torch.manual_seed(3)
        net = gn.Sequential(
            gn.Conv2d(1, 4, 3), gn.ReLU(), gn.Flatten(), gn.Linear(144, 40), gn.Tanh(),
            gn.Linear(40, 10),
        )  # fmt: skip
        with config.override(STREAMS=streams, DISABLE="groups"):
            program = gn.compile(net, x.shape, target="interpret", precision="bf16",
                                 loss=gn.CrossEntropyLoss(), optimizer=SGD)  # fmt: skip
        wide = [s.programs for s in program.plan.launches if s.kernel == "linear_wgrad"]
        assert any(program.plan.streams) == (streams != "0")
        if int(streams) > 1:
            assert max(wide) == min(int(streams), 4)  # of 128 x 64 in the rules' tiles, and a bias
        found[streams] = float(program(x, y)), net.state_dict()
    loss, state = found["1"]
    for other, values in found.values():
        assert other == loss and all(torch.equal(values[k], state[k]) for k in state)


# ---- sm_90 -----------------------------------------------------------------------------------


def held(precision, layers):
    """(layer, registers plain, registers walking) of AlexNet's updates; none spills, and both are
    the same products and accesses."""
    plain, some = (beside(trained(n, precision).plan) for n in ("1", "32"))
    made = [s for s in (*plain, *some) if s.where.layers[0] in layers]
    found = [about for _, about in compile_launches(made)[0]]
    half = len(found) // 2
    for a, b in zip(found[:half], found[half:], strict=True):
        for key in ("spill_bytes", "wgmma", "tma"):
            assert a[key] == b[key], key
        assert b["spill_bytes"] == 0 and b["registers"] <= 255
    for s in made:  # what the update reads is under way before the product, 16 bytes an access
        text = ptx(s)
        loads = places(text, r"ld\.global[\w.]*\.v4")
        assert sum(at < text.index("wgmma.mma_async") for at in loads) == len(loads) >= 16
        assert len(places(text, r"st\.global[\w.]*\.v4")) >= 16
    return [(s.where.layers[0], a["registers"], b["registers"])
            for s, a, b in zip(made, found, found[half:], strict=False)]  # fmt: skip


def test_the_last_layer_on_sm_90():
    held("bf16", ("fc8",))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_all_three_layers_on_sm_90(precision):
    found = held(precision, ALEXNET)
    print(precision, found)
    assert len(found) == 3
