"""Whether the night batch is well: a small file that says so, and ``pathfm batch --health``, which judges it."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pathfm.errors import ExitCode, StoreError, UsageError
from pathfm.log import plural, say
from pathfm.store.commit import read_json, write_json
from pathfm.workers import ProcessName

FILE = "health.json"
State = Literal["starting", "idle", "working", "waiting for disk", "waiting for the inbox", "stopped", "finished"]
WAITING = ("waiting for disk", "waiting for the inbox")
ENDED = ("stopped", "finished")


@dataclass
class Health:
    """What a run says of itself at each look and round.

    Attributes:
        folder: the outbox.
        bundle: digest of the bundle.
        state: what it does now.
        last_look: when it last looked at the inbox (UTC, ISO 8601; empty: never).
        last_success: when it last finished a round.
        last_error: what went wrong last, in one line.
        counts: of the ledger, and slides that wait.
        current: slides worked on now.
        damaged: results that cannot be read any more.
    """

    folder: Path
    bundle: str
    state: State = "starting"
    last_look: str = ""
    last_success: str = ""
    last_error: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    current: Sequence[str] = ()
    damaged: Sequence[str] = ()

    def __post_init__(self) -> None:
        here = ProcessName.here()
        self._process = {"host": here.host, "pid": here.pid, "process": str(here)}
        before = _read(self.folder / FILE)
        self.last_success, self.last_look = (str(before.get(name, "")) for name in ("last_success", "last_look"))

    def tell(self, state: State, current: Sequence[str] = ()) -> None:
        """Writes the file anew."""
        self.state, self.current = state, current
        facts = {name: value for name, value in asdict(self).items() if name != "folder"}
        write_json(self.folder / FILE, {**facts, **self._process, "written": now()})


def now() -> str:
    """This moment, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def in_words(counts: Mapping[str, int]) -> str:
    """``4 done (2 abstained), 1 quarantined, 1 duplicate, 0 waiting``."""
    abstained = f" ({counts['abstained']:,} abstained)" if counts["abstained"] else ""
    done, duplicates = f"{counts['done']:,} done{abstained}", plural(counts["duplicates"], "duplicate")
    return f"{done}, {counts['quarantined']:,} quarantined, {duplicates}, {counts['waiting']:,} waiting"


def health(outbox: Path, max_age_s: float = 26 * 3600) -> ExitCode:
    """``pathfm batch --health``: one line for people, and the exit code for monitoring.

    Args:
        outbox: of the night batch.
        max_age_s: the inbox must have been looked at within this time [s]; the default suits one run a day.

    Returns:
        DONE when all is well, INTERNAL when the batch does not work, SOME_FAILED when slides are in quarantine, or
        results are damaged.

    Raises:
        UsageError: no such folder.
    """
    if not outbox.is_dir():
        raise UsageError("there is no such folder", where=str(outbox), fix="name the folder of --outbox")
    said = _read(outbox / FILE)
    if problem := _problem(said, max_age_s):
        say(f"not well: {problem}{f' (last error: {error})' if (error := said.get('last_error')) else ''}")
        return ExitCode.INTERNAL
    counts = in_words(said["counts"])
    records, damaged = sorted((outbox / "quarantine").glob("*.json")), said.get("damaged", ())
    if damaged:
        say(f"{plural(len(damaged), 'result')} cannot be read, to be restored from a copy: {', '.join(damaged)}")
    if records:
        since = min(str(_read(path).get("since", "")) for path in records)
        kept = f"{plural(len(records), 'slide')} in quarantine since {since} (quarantine/*.json says why)"
        say(f"{kept}; {said['state']}: {counts}")
        return ExitCode.SOME_FAILED
    if damaged:
        return ExitCode.SOME_FAILED
    say(f"well; {said['state']}: {counts}")
    return ExitCode.DONE


def _problem(said: Mapping[str, Any], max_age_s: float) -> str:
    """What is wrong with the runner; nothing when it is well."""
    if not said.get("last_look"):
        return "the inbox was never looked at"
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(said["last_look"])
    if age.total_seconds() > max_age_s:
        return f"the inbox was last looked at {said['last_look']}, more than {max_age_s:g} s ago"
    if said["state"] in WAITING:
        return str(said["state"])
    if said["state"] in ENDED and said["last_error"]:
        return "the last run ended with an error"
    process = ProcessName.parse(said.get("process", ""))
    if said["state"] not in ENDED and process and process.has_ended:
        return f"the run of process {process.pid} on {process.host} has ended without saying so"
    return ""


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except StoreError:
        return {}
