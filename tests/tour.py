"""What docs/tour.md shows, made by the compiler itself: `python -m tests.tour` writes it anew.

A block of the page stands behind a line `<!-- tour: NAME -->`. The first one, `model`, is the
reader's program and is run; the others are what the stages print, cut to the lines that the page
talks about.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tour.md"
_BLOCK = re.compile(r"(<!-- tour: (\w+) -->\n```\w*\n)(.*?)(```)", re.S)
_PLACE = re.compile(r"  \S*tour\.md:\d+")


def lines(text: object, pattern: str) -> str:
    """The lines of a text that a pattern finds, without their indentation."""
    found = (line.strip() for line in str(text).splitlines() if re.search(pattern, line))
    return "".join(f"{line}\n" for line in found)


def blocks(page: str) -> dict[str, str]:
    """The text of every block but `model`."""
    from graphnet.api import lower
    from graphnet.report import inspect_text, why_text

    program = next(m[3] for m in _BLOCK.finditer(page) if m[2] == "model")
    space: dict[str, Any] = {}
    exec(compile(program, str(PAGE), "exec"), space)
    net, shape, training = space["net"], space["shape"], space["training"]
    low = lower(net, shape, target="cuda", precision="bf16", **training)
    half = lower(space["fork"], shape, target="cuda", precision="bf16", **training)
    traced, joint, fused = (low.stages.graph(s) for s in ("traced", "joint", "fused"))
    epilogues = {s.kernel: s.epilogues for s in low.plan.parts}
    facts = {
        "model": "net", "batch": shape[0], "train": True, "precision": "bf16", "target": "cuda",
        "gpu": "h200", "stage": "plan",
    }  # fmt: skip
    make: dict[str, Callable[[], str]] = {
        "traced": lambda: str(traced),
        "joint": lambda: lines(joint, "_grad|_wgrad|_dgrad|_update|cast"),
        "fused": lambda: lines(fused, r"conv1|loss|conv2d_wgrad"),
        "why": lambda: why_text(half),
        "plan": lambda: str(low.plan),
        "forward": lambda: _function(epilogues["region"][0]),
        "update": lambda: _function(epilogues["linear_wgrad"][0]),
        "inspect": lambda: inspect_text(net, low, facts),
    }
    return {k: _PLACE.sub("", f().rstrip()) + "\n" for k, f in make.items()}


def _function(source: Any) -> str:
    return source.text.partition("@triton.jit\n")[2]


def renewed(page: str) -> str:
    """The page with every block as the code prints it now."""
    made = blocks(page)
    return _BLOCK.sub(lambda m: m[0] if m[2] == "model" else m[1] + made[m[2]] + m[4], page)


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
