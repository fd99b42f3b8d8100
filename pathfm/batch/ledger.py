"""The ledger of a night batch: what is known of every slide that ever lay in the inbox, one JSON object per line.

Only ever appended to, flushed to disk line by line, and read once when a run begins. A line that a kill cut short is the
last one, and is dropped: what it would have said is found out again. Attempts are written before work starts, so that a
slide that kills the run is known by the next.

Each line is told of by an event, with the hash of the whole ledger up to it, once it is on the disk. A kill between the two
leaves one line that no event tells of: the next run tells how it found the ledger before it writes.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from pathfm.errors import StoreError, UsageError
from pathfm.events import Events
from pathfm.faults import crash_point
from pathfm.store.commit import disk_errors

FORMAT = 1
FILE = "ledger.jsonl"

State = Literal["waiting", "started", "done", "quarantined"]


@dataclass
class Entry:
    """One slide, whatever its files are called.

    Attributes:
        identity: SHA-256 of its content.
        slide_id: of the file that came first.
        files: of this content, the first one first; the others are its duplicates.
        state: started also when a run was killed meanwhile.
        alone: whether it is, or was, worked on alone.
        suspect: a run was killed while it worked on this slide, perhaps by it.
        crashes: runs that were killed while they worked on this slide alone.
        outcome: of a done one: predicted, abstained or empty.
        reason: of a quarantined one.
        bundle: digest of the bundle that it was done or quarantined with.
    """

    identity: str
    slide_id: str
    files: list[str] = field(default_factory=list)
    state: State = "waiting"
    alone: bool = False
    suspect: bool = False
    crashes: int = 0
    outcome: str = ""
    reason: str = ""
    bundle: str = ""

    @property
    def name(self) -> str:
        """What its folder of results, or its quarantine record, is called."""
        return f"{self.slide_id}-{self.identity[:8]}"


class Ledger:
    """All entries, as the lines of the file tell them, and the writer of further ones.

    Args:
        path: the file; it is made if it is absent. Its events go into its folder.

    Raises:
        StoreError: the file is damaged, or of another version of pathfm, or cannot be written.
        UsageError: ``PATHFM_AUDIT_KEY`` names a file that has no key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.bundle, self.names = "", ""
        self._cache: dict[str, tuple[str, str]] = {}
        self._end, self._told, self._hash = 0, 0, hashlib.sha256()
        with ExitStack() as stack:
            self._events = stack.enter_context(Events(path.parent))
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._stream = stack.enter_context(path.open("a+b", buffering=0))
            self._replay()
            self._tell("ledger_opened")
            if self._end == 0:
                self._write("ledger", format=FORMAT)
            stack.pop_all()

    def _replay(self) -> None:
        self._stream.seek(0)
        data = self._stream.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._end = len(whole)
        self._hash.update(whole)
        if self._end < len(data):
            self._stream.truncate(self._end)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._apply(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                what, fix = f"line {number} of the ledger is not understood", "restore the file from a copy"
                raise StoreError(what, where=str(self.path), fix=fix) from None
        self._stream.seek(0, os.SEEK_END)

    def _write(self, kind: str, **facts: object) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        line = {"time": now, "kind": kind, **facts}
        with disk_errors(self.path):
            self._append(json.dumps(line).encode() + b"\n")
        self._apply(line)
        crash_point(f"batch.ledger.{kind}")
        self._tell("ledger_written")

    def _tell(self, kind: str) -> None:
        """Tells how much there is of the ledger, and the hash of that."""
        self._events.write(kind, bytes=self._end, sha256=self._hash.hexdigest())
        self._events.flush()
        self._told = self._end

    def _append(self, line: bytes) -> None:
        """Writes a line, whole or not at all: what a full disk cut short is taken back, or else before the next line."""
        if self._stream.seek(0, os.SEEK_END) != self._end:
            self._stream.truncate(self._end)
        rest = line
        try:
            while rest:
                rest = rest[self._stream.write(rest) :]
            os.fsync(self._stream)
        except OSError:
            with suppress(OSError):
                self._stream.truncate(self._end)
            raise
        self._end += len(line)
        self._hash.update(line)

    def _apply(self, line: dict[str, Any]) -> None:
        """What one line says; of a kind that is not known it is an error, since a newer pathfm may mean anything by it."""
        kind = line["kind"]
        if kind == "ledger" and line["format"] == FORMAT:
            return
        if kind == "bundle":
            self.bundle, self.names = line["bundle"], line["names"]
        elif kind == "file":
            self._file(line)
        else:
            self._turn(kind, self.entries[line["identity"]], line)

    def _file(self, line: dict[str, Any]) -> None:
        identity, file = line["identity"], line["file"]
        entry = self.entries.setdefault(identity, Entry(identity, line["slide_id"]))
        if line.get("renamed"):
            for other in entry.files:  # one that comes back is another copy
                if self._cache.get(other, ("", ""))[1] == identity:
                    del self._cache[other]
            entry.slide_id, entry.files, entry.state = line["slide_id"], [], "waiting"
        if file not in entry.files:
            entry.files.append(file)
        self._cache[file] = line["stamp"], identity

    def _turn(self, kind: str, entry: Entry, line: dict[str, Any]) -> None:
        if kind == "started":
            entry.state, entry.alone = "started", line["alone"]
        elif kind == "crashed":
            entry.state, entry.suspect = "waiting", True
            entry.crashes += entry.alone
        elif kind in {"stopped", "again"}:
            # Somebody who asks for another attempt has looked at the slide.
            entry.crashes *= kind == "stopped"
            entry.state = "waiting"
        elif kind == "done":
            entry.state, entry.outcome, entry.bundle = "done", line["outcome"], line["bundle"]
        elif kind == "quarantined":
            entry.state, entry.reason, entry.bundle = "quarantined", line["reason"], line["bundle"]
        else:
            raise KeyError(kind)

    def known(self, file: str, stamp: str) -> Entry | None:
        """The entry of a file that has not changed since its content was hashed."""
        before, identity = self._cache.get(file, ("", ""))
        return self.entries[identity] if identity and before == stamp else None

    def add(self, file: str, stamp: str, identity: str, slide_id: str, renamed: bool = False) -> Entry:
        """Notes the content of a file. A content that is known under another name makes the file a duplicate, but where it is
        the slide itself, renamed before it had a result: it is called so from now on, and waits."""
        known = self.entries.get(identity)
        is_copy = known is not None and file not in known.files and not renamed
        of = {"duplicate_of": known.name} if known is not None and is_copy else {"renamed": True} if renamed else {}
        self._write("file", file=file, stamp=stamp, identity=identity, slide_id=slide_id, **of)
        return self.entries[identity]

    def use(self, bundle: str, names: str, is_new: bool) -> None:
        """Takes a bundle, and what slides are called, for all that follows.

        Args:
            bundle: its digest.
            names: id of the key of the pseudonyms; empty where slides keep their names.
            is_new: another bundle than before is meant.

        Raises:
            UsageError: another bundle was used so far, and nobody said that it is a new one; or other names.
        """
        if self.bundle and self.names != names:
            fix = "give the same --pseudonym-key as before, or begin another outbox"
            raise UsageError("this outbox was made with other names of slides", where=str(self.path.parent), fix=fix)
        if self.bundle == bundle:
            return
        if self.bundle and not is_new:
            what = f"this outbox was made with bundle {self.bundle[:16]}, and this is {bundle[:16]}"
            fix = "after a change that is meant, add --new-bundle once: old results stay as they are"
            raise UsageError(what, where=str(self.path.parent), fix=fix)
        self._write("bundle", bundle=bundle, names=names)

    def start(self, entry: Entry, alone: bool) -> None:
        """Notes an attempt, before it begins."""
        self._write("started", identity=entry.identity, alone=alone)

    def stop(self, entry: Entry) -> None:
        """Takes an attempt back that was ended on purpose."""
        self._write("stopped", identity=entry.identity)

    def try_again(self, entry: Entry) -> None:
        """Gives a quarantined slide another chance."""
        self._write("again", identity=entry.identity)

    def crashed(self, entry: Entry) -> None:
        """Notes that a run was killed while it worked on this slide."""
        self._write("crashed", identity=entry.identity)

    def done(self, entry: Entry, outcome: str, bundle: str) -> None:
        """Notes that the result is there, and the bundle that it is of."""
        self._write("done", identity=entry.identity, outcome=outcome, bundle=bundle)

    def quarantine(self, entry: Entry, reason: str) -> None:
        """Notes that the slide cannot be used."""
        self._write("quarantined", identity=entry.identity, reason=reason, bundle=self.bundle)

    def of_state(self, *states: State) -> Iterator[Entry]:
        """Entries of these states, in the order in which they came."""
        return (entry for entry in list(self.entries.values()) if entry.state in states)

    @property
    def counts(self) -> dict[str, int]:
        """Slides done (of which abstained: predicted without a decision, or without tissue) and quarantined, and
        duplicates; a copy of a quarantined one is none, for it has a record of its own."""
        states = Counter(entry.state for entry in self.entries.values())
        return {
            "done": states["done"],
            "abstained": sum(entry.state == "done" and entry.outcome != "predicted" for entry in self.entries.values()),
            "quarantined": states["quarantined"],
            "duplicates": sum(len(entry.files) - 1 for entry in self.entries.values() if entry.state != "quarantined"),
        }

    def close(self) -> None:
        """Writes no more. Closing twice is allowed."""
        # What an interrupted write, or another run that has taken the outbox over, has left there is for the next run to tell.
        if not self._stream.closed and self._stream.seek(0, os.SEEK_END) == self._end:
            if self._told != self._end:
                self._tell("ledger_written")
            self._tell("ledger_closed")
        self._stream.close()
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
