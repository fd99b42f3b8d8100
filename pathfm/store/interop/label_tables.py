"""Tables of slides and labels as CLAM, Patho-Bench (TRIDENT), STAMP and others write them. Specified in ``docs/interop.md``.

Their columns get our names, their file names become slide_ids. Nothing disappears silently: whatever is renamed, joined, merged
or finds no partner is in the notes of the table, counted and named; what could mean two things is refused.
"""

from __future__ import annotations

import csv
import importlib
import io
import re
import unicodedata
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pathfm.config import bullet_list
from pathfm.errors import MissingExtraError, UsageError

SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "slide_id": (
        *("slide", "slideid", "slide_name", "slide_submitter_id", "wsi", "wsi_id", "wsi_name", "image", "image_id"),
        *("image_name", "sample_id", "filename", "file_name", "file"),
    ),
    "patient_id": (
        *("patient", "patientid", "patient_name", "patient_code", "case", "case_id", "caseid", "case_submitter_id"),
        *("submitter_id", "cases_submitter_id", "subject_id", "subject", "participant_id", "pid"),
    ),
}
"""Our column, and what other tools call it (whatever the case; spaces, dots and dashes count as underscores)."""
ENDINGS = (
    *(".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".isyntax", ".czi", ".dcm"),
    *(".qptiff", ".vsi", ".ome", ".zarr", ".h5", ".hdf5", ".pt", ".npz", ".png", ".jpg", ".jpeg"),
)
"""Ends of file names that are no part of a slide_id."""
FOLD = re.compile(r"(?:fold|split)_?(\d+)", re.IGNORECASE)
"""Columns of Patho-Bench with train and test."""
SIDES = frozenset({"train", "val", "validation", "test", ""})
NUMBER = re.compile(r"0*([0-9]+)(?:\.0*)?")
"""A whole number, of which spreadsheets drop the zeros before it, and to which they may add ``.0``."""
MAX_DIGITS = 20
"""Numbers are looked for with zeros before them up to this length."""
DECIMAL_COMMA = re.compile(r"(\d+),(\d+)")
SAVE_AS = "in Excel: Save As, type `CSV UTF-8`"


@dataclass(frozen=True)
class Table:
    """A table as text.

    Attributes:
        path: the file.
        names: of the columns.
        rows: line in the file, and values, of every row that is not blank.
        notes: what was done to it.
    """

    path: Path
    names: tuple[str, ...]
    rows: tuple[tuple[int, tuple[str, ...]], ...]
    notes: tuple[str, ...] = ()

    def column(self, name: str) -> list[str]:
        """All values of a column."""
        place = self.names.index(name)
        return [values[place] for _, values in self.rows]


def read_table(path: Path) -> Table:
    """A table with commas, semicolons or tabs, in UTF-8 with or without byte-order mark; or the first sheet of an xlsx file.

    Where semicolons separate the columns, ``mpp`` may have a decimal comma.

    Raises:
        MissingExtraError: an xlsx file, and openpyxl is not installed.
        UsageError: absent, not such a file, or empty.
    """
    if path.is_dir():
        fix = "name the file in it; a folder of slides is cohort.slides=[FOLDER]"
        raise UsageError("the cohort table cannot be read: it is a folder", where=str(path), fix=fix)
    cells = _read_sheet(path) if path.suffix.lower() == ".xlsx" else _read_text(path)
    stripped = [(line, tuple(value.strip() for value in values)) for line, values in cells]
    filled = [(line, values) for line, values in stripped if any(values)]
    if not filled:
        raise UsageError("the table is empty", where=str(path), fix="columns: slide_id, patient_id and labels")
    return Table(path, filled[0][1], tuple(filled[1:]))


def translated(table: Table, wanted: Sequence[str] = ("slide_id", "patient_id")) -> Table:
    """The table with our names for its columns and slide_ids without folders and endings; rows that are there twice count once.

    Args:
        table: as read.
        wanted: which of our columns are looked for under other names.

    Raises:
        UsageError: rows of other lengths than the header, or several columns that could be one of ours and differ.
    """
    table = _without_numbers(table)
    _check_even(table)
    for ours in wanted:
        table = _renamed(table, ours)
    if "slide_id" in wanted and "slide_id" in table.names:
        table = _with_split(_plain_ids(table))
    return _without_repeats(table)


def joined(slides: Table, clinical: Table) -> Table:
    """A table of slides with the columns of a table of patients, whatever the order of both.

    Slides of patients who are not in the table of patients stay, with empty values; patients without slides are noted.

    Raises:
        UsageError: no column with patients, a column in both tables, a patient with two different rows, or nobody in both.
    """
    for table in (slides, clinical):
        _check_even(table)
        if "patient_id" not in table.names:
            fix = f"name one of these patient_id: {', '.join(table.names)}"
            raise UsageError("no column tells the patient", where=str(table.path), fix=fix)
    both = [name for name in clinical.names if name in slides.names and name != "patient_id"]
    if both:
        what = f"columns that {slides.path.name} has too: {', '.join(both)}"
        raise UsageError(what, where=str(clinical.path), fix="keep them in one of the two tables")
    of, place = _patients(clinical), slides.names.index("patient_id")
    key = clinical.names.index("patient_id")
    added = (*clinical.names[:key], *clinical.names[key + 1 :])
    rows = []
    for line, values in slides.rows:
        found = of.get(folded(values[place]))
        if found is None:
            rows.append((line, (*values, *[""] * len(added))))
        else:
            # The spelling of the table of patients: p1 and P1 are one person.
            own = (*values[:place], found[key], *values[place + 1 :])
            rows.append((line, (*own, *found[:key], *found[key + 1 :])))
    notes = _partners(slides, clinical, {name: found[key] for name, found in of.items()})
    return Table(slides.path, (*slides.names, *added), tuple(rows), (*slides.notes, *clinical.notes, *notes))


def folded(name: str) -> str:
    """A name as file systems and people take for the same: whatever its case and the way accents are written."""
    return unicodedata.normalize("NFC", name).casefold()


def without_padding(name: str) -> str:
    """A whole number as spreadsheets leave it, ``7`` for ``007`` and ``7.0``; any other name as it is."""
    found = NUMBER.fullmatch(name)
    return found[1] if found else name


def spellings(name: str) -> frozenset[str]:
    """The name, and of a whole number all ways to write it that spreadsheets do not tell apart (up to ``MAX_DIGITS``)."""
    plain = without_padding(name.strip())
    if not NUMBER.fullmatch(plain):
        return frozenset({name})
    padded = {plain, *(plain.zfill(width) for width in range(len(plain), MAX_DIGITS + 1))}
    return frozenset({name, *padded, *(f"{number}.0" for number in padded)})


def without_endings(name: str) -> str:
    """A file name without its folders and without the endings of slides and features."""
    plain = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    while (ending := next((each for each in ENDINGS if plain.lower().endswith(each)), "")) and len(plain) > len(ending):
        plain = plain[: -len(ending)]
    return plain


def named(names: Sequence[str]) -> str:
    """The first ten names, and how many there are."""
    return ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")


def _read_text(path: Path) -> list[tuple[int, list[str]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError("there is no such cohort table", where=str(path)) from None
    except OSError as error:
        raise UsageError(f"the cohort table cannot be read: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # also UTF-16 without a byte-order mark
        raise UsageError("the cohort table is not UTF-8 text", where=str(path), fix=SAVE_AS)
    # The delimiter is whichever is most frequent in the header: column names hold none of the three.
    delimiter = max(",;\t", key=text.lstrip("\r\n").partition("\n")[0].count)
    # Strict, because an unclosed quote would otherwise swallow the rest of the table without a word.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        rows = [(reader.line_num, values) for values in reader]
    except csv.Error as error:
        raise UsageError(f"not a valid CSV table: {error}", where=f"{path}, line {reader.line_num}") from None
    return _with_points(rows) if delimiter == ";" else rows


def _with_points(rows: list[tuple[int, list[str]]]) -> list[tuple[int, list[str]]]:
    """Numbers of the column ``mpp`` with a point: who separates by semicolons writes decimal commas."""
    header = next((values for _, values in rows if any(value.strip() for value in values)), [])
    places = [place for place, name in enumerate(header) if name.strip() == "mpp"]
    for _, values in rows:
        for place in places:
            if place < len(values) and (found := DECIMAL_COMMA.fullmatch(values[place].strip())):
                values[place] = f"{found[1]}.{found[2]}"
    return rows


def _read_sheet(path: Path) -> list[tuple[int, list[str]]]:
    if not path.is_file():
        raise UsageError("there is no such cohort table", where=str(path))
    try:
        openpyxl = importlib.import_module("openpyxl")
    except ImportError as error:
        fix = "pip install openpyxl, or save the table as CSV"
        raise MissingExtraError(
            "xlsx tables are read with openpyxl, which is not installed", where=str(path), fix=fix
        ) from error
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (OSError, LookupError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError("damaged, or not an xlsx table", where=str(path)) from error
    try:
        sheet = book.worksheets[0].iter_rows(values_only=True)
        rows = [["" if value is None else str(value).strip() for value in row] for row in sheet]
    finally:
        book.close()
    # Sheets are as wide as their widest cell ever was, and rows may end where their cells do.
    width = max((place for row in rows[:1] for place, value in enumerate(row, start=1) if value), default=0)
    return [(line, [*row[:width], *[""] * (width - len(row)), *filter(None, row[width:])]) for line, row in enumerate(rows, 1)]


def _check_even(table: Table) -> None:
    uneven = [
        f"line {line}: {len(values)} fields, but the header has {len(table.names)} columns"
        for line, values in table.rows
        if len(values) != len(table.names)
    ]
    if uneven:
        raise UsageError(bullet_list(uneven), where=str(table.path))


def _without_numbers(table: Table) -> Table:
    """Without the first column where it has no name: the row numbers that pandas writes."""
    if table.names[0] or len(table.names) < 2:
        return table
    rows = tuple((line, values[1:]) for line, values in table.rows)
    return replace(
        table, names=table.names[1:], rows=rows, notes=(*table.notes, "the first column has no name and is left out")
    )


def _renamed(table: Table, ours: str) -> Table:
    """With our name for the column that other tools call otherwise."""
    if ours in table.names:
        return table
    plain = {name: re.sub(r"[ .-]", "_", name.casefold()) for name in table.names}
    found = [name for name in table.names if plain[name] == ours]
    found = found or [name for name in table.names if plain[name] in SYNONYMS[ours]]
    if not found:
        return table
    first = table.column(found[0])
    for other in found[1:]:
        differ = [line for (line, _), a, b in zip(table.rows, first, table.column(other), strict=True) if a != b]
        if differ:
            what = f"{found[0]!r} and {other!r} could both be {ours}, and differ on line {differ[0]}"
            raise UsageError(what, where=str(table.path), fix=f"name the right one {ours}")
    names = tuple(ours if name == found[0] else name for name in table.names)
    return replace(table, names=names, notes=(*table.notes, f"{ours} is the column {found[0]!r}"))


def _plain_ids(table: Table) -> Table:
    place = table.names.index("slide_id")
    changed = [values[place] for _, values in table.rows if without_endings(values[place]) != values[place]]
    if not changed:
        return table
    rows = tuple((line, (*values[:place], without_endings(values[place]), *values[place + 1 :])) for line, values in table.rows)
    note = f"{len(changed)} slide_ids are taken without folder and ending, as {without_endings(changed[0])} for {changed[0]}"
    return replace(table, rows=rows, notes=(*table.notes, note))


def _with_split(table: Table) -> Table:
    """Fold columns of Patho-Bench as our ``split``: one as it is, several as the number of the fold that tests the slide."""
    columns = {name: [value.casefold() for value in table.column(name)] for name in table.names if FOLD.fullmatch(name)}
    folds = {name: values for name, values in columns.items() if set(values) <= SIDES and "test" in values}
    if not folds or "split" in table.names:
        return table
    ordered = sorted(folds, key=lambda name: int(FOLD.fullmatch(name)[1]))  # type: ignore[index]
    take = "mil.split.scheme=column takes it"
    if len(ordered) == 1:
        names = tuple("split" if name == ordered[0] else name for name in table.names)
        return replace(table, names=names, notes=(*table.notes, f"split is the column {ordered[0]!r}: {take}"))
    tested = [
        [str(number) for number, name in enumerate(ordered) if folds[name][row] == "test"] for row in range(len(table.rows))
    ]
    if any(len(numbers) != 1 for numbers in tested):
        what = f"{ordered[0]} to {ordered[-1]} do not test every slide once, and are no split: name one of them split"
        return replace(table, notes=(*table.notes, what))
    kept = [place for place, name in enumerate(table.names) if name not in folds]
    rows = tuple(
        (line, (*(values[place] for place in kept), *number)) for (line, values), number in zip(table.rows, tested, strict=True)
    )
    note = f"split is the number of the fold that tests a slide, of {ordered[0]} to {ordered[-1]}: {take}"
    return Table(table.path, (*(table.names[place] for place in kept), "split"), rows, (*table.notes, note))


def _without_repeats(table: Table) -> Table:
    first: dict[tuple[str, ...], int] = {}
    again = [line for line, values in table.rows if first.setdefault(values, line) != line]
    if not again:
        return table
    note = f"{len(again)} rows of {table.path.name} are there twice and count once: line {named([str(line) for line in again])}"
    return replace(table, rows=tuple((line, values) for values, line in first.items()), notes=(*table.notes, note))


def _partners(slides: Table, clinical: Table, patients: Mapping[str, str]) -> list[str]:
    """Notes on who is in one table only, or written differently in the two. ``patients``: folded name -> as in ``clinical``."""
    here = slides.column("patient_id")
    alone = [name for name in here if folded(name) not in patients]
    if len(alone) == len(here):
        what = f"no patient of {slides.path.name} is in the table of patients, as {named(sorted(set(alone))[:3])}"
        fix = f"patients there: {named(sorted(patients.values())[:3])}"
        raise UsageError(what, where=str(clinical.path), fix=fix)
    lost = sorted(set(alone))
    without = sorted(name for key, name in patients.items() if key not in set(map(folded, here)))
    other = sorted({name for name in here if folded(name) in patients and patients[folded(name)] != name})
    notes = {
        f"{len(alone)} slides of {len(lost)} patients have no row in {clinical.path.name}: {named(lost)}": lost,
        f"{len(without)} patients of {clinical.path.name} have no slide: {named(without)}": without,
        f"{len(other)} patients are written differently in {clinical.path.name}, and so here: {named(other)}": other,
    }
    return [note for note, names in notes.items() if names]


def _patients(clinical: Table) -> dict[str, tuple[str, ...]]:
    """Rows by patient."""
    place = clinical.names.index("patient_id")
    lines: dict[str, list[int]] = {}
    of: dict[str, tuple[str, ...]] = {}
    for line, values in clinical.rows:
        lines.setdefault(folded(values[place]), []).append(line)
        of[folded(values[place])] = values
    problems = [
        f"patient {of[name][place]!r} has different rows on line {', '.join(map(str, where))}"
        for name, where in lines.items()
        if len(where) > 1
    ]
    problems += [f"line {lines[''][0]}: the patient is empty"] if "" in lines else []
    if problems:
        raise UsageError(bullet_list(problems), where=str(clinical.path))
    return of
