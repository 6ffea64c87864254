"""The oracle against torch, the gradients against autograd and finite differences, the cpu twins
against the oracle, and what `infer` refuses."""

import inspect
import math

import numpy as np
import pytest
import torch

from graphnet.errors import ConfigError, DTypeError, GraphnetError, ShapeError
from graphnet.ir.graph import Builder
from graphnet.ir.op import Op, all_ops, get_op
from graphnet.ir.text import parse
from graphnet.ir.types import TensorType, bf16, f32, i32, i64
from graphnet.ops.adam import Adam, AdamW
from graphnet.ops.evaluate import evaluate, evaluate_step
from graphnet.ops.loss import CrossEntropyLoss, MultiMarginLoss
from graphnet.ops.philox import dropout_mask, philox4x32, stream_of, threshold
from graphnet.ops.update import SGD
from tests.case import attrs, fill
from tests.cases import CASES
from tests.philox import philox_scalar

by_id = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
with_gradient = pytest.mark.parametrize(
    "case", [c for c in CASES if c.wrt is not None], ids=lambda c: c.id
)


def close(got, want, exact=False, **tolerance):
    if exact:
        assert got.dtype == want.dtype and torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want, **tolerance)


# ---- the table -------------------------------------------------------------------------------


def test_every_op_has_a_row_and_a_reference():
    ops = {n: op for n, op in all_ops().items() if n != "fused"}
    assert set(ops) == {c.op for c in CASES}
    for name, op in ops.items():
        assert type(op).reference is not Op.reference, name
        assert type(op).__doc__, name
        assert type(op).elementwise <= hasattr(op, "emit"), f"{name} has no expression"


def test_case_names_are_unique():
    assert len({c.id for c in CASES}) == len(CASES)


@by_id
def test_reference_is_torch(case):
    args = case.operands()
    got = get_op(case.op).reference(case.attrs, *args)
    for g, want in zip(got, case.expected(args), strict=False):
        if want is not None:
            close(g, want, case.exact)


@by_id
def test_types_are_those_of_the_results(case):
    args = case.operands(torch.float32)
    types = get_op(case.op).infer(case.attrs, *case.ins)
    got = get_op(case.op).reference(case.attrs, *args)
    assert [t.shape for t in types] == [tuple(g.shape) for g in got]
    # Where no operand says in which precision, the oracle may answer in float64.
    free = not any(t.dtype.is_float for t in case.ins)
    for t, g in zip(types, got, strict=True):
        assert g.dtype == t.dtype.torch or (free and g.dtype == torch.float64)


@by_id
def test_reference_leaves_its_operands_alone(case):
    args = case.operands()
    for mode in ("reference", "cpu"):
        before = [a.clone() for a in args]
        getattr(get_op(case.op), mode)(case.attrs, *args)
        assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True)), mode


@by_id
def test_attributes_print_and_parse(case):
    b = Builder("g")
    ins = [b.input(f"i{k}", t) for k, t in enumerate(case.ins)]
    outs = b.emit(case.op, ins, case.attrs)
    graph = b.build(*outs)
    assert parse(str(graph)) == graph


@by_id
@pytest.mark.parametrize("last", [False, True], ids=["row", "nhwc"])
def test_cpu_twin_is_the_reference(case, last):
    op, args = get_op(case.op), case.operands(torch.float32)
    want = op.reference(case.attrs, *case.operands())
    if last:
        args = [a.contiguous(memory_format=torch.channels_last) if a.ndim == 4 else a for a in args]
    for g, w in zip(op.cpu(case.attrs, *args), want, strict=True):
        assert g.dtype == (torch.float32 if w.is_floating_point() else w.dtype)
        # A sum that cancels is as exact as its terms: the tolerance grows with the result.
        scale = max(1.0, float(w.abs().max())) if w.is_floating_point() else 1.0
        close(g.to(w.dtype), w, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.op.startswith(("conv2d", "linear"))], ids=lambda c: c.id
)
def test_cpu_products_in_bf16(case):
    args = [a.bfloat16() for a in case.operands()]
    want = get_op(case.op).reference(case.attrs, *(a.double() for a in args))
    types = get_op(case.op).infer(case.attrs, *(t.with_dtype(bf16) for t in case.ins))
    for g, w, t in zip(get_op(case.op).cpu(case.attrs, *args), want, types, strict=True):
        assert g.dtype == t.dtype.torch
        error = (g.double() - w).norm() / w.norm()
        assert error < 8e-3, float(error)


# ---- gradients -------------------------------------------------------------------------------


def vjp_graph(case):
    """Operands and cotangents (`c<k>`) in, the cotangents of `case.wrt` out."""
    b = Builder("vjp")
    ins = [b.input(f"i{k}", t) for k, t in enumerate(case.ins)]
    outs = b.emit(case.op, ins, case.attrs)
    # Further results are statistics and indices: nothing that a loss reads.
    cts = [b.input("c0", outs[0].type), *[None] * (len(outs) - 1)]
    needs = [k in case.wrt for k in range(len(ins))]
    grads = get_op(case.op).vjp(b, b.eqns[0], cts, needs)
    assert [g is not None for g in grads] == needs
    for k in case.wrt:
        assert grads[k].type.shape == ins[k].type.shape
    return b.build(*(grads[k] for k in case.wrt)), b, grads


@with_gradient
def test_vjp_is_autograd_and_finite_differences(case):
    graph, _, _ = vjp_graph(case)
    args = case.operands()
    outs = get_op(case.op).reference(case.attrs, *args)
    g = torch.Generator().manual_seed(1)
    cts = [torch.randn(o.shape, generator=g, dtype=torch.float64) for o in outs[:1]]
    feed = {f"i{k}": a for k, a in enumerate(args)} | {f"c{k}": c for k, c in enumerate(cts)}
    got = evaluate(graph, feed)

    leaves = [a.clone().requires_grad_(k in case.wrt) for k, a in enumerate(args)]
    y = case.expected(leaves)[0]
    want = torch.autograd.grad(y, [leaves[k] for k in case.wrt], cts[0])
    for a, b in zip(got, want, strict=True):
        close(a, b, rtol=1e-9, atol=1e-11)

    eps = 1e-6
    for k, a in zip(case.wrt, got, strict=True):
        direction = torch.randn(args[k].shape, generator=g, dtype=torch.float64)
        ends = []
        for sign in (eps, -eps):
            moved = [x + sign * direction if j == k else x for j, x in enumerate(args)]
            ends.append((get_op(case.op).reference(case.attrs, *moved)[0] * cts[0]).sum())
        slope = (ends[0] - ends[1]) / (2 * eps)
        close((a * direction).sum(), slope, rtol=1e-6, atol=1e-7)


@with_gradient
def test_vjp_builds_only_what_is_asked_for(case):
    for wanted in range(len(case.ins)):
        b = Builder("vjp")
        ins = [b.input(f"i{k}", t) for k, t in enumerate(case.ins)]
        outs = b.emit(case.op, ins, case.attrs)
        dy = b.input("dy", outs[0].type)
        cts = [dy] + [None] * (len(outs) - 1)
        needs = [k == wanted and k in case.wrt for k in range(len(ins))]
        grads = get_op(case.op).vjp(b, b.eqns[0], cts, needs)
        assert [g is not None for g in grads] == needs
        if not any(needs):
            assert len(b.eqns) == 1
        # No cotangent in, none out.
        none = get_op(case.op).vjp(b, b.eqns[0], [None] * len(outs), [True] * len(ins))
        assert all(g is None for g in none)


# ---- special values --------------------------------------------------------------------------

SPECIAL = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, 3e38, -1.0])


def test_relu_and_its_gradient_on_special_values():
    for mode in ("reference", "cpu"):
        (y,) = getattr(get_op("relu"), mode)(get_op("relu").attrs_type(), SPECIAL)
        assert torch.equal(y.isnan(), SPECIAL.isnan())
        assert torch.equal(y[1:], torch.relu(SPECIAL)[1:])
        dy = torch.arange(1.0, 9.0)
        (dx,) = getattr(get_op("relu_grad"), mode)(get_op("relu_grad").attrs_type(), y, dy)
        x = SPECIAL.clone().requires_grad_()
        torch.relu(x).backward(dy)
        assert torch.equal(dx, x.grad)


@pytest.mark.parametrize("mode", ["reference", "cpu"])
@pytest.mark.parametrize("kind", ["ties", "nan", "inf", "zeros"])
def test_maxpool_ties_and_special_values(mode, kind):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 3, (2, 3, 7, 7), generator=g).float()
    if kind == "nan":
        x[torch.rand(x.shape, generator=g) < 0.2] = math.nan
    if kind == "inf":
        x[torch.rand(x.shape, generator=g) < 0.6] = -math.inf
        x[0, 0] = -math.inf  # whole windows, also in the padding
    if kind == "zeros":
        x.zero_()
    a = attrs("maxpool2d", kernel=3, stride=2, padding=1)
    y, idx = getattr(get_op("maxpool2d"), mode)(a, x)
    leaf = x.clone().requires_grad_()
    want = torch.nn.functional.max_pool2d(leaf, 3, 2, 1)
    close(y, want.detach(), equal_nan=True, rtol=0, atol=0)
    dy = torch.rand(y.shape, generator=g)
    want.backward(dy)
    grad = attrs("maxpool2d_grad", kernel=3, stride=2, padding=1, input_size=(7, 7))
    (dx,) = getattr(get_op("maxpool2d_grad"), mode)(grad, dy, idx)
    close(dx, leaf.grad)


def test_losses_take_infinite_and_huge_logits():
    z = torch.tensor([[1e4, -1e4, 0.0], [2.0, -math.inf, 1.0]], dtype=torch.float64)
    y, live = torch.tensor([0, 2]), torch.tensor(2, dtype=torch.int32)
    a = attrs("cross_entropy")
    (loss,) = get_op("cross_entropy").reference(a, z, y, live)
    close(loss, torch.nn.functional.cross_entropy(z, y))
    (grad,) = get_op("cross_entropy_grad").reference(a, z, y, live)
    assert grad.isfinite().all()


def test_dead_rows_may_hold_anything():
    for op in ("cross_entropy", "multi_margin"):
        z = torch.randn(4, 3, dtype=torch.float64)
        y, live = torch.tensor([0, 2, 0, 0]), torch.tensor(2, dtype=torch.int32)
        (clean,) = get_op(op).reference(attrs(op), z, y, live)
        z[2:] = 1e6
        (loss,) = get_op(op).reference(attrs(op), z, y, live)
        (grad,) = get_op(f"{op}_grad").reference(attrs(f"{op}_grad"), z, y, live)
        assert torch.equal(loss, clean) and not grad[2:].any() and grad[:2].any()


# ---- randomness ------------------------------------------------------------------------------

# Known answers of the Random123 distribution: counter, key, result.
KNOWN = [
    ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_philox_known_answers(counter, key, want):
    words = philox4x32(*(np.uint64(c) for c in counter), key[0] | key[1] << 32)
    assert tuple(int(w) for w in words) == want
    assert tuple(philox_scalar(counter, key)) == want


def test_dropout_mask_does_not_depend_on_the_batch_split():
    whole = dropout_mask(3, 5, (8, 4, 5), 0.4, "drop1", 8)
    # Rank 1 of 2 sees rows 4..7 of the same step.
    halves = [dropout_mask(3, 10 + r, (4, 4, 5), 0.4, stream_of("drop1"), 4) for r in (0, 1)]
    assert np.array_equal(whole, np.concatenate(halves))
    assert not np.array_equal(whole, dropout_mask(3, 6, (8, 4, 5), 0.4, "drop1", 8))
    assert not np.array_equal(whole, dropout_mask(3, 5, (8, 4, 5), 0.4, "drop2", 8))


def test_dropout_rate():
    kept = dropout_mask(1, 0, (64, 1000), 0.3, "d").mean()
    assert abs(kept - 0.7) < 4 * math.sqrt(0.21 / 64000)
    assert dropout_mask(1, 0, (64, 10), 0.0, "d").all()
    assert threshold(0.5) == 2**31


# ---- graphs, bodies, commits -----------------------------------------------------------------


def test_evaluate_runs_bodies_and_commits():
    graph = parse(
        """graph g(%x: f32[2,1,6,6] data, %w: f32[3,1,3,3] param, %b: f32[3] param,
            %dy: f32[2,3,4,4] data, %lr: f32[] hyper, %wd: f32[] hyper) {
          %y: f32[2,3,4,4] = fused(%x, %w, %b) {
            %c = conv2d(%x, %w, %b); %r = relu(%c); yield %r }
          %w1: f32[3,1,3,3] = fused(%x, %dy, %w, %lr, %wd) {
            %g, _ = conv2d_wgrad(%x, %dy) {kernel=(3,3)};
            %u = sgd_update(%w, %g, %lr, %wd); yield %u }
          commit %w = %w1
          return %y
        }"""
    )
    g = torch.Generator().manual_seed(0)
    feed = {i.value.name: fill(i.value.type, g, torch.float64) for i in graph.inputs}
    feed["lr"], feed["wd"] = torch.tensor(0.1), torch.tensor(0.0)
    w = feed["w"].clone().requires_grad_()
    y = torch.relu(torch.conv2d(feed["x"], w, feed["b"]))
    torch.conv2d(feed["x"], w).backward(feed["dy"])
    for mode in ("reference", "cpu"):
        (got,), commits = evaluate_step(graph, feed, mode)
        close(got, y.detach())
        close(commits["w"], w.detach() - 0.1 * w.grad, rtol=1e-6, atol=1e-7)
    with pytest.raises(GraphnetError, match="%b"):
        evaluate(graph, {k: v for k, v in feed.items() if k != "b"})


# ---- refusals --------------------------------------------------------------------------------


def _t(*shape, dtype=f32):
    return TensorType(dtype, shape)


REFUSED = [
    ("conv2d", {}, (_t(1, 3, 8, 8), _t(4, 2, 3, 3)), ShapeError, ["3 channels", "expects 2"]),
    ("conv2d", {"groups": 2}, (_t(1, 3, 8, 8), _t(4, 1, 3, 3)), ShapeError, ["groups=2", "3", "4"]),
    ("conv2d", {"groups": 2}, (_t(1, 4, 8, 8), _t(3, 2, 3, 3)), ShapeError, ["groups=2", "4", "3"]),
    ("conv2d", {}, (_t(1, 1, 4, 4), _t(1, 1, 5, 5)), ShapeError, ["4x4", "5x5", "0x0"]),
    ("conv2d", {}, (_t(1, 8, 8), _t(4, 1, 3, 3)), ShapeError, ["4-d"]),
    ("conv2d", {}, (_t(1, 1, 8, 8), _t(4, 1, 3, 3), _t(5)), ShapeError, ["f32[5]", "4"]),
    ("conv2d", {}, (_t(1, 1, 8, 8), _t(4, 1, 3, 3, dtype=bf16)), DTypeError, ["bf16", "f32"]),
    ("conv2d_dgrad", {"input_size": (9, 9)}, (_t(1, 4, 6, 6), _t(4, 1, 3, 3)), ShapeError,
     ["f32[1,4,6,6]", "[1, 1, 9, 9]"]),
    ("conv2d_wgrad", {"kernel": 3}, (_t(2, 1, 8, 8), _t(1, 4, 6, 6)), ShapeError,
     ["f32[2,1,8,8]", "f32[1,4,6,6]"]),
    ("linear", {}, (_t(2, 7), _t(3, 8)), ShapeError, ["expects 8", "got 7"]),
    ("linear", {}, (_t(2, 7, 1), _t(3, 7)), ShapeError, ["Flatten"]),
    ("linear_dgrad", {}, (_t(2, 4), _t(3, 7)), ShapeError, ["f32[2,4]", "f32[3,7]"]),
    ("linear_wgrad", {}, (_t(2, 4), _t(3, 7)), ShapeError, ["f32[2,4]", "f32[3,7]"]),
    ("maxpool2d", {"kernel": 3}, (_t(1, 1, 2, 2),), ShapeError, ["2x2", "3x3"]),
    ("maxpool2d", {"kernel": 17}, (_t(1, 1, 20, 20),), ShapeError, ["256"]),
    ("maxpool2d", {"kernel": 2}, (_t(1, 4),), ShapeError, ["4-d"]),
    ("avgpool2d", {"kernel": 3}, (_t(1, 1, 2, 2),), ShapeError, ["2x2", "3x3"]),
    ("avgpool2d_grad", {"kernel": 2, "input_size": (9, 9)}, (_t(1, 1, 2, 2),), ShapeError,
     ["f32[1,1,2,2]", "[1, 1, 9, 9]"]),
    ("add", {}, (_t(2, 3), _t(3, 2)), ShapeError, ["f32[2,3]", "f32[3,2]"]),
    ("add", {}, (_t(2, 3), _t(2, 3, dtype=bf16)), DTypeError, ["f32", "bf16", "cast"]),
    ("relu", {}, (_t(2, 3, dtype=i64),), DTypeError, ["i64"]),
    ("relu_grad", {}, (_t(2, 3), _t(2, 4)), ShapeError, ["f32[2,3]", "f32[2,4]"]),
    ("reshape", {"shape": (7,)}, (_t(2, 3),), ShapeError, ["6 elements", "7"]),
    ("slice", {"axis": 1, "start": 2, "stop": 9}, (_t(2, 3),), ShapeError, ["2:9"]),
    ("slice", {"axis": 2, "start": 0, "stop": 1}, (_t(2, 3),), ShapeError, ["no axis 2"]),
    ("concat", {"axis": 1}, (_t(2, 3), _t(3, 3)), ShapeError, ["f32[3,3]", "f32[2,3]"]),
    ("cross_entropy", {}, (_t(2, 3, 4), _t(2, dtype=i64), _t(dtype=i32)), ShapeError, ["Flatten"]),
    ("cross_entropy", {}, (_t(2, 3), _t(3, dtype=i64), _t(dtype=i32)), ShapeError, ["i64[3]"]),
    ("cross_entropy", {}, (_t(2, 3), _t(2, dtype=i32), _t(dtype=i32)), ShapeError, ["i64[N]"]),
    ("dropout", {}, (_t(2, 3), _t(), _t(dtype=i64)), ShapeError, ["i64[]"]),
    ("sgd_update", {}, (_t(2, 3), _t(3, 2), _t(), _t()), ShapeError, ["f32[3,2]", "f32[2,3]"]),
    ("sgd_update", {"momentum": True}, (_t(2), _t(2), _t(), _t()), ShapeError, ["6", "4"]),
]  # fmt: skip


@pytest.mark.parametrize(("op", "kw", "ins", "error", "words"), REFUSED, ids=lambda v: str(v)[:40])
def test_infer_refuses(op, kw, ins, error, words):
    with pytest.raises(error) as caught:
        get_op(op).infer(attrs(op, **kw), *ins)
    for word in words:
        assert word in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("op", "kw"),
    [
        ("conv2d", {"stride": 0}), ("conv2d", {"padding": -1}), ("conv2d", {"groups": 0}),
        ("conv2d", {"stride": (1, 2, 3)}), ("conv2d", {"math": "fp8"}),
        ("maxpool2d", {"kernel": 2, "padding": 2}), ("maxpool2d", {"kernel": 0}),
        ("cast", {"dtype": "f8"}), ("full", {"dtype": "f8"}),
        ("dropout", {"p": 1.0}), ("dropout", {"p": -0.1}), ("dropout", {"mode": "other"}),
        ("cross_entropy", {"label_smoothing": 1.5}), ("sgd_update", {"form": "adam"}),
    ],
)  # fmt: skip
def test_attributes_are_checked_when_they_are_made(op, kw):
    with pytest.raises(GraphnetError):
        attrs(op, **kw)


def test_attributes_are_normalised():
    a = attrs("conv2d", stride=2, padding=(1, 2), dilation=3)
    assert (a.stride, a.padding, a.dilation) == ((2, 2), (1, 1, 2, 2), (3, 3))
    assert attrs("maxpool2d", kernel=3).stride == (3, 3)
    assert attrs("conv2d", padding=1) == attrs("conv2d", padding=(1, 1, 1, 1))


@pytest.mark.parametrize(
    "kw",
    [
        {"lr": -1.0}, {"lr": math.nan}, {"lr": math.inf}, {"lr": "0.1"}, {"momentum": -0.1},
        {"momentum": math.inf}, {"weight_decay": math.nan}, {"dampening": 0.5},
        {"nesterov": True}, {"form": "adam"},
    ],
)  # fmt: skip
def test_sgd_refuses(kw):
    with pytest.raises(ConfigError) as caught:
        SGD(**kw)
    assert str(next(iter(kw.values()))) in str(caught.value)


def test_specs_take_torch_arguments():
    def names(spec):
        return list(inspect.signature(spec).parameters)

    assert names(SGD)[:5] == names(torch.optim.SGD)[1:6]
    assert names(Adam)[:5] == names(AdamW)[:5] == names(torch.optim.Adam)[1:6]
    for ours, theirs in (
        (CrossEntropyLoss, torch.nn.CrossEntropyLoss), (MultiMarginLoss, torch.nn.MultiMarginLoss),
    ):  # fmt: skip
        a, b = (inspect.signature(c).parameters for c in (ours, theirs))
        assert [(p.name, p.default) for p in a.values()] == [
            (p.name, p.default) for p in b.values()
        ]
    spec = SGD(0.1, 0.9, nesterov=True)
    assert spec.hypers == ("lr", "momentum", "weight_decay") and spec.attrs().nesterov
    assert SGD().slots == () and SGD().hypers == ("lr", "weight_decay")
    assert CrossEntropyLoss(label_smoothing=0.1).attrs().label_smoothing == 0.1
    assert repr(CrossEntropyLoss()) == "CrossEntropyLoss(label_smoothing=0.0)"


def test_flops_count_two_per_multiply_add():
    conv = next(c for c in CASES if c.id == "conv2d-lenet")
    outs = get_op("conv2d").infer(conv.attrs, *conv.ins)
    flops = get_op("conv2d").flops(conv.attrs, conv.ins, outs)
    assert flops == 2 * 3 * 6 * 12 * 12 * 25
    for op in ("conv2d_dgrad", "conv2d_wgrad"):
        c = next(c for c in CASES if c.id == f"{op}-lenet")
        assert get_op(op).flops(c.attrs, c.ins, ()) == flops
