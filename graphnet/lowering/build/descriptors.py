"""Descriptors of the copy engine, made in one place for the workers and for whoever launches.

So a build is as strict as a launch: Triton's own classes hold a descriptor against the engine's
rules, and both get it with the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphnet.ir.types import DTYPES
from graphnet.lowering.launch.steps import Box

WIDEST = 256  # of a box, along each axis


def passed_box(box: Box) -> dict[str, Any]:
    """A box in plain types, as a worker gets it."""
    return {
        "dtype": box.ref.dtype, "size": box.size, "strides": box.steps, "block": box.block,
        **({"gluon": True} if box.gluon else {}),
    }  # fmt: skip


def descriptor(base: Any, box: Mapping[str, Any]) -> Any:
    """Triton's descriptor over a tensor, or over what stands for one; `box` as of `passed_box`.
    ValueError or AssertionError where the engine does not take it."""
    size, strides, block = (list(box[k]) for k in ("size", "strides", "block"))
    if max(block) > WIDEST:
        raise ValueError(f"a box {block} is more than {WIDEST} wide")
    if not box.get("gluon"):
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(base, size, strides, block)
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Described

    element = getattr(gl, DTYPES[box["dtype"]].torch_name)
    return Described(
        base, size, strides, block, gl.NVMMASharedLayout.get_default_for(block, element)
    )
