"""Who is tested by networks that learned from whom: every scheme of ``mil.split``, and splits saved by an earlier run.

Whatever the scheme, no patient is on two sides of a fold, patients that must stay together (``together``) are on one side, and
networks learn from every class. What a reader of the numbers has to know of a scheme is in its notes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from pathfm.config import bullet_list, did_you_mean
from pathfm.errors import UsageError
from pathfm.mil.grown_splits import Recut, changed_settings, grown_cut, origin_of
from pathfm.mil.roster import label_columns
from pathfm.mil.saved_splits import PARTS, SIDES, Splits, named, read_splits
from pathfm.mil_settings import MilSettings
from pathfm.stats.folds import (
    UNKNOWN,
    Fold,
    balanced_blocks,
    check_together,
    given_folds,
    linked,
    monte_carlo_folds,
    stratified_group_folds,
)
from pathfm.stats.grown_folds import Growth
from pathfm.stats.seeds import derive_seed
from pathfm.store.cohort import SlideRow

__all__ = ["PatientFacts", "Splits", "held_out_splits", "make_splits", "patient_facts", "read_splits"]

CLASS_KINDS = frozenset({"binary", "multiclass", "ordinal"})
"""Tasks whose strata are classes, all of which every part should hold."""


@dataclass(frozen=True)
class PatientFacts:
    """What the cohort table says of a patient besides labels; of several slides all distinct values, sorted.

    Attributes:
        site: where the slides come from; without empty values.
        split: values of the column ``split``, empty text where a slide has none.
        slides: slide_ids.
    """

    site: tuple[str, ...] = ()
    split: tuple[str, ...] = ()
    slides: tuple[str, ...] = ()


class _Case(NamedTuple):
    """What a scheme works on."""

    stratum_of: Mapping[str, str]
    facts: Mapping[str, PatientFacts]
    together: tuple[frozenset[str], ...]
    settings: MilSettings
    classes: bool


class _Cut(NamedTuple):
    """What a scheme makes."""

    folds: tuple[Fold, ...]
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def patient_facts(rows: Iterable[SlideRow], patient_of: Mapping[str, str]) -> dict[str, PatientFacts]:
    """Patient -> facts, from the rows of the cohort; their order plays no role."""
    of: dict[str, list[SlideRow]] = {}
    for row in sorted(rows, key=lambda row: row.slide_id):
        of.setdefault(patient_of[row.slide_id], []).append(row)
    return {
        patient: PatientFacts(
            site=tuple(sorted({row.site for row in found if row.site})),
            split=tuple(sorted({row.split or "" for row in found})),
            slides=tuple(row.slide_id for row in found),
        )
        for patient, found in sorted(of.items())
    }


def make_splits(
    stratum_of: Mapping[str, str],
    facts: Mapping[str, PatientFacts],
    together: Iterable[frozenset[str]],
    settings: MilSettings,
    kind: str | None = None,
    before: Splits | None = None,
) -> Splits:
    """The folds of a cohort by ``settings.split``.

    Args:
        stratum_of: patient -> stratum of everyone who takes part (``Task.stratum``; empty text: unknown).
        facts: patient -> facts; patients beyond ``stratum_of`` do not count.
        together: sets of patients that stay on one side.
        settings: scheme, folds, inner fraction and seed.
        kind: of the main task, when ``settings.kind`` is auto; strata of regression, survival and multilabel tasks are joined
            where they are small.
        before: of an earlier run: where the same settings made them, their patients keep their places, and others are dealt.

    Raises:
        UsageError: too few patients of a class or sites, a column or file that puts a patient on two sides, tears patients who
            must stay together or does not fit the cohort, or a fold without all classes to learn from.
    """
    wanted = kind or settings.kind
    by_class = not (settings.time or settings.columns) if wanted == "auto" else wanted in CLASS_KINDS
    known = {patient: facts.get(patient, PatientFacts()) for patient in sorted(stratum_of)}
    case = _Case(stratum_of, known, tuple(together), settings, by_class)
    cut = SCHEMES[settings.split.scheme](case)
    fresh = Splits(cut.folds, settings.split.scheme, _about(case), settings.seed, cut.names)
    splits = _kept(case, fresh, before) if before else fresh
    for fold in splits.folds:
        check_together([fold.train, fold.validation, fold.test], case.together)
    cut = cut._replace(folds=splits.folds)
    origin = (splits.origin,) if splits.origin else ()
    notes = (*origin, *cut.notes, *_together_notes(case), *_check_strata(case, cut), *_coverage(case, cut.folds))
    return replace(splits, notes=notes)


def held_out_splits(
    fold: Fold,
    stratum_of: Mapping[str, str],
    settings: MilSettings,
    notes: tuple[str, ...],
    before: Splits | None,
    *,
    classes: bool = True,
) -> Splits:
    """The one fold of a study whose test part was decided before pretraining; learners of an earlier run keep their sides.

    Args:
        fold: as it is cut without an earlier run.
        stratum_of: patient -> stratum of everyone in it.
        settings: inner fraction and seed.
        notes: what a reader has to know.
        before: of an earlier run.
        classes: strata are classes; others are joined where they are small.
    """
    case = _Case(stratum_of, {}, (), settings, classes)
    about = {"inner_fraction": settings.inner_fraction, "label": list(label_columns(settings))}
    fresh = Splits((fold,), "held out before pretraining", about, settings.seed, ("held out",))
    splits = _kept(case, fresh, before) if before else fresh
    return replace(splits, notes=(*((splits.origin,) if splits.origin else ()), *notes))


def _about(case: _Case) -> dict[str, object]:
    """What folds depend on besides the patients, the scheme and the seed, and what they were cut with."""
    settings = case.settings
    about: dict[str, object] = {
        "folds": settings.folds,
        "inner_fraction": settings.inner_fraction,
        "together": len(case.together),
    }
    about |= {"label": list(label_columns(settings))}
    return about | settings.split.model_dump(mode="json", exclude={"scheme", "file", "keep"})


def _kept(case: _Case, fresh: Splits, before: Splits) -> Splits:
    """The splits with everyone of an earlier run where they were; ``fresh`` where other settings made those."""
    if changed_settings(before, fresh):
        return fresh
    settings, patients = case.settings, sorted(case.stratum_of)
    blocks = [frozenset(members) for members in _sites(case)[0].values()] if fresh.scheme == "site-preserved" else []
    growth = Growth(case.stratum_of, case.together, settings.seed, settings.folds, case.classes)
    cut = Recut(fresh.folds, fresh.names, settings.inner_fraction, settings.split.test_fraction)
    folds = grown_cut(fresh.scheme, before, cut, growth, blocks)
    return replace(fresh, folds=folds, origin=origin_of(before, folds, patients))


def _folds(case: _Case) -> _Cut:
    settings, repeats = case.settings, case.settings.split.repeats
    found: list[Fold] = []
    names: list[str] = []
    for repeat in range(repeats):
        seed = derive_seed("repeat", settings.seed, repeat) if repeat else settings.seed
        found += stratified_group_folds(
            case.stratum_of, settings.folds, settings.inner_fraction, seed, together=case.together, classes=case.classes
        )
        names += [f"{f'repeat {repeat} ' if repeats > 1 else ''}fold {number}" for number in range(settings.folds)]
    many = f"every patient is tested {repeats} times, by networks of as many cuts: these answers are not independent"
    return _Cut(tuple(found), tuple(names), (many,) if repeats > 1 else ())


def _monte_carlo(case: _Case) -> _Cut:
    settings, split = case.settings, case.settings.split
    fractions = (split.test_fraction, settings.inner_fraction)
    found = monte_carlo_folds(
        case.stratum_of, split.rounds, fractions, settings.seed, together=case.together, classes=case.classes
    )
    note = "test parts of Monte Carlo rounds overlap: rounds are not independent of each other"
    return _Cut(found, tuple(f"round {number}" for number in range(split.rounds)), (note,))


def _column(case: _Case) -> _Cut:
    where = "cohort, column split"
    torn = [patient for patient, facts in case.facts.items() if len(facts.split) > 1]
    if torn:
        problems = [f"patient {patient}: {', '.join(map(repr, case.facts[patient].split))}" for patient in torn]
        what = f"{len(torn)} patients are on two sides of the split: {bullet_list(problems, 20)}"
        raise UsageError(what, where=where, fix="give all slides of a patient the same value")
    value_of = {patient: "".join(facts.split).strip().casefold() for patient, facts in case.facts.items()}
    empty = [patient for patient, value in value_of.items() if not value]
    if empty:
        raise UsageError(f"{len(empty)} patients have no split: {named(empty)}", where=where, fix="fill the column")
    values = sorted(set(value_of.values()))
    numbers = [value for value in values if value.isdecimal()]
    if numbers:
        return _numbered(case, value_of)
    for value in values:
        if value not in SIDES:
            fix = "train, validation (or val) and test, or fold numbers from 0 on"
            raise UsageError(f"{value!r} is no side of a split{did_you_mean(value, SIDES)}", where=where, fix=fix)
    parts = {part: tuple(patient for patient, value in value_of.items() if SIDES[value] == part) for part in PARTS}
    if not parts["test"] or not parts["train"]:
        lacking = "test" if not parts["test"] else "train"
        raise UsageError(f"no patient who takes part has the split {lacking!r}", where=where, fix="fill the column")
    if parts["validation"]:
        return _Cut((Fold(**parts),), ("column split",))
    found = given_folds(case.stratum_of, [parts["test"]], case.settings.inner_fraction, case.settings.seed, case.together)
    return _Cut(found, ("column split",), ("the column split has no validation part: one was cut out of train",))


def _numbered(case: _Case, value_of: Mapping[str, str]) -> _Cut:
    """The folds of a column of fold numbers."""
    where, fix = "cohort, column split", "every patient needs a fold number, from 0 on, at least two of them"
    values = set(value_of.values())
    words = sorted(value for value in values if not value.isdecimal())
    if words:
        raise UsageError(f"fold numbers are mixed with {', '.join(map(repr, words[:5]))}", where=where, fix=fix)
    numbers = sorted(map(int, values))
    if len(numbers) < 2 or numbers != list(range(len(numbers))):
        raise UsageError(f"fold numbers are {', '.join(map(str, numbers[:20]))}", where=where, fix=fix)
    tests = {f"fold {number}": [name for name, value in value_of.items() if int(value) == number] for number in numbers}
    return _tested(case, tests)


def _site(case: _Case) -> _Cut:
    blocks, notes = _sites(case)
    if len(blocks) < 2:
        raise UsageError("all patients are of one site", where="cohort, column site", fix="use mil.split.scheme=folds")
    return _tested(case, {f"site {name}": patients for name, patients in blocks.items()}, notes)


def _site_preserved(case: _Case) -> _Cut:
    blocks, notes = _sites(case)
    folds = case.settings.folds
    if len(blocks) < folds:
        fix = f"set mil.folds to {len(blocks)}" if len(blocks) > 1 else "use mil.split.scheme=folds"
        raise UsageError(f"{len(blocks)} sites cannot make {folds} folds of whole sites", where="mil.folds", fix=fix)
    strata = sorted(set(case.stratum_of.values()))
    counts = [Counter(case.stratum_of[patient] for patient in patients) for patients in blocks.values()]
    count_BS = np.array([[count[stratum] for stratum in strata] for count in counts])
    fold_B = balanced_blocks(count_BS, folds, case.settings.seed)
    tests: dict[str, list[str]] = {f"fold {number}": [] for number in range(folds)}
    for fold, patients in zip(fold_B, blocks.values(), strict=True):
        tests[f"fold {fold}"] += patients
    return _tested(case, tests, notes)


def _sites(case: _Case) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Blocks of patients that may not be torn, by the names of their sites: sites that share a patient, or patients that stay
    together, are one block."""
    lacking = [patient for patient, facts in case.facts.items() if not facts.site]
    if lacking:
        what = f"{len(lacking)} patients have no site: {named(lacking)}"
        raise UsageError(what, where="cohort, column site", fix="fill the column")
    site_of = {patient: facts.site for patient, facts in case.facts.items()}
    joint = [[site for patient in group for site in site_of.get(patient, ())] for group in case.together]
    block_of = {site: block for block in linked([*site_of.values(), *joint]) for site in block}
    blocks: dict[str, list[str]] = {}
    for patient, sites in site_of.items():
        blocks.setdefault(" + ".join(sorted(block_of[sites[0]])), []).append(patient)
    joined = sorted({" + ".join(sorted(block)) for block in block_of.values() if len(block) > 1})
    note = f"sites that share patients, or files of different patients, are kept together: {'; '.join(joined)}"
    return dict(sorted(blocks.items())), (note,) if joined else ()


def _tested(case: _Case, tests: Mapping[str, Sequence[str]], notes: tuple[str, ...] = ()) -> _Cut:
    settings = case.settings
    found = given_folds(case.stratum_of, list(tests.values()), settings.inner_fraction, settings.seed, case.together)
    return _Cut(found, tuple(tests), notes)


def _file(case: _Case) -> _Cut:
    path = case.settings.split.file
    assert path is not None  # by the settings' own check
    saved = read_splits(path, {slide_id: patient for patient, facts in case.facts.items() for slide_id in facts.slides})
    problems = []
    for name, fold in zip(saved.names, saved.folds, strict=True):
        inside = {patient for part in PARTS for patient in getattr(fold, part)}
        gone, new = sorted(inside - set(case.stratum_of)), sorted(set(case.stratum_of) - inside)
        problems += [f"{name} has {len(gone)} patients who take no part here: {named(gone)}"] if gone else []
        problems += [f"{name} lacks {len(new)} patients: {named(new)}"] if new else []
    if problems:
        fix = "use the cohort that was split, or cut it anew: mil.split.scheme=folds"
        raise UsageError(f"the saved splits are of other patients: {bullet_list(problems, 20)}", where=path.name, fix=fix)
    return _Cut(saved.folds, saved.names, (f"splits as saved (scheme {saved.scheme}, {saved.hash[:12]})", *saved.notes))


SCHEMES: Mapping[str, Callable[[_Case], _Cut]] = {
    "folds": _folds,
    "monte-carlo": _monte_carlo,
    "column": _column,
    "site": _site,
    "site-preserved": _site_preserved,
    "file": _file,
}


def _check_strata(case: _Case, cut: _Cut) -> list[str]:
    """Notes on parts without a class; every training part must have them all."""
    classes = sorted(set(case.stratum_of.values()) - {UNKNOWN}) if case.classes else []
    notes = []
    for name, fold in zip(cut.names, cut.folds, strict=True):
        for part in PARTS:
            patients = getattr(fold, part)
            absent = sorted(set(classes) - {case.stratum_of[patient] for patient in patients})
            if not patients or (part == "train" and absent):
                purpose = {"train": "learn from", "validation": "stop by", "test": "test"}[part]
                what = f"{name} leaves no patient {'of ' + named(absent) + ' ' if absent else ''}to {purpose}"
                fix = "use another scheme, leave these patients out, or cut the cohort anew with mil.split.keep=false"
                raise UsageError(what, where="mil.split", fix=fix)
            notes += [f"{name}: its {part} part has no {named(absent)}"] if absent else []
    return notes


def _together_notes(case: _Case) -> list[str]:
    groups = [group for group in linked(case.together) if len(group & set(case.stratum_of)) > 1]
    shown = "; ".join(", ".join(sorted(group)) for group in groups[:5]) + ("; ..." if len(groups) > 5 else "")
    return [f"kept on one side of every split: {shown}"] if groups else []


def _coverage(case: _Case, folds: Sequence[Fold]) -> list[str]:
    tested = Counter(patient for fold in folds for patient in fold.test)
    never, often = len(case.stratum_of) - len(tested), sum(count > 1 for count in tested.values())
    notes = [f"{never} of {len(case.stratum_of)} patients are never tested"] if never else []
    return notes + ([f"{often} of {len(case.stratum_of)} patients are tested more than once"] if often else [])
