"""The cohort: which slides, whose, and with which labels. Everything is checked before any work starts."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pathfm.addresses import is_remote, placed, public_name
from pathfm.config import bullet_list, did_you_mean
from pathfm.errors import UsageError
from pathfm.geometry import MPP_SANE, mpp_is_sane
from pathfm.log import status
from pathfm.store.interop.label_tables import Table, folded, joined, named, read_table, translated
from pathfm.store.pseudonyms import Pseudonyms
from pathfm.study import CohortSettings

REQUIRED = ("slide_id", "path")
RESERVED = (*REQUIRED, "patient_id", "specimen_id", "mpp", "site", "split", "lesion_mask")
"""Columns with a meaning of their own; every other column is a label column."""
MAX_ID_BYTES = 200
"""File systems allow 255 bytes per name; the rest is for suffixes."""
_NAMES = re.compile(": |, as ")
"""What comes before names in a note."""
_MEANING = {
    "slide_id": "wanted: slide_id, a name for each slide",
    "path": "wanted: path, its file, as slides/a01.svs; with `pathfm mil train TABLE --features DIR --out OUT` none is needed",
}

FindSlides = Callable[[Sequence[str], bool], Sequence[tuple[str, Path]]]
"""Discovery without a table: (sources, folder_of_tiles) -> (slide_id, path) of every slide."""


@dataclass(frozen=True, slots=True)
class SlideRow:
    """One slide of the cohort. ``line`` is its line in the table (0 without a table); an absent label is empty text.

    ``path`` is the slide; where slides are not needed and the table has no paths, only its name.
    """

    slide_id: str
    path: Path
    line: int = 0
    patient_id: str | None = None
    specimen_id: str | None = None
    mpp: float | None = None
    site: str | None = None
    split: str | None = None
    lesion_mask: Path | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cohort:
    """All slides of a study, in the order of the table (by slide_id without one), and the names of the label columns.

    ``notes`` say what was done to a table of another tool, and who was found in one of two tables only.
    """

    rows: tuple[SlideRow, ...]
    label_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load_cohort(settings: CohortSettings, base: Path, find: FindSlides | None = None, *, needs_slides: bool = True) -> Cohort:
    """The cohort of a table, or without a table of the slides that ``find`` finds in the given sources.

    Args:
        settings: the study's ``cohort`` table.
        base: folder that relative paths of the settings start at (paths inside the table start at the table's folder).
        find: discovery; needed when there is no table.
        needs_slides: every slide must have a path. Slides that are not there fail when they are worked on, which a note says;
            without any slide there is no cohort. Without the need (features made elsewhere) paths may be absent, and tables
            are taken as other tools write them (``pathfm.store.interop.label_tables``); what that changes is said.

    Raises:
        UsageError: anything wrong with the tables or the ids, all problems in one message with their line numbers; or no
            usable key for pseudonyms.
    """
    pseudonyms = Pseudonyms(base / settings.pseudonym_key) if settings.pseudonym_key else None
    cohort = _named_cohort(settings, base, find, needs_slides)
    if pseudonyms:
        cohort = _hidden(cohort, pseudonyms)
    for note in cohort.notes:
        status(settings.table.name if settings.table else "cohort", "note", note)
    return cohort


def _named_cohort(settings: CohortSettings, base: Path, find: FindSlides | None, needs_slides: bool) -> Cohort:
    if settings.table and settings.slides:
        raise UsageError("both a table and slides are given", where="cohort", fix="keep one: cohort.table or cohort.slides")
    if settings.table:
        clinical = base / settings.clinical if settings.clinical else None
        return _read_table(base / settings.table, clinical, needs_slides)
    if not settings.slides:
        raise UsageError("no slides are given", where="cohort", fix="set cohort.table=FILE.csv or cohort.slides=[FOLDER]")
    if find is None:
        raise TypeError("a cohort without a table needs a function that finds slides")
    found = find([str(source if is_remote(source) else base / source) for source in settings.slides], settings.folder_of_tiles)
    rows = tuple(SlideRow(slide_id, path) for slide_id, path in sorted(found))
    if not rows:
        raise UsageError("no slides were found", where=", ".join(settings.slides), fix="check cohort.slides")
    problems = [f"{_shown(row.path)}: {problem}" for row in rows if (problem := id_problem(row.slide_id))]
    _refuse(problems + _clashes(rows), "cohort.slides")
    return Cohort(rows)


def _hidden(cohort: Cohort, pseudonyms: Pseudonyms) -> Cohort:
    """The cohort with pseudonyms for names, which notes lose too."""
    rows = tuple(
        replace(
            row,
            slide_id=pseudonyms.of("slide", row.slide_id),
            patient_id=row.patient_id and pseudonyms.of("patient", row.patient_id),
            specimen_id=row.specimen_id and pseudonyms.of("specimen", row.specimen_id),
        )
        for row in cohort.rows
    )
    return replace(cohort, rows=rows, notes=tuple(_NAMES.split(note)[0] for note in cohort.notes))


def group_of(slide_id: str, count: int) -> str:
    """The group of a slide among ``count``, as ``3-of-8``: by its name alone, so that new slides move no others."""
    place = int.from_bytes(hashlib.sha256(slide_id.encode()).digest()[:4]) * count >> 32
    return f"{place + 1}-of-{count}"


def shard_of(rows: Sequence[SlideRow], shard: str) -> tuple[SlideRow, ...]:
    """The rows of one job: of an array (``i/n``) every n-th, from the i-th (1-based) on; of a workflow (``i-of-n``) those of
    the group; all of them without a shard."""
    if not shard:
        return tuple(rows)
    if "-of-" in shard:
        count = int(shard.rpartition("-")[2])
        return tuple(row for row in rows if group_of(row.slide_id, count) == shard)
    index, count = (int(number) for number in shard.split("/"))
    return tuple(rows[index - 1 :: count])


def check_labels(cohort: Cohort, label: str, level: Literal["patient", "specimen", "slide"]) -> None:
    """Refuse a label column that is absent or empty, or patients (specimens) whose slides contradict each other.

    Raises:
        UsageError: naming the column, or every such patient (specimen) with its labels and lines.
    """
    where = f"label {label!r}"
    if label in RESERVED:
        raise UsageError("this column has a meaning of its own", where=where, fix="copy it under another name to predict it")
    if label not in cohort.label_names:
        hint = did_you_mean(label, cohort.label_names)
        raise UsageError(f"the cohort has no such label column{hint}", where=where, fix=_label_fix(label, cohort.label_names))
    labelled = [row for row in cohort.rows if row.labels.get(label)]
    if not labelled:
        raise UsageError("no slide has this label", where=where, fix="fill the column, or set mil.label to another one")
    if level == "slide":
        return
    seen: dict[tuple[str | None, ...], dict[str, list[int]]] = {}
    for row in labelled:
        # Two patients may each have a specimen 1.
        name = (row.patient_id, row.specimen_id) if level == "specimen" else (row.patient_id,)
        if name[-1]:
            seen.setdefault(name, {}).setdefault(row.labels[label], []).append(row.line)
    found = [(" ".join(filter(None, name)), said) for name, said in seen.items() if len(said) > 1]
    _refuse([_contradiction(level, *each) for each in found], where)


def _label_fix(label: str, known: Sequence[str]) -> str:
    if not known:
        return f"label columns: none; --set cohort.table=TABLE.csv with columns slide_id,path,patient_id,{label} gives them"
    meant = next((name for name in known if folded(name) == folded(label)), "NAME")
    return f"label columns: {', '.join(known)}; choose with --set mil.label={meant}"


def id_problem(slide_id: str) -> str:
    """Why a slide_id cannot name a file inside the output folder; empty text when it can."""
    if not slide_id:
        return "the slide_id is empty"
    if any(unicodedata.category(character) in {"Cc", "Cs"} for character in slide_id):
        return f"slide_id {slide_id!r} holds a control character"
    if slide_id != slide_id.strip():
        return f"slide_id {slide_id!r} starts or ends with a space"
    if "/" in slide_id or "\\" in slide_id:
        return f"slide_id {slide_id!r} holds a slash, and would leave the output folder"
    if slide_id.startswith("."):
        return f"slide_id {slide_id!r} starts with a dot"
    if len(slide_id.encode()) > MAX_ID_BYTES:
        return f"slide_id {slide_id[:20]!r}... is longer than {MAX_ID_BYTES} bytes"
    return ""


def _read_table(path: Path, clinical: Path | None, needs_slides: bool) -> Cohort:
    table = read_table(path)
    if not needs_slides:
        table = translated(table)
    if clinical:
        table = joined(table, translated(read_table(clinical), ("patient_id",)))
    _check_header(table, REQUIRED if needs_slides else REQUIRED[:1])
    problems: list[str] = []
    lost: list[str] = []
    rows: list[SlideRow] = []
    for line, values in table.rows:
        if len(values) != len(table.names):
            problems.append(f"line {line}: {len(values)} fields, but the header has {len(table.names)} columns")
            continue
        values_of = dict(zip(table.names, values, strict=True))
        row, wrong = _read_row(values_of, line, path.parent, needs_slides)
        problems += [f"line {line}: {problem}" for problem in wrong]
        if needs_slides and values_of["path"] and not _exists(row.path):
            lost.append(f"line {line}: there is no file {row.path}")
        rows.append(row)
    problems += _clashes(rows)
    if problems:
        _refuse(problems + lost, str(path))
    if len(lost) == len(rows):
        _refuse(lost, str(path), "paths start at the folder of the table")
    notes = [f"{len(lost)} of {len(rows)} slides have no file, and fail: {named(lost)}"] if lost else []
    return Cohort(tuple(rows), tuple(name for name in table.names if name not in RESERVED), (*table.notes, *notes))


def _check_header(table: Table, required: Sequence[str]) -> None:
    names = table.names
    problems = [f"column {name!r} is there twice" for name in dict.fromkeys(names) if name and names.count(name) > 1]
    problems += [f"column {index} has no name" for index, name in enumerate(names, start=1) if not name]
    absent = [name for name in required if name not in names]
    problems += [f"there is no column {name!r}{did_you_mean(name, set(names) - set(RESERVED))}" for name in absent]
    if problems:
        fix = "; ".join([f"columns: {', '.join(names)}", *(_MEANING[name] for name in absent)])
        raise UsageError(bullet_list(problems), where=str(table.path), fix=fix)
    if not table.rows:
        raise UsageError("the table has no rows", where=str(table.path))


def _read_row(values: Mapping[str, str], line: int, folder: Path, needs_slides: bool) -> tuple[SlideRow, list[str]]:
    """A row and what is wrong with it, whether its slide is there or not."""
    problems = [problem] if (problem := id_problem(values["slide_id"])) else []
    if values.get("patient_id") == "":
        problems.append("the patient_id is empty")
    place = values.get("path", "")
    mpp, mask = _number(values.get("mpp", "")), values.get("lesion_mask", "")
    if values.get("mpp") and (mpp is None or not mpp_is_sane(mpp)):
        problems.append(f"mpp {values['mpp']!r} must be a number from {MPP_SANE[0]} to {MPP_SANE[1]} micrometres per pixel")
    if not place and needs_slides:
        problems.append("the path is empty")
    if mask and not _exists(folder / mask):
        problems.append(f"there is no lesion mask {folder / mask}")
    row = SlideRow(
        slide_id=values["slide_id"],
        path=placed(folder, place) if place else Path(values["slide_id"]),
        line=line,
        patient_id=values.get("patient_id"),
        specimen_id=values.get("specimen_id") or None,
        mpp=mpp,
        site=values.get("site") or None,
        split=values.get("split") or None,
        lesion_mask=folder / mask if mask else None,
        labels={name: value for name, value in values.items() if name not in RESERVED},
    )
    return row, problems


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _shown(path: Path) -> str:
    """A path in one line of text that every terminal can take."""
    text = public_name(path)
    return text if text.isprintable() else ascii(text)


def _exists(path: Path) -> bool:
    try:
        return is_remote(path) or path.exists()
    except (OSError, ValueError):  # a name that is too long, or that holds a NUL
        return False


def _clashes(rows: Iterable[SlideRow]) -> list[str]:
    """Ids that are equal, or would be on a file system that ignores case or the way accents are written."""
    first: dict[str, SlideRow] = {}
    problems: list[str] = []
    for row in rows:
        if not row.slide_id:
            continue
        other = first.setdefault(folded(row.slide_id), row)
        if other is row:
            continue
        same = (
            "is there twice"
            if other.slide_id == row.slide_id
            else f"differs from {other.slide_id!r} only in case or in how accents are written"
        )
        place = f"line {row.line}: " if row.line else ""
        origin = f" on line {other.line}" if other.line else ""
        problems.append(
            f"{place}slide_id {row.slide_id!r} {same}: {public_name(row.path)}, and{origin} {public_name(other.path)}"
        )
    return problems


def _contradiction(level: str, name: str, said: Mapping[str, Sequence[int]]) -> str:
    parts = [f"{label!r} on line {', '.join(map(str, lines))}" for label, lines in said.items()]
    return f"{level} {name!r} is {' and '.join(parts)}"


def _refuse(problems: Sequence[str], where: str, fix: str = "") -> None:
    if problems:
        raise UsageError(bullet_list(problems), where=where, fix=fix)
