"""The weight gradient by filter rows on the GPU, at every border, with the tiles of wgmma."""

import pytest

from graphnet import config
from tests.wgrads import CASES, TILES, hold


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with config.override(CACHE_DIR=str(tmp_path_factory.mktemp("cache"))):
        yield


@pytest.mark.parametrize("row, c", [*CASES, *TILES])
def test_it_is_the_oracle(row, c):
    hold(row, c, "cuda")
