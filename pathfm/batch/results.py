"""The outbox of a night batch: a folder of results per slide, a record per slide that cannot be used, a table of all."""

from __future__ import annotations

import csv
import datetime
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pathfm import __version__
from pathfm.batch.ledger import Entry
from pathfm.config import fingerprint
from pathfm.errors import StoreError
from pathfm.events import Events
from pathfm.faults import crash_point
from pathfm.log import decimals
from pathfm.store.cohort import id_problem
from pathfm.store.commit import commit_dir, read_json, recover, write_json
from pathfm.store.manifest import file_digest
from pathfm.store.record import library_versions

if TYPE_CHECKING:
    from pathfm.mil.bundle import Bundle
    from pathfm.mil.prediction_table import Result

FORMAT, VERSION = "pathfm-result", 1
STAGE = "batch"
RESULT, PREDICTIONS = "result.json", "predictions.csv"
PICTURES = {
    "heatmaps/{}.png": "heatmap.png",
    "heatmaps/{}.classes.png": "heatmap.classes.png",
    "geojson/{}.geojson": "heatmap.geojson",
    "attention/{}.csv": "attention.csv",
    "layers/{}.ome.tif": "heatmap.ome.tif",
}
"""Files of ``pathfm mil predict`` about one slide, and what they are called in its folder of results."""
NO_TILES = "abstain:no tiles"
"""What is decided about a slide without tissue."""

NEEDED = {"name", "slide_id", "identity", "outcome", "decision", "bundle", "drift", "time", "files"}
"""What others read of a ``result.json``."""

AddFiles = Callable[[Path], object]
"""Writes further files of a result into its folder."""


@dataclass(frozen=True)
class Outbox:
    """Where everything of a night batch lies.

    Attributes:
        folder: the outbox.
    """

    folder: Path

    @property
    def results(self) -> Path:
        """A folder per slide."""
        return self.folder / "results"

    @property
    def index(self) -> Path:
        """One row per slide of ``results``."""
        return self.folder / PREDICTIONS

    @contextmanager
    def work(self) -> Iterator[Path]:
        """A folder for one round; what is in it goes when the round ends, or when the next one begins."""
        folder = self.folder / ".work"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def has_result(self, entry: Entry) -> bool:
        """Whether the result of a slide is there: a run may have been killed before it could note that."""
        file = self.results / entry.name / RESULT
        recover(file.parent)
        found = read_result(file) if file.is_file() else None
        return found is not None and found.said["identity"] == entry.identity

    @property
    def quarantine(self) -> Path:
        """A record per slide that cannot be used."""
        return self.folder / "quarantine"

    def record_of(self, entry: Entry) -> Path:
        """Where the record of a slide that cannot be used lies."""
        # An id may be the very thing that is wrong.
        name = f"slide-{entry.identity[:8]}" if id_problem(entry.slide_id) else entry.name
        return self.quarantine / f"{name}.json"

    @property
    def records(self) -> list[Path]:
        """Records of slides that cannot be used."""
        return sorted(self.quarantine.glob("*.json"))

    def drop_records(self, entry: Entry) -> None:
        """Removes the records of a slide that has a result now, and of its copies."""
        for path in self.quarantine.glob(f"*-{entry.identity[:8]}.json"):
            path.unlink(missing_ok=True)

    def write_record(self, entry: Entry, reason: str) -> None:
        """Writes why a slide cannot be used; the slide stays where it is.

        The event comes first: a record that none tells of was written by no run, and one that a kill prevents is written by the
        next.
        """
        facts = {
            "slide_id": shown(entry.slide_id),
            "identity": entry.identity,
            "files": [shown(file) for file in entry.files],
            "reason": reason,
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "what to do": "mend the slide or take it out of the inbox, then remove this record: what is there is tried again",
        }
        with Events(self.folder) as events:
            about = {"slide_id": facts["slide_id"], "identity": entry.identity, "record": fingerprint(facts)}
            events.write("quarantine_written", stage=STAGE, **about)
        crash_point("batch.quarantine.told")
        write_json(self.record_of(entry), facts)

    @property
    def names(self) -> list[str]:
        """Of all results, whole or damaged, in order."""
        if not self.results.is_dir():
            return []
        with os.scandir(self.results) as entries:
            return sorted(entry.name for entry in entries if entry.name[0] != "." and stamp_of_file(f"{entry.path}/{RESULT}"))

    def read_results(self) -> tuple[dict[str, Read], tuple[str, ...]]:
        """All results by name, and the names of those that a drive has damaged."""
        found = {name: read_result(self.results / name / RESULT) for name in self.names}
        damaged = tuple(name for name, each in found.items() if each is None)
        return {name: each for name, each in found.items() if each is not None}, damaged

    def write_index(self, found: Mapping[str, HasRow]) -> None:
        """Makes the table of all results anew."""
        from pathfm.prediction import write_rows

        rows = index_rows(found)
        if rows:
            write_rows(self.index, rows)
        else:
            self.index.unlink(missing_ok=True)


class Read(NamedTuple):
    """A result as it lies there: what ``result.json`` says, and its row."""

    said: dict[str, Any]
    row: dict[str, str]


class HasRow(Protocol):
    """What the table of all results needs of each."""

    @property
    def row(self) -> dict[str, str]:
        """Cells by column."""
        ...


def index_rows(found: Mapping[str, HasRow]) -> list[dict[str, str]]:
    """The rows of the table of all results, in its order."""
    return [{"result": name, **read.row} for name, read in sorted(found.items())]


def stamp_of_file(path: str) -> tuple[int, ...]:
    """Size, times of change and inode number; nothing where they cannot be asked for."""
    try:
        stat = os.stat(path)  # noqa: PTH116 - for so many results, to make a Path takes longer than to look at the file
    except OSError:
        return ()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def read_result(file: Path) -> Read | None:
    """The result of a ``result.json``; None where one of its files is damaged."""
    try:
        said = read_json(file)
        with file.with_name(PREDICTIONS).open(newline="", encoding="utf-8") as stream:
            (row,) = csv.DictReader(stream, strict=True)
    except (StoreError, OSError, ValueError, csv.Error):
        return None
    is_whole = said.keys() >= NEEDED and isinstance(said["drift"], dict | None) and None not in {*row, *row.values()}
    return Read(said, row) if is_whole else None


def shown(text: str) -> str:
    """A name in one line that every file and terminal can take."""
    return text if text.isprintable() else ascii(text)


@dataclass(frozen=True)
class Findings:
    """What goes into a result besides the prediction.

    Attributes:
        time: of the prediction.
        drift: facts and flags against the training's distribution; None where there is nothing to compare with.
        events: head of the event chain when the result was made.
        add_files: writes further files.
    """

    time: datetime.datetime
    drift: Mapping[str, Any] | None
    events: Mapping[str, Any]
    add_files: AddFiles = lambda _folder: None


def commit_result(outbox: Outbox, entry: Entry, result: Result, found: Findings, check: Callable[[], None]) -> None:
    """Writes the folder of one slide, whole or not at all.

    Args:
        outbox: where.
        entry: the slide.
        result: of its round; its pictures lie in the folder above the tile stores.
        found: what else there is to say.
        check: called last; when it raises, nothing was written.
    """
    from pathfm.prediction import write_rows

    row = _row_of(result, entry.slide_id)
    work = result.stores_dir.parents[1]
    with commit_dir(outbox.results / entry.name, check) as folder:
        for source, name in PICTURES.items():
            if (work / source.format(entry.slide_id)).is_file():
                shutil.copyfile(work / source.format(entry.slide_id), folder / name)
        write_rows(folder / PREDICTIONS, [row])
        found.add_files(folder)
        said = _content(entry, result, found, row)
        files = {path.relative_to(folder).as_posix(): file_digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
        write_json(folder / RESULT, {**said, "files": files})
        crash_point("batch.result.before_commit")
    crash_point("batch.result.after_commit")


def outcome_of(said: Mapping[str, Any]) -> str:
    """What the ledger calls a result: predicted, abstained or empty."""
    outcome = str(said["outcome"])
    return "abstained" if outcome == "predicted" and str(said["decision"]).startswith("abstain:") else outcome


def shown_decision(said: Mapping[str, Any]) -> str:
    """What a result says, in a few words: ``tumour (0.93)``, ``abstain:uncertain (tumour 0.55)``, ``abstain:no tiles``."""
    decision, values = str(said["decision"]), said.get("calibrated") or said.get("probability") or {}
    if not values:
        return decision
    name = decision if decision in values else max(values, key=values.__getitem__)
    number = decimals(values[name], 2)
    value = number if name == decision else f"{name} {number}"
    return f"{decision} ({value})" if decision else value


def _row_of(result: Result, slide_id: str) -> dict[str, str]:
    from pathfm.mil.prediction_table import slide_rows

    return next(row for row in slide_rows(result) if row["slide_id"] == slide_id)


def _content(entry: Entry, result: Result, found: Findings, row: Mapping[str, str]) -> dict[str, Any]:
    """What ``result.json`` says but the hashes of the files beside it. Specified in ``docs/hospital.md``."""
    bundle, ensemble = result.ensemble.bundle, result.ensemble
    verdict = result.answers.slides.get(entry.slide_id)
    values = verdict.prediction_P.tolist() if verdict else []
    tasks = _tasks(result, entry.slide_id)
    main = tasks.get(ensemble.tasks.main.name, {})
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": entry.name,
        "slide_id": entry.slide_id,
        "identity": entry.identity,
        "outcome": row["outcome"],
        "reason": row["reason"],
        "probability": dict(zip(ensemble.tasks.columns, values, strict=False)),
        "decision": main.get("decision", "") if verdict else NO_TILES,
        "calibrated": main.get("calibrated", {}),
        "conformal_set": main.get("conformal_set", []),
        "tasks": tasks,
        "qc": [flag for flag in row["qc"].split("; ") if flag],
        "drift": found.drift,
        "bundle": bundle.digest,
        "encoder": {"name": bundle.facts["encoder"]["name"], "identity": dict(bundle.facts["encoder"]["identity"])},
        "settings": settings_digest(bundle),
        "code": __version__,
        "versions": library_versions(),
        "time": found.time.isoformat(timespec="seconds"),
        "events": dict(found.events),
    }


def _tasks(result: Result, slide_id: str) -> dict[str, dict[str, Any]]:
    """What the locked thresholds make of a slide, by task."""
    verdict, ensemble = result.answers.slides.get(slide_id), result.ensemble
    return {
        name: {
            "decision": said.decision,
            "calibrated": dict(zip(ensemble.task(name).classes, said.calibrated_C, strict=False)),
            "conformal_set": list(said.set),
            "doubts": list(said.reasons),
            "distance": said.distance,
        }
        for name, said in (verdict.decisions if verdict else {}).items()
    }


def settings_digest(bundle: Bundle) -> str:
    """Hash of all locked settings."""
    return fingerprint({name: bundle.facts[name] for name in ("tile", "extract", "mil")})
