"""How people start it: a plain script without a `__main__` guard, stdin, after torch.optim."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import torch, sys
{first}
import graphnet as gn
torch.manual_seed(0)
net = gn.Sequential(gn.Conv2d(1, 2, 3), gn.ReLU(), gn.MaxPool2d(2), gn.Flatten(), gn.Linear(18, 3))
common = dict(loss=gn.CrossEntropyLoss(), optimizer=gn.SGD(lr=0.1, momentum=0.9))
x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
losses = []
for target in {targets}:
    step = gn.compile(net.copy(), (4, 1, 8, 8), target=target, **common)
    losses.append([float(step(x, y)) for _ in range(3)])
assert all(abs(a - b) <= 1e-5 * abs(b) for a, b in zip(losses[0], losses[-1]))
assert losses[0][2] < losses[0][0]
{last}
print("done")
"""
BUILD = "report = gn.build(net, (4, 1, 8, 8), **common); assert report.rows"


def run(code, stdin, tmp_path):
    path = tmp_path / "plain.py"
    path.write_text(code)
    return subprocess.run(
        [sys.executable, "-" if stdin else str(path)], cwd=ROOT if stdin else tmp_path,
        input=code if stdin else None, capture_output=True, text=True, timeout=300,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path),
             "GRAPHNET_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip


@pytest.mark.parametrize(
    "first, stdin",
    [("", False),
     ("sgd = torch.optim.SGD([torch.zeros(1)], lr=0.1)\nassert 'triton' in sys.modules", True)],
    ids=["plain-script", "after-torch-optim-stdin"],
)  # fmt: skip
def test_compile_and_build_at_the_top_level(stdin, first, tmp_path):
    code = SCRIPT.format(first=first, targets=["cpu", "interpret"], last=BUILD)
    done = run(code, stdin, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("done")


def test_an_interpreter_that_does_not_work_is_a_typed_error(monkeypatch):
    import numpy
    import triton

    from graphnet.errors import BackendUnavailableError
    from graphnet.lowering.targets import interpret

    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(numpy, "__version__", "2.4.1")
    broken = pytest.raises(BackendUnavailableError, match="Triton 3.6.0 breaks with numpy 2.4.1")
    with broken, interpret.interpreted():
        pass
