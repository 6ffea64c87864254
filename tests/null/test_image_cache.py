"""The cache of decoded images: what it saves, and that no damage of it reaches a net."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from graphnet import config
from graphnet.errors import ConfigError
from graphnet.train import decode_worker, decoding, folder
from graphnet.train.data import Batches
from graphnet.train.folder import Reading
from tests.image_files import make, seen, train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path):
    with config.override(CACHE_DIR=str(tmp_path / "cache")):
        yield tmp_path / "cache" / "images"


@pytest.fixture
def decoded(monkeypatch):
    """Counts the files that are decoded."""
    counts = []
    whole = decoding.Decoders.run

    def run(self, jobs):
        counts.append(len(jobs))
        return whole(self, jobs)

    monkeypatch.setattr(decoding.Decoders, "run", run)

    def since():
        total = sum(counts)
        counts.clear()
        return total

    return since


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_epoch_decodes_nothing(tmp_path, decoded, workers):
    make(tmp_path)
    data = train(tmp_path)
    batches = Batches(data, 5, reading=Reading(workers))
    seen(batches)
    assert decoded() == 12 and data.cache.filled() == 12
    seen(batches)
    seen(Batches(train(tmp_path), 5))  # another process would find it, too
    assert decoded() == 0
    (tmp_path / "train" / "cat" / "000.png").touch()  # changed: another set
    seen(Batches(train(tmp_path), 5))
    assert decoded() == 12
    seen(Batches(train(tmp_path, (3, 16, 16)), 5))
    assert decoded() == 12


def test_every_damage_of_the_cache_is_found_and_mended(tmp_path, decoded, cache):
    make(tmp_path)
    want = seen(Batches(train(tmp_path), 5))
    (home,) = (p for p in cache.iterdir() if not p.name.startswith("."))
    images, sums = home / "images.u8", home / "sums.u64"
    assert (home.stat().st_mode & 0o777, cache.stat().st_mode & 0o777) == (0o700, 0o700)
    decoded()

    def changed(path, at, new):
        data = bytearray(path.read_bytes())
        data[at : at + len(new)] = new
        path.write_bytes(data)

    row = 3 * 24 * 24
    damages = [
        (lambda: changed(images, 4 * row + 77, b"\xaa"), 1),
        (lambda: changed(images, 2 * row, bytes(3 * row)), 3),
        (lambda: changed(sums, 8 * 7, b"\1\2\3"), 1),
        (lambda: changed(sums, 0, bytes(16)), 2),
        # A row in the place of another one is as bad as a torn one.
        (lambda: (changed(images, 0, images.read_bytes()[row : 2 * row]),
                  changed(sums, 0, sums.read_bytes()[8:16])), 1),
        (lambda: os.truncate(images, 5 * row), 12),
        (lambda: os.truncate(sums, 8), 12),
        (lambda: images.unlink(), 12),
        (lambda: (home / "manifest.json").write_text("{"), 12),
        (lambda: (home / "manifest.json").write_text("{}"), 12),
    ]  # fmt: skip
    for damage, rows in damages:
        damage()
        assert seen(Batches(train(tmp_path), 5)) == want and decoded() == rows
        assert seen(Batches(train(tmp_path), 5)) == want and decoded() == 0
    assert len(list(cache.iterdir())) == 1  # nothing partial is left


def test_damage_behind_the_first_epoch_is_found_in_the_second(tmp_path, decoded, cache):
    """What was just written is read unseen; what a disk made of it is not."""
    make(tmp_path)
    data = train(tmp_path)
    want = seen(Batches(data, 5))
    (images,) = cache.glob("*/images.u8")
    with open(images, "r+b") as file:
        file.seek(4 * 3 * 24 * 24)
        file.write(bytes(100))
    decoded()
    assert seen(Batches(data, 5)) == want and decoded() == 1 == data.cache.damaged


def test_a_cache_that_others_could_write_is_refused(tmp_path, cache):
    make(tmp_path)
    train(tmp_path)
    (home,) = cache.iterdir()
    home.chmod(0o777)
    with pytest.raises(ConfigError, match="others may write to it"):
        train(tmp_path)
    home.chmod(0o700)
    home.rename(cache / "elsewhere")
    home.symlink_to(cache / "elsewhere")
    with pytest.raises(ConfigError, match="is a link"):
        train(tmp_path)


def test_a_killed_run_leaves_its_rows(tmp_path, decoded):
    make(tmp_path)
    code = (
        "import os, signal\n"
        "from graphnet.train.data import Batches, load\n"
        f"data = load('imagefolder:{tmp_path}', 'train', shape=(3, 24, 24))\n"
        "for _ in Batches(data, 5): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = {**os.environ, "GRAPHNET_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, timeout=120)
    assert done.returncode == -9
    seen(Batches(train(tmp_path), 5))
    assert decoded() == 12 - 5


def test_no_room_for_the_cache_is_said(tmp_path, monkeypatch, decoded):
    make(tmp_path)
    usage = lambda path: type("Usage", (), {"free": 100})
    monkeypatch.setattr(folder.shutil, "disk_usage", usage)
    data = train(tmp_path)
    assert data.cache is None and "they take 20736 bytes" in data.note
    batches = Batches(data, 5)
    assert seen(batches) and seen(batches) and decoded() == 24


def test_a_cache_folder_that_cannot_be_made_is_said(tmp_path):
    make(tmp_path)
    with config.override(CACHE_DIR="/dev/null/no"):
        data = train(tmp_path)
    assert data.cache is None and "cannot be made" in data.note and len(data.read([1, 2])) == 2


def test_a_disk_that_fills_up_costs_only_the_cache(tmp_path, monkeypatch):
    make(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    want = seen(Batches(train(tmp_path, cache=False), 5))
    monkeypatch.setattr(decode_worker, "write_row", full)
    data = train(tmp_path)
    assert seen(Batches(data, 5)) == want and data.cache.filled() == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_that_is_dropped_gives_its_files_back(tmp_path, workers):
    make(tmp_path)
    here = lambda: [p for p in map(os.path.realpath, Path("/proc/self/fd").iterdir())
                    if str(tmp_path) in p]  # fmt: skip
    data = train(tmp_path)
    seen(Batches(data, 5, reading=Reading(workers)))
    assert here()
    del data
    assert not here() and "images.u8" not in Path("/proc/self/maps").read_text()
