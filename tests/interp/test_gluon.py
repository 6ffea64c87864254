"""Kernels in Gluon without a GPU: their text by a twin against the oracle, and their binaries."""

import pytest

from graphnet import config
from graphnet.lowering.build.build import try_launches
from graphnet.lowering.launch.config import SHARED_BYTES
from graphnet.lowering.launch.work import take_apart
from graphnet.lowering.targets import interpret
from tests.gluon_cases import CONVS, CONVS_WIDE, GRADS, WIDE, hold, variant_of

pytestmark = pytest.mark.skipif(interpret.problem() is not None, reason="no interpreter here")
ROWS = "gluon_rows"
OFTEN = (0, 1, 3, 11)  # weight gradients whose twin runs in every tier


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with config.override(CACHE_DIR=str(tmp_path_factory.mktemp("cache"))):
        yield


@pytest.mark.parametrize("case, name, tiles", CONVS, ids=str)
def test_a_convolution_is_the_oracle(case, name, tiles):
    hold(case.graph(), name, tiles)


@pytest.mark.parametrize("case, tiles", [
    pytest.param(*c, marks=() if k in OFTEN else pytest.mark.slow) for k, c in enumerate(GRADS)
], ids=str)  # fmt: skip
def test_a_weight_gradient_is_the_oracle(case, tiles):
    hold(case.graph(), ROWS, tiles)


def first_passes(cases):
    """The launches with Gluon kernels of (case, variant, tiles)."""
    out = []
    for case, name, tiles in cases:
        work = take_apart(case.graph().eqns[0], lambda v: v.name)
        v = variant_of(work.problem.op, name)
        out.append(v.launch(work, v.cut(tiles, work.problem))[0])
    return out


def compiled(launches):
    for s, about in zip(launches, try_launches(launches, 90), strict=True):
        if ".gl_" not in s.module:
            continue
        assert "error" not in about, (s.kernel, about["error"][-2000:])
        assert about["wgmma"] and about["tma"] >= 3 and not about["spill_bytes"], (s.kernel, about)
        assert about["shared_bytes"] <= SHARED_BYTES and about["registers"] <= 168


def test_a_kernel_of_each_kind_compiles_for_a_gpu():
    """Rows, pairs back, filters that stay, a weight gradient with its bias: products of warpgroups
    over boxes of the copy engine, no spills."""
    compiled(first_passes([*(CONVS[k] for k in (0, 4, 16)), (GRADS[1][0], ROWS, GRADS[1][1])]))


@pytest.mark.slow
def test_every_case_compiles_for_a_gpu():
    compiled(
        first_passes(
            [*CONVS, *CONVS_WIDE, *((case, ROWS, tiles) for case, tiles in (*GRADS, *WIDE))]
        )
    )
