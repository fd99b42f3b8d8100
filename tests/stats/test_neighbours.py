import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfm.stats import neighbours
from pathfm.stats.neighbours import Hit, SlideRows, nearest_tiles, tile_at


def slides(seed=0, count=5, dim=9, dtype=np.float16):
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        values = (rng.normal(size=(int(rng.integers(1, 60)), dim)) + 1).astype(dtype)
        found.append(SlideRows(f"s{number}", values, rng.random(len(values)) > 0.1))
    return found


def plain(query, searched, count):
    """Every cosine by itself, one sort."""
    query = np.asarray(query, dtype=np.float64)
    hits = []
    for slide in searched:
        for tile in np.flatnonzero(slide.usable_N).tolist():
            row = slide.feature_ND[tile].astype(np.float64)
            length = np.sqrt((row * row).sum())
            cosine = (row * (query / np.linalg.norm(query))).sum() / length if length else 0.0
            hits.append(Hit(slide.slide_id, tile, float(cosine)))
    return sorted(hits, key=lambda hit: (-hit.cosine, hit.slide_id, hit.tile))[:count]


@given(seed=st.integers(0, 10_000), count=st.integers(1, 300), block=st.sampled_from([1, 7, 8192]))
def test_agrees_with_the_plain_search(seed, count, block):
    searched = slides(seed)
    query = np.random.default_rng(seed + 1).normal(size=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "BLOCK_ROWS", block)
        assert nearest_tiles(query, searched, count) == plain(query, searched, count)


def test_ties_go_by_slide_and_tile_whatever_the_order_of_the_slides():
    row = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    searched = [SlideRows(name, np.repeat(row[None], 4, axis=0), np.ones(4, dtype=bool)) for name in ("b", "a", "c")]
    hits = nearest_tiles(row, searched, 6)
    assert [(hit.slide_id, hit.tile) for hit in hits] == [("a", 0), ("a", 1), ("a", 2), ("a", 3), ("b", 0), ("b", 1)]
    assert nearest_tiles(row, searched[::-1], 6) == hits


def test_features_that_hardly_differ_are_ranked_in_double_precision():
    rng = np.random.default_rng(0)
    base = rng.normal(size=64)
    rows = (base + 1e-6 * rng.normal(size=(500, 64))).astype(np.float32)
    searched = [SlideRows("a", rows, np.ones(500, dtype=bool))]
    assert nearest_tiles(base, searched, 20) == plain(base, searched, 20)


def test_rows_of_zeros_are_found_last():
    rows = np.array([[0, 0], [1, 0], [-1, 0]], dtype=np.float16)
    hits = nearest_tiles([1, 0], [SlideRows("a", rows, np.ones(3, dtype=bool))], 3)
    assert [(hit.tile, hit.cosine) for hit in hits] == [(1, 1.0), (0, 0.0), (2, -1.0)]


def test_nothing_usable_and_bad_queries():
    rows = np.ones((3, 2), dtype=np.float16)
    assert nearest_tiles([1, 0], [SlideRows("a", rows, np.zeros(3, dtype=bool))], 3) == []
    for query in ([0, 0], [np.nan, 1]):
        with pytest.raises(ValueError, match="zero or not finite"):
            nearest_tiles(query, [], 3)


GRID = np.array([[0, 0], [100, 0], [0, 50], [100, 50]])


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        ((0, 0), (0, True)),
        ((99.9, 49.9), (0, True)),
        ((100, 49), (1, True)),
        ((50, 50), (2, True)),
        ((199, 99), (3, True)),
        ((200, 99), (3, False)),
        ((-1, 20), (0, False)),
        ((1e6, 0), (1, False)),
    ],
)
def test_tile_at_a_point(point, expected):
    assert tile_at(GRID, (100, 50), point) == expected


def test_of_overlapping_tiles_the_one_with_the_nearest_centre():
    corners = np.array([[0, 0], [50, 0], [50, 0]])
    assert tile_at(corners, (100, 100), (60, 50)) == (0, True)
    assert tile_at(corners, (100, 100), (80, 50)) == (1, True)
    assert tile_at(np.array([[0, 0], [50, 0]]), (100, 100), (75, 50)) == (0, True)
