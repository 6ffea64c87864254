#!/usr/bin/env python3
"""Renews the tables and pictures from benchmarks/results; with --check only says what is stale.

    python benchmarks/run.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import index, plots  # noqa: E402
from graphnet.train.checkpoint import atomic_write  # noqa: E402


def stale_plots(results: index.Results, folder: Path = index.PLOTS) -> list[str]:
    """Pictures that are missing, drawn from another result, or of none."""
    names = plots.wanted(results)
    wrong = [p.name for p in folder.glob("*.png") if p.stem not in names]
    for name, (_, stem) in names.items():
        path = folder / f"{name}.png"
        if not path.exists() or plots.drawn_from(path) != plots.fingerprint(results[stem]):
            wrong.append(path.name)
    return sorted(wrong)


def main(argv: list[str]) -> int:
    if argv not in ([], ["--check"]):
        print("usage: python benchmarks/run.py [--check]", file=sys.stderr)
        return 2
    results = index.read()
    if argv:
        wrong = [str(p.relative_to(ROOT)) for p in index.stale(results)] + stale_plots(results)
        for name in wrong:
            print(f"{name} is stale: run python benchmarks/run.py")
        return int(bool(wrong))
    found = index.sections(results)
    for page in index.stale(results):
        atomic_write(page, index.renewed(page.read_text(), found).encode())
        print(f"renewed {page.relative_to(ROOT)}")
    for path in plots.draw(results, index.PLOTS):
        print(f"drew {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
