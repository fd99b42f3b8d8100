"""Nested search: the candidate that is best inside wins, and nothing from outside is looked at."""

import math

import pytest

from pathfm.errors import UsageError
from pathfm.mil.search import candidate_settings, choose, inner_folds
from pathfm.mil_settings import MilSettings
from pathfm.stats.folds import stratified_group_folds

SETTINGS = MilSettings.model_validate({"search": {"lr": (0.01, 0.001), "hidden": (32, 64)}, "search_folds": 3})
STRATA = {f"p{n:02d}": "ab"[n % 2] for n in range(60)}


def learned(number=0):
    fold = stratified_group_folds(STRATA, 5, 0.2, 0)[number]
    return {name: STRATA[name] for name in (*fold.train, *fold.validation)}, fold


def test_candidates_are_the_product_with_everything_else_as_it_was():
    found = candidate_settings(SETTINGS)
    assert [values for values, _ in found] == [{"hidden": h, "lr": lr} for h in (32, 64) for lr in (0.01, 0.001)]
    for values, settings in found:
        assert settings == SETTINGS.model_copy(update={**values, "search": {}})


def test_the_order_of_the_settings_in_the_file_does_not_matter():
    turned = SETTINGS.model_copy(update={"search": dict(reversed(SETTINGS.search.items()))})
    assert candidate_settings(turned) == candidate_settings(SETTINGS)


def test_a_value_that_cannot_be_is_named():
    with pytest.raises(UsageError, match=r"mil.search.hidden: .*greater than 0, not 0"):
        candidate_settings(MilSettings.model_validate({"search": {"hidden": (32, 0)}}))


def test_no_test_patient_of_the_outer_fold_is_ever_asked_about():
    """As tools do that choose epoch, threshold or settings by the fold that they report."""
    stratum_of, outer = learned()
    asked = []

    def score(settings, train, validation, test):
        asked.append((train, validation, test))
        return settings.lr

    choice = choose(SETTINGS, 0, inner_folds(stratum_of, 0, SETTINGS), score)
    assert len(asked) == 4 * 3
    for parts in asked:
        names = [name for part in parts for name in part]
        assert sorted(names) == sorted(stratum_of) and not set(names) & set(outer.test)
    assert choice.settings.lr == 0.01 and choice.settings.hidden == 32 and not choice.settings.search


def test_ties_go_to_the_first_and_the_table_is_plain():
    choice = choose(SETTINGS, 2, inner_folds(learned()[0], 2, SETTINGS), lambda settings, *parts: 0.75)
    record = choice.record()
    assert choice.chosen == 0 and record["fold"] == 2 and record["chosen"] == {"hidden": 32, "lr": 0.01}
    assert record["candidates"][3] == {"values": {"hidden": 64, "lr": 0.001}, "scores": [0.75] * 3, "mean": 0.75}


def test_inner_folds_differ_between_outer_folds_and_keep_pairs_together():
    stratum_of, _ = learned()
    pair = frozenset(sorted(stratum_of)[:2])
    one, two = (inner_folds(stratum_of, number, SETTINGS, together=[pair]) for number in (0, 1))
    assert one != two and one == inner_folds(dict(reversed(stratum_of.items())), 0, SETTINGS, together=[pair])
    for fold in one:
        assert sum(bool(pair & set(part)) for part in (fold.train, fold.validation, fold.test)) == 1


def test_a_stratum_too_small_for_the_inner_folds_names_their_setting():
    few = {f"{label}{number}": label for label, count in {"a": 9, "b": 4}.items() for number in range(count)}
    with pytest.raises(UsageError, match=r"mil.search_folds: .*set mil.search_folds to 4"):
        inner_folds(few, 0, SETTINGS.model_copy(update={"search_folds": 5}))


def test_scores_that_do_not_exist_lose_and_folds_without_any_are_left_out():
    folds = inner_folds(learned()[0], 0, SETTINGS)

    def score(settings, train, validation, test):
        if test == folds[0].test:
            return math.nan  # nobody has a score here
        if settings.hidden == 32:
            return math.inf if settings.lr == 0.01 else math.nan  # diverged
        return settings.lr

    choice = choose(SETTINGS, 0, folds, score)
    assert choice.settings.hidden == 64 and choice.settings.lr == 0.01
    assert [each.mean for each in choice.candidates] == [None, None, 0.01, 0.001]
    assert choice.candidates[0].scores == (None, None, None)
    with pytest.raises(UsageError, match="no candidate of the search has a score in outer fold 4"):
        choose(SETTINGS, 4, folds, lambda *everything: math.nan)
