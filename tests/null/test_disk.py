"""Files: what is read and what is refused, what a failed write leaves, and folders of our own."""

import inspect
import os
import resource
import signal
import stat
import time

import pytest

from graphnet import config, disk
from graphnet.errors import CompileError, DiskError
from graphnet.lowering.build.pool import Pool
from graphnet.lowering.launch import files
from graphnet.lowering.launch.files import Source, load, materialise, private_dir, write_whole
from graphnet.train import checkpoint

SOURCE = Source("\n\ndef epilogue():\n    return 'ours'\n")


@pytest.fixture
def cache(tmp_path):
    home = tmp_path / "cache"
    home.mkdir(mode=0o700)
    with config.override(CACHE_DIR=str(home)):
        yield home


@pytest.fixture
def full():
    """A disk that takes 20 bytes a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert disk.read(tmp_path / "file", 5) == disk.read(tmp_path / "link") == b"12345"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with open(tmp_path / "holes", "wb") as file:
        file.truncate(1 << 42)
    start = time.monotonic()
    for name, why in (
        ("pipe", "not a regular file"), ("zero", "not a regular file"), (".", "a directory"),
        ("holes", "at most 5"),
    ):  # fmt: skip
        with pytest.raises(OSError, match=why):
            disk.read(tmp_path / name, 5)
    assert time.monotonic() - start < 1


def test_a_durable_write_syncs_the_file_then_renames_then_syncs_the_folder(tmp_path, monkeypatch):
    events = []
    sync, replace = os.fsync, os.replace

    def fsync(handle):
        about = os.fstat(handle)
        events.append("folder" if stat.S_ISDIR(about.st_mode) else f"file of {about.st_size}")
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    checkpoint.atomic_write(tmp_path / "file", b"12345")
    assert events == ["file of 5", "rename", "folder"]
    events.clear()
    disk.write(tmp_path / "file", b"123")  # of the cache: it is made again
    assert events == ["rename"]


def test_a_full_disk_is_a_typed_error_and_leaves_nothing(cache, full):
    with pytest.raises(DiskError, match=r"(?s)cannot write .*generated.*help: .*free some space"):
        materialise(SOURCE)
    assert list(private_dir("generated").iterdir()) == []


def test_what_stands_in_the_way_of_a_generated_file_is_a_typed_error(cache):
    path = private_dir("generated") / f"{SOURCE.name}.py"
    path.mkdir()
    with pytest.raises(CompileError, match="Is a directory"):
        materialise(SOURCE)
    assert list(path.parent.iterdir()) == [path]
    path.rmdir()
    os.mkfifo(path)  # is no file of ours, and gives way
    assert materialise(SOURCE).read_text() == SOURCE.text
    with pytest.raises(CompileError, match="cannot write"):
        write_whole(cache / "no folder" / "x", b"")


def test_the_cache_follows_no_links(cache, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o755)
    (cache / "generated").symlink_to(victim)
    with pytest.raises(CompileError, match=r"generated is a symbolic link"):
        materialise(SOURCE)
    assert list(victim.iterdir()) == [] and victim.stat().st_mode & 0o777 == 0o755
    (tmp_path / "elsewhere").symlink_to(cache)
    with (
        config.override(CACHE_DIR=str(tmp_path / "elsewhere")),
        pytest.raises(CompileError, match="elsewhere is a symbolic link"),
    ):
        private_dir("binaries")


def test_a_build_says_what_is_wrong_with_its_cache(cache, tmp_path):
    """Workers are started in threads; the build itself raises what stands in their way."""
    (tmp_path / "victim").mkdir()
    (cache / "generated").symlink_to(tmp_path / "victim")
    with pytest.raises(CompileError, match="generated is a symbolic link"):
        Pool([("key", {})], lambda key, answer: None).run()


def test_a_cache_that_others_can_write_is_refused(cache):
    own = private_dir("generated")
    own.chmod(0o755)  # others may have read it, but put nothing there
    assert private_dir("generated").stat().st_mode & 0o777 == 0o700
    for folder in (own, cache):
        for mode in (0o720, 0o702, 0o777):
            folder.chmod(mode)
            with pytest.raises(CompileError, match=rf"others can write to .*mode {mode:04o}"):
                private_dir("generated")
        folder.chmod(0o700)


def test_what_runs_and_what_is_read_as_its_source_is_the_verified_text(cache, monkeypatch):
    """Triton asks `inspect` for the text of a function when it is defined, and again later."""
    own = files.materialise

    def exchanged(source, folder=None):
        path = own(source, folder)
        path.write_text(source.text.replace("ours", "evil"))  # same size, behind the check
        return path

    monkeypatch.setattr(files, "materialise", exchanged)
    found = load(SOURCE, "graphnet_exchanged")
    assert found() == "ours"
    assert inspect.getsource(found) == "def epilogue():\n    return 'ours'\n"
