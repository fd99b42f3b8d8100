"""Operating points against trying every threshold, and exact limits against scipy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from pathfm.stats.thresholds import choose_threshold, share_limits

samples = st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=2, max_size=30).filter(
    lambda rows: len({positive for _, positive in rows}) == 2
)


def rates(score, positive, threshold):
    called = score >= threshold
    return called[positive].mean(), (~called)[~positive].mean()


@settings(deadline=None)
@given(samples, st.sampled_from(["0.5", "0.8", "0.95"]))
def test_thresholds_are_the_best_of_all(rows, wanted):
    score, positive = np.array([row[0] / 8 for row in rows]), np.array([row[1] for row in rows])
    every = [rates(score, positive, t) for t in [*np.unique(score), 2.0]]
    youden = rates(score, positive, choose_threshold("youden", score, positive).value)
    assert sum(youden) == pytest.approx(max(sum(pair) for pair in every))
    assert youden[0] == max(pair[0] for pair in every if sum(pair) > sum(youden) - 1e-12)
    sensitive = rates(score, positive, choose_threshold(f"sensitivity={wanted}", score, positive).value)
    assert sensitive[0] >= float(wanted) - 1e-12
    assert sensitive[1] == max(pair[1] for pair in every if pair[0] >= float(wanted) - 1e-12)
    specific = rates(score, positive, choose_threshold(f"specificity={wanted}", score, positive).value)
    assert specific[1] >= float(wanted) - 1e-12
    assert specific[0] == max(pair[0] for pair in every if pair[1] >= float(wanted) - 1e-12)


def test_tied_scores_fall_on_the_same_side_and_rounding_moves_none():
    score, positive = np.array([0.2, 0.4, 0.4, 0.9]), np.array([False, False, True, True])
    found = choose_threshold("sensitivity=0.95", score, positive)
    assert found.value == pytest.approx(0.3)
    neighbours = [0.5, np.nextafter(0.5, 1)]
    close = choose_threshold("youden", neighbours, [False, True]).value
    assert rates(np.array(neighbours), np.array([False, True]), close) == (1, 1)


def test_separated_classes_are_cut_in_the_middle():
    assert choose_threshold("youden", [0.1, 0.2, 0.6, 0.8], [False, False, True, True]).value == pytest.approx(0.4)


def test_impossible_targets_are_noted():
    upside_down = ([0.9, 0.8, 0.1, 0.2], [False, False, True, True])
    assert "only by calling everyone positive" in choose_threshold("sensitivity=0.95", *upside_down).note
    assert "only by calling nobody positive" in choose_threshold("specificity=0.95", *upside_down).note
    assert "no threshold is better" in choose_threshold("youden", *upside_down).note
    assert "no threshold is better" in choose_threshold("youden", [0.5] * 4, [True, False] * 2).note
    few = ([0.1, 0.2, 0.6, 0.8], [False, False, True, True])
    assert choose_threshold("sensitivity=0.95", *few).note == "2 positives are too few to promise 0.95: at best 0.67"
    assert choose_threshold("sensitivity=0.6", *few).note == ""


def test_certain_scores_leave_room_for_a_threshold_above_them():
    found = choose_threshold("specificity=0.9", [1.0, 0.5], [False, True])
    assert found.value > 1.0
    assert np.isfinite(found.value)


def test_one_class_and_unknown_rules_are_errors():
    with pytest.raises(ValueError, match="both classes"):
        choose_threshold("youden", [0.1, 0.2], [True, True])
    with pytest.raises(ValueError, match="no operating point 'f1'"):
        choose_threshold("f1", [0.1, 0.2], [True, False])


def test_a_score_that_is_not_a_number_is_an_error_and_not_the_highest():
    with pytest.raises(ValueError, match="scores must be finite"):
        choose_threshold("sensitivity=0.9", [0.1, 0.2, np.nan, 0.4], [False, False, True, True])


@pytest.mark.parametrize(("hits", "count"), [(0, 7), (7, 7), (3, 7), (1, 1), (50, 155)])
def test_limits_equal_scipys_exact_ones(hits, count):
    reference = binomtest(hits, count).proportion_ci(method="exact")
    assert share_limits(hits, count) == pytest.approx((reference.low, reference.high))


def test_nobody_says_nothing():
    assert share_limits(0, 0) == (0.0, 1.0)
