"""Whole or absent: whatever moment a kill picks, the old artifact or the new one is there, and never half of one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from pathfm.errors import StoreError
from pathfm.store.commit import commit_dir, commit_file, content_digest, read_json, recover, sweep, write_json

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


def test_sweep_leaves_a_running_process_alone(tmp_path):
    live = tmp_path / f".artifact.{os.getppid()}.partial"
    live.mkdir()
    dead_folder, dead_file = tmp_path / ".artifact.999999999.partial", tmp_path / ".a.h5.999999999.partial"
    dead_folder.mkdir()
    dead_file.touch()
    sweep(tmp_path)
    assert live.exists()
    assert not dead_folder.exists()
    assert not dead_file.exists()


def test_names_with_glob_characters(tmp_path):
    path = tmp_path / "a[1]*?.zarr"
    with commit_dir(path) as folder:
        (folder / "x").write_text("1")
    recover(path)
    assert (path / "x").read_text() == "1"


def test_the_digest_sees_names_and_bytes_but_no_record(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    first = content_digest(tmp_path / "a")
    (tmp_path / "a" / "record.json").write_text("{}")
    assert content_digest(tmp_path / "a") == first
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    assert content_digest(tmp_path / "a") != first


def test_json_is_refused_when_damaged(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1})
    assert read_json(tmp_path / "a.json") == {"b": 1}
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(StoreError, match="not a JSON file"):
        read_json(tmp_path / "a.json")
