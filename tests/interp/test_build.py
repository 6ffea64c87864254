"""Compiling a training step for sm_90 with no GPU, and the cache of its binaries."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import graphnet.ops  # noqa: F401  (fills the registry)
from graphnet import config
from graphnet.errors import CompileError
from graphnet.ir.text import parse
from graphnet.lowering.build import build
from graphnet.lowering.build.build import build_plan, key_of, ptxas, request
from graphnet.lowering.launch.config import SHARED_BYTES
from graphnet.lowering.launch.files import Source
from graphnet.lowering.launch.signature import signature_of
from graphnet.lowering.plan.plan import make_plan
from tests.cases import CASES
from tests.poisoned import graph_of

STEP = """graph g(%x: @[16,8,12,12] data, %w: @[16,8,3,3] derived(%m), %b: f32[16] param,
    %dy: @[16,16,12,12] data, %m: f32[16,8,3,3] param, %lr: f32[] hyper, %wd: f32[] hyper) {
  %y: @[16,16,12,12]{nhwc} = fused(%x, %w, %b) {
    %a = conv2d(%x, %w, %b) {padding=(1,1,1,1), math='$'}; %r = relu(%a); yield %r }
  %m1: f32[16,8,3,3] = fused(%x, %dy, %m, %lr, %wd) {
    %g, _ = conv2d_wgrad(%x, %dy) {padding=(1,1,1,1), kernel=(3,3), math='$'};
    %u = sgd_update(%m, %g, %lr, %wd); yield %u }
  %f: @[16,2304] = reshape(%dy) {shape=(16,2304)}
  %v: @[16,2304] = relu(%f)
  commit %m = %m1
  return %y, %v
}"""


def plan_of(dtype="f32", math="ieee"):
    text = STEP.replace("@", dtype).replace("$", math).replace("{nhwc}", "")
    return make_plan(parse(text), "cuda")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache for the module: what was built once stays built."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(cache):
    with config.override(CACHE_DIR=str(cache)):
        yield


@pytest.mark.parametrize("dtype, math", [("f32", "ieee"), ("f32", "tf32"), ("bf16", "bf16")])
def test_kernels_compile_without_spills_or_float_atomics(dtype, math):
    report = build_plan(plan_of(dtype, math), precision=math)
    assert len(report.rows) == len(plan_of(dtype, math).launches)
    for r in report.rows:
        assert r.spill_bytes == 0, r
        assert r.float_atomics == 0, r
        assert 0 < r.registers <= 255 and r.shared_bytes <= SHARED_BYTES
    if math != "ieee":
        assert any(r.wgmma or r.mma for r in report.rows)
    assert str(report).count("\n") == len(report.rows) + 1
    json.dumps(report.as_dict())


def test_a_warm_build_starts_no_worker_and_a_damaged_binary_is_made_again(monkeypatch):
    plan = plan_of()
    cold = build_plan(plan)
    with monkeypatch.context() as m:
        m.setattr(build, "Pool", None)
        warm = build_plan(plan)
        assert all(r.cached for r in warm.rows) and warm.seconds < 0.5
    assert [r.sha256 for r in warm.rows] == [r.sha256 for r in cold.rows]
    victim = Path(warm.rows[0].path)
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    again = build_plan(plan)
    assert not again.rows[0].cached and all(r.cached for r in again.rows[1:])
    assert victim.read_bytes() == whole


def test_a_warm_build_imports_no_triton(cache, tmp_path):
    build_plan(plan_of())
    script = tmp_path / "warm.py"
    script.write_text(
        "import sys, graphnet.ops\n"
        "from graphnet.ir.text import parse\n"
        "from graphnet.lowering.build.build import build_plan\n"
        "from graphnet.lowering.plan.plan import make_plan\n"
        f"plan = make_plan(parse({plan_text()!r}), 'cuda')\n"
        "assert all(r.cached for r in build_plan(plan).rows)\n"
        "assert 'triton' not in sys.modules\n"
    )
    root = Path(build.__file__).parents[3]
    env = {"PYTHONPATH": str(root), "GRAPHNET_CACHE_DIR": str(cache), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, script], env=env, check=True)


def plan_text():
    return STEP.replace("@", "f32").replace("$", "ieee").replace("{nhwc}", "")


def test_the_key_holds_everything_that_decides_the_binary(monkeypatch):
    launch = plan_of().launches[0]
    work = request(launch, 90)
    key = key_of(work)
    assert key_of(request(launch, 90)) == key
    source = launch.epilogues[0]
    edited = json.loads(json.dumps(work).replace("maximum_nan(v1", "maximum_nan(-v1"))
    assert source.text in json.dumps(work).encode().decode("unicode_escape")
    others = [
        edited,
        {**work, "arch": 100},
        {**work, "options": {**work["options"], "num_warps": 8}},
        {**work, "constants": {**work["constants"], "BM": 16}},
        {**work, "args": ["bf16", *work["args"][1:]]},
    ]
    assert len({key, *map(key_of, others)}) == len(others) + 1
    monkeypatch.setattr(build, "kernels_hash", lambda: "edited")
    assert key_of(work) != key


def test_an_edited_epilogue_gives_another_binary():
    launch = next(s for s in plan_of().parts if s.kernel == "elementwise")
    (_, before), *_ = build.compile_launches([launch])[0]
    text = launch.epilogues[0].text.replace("maximum_nan(v0, 0.0)", "maximum_nan(v0, 1.0)")
    assert text != launch.epilogues[0].text
    constants = tuple(
        (k, Source(text) if isinstance(v, Source) else v) for k, v in launch.constants
    )
    from dataclasses import replace

    (_, after), *_ = build.compile_launches([replace(launch, constants=constants)])[0]
    assert before["sha256"] != after["sha256"]


def test_a_kernel_that_does_not_compile_names_its_launch():
    from dataclasses import replace

    launch = plan_of().launches[0]
    constants = tuple((k, 24 if k == "BM" else v) for k, v in launch.constants)
    with pytest.raises(CompileError, match="conv2d_forward does not compile"):
        build.compile_launches([replace(launch, constants=constants)])


def test_the_assembler_is_known():
    path, version = ptxas()
    assert path.exists() and version.count(".") == 2


def test_what_the_files_say_of_kernels_is_what_triton_says():
    import importlib

    from triton.runtime.jit import JITFunction

    seen = 0
    for name in ("conv", "conv_taps", "conv_rows", "linear", "linear_wgrad", "lrn", "pool",
                 "loss", "reduce"):  # fmt: skip
        module = importlib.import_module(f"graphnet.kernels.{name}")
        for key, kernel in vars(module).items():
            if isinstance(kernel, JITFunction) and kernel.module == module.__name__:
                found, seen = signature_of(module.__name__, key), seen + 1
                constant = {p.name for p in kernel.params if p.is_constexpr}
                optional = {p.name for p in kernel.params if p.has_default}
                assert set(found.constants) == constant and found.optional == optional
                assert [n for n in kernel.arg_names if n not in constant] == [*found.pointers]
    assert seen > 20


def test_average_pools_compile():
    rows = [c for c in CASES if c.op.startswith("avgpool2d")]
    assert len(rows) >= 16
    steps = [s for case in rows for s in make_plan(graph_of(case), "cuda").launches]
    for about in build.try_launches(steps):
        assert "error" not in about and about["spill_bytes"] == 0


def test_what_lies_in_the_working_folder_is_not_imported(tmp_path, monkeypatch):
    """A worker is a module that Python runs, and would look there first: in a run of others."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base64.py").write_text("raise SystemExit('it ran')")
    text = "graph g(%x: f32[3,5] data) { %0: f32[3,5] = relu(%x) return %0 }"
    assert build_plan(make_plan(parse(text), "cuda")).rows[0].registers > 0
