"""Tests that read real data sets skip, and say so, where GRAPHNET_DATA names none."""

import pytest

from graphnet import config

NO_DATA = pytest.mark.skip(reason="needs GRAPHNET_DATA, a folder with the real data sets")


def pytest_collection_modifyitems(items):
    if config.data_dir() is None:
        for item in items:
            if item.get_closest_marker("data"):
                item.add_marker(NO_DATA)
