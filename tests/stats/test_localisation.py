"""Localisation: against scikit-learn and plain counting, never pooled over slides, with limits that say something."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from pathfm.stats.localisation import UNKNOWN, ScoredSlide, localisation_auroc, localise, mean_over_slides, pointing_game


def slides(count=12, tiles=30, gain=1.0, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        truth = (rng.random(tiles) < 0.3).astype(np.int8)
        truth[:2] = (1, 0)
        made.append(ScoredSlide(f"s{index:02d}", f"p{index // 2}", rng.normal(size=tiles) + gain * truth, truth))
    return made


def test_numbers_are_means_over_slides_of_scikit_learns():
    made = slides()
    found = localise(made, 100, 0)
    wanted = np.mean([roc_auc_score(slide.truth_N, slide.score_N) for slide in made])
    precision = np.mean([average_precision_score(slide.truth_N, slide.score_N) for slide in made])
    hits = np.mean([slide.truth_N[slide.score_N.argmax()] for slide in made])
    assert found.auroc.value == pytest.approx(wanted, abs=1e-12)
    assert found.average_precision.value == pytest.approx(precision, abs=1e-12)
    assert found.pointing.value == pytest.approx(hits, abs=1e-12)
    assert found.lesion_share == pytest.approx(np.mean([slide.truth_N.mean() for slide in made]))
    assert (found.auroc.n_slides, found.auroc.n_patients, found.left_out) == (12, 6, 0)
    assert found.auroc.low < found.auroc.value < found.auroc.high
    assert localisation_auroc(made, 100, 0) == found.auroc


def test_scores_are_never_pooled_across_slides():
    # Attention sums to one per bag: the few tiles of a small slide have far more each than any of a large one.
    small = ScoredSlide("small", "p", np.array([0.5, 0.3, 0.2]), np.array([1, 0, 0], np.int8))
    large = ScoredSlide("large", "q", np.array([0.02, *[0.01] * 98]), np.array([1, *[0] * 98], np.int8))
    assert localise([small, large], 50, 0).auroc.value == 1.0


def test_order_of_slides_and_size_of_scores_play_no_role():
    made = slides()
    scaled = [slide._replace(score_N=np.exp(slide.score_N)) for slide in made[::-1]]
    assert localise(made, 60, 3) == localise(scaled, 60, 3)


def test_slides_with_one_kind_of_tiles_are_left_out_and_counted():
    nothing = [
        ScoredSlide("all", "p8", np.arange(4.0), np.ones(4, np.int8)),
        ScoredSlide("none", "p9", np.arange(4.0), np.zeros(4, np.int8)),
        ScoredSlide("unknown", "p9", np.arange(4.0), np.array([1, UNKNOWN, UNKNOWN, UNKNOWN], np.int8)),
        ScoredSlide("unseen", "p9", np.array([np.nan, np.nan, 0.1, 0.2]), np.array([1, 1, 0, 0], np.int8)),
    ]
    made = slides()
    found = localise([*made, *nothing], 60, 0)
    assert found.left_out == 4
    assert found._replace(left_out=0) == localise(made, 60, 0)
    assert localise(nothing, 60, 0) is None
    assert localise([], 60, 0) is None


def test_tiles_of_unknown_truth_or_not_looked_at_play_no_role():
    base = ScoredSlide("s", "p", np.array([0.1, 0.4, 0.3]), np.array([0, 1, 0], np.int8))
    more = ScoredSlide("s", "p", np.array([0.1, 9.0, 0.4, np.nan, 0.3]), np.array([0, UNKNOWN, 1, 1, 0], np.int8))
    assert localise([base], 10, 0) == localise([more], 10, 0)


def test_pointing_game_shares_a_tie():
    truth = np.array([True, False, True, False])
    assert pointing_game(np.array([1.0, 1.0, 0.0, 0.0]), truth) == 0.5
    assert pointing_game(np.array([0.0, 0.0, 3.0, 1.0]), truth) == 1.0
    # The mean over all orders of breaking the tie.
    scores = np.array([2.0, 2.0, 2.0, 0.0])
    broken = [truth[order[0]] for order in itertools.permutations([0, 1, 2])]
    assert pointing_game(scores, truth) == pytest.approx(np.mean(broken))


def test_perfect_scores_have_a_lower_limit():
    assert mean_over_slides(np.ones(3), ["a", "b", "c"], 50, 0)[1:3] == (pytest.approx(0.025 ** (1 / 3)), 1.0)
    assert mean_over_slides(np.zeros(3), ["a", "b", "c"], 50, 0)[1:3] == (0.0, pytest.approx(1 - 0.025 ** (1 / 3)))
    assert mean_over_slides(np.ones(3), ["a", "a", "a"], 50, 0)[1:3] == (0.0, 1.0)


def test_equal_values_and_few_patients_are_not_certain():
    """All resamples of equal values are equal, which says nothing of further patients."""
    share = 0.025 ** (1 / 6)
    found = mean_over_slides(np.full(6, 0.75), list("abcdef"), 50, 0)
    assert found[:3] == pytest.approx((0.75, 0.75 * share, 1 - 0.25 * share)) and found.method == "exact"
    two = mean_over_slides(np.array([0.7, 0.9]), ["a", "b"], 50, 0)
    assert two.low == pytest.approx(0.7 * 0.025**0.5) and two.high == pytest.approx(1 - 0.1 * 0.025**0.5)
    rng, held = np.random.default_rng(1), 0
    for _ in range(300):
        held += (found := mean_over_slides(rng.beta(4, 1, 3), ["a", "b", "c"], 20, 0)).low <= 0.8 <= found.high
    assert held / 300 >= 0.95


def test_interval_covers_the_mean_of_all_patients():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        level = rng.beta(6, 2, size=20)  # patients differ, their two slides hardly do
        value = np.clip(level.repeat(2) + rng.normal(0, 0.02, 40), 0, 1)
        found = mean_over_slides(value, [f"p{index // 2}" for index in range(40)], 200, seed)
        covered += found.low <= 0.75 <= found.high
    assert covered >= 88


def test_record_is_ready_for_json():
    record = localise(slides(), 20, 0).record()
    assert set(record["localisation_auroc"]) == {"value", "low", "high", "n_slides", "n_patients", "method"}
    assert record["n_left_out"] == 0
