"""Tests that read real data sets skip, and say so, where GRAPHNET_DATA names none; a cache for a
module; a command line as a function."""

import pytest

from graphnet import config

NO_DATA = pytest.mark.skip(reason="needs GRAPHNET_DATA, a folder with the real data sets")


def pytest_collection_modifyitems(items):
    if config.data_dir() is None:
        for item in items:
            if item.get_closest_marker("data"):
                item.add_marker(NO_DATA)


@pytest.fixture
def cli(capsys):
    """Runs a command line: (exit code, stdout, stderr)."""
    from graphnet.cli import main

    def call(*argv):
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in argv])
        return end.value.code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """One cache for the module: what was built once stays built."""
    with config.override(CACHE_DIR=str(tmp_path_factory.mktemp("cache"))):
        yield


@pytest.fixture
def single_kernels(monkeypatch):
    """What tests of one kernel family ask for: no regions, and no groups of launches."""
    monkeypatch.setenv("GRAPHNET_DISABLE", "regions,groups")
