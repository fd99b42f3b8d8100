"""What the cohort table itself says of slides that count as different patients: columns and names that group them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from pathfm.mil.leaks import Leak
from pathfm.store.cohort import SlideRow

PERSON = re.compile(
    r"(patient|case|subject|person|donor|participant|individual|animal|mouse|mrn|accession)s?"
    r"([ _.-]?(submitter|study))?([ _.-]?(id|ids|no|nr|num|number|code|key|name|barcode|uuid))?"
)
"""Columns that name a person: equal values are one patient."""
ORIGIN = re.compile(r"(^|[ _.-])(slide|wsi|image|specimen|block|section|biopsy|file|source|origin|parent)([ _.-]|s?$|id)")
"""Columns that may name what a row was cut out of: equal values are one patient where they also tell the label."""
EMPTY = frozenset({"", "-", "?", "na", "n/a", "nan", "none", "null", "unknown"})
LEAST_GROUPS = 5
CHANCE = 1e-4
"""Rows of equal value have equal labels with this chance or less if the values had nothing to do with the patient."""
APART = re.compile(r"[ _.-]+")

Groups = Mapping[str, Sequence[SlideRow]]


class Groupings(NamedTuple):
    """What was found: ``leaks`` are treated like other leaks, ``notes`` are for whoever reads the numbers."""

    leaks: list[Leak]
    notes: list[str]


def find_groupings(rows: Sequence[SlideRow], patient_of: Mapping[str, str], labels: Collection[str]) -> Groupings:
    """Columns of the table, and names of slides, that group rows which count as different patients.

    Args:
        rows: of the cohort, with the labels that count for them; their order plays no role.
        patient_of: slide_id -> patient.
        labels: columns that are predicted, the main one first; they group nothing.
    """
    rows = sorted(rows, key=lambda row: row.slide_id)
    main = next(iter(labels), "")
    label_of = {row.slide_id: row.labels.get(main, "") for row in rows}
    leaks: list[Leak] = []
    notes = []
    for column in sorted({name for row in rows for name in row.labels} - set(labels)):
        groups = _grouped(rows, [row.labels.get(column, "") for row in rows])
        across = {value: found for value, found in groups.items() if len({patient_of[row.slide_id] for row in found}) > 1}
        if len(groups) < LEAST_GROUPS or not across:
            continue
        name, tells = column.strip().casefold(), _tells_label(groups, label_of)
        if PERSON.fullmatch(name) or (ORIGIN.search(name) and tells):
            leaks += [_leak(column, value, found, patient_of) for value, found in across.items()]
        elif tells:
            notes.append(_suspicion(f"values of column {column}", across))
    if sum(row.patient_id is None for row in rows):
        notes.append(
            "slides without patient_id count as patients of their own: if two are of one patient, numbers are too good"
        )
    return Groupings(leaks, notes + _names_alike(rows, patient_of, label_of))


def _grouped(rows: Sequence[SlideRow], values: Sequence[str]) -> dict[str, list[SlideRow]]:
    groups: dict[str, list[SlideRow]] = {}
    for value, row in zip(values, rows, strict=True):
        if value.strip().casefold() not in EMPTY:
            groups.setdefault(value.strip(), []).append(row)
    return dict(sorted(groups.items()))


def _leak(column: str, value: str, rows: Sequence[SlideRow], patient_of: Mapping[str, str]) -> Leak:
    patients = tuple(sorted({patient_of[row.slide_id] for row in rows}))
    return Leak(f"same {column}", tuple(row.slide_id for row in rows), patients, value)


def _tells_label(groups: Groups, label_of: Mapping[str, str]) -> bool:
    """Whether rows of a group always have one label, by more than chance, and groups are finer than the labels."""
    counts = [Counter(label for row in rows if (label := label_of[row.slide_id])) for rows in groups.values()]
    whole: Counter[str] = sum(counts, Counter())
    if any(len(count) > 1 for count in counts) or len(groups) < max(LEAST_GROUPS, min(2 * len(whole), 20)):
        return False
    shares = [count / whole.total() for count in whole.values()]
    chance = sum(math.log(sum(share ** count.total() for share in shares)) for count in counts if count)
    return chance < math.log(CHANCE)


def _names_alike(rows: Sequence[SlideRow], patient_of: Mapping[str, str], label_of: Mapping[str, str]) -> list[str]:
    """A note where slides, each of its own patient, have names that start alike and then also the same label."""
    if len({patient_of[row.slide_id] for row in rows}) < len(rows):
        return []
    pieces = [APART.split(row.slide_id) for row in rows]
    for depth in range(1, max(map(len, pieces), default=1)):
        groups = _grouped(rows, ["-".join(name[: min(depth, len(name) - 1)]) for name in pieces])
        if _tells_label(groups, label_of):
            return [
                _suspicion("starts of the slides' names", {name: found for name, found in groups.items() if len(found) > 1})
            ]
    return []


def _suspicion(what: str, groups: Groups) -> str:
    value, rows = max(groups.items(), key=lambda item: len(item[1]))
    return (
        f"{what} group slides of different patients ({len(groups)} groups, as {value} with {len(rows)}), and every "
        "group has one label: if they are one patient each, the numbers are too good; give patient_id"
    )
