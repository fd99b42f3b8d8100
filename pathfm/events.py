"""What a run does, as it does it, for programs that watch: one JSON object per line, and each line proves the one before it.

Each process that writes has a file of its own, since a chain has one end: ``events-HOST-MACHINE.jsonl`` belongs to whoever has
locked it, and while a process of this machine has it, the next one takes ``events-HOST-MACHINE-2.jsonl``, and so on. Later
processes continue the chains that they find. ``run`` tells runs in a file apart. Only the fields listed in ``KINDS`` can be
written: no paths, no patients, nothing of a slide but its id; texts are cut as ``public_text`` says.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import hashlib
import itertools
import os
import re
import secrets
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from pathfm.addresses import SCHEMES
from pathfm.chain import ID, KEY_FILE, Head, folder_id, key_of_environment, read_end, seal
from pathfm.log import get_log
from pathfm.workers import ProcessName

_SLIDE = frozenset({"stage", "slide_id", "seconds", "counts", "reason"})
_BEHIND = frozenset({"bytes", "sha256"})
KINDS: Mapping[str, frozenset[str]] = {
    "run_started": frozenset({"stage", "versions", "settings", "slides", "shard"}),
    "run_ended": frozenset({"stage", "seconds", "counts"}),
    "slide_started": _SLIDE,
    "slide_done": _SLIDE,
    "slide_empty": _SLIDE,
    "slide_failed": _SLIDE,
    "progress": frozenset({"stage", "done", "total", "eta_s"}),
    "job_done": frozenset({"stage", "group", "fingerprint", "content", "receipt", "slides"}),
    "job_dropped": frozenset({"stage", "group"}),
    "result_written": frozenset({"stage", "slide_id", "identity", "bundle", "result"}),
    "quarantine_written": frozenset({"stage", "slide_id", "identity", "record"}),
    "ledger_opened": _BEHIND,
    "ledger_written": _BEHIND,
    "ledger_closed": _BEHIND,
    "run_recorded": frozenset({"manifest", "sha256"}),
    "recovered": _BEHIND,
    "chain_started": _BEHIND,
}
"""Every kind of event and the fields it may have, besides time, kind, host, pid and run, and those of the chain."""
MOST_UNWRITTEN = 1 << 20
"""Bytes that wait for room on a full disk; what happens while so many wait is not told."""
FULL = {errno.ENOSPC, errno.EDQUOT}

_SCHEME = rf"(?:[a-z][a-z0-9+]*://|(?:{'|'.join(sorted(SCHEMES))}):/)"
_ADDRESS = re.compile(rf"\b{_SCHEME}[^\s'\"?#]*?([^\s/'\"?#]*)(?:[?#][^\s'\"]*)?(?=[\s'\"]|$)", re.IGNORECASE)
_QUOTED = re.compile(r"""(['"])(?:~|\.{1,2})?/(?=[^\s/])([^\n]*?)\1(?!\w)""")
_BARE = re.compile(r"(?<![\w/.<>-])(?:~|\.{1,2})?/(?=[^\s/])(?:(?!: |; )[^\n])*")

log = get_log(__name__)


def public_text(text: str, root: Path) -> str:
    """A text without machine paths: those below ``root`` start there, of others and of addresses only the last part is kept.

    Where a path with spaces ends cannot be known: rather too much of the text goes with it than a part of the path stays.
    """
    if "/" not in text:
        return text
    for place in dict.fromkeys((str(root.absolute()), str(root.resolve()))):
        start = rf"(?<![\w.-]){re.escape(place)}(?:(/)(?=[^\s'\",;:)])|/?(?![\w.-]))"
        text = re.sub(start, lambda found: "" if found[1] else ".", text)
    text = _ADDRESS.sub(lambda found: found[1], text)
    text = _QUOTED.sub(lambda found: found[1] + _last(found[2]) + found[1], text)
    return _BARE.sub(lambda found: _last(found[0]), text)


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


class Events:
    """The events of one run, of any number of threads. A folder or disk that cannot be written is logged once, and ends no run.

    What a full disk does not take is kept and written when there is room again, up to ``MOST_UNWRITTEN`` bytes.

    Args:
        folder: where the files of this machine are; it is made if it is absent.

    Raises:
        UsageError: ``PATHFM_AUDIT_KEY`` names a file that has no key.
    """

    def __init__(self, folder: Path) -> None:
        here = ProcessName.here()
        self._key = key_of_environment()
        self._root = next((place for place in (folder, *folder.absolute().parents) if (place / "study.yaml").is_file()), folder)
        self._common: dict[str, str | int] = {"host": here.host, "pid": here.pid, "run": secrets.token_hex(4)}
        self._lock = threading.Lock()
        self._head, self._unwritten, self._file = Head(), b"", -1
        self._written, self._is_full = Head(), False
        stem = f"events-{here.host}-{here.machine}"
        self.path = folder / f"{stem}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._common |= {ID: own} if (own := folder_id(folder)) else {}
            self._take(stem)
            self._continue()
        except OSError as error:
            self._give_up(error)

    @property
    def head(self) -> dict[str, str | int | None]:
        """The file, and number, hash and MAC of its last line: whoever keeps them elsewhere can tell a log that was cut off."""
        self.flush()
        head = self._written
        return {"file": self.path.name, "sequence": head.sequence, "hash": head.hash, "mac": head.mac}

    def flush(self) -> None:
        """What was written so far is on the drive, unless that is full or fails."""
        with self._lock, suppress(OSError):
            self._flush()

    def write(self, kind: str, **fields: object) -> None:
        """Append one event.

        Args:
            kind: one of ``KINDS``.
            fields: those of its kind: numbers, text, or mappings of them.

        Raises:
            ValueError: an unknown kind or field, or a number that JSON does not have.
            TypeError: a value that JSON does not have, such as a path.
        """
        strange = fields.keys() - KINDS[kind] if kind in KINDS else {kind}
        if strange:
            raise ValueError(f"no such event or field: {', '.join(sorted(strange))}")
        if isinstance(reason := fields.get("reason"), str):
            fields["reason"] = public_text(reason, self._root)
        with self._lock:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            line, head = seal({"time": now, "kind": kind, **self._common, **fields}, self._head, self._key)
            if self._file < 0:
                return
            if len(self._unwritten) < MOST_UNWRITTEN:
                self._head = head
                self._unwritten += line + b"\n"
            self._try()

    def close(self) -> None:
        """Write no more. Closing twice is allowed."""
        with self._lock:
            if self._file < 0:
                return
            with suppress(OSError):  # what is lost is closed by the next process
                self._flush()
            self._shut()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _take(self, stem: str) -> None:
        """Opens the first file that no other process has locked."""
        for number in itertools.count(1):
            self.path = self.path.with_name(f"{stem}{f'-{number}' if number > 1 else ''}.jsonl")
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                self._shut()
            except OSError:  # a drive without locks
                break
        self._shut()
        self.path = self.path.with_name(f"{stem}-run-{self._common['run']}.jsonl")
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)

    def _continue(self) -> None:
        """Goes on where the chain of the file ends."""
        with self.path.open("rb") as file:
            self._head, behind, _ = read_end(file)
        self._written = self._head
        if self._head.key and not self._key:
            what = "this log is kept with a key, and %s names none now: the audit will find the lines that follow"
            log.warning(f"%s: {what}", self.path, KEY_FILE)
        begun = self._head.sequence > 0
        stray = behind.removeprefix(b"\n") if begun else behind
        self._unwritten = b"" if behind.endswith(b"\n") or not (behind or begun) else b"\n"
        # Whole lines behind a chain that belong to none were put there by somebody: the audit finds them as they are.
        kind = "chain_started" if b"\n" in stray and not begun else "" if not stray or stray.endswith(b"\n") else "recovered"
        if kind:
            self.write(kind, bytes=len(stray), sha256=hashlib.sha256(stray).hexdigest())

    def _append(self) -> None:
        """Writes what is due; what a full disk cuts short is written on when there is room again."""
        if self._unwritten:
            self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]
        if not self._unwritten:
            self._written, self._is_full = self._head, False

    def _try(self) -> None:
        try:
            self._append()
        except OSError as error:
            if error.errno not in FULL:
                self._give_up(error)
            elif not self._is_full:
                self._warn(error)
                self._is_full = True

    def _flush(self) -> None:
        if self._file >= 0:
            self._append()
            os.fsync(self._file)

    def _shut(self) -> None:
        os.close(self._file)
        self._file = -1

    def _give_up(self, error: OSError) -> None:
        self._warn(error)
        if self._file >= 0:
            self._shut()

    def _warn(self, error: OSError) -> None:
        log.warning("%s: events are not written: %s", self.path, error.strerror)
