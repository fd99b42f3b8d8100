import numpy as np
import pytest

from pathfm.stats.feature_health import (
    HealthCheck,
    SlideHealth,
    first_equal,
    mean_distances,
    near_copies,
    robust_z,
    row_digests,
    slide_outliers,
    usable_rows,
)
from pathfm.stats.probes import rankme
from pathfm.stats.row_sample import RowSample

DIM = 12


def cohort(slides=8, tiles=30, seed=0):
    rng = np.random.default_rng(seed)
    return {f"s{number}": (rng.normal(size=(tiles, DIM)) + 3).astype(np.float16) for number in range(slides)}


def checked(features, **options):
    check = HealthCheck(DIM, **options)
    for slide_id, feature_ND in features.items():
        check.add(slide_id, feature_ND)
    return check.finish()


def test_numbers_agree_with_plain_ones():
    features = cohort()
    health = checked(features)
    whole = np.concatenate(list(features.values())).astype(np.float64)
    assert (health.tiles, health.dim, health.unusable, health.copies, health.constant) == (240, DIM, 0, 0, 0)
    np.testing.assert_allclose(np.sort(health.norm_N), np.sort(np.linalg.norm(whole, axis=1)), rtol=1e-6)
    assert health.rank == pytest.approx(rankme(whole)) and health.sampled == 240
    for slide in health.slides:
        mine = features[slide.slide_id].astype(np.float64)
        np.testing.assert_allclose(slide.mean_D, mine.mean(axis=0), rtol=1e-6)
        assert slide.spread == pytest.approx(np.sqrt(np.square(mine - mine.mean(axis=0)).sum(axis=1).mean()))
    assert health.outliers == {}


def test_unusable_rows_are_counted_and_left_out():
    features = cohort()
    broken = features["s3"].astype(np.float32)
    broken[4, 2], broken[9, 0] = np.nan, np.inf
    valid = np.ones(30, dtype=np.uint8)
    valid[20] = 0
    assert usable_rows(broken, valid).sum() == 27
    check = HealthCheck(DIM)
    for slide_id, feature_ND in features.items():
        check.add(slide_id, broken if slide_id == "s3" else feature_ND, valid if slide_id == "s3" else None)
    health = check.finish()
    assert health.unusable == 3 and len(health.norm_N) == 237 and np.isfinite(health.norm_N).all()
    assert health.outliers == {"s3": ("3 of 30 rows are unusable",)}


def test_a_slide_without_usable_rows():
    features = cohort(6)
    features["s2"] = np.full((3, DIM), np.nan, dtype=np.float16)
    health = checked(features)
    assert list(health.outliers) == ["s2"] and np.isfinite(health.rank)
    alone = checked({"a": np.full((3, DIM), np.nan, dtype=np.float16)})
    assert alone.rank is None and alone.near_copies == 0 and alone.slide_share is None


def test_constant_dimensions():
    features = {slide_id: values.copy() for slide_id, values in cohort().items()}
    for values in features.values():
        values[:, 3], values[:, 7] = 0, 2
    features["s1"][:, 5] = 1  # constant in one slide only
    health = checked(features)
    assert (health.constant, health.zero) == (2, 1)


def test_copies_between_and_within_slides():
    features = cohort()
    features["s5"][:12] = features["s2"][4:16]
    features["s6"][1] = features["s6"][0]
    health = checked(features)
    assert health.copies == 13 and health.distinct == 227
    assert health.outliers == {"s5": ("12 of 30 tiles have the very features of tiles of s2",)}
    assert dict(health.slides[5].copies_of) == {"s2": 12}


def test_minus_zero_equals_zero():
    rows = np.array([[0.0, 1.0], [-0.0, 1.0], [0.0, 2.0]], dtype=np.float32)
    np.testing.assert_array_equal(first_equal(row_digests(rows)), [0, 0, 2])


def test_near_copies_agree_with_the_plain_count():
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(150, DIM))
    rows[7] = rows[90] + 1e-4
    rows[8] = rows[91] * 1.00001
    rows += 50  # a mean that would make all cosines one
    centred = rows - rows.mean(axis=0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -1)
    assert near_copies(rows) == int((cosine.max(axis=1) >= 0.999).sum()) == 4
    assert near_copies(rows, block_rows=13) == 4 and near_copies(rows[:1]) == 0


def test_a_slide_that_stands_out_is_named_with_the_reason():
    features = cohort(12, 40)
    features["s4"] = (features["s4"].astype(np.float32) + 6).astype(np.float16)
    features["s7"] = np.repeat(features["s7"][:1], 40, axis=0)
    outliers = checked(features).outliers
    assert any("far from the middle" in reason for reason in outliers["s4"])
    assert any("norms are" in reason for reason in outliers["s4"])
    assert "all its tiles have the same features" in outliers["s7"]
    assert set(outliers) == {"s4", "s7"}


def test_few_tiles_are_no_reason_to_stand_out():
    """The mean of one tile lies far from the middle, as it must."""
    rng = np.random.default_rng(2)
    features = {f"s{number:02d}": rng.normal(size=(1 if number < 4 else 200, DIM)).astype(np.float16) for number in range(24)}
    health = checked(features)
    assert health.outliers == {}
    ratio_S, _ = mean_distances(health.slides)
    assert ratio_S[:4].max() < 2


def test_of_few_slides_none_is_judged_by_its_mean():
    slides = [SlideHealth(f"s{n}", 9, 0, 1.0, np.full(DIM, 100.0 * (n == 0), np.float32), 0.1) for n in range(4)]
    assert slide_outliers(slides) == {}


def test_robust_z():
    np.testing.assert_allclose(robust_z(np.array([1.0, 2, 3, 4, 100])), np.array([-2, -1, 0, 1, 97]) / 1.4826)
    np.testing.assert_array_equal(robust_z(np.full(5, 3.0)), np.zeros(5))


def test_slide_share():
    rng = np.random.default_rng(3)
    apart = {f"s{n}": (rng.normal(size=(50, DIM)) + 20 * rng.normal(size=DIM)).astype(np.float32) for n in range(6)}
    assert checked(apart).slide_share > 0.95 and checked(cohort(6, 50)).slide_share < 0.03


def test_a_large_cohort_is_sampled_and_the_sample_does_not_depend_on_the_order():
    features = cohort(8, 50)
    forward, backward = checked(features, sample_rows=64), checked(dict(reversed(features.items())), sample_rows=64)
    assert forward.sampled == 64 and forward.tiles == 400
    assert forward.rank == backward.rank and forward.slide_share == backward.slide_share


def test_sample_is_fair_complete_when_it_fits_and_bounded():
    features = cohort(4, 100)
    features["big"] = np.zeros((4000, DIM), dtype=np.float16)
    sample = RowSample(440)
    for slide_id, values in features.items():
        sample.add(slide_id, values)
    rows = sample.finish()
    assert rows.total == 4400 and len(rows.values_ND) == 440 and rows.names == tuple(sorted(features))
    assert 360 < (rows.name_N == rows.names.index("big")).sum() < 440
    for name, row, values in zip(rows.name_N, rows.row_N, rows.values_ND, strict=True):
        np.testing.assert_array_equal(values, features[rows.names[name]][row])
    everything = RowSample(10_000)
    for slide_id in sorted(features):
        everything.add(slide_id, features[slide_id])
    np.testing.assert_array_equal(everything.finish().values_ND, np.concatenate([features[name] for name in sorted(features)]))
