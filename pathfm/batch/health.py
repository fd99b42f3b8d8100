"""Whether the night batch is well: a small file that says so, and ``pathfm batch --health``, which judges it."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Iterator, Mapping, Sequence
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
LEAST_FREE = 1 << 20
"""With less room than this in the outbox, files can be neither written nor replaced [bytes]."""
SHOWN = 5
"""Names of files in a line."""
CLOCK_S = 60.0
"""Clocks of machines may differ by this [s]."""


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
        damaged: results that cannot be read any more, or are gone.
        ignored: files in the inbox that are no slides by their suffix, those first that do not usually lie beside slides.
        strange: how many of them those are.
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
    ignored: Sequence[str] = ()
    strange: int = 0

    def __post_init__(self) -> None:
        here = ProcessName.here()
        self._process = {"host": here.host, "pid": here.pid, "process": str(here)}
        before = _read(self.folder / FILE)
        self.last_success, self.last_look = (str(before.get(name, "")) for name in ("last_success", "last_look"))
        self.ignored, self.strange = tuple(before.get("ignored", ())), int(before.get("strange", 0))

    def tell(self, state: State, current: Sequence[str] = ()) -> None:
        """Writes the file anew.

        Raises:
            StoreError: it cannot be written; the state is what it was.
        """
        facts = {name: value for name, value in asdict(self).items() if name != "folder"} | {"state": state, "current": current}
        write_json(self.folder / FILE, {**facts, **self._process, "written": now()})
        self.state, self.current = state, current


def now() -> str:
    """This moment, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def in_words(counts: Mapping[str, int]) -> str:
    """``4 done (2 abstained), 1 quarantined, 1 duplicate, 0 waiting``, and ``, 2 ignored`` where there are such files."""
    abstained = f" ({counts['abstained']:,} abstained)" if counts["abstained"] else ""
    done, duplicates = f"{counts['done']:,} done{abstained}", plural(counts["duplicates"], "duplicate")
    ignored = f", {counts['ignored']:,} ignored" if counts.get("ignored") else ""
    return f"{done}, {counts['quarantined']:,} quarantined, {duplicates}, {counts['waiting']:,} waiting{ignored}"


def some_of(names: Sequence[str], number: int | None = None) -> str:
    """The first names, and ``...`` where there are more.

    Args:
        names: in a line each.
        number: how many there are; None: so many.
    """
    return ", ".join([*names[:SHOWN], *(["..."] if (number or len(names)) > SHOWN else [])])


def health(outbox: Path, max_age_s: float = 26 * 3600) -> ExitCode:
    """``pathfm batch --health``: one line for people, and the exit code for monitoring.

    Args:
        outbox: of the night batch.
        max_age_s: the inbox must have been looked at within this time [s]; the default suits one run a day.

    Returns:
        DONE when all is well, INTERNAL when the batch does not work, SOME_FAILED when slides are in quarantine, results are
        damaged or gone, or files in the inbox may be slides of a kind that cannot be read.

    Raises:
        UsageError: no such folder.
    """
    if not outbox.is_dir():
        raise UsageError("there is no such folder", where=str(outbox), fix="name the folder of --outbox")
    said = _read(outbox / FILE)
    problem = _problem(said, max_age_s)
    if not problem and said["state"] not in ENDED and shutil.disk_usage(outbox).free < LEAST_FREE:
        problem = "the drive of the outbox is full"  # so that the run cannot even say so
    if problem:
        say(f"not well: {problem}{f' (last error: {error})' if (error := said.get('last_error')) else ''}")
        return ExitCode.INTERNAL
    problems = [*_losses(said), *_quarantine(outbox)]
    counts, ignored = in_words(said["counts"]), () if said.get("strange") else said.get("ignored", ())
    names = f" ({some_of(ignored, said['counts']['ignored'])})" if ignored else ""
    say("; ".join([*(problems or ["well"]), f"{said['state']}: {counts}{names}"]))
    return ExitCode.SOME_FAILED if problems else ExitCode.DONE


def _losses(said: Mapping[str, Any]) -> Iterator[str]:
    if damaged := said.get("damaged"):
        yield f"{plural(len(damaged), 'result')} cannot be read, to be restored from a copy: {', '.join(damaged)}"
    if strange := said.get("strange"):
        files, names = plural(strange, "file in the inbox is", "files in the inbox are"), said["ignored"][:strange]
        yield f"{files} of no kind that can be read, to be converted or taken out: {some_of(names, strange)}"


def _quarantine(outbox: Path) -> Iterator[str]:
    if records := sorted((outbox / "quarantine").glob("*.json")):
        since = min(str(_read(path).get("since", "")) for path in records)
        yield f"{plural(len(records), 'slide')} in quarantine since {since} (quarantine/*.json says why)"


def _problem(said: Mapping[str, Any], max_age_s: float) -> str:
    """What is wrong with the runner; nothing when it is well."""
    if not said.get("last_look"):
        return "the inbox was never looked at"
    age_s = (datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(said["last_look"])).total_seconds()
    if age_s > max_age_s:
        return f"the inbox was last looked at {said['last_look']}, more than {max_age_s:g} s ago"
    if age_s < -CLOCK_S:  # it would look fresh until that time has come, whatever happens
        return f"the inbox was last looked at {said['last_look']}, which is yet to come: the clock was set back"
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
