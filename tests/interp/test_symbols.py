"""Broadcast operands and gates in generated code, forward and backward, against the cpu target."""

import pytest
import torch

import graphnet as gn
from tests.null.test_symbols import FUNCTIONS, SHAPE, Both

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("at", [0, 6, 7])
def test_a_function_of_broadcast_operands(at, precision):
    torch.manual_seed(0)
    net = Both(FUNCTIONS[at])
    x, y = torch.randn(SHAPE), torch.tensor([0, 2, 1, 1])
    how = dict(loss=gn.CrossEntropyLoss(), grads=True)
    want = gn.compile(net, SHAPE, target="cpu", **how)(x, y)[1]
    got = gn.compile(net, SHAPE, target="interpret", precision=precision, **how)(x, y)[1]
    most = {"fp32": 1e-5, "bf16": 4e-2}[precision]
    for key, w in want.items():
        assert (got[key] - w).norm() <= most * max(float(w.norm()), 0.1), key
