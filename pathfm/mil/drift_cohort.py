"""The last slides together against the training: distributions, scanners, how often nothing was decided, what was decided.

A shift of the inputs says that slides look different, not that answers are wrong; abstaining more often says that the
networks are less sure. Both together say more than either (arXiv 2601.00716).

Legend: W slides of the window, M tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pathfm.mil.drift import NOT_STATED, DriftReference, Flag
from pathfm.mil.drift_facts import BY_NAME, Watched, facts_from_record
from pathfm.mil.trust import FAR
from pathfm.stats.comparison import holm
from pathfm.stats.drift import Bins, excess_p, find_shift, rate_p
from pathfm.stats.thresholds import share_limits

WINDOW, LEAST_WINDOW = 50, 20
LEVEL = 0.01
"""A look at slides like those of the training finds any shift at most this often, by chance."""
ABSTAIN = "abstain:"
INPUTS, OUTPUTS = "inputs", "outputs"
Row = Mapping[str, Any]
"""One slide: ``facts`` (record of its ``SlideFacts``, or None) and ``decision`` of the main task (empty: none was made)."""


class _Finding(NamedTuple):
    """One test: on which side of the networks, its p-value before correction, and what is said if it is a shift."""

    side: str
    p: float
    flag: Flag


@dataclass(frozen=True)
class CohortFlags:
    """What is known of the last slides.

    Attributes:
        slides: W, those that were looked at.
        flags: shifts, the surest first.
        verdict: all of it in one sentence.
        tests: M.
    """

    slides: int
    flags: tuple[Flag, ...]
    verdict: str
    tests: int = 0

    def record(self) -> dict[str, Any]:
        """JSON values."""
        return {**vars(self), "flags": [flag.record() for flag in self.flags]}


def cohort_flags(reference: DriftReference, rows: Sequence[Row], window: int = WINDOW) -> CohortFlags:
    """Compares the last ``window`` slides with the training; p-values are corrected for the number of tests (Holm).

    Args:
        reference: of the bundle.
        rows: slides in the order of time; those without facts are left out.
        window: slides that are looked at.
    """
    last = [row for row in rows if row.get("facts")][-window:]
    if not reference.knows_enough:
        return CohortFlags(len(last), (), "The training has too few patients to compare with.")
    if len(last) < LEAST_WINDOW:
        return CohortFlags(len(last), (), f"Too few slides to compare yet: {len(last)} of {LEAST_WINDOW}.")
    found = [*_flagged(reference, last), *_numbers(reference, last), *_scanners(reference, last), *_decisions(reference, last)]
    adjusted = holm([finding.p for finding in found])
    shifts = sorted((p, place) for place, p in enumerate(adjusted) if p < LEVEL)
    flags = tuple(found[place].flag for _, place in shifts)
    sides = {found[place].side for _, place in shifts}
    return CohortFlags(len(last), flags, _verdict(len(last), sides), len(found))


def _flagged(reference: DriftReference, rows: Sequence[Row]) -> Iterator[_Finding]:
    """The number of slides with any flag: what is rare in training (ink, damage) has no distribution to compare with."""
    hits = sum(bool(reference.flags(facts_from_record(row["facts"]))) for row in rows)
    expected = reference.limit.expected
    shown, usual = _share(hits, len(rows)), f"about {expected:.0%}"
    sentence = f"slides with a flag: {shown} of the last slides, {usual} by chance"
    p = excess_p(hits, len(rows), expected, reference.patients)
    yield _Finding(INPUTS, p, Flag("flagged", shown, usual, sentence))


def _numbers(reference: DriftReference, rows: Sequence[Row]) -> Iterator[_Finding]:
    facts = [facts_from_record(row["facts"]) for row in rows]
    for name, known in reference.numbers.items():
        watched = BY_NAME[name]
        value = [watched.scaled(each.numbers[name]) for each in facts if each.numbers[name] is not None]
        shift = find_shift(known.bins, value) if len(value) >= LEAST_WINDOW else None
        if shift is None:
            continue
        middle, usual = watched.unscaled(sorted(value)[len(value) // 2]), watched.unscaled(known.spread.centre)
        shown, training = watched.words(middle), watched.words(usual)
        sentence = (
            f"{watched.label}: half of the last {len(value)} slides have {shown} or more, half of the training {training}"
            f" (distributions differ by {shift.difference:.0%}{_where(known.bins, value, watched)};"
            f" stability index {shift.psi:.2f})"
        )
        yield _Finding(INPUTS, shift.p, Flag(name, shown, training, sentence))


def _where(bins: Bins, value_N: Sequence[float], watched: Watched) -> str:
    """Where values lie that hardly any training slide has, if many do."""
    low, high = bins.edges[0], bins.edges[-1]
    below, above = (sum(found) / len(value_N) for found in ([v <= low for v in value_N], [v > high for v in value_N]))
    side, edge = (f"{below:.0%} below", low) if below > above else (f"{above:.0%} above", high)
    return f", {side} {watched.words(watched.unscaled(edge))}" if max(below, above) > 0.5 else ""


def _scanners(reference: DriftReference, rows: Sequence[Row]) -> Iterator[_Finding]:
    """The share of each scanner; those with few training slides are left out, because their number is not told."""
    names = [str(row["facts"]["scanner"] or NOT_STATED) for row in rows]
    for name in sorted({*names, *reference.scanners}):
        known = reference.scanners.get(name, 0)
        if known is None:
            continue
        hits = names.count(name)
        share, usual = f"{hits / len(names):.0%}", f"{known / reference.slides:.0%}"
        sentence = f"scanner {name}: {share} of the last {len(names)} slides, {usual} of the training"
        yield _Finding(INPUTS, rate_p(hits, len(names), known, reference.slides), Flag("scanners", share, usual, sentence))


def _decisions(reference: DriftReference, rows: Sequence[Row]) -> Iterator[_Finding]:
    """How often nothing was decided, how often for doubt (of slides near the training), how often it was positive."""
    said = [str(row["decision"]) for row in rows if row.get("decision")]
    known = [name for name, count in sorted(reference.decisions.items()) if name for _ in range(count)]
    yield from _rate("abstention", "no decision", [_abstains(said), _abstains(known)])
    near = [[name.startswith(ABSTAIN) for name in names if name != FAR] for names in (said, known)]
    yield from _rate("doubt", "too uncertain for a decision", near)
    decided = [[name == reference.positive for name in names if not name.startswith(ABSTAIN)] for names in (said, known)]
    if reference.positive:
        yield from _rate("positive", f"decided {reference.positive!r}", decided)


def _abstains(decisions: Sequence[str]) -> list[bool]:
    return [name.startswith(ABSTAIN) for name in decisions]


def _rate(name: str, words: str, found: Sequence[Sequence[bool]]) -> Iterator[_Finding]:
    """Two shares, with exact 95 % intervals."""
    new, known = found
    if not new or not known:
        return
    shown, usual = (_share(sum(hits), len(hits)) for hits in (new, known))
    sentence = f"{words}: {shown} of the last slides, {usual} in the training (out of fold)"
    p = rate_p(sum(new), len(new), sum(known), len(known))
    yield _Finding(OUTPUTS, p, Flag(name, shown, usual, sentence))


def _share(hits: int, count: int) -> str:
    low, high = share_limits(hits, count)
    return f"{hits / count:.0%} ({low:.0%} to {high:.0%}; {hits} of {count})"


def _verdict(slides: int, sides: set[str]) -> str:
    if sides == {INPUTS, OUTPUTS}:
        return (
            f"The last {slides} slides look different from the training and are decided differently: have slides reviewed by a"
            " pathologist before relying on further answers."
        )
    if sides == {INPUTS}:
        return (
            f"The last {slides} slides look different from the training, but are decided as usual: find out what has changed;"
            " whether answers are worse cannot be told without labels."
        )
    if sides == {OUTPUTS}:
        return (
            f"The last {slides} slides are decided differently from the training, though nothing that is watched about the"
            " pictures has changed: another mix of patients, or a change that is not watched."
        )
    return f"No shift is seen in the last {slides} slides."
