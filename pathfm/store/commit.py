"""Artifacts appear whole or not at all: write beside, flush to disk, rename.

A directory that exists cannot be replaced by a rename, so the old one moves aside first (``.NAME.old``), then the new one
moves in. A kill between the two leaves the old one aside; ``recover`` puts it back, and every commit and open of a folder
begins with it.

What is half-written is called ``.NAME.PROCESS.partial``, where PROCESS says which process of which machine writes it: several
machines may write into one folder of a shared drive, and none removes what another still writes.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pathfm.errors import StoreError
from pathfm.faults import crash_point
from pathfm.workers import ProcessName

RECORDS = frozenset(
    {"record.json", "record-*.json", "timing.csv", "events-*.jsonl", "state.json", "shard-*.safetensors", "events.out.*"}
    | {"training.html", "[0-9]*Z-*.json"}
)
"""Names of files that tell when, where and how fast, or serve to go on (checkpoints, whose files depend on the number of
processes); they are no content and take no part in digests."""

_STEM_BYTES = 150
"""Longest part of a name that goes into the name of a file beside it: file systems allow 255 bytes in all."""
_DAY_S = 24 * 3600.0
_REPLACE_AGAIN = 20
"""Times that the replacement of a folder is tried again when readers put the old one back meanwhile."""
_GO_ON = "then run the same command again: what is finished is kept"
TROUBLE = {
    errno.ENOSPC: ("the disk is full", f"make room, {_GO_ON}"),
    errno.EDQUOT: ("the disk quota is used up", f"make room or have it raised, {_GO_ON}"),
    errno.EROFS: ("the folder cannot be written: the drive is read-only", "choose another output folder"),
    errno.EACCES: ("the folder cannot be written", "get write permission, or choose another output folder"),
    errno.EPERM: ("the folder cannot be written", "get write permission, or choose another output folder"),
    errno.EIO: ("the drive reports an input/output error", f"check the drive and its connection, {_GO_ON}"),
    errno.ESTALE: ("the network drive has lost a file", f"check its connection, {_GO_ON}"),
    errno.ENOENT: ("another process has removed it while it was written", "run the same command again"),
    errno.ENOTEMPTY: ("another process has written it at the same time", "run the same command again"),
    errno.EEXIST: ("another process is writing it at the same time", "run the same command again"),
}
"""Errors of drives that people can mend: what is said of them, and what to do."""


@contextmanager
def disk_errors(path: Path, check: Callable[[], None] | None = None) -> Iterator[None]:
    """Turns what a drive can do to the writing of ``path`` into a ``StoreError``; errors about files elsewhere pass.

    ``check`` is asked first: who has lost the right to write ``path`` often learns it by an error of the drive.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in TROUBLE or not _concerns(error.filename, path):
            raise
        if check:
            check()
        what, fix = TROUBLE[error.errno]
        raise StoreError(what, where=str(path), fix=fix) from error


def _concerns(file: object, path: Path) -> bool:
    """Whether the file an error names, if any, lies beside or in ``path``, or is a folder above it."""
    if not isinstance(file, (str, Path)):
        return True
    return Path(file).is_relative_to(path.parent) or path.is_relative_to(file)


def beside(path: Path, suffix: str) -> Path:
    """``.NAME<suffix>`` in the folder of ``path``; a long NAME is cut, and told from others by a hash."""
    name = path.name
    if len(name.encode()) > _STEM_BYTES:
        name = f"{name.encode()[: _STEM_BYTES - 9].decode(errors='ignore')}~{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return path.parent / f".{name}{suffix}"


def partial(path: Path) -> Path:
    """Where this process writes ``path`` until it is whole."""
    return beside(path, f".{ProcessName.here()}.partial")


def _aside(path: Path) -> Path:
    return beside(path, ".old")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network drives have no flushing of folders
            raise
    finally:
        os.close(handle)


def _flush_tree(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in files:
            _flush(Path(folder, name))
        _flush(Path(folder))


def _delete(path: Path) -> None:
    """Remove a file or folder as far as that goes: others may be at it too, and what stays is swept later."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def recover(path: Path) -> None:
    """Finish or undo a replacement of the folder ``path`` that a kill interrupted; one look when there is nothing to do.

    A replacement that is under way cannot be told from an interrupted one. Undoing it between its two renames gives a reader
    the old folder, and makes the one who replaces it try again.
    """
    old = _aside(path)
    if not old.exists():
        return
    if path.exists():
        _delete(old)
        return
    with suppress(OSError):  # meanwhile the new one is in place, or another process has put the old one back
        old.rename(path)


def sweep(folder: Path) -> None:
    """Remove what ended processes of this machine left half-written in ``folder``; that of all others is left alone.

    A stage does this once when it starts, so that a commit never has to list a folder of many thousand slides.
    """
    for path in folder.glob(".*.partial"):
        writer = ProcessName.parse(path.name.removesuffix(".partial").rpartition(".")[2])
        # A machine that was started again cannot be told from a copy of it that has its name: a day's silence decides.
        if writer and (writer.has_ended or (writer.of_earlier_boot and _age_s(path) > _DAY_S)):
            _delete(path)


def discard_partials(path: Path) -> None:
    """Remove every half-written ``path``, of whatever machine: for who has the right to write it alone (its lease).

    A writer that lost that right without noticing finds its folder gone, and fails without having changed anything.
    """
    stem = beside(path, "").name
    for other in path.parent.glob(".*.partial"):
        if other.name.removesuffix(".partial").rpartition(".")[0] == stem:
            _delete(other)


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


@contextmanager
def commit_file(path: Path, check: Callable[[], None] | None = None) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success its content becomes ``path``, on error nothing is left.

    Args:
        path: the file to make or replace.
        check: called last, and on errors of the drive; when it raises, nothing changes.

    Raises:
        StoreError: the drive is full, read-only or failing, or another process has interfered.
    """
    with disk_errors(path, check):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = partial(path)
        try:
            yield temporary
            _flush(temporary)
            crash_point("store.commit.before_rename")
            if check:
                check()
            temporary.replace(path)
            _flush(path.parent)
        finally:
            _delete(temporary)


@contextmanager
def commit_dir(path: Path, check: Callable[[], None] | None = None) -> Iterator[Path]:
    """Yields an empty temporary folder; on success it becomes ``path`` (replacing what was there), on error nothing changes.

    Args:
        path: the folder to make or replace.
        check: called last, when everything is on disk, and on errors of the drive; when it raises, nothing changes.

    Raises:
        StoreError: the drive is full, read-only or failing, or another process has interfered.
    """
    with disk_errors(path, check):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        temporary = partial(path)
        temporary.mkdir()
        try:
            yield temporary
            _flush_tree(temporary)
            crash_point("store.commit.before_rename")
            if check:
                check()
            _replace_dir(path, temporary)
        finally:
            _delete(temporary)


def _replace_dir(path: Path, new: Path) -> None:
    old = _aside(path)
    for is_last in [False] * _REPLACE_AGAIN + [True]:
        try:
            if path.exists():
                path.rename(old)
                crash_point("store.commit.between_renames")
            new.rename(path)
            break
        except OSError as error:
            recover(path)
            # Not empty: a reader has put the old one back, or is still removing an older one.
            if is_last or error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
    _flush(path.parent)
    _delete(old)


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


def content_files(path: Path) -> list[Path]:
    """The files of a file or folder that are its content: no records, no hidden files."""
    files = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
    plain = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    return [file for file in plain if not any(fnmatch.fnmatchcase(file.name, pattern) for pattern in RECORDS)]


def content_digest(path: Path) -> str:
    """SHA-256 over the relative names and bytes of a file or folder, without records and hidden files: "identical"."""
    digest = hashlib.sha256()
    for file in content_files(path):
        name = file.relative_to(path).as_posix() if file != path else file.name
        digest.update(f"{len(name.encode())}:{name}:{file.stat().st_size}:".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
