"""``pathfm verify`` of an outbox: the results, what the events tell of them, and the table of them all."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pathfm.batch.results import PREDICTIONS, RESULT, Outbox, index_rows
from pathfm.chain import ID, PATTERN, told
from pathfm.errors import StoreError
from pathfm.store.commit import read_json
from pathfm.store.manifest import file_digest

RUN, WRITTEN = ("run_started", "run_ended"), "result_written"


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
    """

    digests: dict[str, str]
    names: dict[str, str]
    folders: set[str]
    is_over: bool


def story_of(outbox: Path) -> Story:
    """Reads the events of an outbox."""
    lines = [said for path in sorted(outbox.glob(PATTERN)) for said in told(path, *RUN, WRITTEN)]
    lines.sort(key=lambda said: str(said.get("time")))
    results = [said for said in lines if said["kind"] == WRITTEN]
    begun = [str(said.get("run")) for said in lines if said["kind"] == "run_started"]
    ended = {str(said.get("run")) for said in lines if said["kind"] == "run_ended"}
    return Story(
        {str(said.get("identity")): str(said.get("result")) for said in results},
        {str(said.get("identity")): str(said.get("slide_id")) for said in results},
        {str(said[ID]) for said in lines if ID in said},
        not begun or begun[-1] in ended,
    )


def check_results(folder: Path) -> Results | None:
    """Results of a batch: the files that each names, itself as the events tell of it, and its row in the table of all.

    None where there are no results, and no events of any.
    """
    outbox, story = Outbox(folder), story_of(folder)
    paths = sorted(outbox.results.glob(f"[!.]*/{RESULT}"))
    if not paths and not story.digests:
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
    return Results(wanted, tuple(problems), () if story.is_over else tuple(lacking))


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
