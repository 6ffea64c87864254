"""docs/tour.md shows what the compiler prints, and not what it printed once."""

from tests import tour


def test_the_page_shows_what_the_code_prints():
    page = tour.PAGE.read_text()
    assert tour.renewed(page) == page, "the tour is out of date: python -m tests.tour"


def test_a_stale_block_is_noticed():
    page = tour.PAGE.read_text()
    stale = page.replace("= conv2d(%x", "= conv3d(%x", 1)
    assert stale != page and tour.renewed(stale) == page
