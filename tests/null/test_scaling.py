"""What `inspect --ranks` says: formulas, and what the plan hides of the messages."""

import json

import pytest
from typer.testing import CliRunner

from graphnet.cli import app
from graphnet.errors import ConfigError
from graphnet.scaling import SHARE, START_US, link_of, ring_us, tree_us


def test_formulas():
    link = link_of("ib")
    rate = SHARE * 50e9
    assert ring_us("all_reduce", 10**8, 4, link) == pytest.approx(
        START_US + 1e6 * 1.5 * 1e8 / rate + 6 * 14
    )
    assert ring_us("all_gather", 10**8, 4, link) == pytest.approx(
        START_US + 1e6 * 0.75 * 1e8 / rate + 3 * 14
    )
    assert tree_us(10**8, 1000, link) == pytest.approx(START_US + 1e6 * 2e8 / rate + 20 * 14)
    with pytest.raises(ConfigError, match="no link 'wifi'"):
        link_of("wifi")


def inspected(*args):
    return CliRunner().invoke(app, ["inspect", "lenet5", *args])


def test_inspect_says_what_messages_cost():
    given = ["--train", "--batch", "128", "--precision", "bf16", "--ranks"]
    found = json.loads(inspected(*given, "8", "--json").stdout)["scaling"]
    told, bucket = found["exchanges"]
    assert (told["bytes"], bucket["bytes"], bucket["tensors"]) == (8, 4 * 61706 + 4, 11)
    assert bucket["us"] == min(bucket["ring_us"], bucket["us"])
    assert 0 <= bucket["hidden_us"] <= bucket["us"]
    assert found["step_us"] > found["single_us"] + told["us"]
    assert found["efficiency"] == pytest.approx(found["single_us"] / found["step_us"], abs=1e-3)
    half = json.loads(inspected(*given, "8", "--json", "--reduce", "bf16").stdout)["scaling"]
    assert [e["bytes"] for e in half["exchanges"]] == [8, 4, 2 * 61706]
    slow = inspected(*given, "64", "--link", "eth").stdout
    assert "64 ranks of 128 images, eth" in slow and "by a model" not in slow


def test_what_it_refuses():
    assert inspected("--ranks", "4").exit_code != 0
    assert inspected("--train", "--ranks", "4", "--target", "cpu").exit_code != 0
    assert inspected("--train", "--link", "wifi").exit_code != 0
