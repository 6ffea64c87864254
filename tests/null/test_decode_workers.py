"""Workers that decode image files: how they start, end, and are killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graphnet import config
from graphnet.errors import DataError
from graphnet.train import decoding
from graphnet.train.data import Batches
from graphnet.train.folder import Reading
from tests.image_files import make, seen, train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path):
    with config.override(CACHE_DIR=str(tmp_path / "cache")):
        yield


def test_workers_need_no_main_guard(tmp_path):
    make(tmp_path)
    code = (
        "from graphnet.train.data import Batches, load\n"
        "from graphnet.train.folder import Reading\n"
        f"data = load('imagefolder:{tmp_path}', 'train', shape=(3, 8, 8), cache=False)\n"
        "print(sum(len(y) for _, y in Batches(data, 4, reading=Reading(2))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-"], input=code, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["12"], done.stderr


def test_workers_end_although_another_process_holds_their_pipes(tmp_path):
    """A process that is forked meanwhile, as a DataLoader does, keeps them open."""
    make(tmp_path)
    ends = []
    for _ in Batches(train(tmp_path), 4, reading=Reading(1)):
        if not ends:
            ends.append(os.fork())
            if not ends[0]:
                time.sleep(60)
                os._exit(0)
    os.kill(ends[0], 0)  # it still sleeps: nothing waited for it
    os.kill(ends[0], signal.SIGKILL)
    os.waitpid(ends[0], 0)


HOSTILE = """
import sys, os, time
from graphnet.train import decode_worker
whole = decode_worker.decode
def decode(path, shape):
    if path.endswith("003.png"): os.kill(os.getpid(), 11)
    if path.endswith("008.png"): time.sleep(60)
    return whole(path, shape)
decode_worker.decode = decode
sys.exit(decode_worker.main(sys.argv[1:]))
"""


def test_a_file_that_kills_or_stalls_its_decoder_is_quarantined(tmp_path, monkeypatch):
    make(tmp_path)
    ours = decoding.Decoders._command
    command = lambda self: [sys.executable, "-c", HOSTILE, *ours(self)[-5:]]
    monkeypatch.setattr(decoding.Decoders, "_command", command)
    monkeypatch.setattr(decoding, "LIMIT_S", 1)
    data = train(tmp_path, max_bad=1)
    batches = Batches(data, 12, shuffle=False, reading=Reading(2))
    for _ in batches:
        assert batches.rows.tolist() == [0, 1, 2, 4, 5, 6, 7, 9, 10, 11]
    reasons = {Path(r["path"]).name: r["reason"] for r in data.report()}
    assert reasons["003.png"] == "the decoder ended with signal 11"
    assert reasons["008.png"].startswith("decoding takes more than 1 s")
    monkeypatch.setattr(
        decoding.Decoders, "_command", lambda self: [sys.executable, "-c", "raise OSError('no')"]
    )
    with pytest.raises(DataError, match="a decode worker does not start: OSError: no"):
        seen(Batches(train(tmp_path, cache=False), 4, reading=Reading(1)))


KILLED = """
import sys, os
from pathlib import Path
from graphnet.train import decode_worker
def killed(name, times):
    for k in range(times):
        try:
            os.close(os.open(Path(sys.argv[-1]) / f"{name}-{k}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        os.kill(os.getpid(), 9)
whole = decode_worker.decode
def decode(path, shape):
    if "cat" in path: killed(Path(path).name, 3)
    return whole(path, shape)
decode_worker.decode = decode
killed("start", 4)
sys.exit(decode_worker.main(sys.argv[1:-1]))
"""


def test_what_lies_in_the_working_folder_is_not_imported(tmp_path, monkeypatch):
    """A worker is a module that Python runs, and would look there first: in a run of others."""
    make(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise SystemExit('it ran')")
    data = train(tmp_path / "data", cache=False)
    assert sum(len(y) for _, y in Batches(data, 12, reading=Reading(1))) == 12


@pytest.mark.parametrize("batch", [2, 12])
def test_a_killed_worker_costs_no_image(tmp_path, monkeypatch, batch):
    """In a chunk of one file and in larger ones, over a file and while it starts."""
    make(tmp_path / "data")
    (tmp_path / "kills").mkdir()
    ours = decoding.Decoders._command
    command = lambda self: [sys.executable, "-c", KILLED, *ours(self)[-5:], str(tmp_path / "kills")]
    monkeypatch.setattr(decoding.Decoders, "_command", command)
    data = train(tmp_path / "data", cache=False, max_bad=0)
    batches = Batches(data, batch, shuffle=False, reading=Reading(1))
    assert sum(len(y) for _, y in batches) == 12 and data.quarantined == {}
    files = len(list((tmp_path / "data/train/cat").iterdir()))
    assert len(list((tmp_path / "kills").iterdir())) == 4 + 3 * files
