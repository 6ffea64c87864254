"""The command line: what summary, inspect, compile and doctor print, and how they fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import graphnet as gn
from graphnet import __version__, config, doctor
from graphnet.api import lower
from graphnet.cli import main
from graphnet.errors import ConfigError
from graphnet.ir.text import parse
from graphnet.lowering.build import build
from graphnet.ops.fused import eqn_cost

ROOT = Path(__file__).resolve().parents[2]
APART = "row_blocks,in_stages,groups"  # each equation in launches of its own
INSPECT = {
    "model", "batch", "train", "precision", "target", "gpu", "stage", "ops", "kernels", "flops",
    "bytes", "floor_us", "peak_bytes", "params",
}  # fmt: skip
INSPECT_ROW = {
    "name", "kind", "layers", "binary", "variant", "config", "source", "flops", "bytes", "floor_us",
    "measured_us",
}  # fmt: skip
COMPILE = {"arch", "precision", "triton", "ptxas", "kernels", "total_s", "cache_hits"}
COMPILE_ROW = {
    "name", "layers", "binary", "config", "registers", "spill_bytes", "shared_bytes", "wgmma",
    "tma", "cp_async", "compile_s", "float_atomics",
}  # fmt: skip
NET = """
import graphnet as gn
import beside

def make():
    net = gn.Sequential(gn.Linear(16, 16), gn.Linear(16, 16), gn.Flatten(), gn.Linear(16, 3))
    net.input_shape = (16,)
    return net

net = make()
shapeless = gn.Sequential(gn.ReLU())
number = beside.NUMBER

def broken():
    raise ValueError("two\\nlines")
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in config.FLAGS:
        monkeypatch.delenv(f"GRAPHNET_{name}", raising=False)
    monkeypatch.setenv("GRAPHNET_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def net_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside.py").write_text("NUMBER = 3\n")
    path = tmp_path / "mine.py"
    path.write_text(NET)
    return path


@pytest.fixture
def run(cli):
    return cli


@pytest.fixture
def inspected(run):
    def call(*argv):
        code, out, err = run("inspect", *argv, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return call


# ---- inspect --------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_lenet_step_in_numbers(inspected, precision):
    data = inspected("lenet5", "--train", "--precision", precision)
    rows = data["kernels"]
    assert set(data) == INSPECT and all(set(k) == INSPECT_ROW for k in rows)
    asked = {k: data[k] for k in ("model", "batch", "train", "precision", "target", "gpu", "stage")}
    assert asked == {
        "model": "lenet5", "batch": 128, "train": True, "precision": precision, "target": "cuda",
        "gpu": "h200", "stage": "plan",
    }  # fmt: skip
    assert data["params"] == 61706 and "relu" not in data["ops"] and data["ops"]["fused"] > 5
    assert 4 <= len(rows) <= 16
    for key in ("flops", "bytes"):
        assert data[key] == sum(k[key] for k in rows)
    assert data["floor_us"] == pytest.approx(sum(k["floor_us"] for k in rows), abs=1e-5)
    for k in rows:
        assert k["bytes"] > 0 and k["floor_us"] > 0 and len(k["binary"]) == 64, k
        assert k["flops"] > 0 or k["name"] == "record_step", k
        assert k["layers"] or k["name"] == "record_step", k


def step_of_lenet(target="cuda", **options):
    extra = {"loss": gn.CrossEntropyLoss(), "optimizer": gn.SGD(0.01, 0.9, weight_decay=5e-4)}
    return lower(gn.models.lenet5(), (128, 1, 28, 28), target=target, **extra, **options)


def test_rows_are_the_launches_and_memory_is_state_arena_and_io(inspected):
    plan = step_of_lenet().plan
    data = inspected("lenet5", "--train")
    assert [k["name"] for k in data["kernels"]] == [s.kernel for s in plan.launches]
    assert data["peak_bytes"] == plan.state_bytes + plan.arena_bytes + plan.io_bytes
    assert plan.arena_bytes > 0


def test_second_passes_count_their_workspace():
    """Bytes of all launches: those of the equations, and each workspace written and read."""
    with config.override(DISABLE=APART):
        low = step_of_lenet(precision="fp32")
    launches = low.plan.parts
    split = [s for s in launches if s.kernel == "split_reduce"]
    work = sum(size for s in launches for _, size in s.scratch)
    assert split and all(s.bytes > 0 and s.flops > 0 for s in split) and work > 0
    record = next(s for s in launches if s.kernel == "record_step")  # touches one element
    cost = [eqn_cost(e) for e in low.stages.fused.eqns if e.op != "record_step"]
    # The first pass reads no parameters: an operand that both read would count twice.
    assert sum(s.bytes for s in launches) - record.bytes == sum(c.bytes for c in cost) + 2 * work
    assert sum(s.flops for s in launches) == sum(c.flops for c in cost) + work // 4


def test_rows_that_share_code_share_a_binary(inspected, net_file, monkeypatch):
    monkeypatch.setenv("GRAPHNET_DISABLE", APART)
    rows = inspected(f"{net_file}:make", "--batch", 4, "--precision", "fp32")["kernels"]
    first, second, last = (k["binary"] for k in rows)
    assert first == second != last


def test_the_cpu_target_shows_equations(inspected):
    data = inspected("lenet5", "--train", "--target", "cpu")
    rows = data["kernels"]
    assert set(data) == INSPECT and all(set(k) == INSPECT_ROW for k in rows)
    assert rows[0] | {"floor_us": 0} == {
        "name": "conv2d+relu", "kind": "conv", "layers": ["conv1", "relu1"], "binary": "",
        "variant": "", "config": {}, "source": "", "flops": 30707712, "bytes": 2810480,
        "floor_us": 0, "measured_us": None,
    }  # fmt: skip
    views = sum(e.op == "reshape" for e in step_of_lenet("cpu").stages.fused.eqns)
    assert len(rows) == sum(data["ops"].values()) - views


def test_the_cpu_target_has_no_floors_of_a_gpu(run, inspected):
    data = inspected("lenet5", "--train", "--target", "cpu")
    assert data["gpu"] is None is data["floor_us"]
    assert {k["floor_us"] for k in data["kernels"]} == {None}
    out = run("inspect", "lenet5", "--train", "--target", "cpu")[1]
    assert "floor" not in out and "h200" not in out and "fused equations, no launches" in out


def test_inspect_reads_as_a_table(run):
    code, out, _ = run("inspect", "lenet5", "--train", "--gpu", "h100")
    lines = out.splitlines()
    assert code == 0 and max(map(len, lines)) <= 120
    assert lines[0].startswith("lenet5, training step, batch 128, tf32 (auto: cuda), target cuda: ")
    assert "conv1, relu1" in lines[4] and lines[4].split()[-1] in ("compute", "memory")
    assert lines[-2].startswith("61,706 parameters; peak 10.2 MB")
    assert "hold batch" in lines[-1]


@pytest.mark.parametrize("stage", ["traced", "joint", "fused"])
def test_a_stage_prints_as_ir_that_parses(run, stage):
    _, out, _ = run("inspect", "lenet5", "--train", "--stage", stage)
    assert parse(out) == step_of_lenet().stages.graph(stage)


def test_why_names_the_rule_the_place_and_the_reason(run):
    _, out, _ = run("inspect", "lenet5", "--train", "--precision", "fp32", "--why")
    said = out[out.index("not fused:") :]
    assert "relu_grad(maxpool2d(...)) => fused" in said
    assert "(pool1, relu1), lenet.py:" in said and "is also read by conv2d" in said
    _, out, err = run("inspect", "lenet5", "--why", "--json")
    assert set(json.loads(out)) == INSPECT and err.startswith("not fused")


# ---- summary and compile --------------------------------------------------------------------


def test_version_and_completion(run, monkeypatch, capsys):
    code, out, _ = run("--version")
    assert (code, out) == (0, f"graphnet {__version__}\n")
    monkeypatch.setenv("_GRAPHNET_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "graphnet ins")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert "inspect" in run("")[1]


def test_summary(run, net_file):
    code, out, _ = run("summary", "lenet5", "--batch", 2, "--json")
    data = json.loads(out)
    assert set(data) == {"model", "input", "layers", "params", "trainable", "macs"}
    assert data["params"] == 61706 and data["input"] == [2, 1, 28, 28]
    assert set(data["layers"][0]) == {"layer", "path", "type", "output", "params", "macs"}
    assert sum(k["macs"] for k in data["layers"]) == data["macs"]
    assert "61,706 parameters" in run("summary", "lenet5")[1]
    tree = run("summary", "alexnet_owt")[1].splitlines()
    assert tree[2].split() == ["features", "Sequential"]
    assert tree[3].split()[:3] == ["0", "conv1", "Conv2d"] and tree[3].startswith("  0 ")
    assert [line.split()[0] for line in tree if line[0].isalpha()] == [
        "attribute", "features", "avgpool", "flatten", "classifier", "alexnet_owt"
    ]  # fmt: skip
    assert run("summary", f"{net_file}:net")[1] == run("summary", f"{net_file}:make")[1]


def test_compile_cold_and_filled(run, net_file, tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPHNET_DISABLE", APART)
    argv = ("compile", f"{net_file}:make", "--batch", 4, "--out", tmp_path / "out", "--json")
    code, out, err = run(*argv)
    cold = json.loads(out)
    assert (code, err) == (0, "") and set(cold) == COMPILE
    assert len(cold["kernels"]) == 4 and cold["cache_hits"] == 0
    for k in cold["kernels"]:
        assert set(k) == COMPILE_ROW and k["spill_bytes"] == k["float_atomics"] == 0
        tile = {"BM", "BN", "BK"} if k["name"] == "linear_product" else set()
        assert tile | {"num_warps", "num_stages"} <= set(k["config"])
        assert k["compile_s"] > 0
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == cold
    assert (tmp_path / "out" / "01-linear_product.cubin").stat().st_size > 0
    monkeypatch.setattr(build, "Pool", None)  # a worker would fail
    warm = json.loads(run(*argv)[1])
    assert warm["cache_hits"] == 4 and warm["total_s"] < 0.5
    binaries = [k["binary"] for k in warm["kernels"]]
    assert binaries == [k["binary"] for k in cold["kernels"]] and len(set(binaries)) == 3
    inspected = json.loads(run("inspect", f"{net_file}:make", "--batch", 4, "--json")[1])
    assert binaries == [k["binary"] for k in inspected["kernels"]]


# ---- how it fails ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("summary nosuch", "unknown model 'nosuch'; help: valid models: alexnet, alexnet_2012"),
        ("summary no.py:net", "model file no.py does not exist"),
        ("summary FILE", "names no net"),
        ("summary FILE:nothing", "has no attribute 'nothing'"),
        ("summary FILE:number", "is no gn.Module or torch.nn.Module but 3"),
        ("summary FILE:broken", "broken() fails: ValueError: two; lines"),
        ("summary FILE:shapeless", "net.input_shape"),
        ("inspect lenet5 --precision fp8", "one of auto, fp32, tf32, bf16"),
        ("inspect lenet5 --stage last", "one of traced, joint, fused, plan"),
        ("inspect lenet5 --gpu abacus", "one of h200, h100"),
        ("inspect lenet5 --target tpu", "one of auto, cuda, interpret, cpu"),
        ("inspect lenet5 --batch 0", "--batch"),
        ("inspect", "Missing argument 'model'. It is a model's name (lenet5), FILE.py:"),
        ("inspct lenet5", "Did you mean 'inspect'"),
        ("compile lenet5 --arch sm_9", "unknown architecture 'sm_9'"),
        ("compile lenet5 --out /dev/null", "cannot write to /dev/null"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, net_file, line, said):
    code, out, err = run(*line.replace("FILE", str(net_file)).split())
    assert (code, out) == (2, "") and err.count("\n") == 1, err
    assert err.startswith("graphnet: ") and said in err


def test_a_traceback_only_when_debugging(run, monkeypatch):
    monkeypatch.setenv("GRAPHNET_DEBUG", "9")  # itself wrong, which must not hide the error
    assert run("summary", "nosuch")[0] == 2
    monkeypatch.setenv("GRAPHNET_DEBUG", "1")
    with pytest.raises(ConfigError, match="nosuch"):
        main(["summary", "nosuch"])


def test_a_fault_of_ours_is_one_line_and_exit_code_1(run, monkeypatch):
    def fault(spec):
        raise KeyError("a\nb")

    monkeypatch.setattr("graphnet.verbs.compiling.load_model", fault)
    code, _, err = run("summary", "lenet5")
    assert code == 1 and err.count("\n") == 1 and "GRAPHNET_DEBUG=1" in err


def test_an_unusable_cache_is_one_line_and_exit_code_1(run, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRAPHNET_CACHE_DIR", str(tmp_path / "file"))
    code, _, err = run("compile", "lenet5")
    assert code == 1 and "set GRAPHNET_CACHE_DIR" in err and err.count("\n") == 1


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "sys.argv = ['graphnet']\n"
        "import runpy\n"
        "try:\n"
        "    runpy.run_module('graphnet', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "assert not {'torch', 'triton', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for verb in ("train", "eval", "summary", "inspect", "compile", "doctor"):
        assert verb in done.stdout


# ---- doctor ---------------------------------------------------------------------------------


def test_doctor_is_well_here(run, monkeypatch):
    monkeypatch.setattr(doctor, "_build", lambda: [0.0])  # test_compile_cold_and_filled does it
    code, out, _ = run("doctor")
    assert code == 0 and ("all is well\n" in out) != ("it works, but" in out)
    for word in ("python", "torch", "triton", "numpy", "ptxas", "link to ../kernels", "interpret"):
        assert word in out
    for name, about in config.FLAGS.items():
        assert f"GRAPHNET_{name}" in out and about in out
    assert "cpu          works" in out


@pytest.mark.parametrize("version", ["12.8.93", "13.0.88"])
@pytest.mark.parametrize("hopper", [False, True])
def test_doctor_says_of_the_assembler_what_is_true_here(version, hopper, monkeypatch):
    from graphnet.lowering.build import tools

    monkeypatch.setattr(tools, "ptxas", lambda: (Path("/bin/ptxas"), version))
    monkeypatch.setattr(doctor, "_hopper", lambda: hopper)
    what, finding, fault = doctor._assembler()
    bad = version == "12.8.93"
    assert what == "ptxas" and f"{version}, /bin/ptxas" in finding
    assert ("miscompile" in finding) == bad and (fault is True) == (bad and hopper)
    assert ("set TRITON_PTXAS_PATH" in finding + str(fault)) == bad
    # What it says of the assembler is what it ends with.
    monkeypatch.setattr(doctor, "_targets", lambda: [])
    text, healthy = doctor.doctor_text()
    assert healthy == (fault is not True) and text.endswith(
        "all is well" if not bad else "marked with !" if hopper else "before you take them to one"
    )


def test_doctor_believes_no_target_that_computes_something_else(monkeypatch):
    real = doctor._step
    monkeypatch.setattr(doctor, "_build", lambda: [0.0])
    monkeypatch.setattr(doctor, "_step", lambda t: [v + (t != "cpu") for v in real("cpu")])
    text, healthy = doctor.doctor_text()
    assert not healthy and "! interpret    differs from cpu by 1.0e+00" in text

    def fail(target):
        raise RuntimeError("no\nluck")

    monkeypatch.setattr(doctor, "_step", fail)
    text, healthy = doctor.doctor_text()
    assert not healthy and "! cpu          fails: RuntimeError: no; luck" in text


def test_doctor_knows_links_that_became_text(tmp_path):
    (tmp_path / "kernels").write_text("../kernels")
    (tmp_path / "frontends").symlink_to("nowhere")
    text, dead = doctor.links(tmp_path)
    assert text[2] and "core.symlinks true" in text[1]
    assert dead[2] and "not there" in dead[1]
    (tmp_path / "kernels").unlink()
    assert "missing" in doctor.links(tmp_path)[0][1]
    (tmp_path / "kernels").mkdir()
    assert doctor.links(tmp_path)[0] == ("kernels", "folder", False)


def test_doctor_looks_at_the_cache(monkeypatch, tmp_path):
    assert "not made yet" in doctor.cache()[0][1] and not doctor.cache()[0][2]
    (tmp_path / "cache").mkdir(mode=0o700)
    assert "yours, mode 0700, 0 binaries" in doctor.cache()[0][1] and not doctor.cache()[0][2]
    (tmp_path / "cache").chmod(0o770)
    assert doctor.cache()[0][2] and "others can write to it: chmod go-w" in doctor.cache()[0][1]
    (tmp_path / "cache").chmod(0o700)
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    with config.override(CACHE_DIR=str(tmp_path / "link")):
        assert doctor.cache()[0][2] and "is a symbolic link" in doctor.cache()[0][1]
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert doctor.cache()[0][2] and "belongs to user" in doctor.cache()[0][1]
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRAPHNET_CACHE_DIR", str(tmp_path / "file"))
    assert doctor.cache()[0][2] and "no folder" in doctor.cache()[0][1]


def test_doctor_reads_the_flags(monkeypatch):
    monkeypatch.setenv("GRAPHNET_DEBUG", "11")
    monkeypatch.setenv("GRAPHNET_DEBGU", "1")
    found = {what.strip(): (text, fault) for what, text, fault in doctor.flags()}
    assert found["GRAPHNET_DEBUG"][1] and "from 0 to 4" in found["GRAPHNET_DEBUG"][0]
    assert found["GRAPHNET_DEBGU"] == ("no flag of this version", False)
    assert not found["GRAPHNET_CHECK"][1]
