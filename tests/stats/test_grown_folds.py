"""Folds of a cohort that has grown: who was there stays, nobody is on two sides, and newcomers fill what is smallest."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfm.errors import UsageError
from pathfm.stats.folds import Fold, monte_carlo_folds, stratified_group_folds
from pathfm.stats.grown_folds import Growth, grown_draws, grown_folds, grown_tests

PARTS = ("train", "validation", "test")
NAMES = tuple(f"fold {number}" for number in range(9))


def strata(start=0, **counts):
    return {f"{name}{index:03d}": name for name, count in counts.items() for index in range(start, start + count)}


def sides(fold):
    return {name: part for part in PARTS for name in getattr(fold, part)}


def grown(old, of, seed=0, together=(), folds=3, inner=0.25):
    growth = Growth(of, together, seed, folds)
    return grown_folds(growth, old, grown_tests(growth, old, NAMES), inner, NAMES)


cohorts = st.fixed_dictionaries(
    {
        "old": st.tuples(st.integers(6, 30), st.integers(6, 30)),
        "new": st.tuples(st.integers(0, 12), st.integers(0, 12)),
        "gone": st.sets(st.integers(0, 59), max_size=12),
        "folds": st.integers(2, 3),
        "seed": st.integers(-3, 3),
        "pairs": st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=4),
    }
)


def made(case):
    """The folds of old, everyone of now, and the sets of newcomers who stay together."""
    before = strata(a=case["old"][0], b=case["old"][1])
    old = stratified_group_folds(before, case["folds"], 0.25, case["seed"])
    gone = {name for place, name in enumerate(sorted(before)) if place in case["gone"]}
    new = strata(100, a=case["new"][0], b=case["new"][1])
    of = {name: stratum for name, stratum in before.items() if name not in gone} | new
    names = sorted(new)
    together = [{names[one % len(names)], names[other % len(names)]} for one, other in case["pairs"]] if names else []
    return old, of, new, together


@given(cohorts)
def test_nobody_is_on_two_sides_and_everyone_of_old_stays(case):
    old, of, _, together = made(case)
    folds = grown(old, of, case["seed"], together, case["folds"])
    for before, after in zip(old, folds, strict=True):
        assert sorted([*after.train, *after.validation, *after.test]) == sorted(of)
        now, was = sides(after), sides(before)
        assert all(now[name] == was[name] for name in of.keys() & was.keys())
        assert all(len({now[name] for name in group}) == 1 for group in together)
    assert sorted(name for fold in folds for name in fold.test) == sorted(of)


@given(cohorts)
def test_a_newcomer_goes_where_his_class_is_smallest(case):
    old, of, new, _ = made(case)
    folds = grown(old, of, case["seed"], folds=case["folds"])
    for stratum in ("a", "b"):
        count = [sum(of[name] == stratum for name in fold.test) for fold in folds]
        joined = [any(of[name] == stratum for name in new.keys() & set(fold.test)) for fold in folds]
        assert all(own <= min(count) + 1 for own, has_new in zip(count, joined, strict=True) if has_new)


@given(st.integers(6, 30), st.integers(6, 30), st.integers(0, 20), st.integers(2, 5), st.integers(0, 3))
def test_sizes_stay_within_one_where_nobody_has_left(first, second, new, folds, seed):
    before = strata(a=max(first, 2 * folds), b=max(second, 2 * folds))
    old = stratified_group_folds(before, folds, 0.25, seed)
    both = grown(old, before | strata(100, a=new, b=new), seed, folds=folds)
    for stratum in ("a", "b"):
        count = [sum(name.startswith(stratum) for name in fold.test) for fold in both]
        assert max(count) - min(count) <= 1
    one = [len(fold.test) for fold in grown(old, before | strata(100, a=new), seed, folds=folds)]
    assert max(one) - min(one) <= 2  # the class comes first


@given(cohorts, st.integers(0, 9))
def test_the_order_of_patients_does_not_matter(case, order):
    old, of, _, together = made(case)
    shuffled = list(of.items())
    random.Random(order).shuffle(shuffled)
    assert grown(old, dict(shuffled), 1, together[::-1], case["folds"]) == grown(old, of, 1, together, case["folds"])


@given(cohorts)
def test_growing_again_without_newcomers_changes_nothing(case):
    old, of, _, together = made(case)
    once = grown(old, of, case["seed"], together, case["folds"])
    assert grown(once, of, case["seed"], together, case["folds"]) == once


def test_validation_parts_get_their_share_of_newcomers():
    before = strata(a=20, b=20)
    old = stratified_group_folds(before, 4, 0.2, 0)
    for fold in grown(old, before | strata(100, a=40, b=40), folds=4, inner=0.2):
        assert Counter(name[0] for name in fold.validation) == {"a": 9, "b": 9}  # of 45 each


def test_newcomers_join_whom_they_must_stay_with():
    before = strata(a=9, b=9)
    old = stratified_group_folds(before, 3, 0.25, 0)
    of = before | {"a100": "a", "b100": "b"}
    for fold in grown(old, of, together=[{"a100", "b100", "b003"}]):
        assert len({sides(fold)[name] for name in ("a100", "b100", "b003")}) == 1


def test_a_newcomer_who_ties_two_sides_is_refused_with_all_names():
    before = strata(a=9, b=9)
    old = stratified_group_folds(before, 3, 0.25, 0)
    one, other = old[0].test[0], old[1].test[0]
    with pytest.raises(UsageError, match=f"fold 0: {one}; fold 1: {other}.*mil.split.keep=false"):
        grown(old, before | {"new": "a"}, together=[{one, "new"}, {"new", other}])
    same = [name for name in old[1].train if name in old[0].test], [name for name in old[1].validation if name in old[0].test]
    with pytest.raises(UsageError, match=f"validation of fold 1: {same[1][0]}; training of fold 1: {same[0][0]}"):
        grown(old, before, together=[{same[0][0], same[1][0]}])


def test_drawn_test_parts_are_filled_up_and_keep_who_was_drawn():
    before = strata(a=20, b=20)
    old = monte_carlo_folds(before, 5, (0.2, 0.25), 3)
    of = before | strata(100, a=10, b=5)
    growth = Growth(of, (), 3)
    tests = grown_draws(growth, old, 0.2, NAMES)
    assert [Counter(of[name] for name in test) for test in tests] == [{"a": 6, "b": 5}] * 5
    assert all(set(fold.test) <= test for fold, test in zip(old, tests, strict=True))
    assert len({frozenset(test - set(fold.test)) for fold, test in zip(old, tests, strict=True)}) > 1


def test_a_fold_that_was_not_there_before_is_cut_like_any():
    of = strata(a=8, b=8)
    test = {"a000", "b000"}
    (fold,) = grown_folds(Growth(of, (), 0), [None], [test], 0.25, ["site new"])
    assert set(fold.test) == test and len(fold.validation) == 4 and len(fold.train) == 10


def test_large_sets_are_dealt_first_and_by_their_classes():
    before = {f"x{n}{s}": s for n in range(6) for s in "ab"}
    old = (
        Fold((), (), tuple(sorted(f"x{n}{s}" for n in range(4) for s in "ab"))),
        Fold((), (), tuple(sorted(f"x{n}{s}" for n in (4, 5) for s in "ab"))),
    )
    site = {f"y{n}": "a" for n in range(5)}
    one, other = grown_tests(Growth(before | site | {"z": "b"}, [set(site)], 0), old, NAMES)
    assert set(site) <= other and "z" in other and len(one) == 8
