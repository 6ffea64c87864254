"""More elements than int32 counts: what a kernel's last programs make of their place.

Nobody has that memory here, so operands have strides of 0, and the epilogue keeps the coordinates.
"""

import inspect
import re
from contextlib import contextmanager

import pytest
import torch

from graphnet.lowering.launch import files
from graphnet.lowering.launch.files import Source
from graphnet.lowering.targets import interpret

pytestmark = pytest.mark.usefixtures("own_cache")

BLOCK, FIRST = 64, 2**31 - 32  # the block in which int32 ends
RECORD = Source(f"""import triton
import triton.language as tl


@triton.jit
def record(acc, aux, i0, i1, i2, i3, mask, args):
    at = (i0 + i1 + i2 + i3).to(tl.int64) - {FIRST}
    tl.store(args + at, i0.to(tl.int64), mask=mask & (at >= 0) & (at < {BLOCK}))
""")
SIZES = {
    "N": FIRST + BLOCK, "D0": FIRST + BLOCK, "COUNT_PAD": False, "NHWC": False, "DIVISOR": 0,
    "BLOCK": BLOCK, "AT": None,
}  # fmt: skip


@contextmanager
def programs_from(first, monkeypatch):
    """Program 0 of a launch takes itself for program `first`."""
    from triton.runtime.interpreter import interpreter_builder

    with monkeypatch.context() as m:
        for name in ("set_grid_idx", "set_grid_dim"):
            own = getattr(interpreter_builder, name)
            m.setattr(
                interpreter_builder, name, lambda x, y, z, own=own: own(x + first, y, z)
            )  # fmt: skip
        yield


@pytest.mark.parametrize("module, name", [
    ("pool", "maxpool2d"), ("pool", "maxpool2d_grad"), ("pool", "avgpool2d"),
    ("pool", "avgpool2d_grad"), ("pool", "adaptive_avgpool2d"), ("pool", "adaptive_avgpool2d_grad"),
    ("elementwise", "elementwise"),
])  # fmt: skip
def test_the_number_of_an_element_may_pass_int32(module, name, monkeypatch):
    with interpret.interpreted(), interpret._as_kernels():
        kernel = getattr(interpret._kernels(f"graphnet.kernels.{module}"), name)
        record = files.load(RECORD, "graphnet_interpreted")
        given = {}
        for key in inspect.signature(kernel.fn).parameters:
            if key == "args":
                given[key] = out = torch.full((BLOCK,), -1, dtype=torch.int64)
            elif key.islower():  # an operand
                kind = torch.uint8 if key == "index" else torch.float32
                given[key] = torch.zeros(1, dtype=kind)
            elif key == "EPILOGUE":
                given[key] = record
            else:
                apart = re.fullmatch(r"[XDI]S\d|P[TLBR]", key)  # strides and padding
                given[key] = SIZES.get(key, 0 if apart else 1)
        with programs_from(FIRST // BLOCK, monkeypatch):
            kernel[(2,)](**given)
    assert out.tolist() == list(range(FIRST, FIRST + BLOCK))
