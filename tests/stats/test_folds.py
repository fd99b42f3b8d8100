"""Folds: no patient on two sides, no dependence on order, and a refusal that helps."""

import itertools
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfm.errors import UsageError
from pathfm.stats.folds import (
    balanced_blocks,
    check_together,
    folds_record,
    given_folds,
    held_out_fold,
    linked,
    monte_carlo_folds,
    stratified_group_folds,
    thinned_fold,
)

PUBLISHED = "8f7280b26be6a6c9"
"""Folds of earlier versions: results that rest on them stay comparable."""


def strata(**counts):
    return {f"{name}{index:03d}": name for name, count in counts.items() for index in range(count)}


@given(st.integers(10, 40), st.integers(10, 40), st.integers(2, 5), st.sampled_from([0.1, 0.2, 0.5, 0.85]), st.integers(-5, 5))
def test_parts_are_disjoint_and_hold_everyone_once(first, second, folds, inner, seed):
    of = strata(a=first, b=second)
    split = stratified_group_folds(of, folds, inner, seed)
    for fold in split:
        parts = [set(fold.train), set(fold.validation), set(fold.test)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == len(of)
        for part in parts:
            assert {of[patient] for patient in part} == {"a", "b"}
    assert sorted(patient for fold in split for patient in fold.test) == sorted(of)


def test_folds_are_balanced_in_size_and_class():
    of = strata(rare=7, common=33)
    split = stratified_group_folds(of, 5, 0.2, 0)
    sizes = [len(fold.test) for fold in split]
    assert max(sizes) - min(sizes) <= 1
    assert {Counter(of[patient] for patient in fold.test)["rare"] for fold in split} <= {1, 2}


def test_order_of_the_table_does_not_matter():
    of = strata(a=20, b=15)
    shuffled = list(of.items())
    random.Random(3).shuffle(shuffled)
    assert stratified_group_folds(dict(shuffled), 5, 0.2, 1) == stratified_group_folds(of, 5, 0.2, 1)


def test_another_seed_gives_other_folds_with_another_hash():
    of = strata(a=20, b=15)
    one, two = (stratified_group_folds(of, 5, 0.2, seed) for seed in (0, 1))
    assert one != two
    assert folds_record(one, 0)["hash"] != folds_record(two, 1)["hash"]


def test_folds_are_the_same_under_another_hash_seed():
    code = (
        "from pathfm.stats.folds import *\n"
        "of = {f'{c}{i}': c for c in 'ab' for i in set(range(12))}\n"
        "print(folds_record(stratified_group_folds(of, 3, .2, 0), 0)['hash'])"
    )
    run = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}, capture_output=True
        )
        for seed in ("0", "1")
    ]
    assert run[0].stdout == run[1].stdout != b""


def test_too_few_patients_name_the_counts_and_a_number_of_folds_that_works():
    with pytest.raises(UsageError, match=r"5 folds \(a: 20, b: 4\).*mil.folds to 4"):
        stratified_group_folds(strata(a=20, b=4), 5, 0.2, 0)
    with pytest.raises(UsageError, match="two classes or more"):
        stratified_group_folds(strata(a=20), 5, 0.2, 0)


def test_two_folds_leave_one_to_learn_from_and_one_to_stop_by():
    with pytest.raises(UsageError):
        stratified_group_folds(strata(a=3, b=9), 2, 0.2, 0)
    assert stratified_group_folds(strata(a=4, b=9), 2, 0.2, 0)


def no_patient_is_on_two_sides(folds, patients):
    for fold in folds:
        parts = [*fold.train, *fold.validation, *fold.test]
        assert sorted(parts) == sorted(patients)
        assert fold.train and fold.validation and fold.test


def side_of(fold):
    return {name: side for side in ("train", "validation", "test") for name in getattr(fold, side)}


PAIRS = [{"a000", "a001"}, {"a001", "b003"}, {"b005", "b006", "somebody else"}]


@pytest.mark.parametrize("scheme", ["folds", "monte-carlo", "given"])
def test_patients_that_stay_together_are_on_one_side_in_every_scheme(scheme):
    of = strata(a=20, b=15)
    folds = {
        "folds": lambda: stratified_group_folds(of, 5, 0.2, 3, together=PAIRS),
        "monte-carlo": lambda: monte_carlo_folds(of, 6, (0.2, 0.2), 3, together=PAIRS),
        "given": lambda: given_folds(of, [["a000", "a001", "b003", "b000"]], 0.2, 3, PAIRS),
    }[scheme]()
    no_patient_is_on_two_sides(folds, of)
    for side in map(side_of, folds):
        assert side["a000"] == side["a001"] == side["b003"] and side["b005"] == side["b006"]
        assert {of[name] for name in side if side[name] == "test"} == {"a", "b"}
    for fold in folds:
        check_together([fold.train, fold.validation, fold.test], PAIRS)


def test_without_pairs_nothing_changes():
    of = strata(a=20, b=15)
    assert stratified_group_folds(of, 5, 0.2, 3, together=[{"a000"}, set()]) == stratified_group_folds(of, 5, 0.2, 3)


def test_the_default_scheme_keeps_its_published_folds():
    assert folds_record(stratified_group_folds(strata(a=20, b=15), 5, 0.2, 0), 0)["hash"].startswith(PUBLISHED)


def test_given_test_parts_that_tear_a_pair_are_refused():
    with pytest.raises(UsageError, match="a000, a001, b003"):
        given_folds(strata(a=20, b=15), [["a000", "b000"]], 0.2, 0, PAIRS)
    with pytest.raises(UsageError, match="two sides: a000, a001"):
        held_out_fold(strata(a=20, b=15), {"a000", "b000"}, 0.2, 0, [{"a000", "a001"}])


def test_the_held_out_fold_is_the_first_of_the_folds_also_with_pairs():
    of, pairs = strata(a=20, b=15), [{"a000", "a001"}]
    first = stratified_group_folds(of, 5, 0.2, 1, together=pairs)[0]
    assert held_out_fold(of, first.test, 0.2, 1, pairs) == first


def test_patients_of_unknown_stratum_take_part_without_a_minimum():
    of = {**strata(a=10, b=10), "x": "", "y": ""}
    folds = stratified_group_folds(of, 5, 0.2, 0)
    no_patient_is_on_two_sides(folds, of)
    assert monte_carlo_folds(of, 2, (0.2, 0.2), 0)


def test_small_strata_that_are_no_classes_join_their_neighbours():
    of = strata(q1=9, q2=2, q3=9, q4=1)
    with pytest.raises(UsageError, match="q2: 2"):
        stratified_group_folds(of, 3, 0.2, 0)
    folds = stratified_group_folds(of, 3, 0.2, 0, classes=False)
    no_patient_is_on_two_sides(folds, of)
    low = [sum(of[name] in {"q1", "q2"} for name in fold.test) for fold in folds]
    assert max(low) - min(low) <= 1
    no_patient_is_on_two_sides(stratified_group_folds(strata(all=9), 3, 0.2, 0, classes=False), strata(all=9))
    with pytest.raises(UsageError, match=r"too few patients for 3 folds \(q1 \+ q2: 2\)"):
        stratified_group_folds(strata(q1=1, q2=1), 3, 0.2, 0, classes=False)


def test_strata_that_are_no_classes_need_not_be_in_every_part_that_is_held_out():
    of = {**strata(q1=9, q2=2, q3=9, q4=1), "x": ""}
    test = {"q1000", "q2000", "q2001", "q3000"}
    with pytest.raises(UsageError, match=r"every class needs .* q2: 2 of 2, .* q4: 0 of 1 "):
        held_out_fold(of, test, 0.2, 0)
    fold = held_out_fold(of, test, 0.2, 0, classes=False)
    no_patient_is_on_two_sides([fold], of)
    assert set(fold.test) == test
    with pytest.raises(UsageError, match=r"the split needs .* held out are patients: 20 of 21 "):
        held_out_fold(of, set(of) - {"q1000", "x"}, 0.2, 0, classes=False)
    pairs = strata(e1=2, e2=2, c=2)  # of which one each is held out: none alone could be learned from and stopped by
    fold = held_out_fold(pairs, {"e1000", "e2000"}, 0.2, 0, classes=False)
    assert {side_of(fold)[name] for name in ("e1001", "e2001")} == {"train", "validation"}
    first = stratified_group_folds(strata(q1=9, q2=8), 3, 0.2, 0, classes=False)[0]
    assert held_out_fold(strata(q1=9, q2=8), first.test, 0.2, 0, classes=False) == first


def test_patients_of_unknown_stratum_are_no_class_of_a_held_out_part():
    of = {**strata(a=10, b=10), "x": ""}
    assert "x" in held_out_fold(of, {"a000", "b000"}, 0.2, 0).train


def test_monte_carlo_draws_rounds_of_the_wanted_size():
    of = strata(a=40, b=20)
    folds = monte_carlo_folds(of, 8, (0.25, 0.2), 0)
    no_patient_is_on_two_sides(folds, of)
    assert {Counter(of[name] for name in fold.test)["a"] for fold in folds} == {10}
    assert len({fold.test for fold in folds}) == 8
    assert monte_carlo_folds(dict(reversed(of.items())), 8, (0.25, 0.2), 0) == folds
    with pytest.raises(UsageError, match="b: 2"):
        monte_carlo_folds(strata(a=9, b=2), 3, (0.2, 0.2), 0)


def test_fewer_patients_to_learn_from_are_a_part_of_more():
    of = strata(a=40, b=20)
    fold = stratified_group_folds(of, 5, 0.2, 0)[0]
    shares = [thinned_fold(fold, of, share, 0) for share in (0.25, 0.5, 1.0)]
    for less, more in itertools.pairwise(shares):
        assert set(less.train) < set(more.train) and set(less.validation) < set(more.validation)
        assert {of[name] for name in less.validation} == {"a", "b"}
    assert shares[-1] == fold and all(each.test == fold.test for each in shares)


def imbalance(count_BS, fold_B, folds):
    whole = np.column_stack([count_BS, count_BS.sum(axis=1)])
    share = whole / np.maximum(whole.sum(axis=0), 1)
    held = np.array([[share[np.array(fold_B) == fold, s].sum() for s in range(whole.shape[1])] for fold in range(folds)])
    return ((held - 1 / folds) ** 2).sum()


@pytest.mark.parametrize("seed", range(12))
def test_whole_sites_are_balanced_as_well_as_by_trying_everything(seed):
    rng = np.random.default_rng(seed)
    count_BS = rng.integers(1, 30, (7, 2))
    found = balanced_blocks(count_BS, 3, seed)
    best = min(imbalance(count_BS, fold_B, 3) for fold_B in itertools.product(range(3), repeat=7))
    assert set(found) == {0, 1, 2}
    assert imbalance(count_BS, found, 3) == pytest.approx(best, abs=1e-9)


def test_one_site_with_nearly_everyone_leaves_no_fold_empty():
    assert set(balanced_blocks(np.array([[90, 0], [1, 1], [0, 2], [3, 0]]), 4, 0)) == {0, 1, 2, 3}
    assert sorted(balanced_blocks(np.array([[90, 90], [1, 0], [0, 1]]), 3, 0)) == [0, 1, 2]


@given(st.lists(st.sets(st.sampled_from("abcdefgh"), max_size=3), max_size=6))
def test_sets_that_overlap_are_joined(sets):
    found = linked(sets)
    assert sorted(name for each in found for name in each) == sorted(set().union(*sets))
    assert all(any(each <= whole for whole in found) for each in sets if each)
    apart = [set(each) for each in sets if each]  # a plain slow version
    while pair := next(((x, y) for x, y in itertools.combinations(apart, 2) if x & y), None):
        apart = [each for each in apart if each is not pair[0] and each is not pair[1]] + [pair[0] | pair[1]]
    assert {frozenset(each) for each in apart} == set(found)
