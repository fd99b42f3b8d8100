"""Bags over a cache: order, places, statistics, and what must not be mixed."""

import numpy as np
import pytest
import torch

from pathfm.errors import StoreError
from pathfm.mil.bags import Bags
from pathfm.mil.feature_cache import FeatureCache
from pathfm.store.feature_file import write_features

SIDE = 16


@pytest.fixture
def cache(tmp_path):
    with FeatureCache(10**6, tmp_path / "scratch") as cache:
        yield cache


def add(cache, tmp_path, slide_id, count, dim=4, **attrs):
    values = np.random.default_rng(len(slide_id) * 1000 + count).normal(2, 3, (count, dim)).astype(np.float16)
    xy_level0 = np.stack([np.arange(count) % 3, np.arange(count) // 3], 1).astype(np.int64) * SIDE + 1000
    attrs = {"fingerprint": "f", "tile_side_level0": float(SIDE), "recipe_weights_sha256": "w", **attrs}
    write_features(tmp_path / f"{slide_id}.h5", values, xy_level0, attrs)
    cache.add(slide_id, tmp_path / f"{slide_id}.h5")
    return values


def test_a_bag_is_its_slides_one_after_another(cache, tmp_path):
    a, b = add(cache, tmp_path, "a", 5), add(cache, tmp_path, "b", 4)
    bags = Bags(cache, [("a", "b"), ("b",)])
    assert len(bags) == 2
    assert bags.lengths == (9, 4)
    assert bags.dim == 4
    bag = bags.read(0)
    np.testing.assert_array_equal(bag.feature_ND.numpy(), np.concatenate([a, b]))
    assert bag.feature_ND.dtype == torch.float16
    split = bags.split(0, np.arange(18).reshape(9, 2))
    assert {name: value[:, 0].tolist() for name, value in split.items()} == {"a": [0, 2, 4, 6, 8], "b": [10, 12, 14, 16]}


def test_slides_of_a_bag_lie_side_by_side_in_tile_sides(cache, tmp_path):
    add(cache, tmp_path, "a", 5)
    add(cache, tmp_path, "b", 4)
    xy_N2 = Bags(cache, [("a", "b")]).read(0).xy_N2
    assert xy_N2.dtype == torch.float32
    assert xy_N2[:5].tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1]]
    assert xy_N2[5:].tolist() == [[4, 0], [5, 0], [6, 0], [4, 1]]


def test_statistics_are_those_of_all_tiles_without_reading_any(cache, tmp_path):
    a, b = add(cache, tmp_path, "a", 500), add(cache, tmp_path, "b", 40)
    bags = Bags(cache, [("a",), ("b",), ("a", "b")])
    everything = np.concatenate([a, b]).astype(np.float64)
    for places in ([0, 1], [2]):
        mean_D, scale_D = bags.statistics(places)
        np.testing.assert_allclose(mean_D, everything.mean(0), rtol=1e-6)
        np.testing.assert_allclose(scale_D, everything.std(0), rtol=1e-6)
    np.testing.assert_allclose(bags.mean(2), everything.mean(0), rtol=1e-12)
    assert cache.bytes_read == 0


def test_a_feature_that_never_varies_is_not_blown_up(cache, tmp_path):
    xy_level0 = np.zeros((3, 2), np.int64)
    write_features(tmp_path / "c.h5", np.full((3, 2), 7.0, np.float16), xy_level0, {"fingerprint": "f"})
    cache.add("c", tmp_path / "c.h5")
    assert Bags(cache, [("c",)]).statistics([0])[1].tolist() == [1.0, 1.0]


def test_the_digest_is_of_content_and_order(cache, tmp_path):
    for name, count in (("a", 5), ("b", 4)):
        add(cache, tmp_path, name, count)
    bags = Bags(cache, [("a", "b"), ("b", "a"), ("a",), ("a", "b")])
    digests = [bags.digest(place) for place in range(4)]
    assert digests[0] == digests[3]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("difference", "what"),
    [({"dim": 6}, "different lengths"), ({"recipe_weights_sha256": "other"}, "different encoders")],
)
def test_features_of_different_encoders_are_not_mixed(cache, tmp_path, difference, what):
    for name in "ab":
        add(cache, tmp_path, name, 4)
    add(cache, tmp_path, "odd", 4, **difference)
    with pytest.raises(StoreError, match=f"{what}.*odd differs"):
        Bags(cache, [("a",), ("b",), ("odd",)])
    assert len(Bags(cache, [("a",), ("b",)])) == 2
