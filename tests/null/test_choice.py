"""Which variant computes what: errors that name the layer, and rules that make no candidates."""

import pytest

import graphnet as gn
from graphnet.api import lower
from graphnet.errors import UnsupportedOpError
from graphnet.lowering.launch.loss import MOST_CLASSES
from graphnet.lowering.launch.products import Product
from graphnet.lowering.launch.registry import VARIANTS
from graphnet.lowering.launch.variants import Problem

PROBLEMS = {
    "conv2d": Problem("conv2d", (128, 64, 27, 27, 96, 5, 5, 1, 1, 2, 2, 2, 2, 1, 1, 1), "bf16"),
    "linear": Problem("linear", (128, 4096, 1000), "bf16"),
}
PROBLEMS |= {f"{op}_{g}": Problem(f"{op}_{g}", p.shape, p.dtype)
             for op, p in PROBLEMS.copy().items() for g in ("dgrad", "wgrad")}  # fmt: skip


def test_too_many_classes_name_the_layer_and_both_numbers():
    net = gn.Sequential(gn.Flatten(), gn.Linear(8, MOST_CLASSES + 1))
    how = {"target": "cuda", "loss": gn.CrossEntropyLoss(), "grads": True}
    with pytest.raises(UnsupportedOpError, match="4097 classes, at most 4096") as caught:
        lower(net, (2, 2, 2, 2), **how)
    assert "loss" in caught.value.layer and "cpu" in caught.value.help
    assert lower(net, (2, 2, 2, 2), **{**how, "target": "cpu"})


@pytest.mark.parametrize("variant", [v for v in VARIANTS if isinstance(v, Product)],
                         ids=lambda v: f"{v.name} {v.ops[0]}")  # fmt: skip
def test_a_rule_is_the_first_configuration_and_makes_no_other(variant, monkeypatch):
    for op in variant.ops:
        first, *others = variant.configs(PROBLEMS[op])
        assert others and first not in others and len(set(others)) == len(others)

        def refused(self, p, first):
            raise AssertionError("a candidate was made")
            yield

        with monkeypatch.context() as m:
            m.setattr(type(variant), "_grid", refused)
            assert variant.rule(PROBLEMS[op]) == first
            with pytest.raises(AssertionError, match="was made"):
                list(variant.configs(PROBLEMS[op]))
