"""New slides against those of the training: what is unusual about a slide. Shown beside decisions, never part of them.

The reference is made at training, holds aggregates only, and is ``drift.json`` of the bundle. See ``docs/drift.md``.

Legend: S training slides, P patients, M watched numbers, D features.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathfm.errors import StoreError
from pathfm.mil.bundle import DRIFT, Bundle
from pathfm.mil.drift_facts import BY_NAME, WATCHED, SlideFacts, Watched, mean_of, measure
from pathfm.stats.drift import (
    Bins,
    FeatureSpread,
    Limit,
    Spread,
    features_from_record,
    fit_bins,
    fit_features,
    fit_limit,
    fit_spread,
)
from pathfm.store.tile_store import TileStore

Floats = NDArray[np.float64]
FORMAT = 1
FEW = 5
"""Fewer patients are too few to compare with, and a count of fewer slides is not told: nobody must be recognised."""
FALSE_ALARMS = 0.05
"""Wanted share of slides like those of the training that have any flag."""
FOLDS = 20
"""Parts of the patients; each is measured against the others, as a new slide would be."""
SAME_MPP, FAR_MPP = 0.02, 0.1
"""Relative differences of micrometres per pixel: below the first, scales are one; above the second, from all known, a flag."""
NOT_STATED = "not stated"
UNLIMITED = Limit(0.0, 1.0)


@dataclass(frozen=True)
class Flag:
    """What a person should look at; it changes no decision.

    Attributes:
        name: ``scanner``, ``mpp``, a name of ``WATCHED``, or a rate of a cohort.
        value: what was found.
        training: what the training has: a range, or the known ones.
        sentence: all of it in words.
    """

    name: str
    value: str
    training: str
    sentence: str

    def record(self) -> dict[str, str]:
        """JSON values."""
        return dict(vars(self))


class Known(NamedTuple):
    """One watched number over the training: spread (for single slides) and distribution (for cohorts)."""

    spread: Spread
    bins: Bins


@dataclass(frozen=True)
class DriftReference:
    """What the training's slides were like: aggregates over at least ``FEW`` patients, without any name.

    Attributes:
        slides: S, 0 where there were too few patients.
        patients: P.
        numbers: by name; those that fewer than ``FEW`` patients have are absent.
        limit: of scores, the same for all numbers, and how many slides like the training's are flagged by chance.
        scanners: slides by scanner; None: fewer than ``FEW``.
        mpps: the same by micrometres per pixel; 0: not stated.
        features: None: not known.
        decisions: patients (or bags) by out-of-fold decision of the main task.
        positive: the class whose rate is watched, empty where there is none.
    """

    slides: int = 0
    patients: int = 0
    numbers: Mapping[str, Known] = field(default_factory=dict)
    limit: Limit = UNLIMITED
    scanners: Mapping[str, int | None] = field(default_factory=dict)
    mpps: Mapping[float, int | None] = field(default_factory=dict)
    features: FeatureSpread | None = None
    decisions: Mapping[str, int] = field(default_factory=dict)
    positive: str = ""

    @property
    def knows_enough(self) -> bool:
        """Whether there were enough patients to compare with."""
        return self.slides > 0

    def flags(self, facts: SlideFacts) -> tuple[Flag, ...]:
        """What is unusual about a slide; empty where the training was too small to tell."""
        if not self.knows_enough:
            return ()
        odd = [_flag(BY_NAME[name], self, facts) for name, score in self.scores(facts).items() if score > self.limit.value]
        return (*_unknown_scanner(self, facts), *_unknown_mpp(self, facts), *odd)

    def scores(self, facts: SlideFacts) -> dict[str, float]:
        """How far each known number lies to a side that matters, in units of the training; the limit is ``limit.value``."""
        found = {}
        for name, known in self.numbers.items():
            watched = BY_NAME[name]
            score = float(known.spread.score(watched.scaled(facts.numbers.get(name))))
            if score == score:
                found[name] = _to_side(watched, score)
        return found

    def range_of(self, name: str) -> tuple[float | None, float | None]:
        """Below and above which a number is flagged, in its own unit; None on a side that is no news."""
        watched, spread = BY_NAME[name], self.numbers[name].spread
        low, high = (watched.unscaled(spread.at(score)) for score in (-self.limit.value, self.limit.value))
        return (low if watched.low else None), (high if watched.high else None)

    def record(self) -> dict[str, Any]:
        """JSON values; ``reference_from_record`` gives the same back. Labels and ranges are for those who only show it."""
        numbers = {
            name: {
                "label": BY_NAME[name].label,
                "form": BY_NAME[name].form,
                "range": list(self.range_of(name)),
                "middle": BY_NAME[name].unscaled(known.spread.centre),
                "spread": vars(known.spread),
                "bins": known.bins.record(),
            }
            for name, known in self.numbers.items()
        }
        return {
            "format": FORMAT,
            "slides": self.slides,
            "patients": self.patients,
            "too_few": not self.knows_enough,
            "numbers": numbers,
            "limit": self.limit._asdict(),
            "scanners": dict(self.scanners),
            "mpps": [[mpp, count] for mpp, count in sorted(self.mpps.items())],
            "features": self.features.record() if self.features else None,
            "decisions": dict(self.decisions),
            "positive": self.positive,
        }


def reference_from_record(record: Mapping[str, Any]) -> DriftReference:
    """What ``DriftReference.record`` recorded. Numbers that this version does not watch are left out.

    Raises:
        KeyError, TypeError: not such a record.
    """
    numbers = {
        name: Known(Spread(**known["spread"]), Bins(tuple(known["bins"]["edges"]), tuple(known["bins"]["counts"])))
        for name, known in record["numbers"].items()
        if name in BY_NAME
    }
    return DriftReference(
        record["slides"],
        record["patients"],
        numbers,
        Limit(**record["limit"]),
        record["scanners"],
        dict(record["mpps"]),
        features_from_record(record["features"]) if record["features"] else None,
        record["decisions"],
        record["positive"],
    )


def drift_reference(bundle: Bundle) -> DriftReference | None:
    """The reference of a bundle; None where it was made before there were any.

    Raises:
        BundleError: ``drift.json`` has changed since the bundle was opened.
        StoreError: it is of a newer version.
    """
    if DRIFT not in bundle.facts["files"]:
        return None
    record = json.loads(bundle.read(DRIFT))
    if record.get("format") != FORMAT:
        fix = f"use pathfm {bundle.facts.get('code')} or newer"
        raise StoreError(f"{DRIFT} is of version {record.get('format')}", where=str(bundle.folder), fix=fix)
    return reference_from_record(record)


def slide_facts(store: TileStore, features_ND: ArrayLike, reference: DriftReference | None = None) -> SlideFacts:
    """What is known of a slide; plain numbers, about 10 ms.

    Args:
        store: its tiles, with or without pixels.
        features_ND: of its tiles, or their mean as [1, D].
        reference: of the bundle, by which the distance of the features is measured; without it that stays unknown.

    Raises:
        StoreError: an array of the store is damaged.
        ValueError: another number of features than the training had.
    """
    facts = measure(store)
    if reference is None or reference.features is None or not len(np.atleast_2d(features_ND)):
        return facts
    distance = float(reference.features.distance(mean_of(features_ND))[0])
    return replace(facts, numbers={**facts.numbers, "features": float(f"{distance:.6g}")})


def flag_texts(flags: Iterable[Flag | Mapping[str, str]]) -> list[str]:
    """One sentence per flag, for tables and terminals; flags or their records."""
    return [flag.sentence if isinstance(flag, Flag) else flag["sentence"] for flag in flags]


def fit_reference(
    facts_S: Sequence[SlideFacts],
    mean_SD: ArrayLike | None,
    patient_S: Sequence[str],
    decisions: Mapping[str, int],
    positive: str = "",
) -> DriftReference:
    """The reference of a training; an empty one where there are fewer than ``FEW`` patients.

    Args:
        facts_S: of all training slides.
        mean_SD: mean features of these slides.
        patient_S: whose they are.
        decisions: out-of-fold decisions of the main task, counted.
        positive: its positive class.
    """
    names = sorted(set(patient_S))
    if len(names) < FEW:
        return DriftReference(decisions=decisions, positive=positive)
    owner_S = np.array([names.index(patient) for patient in patient_S])
    fold_S = owner_S % min(len(names), FOLDS)
    mean = None if mean_SD is None else np.asarray(mean_SD, dtype=np.float64)
    value_SM = np.array([[watched.scaled(facts.numbers.get(watched.name)) for watched in WATCHED] for facts in facts_S])
    if mean is not None:
        value_SM[:, [watched.name for watched in WATCHED].index("features")] = _distances(mean, fold_S)
    chosen = [m for m in range(len(WATCHED)) if len(set(owner_S[np.isfinite(value_SM[:, m])])) >= FEW]
    score_S = _left_out_scores(facts_S, value_SM, chosen, fold_S)
    score_P = [float(score_S[owner_S == owner].max()) for owner in range(len(names))]
    finite = {m: value_SM[:, m][np.isfinite(value_SM[:, m])] for m in chosen}
    return DriftReference(
        len(facts_S),
        len(names),
        {WATCHED[m].name: Known(fit_spread(value, WATCHED[m].least), fit_bins(value)) for m, value in finite.items()},
        fit_limit(score_P, FALSE_ALARMS),
        _counted([facts.scanner or NOT_STATED for facts in facts_S]),
        _scales([facts.mpp or 0.0 for facts in facts_S]),
        None if mean is None else fit_features(mean),
        decisions,
        positive,
    )


def _distances(mean_SD: Floats, fold_S: NDArray[np.intp]) -> Floats:
    """Distance [S] of each slide's features to those of the other folds."""
    distance_S = np.empty(len(mean_SD))
    for fold in np.unique(fold_S):
        distance_S[fold_S == fold] = fit_features(mean_SD[fold_S != fold]).distance(mean_SD[fold_S == fold])
    return distance_S


def _left_out_scores(
    facts_S: Sequence[SlideFacts], value_SM: Floats, chosen: Sequence[int], fold_S: NDArray[np.intp]
) -> Floats:
    """The largest score [S] of each slide against the slides of the other folds; infinite where its scanner or mpp is new."""
    score_S = np.zeros(len(facts_S))
    for fold in np.unique(fold_S):
        own, rest = np.flatnonzero(fold_S == fold), np.flatnonzero(fold_S != fold)
        for m in chosen:
            known = value_SM[rest, m][np.isfinite(value_SM[rest, m])]
            if len(known):
                score = fit_spread(known, WATCHED[m].least).score(value_SM[own, m])
                score_S[own] = np.fmax(score_S[own], [_to_side(WATCHED[m], each) for each in score.tolist()])
        others = [facts_S[place] for place in rest.tolist()]
        partial = DriftReference(
            scanners=_counted([facts.scanner or NOT_STATED for facts in others]),
            mpps=_scales([facts.mpp or 0.0 for facts in others]),
        )
        for place in own.tolist():
            if _unknown_scanner(partial, facts_S[place]) or _unknown_mpp(partial, facts_S[place]):
                score_S[place] = np.inf
    return score_S


def _to_side(watched: Watched, score: float) -> float:
    """A score as a distance to a side that matters; 0 on the other."""
    return max(score if watched.high else 0.0, -score if watched.low else 0.0) if score == score else score


def _counted(names: Sequence[str]) -> dict[str, int | None]:
    return {name: count if count >= FEW else None for name, count in sorted(Counter(names).items())}


def _scales(mpp_S: Sequence[float]) -> dict[float, int | None]:
    """Slides by mpp; neighbours that differ by rounding are one."""
    groups = list[list[float]]()
    for mpp in sorted(mpp_S):
        if groups and mpp <= groups[-1][0] * (1 + SAME_MPP):
            groups[-1].append(mpp)
        else:
            groups.append([mpp])
    return {float(f"{np.mean(group):.3g}"): len(group) if len(group) >= FEW else None for group in groups}


def _flag(watched: Watched, reference: DriftReference, facts: SlideFacts) -> Flag:
    value = facts.numbers[watched.name]
    assert value is not None  # only known numbers have a score
    low, high = reference.range_of(watched.name)
    is_low = watched.scaled(value) < reference.numbers[watched.name].spread.centre
    shown, training = watched.words(value), range_text(watched, low, high)
    words = watched.low if is_low else watched.high
    return Flag(watched.name, shown, training, f"{words}: {watched.label} {shown}, training {training}")


def range_text(watched: Watched, low: float | None, high: float | None) -> str:
    """A range in words."""
    ends = ["" if end is None else watched.words(end) for end in (low, high)]
    if not all(ends):
        return f"at most {ends[1]}" if low is None else f"at least {ends[0]}"
    return " to ".join(ends)


def _unknown_scanner(reference: DriftReference, facts: SlideFacts) -> list[Flag]:
    found, known = facts.scanner or NOT_STATED, ", ".join(reference.scanners)
    if found in reference.scanners:
        return []
    return [Flag("scanner", found, known, f"unknown scanner: {found}, training has {known}")]


def _unknown_mpp(reference: DriftReference, facts: SlideFacts) -> list[Flag]:
    found = facts.mpp or 0.0
    if any(found == mpp or (mpp and abs(found / mpp - 1) <= FAR_MPP) for mpp in reference.mpps):
        return []
    shown, *others = (f"{mpp:.3g}" if mpp else NOT_STATED for mpp in (found, *sorted(reference.mpps)))
    known = ", ".join(others)
    return [Flag("mpp", shown, known, f"slide of another scale: {shown} um per px, training has {known}")]
