"""Choices that do not hold: rows that spill, do not compile or are wrong, rules that are wrong."""

import sys
import warnings

import pytest

import graphnet as gn
from graphnet import config
from graphnet.api import kernels_of, lower, settle
from graphnet.lowering import watch
from graphnet.lowering.launch.config import Config
from graphnet.lowering.launch.variants import Problem
from graphnet.lowering.tune import proof, tables, trial

PROBLEM = Problem("linear", (4, 64, 10), "ieee")
GOOD, OTHER = Config(16, 16, 32), Config(32, 16, 32)


@pytest.fixture(autouse=True)
def own_cache(tmp_path):
    with config.override(CACHE_DIR=str(tmp_path / "cache"), TUNE="0"):
        yield


@pytest.fixture
def device(monkeypatch):
    """A GPU that the interpreter stands for."""
    monkeypatch.setattr(proof.torch.cuda, "get_device_name", lambda: "NVIDIA Abacus")


def how(target="interpret", *configs):
    rows = [tables.Entry("pointers", PROBLEM, c, 1.0 + k, "graphnet", "h100", "2026-11-26")
            for k, c in enumerate(configs)]  # fmt: skip
    table = {}
    for row in rows:
        for p, measured in tables.as_table([row]).items():
            table.setdefault(p, []).extend(measured)
    kernels = proof.replace(kernels_of(target, ""), table=table)
    return {"target": target, "precision": "fp32", "kernels": kernels}  # as PROBLEM is


def net():
    return gn.Sequential(gn.Flatten(), gn.Linear(64, 10))


def settled(about, on_gpu):
    model, shape = net(), (4, 1, 8, 8)
    return settle(lower(model, shape, **about), on_gpu, model, shape, **about)[0]


def choice(low):
    return next(s.choice for s in low.plan.parts if s.choice is not None)


def answers(monkeypatch, about):
    """Binaries as `about` says of each launch's BM."""
    monkeypatch.setattr(
        proof, "answers",
        lambda launches, arch: ([("k", about(dict(s.constants)["BM"])) for s in launches], set()),
    )  # fmt: skip


@pytest.mark.parametrize(
    "bad, why", [({"spill_bytes": 8}, "spills 8 bytes in linear_product"),
                 ({"error": "E\nout of resources"}, "does not compile: out of resources")],
)  # fmt: skip
def test_a_row_that_does_not_compile_cleanly_is_refused_and_the_next_one_taken(
    monkeypatch, bad, why
):
    answers(monkeypatch, lambda bm: bad if bm == OTHER.BM else {"spill_bytes": 0})
    with pytest.warns(tables.TuningWarning, match=f"(?s)linear 4x64x10.*{why}.*rules") as said:
        low = settled(how("cuda", OTHER), False)
    assert len(said) == 1 and choice(low).source == "rule"
    with pytest.warns(tables.TuningWarning):
        assert choice(settled(how("cuda", OTHER, GOOD), False)).config == GOOD


def test_a_right_choice_is_proven_once_and_remembered(monkeypatch, device):
    answers(monkeypatch, lambda bm: {"spill_bytes": 0})
    checked = []
    real = proof.checked
    monkeypatch.setattr(proof, "checked", lambda *a: checked.append(1) or real(*a))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice(settled(how("interpret", GOOD), True)).config == GOOD
        assert len(checked) == 1
        settled(how("interpret", GOOD), True)
        assert len(checked) == 1
        settled(how("interpret", OTHER), True)  # another computation
        assert len(checked) == 2
        monkeypatch.setattr(proof.torch.cuda, "get_device_name", lambda: "another")
        settled(how("interpret", GOOD), True)
        assert len(checked) == 3


def wrong_for(monkeypatch, *configs):
    """The kernel forgets the last inputs in these configurations."""
    real = proof.launches

    def broken(eqn, name, kernels):
        out = []
        for s in real(eqn, name, kernels):
            if s.choice is not None and s.choice.config in configs:
                s = proof.replace(s, constants=tuple({**dict(s.constants), "K": 32}.items()))
            out.append(s)
        return out

    monkeypatch.setattr(proof, "launches", broken)


def test_a_wrong_row_is_replaced_by_the_rules_loudly(monkeypatch, device):
    answers(monkeypatch, lambda bm: {"spill_bytes": 0})
    wrong_for(monkeypatch, OTHER)
    with pytest.warns(tables.TuningWarning, match="is wrong on this GPU: .*differs from its refer"):
        low = settled(how("interpret", OTHER), True)
    assert choice(low).source == "rule"


def test_a_wrong_rule_is_an_error(monkeypatch, device):
    answers(monkeypatch, lambda bm: {"spill_bytes": 0})
    low = lower(net(), (4, 1, 8, 8), target="interpret")
    wrong_for(monkeypatch, choice(low).config)
    with pytest.raises(gn.NumericsError, match="pointers of linear 4x64x10.*differs") as e:
        settled(how("interpret"), True)
    assert e.value.layer == "fc1" and "no other choice" in e.value.help


# ---- what may never end ------------------------------------------------------------------------


@pytest.fixture
def waits(monkeypatch, device):
    """A row of a variant that the interpreter is said not to run, and what runs it: the code given
    as the child's, or the real child."""
    answers(monkeypatch, lambda bm: {"spill_bytes": 0})
    low = lower(net(), (4, 1, 8, 8), **how("interpret", OTHER))
    variant = choice(low).variant
    monkeypatch.setattr(type(variant), "interpreted", False)
    low = proof.replace(low, kernels=proof.replace(low.kernels, interpreted=False))

    def wrong(code=None):
        if code is not None:
            monkeypatch.setattr(trial, "COMMAND", (sys.executable, "-c", code))
        return proof._wrong(low)

    return wrong


def test_what_may_never_end_is_first_run_in_a_process_of_its_own(monkeypatch, waits):
    """The child's own copy of the variant is interpreted."""
    monkeypatch.setattr(proof, "checked", lambda *a: pytest.fail("it ran here"))
    assert waits() == {}
    assert waits("raise SystemExit('not asked again')") == {}


@pytest.mark.parametrize(
    "code, why",
    [
        ("import time; time.sleep(60)", "it did not end within 0.5 s in a process of its own"),
        ("raise SystemExit('an illegal access')", "it ended its process (an illegal access)"),
        ("import json; print(json.dumps({'why': 'differs'}))", "is wrong on this GPU: differs"),
    ],
)  # fmt: skip
def test_what_does_not_end_or_is_wrong_there_is_not_taken(monkeypatch, waits, code, why):
    monkeypatch.setattr(trial, "LIMIT_S", 0.5 if "sleep" in code else 60.0)
    ((bad, said),) = waits(code).items()
    assert bad.config == OTHER and why in said


def test_what_never_ends_and_is_no_row_is_an_error(monkeypatch, device):
    """A variant that a test or the tuner asks for: nothing stands in for it."""
    answers(monkeypatch, lambda bm: {"spill_bytes": 0})
    monkeypatch.setattr(trial, "COMMAND", (sys.executable, "-c", "raise SystemExit('a fault')"))
    low = lower(net(), (4, 1, 8, 8), **how("interpret"))
    monkeypatch.setattr(type(choice(low).variant), "interpreted", False)
    low = proof.replace(low, kernels=proof.replace(low.kernels, interpreted=False))
    with pytest.raises(gn.NumericsError, match="it ended its process .a fault.") as e:
        proof._wrong(low)
    assert e.value.layer == "fc1"


@pytest.mark.parametrize(
    "name, processors, key",
    [
        ("NVIDIA H100 80GB HBM3", 132, "h100"), ("NVIDIA H200", 132, "h200"),
        ("NVIDIA H100 PCIe", 114, "h100-pcie-114"),
        ("NVIDIA A100-SXM4-80GB", 108, "a100-sxm4-80gb-108"),
    ],
)  # fmt: skip
def test_a_gpu_is_a_model_with_its_processors(name, processors, key):
    assert watch.key_named(name, processors) == key
    assert watch.gpu_named(name, processors) == (key if len(key) == 4 else None)


def test_an_unknown_gpu_gets_the_rules():
    assert kernels_of("cuda", "a100").table == {}
    low = lower(net(), (4, 1, 8, 8), target="cuda", kernels=kernels_of("cuda", "a100"))
    assert choice(low).source == "rule"
