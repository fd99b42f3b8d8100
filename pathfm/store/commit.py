"""Artifacts appear whole or not at all: write beside, flush to disk, rename.

A directory that exists cannot be replaced by a rename, so the old one moves aside first (``.NAME.old``), then the new one
moves in. A kill between the two leaves the old one aside; ``recover`` puts it back, and every commit and open of a folder
begins with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pathfm.errors import StoreError
from pathfm.faults import crash_point

RECORDS = frozenset({"record.json", "timing.csv"})
"""Files that tell when, where and how fast; they are no content and take no part in digests."""


def _beside(path: Path) -> Path:
    return path.parent / f".{path.name}.{os.getpid()}.partial"


def _aside(path: Path) -> Path:
    return path.parent / f".{path.name}.old"


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    stat = Path(f"/proc/{pid}/stat")
    # A killed process that nobody has waited for still has a number, and writes nothing any more.
    return not (stat.exists() and stat.read_text(errors="replace").rpartition(")")[2].split()[0] == "Z")


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def recover(path: Path) -> None:
    """Finish or undo a replacement of the folder ``path`` that a kill interrupted; one look when there is nothing to do."""
    old = _aside(path)
    if not old.exists():
        return
    if path.exists():
        _delete(old)
    else:
        old.rename(path)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written in ``folder``; what a running process here writes is left alone.

    A stage does this once when it starts, so that a commit never has to list a folder of many thousand slides.
    """
    for partial in folder.glob(".*.partial"):
        pid = partial.name.removesuffix(".partial").rpartition(".")[2]
        if pid.isdigit() and not _is_running(int(pid)):
            _delete(partial)


@contextmanager
def commit_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success its content becomes ``path``, on error nothing is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        _flush(temporary)
        crash_point("store.commit.before_rename")
        temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def commit_dir(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder; on success it becomes ``path`` (replacing what was there), on error nothing changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    temporary, old = _beside(path), _aside(path)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, files in os.walk(temporary):
            for name in files:
                _flush(Path(folder, name))
            _flush(Path(folder))
        crash_point("store.commit.before_rename")
        if path.exists():
            path.rename(old)
            crash_point("store.commit.between_renames")
        temporary.rename(path)
        _flush(path.parent)
        if old.exists():
            _delete(old)
    finally:
        if temporary.exists():
            _delete(temporary)


def write_json(path: Path, content: object) -> None:
    """Writes JSON with sorted keys, whole or not at all."""
    with commit_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        StoreError: the file is absent or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StoreError("file not found", where=str(path)) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StoreError("not a JSON file", where=str(path), fix="delete it and run the stage again") from error
    if not isinstance(content, dict):
        raise StoreError("not a JSON object", where=str(path))
    return content


def content_digest(path: Path) -> str:
    """SHA-256 over the relative names and bytes of a file or folder, without records and half-written files: "identical"."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
    for file in files:
        if file.name in RECORDS or any(part.endswith(".partial") for part in file.relative_to(path).parts):
            continue
        name = file.relative_to(path).as_posix() if file != path else file.name
        digest.update(f"{len(name.encode())}:{name}:{file.stat().st_size}:".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
