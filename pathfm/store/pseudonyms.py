"""Pseudonyms: keyed hashes instead of the names of slides, patients and specimens. Specified in ``docs/audit.md``.

The same key gives the same name the same pseudonym, in every study; without the key nobody can go from a list of names to
pseudonyms, nor back. Who has the key can list who is who.
"""

from __future__ import annotations

import csv
import hmac
import os
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pathfm.chain import read_key
from pathfm.config import bullet_list
from pathfm.errors import UsageError
from pathfm.store.commit import commit_file
from pathfm.store.interop.label_tables import read_table, translated
from pathfm.study import Study

Kind = Literal["slide", "patient", "specimen"]
COLUMNS: Mapping[str, Kind] = {"slide_id": "slide", "patient_id": "patient", "specimen_id": "specimen"}
"""Columns of a cohort table that name somebody, and what they name."""
DIGITS = 16


class Pseudonyms:
    """Names to pseudonyms under one key, each looked at for a second name with the same one.

    Args:
        key: file of the key, 32 bytes or more (``pathfm audit --new-key FILE``).

    Raises:
        UsageError: the file is absent or holds no key.
    """

    def __init__(self, key: Path) -> None:
        self._key = read_key(key)
        self._names: dict[tuple[Kind, str], str] = {}

    def of(self, kind: Kind, name: str) -> str:
        """``P`` and 16 hex digits of HMAC-SHA256 over the kind and the name; the way accents are written does not count.

        Raises:
            UsageError: two names would have one pseudonym (for a million names: one chance in 37 million).
        """
        plain = unicodedata.normalize("NFC", name)
        found = "P" + hmac.digest(self._key.secret, f"pseudonym\0{kind}\0{plain}".encode(), "sha256").hex()[:DIGITS]
        if self._names.setdefault((kind, found), plain) != plain:
            raise UsageError(
                f"two of kind {kind} have the pseudonym {found}", where="cohort.pseudonym_key", fix="use another key"
            )
        return found


def write_pseudonyms(table: Path, key: Path, out: Path) -> int:
    """Writes who is who: every slide of a cohort table with its names and its pseudonyms, for its owner's eyes only (0600).

    Args:
        table: as studies read it.
        key: file of the key.
        out: CSV to make.

    Returns:
        number of rows.

    Raises:
        UsageError: no such table or key, no rows, or there is a file already.
    """
    pseudonyms, cohort = Pseudonyms(key), read_table(table)
    if "path" not in cohort.names:
        cohort = translated(cohort)
    if "slide_id" not in cohort.names:
        raise UsageError("there is no column 'slide_id'", where=str(table), fix=f"columns: {', '.join(cohort.names)}")
    if not cohort.rows:
        raise UsageError("the table has no rows", where=str(table))
    short = [f"line {line}" for line, values in cohort.rows if len(values) != len(cohort.names)]
    if short:
        raise UsageError(f"other numbers of fields than columns: {bullet_list(short)}", where=str(table))
    if out.exists():
        raise UsageError("this file is there already", where=str(out), fix="name another file")
    rows = [_row(dict(zip(cohort.names, values, strict=True)), pseudonyms) for _, values in cohort.rows]
    with commit_file(out) as temporary:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return len(rows)


def _row(values: Mapping[str, str], pseudonyms: Pseudonyms) -> dict[str, str]:
    names = {column: values[column] for column in COLUMNS if column in values}
    hidden = {f"{column}_pseudonym": pseudonyms.of(COLUMNS[column], name) if name else "" for column, name in names.items()}
    return names | hidden


def refuse_named_files(study: Study) -> None:
    """Refuses settings whose files are found by the names that pseudonyms replace: they would silently not be found.

    Raises:
        UsageError: naming the setting.
    """
    places = {
        "tile.coords": study.tile.coords,
        "tile.tissue.annotations": study.tile.tissue.annotations,
        "mil.features": study.mil.features,
    }
    for name, place in places.items():
        if study.cohort.pseudonym_key and place:
            fix = "name them by the pseudonyms (pathfm pseudonyms), and the slides in a table of pseudonyms"
            raise UsageError("its files go by names that cohort.pseudonym_key replaces", where=f"{name}={place}", fix=fix)
