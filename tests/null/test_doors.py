"""The examples of docs/doors.md run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/doors.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def test_the_examples_run_as_pasted(tmp_path):
    (tmp_path / "pasted.py").write_text("\n".join(BLOCKS))  # importing torch takes the time
    done = subprocess.run(
        [sys.executable, "pasted.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_page_has_these_examples_and_its_links():
    assert len(BLOCKS) == 3
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT)
    assert links and all((ROOT / "docs" / link).exists() for link in links)
