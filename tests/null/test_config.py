"""Flags and errors: what they read, and what they say when it is wrong."""

import pytest

from graphnet import config, errors
from graphnet.errors import ConfigError, ShapeError
from graphnet.ir.graph import Where


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in config.FLAGS:
        monkeypatch.delenv(f"GRAPHNET_{name}", raising=False)


def test_exactly_the_documented_flags():
    assert list(config.FLAGS) == [
        "DEBUG", "DUMP", "DISABLE", "CHECK", "TUNE", "STREAMS", "NCCL_CAPTURE", "CACHE_DIR",
        "DATA",
    ]  # fmt: skip
    assert all(text and "\n" not in text for text in config.FLAGS.values())


def test_defaults():
    assert (config.debug(), config.check(), config.tune()) == (0, False, False)
    assert config.streams() == 1
    assert config.dump_dir() == "" and config.disabled() == () and config.data_dir() is None
    assert config.cache_dir().name == "graphnet"


def test_environment_and_override(monkeypatch):
    monkeypatch.setenv("GRAPHNET_DEBUG", "1")
    assert config.debug() == 1
    with config.override(DEBUG="3", CHECK="1"):
        assert config.debug() == 3 and config.check()
        with config.override(DEBUG="0"):
            assert config.debug() == 0 and config.check()
        assert config.debug() == 3
    assert config.debug() == 1 and not config.check()


def test_override_ends_with_an_error():
    with pytest.raises(ZeroDivisionError), config.override(TUNE="1"):
        raise ZeroDivisionError
    assert not config.tune()


@pytest.mark.parametrize(
    ("name", "value"),
    [("DEBUG", "5"), ("DEBUG", "-1"), ("DEBUG", "yes"), ("CHECK", "2"), ("STREAMS", "-1"),
     ("STREAMS", "two"), ("STREAMS", "1.5"), ("STREAMS", "1025")],
)  # fmt: skip
def test_bad_values_name_the_flag_and_the_range(name, value):
    match = rf"GRAPHNET_{name}='{value}'"
    with config.override(**{name: value}), pytest.raises(ConfigError, match=match):
        getattr(config, name.lower())()


def test_unknown_flag():
    with pytest.raises(ConfigError, match="unknown flag 'DEBG'"), config.override(DEBG="1"):
        pass


def test_disable_takes_passes_and_rules():
    with config.override(DISABLE="cse, dce"):
        assert config.disabled() == ("cse", "dce")
    with config.override(DISABLE="relu(conv2d(x,w,b)) => fused; dce"):
        assert config.disabled() == ("relu(conv2d(x,w,b)) => fused", "dce")


def test_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert config.cache_dir() == tmp_path / "graphnet"
    monkeypatch.setenv("GRAPHNET_CACHE_DIR", "elsewhere")
    assert str(config.cache_dir()) == "elsewhere"


def test_an_error_says_what_where_and_how_to_mend_it():
    error = ShapeError("5 rows, expected 6", layer="conv1", where="lenet.py:12", help="pad by 1")
    assert str(error) == "layer 'conv1' (lenet.py:12): 5 rows, expected 6\n  help: pad by 1"
    assert str(ShapeError("m", where="a.py:1")) == "a.py:1: m" and str(ShapeError("m")) == "m"


def test_a_place_in_a_net_locates_an_error():
    error = ShapeError("m", **Where(("conv1", "relu1"), "a.py:1", "fuse").located)
    assert (error.layer, error.where) == ("conv1, relu1", "a.py:1")
    assert str(ShapeError("m", **Where().located)) == "m"


def test_all_errors_have_one_base():
    own = [v for v in vars(errors).values() if getattr(v, "__module__", "") == errors.__name__]
    kinds = [v for v in own if isinstance(v, type) and v is not errors.Stopped]  # no error
    assert len(kinds) > 10 and all(issubclass(k, errors.GraphnetError) for k in kinds)
    assert all(k.__doc__ for k in kinds)
    assert not issubclass(errors.Stopped, Exception)  # no handler of errors may catch a signal
