"""What a run does, as it does it, for programs that watch: one JSON object per line.

Each machine appends to a file of its own, ``events-HOST.jsonl``: on one machine a line is one append, which the kernel keeps
whole among all processes, but on a shared drive two machines would overwrite each other. ``run`` tells runs in a file apart.
Only the fields listed in ``KINDS`` can be written: no paths, no patients, nothing of a slide but its id.
"""

from __future__ import annotations

import datetime
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from pathfm.log import get_log
from pathfm.workers import ProcessName

_SLIDE = frozenset({"stage", "slide_id", "seconds", "counts", "reason"})
KINDS: Mapping[str, frozenset[str]] = {
    "run_started": frozenset({"stage", "versions", "settings", "slides", "shard"}),
    "run_ended": frozenset({"stage", "seconds", "counts"}),
    "slide_started": _SLIDE,
    "slide_done": _SLIDE,
    "slide_empty": _SLIDE,
    "slide_failed": _SLIDE,
    "progress": frozenset({"stage", "done", "total", "eta_s"}),
}
"""Every kind of event and the fields it may have, besides time, kind, host, pid and run."""

log = get_log(__name__)


class Events:
    """The events of one run. A folder or disk that cannot be written is logged once, and ends no run.

    Args:
        folder: where the file of this machine is; it is made if it is absent.
    """

    def __init__(self, folder: Path) -> None:
        here = ProcessName.here()
        self.path = folder / f"events-{here.host}-{here.machine}.jsonl"
        self._common = {"host": here.host, "pid": here.pid, "run": secrets.token_hex(4)}
        self._start = b""
        self._file = -1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            self._give_up(error)

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
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "kind": kind, **self._common, **fields}, ensure_ascii=False, allow_nan=False)
        data = self._start + line.encode() + b"\n"
        if self._file < 0:
            return
        try:
            # What a full disk cut short becomes a line of its own, once there is room again.
            self._start = b"" if os.write(self._file, data) == len(data) else b"\n"
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Write no more. Closing twice is allowed."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _give_up(self, error: OSError) -> None:
        log.warning("%s: events are not written: %s", self.path, error.strerror)
        self.close()
