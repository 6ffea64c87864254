"""The weight gradient by filter rows compiled for sm_90: AlexNet's five layers at batch 128."""

import re

import pytest

import graphnet as gn
from graphnet.api import lower
from graphnet.ir.text import parse
from graphnet.lowering.build.build import compile_launches
from graphnet.lowering.launch.config import SHARED_BYTES
from graphnet.lowering.launch.files import private_dir
from graphnet.lowering.launch.wgrad_rows import WgradRows
from graphnet.lowering.launch.work import take_apart

pytestmark = pytest.mark.usefixtures("own_cache")

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")


@pytest.fixture(scope="module")
def works():
    """The weight gradients by layer, with parameters and momentum channels-last."""
    net = gn.models.alexnet()
    low = lower(
        net, (128, 3, 227, 227), target="cuda", precision="bf16", loss=gn.CrossEntropyLoss(),
        optimizer=gn.SGD(lr=0.01, momentum=0.9, weight_decay=5e-4),
    )  # fmt: skip
    filters = re.compile(r"(f32\[\d+,\d+,\d+,\d+\])(?!\{)")
    graph = parse(filters.sub(r"\1{nhwc}", str(low.plan.graph)))
    layers = {}
    for e, named in zip(graph.eqns, low.plan.graph.eqns, strict=True):
        if "conv2d_wgrad" in str(e):
            (layer,) = set(named.where.layers) & set(LAYERS)
            layers[layer] = take_apart(e, str)
    assert set(layers) == set(LAYERS)
    return layers


def binaries(launches):
    """(what is known, PTX) of each launch's binary."""
    found, _ = compile_launches(launches)
    folder = private_dir("binaries")
    return [(about, (folder / f"{key}.ptx").read_text()) for key, about in found]


def test_the_rules_tiles_of_every_layer(works):
    rows = WgradRows()
    steps = {}
    for layer, work in works.items():
        assert rows.accepts(work.eqn, work.layouts, "bf16", 90) is None
        steps[layer] = rows.launch(work, rows.rule(work.problem))
    found = binaries([s for pair in steps.values() for s in pair])
    for layer, (first, second) in zip(
        steps, zip(found[::2], found[1::2], strict=True), strict=True
    ):
        for about, _ in (first, second):
            assert (about["spill_bytes"], about["float_atomics"]) == (0, 0), layer
            assert about["shared_bytes"] <= SHARED_BYTES, layer
        about, ptx = first
        assert about["wgmma"] > 0 < about["tma"] and about["mma"] == about["cp_async"] == 0, layer
        # In both loops every product is on its way while the next boxes are asked for.
        waits = re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx)
        assert len([w for w in waits if w != "0"]) == 2 and len(waits) == 4, (layer, waits)
        # Partial tiles leave 16 bytes at a time; alone, the sums of dy do not.
        stores = re.findall(r"st\.global\.(\S+)", ptx)
        assert stores.count("v4.b32") >= 36 and set(stores) <= {"v4.b32", "b32"}, layer
        assert stores.count("b32") <= 2, layer


def test_the_second_pass_reads_and_writes_16_bytes_a_thread(works):
    """Parts, weight, momentum; the bf16 copy 8. Table, rates and the guard are scalars. conv1's
    filter rows are 33 values, which no 16-byte access fits."""
    rows = WgradRows()
    seconds = {k: rows.launch(w, rows.rule(w.problem))[1] for k, w in works.items()}
    for layer, (_, ptx) in zip(seconds, binaries(list(seconds.values())), strict=True):
        loads = re.findall(r"ld\.global\.(\S+)", ptx)
        stores = re.findall(r"st\.global\.(\S+)", ptx)
        if layer == "conv1":
            assert loads.count("v4.b32") >= dict(seconds[layer].constants)["UNROLL"]
            continue
        assert set(stores) <= {"v4.b32", "v2.b32"} and stores, (layer, stores)
        assert loads.count("b32") <= 12 and loads.count("v4.b32") > 10, (layer, loads)


@pytest.mark.slow
def test_no_form_spills(works):
    """Every form that the rules or a search may take, with the sums of dy."""
    rows, work = WgradRows(), works["conv4"]
    forms = list(rows.configs(work.problem))
    for c, (about, _) in zip(
        forms, binaries([rows.launch(work, c)[0] for c in forms]), strict=True
    ):  # fmt: skip
        assert (about["spill_bytes"], about["cp_async"], about["mma"]) == (0, 0, 0), c
        assert about["shared_bytes"] <= SHARED_BYTES and about["wgmma"] > 0 < about["tma"], c
