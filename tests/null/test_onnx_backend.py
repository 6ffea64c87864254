"""ONNX's own backend cases: none is wrong, none crashes, and docs/onnx.md counts them."""

import numpy as np
import onnx
import pytest
from onnx.backend.test import BackendTest

import graphnet as gn
from graphnet.frontends import onnx_backend
from tests.onnx_cases import KINDS, PAGE, counted, page, row, totals
from tests.onnx_models import model

QUICK = {"Conv", "Gemm", "LRN", "Relu", "Concat", "Flatten", "Reshape", "Softmax", "Add", "Dropout",
         "Unsqueeze", "GlobalAveragePool", "Clip", "Sigmoid", "Split"}  # fmt: skip


def test_operators_are_counted_as_the_page_says():
    text = PAGE.read_text(encoding="utf-8")
    counts, found = totals(text), counted("node", QUICK)
    assert set(found) == QUICK
    assert all(row(op, c) in text.splitlines() for op, c in found.items()), (
        "python -m tests.onnx_cases"
    )
    assert counts["node"][0] >= 130 and counts["pytorch-converted"][0] >= 34
    assert all(wrong == crash == 0 for _, _, wrong, crash in counts.values())
    assert not any(c["wrong"] or c["crash"] for c in found.values())


@pytest.mark.slow
def test_every_kind_is_counted_as_the_page_says():
    made = page()
    assert set(totals(made)) == set(KINDS)
    assert made == PAGE.read_text(encoding="utf-8"), "python -m tests.onnx_cases"


@pytest.mark.slow
def test_the_runner_takes_the_backend():
    """One case of each of two operators, as onnx's runner calls them."""
    runner = BackendTest(onnx_backend, __name__)
    names, ran = ("test_relu_cpu", "test_averagepool_2d_ceil_cpu"), 0
    runner.include("|".join(names))
    for case in runner.test_cases.values():
        for name in [n for n in names if hasattr(case, n)]:
            getattr(case(name), name)()
            ran += 1
    assert ran == 2


def test_prepare_and_run():
    found = model([("Mul", "x a", "y", {})], (2, 3), {"a": np.float32(3)})
    x = np.ones((2, 3), np.float32)
    prepared = onnx_backend.prepare(found, "CPU")
    for inputs in ([x], {"x": x}):
        (y,) = prepared.run(inputs)
        assert (y == 3).all()
    assert onnx_backend.run_model(found, [x])[0].dtype == np.float32
    assert onnx_backend.supports_device("CPU") and not onnx_backend.supports_device("TPU")
    sequence = onnx.helper.make_tensor_sequence_value_info("s", onnx.TensorProto.FLOAT, None)
    found.graph.input.append(sequence)
    with pytest.raises(gn.UnsupportedOpError, match="no tensor"):
        onnx_backend.prepare(found).run([x, [x, x]])
