"""Hyper-parameters chosen inside each outer fold (nested cross-validation); no outer test part is an argument of anything here.

Whoever chooses by the fold that is reported reports luck; so each outer fold chooses for itself, among all combinations of
``mil.search``, by inner folds of the patients that it learns from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from pathfm.errors import UsageError
from pathfm.mil_settings import MilSettings
from pathfm.stats.folds import Fold, stratified_group_folds
from pathfm.stats.seeds import derive_seed

Patients = tuple[str, ...]
Score = Callable[[MilSettings, Patients, Patients, Patients], float]
"""(settings, inner train, inner validation, inner test) -> score, higher is better; nan where there is none (a test part of one
class, a loss that diverged)."""


@dataclass(frozen=True)
class Candidate:
    """One combination of searched settings.

    Attributes:
        values: setting -> value.
        scores: of the inner folds; None where there is none.
        mean: over the inner folds in which any candidate has a score; None when this one lacks one of them.
    """

    values: Mapping[str, Any]
    scores: tuple[float | None, ...]
    mean: float | None


@dataclass(frozen=True)
class Choice:
    """What an outer fold has chosen.

    Attributes:
        fold: its number.
        settings: complete settings with the chosen values; nothing is left to search.
        candidates: all of them, in the order in which they were tried.
        chosen: the place of the chosen one.
    """

    fold: int
    settings: MilSettings
    candidates: tuple[Candidate, ...]
    chosen: int

    def record(self) -> dict[str, Any]:
        """JSON-ready."""
        rows = [{"values": dict(each.values), "scores": list(each.scores), "mean": each.mean} for each in self.candidates]
        return {"fold": self.fold, "chosen": dict(self.candidates[self.chosen].values), "candidates": rows}


def candidate_settings(settings: MilSettings) -> tuple[tuple[dict[str, Any], MilSettings], ...]:
    """Every combination of ``settings.search`` with the complete settings that it makes, the first values first.

    Raises:
        UsageError: a value that the setting cannot have.
    """
    names = sorted(settings.search)  # the order of a study file's keys plays no role
    plain = {**settings.model_dump(), "search": {}}
    found = []
    for values in itertools.product(*(settings.search[name] for name in names)):
        chosen = dict(zip(names, values, strict=True))
        try:
            found.append((chosen, MilSettings.model_validate({**plain, **chosen})))
        except ValidationError as error:
            problem = error.errors()[0]
            name = ".".join(map(str, problem["loc"]))
            what = f"{problem['msg']}, not {problem['input']!r}"
            raise UsageError(what, where=f"mil.search.{name}", fix="search values that the setting can have") from error
    return tuple(found)


def inner_folds(
    stratum_of: Mapping[str, str],
    fold: int,
    settings: MilSettings,
    *,
    together: Iterable[frozenset[str]] = (),
    classes: bool = True,
) -> tuple[Fold, ...]:
    """The inner folds of an outer fold.

    Args:
        stratum_of: stratum of the patients whom the outer fold learns from (training and validation part), and of nobody else.
        fold: number of the outer fold.
        settings: search_folds, inner_fraction and seed.
        together: sets of patients that stay on one side.
        classes: strata are classes.

    Raises:
        UsageError: a stratum has too few patients.
    """
    seed = derive_seed("search", settings.seed, fold)
    return stratified_group_folds(
        stratum_of,
        settings.search_folds,
        settings.inner_fraction,
        seed,
        together=together,
        classes=classes,
        setting="mil.search_folds",
    )


def choose(settings: MilSettings, fold: int, folds: Sequence[Fold], score: Score) -> Choice:
    """The candidate with the best mean score over the inner folds; of equal ones the first.

    Every candidate is asked for every inner fold, in a fixed order: a ``score`` that remembers its answers makes a search that
    was interrupted go on where it was.

    Args:
        settings: with ``search``.
        fold: number of the outer fold.
        folds: its inner folds.
        score: trains on the first two parts and judges the third.

    Raises:
        UsageError: a value that a setting cannot have, or no candidate with a score.
    """
    tried = candidate_settings(settings)
    table = [[_finite(score(each, part.train, part.validation, part.test)) for part in folds] for _, each in tried]
    usable = [place for place in range(len(folds)) if any(scores[place] is not None for scores in table)]
    means = [_mean([scores[place] for place in usable]) for scores in table]
    ranked = [(round(mean, 12), -place) for place, mean in enumerate(means) if mean is not None]
    if not ranked:
        fix = "search fewer or other values, or set mil.search_folds lower"
        raise UsageError(f"no candidate of the search has a score in outer fold {fold}", where="mil.search", fix=fix)
    chosen = -max(ranked)[1]
    candidates = tuple(
        Candidate(values, tuple(scores), mean) for (values, _), scores, mean in zip(tried, table, means, strict=True)
    )
    return Choice(fold, tried[chosen][1], candidates, chosen)


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [value for value in scores if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(scores) else None


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
