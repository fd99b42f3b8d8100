"""Folds: no patient on two sides, no dependence on order, and a refusal that helps."""

import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfm.errors import UsageError
from pathfm.stats.folds import folds_record, stratified_group_folds


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
