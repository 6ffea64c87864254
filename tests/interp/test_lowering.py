"""Fused graphs through plan, generated code and the interpreter, against the oracle."""

import os
from pathlib import Path

import pytest
import torch

import graphnet.ops  # noqa: F401  (fills the registry)
from graphnet import config
from graphnet.ir.text import parse
from graphnet.lowering.launch.choice import forced
from graphnet.lowering.launch.files import Source, load, materialise
from graphnet.lowering.launch.steps import Copy, Fill
from graphnet.lowering.plan.plan import make_plan
from graphnet.lowering.targets import interpret
from graphnet.ops.evaluate import evaluate_step, to_double


@pytest.fixture(autouse=True)
def own_cache(tmp_path):
    with config.override(CACHE_DIR=str(tmp_path / "cache")):
        yield


def storage_for(graph, seed=0):
    g = torch.Generator().manual_seed(seed)
    out = {}
    for i in graph.inputs:
        t = i.value.type
        if t.dtype.is_float:
            out[i.value.name] = torch.randn(t.shape, generator=g).to(t.dtype.torch)
        else:
            out[i.value.name] = torch.randint(0, 3, t.shape, generator=g).to(t.dtype.torch)
    if "live" in out:
        out["live"].fill_(out["labels"].shape[0] - 1)
    return out


def check(text, tolerance=2e-5, runs=1):
    """Runs the graph with poisoned memory; returned values and committed state must agree."""
    graph = parse(text)
    plan = make_plan(graph, "interpret")
    storage = storage_for(graph)
    inputs = {k: v.clone() for k, v in storage.items()}
    for v in graph.returns:
        storage.setdefault(v.name, torch.full(v.type.shape, float("nan")).to(v.type.dtype.torch))
    run = interpret.prepare(plan, storage, poison=True)
    for _ in range(runs):
        returned, state = evaluate_step(graph, to_double(inputs))
        run()
        inputs |= {k: v.to(inputs[k].dtype) for k, v in state.items()}
    for v, want in zip(graph.returns, returned, strict=True):
        if v.name not in state:
            torch.testing.assert_close(
                storage[v.name].double(), want.double(), rtol=tolerance, atol=tolerance
            )
    for name, want in state.items():
        torch.testing.assert_close(
            storage[name].double(), want.double(), rtol=tolerance, atol=tolerance
        )
    return plan


CONV = """graph g(%x: f32[2,3,9,8] data, %w: f32[4,3,3,3] param, %b: f32[4] param) {
  %y: f32[2,4,9,8]@ = fused(%x, %w, %b) {
    %a = conv2d(%x, %w, %b) {padding=(1,1,1,1)}; %r = relu(%a); yield %r }
  %p: f32[2,4,4,4], %i: u8[2,4,4,4] = maxpool2d(%y) {kernel=(2,2), stride=(2,2)}
  %f: f32[2,64] = reshape(%p) {shape=(2,64)}
  return %f
}"""


@pytest.mark.parametrize("layout", ["", "{nhwc}"])
def test_conv_pool_and_view(layout):
    plan = check(CONV.replace("@", layout))
    assert len(plan.launches) == 2 and len(plan.steps) == 2  # the reshape is no step


UPDATE = """graph g(%x: f32[3,3,8,8] data, %dy: f32[3,4,8,8] data, %w: f32[4,3,3,3] param,
    %b: f32[4] param, %m: f32[4,3,3,3] slot(%w), %mb: f32[4] slot(%b), %lr: f32[] hyper,
    %mom: f32[] hyper, %wd: f32[] hyper) {
  %w1: f32[4,3,3,3], %m1: f32[4,3,3,3], %b1: f32[4], %n1: f32[4] =
    fused(%x, %dy, %w, %m, %lr, %mom, %wd, %b, %mb) {
      %g, %gb = conv2d_wgrad(%x, %dy) {padding=(1,1,1,1), kernel=(3,3)};
      %c, %d = sgd_update(%w, %g, %m, %lr, %mom, %wd) {momentum=True};
      %e, %f = sgd_update(%b, %gb, %mb, %lr, %mom, %wd) {momentum=True};
      yield %c, %d, %e, %f }
  %dx: f32[3,3,8,8] = conv2d_dgrad(%dy, %w) {padding=(1,1,1,1), input_size=(8,8)}
  commit %w = %w1, %m = %m1, %b = %b1, %mb = %n1
  return %dx
}"""


@pytest.mark.parametrize("split", [1, 4])
def test_fused_update_is_in_place_and_waits_for_the_last_reader(split):
    with forced("conv2d_wgrad", SPLIT=split):
        plan = check(UPDATE, tolerance=1e-4)
    kinds = [s.kernel for s in plan.launches]
    last = "conv2d_wgrad" if split == 1 else "split_reduce"
    assert kinds.index("conv2d_dgrad") < kinds.index(last), "dgrad reads the old weight"
    assert not any(isinstance(s, Copy) for s in plan.steps)
    assert plan.storage["w1"] == "w" and plan.storage["m1"] == "m"


def test_a_reader_behind_the_update_makes_the_planner_copy():
    # What is read after the update needs both the old and the new weight.
    text = UPDATE.replace("  commit", "  %s: f32[4,3,3,3] = add(%w, %w1)\n  commit").replace(
        "return %dx", "return %dx, %s"
    )
    plan = check(text, tolerance=1e-4)
    assert any(isinstance(s, Copy) and s.target == "w" for s in plan.steps)


def test_swapped_state_goes_through_a_copy():
    check("""graph g(%x: f32[4] data, %a: f32[4] buffer, %b: f32[4] buffer) {
      %y: f32[4] = add(%a, %x)
      commit %a = %b, %b = %a
      return %y }""", runs=2)  # fmt: skip


def test_loss_pair_and_ring():
    text = """graph g(%z: f32[5,7] data, %labels: i64[5] data, %live: i32[] hyper,
        %ring: f32[16] counter, %step: i64[] counter) {
      %l: f32[], %d: f32[5,7] = fused(%z, %labels, %live) {
        %a = cross_entropy(%z, %labels, %live); %b = cross_entropy_grad(%z, %labels, %live);
        yield %a, %b }
      %r: f32[16], %s: i64[] = record_step(%ring, %l, %step)
      commit %ring = %r, %step = %s
      return %l, %d }"""
    check(text, runs=3)
    with forced("cross_entropy", BM=2, SPLIT=3):
        check(text)


@pytest.mark.parametrize("split", [1, 2])
def test_linear_with_dropout_and_its_gradients(split):
    with forced("linear_wgrad", SPLIT=split):
        check("""graph g(%x: f32[6,20] data, %w: f32[9,20] param, %b: f32[9] param,
            %seed: i64[] hyper, %step: i64[] counter) {
          %y: f32[6,9] = fused(%x, %w, %b, %seed, %step) {
            %a = linear(%x, %w, %b); %t = tanh(%a);
            %r = dropout(%t, %seed, %step) {p=0.5, stream=77, global_batch=6}; yield %r }
          %dx: f32[6,20] = linear_dgrad(%y, %w)
          %dw: f32[9,20], %db: f32[9] = linear_wgrad(%x, %y)
          return %dx, %dw, %db }""", tolerance=1e-4)  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        """graph g(%x: f32[3,2,6,5] data, %dy: f32[3,4,4,3] data, %b: f32[4] param,
             %lr: f32[] hyper, %wd: f32[] hyper) {
           %c: f32[4] = fused(%x, %dy, %b, %lr, %wd) {
             %w, %g = conv2d_wgrad(%x, %dy) {kernel=(3,3)}; %c = sgd_update(%b, %g, %lr, %wd);
             yield %c }
           commit %b = %c
           return %lr }""",
        """graph g(%x: f32[5,7] data, %dy: f32[5,3] data) {
           %b: f32[3] = fused(%x, %dy) { %w, %g = linear_wgrad(%x, %dy); yield %g }
           return %b }""",
    ],
    ids=["conv2d", "linear"],
)
def test_the_bias_gradient_of_a_frozen_weight(text):
    plan = check(text, tolerance=1e-5)
    assert [s.kernel for s in plan.launches] == ["channel_sum"]


def test_movement():
    plan = check("""graph g(%x: f32[2,6,3,5] data, %z: f32[2,2,3,5] data) {
      %a: f32[2,6,3,5]{nhwc} = relayout(%x) {layout='nhwc'}
      %b: f32[2,4,3,5] = slice(%a) {axis=1, start=1, stop=5}
      %c: f32[2,6,3,5] = concat(%b, %z) {axis=1}
      %d: f32[2,9,3,5] = slice_grad(%c) {axis=1, start=2, stop=8, size=9}
      %o: f32[2,9,3,5] = full() {value=0.5, shape=(2,9,3,5)}
      %e: f32[2,9,3,5] = mul(%d, %o)
      return %e }""", tolerance=0)  # fmt: skip
    assert sum(isinstance(s, Fill) for s in plan.steps) == 2


def test_elementwise_over_mixed_layouts():
    check("""graph g(%x: f32[2,8,3,5] data, %k: f32[] hyper) {
      %a: f32[2,8,3,5]{nhwc} = relu(%x)
      %b: f32[2,8,3,5] = fused(%a, %x, %k) { %s = add(%a, %x); %t = mul(%s, %k); yield %t }
      return %b, %x }""", tolerance=1e-6)  # fmt: skip


def test_state_that_is_not_contiguous_is_updated_too():
    graph = parse("""graph g(%x: f32[3,4] data, %a: f32[3,4] buffer) {
      %y: f32[3,4] = add(%a, %x)
      commit %a = %y
      return %x }""")
    a = torch.arange(12.0).reshape(4, 3).t()
    want = a + 1
    run = interpret.prepare(make_plan(graph, "interpret"), {"x": torch.ones(3, 4), "a": a})
    run()
    torch.testing.assert_close(a, want, rtol=0, atol=0)


def test_the_mode_is_scoped(monkeypatch):
    import triton
    import triton.language as tl

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    before = tl.sum
    check(CONV.replace("@", ""))
    assert tl.sum is before and not triton.knobs.runtime.interpret
    assert "TRITON_INTERPRET" not in os.environ


def test_bytecode_beside_a_generated_file_does_not_run():
    from importlib import _bootstrap_external
    from importlib.util import cache_from_source

    source = Source("\ndef epilogue():\n    return 'ours'\n")
    path = materialise(source)
    planted = compile("def epilogue():\n    return 'planted'\n", str(path), "exec")
    stat = path.stat()
    data = _bootstrap_external._code_to_timestamp_pyc(planted, int(stat.st_mtime), stat.st_size)
    cached = Path(cache_from_source(str(path)))
    cached.parent.mkdir()
    cached.write_bytes(data)
    assert load(source)() == "ours"


def test_a_damaged_generated_file_is_written_again():
    plan = make_plan(parse(CONV.replace("@", "")), "interpret")
    source = plan.launches[0].epilogues[0]
    path = materialise(source)
    assert path.parent.stat().st_mode & 0o077 == 0
    path.write_text("raise SystemExit")
    assert materialise(source) == path and path.read_text() == source.text
    assert load(Source(source.text), "graphnet_test").__name__ == "epilogue"


def test_no_user_name_enters_the_source():
    text = CONV.replace("@", "").replace("%w", "%evil.weight").replace("%x", "%evil")
    for s in make_plan(parse(text), "interpret").launches:
        for source in s.epilogues:
            assert "evil" not in source.text
