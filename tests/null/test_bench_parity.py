"""Parity of `graphnet bench`: both sides beside an exact twin, and planted errors that show."""

import math

import pytest
import torch

import graphnet as gn
from graphnet.bench import ours, parity
from graphnet.bench.parity import FACTOR, SLACK, Error
from tests.benching import every_layer, one_thread, work  # noqa: F401

LAST = "11.weight"  # behind no pool and no relu: its own rounding is its error


def plain(work):
    return ours.compiled(work, "cpu", alone=False)


def trained_with(**wrong):
    """A program whose update is another one than the work asks for."""

    def program(work):
        sgd = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4} | wrong
        return gn.compile(
            work.net, tuple(work.x.shape), target="cpu", loss=gn.CrossEntropyLoss(),
            optimizer=gn.SGD(**sgd), precision=work.precision,
        )  # fmt: skip

    return program


def named(found):
    return {e.name: e for e in found.errors}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_parity_does_not_depend_on_luck(precision, seed):
    torch.manual_seed(seed)
    found = parity.check(work(precision=precision), plain)
    assert found.ok and found.reference == "float64", f"{found.table()}\n{found}"
    assert all(e.allowed == FACTOR * e.torch + SLACK for e in found.errors if e.name != "loss")
    if precision == "fp32":
        assert all(e.ours < 1e-5 for e in found.errors)
    else:  # what flips a maximum is no error of one side: both are this far off
        assert named(found)["0.weight"].torch > 1e-2 and 1e-3 < named(found)[LAST].ours < 1e-2


@pytest.mark.parametrize(
    "wrong", [{"momentum": 0.89}, {"weight_decay": 0.0}, {"nesterov": True}, {"lr": 0.0101}]
)
def test_a_wrong_update_is_no_parity(wrong):
    found = parity.check(work(), trained_with(**wrong))
    assert not found.ok and named(found)["loss"].ok and "THE TWO DIFFER" in str(found)
    assert not named(found)[LAST].ok and "too much" in found.table()


@pytest.mark.parametrize("wrong", [{"momentum": 0.88}, {"nesterov": True}, {"lr": 0.0102}])
def test_a_wrong_update_shows_beside_the_rounding_of_bf16(wrong):
    assert not parity.check(work(precision="bf16"), trained_with(**wrong)).ok


def test_a_stale_copy_of_the_weights_is_no_parity():
    """Each step right for the weights that it sees: they are those of the step before."""

    class Stale:
        def __init__(self, work):
            self.net, self.real, self.seen = work.net, plain(work), []
            self.optimizer = self.real.optimizer

        def __call__(self, x, y):
            self.seen.append(self.net.state_dict())
            self.net.load_state_dict(self.seen[max(0, len(self.seen) - 2)])
            return self.real(x, y)

    assert not parity.check(work(), Stale).ok


def test_momentum_that_is_not_kept_is_no_parity():
    class Forgets:
        """Right parameters, but the buffer stays what it was."""

        def __init__(self, work):
            self.real = plain(work)
            self.optimizer = self.real.optimizer

        def __call__(self, x, y):
            before = self.optimizer.state_dict()
            loss = self.real(x, y)
            after = self.optimizer.state_dict()
            self.optimizer.load_state_dict({k: before[k] if "buffer" in k else v
                                            for k, v in after.items()})  # fmt: skip
            return loss

    found = parity.check(work(), Forgets, 1)
    assert found.steps == 1 + 2 * parity.MORE
    assert named(found)[LAST].ours == pytest.approx(1.0)


def spoilt(share, key=LAST):
    """Our program with an error of a share of its norm in the logits, or in one gradient."""

    def program(work):
        real = ours.compiled(work, "cpu")

        def off(t):
            g = torch.Generator().manual_seed(7)
            noise = torch.randn(t.shape, generator=g)
            return t + share * noise * (t.norm() / noise.norm())

        def run(*feed):
            out = real(*feed)
            if work.mode == "infer":
                return off(out)
            return out[0], {k: off(v) if k == key else v for k, v in out[1].items()}

        return run

    return program


@pytest.mark.parametrize("mode, name", [("infer", "logits"), ("grads", LAST)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_error_a_little_above_torchs_own_is_no_parity(precision, mode, name):
    """Planted in proportion to what the precision costs torch. On a CPU torch has no TF32."""
    w = work(mode, precision)
    clean = parity.check(w, spoilt(0.0))
    assert clean.ok
    torchs = named(clean)[name].torch
    for share, ok in ((0.8 * torchs, True), (2.5 * torchs + 2 * SLACK, False)):
        found = parity.check(w, spoilt(share))
        assert found.ok is ok, f"{found.table()}\n{found}"
        assert named(found)[name].ours == pytest.approx(
            math.hypot(share, named(clean)[name].ours), rel=0.25
        )
        assert all(e.ok for e in found.errors if e.name != name)


@pytest.mark.parametrize("bad, steps, ok", [(3, 20, True), (12, 35, True), (13, 35, False)])
def test_bad_luck_in_a_few_batches_is_followed_by_more(bad, steps, ok):
    """Of 5 batches, and then of 15 smaller ones, the first are bad; the median decides. Where all 5
    are bad, 15 more whole ones say whether all of them are."""
    batches = iter(range(35))

    def program(work):
        good, wrong = spoilt(0.0)(work), spoilt(0.1)(work)
        return lambda *feed: (wrong if next(batches) < bad else good)(*feed)

    found = parity.check(work("grads"), program)
    assert found.steps == steps and found.ok is ok


def test_no_number_is_no_parity():
    found = parity.check(work("infer"), spoilt(math.nan))
    assert not found.ok and found.as_dict()["errors"][0]["ours"] is None
    assert not Error("x", math.nan, 1.0, 1.5).ok


def test_parity_without_dropout_leaves_the_net_alone():
    net = every_layer()
    assert [m.p for m in parity.without_dropout(net).modules() if hasattr(m, "p")] == [0.0]
    assert [m.p for m in net.modules() if hasattr(m, "p")] == [0.5]


def test_an_error_in_the_last_rows_is_no_parity():
    """Batches of fewer rows, which a refusal is followed by, do not have it."""

    def program(work):
        good, wrong = spoilt(0.0)(work), spoilt(0.1)(work)
        return lambda x, y: (wrong if len(x) == len(work.x) else good)(x, y)

    found = parity.check(work("grads"), program)
    assert found.steps == 35 and [e.name for e in found.errors if not e.ok] == [LAST]
