"""Passes as before/after text, each with a negative case."""

import pytest

import graphnet.ops  # noqa: F401  (fills the registry)
from graphnet.errors import GraphError
from graphnet.ir.text import parse
from graphnet.ir.verify import verify
from graphnet.passes.autodiff import autodiff
from graphnet.passes.dce import cse, dce
from graphnet.passes.fuse_epilogue import CHAINS, EPILOGUES, MOVES
from graphnet.passes.fuse_loss import fuse_pairs
from graphnet.passes.fuse_update import COPIES, RULES
from graphnet.passes.precision import precision
from graphnet.passes.rewrite import Log, Rule, rewrite


def text(body: str) -> str:
    """A graph over the usual operands, from its lines."""
    return f"""graph g(%x: f32[2,1,8,8] data, %w: f32[4,1,3,3] param, %b: f32[4] param,
    %y: f32[2,4,6,6] data, %m: f32[4,1,3,3] slot(%w), %lr: f32[] hyper, %mom: f32[] hyper,
    %wd: f32[] hyper) {{ {body} }}"""


def fuse(graph, log=None):
    log = Log() if log is None else log
    graph = fuse_pairs(graph, log)
    for table in (EPILOGUES, RULES, COPIES, CHAINS):
        graph = rewrite(graph, table, log=log)
    return dce(verify(graph, "fused"))


def ops(graph):
    return [e.op if e.body is None else [b.op for b in e.body.eqns] for e in graph.eqns]


CONV_RELU = """
    %0: f32[2,4,6,6] = conv2d(%x, %w, %b)
    %1: f32[2,4,6,6] = relu(%0)
"""


def test_conv_relu_fuses():
    after = fuse(parse(text(CONV_RELU + "return %1")))
    want = text(
        "%1: f32[2,4,6,6] = fused(%x, %w, %b) { %a = conv2d(%x, %w, %b); %b_ = relu(%a);"
        " yield %b_ } return %1"
    )
    # Operands, attributes, names and inputs; provenance is a comment, which the parser leaves out.
    assert str(parse(str(after))) == str(dce(parse(want)))


@pytest.mark.parametrize("elsewhere", [
    "return %1, %0", "%2: f32[2,4,6,6] = tanh(%0) return %1, %2",
])  # fmt: skip
def test_a_conv_output_read_elsewhere_is_not_fused_away(elsewhere):
    log = Log()
    after = fuse(parse(text(CONV_RELU + elsewhere)), log)
    assert "conv2d" in ops(after)
    why = [w for (rule, _), w in log.refusals.items() if rule == "relu(conv2d(...)) => fused"]
    assert why and ("leaves the graph" in why[0] or "is also read by tanh" in why[0])


def test_wgrad_and_update_fuse_and_the_bias_gradient_stays_a_result():
    body = """
    %g: f32[4,1,3,3], %gb: f32[4] = conv2d_wgrad(%x, %y) {kernel=(3,3)}
    %w1: f32[4,1,3,3], %m1: f32[4,1,3,3] = sgd_update(%w, %g, %m, %lr, %mom, %wd) {momentum=True}
    commit %w = %w1, %m = %m1
    return %gb"""
    after = fuse(parse(text(body)))
    assert ops(after) == [["conv2d_wgrad", "sgd_update"]]
    results = [str(v.type) for v in after.eqns[0].outputs]
    assert results == ["f32[4]", "f32[4,1,3,3]", "f32[4,1,3,3]"]


def test_a_gradient_that_is_also_returned_refuses_the_update_fusion():
    body = """
    %g: f32[4,1,3,3], _ = conv2d_wgrad(%x, %y) {kernel=(3,3)}
    %w1: f32[4,1,3,3], %m1: f32[4,1,3,3] = sgd_update(%w, %g, %m, %lr, %mom, %wd) {momentum=True}
    commit %w = %w1, %m = %m1
    return %g"""
    log = Log()
    after = fuse(parse(text(body)), log)
    assert ops(after) == ["conv2d_wgrad", "sgd_update"]
    assert any("leaves the graph" in w for w in log.refusals.values())


def test_a_shared_parameter_refuses_the_update_fusion():
    body = """
    %g: f32[4,1,3,3], _ = conv2d_wgrad(%x, %y) {kernel=(3,3)}
    %h: f32[4,1,3,3], _ = conv2d_wgrad(%x, %y) {kernel=(3,3)}
    %s: f32[4,1,3,3] = add(%g, %h)
    %w1: f32[4,1,3,3], %m1: f32[4,1,3,3] = sgd_update(%w, %s, %m, %lr, %mom, %wd) {momentum=True}
    commit %w = %w1, %m = %m1
    return %lr"""
    after = fuse(parse(text(body)))
    flat = [o for e in ops(after) for o in (e if isinstance(e, list) else [e])]
    assert flat.count("conv2d_wgrad") == 2
    assert ["conv2d_wgrad", "sgd_update"] not in ops(after)


POOL = """graph g(%x: f32[2,1,8,8] data, %w: f32[4,1,3,3] param, %b: f32[4] param,
    %labels: i64[2] data, %live: i32[] hyper) {
    %0: f32[2,4,6,6] = conv2d(%x, %w, %b)
    %1: f32[2,4,6,6] = relu(%0)
    %2: f32[2,4,3,3], _ = maxpool2d(%1) {kernel=(2,2), stride=(2,2)}
    %3: f32[2,36] = reshape(%2) {shape=(2,36)}
    %4: f32[] = cross_entropy(%3, %labels, %live)
    return %4 }"""


def test_the_mask_moves_to_the_pooled_tensor():
    joint = autodiff(parse(POOL), trainable=["w", "b"], grads=True)
    moved = dce(cse(rewrite(joint, MOVES)))
    grads = [e for e in moved.eqns if e.op == "relu_grad"]
    assert [e.out.type.shape for e in grads] == [(2, 36)]
    # The convolution's output is read by the pool alone, so that it dies there.
    relu = next(e for e in moved.eqns if e.op == "relu")
    assert [r.op for r in moved.readers[relu.out]] == ["maxpool2d"]


def test_the_mask_does_not_move_for_another_tensor():
    body = """graph g(%y: f32[2,4,6,6] data, %z: f32[2,4,6,6] data, %d: f32[2,4,3,3] data) {
    %1: f32[2,4,3,3], %i: u8[2,4,3,3] = maxpool2d(%y) {kernel=(2,2), stride=(2,2)}
    %2: f32[2,4,6,6] = maxpool2d_grad(%d, %i) {kernel=(2,2), stride=(2,2), input_size=(6,6)}
    %3: f32[2,4,6,6] = relu_grad(%z, %2)
    return %3, %1 }"""
    before, log = parse(body), Log()
    assert rewrite(before, MOVES, log=log) is before
    assert any("not taken from the input of that pool" in w for w in log.refusals.values())


def test_loss_and_gradient_share_a_kernel():
    joint = autodiff(parse(POOL), trainable=["w", "b"], grads=True)
    after = fuse(dce(cse(rewrite(joint, MOVES))))
    assert ["cross_entropy", "cross_entropy_grad", "relu_grad"] in ops(after) or [
        "cross_entropy",
        "cross_entropy_grad",
    ] in ops(after)


def test_a_rewrite_that_does_not_end_raises():
    spin = Rule("relu(x) => relu(x)", MOVES[0].pattern.__class__(("relu",)), lambda m, f: [m.root])
    with pytest.raises(GraphError, match="does not end"):
        rewrite(parse(text("%0: f32[2,1,8,8] = relu(%x) return %0")), [spin])


def test_a_miss_returns_the_same_object():
    graph = parse(text("%0: f32[2,1,8,8] = relu(%x) return %0"))
    assert rewrite(graph, [*MOVES, *EPILOGUES]) is graph
    clean = dce(graph)
    assert dce(clean) is clean


def test_bf16_keeps_weights_and_loss_in_fp32():
    joint = autodiff(parse(POOL), trainable=["w", "b"], grads=True)
    low = verify(precision(joint, "bf16"), "joint")
    assert low.input("w.bf16").role == "derived" and low.input("w.bf16").of == "w"
    types = {e.op: e.out.type.dtype.name for e in low.eqns}
    assert types["conv2d"] == "bf16" and types["cross_entropy"] == "f32"
    assert types["conv2d_wgrad"] == "f32"


def test_the_verifier_names_line_and_neighbours():
    graph = parse(text(CONV_RELU + "return %1"))
    from dataclasses import replace

    broken = replace(graph, eqns=graph.eqns[1:])
    with pytest.raises(GraphError, match="read before it is written") as error:
        verify(broken, "traced")
    assert "-> %1" in str(error.value)
    with pytest.raises(GraphError, match="was not fused"):
        verify(graph, "fused")
