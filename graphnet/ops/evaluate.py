"""Running a graph equation by equation: with `reference` it is the oracle of everything else."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from graphnet.errors import GraphError
from graphnet.ir.graph import Graph, Value
from graphnet.ops.fused import run_eqn


def evaluate_all(
    graph: Graph, inputs: Mapping[str, torch.Tensor], mode: str = "reference"
) -> dict[Value, torch.Tensor]:
    """Every value of the graph, from the inputs by name."""
    env: dict[Value, torch.Tensor] = {}
    for i in graph.inputs:
        if i.value.name not in inputs:
            raise GraphError(f"input {i.value}: {i.value.type} of {graph.name} is not given")
        env[i.value] = inputs[i.value.name]
    for eqn in graph.eqns:
        outs = run_eqn(eqn, [env[v] for v in eqn.inputs], mode)
        env.update((v, o) for v, o in zip(eqn.outputs, outs, strict=True) if v is not None)
    return env


def evaluate(
    graph: Graph, inputs: Mapping[str, torch.Tensor], mode: str = "reference"
) -> list[torch.Tensor]:
    """What the graph returns; commits are left out."""
    env = evaluate_all(graph, inputs, mode)
    return [env[v] for v in graph.returns]


def evaluate_step(
    graph: Graph, inputs: Mapping[str, torch.Tensor], mode: str = "reference"
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """What the graph returns, and the new value of each committed input by name."""
    env = evaluate_all(graph, inputs, mode)
    return [env[v] for v in graph.returns], {old.name: env[new] for old, new in graph.commits}


def to_double(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Floating-point inputs in float64, the others as they are."""
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
