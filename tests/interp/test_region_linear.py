"""Small fully connected layers with the loss and their input gradients as stages of one launch:
against the float64 reference over memory full of NaN, and as sm_90 binaries."""

import pytest
import torch

import graphnet as gn
from graphnet import config
from graphnet.api import lower
from graphnet.lowering.build.build import compile_launches
from graphnet.lowering.launch.choice import forced
from graphnet.lowering.launch.region_linear import RowBlocks
from graphnet.lowering.targets.interpret import interpreted
from graphnet.lowering.tune.alone import Alone
from graphnet.lowering.tune.proof import computed
from graphnet.lowering.watch import TOLERANCE
from graphnet.passes.templates import members_of

SGD = gn.SGD(lr=0.1, momentum=0.9, weight_decay=5e-4)
LOSSES = {
    "cross_entropy": gn.CrossEntropyLoss(label_smoothing=0.1), "hinge": gn.MultiMarginLoss(),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with config.override(CACHE_DIR=str(tmp_path_factory.mktemp("cache"))):
        yield


def net(*sizes):
    layers = [m for a, b in zip(sizes, sizes[1:], strict=False)
              for m in (gn.Linear(a, b), gn.ReLU(), gn.Dropout(0.5))]  # fmt: skip
    return gn.Sequential(*layers[:-2])


def lowered(rows, sizes, target="interpret", **how):
    how = {"precision": "fp32", "loss": LOSSES["cross_entropy"], "optimizer": SGD, **how}
    return lower(net(*sizes), (rows, sizes[0]), target=target, **how)


def regions(low):
    return [(e, steps) for e, steps in computed(low) if steps[0].kernel == "region"]


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "rows, sizes, ranks", [(17, (30, 10, 84, 7), 1), (1, (5, 3, 2), 2), (40, (12, 120, 10), 2)],
    ids=str,
)
def test_against_the_reference(precision, loss, rows, sizes, ranks, monkeypatch):
    """Rows that no block divides, one row, several programs; narrow and wide layers; a mean over
    more rows than a rank has."""
    if precision == "fp32":
        monkeypatch.setitem(TOLERANCE, "ieee", 1e-5)
    with forced("region", BM=16):
        low = lowered(rows, sizes, precision=precision, loss=LOSSES[loss], ranks=ranks)
        found = regions(low)
        ((e, steps),) = found
        ops = [m.op if m.body is None else m.plain[0].op for m in members_of(e)]
        assert len(ops) == 2 * len(sizes) - 2 and "linear_dgrad" in ops  # the first has no dgrad
        assert steps[0].grid[0] == -(-rows // 16)
        alone = Alone(low.plan.graph, e, "interpret")
        with interpreted():
            run, tensor = alone.prepare(steps)
            assert alone.verdict(run, tensor) is None


@pytest.mark.parametrize("way", [
    {}, {"accumulate": 2}, {"clip_norm": 0.1}, {"nonfinite": "skip"}, {"optimizer": None},
    {"optimizer": None, "grads": True}, {"optimizer": None, "loss": None},
], ids=str)  # fmt: skip
def test_whole_programs(way):
    """The same as launches of their own, fewer live rows among them."""

    def run(**flags):
        torch.manual_seed(3)
        model = net(30, 20, 10)
        with config.override(**flags):
            how = {"loss": LOSSES["cross_entropy"], "optimizer": SGD, **way}
            program = gn.compile(model, (20, 30), target="interpret", precision="fp32", **how)
        draw = torch.Generator().manual_seed(1)
        out = []
        for rows in (20, 13):
            x, y = torch.randn(rows, 30, generator=draw), torch.randint(10, (rows,), generator=draw)
            given = program(x) if how["loss"] is None else program(x, y)
            given = given if isinstance(given, tuple) else (given,)
            for g in given:
                out += list(g.values()) if isinstance(g, dict) else [torch.as_tensor(float(g))
                        if g.numel() == 1 else g]  # fmt: skip
        return out, list(model.state_dict().values()), program.plan

    with forced("region", BM=16):
        got, state, plan = run(CHECK="1")
    want, other, apart = run(DISABLE="row_blocks,groups")
    assert len(plan.launches) < len(apart.launches)
    assert any(s.kernel == "region" for s in plan.parts)
    for a, b in zip(got + state, want + other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_wide_layers_stay_alone_and_why_says_so():
    low = lowered(128, (4096, 4096, 10), target="cuda")
    assert not [e for e, _ in regions(low) if any(4096 in v.type.shape for v in e.inputs)]
    said = " ".join(low.stages.log.refusals.values())
    assert "one launch would take about" in said
    classes = lowered(16, (16, 16, 2000), target="cuda")
    assert "2000 classes does not stay in registers" in " ".join(
        classes.stages.log.refusals.values()
    )


def test_it_can_be_left_out():
    with config.override(DISABLE=RowBlocks.name):
        assert not regions(lowered(17, (30, 10, 7)))


@pytest.mark.parametrize(
    "precision", ["fp32", *(pytest.param(p, marks=pytest.mark.slow) for p in ("tf32", "bf16"))]
)
def test_it_compiles_without_spills(precision):
    low = lowered(128, (400, 120, 84, 10), target="cuda", precision=precision)
    made = [s for s in low.plan.parts if s.kernel == "region"]
    assert made
    for _, about in compile_launches(made)[0]:
        assert about["spill_bytes"] == 0 and about["float_atomics"] == 0
