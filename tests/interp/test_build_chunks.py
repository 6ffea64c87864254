"""AlexNet's pools, normalizations and blocks of pixels at batch 128, compiled for sm_90: registers
and widths of accesses are those of kernels that were measured on an H100."""

import re

import pytest

import graphnet as gn
from graphnet import config
from graphnet.api import kernels_of, lower
from graphnet.lowering.build.build import compile_launches

pytestmark = pytest.mark.usefixtures("own_cache")

MODULES = ("chunks", "pool_tiles", "pack")
# (16-byte loads, loads, 16-byte stores, stores): bf16 chunks, 8 bytes of indices, halos of 4 and 8.
WIDTHS = {
    "space_to_depth": (0, 16, 2, 2),
    "maxpool2d_lrn_chunks": (9, 11, 2, 3),  # 9 taps, two halos; pooled, index, normalised
    "lrn_grad_chunks": (3, 7, 1, 1),  # image, gradient, mask; four halos
    "maxpool2d_grad_chunks": (4, 8, 4, 4),  # gradients and indices of four windows
}
REGISTERS = {"lrn_grad_chunks": 40, "maxpool2d_lrn_chunks": 64, "maxpool2d_grad_chunks": 64,
             "space_to_depth": 32, "maxpool2d_tiles": 80, "maxpool2d_grad_tiles": 144}  # fmt: skip


def taken(precision):
    """The launches of a training step that these kernels do."""
    plan = lower(
        gn.models.alexnet(), (128, 3, 227, 227), target="cuda", precision=precision,
        loss=gn.CrossEntropyLoss(), optimizer=gn.SGD(lr=0.01, momentum=0.9),
        kernels=kernels_of("cuda", ""),
    ).plan  # fmt: skip
    return [s for s in plan.launches if s.module.rpartition(".")[2] in MODULES]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_registers_and_widths(precision):
    steps = taken(precision)
    packed = ["space_to_depth"] if precision == "bf16" else []
    assert [s.kernel for s in steps] == [
        *packed, *["maxpool2d_lrn_chunks"] * 2, "maxpool2d_tiles", "maxpool2d_grad_tiles",
        *["lrn_grad_chunks", "maxpool2d_grad_chunks"] * 2,
    ]  # fmt: skip
    found, _ = compile_launches(steps)
    for s, (key, about) in zip(steps, found, strict=True):
        assert about["spill_bytes"] == 0 and about["float_atomics"] == 0, s
        if precision != "bf16":
            continue
        assert about["registers"] <= REGISTERS[s.kernel], (s.kernel, about["registers"])
        ptx = (config.cache_dir() / "binaries" / f"{key}.ptx").read_text()
        count = lambda pattern, ptx=ptx: len(re.findall(pattern, ptx))
        widths = (
            count(r"ld\.global[\w.:]*v4\.b32"), count(r"ld\.global"),
            count(r"st\.global[\w.:]*v4\.b32"), count(r"st\.global"),
        )  # fmt: skip
        assert widths == WIDTHS.get(s.kernel, widths), (s.kernel, widths)
        if s.kernel in WIDTHS:
            assert about["shared_bytes"] <= 4096  # space-to-depth's turn, on Triton 3.6
