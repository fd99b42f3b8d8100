"""``pathfm verify`` of an outbox: results, the table of them all, quarantine records and ledger, as the events tell of them."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from pathfm.batch.ledger import FILE as LEDGER
from pathfm.batch.results import PREDICTIONS, RESULT, Outbox, index_rows
from pathfm.chain import ID, PATTERN, told
from pathfm.config import fingerprint
from pathfm.errors import StoreError
from pathfm.events import public_text
from pathfm.log import plural
from pathfm.store.commit import read_json
from pathfm.store.manifest import file_digest

RUN, WRITTEN = ("run_started", "run_ended"), "result_written"
RECORDED, FAILED = "quarantine_written", "slide_failed"
GROWN, CLOSED = "ledger_written", "ledger_closed"
OF_LEDGER = (GROWN, "ledger_opened", CLOSED)
"""Of several that tell of the same, the first is the one that made it so."""


Doubts = tuple[list[str], list[str]]
"""Problems, and notes of what is worth a look and no problem."""


class Results(NamedTuple):
    """What is to be asked of the results of an outbox.

    Attributes:
        wanted: file -> SHA-256 that it had.
        problems: what is wrong whatever the files hold.
        notes: what is worth a look, and no problem.
    """

    wanted: Mapping[Path, str]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass
class Story:
    """What the events of an outbox tell.

    Attributes:
        digests: identity of a slide -> hash of its ``result.json``, as told last.
        names: identity -> how its slide is called.
        folders: ids of the folder; one.
        is_over: the run that began last has ended.
        records: name of a slide -> hashes of its quarantine records.
        failed: names and reasons of slides that could not be used.
        ledger: what is told of the ledger, from its first line to its last.
        is_cut: the ledger was longer once.
    """

    digests: dict[str, str]
    names: dict[str, str]
    folders: set[str]
    is_over: bool
    records: dict[str, set[str]] = field(default_factory=dict)
    failed: set[tuple[str, str]] = field(default_factory=set)
    ledger: Sequence[Mapping[str, Any]] = ()
    is_cut: bool = False


def story_of(outbox: Path) -> Story:
    """Reads the events of an outbox."""
    kinds = (*RUN, WRITTEN, RECORDED, FAILED, *OF_LEDGER)
    files = [list(told(path, *kinds)) for path in sorted(outbox.glob(PATTERN))]
    lines = _in_order(files)
    results = [said for said in lines if said["kind"] == WRITTEN]
    begun = [str(said.get("run")) for said in lines if said["kind"] == "run_started"]
    ended = {str(said.get("run")) for said in lines if said["kind"] == "run_ended"}
    story = Story(
        {str(said.get("identity")): str(said.get("result")) for said in results},
        {str(said.get("identity")): str(said.get("slide_id")) for said in results},
        {str(said[ID]) for said in lines if ID in said},
        not begun or begun[-1] in ended,
        failed={(str(said.get("slide_id")), str(said.get("reason"))) for said in lines if said["kind"] == FAILED},
        ledger=sorted(_of_ledger(lines), key=lambda said: (said["bytes"], OF_LEDGER.index(said["kind"]))),
        is_cut=any(later["bytes"] < said["bytes"] for file in files for said, later in pairwise(_of_ledger(file))),
    )
    for said in lines:
        if said["kind"] == RECORDED:
            story.records.setdefault(str(said.get("slide_id")), set()).add(str(said.get("record")))
    return story


def _in_order(files: Sequence[Sequence[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    """The lines of all files. Those of one stay in its order: a clock that was set back does not bring later ones forward."""
    times = [accumulate((str(said.get("time")) for said in file), max) for file in files]
    timed = [pair for file, at in zip(files, times, strict=True) for pair in zip(at, file, strict=True)]
    return [said for _, said in sorted(timed, key=itemgetter(0))]


def _of_ledger(lines: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    return (said for said in lines if said["kind"] in OF_LEDGER and type(said.get("bytes")) is int and "run" in said)


def check_results(folder: Path) -> Results | None:
    """What a batch leaves: of each result the files that it names, itself as the events tell of it, and its row in the table of
    all; the records of quarantine; the ledger.

    None where there is nothing of a batch, and no events of any.
    """
    outbox, story = Outbox(folder), story_of(folder)
    paths = sorted(outbox.results.glob(f"[!.]*/{RESULT}"))
    if not (paths or story.digests or story.ledger or (folder / LEDGER).is_file()):
        return None
    wanted: dict[Path, str] = {}
    problems, found = [], set[str]()
    for path in paths:
        name = path.relative_to(folder).as_posix()
        try:
            said = read_json(path)
            wanted |= {path.parent / file: str(digest) for file, digest in said["files"].items()}
            found.add(identity := str(said["identity"]))
            problems += [f"{name}: {what}" for what in _untrue(path, said, story.digests.get(identity))]
        except (StoreError, OSError, KeyError, AttributeError):
            problems.append(f"{name}: not a result as it was written")
    lost = sorted(story.digests.keys() - found)
    problems += [
        f"results: the result of {story.names[each]} ({each[:8]}), which the events tell of, is missing" for each in lost
    ]
    if len(story.folders) > 1:
        problems.append(f"the events are of several folders ({', '.join(sorted(story.folders))}): copied from elsewhere")
    problems += _strangers(outbox, {*paths, *wanted})
    wrong, lacking = index_problems(outbox)
    # A table that a kill left old is made anew by the next run.
    problems += [*wrong, *(lacking if story.is_over else ())]
    notes = [] if story.is_over else lacking
    for wrong, noted in (_check_quarantine(outbox, story), _check_ledger(folder / LEDGER, story)):
        problems += wrong
        notes += noted
    return Results(wanted, tuple(problems), tuple(notes))


def _check_quarantine(outbox: Outbox, story: Story) -> Doubts:
    """Records of slides that cannot be used: each as the events tell of it, and none is missing that the ledger still has."""
    problems, notes, found = list[str](), list[str](), set[str]()
    for path in outbox.records:
        name = path.relative_to(outbox.folder).as_posix()
        try:
            said = read_json(path)
            identity, slide_id, reason = (str(said[key]) for key in ("identity", "slide_id", "reason"))
        except (StoreError, KeyError):
            problems.append(f"{name}: not a record as it was written")
            continue
        found.add(identity)
        known = story.records.get(slide_id)
        if known is None and (slide_id, public_text(reason, outbox.folder)) in story.failed:
            notes.append(f"{name}: of an earlier version of pathfm, whose events tell of its slide and reason only")
        elif fingerprint(said) not in (known or ()):
            problems.append(f"{name}: differs from what the events tell of")
    kept = _quarantined(outbox.folder / LEDGER)
    notes += [
        f"{outbox.quarantine.name}: the record of {each[:8]} was removed: the next run tries that slide again"
        for each in sorted(kept - found)
    ]
    return problems, notes


def _quarantined(ledger: Path) -> set[str]:
    """Identities of the slides that are in quarantine now, by the ledger, as far as it can be read."""
    last: dict[str, str] = {}
    for line in ledger.read_bytes().splitlines() if ledger.is_file() else ():
        with suppress(ValueError, KeyError, TypeError):
            said = json.loads(line)
            if said["kind"] != "file" or said.get("renamed"):
                last[str(said["identity"])] = str(said["kind"])
    return {identity for identity, kind in last.items() if kind == "quarantined"}


def _check_ledger(path: Path, story: Story) -> Doubts:
    """The ledger begins with all that the events tell of, and has no line that none tells of: but one that a kill left.

    Args:
        path: the ledger.
        story: how much there was of it, and the hash of that, whenever it was opened, written and closed.
    """
    data, states = path.read_bytes() if path.is_file() else b"", story.ledger
    if story.is_cut:  # lines that were written again may be the same to the byte, but for their times
        return [f"{path.name}: it was longer once: lines were dropped, and others written since"], []
    if not states:
        return [], [f"{path.name}: no event tells of it: the next run does"] if data else []
    ends = {str(said["run"]): said["bytes"] for said in states}
    closed = {str(said["run"]) for said in states if said["kind"] == CLOSED}
    may_grow = {end for run, end in ends.items() if run not in closed}
    digest, last, proved = hashlib.sha256(), 0, 0
    for number, said in enumerate(states):
        end = said["bytes"]
        digest.update(data[last:end])
        if end > len(data) or digest.hexdigest() != said.get("sha256"):
            return [f"{path.name}: a line behind line {proved} was altered, dropped or inserted"], []
        lines = data.count(b"\n", last, end)
        # What there was before the first event is of an earlier version.
        if number and lines > (said["kind"] == GROWN or last in may_grow):
            return [f"{path.name}: no event tells of {plural(lines, 'line')} behind line {proved}"], []
        last, proved = end, proved + lines
    lines = data.count(b"\n", last)
    more = f"{path.name}: no event tells of {plural(lines, 'line')} behind line {proved}"
    if lines > (last in may_grow):
        return [more], []
    return [], [f"{more}: a run was killed just then, or is at work (the next one tells)"] if lines else []


def _untrue(path: Path, said: Mapping[str, Any], digest: str | None) -> Iterator[str]:
    if said["name"] != path.parent.name:
        yield f"the result called {said['name']}, copied or moved"
    if digest is None:
        yield "the events do not tell of it: made up, or its run was killed just then (the next one tells)"
    elif file_digest(path) != digest:
        yield "differs from what the events tell of"


def _strangers(outbox: Outbox, known: set[Path]) -> list[str]:
    """Files among the results that nobody has written there; hidden folders are what a kill leaves, and are swept."""
    found = (file for place in sorted(outbox.results.glob("[!.]*")) for file in [place, *sorted(place.rglob("*"))])
    strange = (file for file in found if file.is_file() and file not in known)
    return [f"{file.relative_to(outbox.folder).as_posix()}: does not belong there" for file in strange]


def index_problems(outbox: Outbox) -> tuple[list[str], list[str]]:
    """Rows of the table of all results that say something else than the results do, and results that have no row."""
    results, _ = outbox.read_results()
    wanted = {row["result"]: row for row in index_rows(results)}
    try:
        with outbox.index.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream, strict=True))
    except FileNotFoundError:
        rows = []
    except (OSError, ValueError, csv.Error):
        return [f"{PREDICTIONS}: cannot be read"], []
    said: dict[str, dict[str, str]] = {}
    wrong = []
    for row in rows:
        name = str(row.get("result"))
        said.setdefault(name, row)
        if said[name] is not row or not _is_same(row, wanted.get(name, {})):
            wrong.append(f"{PREDICTIONS}: the row of {name} is not that of its result")
    return wrong, [f"{PREDICTIONS}: no row of {name}" for name in sorted(wanted.keys() - said.keys())]


def _is_same(row: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """A column that only other results have is empty in a row."""
    return all(row.get(column, "") == wanted.get(column, "") for column in {*row, *wanted})
