"""One run of a graph's kernels over poisoned memory, held against the float64 oracle.

Results, arena and workspaces are filled with NaN first, so an element that no program writes fails.
"""

from __future__ import annotations

import torch

from graphnet.ir.graph import Builder, Graph
from graphnet.ir.text import parse
from graphnet.lowering.plan.plan import make_plan
from graphnet.lowering.targets import interpret
from graphnet.ops.evaluate import evaluate_step, to_double
from tests.case import Case

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


def graph_of(case: Case) -> Graph:
    """The case as a graph of one equation; it must print and parse to itself."""
    b = Builder("g")
    ins = [b.input(f"i{k}", t) for k, t in enumerate(case.ins)]
    outs = b.emit(case.op, ins, case.attrs)
    if case.op == "relayout":  # a result leaves a graph row-major
        outs = b.emit("relu", outs)
    graph = b.build(*outs)
    assert parse(str(graph)) == graph
    return graph


def _prepare(plan, storage, target):
    if target == "interpret":
        return interpret.prepare(plan, storage, poison=True)
    from graphnet.lowering.targets import cuda

    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True  # bytes of 255 are NaNs
    torch.use_deterministic_algorithms(True)
    try:
        return cuda.prepare(plan, storage, capture=False)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def run(
    graph: Graph,
    operands: list[torch.Tensor],
    exact: bool = False,
    target: str = "interpret",
    tolerance: float | None = None,
) -> None:
    """Raises AssertionError where a result differs from the oracle's."""
    device = "cuda" if target == "cuda" else "cpu"
    plan = make_plan(graph, target)
    storage = {
        i.value.name: t.clone().to(device) for i, t in zip(graph.inputs, operands, strict=True)
    }
    returned, _ = evaluate_step(graph, to_double({k: t.cpu() for k, t in storage.items()}))
    for v in graph.returns:
        dtype = v.type.dtype.torch
        poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
        storage.setdefault(v.name, torch.full(v.type.shape, poison, dtype=dtype, device=device))
    _prepare(plan, storage, target)()
    for v, want in zip(graph.returns, returned, strict=True):
        got = storage[v.name].cpu()
        if exact or not got.is_floating_point():
            assert torch.equal(got.to(want.dtype), want), v
            continue
        error = (got.double() - want).abs().max() if got.numel() else torch.zeros(())
        # A sum that cancels is as exact as its terms.
        most = tolerance or TOLERANCE[got.dtype]
        assert error <= most * max(1.0, float(want.abs().max())), (v, float(error))
