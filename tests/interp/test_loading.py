"""Binaries of the workers in Triton's launcher, up to the point where a device would be needed.

Each test runs a process of its own: the driver that stands in for a GPU is Triton's for good.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A whole training step over the real state of a net. What would be loaded onto the device is kept
# in `loads`, what Triton compiles itself in `compiled`, and what the workers are asked in `asked`.
HEAD = """
import hashlib, importlib, sys
from pathlib import Path
import torch, triton
import triton.compiler
from triton.runtime.driver import driver
import graphnet as gn
from graphnet import config
from graphnet.api import lower
from graphnet.lowering.build import build
from graphnet.lowering.build.worker import _Driver
from graphnet.lowering.targets import cuda
from graphnet.lowering.targets.interpret import buffers
from graphnet.runtime.training import TrainStep
from graphnet.runtime.state import state_of

driver.set_active(_Driver(90))
loads, compiled, asked = [], [], []
triton.compiler.CompiledKernel._init_handles = lambda self: loads.append(self)
own = triton.compiler.compile
triton.compiler.compile = lambda src, **k: compiled.append(src.name) or own(src, **k)
Pool = build.Pool
build.Pool = lambda todo, answered: asked.extend(todo) or Pool(todo, answered)
binaries = Path(config.cache_dir()) / "binaries"

def prepare(plan, storage):
    arena = torch.empty(plan.arena_bytes + 256, dtype=torch.uint8)
    arena = arena[-arena.data_ptr() % 256:]  # as a device's allocator aligns it
    cuda.calls(plan, buffers(plan, storage, arena))

def step(net, shape=(4, 1, 8, 8)):
    low = lower(net, shape, target="cuda", loss=gn.CrossEntropyLoss(),
                optimizer=gn.SGD(0.1, momentum=0.9))
    TrainStep(stages=low.stages, plan=low.plan, prepare=prepare, target="cuda",
              precision="fp32", state=state_of(net, torch.device("cpu")),
              optimizer=gn.SGD(0.1, momentum=0.9))
    return low.plan

def net():
    return gn.Sequential(gn.Conv2d(1, 8, 3), gn.ReLU(), gn.AvgPool2d(2), gn.Flatten(),
                         gn.Linear(72, 5))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def run(cache, text, **env):
    known = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env = {**known, "PYTHONPATH": str(ROOT), "GRAPHNET_CACHE_DIR": str(cache), **env}
    done = subprocess.run(
        [sys.executable, "-c", HEAD + text], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_the_workers_made_is_loaded_and_nothing_compiled(cache):
    cold = """
plan = step(net())
assert len(loads) == len(plan.launches) and not compiled
assert {k for k, _ in asked} == {p.stem for p in binaries.glob("*.cubin")}
"""
    warm = """
plan = step(net())
assert not asked and not compiled and len(loads) == len(plan.launches) > 3
for launch, kernel in zip(plan.launches, loads):
    key = build.key_of(build.request(launch, 90))
    assert kernel.asm["cubin"] == (binaries / f"{key}.cubin").read_bytes()
    assert kernel.metadata.num_warps == launch.num_warps and kernel.metadata.shared >= 0
    assert kernel.metadata.name == (launch.driver.function if launch.driver else launch.kernel)
"""
    run(cache, cold)
    run(cache, warm)


@pytest.mark.parametrize("file", ["cubin", "ptx", "meta", "json"])
def test_a_flipped_byte_is_compiled_again(cache, file):
    text = f"""
plan = step(net())
asked.clear()
key = build.key_of(build.request(plan.launches[0], 90))
victim = binaries / f"{{key}}.{file}"
whole = victim.read_bytes()
at = len(whole) // 2
victim.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
step(net())
assert [k for k, _ in asked] == [key] and not compiled
if {file!r} in ("cubin", "ptx"):
    assert victim.read_bytes() == whole
"""
    run(cache, text)


def test_damage_behind_the_first_look_is_not_loaded(cache):
    text = """
def damaged(launches, arch):
    found = build.compile_launches(launches, arch)
    key = found[0][0][0]
    (binaries / f"{key}.cubin").write_bytes(b"no binary")
    return found
cuda.compile_launches = damaged
plan = step(net())
assert len(compiled) == 1 and len(loads) == len(plan.launches)
assert all(k.asm["cubin"] != b"no binary" for k in loads)
"""
    run(cache, text)


def test_a_tensor_that_is_not_aligned_gets_a_kernel_of_its_own(cache):
    text = """
real = buffers
def buffers(plan, storage, arena):
    tensor = real(plan, storage, arena)
    moved = torch.zeros(storage["x"].numel() + 1)[1:]
    return lambda ref: moved if ref.name == "x" else tensor(ref)
plan = step(net())
readers = [s.kernel for s in plan.launches if "x" in s.reads]
assert readers and compiled == readers and len(loads) == len(plan.launches)
"""
    run(cache, text)


def test_an_option_of_the_environment_is_seen(cache):
    """Triton's debug mode adds checks to a kernel: what was built without them is not it."""
    text = """
triton.knobs.runtime.debug = True
plan = step(net())
assert len(compiled) == len({build.key_of(build.request(s, 90)) for s in plan.launches})
"""
    run(cache, text)


def test_the_programs_of_a_run_are_compiled_together(tmp_path):
    """A trainer's three: one that sums up, one that applies, one that evaluates."""
    text = """
from graphnet import api
from graphnet.lowering.tune import proof
pools = []
build.Pool = lambda todo, answered: pools.append(dict(todo)) or Pool(todo, answered)
api._resolve = lambda target: "cuda"
api._device = lambda target: torch.device("cpu")
cuda.require = lambda *a: None
proof._wrong = lambda low: {}
plans = []
cuda.prepare = lambda plan, storage: plans.append(plan) or prepare(plan, storage)
trainer = gn.Trainer(net(), gn.CrossEntropyLoss(), gn.SGD(0.1), accumulate=2, target="cuda")
trainer.compile((4, 1, 8, 8))
keys = {build.key_of(build.request(s, 90)) for p in plans for s in p.launches}
assert len(plans) == 3 and len(pools) == 1 and set(pools[0]) == keys and not compiled
"""
    run(tmp_path, text)


def test_a_kernel_in_gluon_is_loaded_like_the_others(tmp_path):
    """Its descriptors, its source and its key are Gluon's; what the worker built is what the
    launcher asks for."""
    text = """
from tests.gluon_cases import SAME, Grad, tiles, form, variant_of
from graphnet.lowering.launch.work import take_apart
from graphnet.lowering.tune.alone import Alone

class OnCpu(Alone):
    def __init__(self, graph, eqn):
        super().__init__(graph, eqn, "interpret")
        self.module = cuda

for case, config_ in ((SAME, tiles(128, 16)),
                      (Grad(2, 8, (2, 2), 8, (1, 1), dtype="bf16"), form("d", 128, 16))):
    graph = case.graph()
    work = take_apart(graph.eqns[0], lambda v: v.name)
    steps = variant_of(work.problem.op, "gluon_rows").launch(work, config_)
    loads.clear()
    alone = OnCpu(graph, work.eqn)
    alone.arena = torch.empty(1 << 24, dtype=torch.uint8)
    alone.arena = alone.arena[-alone.arena.data_ptr() % 256:]
    alone.prepare(steps)
    assert len(loads) == len(steps) and not compiled
    assert loads[0].src.__class__.__name__ == "GluonASTSource"
    assert loads[0].metadata.name == steps[0].kernel
"""
    run(tmp_path, text)


LIBCUDA = "".join(
    f"int {name}() {{ return 0; }}\n"
    for name in (
        "cuCtxGetCurrent", "cuCtxSetCurrent", "cuDeviceGet", "cuDevicePrimaryCtxRetain",
        "cuFuncSetAttribute", "cuGetErrorString", "cuPointerGetAttribute",
    )
)  # fmt: skip


def test_the_c_code_that_launches_is_compiled_by_the_workers_too(tmp_path):
    """Triton 3.6 compiles some for each signature, against the driver's library: here an empty
    one."""
    from triton.backends.nvidia import driver

    if not hasattr(driver, "make_launcher"):
        pytest.skip("this Triton launches every signature through one piece of code")
    (tmp_path / "c.c").write_text(LIBCUDA)
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "c.c"], check=True)
    text = """
import triton.runtime.build
from triton.backends.nvidia.driver import CudaLauncher
from graphnet.lowering.build.pool import launchers
plan = step(net())
def refused(*a): raise AssertionError("compiled here")
triton.runtime.build._build = refused
triton.knobs.cache.dir = launchers()
for kernel in loads:
    assert CudaLauncher(kernel.src, kernel.metadata).launch
"""
    run(tmp_path / "cache", text, LD_LIBRARY_PATH=str(tmp_path))
