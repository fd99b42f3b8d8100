"""Whole or absent: whatever moment a kill picks, the old artifact or the new one is there, and never half of one."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pathfm.errors import StoreError
from pathfm.store.commit import (
    beside,
    commit_dir,
    commit_file,
    content_digest,
    discard_partials,
    partial,
    read_json,
    recover,
    sweep,
    write_json,
)
from pathfm.workers import ProcessName

PROGRAM = """
import sys
from pathlib import Path
from pathfm.store.commit import commit_dir
with commit_dir(Path(sys.argv[1])) as folder:
    (folder / "content").write_text(sys.argv[2])
"""


def _commit_in_child(path, text, crash_at=""):
    environment = {**os.environ, "PATHFM_CRASH_AT": crash_at}
    return subprocess.run([sys.executable, "-c", PROGRAM, str(path), text], env=environment, check=False).returncode


@pytest.mark.parametrize("point", ["store.commit.before_rename", "store.commit.between_renames"])
def test_a_kill_leaves_the_old_folder_and_the_rerun_replaces_it(tmp_path, point):
    path = tmp_path / "artifact"
    assert _commit_in_child(path, "old") == 0
    assert _commit_in_child(path, "new", point) == -signal.SIGKILL
    recover(path)
    assert (path / "content").read_text() == "old"
    assert _commit_in_child(path, "new") == 0
    sweep(tmp_path)
    assert (path / "content").read_text() == "new"
    assert [item.name for item in tmp_path.iterdir()] == ["artifact"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), commit_dir(tmp_path / "folder") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    with pytest.raises(RuntimeError), commit_file(tmp_path / "file") as temporary:
        temporary.write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def _partial_of(path, **other):
    return beside(path, f".{ProcessName.here()._replace(**other)}.partial")


def test_sweep_removes_what_is_certainly_dead_and_nothing_else(tmp_path):
    here, parent = ProcessName.here(), os.getppid()
    start = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19])
    live = [
        _partial_of(tmp_path / "mine"),
        _partial_of(tmp_path / "parent", pid=parent, start=start),
        _partial_of(tmp_path / "other machine", machine="0", boot="0", pid=2**30),
        _partial_of(tmp_path / "other container", space="1", pid=2**30),
        _partial_of(tmp_path / "just before the boot, or a copy of this machine", boot="0"),
        tmp_path / ".of no process.partial",
    ]
    dead = [
        _partial_of(tmp_path / "folder", pid=2**30),
        _partial_of(tmp_path / "reused number", start=here.start + 1),
        _partial_of(tmp_path / "before the boot", boot="0"),
    ]
    for folder in (*live, *dead):
        folder.mkdir()
        (folder / "content").touch()
    old = time.time() - 2 * 24 * 3600
    for folder in (dead[2], live[2]):
        os.utime(folder, (old, old))
    _partial_of(tmp_path / "a.h5", pid=2**30).touch()
    sweep(tmp_path)
    assert set(tmp_path.iterdir()) == set(live)


def test_discarding_takes_the_partials_of_one_target_whoever_wrote_them(tmp_path):
    theirs = _partial_of(tmp_path / "a.zarr", machine="0", boot="0")
    mine = partial(tmp_path / "a.zarr")
    others = [_partial_of(tmp_path / name) for name in ("a", "a.zarr.zarr", "b.zarr")]
    for folder in (theirs, mine, *others):
        folder.mkdir()
    discard_partials(tmp_path / "a.zarr")
    assert set(tmp_path.iterdir()) == set(others)


def test_a_check_that_refuses_leaves_everything_as_it_was(tmp_path):
    path = tmp_path / "artifact"
    with commit_dir(path) as folder:
        (folder / "content").write_text("old")

    def refuse():
        assert len(list(tmp_path.iterdir())) == 2, "asked last, when all is written"
        raise StoreError("lost")

    for commit in (commit_dir, commit_file):
        with pytest.raises(StoreError, match="lost"), commit(path, refuse) as temporary:
            (temporary / "content" if commit is commit_dir else temporary).write_text("new")
    assert (path / "content").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_loses_nothing_and_is_named(small_disk):
    kept, large = small_disk / "kept", b"x" * 900_000
    with commit_dir(kept) as folder:
        (folder / "content").write_bytes(large[:300_000])
    with pytest.raises(StoreError, match=r"kept: the disk is full \(make room"), commit_dir(kept) as folder:
        (folder / "content").write_bytes(large)
    with pytest.raises(StoreError, match="the disk is full"), commit_file(small_disk / "file") as temporary:
        temporary.write_bytes(large)
    assert list(small_disk.iterdir()) == [kept]
    assert (kept / "content").stat().st_size == 300_000
    with commit_file(small_disk / "file") as temporary:
        temporary.write_bytes(large[:300_000])


def test_a_read_only_disk_is_named(small_disk):
    with commit_file(small_disk / "kept") as temporary:
        temporary.write_text("old")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for commit in (commit_dir, commit_file):
        with pytest.raises(StoreError, match="read-only"), commit(small_disk / "kept") as temporary:
            temporary.write_text("new")
    assert (small_disk / "kept").read_text() == "old"


def test_a_second_rename_that_fails_puts_the_old_one_back(tmp_path, monkeypatch):
    path = tmp_path / "artifact"
    with commit_dir(path) as folder:
        (folder / "content").write_text("old")
    rename = Path.rename

    def fail_on_partials(self, target):
        if self.suffix == ".partial":
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_on_partials)
    with pytest.raises(StoreError, match="the disk is full"), commit_dir(path) as folder:
        (folder / "content").write_text("new")
    assert (path / "content").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_another_process_discards_is_named(tmp_path):
    path = tmp_path / "artifact"
    with pytest.raises(StoreError, match="another process has removed it"), commit_dir(path):
        discard_partials(path)
    assert list(tmp_path.iterdir()) == []


def test_who_lost_the_right_to_write_hears_that_and_not_its_consequence(tmp_path):
    def refuse():
        raise StoreError("lost")

    with pytest.raises(StoreError, match="lost"), commit_dir(tmp_path / "artifact", refuse):
        discard_partials(tmp_path / "artifact")


def test_errors_about_other_files_pass(tmp_path):
    with pytest.raises(FileNotFoundError), commit_dir(tmp_path / "out" / "artifact"):
        (tmp_path / "slide.svs").read_bytes()


@pytest.mark.parametrize("name", ["a[1]*?.zarr", "ß" * 120 + ".zarr", "x" * 250])
def test_strange_and_long_names(tmp_path, name):
    path = tmp_path / name
    for text in "12":
        with commit_dir(path) as folder:
            (folder / "x").write_text(text)
        recover(path)
        assert (path / "x").read_text() == text
    assert list(tmp_path.iterdir()) == [path]
    assert beside(tmp_path / ("x" * 249 + "y"), "") != beside(tmp_path / ("x" * 249 + "z"), "")


def test_the_digest_sees_names_and_bytes_but_no_record(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    first = content_digest(tmp_path / "a")
    for name in ("record.json", "timing.csv", "events-host.jsonl", ".b.lease", ".b.host-1.partial"):
        (tmp_path / "a" / name).write_text("{}")
    assert content_digest(tmp_path / "a") == first
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    assert content_digest(tmp_path / "a") != first


def test_json_is_refused_when_damaged(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1})
    assert read_json(tmp_path / "a.json") == {"b": 1}
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(StoreError, match="not a JSON file"):
        read_json(tmp_path / "a.json")
