"""Reports what each pass did: GRAPHNET_DEBUG on stderr, GRAPHNET_DUMP in a folder."""

from __future__ import annotations

import difflib
import sys
import time
from pathlib import Path

from graphnet import config
from graphnet.errors import ConfigError
from graphnet.ir.graph import Graph
from graphnet.passes.rewrite import Log


class Observer:
    """Gets the traced graph first, then the graph after each pass.

    GRAPHNET_DEBUG  1 a line for each pass; 3 also its rule hits and refusals; 4 also the graph
    GRAPHNET_DUMP   NAME-NN-PASS.txt, .dot and, where the pass changed something, .diff
    """

    def __init__(self, traced: Graph, log: Log) -> None:
        self.log, self.level, self.folder = log, config.debug(), config.dump_dir()
        self.hits: dict[str, int] = {}
        self.refusals: set[tuple[str, str]] = set()
        self._say(1, f"trace {traced.name}: {len(traced.eqns)} equations")
        self._say(4, str(traced))
        self._dump(traced, None, 0, "traced")
        self.start = time.perf_counter()

    def passed(self, number: int, name: str, before: Graph, after: Graph) -> Graph:
        """Reports a pass and returns its graph."""
        ms = 1e3 * (time.perf_counter() - self.start)
        hits = {k: n - self.hits.get(k, 0) for k, n in self.log.hits.items()}
        hits = {k: n for k, n in hits.items() if n}
        refused = {k: why for k, why in self.log.refusals.items() if k not in self.refusals}
        self._say(
            1,
            f"pass {number:2} {name}: {len(before.eqns)} -> {len(after.eqns)} equations, "
            f"{sum(hits.values())} hits, {len(refused)} refused, {ms:.1f} ms",
        )
        for rule, n in hits.items():
            self._say(3, f"  {n} x {rule}")
        for (rule, label), why in refused.items():
            self._say(3, f"  refused: {rule} at {label}: {why}")
        self._say(4, str(after))
        self._dump(after, before, number, name)
        self.hits, self.refusals = dict(self.log.hits), set(self.log.refusals)
        self.start = time.perf_counter()
        return after

    def _say(self, level: int, text: str) -> None:
        if self.level >= level:
            print(f"graphnet: {text}", file=sys.stderr)

    def _dump(self, graph: Graph, before: Graph | None, number: int, name: str) -> None:
        if not self.folder:
            return
        from graphnet.ir.analysis import to_dot

        stem = f"{graph.name.split('.')[0]}-{number:02d}-{name}"
        files = {"txt": str(graph), "dot": to_dot(graph)}
        if before is not None and str(before) != str(graph):
            old, new = (str(g).splitlines(keepends=True) for g in (before, graph))
            files["diff"] = "".join(difflib.unified_diff(old, new, "before", name, n=1))
        base = Path(self.folder)
        try:
            base.mkdir(parents=True, exist_ok=True)
            for suffix, text in files.items():
                (base / f"{stem}.{suffix}").write_text(text)
        except OSError as error:
            raise ConfigError(
                f"GRAPHNET_DUMP: cannot write to {base}: {error.strerror}", help="name a folder"
            ) from None
