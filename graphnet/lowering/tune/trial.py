"""Computations that may never end are first run in a process of their own.

Warps that wait for each other cannot be run by Triton's interpreter, so the first time that such a
kernel runs is on a GPU. If it waits in vain, the launch never ends, and whoever waits for it never
does either. The proof therefore has it run here first: `tried` starts `python -m
graphnet.lowering.tune.trial`, hands it the graph and the choices, and gives it LIMIT_S. The child
compares each result with the reference and prints a line about it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from graphnet import config
from graphnet.ir.graph import Eqn, Graph
from graphnet.lowering.launch.choice import Choice
from graphnet.lowering.tune.tables import Entry, as_table

if TYPE_CHECKING:
    from graphnet.lowering.launch.steps import Launch

LIMIT_S = 60.0  # for starting the process, too: some ten seconds on a GPU
# -P: `-m` would import from the working folder first, whosever it is.
COMMAND = (sys.executable, "-P", "-m", "graphnet.lowering.tune.trial")


def tried(
    graph: Graph, target: str, arch: int, cases: Sequence[tuple[Eqn, Choice]]
) -> list[str | None]:
    """How the result of each case differs from its reference, None where it does not.

    The list ends with a case that did not end in time, or that ended its process; those behind it
    were not run.
    """
    request = {
        "graph": str(graph), "target": target, "arch": arch,
        "cases": [{"eqn": graph.eqns.index(e), "entry": _entry(c)} for e, c in cases],
    }  # fmt: skip
    environment = {**os.environ, "GRAPHNET_CACHE_DIR": str(config.cache_dir())}
    child = subprocess.Popen(
        COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    try:
        said, errors = child.communicate(json.dumps(request), timeout=LIMIT_S)
        how = f"it ended its process ({(errors.strip().splitlines() or ['no message'])[-1][:200]})"
    except subprocess.TimeoutExpired:
        child.kill()
        said, _ = child.communicate()
        how = f"it did not end within {LIMIT_S:g} s in a process of its own"
    finally:
        child.kill()
    found: list[str | None] = [json.loads(line)["why"] for line in said.splitlines()]
    return found if len(found) == len(cases) else [*found, how]


def _entry(c: Choice) -> dict[str, Any]:
    return Entry(c.variant.name, c.problem, c.config, 1.0, "graphnet", "here", "now").as_dict()


def main() -> None:
    """Reads a request, runs its cases in order, and prints a line for each."""
    from dataclasses import replace

    from graphnet.ir.text import parse
    from graphnet.lowering.launch.equation import launches
    from graphnet.lowering.launch.registry import kernels_for
    from graphnet.lowering.plan.plan import Plan
    from graphnet.lowering.tune.proof import checked

    request = json.load(sys.stdin)
    graph, target = parse(request["graph"]), request["target"]
    for case in request["cases"]:
        table = as_table([Entry.from_dict(case["entry"])])
        kernels = replace(kernels_for(target, arch=request["arch"]), table=table)
        e = graph.eqns[case["eqn"]]
        steps: list[Launch] = launches(e, lambda v: v.name, kernels)  # type: ignore[assignment]
        why = checked(Plan(graph, target), e, steps)
        print(json.dumps({"why": why}), flush=True)


if __name__ == "__main__":
    main()
