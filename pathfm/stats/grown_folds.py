"""Folds of a cohort that has grown: patients who were dealt before stay where they are, and only new ones are dealt.

Who is gone is simply left out. Patients that must stay together with one who was dealt before join that one. New patients are
dealt by stratum, to the part that has the fewest of it, so that folds stay as like each other as those of old allow. The result
depends on the earlier folds, on the seed and on the *set* of patients. Cohorts that grow in two steps need not come to the same
folds as one that grows in one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pathfm.errors import UsageError
from pathfm.stats.folds import Dealt, Fold, Strata, Together, enough_patients, share_of, shuffled
from pathfm.stats.seeds import derive_seed

SHOWN = 5
FIX = "take one of them out, or cut the cohort anew with mil.split.keep=false"


@dataclass(frozen=True)
class Growth:
    """A cohort that has grown.

    Attributes:
        stratum_of: patient -> stratum of everyone who takes part now.
        together: patients that stay on one side.
        seed: any integer.
        folds: that strata must suffice for; smaller ones are joined where they are no classes.
        classes: strata are classes.
    """

    stratum_of: Mapping[str, str]
    together: Together
    seed: int
    folds: int = 1
    classes: bool = True

    @property
    def dealt(self) -> Dealt:
        """What is dealt: patients, or those that stay together as one."""
        return Dealt.of(self.stratum_of, self.together)

    def strata(self, dealt: Dealt) -> Strata:
        """Strata by which parts are filled."""
        return dealt.strata(lambda count: enough_patients(count, self.folds), self.classes)


def grown_tests(growth: Growth, old: Sequence[Fold], names: Sequence[str]) -> list[frozenset[str]]:
    """Test parts in which everyone is tested once: a new patient goes where its stratum, then the whole part, is smallest.

    Args:
        growth: the cohort; ``together`` may hold whole sites.
        old: folds that test each of their patients once.
        names: of the folds.

    Raises:
        UsageError: patients that must stay together are in several test parts.
    """
    dealt, parts = growth.dealt, range(len(old))
    place = _places(dealt, {patient: number for number, fold in enumerate(old) for patient in fold.test}, names)
    size = Counter(growth.stratum_of.values())
    holds = {leader: Counter(growth.stratum_of[name] for name in names) for leader, names in dealt.members.items()}
    inside = [Counter[str]() for _ in parts]
    for leader, number in place.items():
        inside[number].update(holds[leader])
    for leader in _order(growth, dealt, [leader for leader in dealt.members if leader not in place]):
        own = holds[leader]
        like = [
            sum(count * inside[part][stratum] / size[stratum] ** 2 for stratum, count in sorted(own.items())) for part in parts
        ]
        place[leader] = min(parts, key=lambda part: (like[part], inside[part].total(), part))
        inside[place[leader]].update(own)
    return [_opened(dealt, [leader for leader, number in place.items() if number == part]) for part in parts]


def grown_draws(growth: Growth, old: Sequence[Fold], fraction: float, names: Sequence[str]) -> list[frozenset[str]]:
    """Test parts that were drawn at random: new patients are drawn until each holds its share of every stratum again.

    Raises:
        UsageError: patients that must stay together are in and outside of a test part.
    """
    dealt, found = growth.dealt, []
    for number, fold in enumerate(old):
        tested = _is_in(dealt, fold.test, (*fold.train, *fold.validation), (f"test of {names[number]}", "not tested there"))
        drawn = _filled(growth, dealt, tested, set(dealt.members), (fraction, 2, f"monte-carlo {number}"))
        found.append(_opened(dealt, drawn))
    return found


def grown_folds(
    growth: Growth, old: Sequence[Fold | None], tests: Sequence[Collection[str]], fraction: float, names: Sequence[str]
) -> tuple[Fold, ...]:
    """Folds with these test parts, in which who was learned from stays on its side of training and validation.

    Args:
        growth: the cohort.
        old: the fold of old for each test part; None: there was none.
        tests: test parts, of everyone who takes part.
        fraction: share of the other patients that is in the validation part.
        names: of the folds.

    Raises:
        UsageError: patients that must stay together are on both sides.
    """
    dealt, found = growth.dealt, []
    for number, (fold, test) in enumerate(zip(old, tests, strict=True)):
        before = fold or Fold((), (), ())
        words = (f"validation of {names[number]}", f"training of {names[number]}")
        inside = {leader for leader, members in dealt.members.items() if not set(members) & set(test)}
        side = _is_in(dealt, set(before.validation) - set(test), set(before.train) - set(test), words)
        held = _opened(dealt, _filled(growth, dealt, side, inside, (fraction, 1, f"inner {number}")))
        train = set(growth.stratum_of) - set(test) - held
        found.append(Fold(tuple(sorted(train)), tuple(sorted(held)), tuple(sorted(test))))
    return tuple(found)


def _order(growth: Growth, dealt: Dealt, leaders: Sequence[str]) -> list[str]:
    """Whom to deal first: large sets, which fit in fewest places; then stratum by stratum, at random by the seed."""
    place: dict[str, int] = {}
    for stratum in sorted({dealt.stratum_of[leader] for leader in leaders}):
        same = sorted(leader for leader in leaders if dealt.stratum_of[leader] == stratum)
        for leader in shuffled(same, derive_seed("grown", growth.seed, stratum)):
            place[leader] = len(place)
    return sorted(place, key=lambda leader: (-len(dealt.members[leader]), place[leader]))


def _filled(
    growth: Growth, dealt: Dealt, side: Mapping[str, bool], inside: Collection[str], part: tuple[float, int, str]
) -> list[str]:
    """Who is in a part: those who were, and of each stratum so many new ones that it has its share (fraction, left, seed)."""
    fraction, left, name = part
    chosen: list[str] = []
    for stratum, leaders in growth.strata(dealt).items():
        here = [leader for leader in leaders if leader in inside]
        kept = [leader for leader in here if side.get(leader)]
        new = [leader for leader in here if leader not in side]
        wanted = max(0, share_of(len(here), fraction, left) - len(kept))
        chosen += kept + shuffled(new, derive_seed("grown", growth.seed, name, stratum))[:wanted]
    return chosen


def _is_in(dealt: Dealt, inner: Collection[str], outer: Collection[str], words: tuple[str, str]) -> dict[str, bool]:
    """Of those who were dealt before, whether they are in the inner part."""
    number_of = {**dict.fromkeys(outer, 1), **dict.fromkeys(inner, 0)}
    return {leader: number == 0 for leader, number in _places(dealt, number_of, words).items()}


def _places(dealt: Dealt, place_of: Mapping[str, int], words: Sequence[str]) -> dict[str, int]:
    """The place of each set with anybody who was dealt before.

    Raises:
        UsageError: sets with members in several places.
    """
    found: dict[str, int] = {}
    torn = []
    for leader, members in dealt.members.items():
        known = {name: place_of[name] for name in members if name in place_of}
        if len(set(known.values())) > 1:
            of = {place: [name for name in known if known[name] == place] for place in sorted(set(known.values()))}
            torn.append("; ".join(f"{words[place]}: {_some(names)}" for place, names in of.items()))
        elif known:
            found[leader] = next(iter(known.values()))
    if torn:
        more = f" ... and {len(torn) - SHOWN} more such sets" if len(torn) > SHOWN else ""
        what = "patients that must stay together were put on different sides before: "
        raise UsageError(what + " | ".join(torn[:SHOWN]) + more, where="mil.split", fix=FIX)
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > SHOWN else "")


def _opened(dealt: Dealt, leaders: Collection[str]) -> frozenset[str]:
    return frozenset(name for leader in leaders for name in dealt.members[leader])
