"""Splits as they are kept: ``splits.json``, and the split tables of CLAM and the tools that follow it."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathfm.config import bullet_list
from pathfm.errors import StoreError, UsageError
from pathfm.mil_settings import MilSettings
from pathfm.stats.folds import Fold, folds_record
from pathfm.store.commit import read_json

SPLITS = "splits.json"
"""The file of the splits in the folder of the mil stage."""
PARTS = ("train", "validation", "test")
SIDES = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
"""Values of the column ``split``, whatever their case; or fold numbers from 0 on."""
SPLIT_TABLE = re.compile(r"splits_(\d+)\.csv")
"""One fold of a folder of split tables, as CLAM writes them: columns train, val and test with slide_ids."""


@dataclass(frozen=True)
class Splits:
    """Folds and where they come from.

    Attributes:
        folds: a patient may be tested several times (repeats, Monte Carlo) or never (column).
        scheme: of ``mil.split``.
        settings: what the folds depend on besides the patients, JSON-ready.
        seed: of ``mil.seed``.
        names: of the folds, in words.
        notes: what a reader of the numbers has to know.
        origin: the earlier splits that these extend, in words; empty: the cohort was cut as it is.
    """

    folds: tuple[Fold, ...]
    scheme: str
    settings: Mapping[str, Any]
    seed: int
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    origin: str = ""

    @property
    def hash(self) -> str:
        """SHA-256 over the patients of all parts of all folds."""
        return str(folds_record(self.folds, self.seed)["hash"])

    def record(self) -> dict[str, Any]:
        """JSON-ready; as ``splits.json`` it is what ``read_splits`` reads."""
        about = {"scheme": self.scheme, "settings": dict(self.settings), "names": list(self.names), "notes": list(self.notes)}
        return {**folds_record(self.folds, self.seed), **about, "origin": self.origin}


def read_splits(path: Path, patient_of: Mapping[str, str] | None = None) -> Splits:
    """Splits that were saved: ``splits.json``, or split tables of slide_ids as CLAM writes them (a file or their folder).

    Args:
        path: the file or folder.
        patient_of: slide_id -> patient, for split tables.

    Raises:
        UsageError: not such a file, changed since it was written, or a patient on two sides of a fold.
    """
    splits = _read_json(path) if path.suffix == ".json" else _read_tables(path, patient_of or {})
    torn: dict[str, list[str]] = {}
    for name, fold in zip(splits.names, splits.folds, strict=True):
        parts = Counter(patient for part in PARTS for patient in set(getattr(fold, part)))
        for patient in sorted(patient for patient, count in parts.items() if count > 1):
            sides = " and ".join(part for part in PARTS if patient in getattr(fold, part))
            torn.setdefault(patient, []).append(f"{sides} of {name}")
    if torn:
        listed = [f"patient {patient}: {', '.join(places)}" for patient, places in sorted(torn.items())]
        what = f"{len(torn)} patients are on two sides of a split: {bullet_list(listed, 20)}"
        raise UsageError(what, where=path.name, fix="cut the cohort by patient: mil.split.scheme=folds")
    return splits


def kept_splits(mil_dir: Path, settings: MilSettings) -> Splits | None:
    """The splits of an earlier run in this folder, whose patients keep their places; None: none, or they are not to be kept.

    Raises:
        UsageError: they were changed since, or put a patient on two sides.
    """
    path = mil_dir / SPLITS
    if not settings.split.keep or not path.is_file():
        return None
    try:
        return read_splits(path)
    except UsageError as error:
        fix = "put the file of the earlier run back; or delete it, and the cohort is cut anew"
        raise UsageError(error.what, where=str(path), fix=fix) from error


def _read_json(path: Path) -> Splits:
    try:
        found = read_json(path)
        parts = [{part: tuple(map(str, fold[part])) for part in PARTS} for fold in found["folds"]]
        folds, seed = tuple(Fold(**fold) for fold in parts), int(found["seed"])
        names = tuple(found.get("names", ())) or tuple(f"fold {number}" for number in range(len(folds)))
        about = str(found.get("scheme", "folds")), found.get("settings", {})
        splits = Splits(folds, *about, seed, names, tuple(found.get("notes", ())), str(found.get("origin", "")))
    except (StoreError, KeyError, TypeError, ValueError) as error:
        reason = error.what if isinstance(error, StoreError) else "not the splits of an earlier run"
        raise UsageError(reason, where=path.name, fix="give splits.json of an earlier run as mil.split.file") from error
    if not folds or len(names) != len(folds) or found.get("hash") != splits.hash:
        fix = "take the file of the earlier run again, or cut the cohort anew"
        raise UsageError("the splits do not have the hash that they were saved with", where=path.name, fix=fix)
    return splits


def _read_tables(path: Path, patient_of: Mapping[str, str]) -> Splits:
    inside = path.iterdir() if path.is_dir() else ()
    numbered = {int(match[1]): each for each in inside if (match := SPLIT_TABLE.fullmatch(each.name))}
    tables = [numbered[number] for number in sorted(numbered)] or [path]
    folds = tuple(_read_table(table, patient_of) for table in tables)
    return Splits(folds, "file", {}, 0, tuple(table.name for table in tables))


def _read_table(table: Path, patient_of: Mapping[str, str]) -> Fold:
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        fix = "give splits.json of an earlier run, or a table with the columns train, val and test"
        raise UsageError(f"splits that cannot be read: {error}", where=table.name, fix=fix) from error
    found: dict[str, list[str]] = {part: [] for part in PARTS}
    for name in [name for name in (rows[0] if rows else ()) if SIDES.get(str(name))]:
        found[SIDES[name]] += [slide_id for row in rows if (slide_id := (row[name] or "").strip())]
    if not found["train"] or not found["test"]:
        raise UsageError("no split table", where=table.name, fix="columns train, val and test, with slide_ids")
    unknown = sorted({slide_id for part in found.values() for slide_id in part} - set(patient_of))
    if unknown:
        what = f"{len(unknown)} slides of the splits take no part here: {named(unknown)}"
        raise UsageError(what, where=table.name, fix="use the cohort that was split, or cut it anew")
    return Fold(**{part: tuple(sorted({patient_of[slide_id] for slide_id in ids})) for part, ids in found.items()})


def named(names: Sequence[str]) -> str:
    """The first ten names, and how many there are."""
    return ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")
