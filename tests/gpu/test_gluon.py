"""Kernels with specialised warps on the GPU: at every border, and the tiles that a table names.

benchmarks/gpu.sh runs this file first and alone: warps that wait for one another may wait for ever.
"""

import pytest

from graphnet import config
from tests.gluon_cases import CONVS, CONVS_WIDE, GRADS, WIDE, hold


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with config.override(CACHE_DIR=str(tmp_path_factory.mktemp("cache"))):
        yield


@pytest.mark.parametrize("case, name, tiles", [*CONVS, *CONVS_WIDE], ids=str)
def test_a_convolution_is_the_oracle(case, name, tiles):
    hold(case.graph(), name, tiles, "cuda")


@pytest.mark.parametrize("case, tiles", [*GRADS, *WIDE], ids=str)
def test_a_weight_gradient_is_the_oracle(case, tiles):
    hold(case.graph(), "gluon_rows", tiles, "cuda")
