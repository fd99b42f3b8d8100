"""Splits of a cohort that has grown, scheme by scheme: patients of an earlier run keep their places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pathfm.mil.saved_splits import PARTS, Splits
from pathfm.stats.folds import Fold
from pathfm.stats.grown_folds import Growth, grown_draws, grown_folds, grown_tests

DEPENDS_ON = {
    "folds": ("folds", "inner_fraction", "repeats", "label"),
    "monte-carlo": ("rounds", "test_fraction", "inner_fraction", "label"),
    "column": ("inner_fraction", "label"),
    "site": ("inner_fraction", "label"),
    "site-preserved": ("folds", "inner_fraction", "label"),
    "held out before pretraining": ("inner_fraction", "label"),
}
"""Settings that must be the same for places to be kept, by scheme; one that is not here (a file) says all places itself."""


class Recut(NamedTuple):
    """How a scheme cuts the present cohort: its folds and their names, and the parameters of its draws."""

    folds: tuple[Fold, ...]
    names: tuple[str, ...]
    inner_fraction: float
    test_fraction: float = 0.0


def changed_settings(before: Splits, now: Splits) -> tuple[str, ...]:
    """What keeps patients from keeping their places: names of settings that differ from those of the earlier splits."""
    if before.scheme != now.scheme:
        return ("scheme",)
    if now.scheme not in DEPENDS_ON:
        return ("file",)
    of = {**dict(before.settings), "seed": before.seed}, {**dict(now.settings), "seed": now.seed}
    return tuple(name for name in ("seed", *DEPENDS_ON[now.scheme]) if of[0].get(name) != of[1].get(name))


def grown_cut(
    scheme: str, before: Splits, cut: Recut, growth: Growth, blocks: Sequence[frozenset[str]] = ()
) -> tuple[Fold, ...]:
    """The folds: who was there before keeps the test part (unless the cohort table names it) and the side within the others.

    Args:
        scheme: of ``mil.split``.
        before: of an earlier run with the same settings.
        cut: of the present cohort.
        growth: the present cohort.
        blocks: whole sites, where folds are made of them.

    Raises:
        UsageError: patients that must stay together were on different sides before.
    """
    former = dict(zip(before.names, before.folds, strict=True))
    old = [former.get(name) for name in cut.names]
    kept = [fold for fold in old if fold is not None]
    tests: Sequence[frozenset[str]] = [frozenset(fold.test) for fold in cut.folds]
    if scheme in {"folds", "site-preserved"}:
        joint = Growth(growth.stratum_of, [*growth.together, *blocks], growth.seed, growth.folds, growth.classes)
        each = growth.folds
        rounds = range(0, len(kept), each)
        tests = [test for at in rounds for test in grown_tests(joint, kept[at : at + each], cut.names[at : at + each])]
    elif scheme == "monte-carlo":
        tests = grown_draws(growth, kept, cut.test_fraction, cut.names)
    return grown_folds(growth, old, tests, cut.inner_fraction, cut.names)


def origin_of(before: Splits, folds: tuple[Fold, ...], patients: Sequence[str]) -> str:
    """Where the folds come from, in words; as it was when nothing has changed, so that the same is recorded."""
    if folds == before.folds:
        return before.origin
    old = {patient for fold in before.folds for part in PARTS for patient in getattr(fold, part)}
    now = set(patients)
    counts = f"{len(old & now)} patients keep their places, {len(now - old)} are new, {len(old - now)} are gone"
    return f"extended from the splits {before.hash[:12]}: {counts}"
