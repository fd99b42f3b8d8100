"""Splits over patients: folds with an inner validation part, so that no patient is on two sides of any line.

The test part of a fold is for the final number only; early stopping and every other choice use ``validation``, which is cut
out of the fold's training patients. A split depends on the seed and on the *set* of patients and their strata, never on the
order of a table. Patients that must stay together (``together``) are dealt as one, with the stratum that is rarest among them.

Legend: B blocks (whole sites), F folds, S strata.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from pathfm.errors import UsageError
from pathfm.stats.seeds import derive_seed

Together = Iterable[Collection[str]]
"""Sets of patients that stay on one side; sets that overlap are joined."""
Strata = Mapping[str, list[str]]
"""Stratum -> sorted patients (of patients that stay together, the first), strata in sorted order."""
UNKNOWN = ""
"""Stratum of patients of whom nothing is known: they are dealt evenly, and no part has to hold one."""
RESTARTS = 20
"""Starts of the search for balanced folds of sites."""


@dataclass(frozen=True)
class Fold:
    """Patients of one fold: three disjoint parts, each sorted, that together hold every patient once."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def stratified_group_folds(
    stratum_of: Mapping[str, str],
    folds: int,
    inner_fraction: float,
    seed: int,
    *,
    together: Together = (),
    classes: bool = True,
    setting: str = "mil.folds",
) -> tuple[Fold, ...]:
    """Cut patients into folds so that every test, validation and training part holds every stratum.

    Args:
        stratum_of: patient -> stratum (usually the label).
        folds: number of outer folds; every patient is in exactly one test part.
        inner_fraction: share of a fold's training patients that becomes its validation part (at least one per stratum).
        seed: any integer.
        together: patients that stay on one side.
        classes: strata are classes, which every part must hold; False: small strata are joined with their neighbours.
        setting: name of the setting ``folds``, for the message.

    Raises:
        UsageError: a stratum has too few patients for ``folds`` folds with an inner validation part.
    """
    dealt = Dealt.of(stratum_of, together)
    strata = dealt.strata(lambda count: enough_patients(count, folds), classes)
    _check_counts(strata, folds, classes, setting)
    test_of: dict[str, int] = {}
    for stratum, patients in strata.items():
        start = len(test_of)  # continue where the last stratum ended, so that fold sizes differ by at most one
        for position, patient in enumerate(shuffled(patients, derive_seed("folds", seed, stratum))):
            test_of[patient] = (start + position) % folds
    return tuple(dealt.opened(_fold(number, strata, test_of, inner_fraction, seed)) for number in range(folds))


def monte_carlo_folds(
    stratum_of: Mapping[str, str],
    rounds: int,
    fractions: tuple[float, float],
    seed: int,
    *,
    together: Together = (),
    classes: bool = True,
) -> tuple[Fold, ...]:
    """Test parts drawn anew in every round, each holding every stratum; those of different rounds overlap.

    Args:
        stratum_of: patient -> stratum.
        rounds: test parts.
        fractions: share of the patients in a test part, and share of the others in the validation part.
        seed: any integer.
        together: patients that stay on one side.
        classes: as in ``stratified_group_folds``.

    Raises:
        UsageError: a stratum has fewer than three patients.
    """
    dealt = Dealt.of(stratum_of, together)
    strata = dealt.strata(lambda count: count >= 3, classes)
    counted = {name: patients for name, patients in strata.items() if name != UNKNOWN}
    if len(counted) < 1 + classes or any(len(patients) < 3 for patients in counted.values()):
        what = f"too few patients per class to test, to stop by and to learn from ({_counts(strata)})"
        raise UsageError(what, where="mil.split.scheme monte-carlo", fix="add patients to the small classes")
    found = []
    for number in range(rounds):
        test_of = dict.fromkeys((patient for patients in strata.values() for patient in patients), -1)
        for stratum, patients in strata.items():
            held = share_of(len(patients), fractions[0], left=2)
            drawn = shuffled(patients, derive_seed("monte-carlo", seed, number, stratum))[:held]
            test_of.update(dict.fromkeys(drawn, number))
        found.append(dealt.opened(_fold(number, strata, test_of, fractions[1], seed)))
    return tuple(found)


def given_folds(
    stratum_of: Mapping[str, str], tests: Sequence[Collection[str]], inner_fraction: float, seed: int, together: Together = ()
) -> tuple[Fold, ...]:
    """Folds whose test parts are decided already (sites, a column); validation parts are cut as in the other schemes.

    Raises:
        UsageError: patients that must stay together are in and outside of a test part.
    """
    dealt = Dealt.of(stratum_of, together)
    strata = dealt.strata(lambda _: True, True)
    found = []
    for number, test in enumerate(tests):
        check_together([set(test), set(stratum_of) - set(test)], dealt.members.values())
        test_of = {patient: number if patient in test else -1 for patient in dealt.stratum_of}
        found.append(dealt.opened(_fold(number, strata, test_of, inner_fraction, seed)))
    return tuple(found)


def held_out_fold(
    stratum_of: Mapping[str, str],
    test: Collection[str],
    inner_fraction: float,
    seed: int,
    together: Together = (),
    *,
    classes: bool = True,
) -> Fold:
    """The one fold whose test part is already decided, with every class in every part.

    With the test part of the first of ``stratified_group_folds``, this is that fold (where no strata had to be joined).

    Args:
        stratum_of: patient -> stratum.
        test: patients of the test part; those without a stratum do not count.
        inner_fraction: share of the others that becomes the validation part.
        seed: any integer.
        together: patients that stay on one side.
        classes: as in ``stratified_group_folds``; False: of the others, strata too small to be cut join their neighbours.

    Raises:
        UsageError: a class (without classes: the cohort) has nobody to test, or fewer than two patients to learn from and to
            stop by; or patients that must stay together are on two sides.
    """
    known = {patient: stratum if classes else "patients" for patient, stratum in stratum_of.items() if stratum != UNKNOWN}
    strata = Dealt.of(known).strata(lambda _: True, True)
    held = {name: sum(patient in test for patient in patients) for name, patients in strata.items()}
    if len(strata) < 1 + classes or any(not count or len(strata[name]) - count < 2 for name, count in held.items()):
        counts = ", ".join(f"{name}: {count} of {len(strata[name])}" for name, count in held.items())
        who = "every class needs" if classes else "the split needs"
        what = f"{who} a patient to test and two others, but held out are {counts or 'none'}"
        fix = "hold others back with the column split of the cohort table, or set mil.seen_in_pretraining to mark"
        raise UsageError(what, where="patients held out before pretraining", fix=fix)
    others = Dealt.of({patient: stratum for patient, stratum in stratum_of.items() if patient not in test})
    joined = others.strata(lambda count: count >= 2, classes)
    stratum_of = {**stratum_of, **{patient: stratum for stratum, patients in joined.items() for patient in patients}}
    return given_folds(stratum_of, [test], inner_fraction, seed, together)[0]


def thinned_fold(fold: Fold, stratum_of: Mapping[str, str], share: float, seed: int) -> Fold:
    """The fold with a share of its training and validation patients, for label-fraction curves; the test part is untouched.

    A smaller share is part of a larger one, and every stratum keeps a patient in each part where it had one.
    """

    def some(name: str, patients: tuple[str, ...]) -> tuple[str, ...]:
        strata = Dealt.of({patient: stratum_of[patient] for patient in patients}).strata(lambda _: True, True)
        kept: list[str] = []
        for stratum, members in strata.items():
            kept += shuffled(members, derive_seed("share", seed, name, stratum))[: max(1, math.ceil(share * len(members)))]
        return tuple(sorted(kept))

    return Fold(some("train", fold.train), some("validation", fold.validation), fold.test)


def balanced_blocks(count_BS: NDArray[np.int64], folds: int, seed: int) -> tuple[int, ...]:
    """The fold [B] of each block of patients (a whole site), such that all folds hold like shares of every stratum.

    Minimises the squared deviations of the share of each stratum, and of all patients, that a fold holds from 1/F, as
    Howard et al. 2021 (Nature Communications 12:4423) do with a quadratic program; here by moving and swapping blocks until
    nothing helps, from several starts. No fold is empty.

    Args:
        count_BS: patients of each stratum in each block; every block holds someone.
        folds: at most as many as blocks.
        seed: any integer.
    """
    whole_BS = np.column_stack([count_BS, count_BS.sum(axis=1)]).astype(np.float64)
    share_BS = whole_BS / np.maximum(whole_BS.sum(axis=0), 1)
    best: tuple[float, tuple[int, ...]] | None = None
    for start in range(RESTARTS):
        order_B = np.random.default_rng(derive_seed("blocks", seed, start)).permutation(len(share_BS))
        fold_B = np.empty(len(share_BS), dtype=np.int64)
        fold_B[order_B] = np.arange(len(share_BS)) % folds
        cost = round(_balance(share_BS, fold_B, folds), 9)
        if best is None or cost < best[0]:
            best = cost, tuple(fold_B.tolist())
    assert best is not None
    return best[1]


def check_together(parts: Sequence[Collection[str]], together: Together) -> None:
    """Refuse parts that tear patients who must stay together.

    Raises:
        UsageError: naming them.
    """
    side = {patient: number for number, part in enumerate(parts) for patient in part}
    torn = [sorted(group) for group in together if len({side[patient] for patient in group if patient in side}) > 1]
    if torn:
        shown = "; ".join(", ".join(group[:5]) for group in torn[:5]) + ("; ..." if len(torn) > 5 else "")
        what = f"patients that must stay together (they share files, pictures or features) are on two sides: {shown}"
        raise UsageError(what, where="mil.split", fix="put them on one side, or use a scheme that cuts the cohort itself")


def linked(sets: Together) -> list[frozenset[str]]:
    """Sets joined where they overlap, in the order of their first members."""
    leader: dict[str, str] = {}

    def first(name: str) -> str:
        while leader[name] != name:
            leader[name] = name = leader[leader[name]]
        return name

    for each in sets:
        names = sorted(each)
        for name in names:
            leader.setdefault(name, name)
            low, high = sorted((first(names[0]), first(name)))
            leader[high] = low
    found: dict[str, set[str]] = {}
    for name in sorted(leader):
        found.setdefault(first(name), set()).add(name)
    return [frozenset(members) for _, members in sorted(found.items())]


def folds_record(folds: tuple[Fold, ...], seed: int) -> dict[str, object]:
    """The folds as JSON-ready values with a SHA-256 over them, to be saved beside the results."""
    parts = [{name: list(value) for name, value in asdict(fold).items()} for fold in folds]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return {"seed": seed, "folds": parts, "hash": digest}


@dataclass(frozen=True)
class Dealt:
    """What is dealt: patients, or for those that stay together the first of them, with stratum and members.

    Attributes:
        stratum_of: first patient -> the rarest stratum among its members.
        members: first patient -> all who stay together with it, sorted, itself among them.
    """

    stratum_of: Mapping[str, str]
    members: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, stratum_of: Mapping[str, str], together: Together = ()) -> Dealt:
        """What is dealt of these patients, who have strata."""
        groups = linked([patient for patient in each if patient in stratum_of] for each in together)
        group_of = {patient: tuple(sorted(group)) for group in groups for patient in group}
        whole = {patient: group_of.get(patient, (patient,)) for patient in sorted(stratum_of)}
        members = {patient: names for patient, names in whole.items() if patient == names[0]}
        size = Counter(stratum_of.values())

        def rarest(names: tuple[str, ...]) -> str:
            known = {stratum_of[name] for name in names} - {UNKNOWN}
            return min(known, key=lambda stratum: (size[stratum], stratum), default=UNKNOWN)

        return cls({leader: rarest(members[leader]) for leader in sorted(members)}, members)

    def strata(self, enough: Callable[[int], bool], classes: bool) -> Strata:
        """Who is in which stratum; strata that are no classes and too small join the smaller of their neighbours."""
        names = sorted(set(self.stratum_of.values()))
        strata: dict[str, list[str]] = {stratum: [] for stratum in names}
        for patient, stratum in self.stratum_of.items():
            strata[stratum].append(patient)
        names = [] if classes else [name for name in names if name != UNKNOWN]
        while len(names) > 1 and (small := [name for name in names if not enough(len(strata[name]))]):
            place = names.index(min(small, key=lambda name: (len(strata[name]), name)))
            beside = [near for near in (place - 1, place + 1) if 0 <= near < len(names)]
            low, high = sorted((place, min(beside, key=lambda near: (len(strata[names[near]]), near))))
            joined = sorted(strata.pop(names[low]) + strata.pop(names[high]))
            names[low : high + 1] = [f"{names[low]} + {names[high]}"]
            strata[names[low]] = joined
        return dict(sorted(strata.items()))

    def opened(self, fold: Fold) -> Fold:
        """The fold with all members in the place of the first."""
        parts = (fold.train, fold.validation, fold.test)
        return Fold(*(tuple(sorted(name for leader in part for name in self.members[leader])) for part in parts))


def enough_patients(count: int, folds: int) -> bool:
    """Whether so many patients of a stratum can be cut into folds with an inner validation part."""
    return count >= folds and count - math.ceil(count / folds) >= 2  # one to test, one to stop by, one to learn from


def _check_counts(strata: Strata, folds: int, classes: bool, setting: str) -> None:
    sizes = [len(patients) for name, patients in strata.items() if name != UNKNOWN]
    if len(sizes) >= 1 + classes and all(enough_patients(size, folds) for size in sizes):
        return
    possible = [k for k in range(2, folds) if all(enough_patients(size, k) for size in sizes)]
    fix = "add patients to the small classes" if classes else "add patients"
    if len(sizes) < 1 + classes:
        fix = "two classes or more are needed" if classes else "patients with a target are needed"
    elif possible:
        fix += f", or set {setting} to {possible[-1]}"
    per = " per class" if classes else ""
    raise UsageError(f"too few patients{per} for {folds} folds ({_counts(strata) or 'none'})", where=setting, fix=fix)


def share_of(count: int, fraction: float, left: int) -> int:
    """How many of a stratum's patients go into a part: the fraction, at least one, and ``left`` stay for the others."""
    return max(0, min(count - left, max(1, math.floor(fraction * count + 0.5))))


def _counts(strata: Strata) -> str:
    return ", ".join(f"{name or 'unknown'}: {len(patients)}" for name, patients in strata.items())


def shuffled(patients: list[str], seed: int) -> list[str]:
    """The patients in an order that depends on the seed."""
    return [patients[index] for index in np.random.default_rng(seed).permutation(len(patients))]


def _fold(number: int, strata: Strata, test_of: Mapping[str, int], inner_fraction: float, seed: int) -> Fold:
    train: list[str] = []
    validation: list[str] = []
    for stratum, patients in strata.items():
        inside = [patient for patient in patients if test_of[patient] != number]
        held = share_of(len(inside), inner_fraction, left=1)
        order = shuffled(inside, derive_seed("inner", seed, number, stratum))
        validation += order[:held]
        train += order[held:]
    test = [patient for patient, fold in test_of.items() if fold == number]
    return Fold(tuple(sorted(train)), tuple(sorted(validation)), tuple(sorted(test)))


def _balance(share_BS: NDArray[np.float64], fold_B: NDArray[np.int64], folds: int) -> float:
    """Moves and swaps blocks (``fold_B`` is changed) while that lowers the sum of squared deviations, which is returned.

    For a block x that goes from fold f to g, the sum changes by 2 x (d_g - d_f) + 2 |x|^2, where d are the deviations; a swap
    of blocks x and y moves their difference.
    """
    norm_BB = share_BS @ share_BS.T
    square_B = np.diagonal(norm_BB)
    blocks = np.arange(len(share_BS))
    while True:
        deviation_FS = np.stack([share_BS[fold_B == fold].sum(axis=0) for fold in range(folds)]) - 1 / folds
        toward_BF = share_BS @ deviation_FS.T
        own_B = toward_BF[blocks, fold_B]
        move_BF = 2 * (toward_BF - own_B[:, None] + square_B[:, None])
        move_BF[blocks, fold_B] = 0
        # (y - x) (d_f - d_g) of blocks x in f and y in g, and the square of their difference.
        to_other_BB = toward_BF[:, fold_B]
        swap_BB = 2 * (to_other_BB.T - own_B[:, None] - own_B[None, :] + to_other_BB)
        swap_BB += 2 * (square_B[:, None] + square_B[None, :] - 2 * norm_BB)
        swap_BB[fold_B[:, None] == fold_B[None, :]] = 0
        if min(move_BF.min(), swap_BB.min()) > -1e-12:
            return float((deviation_FS**2).sum())
        if move_BF.min() <= swap_BB.min():
            block, fold = np.unravel_index(move_BF.argmin(), move_BF.shape)
            fold_B[block] = fold
        else:
            one, other = np.unravel_index(swap_BB.argmin(), swap_BB.shape)
            fold_B[one], fold_B[other] = fold_B[other], fold_B[one]
