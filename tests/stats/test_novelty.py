"""Out of distribution: new bags of the same kind are rarely marked, others mostly, whatever the shape of the table."""

import json

import numpy as np
import pytest

from pathfm.stats.novelty import MOST_REFERENCES, fit_novelty, novelty_from_record


def names(count):
    return [f"p{number:04d}" for number in range(count)]


def bags(rng, count, dim, spread=1.0):
    """Features on different scales, with a few common directions."""
    common = np.random.default_rng(99).normal(size=(4, dim))
    return (rng.normal(size=(count, 4)) @ common + rng.normal(size=(count, dim))) * np.linspace(0.01, 10, dim) * spread + 3


@pytest.mark.parametrize(("count", "dim"), [(12, 512), (20, 64), (40, 1024), (200, 32)])
def test_new_bags_of_the_same_kind_are_marked_as_rarely_as_expected(count, dim):
    rates, expected = [], []
    for seed in range(25):
        rng = np.random.default_rng([seed, count])
        novelty = fit_novelty(bags(rng, count, dim), names(count), 0.9)
        rates.append((novelty.distance(bags(rng, 200, dim)) > novelty.limit).mean())
        expected.append(novelty.expected)
    # A little more rarely with few bags: the limit is that of distances to one patient less.
    assert 0.4 * np.mean(expected) < np.mean(rates) < np.mean(expected) + 0.03


def test_shifted_scanner_blank_and_noise_are_marked():
    rng = np.random.default_rng(0)
    train = bags(rng, 60, 128)
    novelty = fit_novelty(train, names(60), 0.99)
    others = {
        "shifted": bags(rng, 50, 128) + 3 * train.std(axis=0),
        "blank": np.zeros((1, 128)),
        "stretched": bags(rng, 50, 128, spread=4.0),
        "not finite": np.full((1, 128), np.nan),
    }
    for name, mean in others.items():
        assert (novelty.distance(mean) > novelty.limit).mean() > 0.95, name


def test_a_constant_feature_that_changes_is_news_and_its_rounding_is_not():
    rng = np.random.default_rng(0)
    train = bags(rng, 30, 16)
    train[:, 3], train[:, 4] = 0.1, 1e4 * (1 + 1e-9 * rng.normal(size=30))
    novelty = fit_novelty(train, names(30), 0.99)
    same = train[:1] * (1 + 1e-8)
    assert novelty.distance(same)[0] < novelty.limit
    changed = same.copy()
    changed[0, 3] = 100.0
    assert novelty.distance(changed)[0] > 2 * novelty.limit


def test_bags_that_are_all_the_same():
    novelty = fit_novelty(np.full((5, 8), 0.1), names(5), 0.99)
    assert (novelty.distance(np.full((1, 8), 0.1)) <= novelty.limit).all()
    assert (novelty.distance(np.full((1, 8), 0.2)) > novelty.limit).all()


def test_a_patient_is_measured_against_others_only():
    rng = np.random.default_rng(0)
    one = bags(rng, 30, 32)
    twice = np.concatenate([one, one])
    alone = fit_novelty(twice, names(30) + names(30), 0.99)
    as_others = fit_novelty(twice, names(60), 0.99)
    assert alone.limit > 1.2 * as_others.limit
    assert alone.limit == pytest.approx(fit_novelty(one, names(30), 0.99).limit, rel=0.2)


def test_a_patient_with_very_many_bags_leaves_room_for_the_others():
    rng = np.random.default_rng(0)
    owner = ["big"] * 600 + ["a", "b", "c"]
    novelty = fit_novelty(bags(rng, 603, 8), owner, 0.99)
    assert np.isfinite(novelty.limit)
    assert novelty.neighbours == 3


def test_two_patients_are_too_few():
    with pytest.raises(ValueError, match="three patients, not 2"):
        fit_novelty(np.eye(4), ["a", "a", "b", "b"], 0.99)


def test_another_number_of_features_is_an_error():
    novelty = fit_novelty(np.eye(4), names(4), 0.99)
    with pytest.raises(ValueError, match="5 features, but the training bags had 4"):
        novelty.distance(np.zeros((1, 5)))


def test_neither_order_nor_company_matters():
    rng = np.random.default_rng(0)
    train, new = bags(rng, 40, 64), bags(rng, 20, 64)
    order = rng.permutation(40)
    novelty, shuffled = (
        fit_novelty(train, names(40), 0.95),
        fit_novelty(train[order], np.array(names(40))[order].tolist(), 0.95),
    )
    assert shuffled.record() == novelty.record()
    np.testing.assert_array_equal(novelty.distance(new), [novelty.distance(row)[0] for row in new])


def test_a_record_gives_the_same_back_and_names_nobody():
    rng = np.random.default_rng(0)
    novelty = fit_novelty(bags(rng, 40, 64), names(40), 0.95)
    text = json.dumps(novelty.record(), sort_keys=True, allow_nan=False)
    assert "p00" not in text
    back, new = novelty_from_record(json.loads(text)), bags(rng, 20, 64)
    assert back.record() == novelty.record()
    np.testing.assert_array_equal(back.distance(new), novelty.distance(new))


def test_large_cohorts_keep_few_references():
    rng = np.random.default_rng(0)
    novelty = fit_novelty(bags(rng, 700, 16), names(700), 0.95)
    assert len(novelty.reference_RD) == MOST_REFERENCES
    assert (novelty.distance(bags(rng, 1000, 16)) > novelty.limit).mean() == pytest.approx(novelty.expected, abs=0.03)
