"""The weight gradient by filter rows on the GPU, at every border, with the tiles of wgmma."""

import pytest

from tests.wgrads import CASES, TILES, hold

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("row, c", [*CASES, *TILES])
def test_it_is_the_oracle(row, c):
    hold(row, c, "cuda")
