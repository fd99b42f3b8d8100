"""Stratified folds over patients, with an inner validation part, so that no patient is on two sides of any line.

The test part of a fold is for the final number only; early stopping and every other choice use ``validation``, which is cut
out of the fold's training patients. The split depends on the seed and on the *set* of patients and their strata, never on the
order of a table.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from pathfm.errors import UsageError
from pathfm.stats.seeds import derive_seed


@dataclass(frozen=True)
class Fold:
    """Patients of one fold: three disjoint parts, each sorted, that together hold every patient once."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def stratified_group_folds(stratum_of: Mapping[str, str], folds: int, inner_fraction: float, seed: int) -> tuple[Fold, ...]:
    """Cut patients into folds so that every test, validation and training part holds every stratum.

    Args:
        stratum_of: patient -> stratum (usually the label).
        folds: number of outer folds; every patient is in exactly one test part.
        inner_fraction: share of a fold's training patients that becomes its validation part (at least one per stratum).
        seed: any integer.

    Raises:
        UsageError: a stratum has too few patients for ``folds`` folds with an inner validation part.
    """
    strata = _members(stratum_of)
    _check_counts(strata, folds)
    test_of: dict[str, int] = {}
    for stratum, patients in strata.items():
        start = len(test_of)  # continue where the last stratum ended, so that fold sizes differ by at most one
        for position, patient in enumerate(_shuffled(patients, derive_seed("folds", seed, stratum))):
            test_of[patient] = (start + position) % folds
    return tuple(_fold(number, strata, test_of, inner_fraction, seed) for number in range(folds))


def held_out_fold(stratum_of: Mapping[str, str], test: Collection[str], inner_fraction: float, seed: int) -> Fold:
    """The one fold whose test part is already decided.

    With the test part of the first of ``stratified_group_folds``, this is that fold.

    Args:
        stratum_of: patient -> stratum.
        test: patients of the test part; those without a stratum do not count.
        inner_fraction: share of the others that becomes the validation part.
        seed: any integer.

    Raises:
        UsageError: a stratum has nobody to test, or fewer than two patients to learn from and to stop by.
    """
    strata = _members(stratum_of)
    test_of = {patient: 0 if patient in test else 1 for patients in strata.values() for patient in patients}
    held = {name: sum(test_of[patient] == 0 for patient in patients) for name, patients in strata.items()}
    if len(strata) < 2 or any(not count or len(strata[name]) - count < 2 for name, count in held.items()):
        counts = ", ".join(f"{name}: {count} of {len(strata[name])}" for name, count in held.items())
        what = f"every class needs a patient to test and two others, but held out are {counts or 'none'}"
        raise UsageError(what, where="cohort, column split", fix="change the split, or leave the column out")
    return _fold(0, strata, test_of, inner_fraction, seed)


def folds_record(folds: tuple[Fold, ...], seed: int) -> dict[str, object]:
    """The folds as JSON-ready values with a SHA-256 over them, to be saved beside the results."""
    parts = [{name: list(value) for name, value in asdict(fold).items()} for fold in folds]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return {"seed": seed, "folds": parts, "hash": digest}


def _members(stratum_of: Mapping[str, str]) -> dict[str, list[str]]:
    strata: dict[str, list[str]] = {stratum: [] for stratum in sorted(set(stratum_of.values()))}
    for patient in sorted(stratum_of):
        strata[stratum_of[patient]].append(patient)
    return strata


def _check_counts(strata: Mapping[str, list[str]], folds: int) -> None:
    def enough(count: int) -> bool:
        return count >= folds and count - math.ceil(count / folds) >= 2  # one to test, one to stop by, one to learn from

    if len(strata) >= 2 and all(enough(len(patients)) for patients in strata.values()):
        return
    counts = ", ".join(f"{name}: {len(patients)}" for name, patients in strata.items())
    possible = [k for k in range(2, folds) if all(len(p) >= k and len(p) - math.ceil(len(p) / k) >= 2 for p in strata.values())]
    fix = "add patients to the small classes"
    if len(strata) < 2:
        fix = "two classes or more are needed"
    elif possible:
        fix += f", or set mil.folds to {possible[-1]}"
    raise UsageError(f"too few patients per class for {folds} folds ({counts or 'none'})", where="mil.folds", fix=fix)


def _shuffled(patients: list[str], seed: int) -> list[str]:
    return [patients[index] for index in np.random.default_rng(seed).permutation(len(patients))]


def _fold(number: int, strata: Mapping[str, list[str]], test_of: Mapping[str, int], inner_fraction: float, seed: int) -> Fold:
    train: list[str] = []
    validation: list[str] = []
    for stratum, patients in strata.items():
        inside = [patient for patient in patients if test_of[patient] != number]
        held = min(len(inside) - 1, max(1, math.floor(inner_fraction * len(inside) + 0.5)))
        order = _shuffled(inside, derive_seed("inner", seed, number, stratum))
        validation += order[:held]
        train += order[held:]
    test = [patient for patient, fold in test_of.items() if fold == number]
    return Fold(tuple(sorted(train)), tuple(sorted(validation)), tuple(sorted(test)))
