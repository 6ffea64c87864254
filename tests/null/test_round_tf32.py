"""Rounding to TF32: the arithmetic, what it does to products, where the precision pass puts it."""

import struct

import pytest
import torch

import graphnet as gn
from graphnet.api import lower
from graphnet.errors import DTypeError
from graphnet.ir.op import get_op
from graphnet.ir.types import TensorType, bf16
from graphnet.ops.round_tf32 import rounded
from tests.case import attrs
from tests.cases_elementwise import nearest_tf32

SGD = {"loss": gn.CrossEntropyLoss(), "optimizer": gn.SGD(lr=0.1, momentum=0.9)}
PRODUCT, BIAS = 3.5e-4, 2e-5


def bits(pattern):
    return struct.unpack("f", struct.pack("I", pattern))[0]


@pytest.mark.parametrize(
    "given, wanted",
    [
        (0x3F801000, 0x3F800000),  # halfway: to the even neighbour below
        (0x3F803000, 0x3F804000),  # halfway: to the even neighbour above
        (0x3F801001, 0x3F802000),
        (0xBF801001, 0xBF802000),
        (0x3FFFFFFF, 0x40000000),  # into the next power of two
        (0x80000000, 0x80000000),
        (0x00001001, 0x00002000),  # denormal
        (0x7F7FFFFF, 0x7F800000),  # above the largest number
        (0x7F800000, 0x7F800000),
        (0xFF800000, 0xFF800000),
    ],
)
def test_bits(given, wanted):
    got = rounded(torch.tensor([bits(given)])).view(torch.int32).item() & 0xFFFFFFFF
    assert got == wanted


@pytest.mark.parametrize("pattern", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800001])
def test_a_nan_stays_one(pattern):
    """CUDA's own NaN is 0x7fffffff: rounded like a number it would become -0."""
    given = torch.tensor([pattern - (pattern >> 31 << 32)], dtype=torch.int32).view(torch.float32)
    assert rounded(given).isnan().all()


def test_it_is_the_nearest():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, generator=g) * 10.0 ** torch.randint(-20, 20, (100_000,), generator=g)
    assert torch.equal(rounded(x), nearest_tf32(x))
    assert torch.equal(rounded(x.double()), nearest_tf32(x).double())
    assert torch.equal(rounded(rounded(x)), rounded(x))


def test_it_takes_fp32_alone():
    with pytest.raises(DTypeError, match="takes f32, got bf16"):
        get_op("round_tf32").infer(attrs("round_tf32"), TensorType(bf16, (2,)))


def cut(x):
    return (x.float().view(torch.int32) & -8192).view(torch.float32).to(x.dtype)


PRODUCTS = {
    "conv2d": (((16, 64, 6, 6), (64, 64, 3, 3)), {}),
    "conv2d_dgrad": (((16, 64, 6, 6), (64, 64, 3, 3)), {"input_size": (8, 8)}),
    "conv2d_wgrad": (((16, 64, 8, 8), (16, 64, 6, 6)), {"kernel": (3, 3)}),
    "linear": (((128, 500), (200, 500)), {}),
    "linear_dgrad": (((128, 500), (500, 200)), {}),
    "linear_wgrad": (((500, 200), (500, 200)), {}),
}


@pytest.mark.parametrize("op", PRODUCTS)
def test_a_product_of_rounded_operands_has_no_bias(op):
    """Cut operands shrink it by 7e-4: that is what the tensor cores do to what is not rounded."""
    shapes, given = PRODUCTS[op]
    g = torch.Generator().manual_seed(3)
    a, b = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    at = attrs(op, math="tf32", **given)

    def error(change):
        want = get_op(op).reference(at, a, b)[0]
        got = get_op(op).reference(at, change(a), change(b))[0]
        return (got - want).norm() / want.norm(), ((got - want) * want).sum() / want.square().sum()

    size, bias = error(rounded)
    assert size <= PRODUCT and abs(bias) <= BIAS
    size, bias = error(cut)
    assert size > PRODUCT and bias < -20 * BIAS


def joint(model, shape, precision="tf32"):
    return lower(model, shape, target="cuda", precision=precision, **SGD).stages.joint


def test_operands_of_products_are_rounded_and_nothing_else():
    torch.manual_seed(0)
    net = gn.Sequential(
        gn.Conv2d(3, 8, 3), gn.Tanh(), gn.MaxPool2d(2), gn.Conv2d(8, 8, 3), gn.ReLU(),
        gn.Flatten(), gn.Linear(32, 16), gn.ReLU(), gn.Dropout(0.5), gn.Linear(16, 5),
    )  # fmt: skip
    graph = joint(net, (2, 3, 10, 10))
    made = graph.producers
    copies = {i.value for i in graph.inputs if i.role == "derived"}
    assert {v.name for v in copies} == {f"{k}.weight.tf32" for k in (0, 3, 6, 9)}

    def round(v):
        while v in made and made[v].op == "reshape":
            v = made[v].inputs[0]
        return v in copies or (v in made and made[v].op == "round_tf32")

    for e in graph.eqns:
        if getattr(e.attrs, "math", None) == "ieee":  # the bias gradient in front of the loss
            assert e.op == "linear_wgrad" and e.outputs[0] is None and not round(e.inputs[1])
        elif getattr(e.attrs, "math", None):
            assert e.attrs.math == "tf32" and all(round(v) for v in e.inputs[:2]), e
            assert not any(round(v) for v in e.inputs[2:])
    # The sign is taken from what is stored for a product; tanh's gradient needs the value itself.
    masks = {e.op: round(e.inputs[0]) for e in graph.eqns if e.op in ("relu_grad", "tanh_grad")}
    assert masks == {"relu_grad": True, "tanh_grad": False}


def test_nothing_is_stored_twice(monkeypatch):
    """relu between products: its rounded value serves the product and the mask."""
    monkeypatch.setenv("GRAPHNET_DISABLE", "regions")  # their results are those of several layers
    net = gn.Sequential(
        gn.Conv2d(8, 8, 3), gn.ReLU(), gn.Conv2d(8, 8, 3), gn.ReLU(), gn.Flatten(), gn.Linear(72, 5)
    )
    fused = lower(net, (2, 8, 7, 7), target="cuda", precision="tf32", **SGD).stages.fused
    for e in fused.eqns:
        if any(p.op in ("conv2d", "linear", "conv2d_dgrad") for p in e.plain):
            assert len(e.results) == 1, e


def test_copies_follow_their_parameters():
    torch.manual_seed(0)
    net = gn.Sequential(gn.Conv2d(1, 4, 3), gn.ReLU(), gn.Flatten(), gn.Linear(64, 3))
    step = gn.compile(net, (2, 1, 6, 6), target="cpu", precision="tf32", **SGD)
    x, y = torch.randn(2, 1, 6, 6), torch.tensor([0, 2])

    def hold():
        for name, p in net.named_parameters():
            if name.endswith("weight"):
                assert torch.equal(step._storage[f"{name}.tf32"], rounded(p.live)), name

    step(x, y)
    hold()
    net.load_state_dict({k: torch.randn_like(v) for k, v in net.state_dict().items()})
    step(x, y)
    hold()
    weight = dict(net.named_parameters())["3.weight"].live
    assert not torch.equal(rounded(weight), weight)
