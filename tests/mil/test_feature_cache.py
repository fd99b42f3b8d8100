"""The feature cache: what it knows of a slide, what it keeps, what it refuses."""

import h5py
import numpy as np
import pytest

from pathfm.errors import StoreError
from pathfm.mil.feature_cache import FeatureCache
from pathfm.store.feature_file import FeatureWriter, write_features
from pathfm.store.interop.foreign_features import ForeignFeatures


def grid(count, side=16):
    return np.stack([np.arange(count) % 3, np.arange(count) // 3], 1).astype(np.int64) * side


def features(count=7, dim=5, dtype=np.float16, seed=0):
    return np.random.default_rng(seed).normal(3, 2, (count, dim)).astype(dtype)


def written(path, values, attrs=None):
    write_features(path, values, grid(len(values)), {"fingerprint": "f", **(attrs or {})})
    return path


def read_foreign(path):
    with h5py.File(path, "r") as file:
        return ForeignFeatures("other", file["features"][()], file["coords"][()].astype(float), 16.0)


def write_chunked(path, values):
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=values, chunks=(1, values.shape[1]))
        file["coords"] = grid(len(values))
    return path


@pytest.mark.parametrize("budget", [0, 10**6], ids=["from disk", "in memory"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_features_come_back_to_the_bit_and_are_counted(tmp_path, budget, dtype):
    values = features(dtype=dtype)
    with FeatureCache(budget, tmp_path / "scratch") as cache:
        facts = cache.add("s", written(tmp_path / "s.h5", values))
        for _ in range(3):
            np.testing.assert_array_equal(cache.read("s"), values)
        assert cache.bytes_read == 3 * values.nbytes
        assert cache.bytes_from_disk == (0 if budget else 3 * values.nbytes)
        assert cache.pinned_bytes == (values.nbytes if budget else 0)
    assert len(facts) == 7
    assert facts.dim == 5
    assert not (tmp_path / "scratch").exists()  # they lie contiguously already


def test_sums_are_exact_over_many_blocks(tmp_path):
    values = features(1500, 3)
    with FeatureCache(0, tmp_path) as cache:
        facts = cache.add("s", written(tmp_path / "s.h5", values))
    np.testing.assert_allclose(facts.mean_D, values.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(facts.square_D, (values.astype(np.float64) ** 2).sum(0), rtol=1e-12)


@pytest.mark.parametrize("budget", [0, 10**6], ids=["from disk", "in memory"])
def test_tiles_that_could_not_be_read_are_left_out(tmp_path, budget):
    values, valid = features(), np.array([True, False, True, True, False, True, True])
    with FeatureWriter(tmp_path / "s.h5", 7, 5, "float16", grid(7), {"fingerprint": "f"}) as writer:
        writer.write(0, values, valid)
    with FeatureCache(budget, tmp_path / "scratch") as cache:
        facts = cache.add("s", tmp_path / "s.h5")
        np.testing.assert_array_equal(cache.read("s"), values[valid])
        same = cache.add("t", written(tmp_path / "t.h5", values[valid]))
    assert facts.kept.tolist() == [0, 2, 3, 5, 6]
    assert facts.file_rows == 7
    assert facts.digest == same.digest
    np.testing.assert_array_equal(facts.xy_level0, grid(7)[valid])


def test_slides_are_kept_in_memory_until_the_budget_is_full(tmp_path):
    values = features()
    with FeatureCache(0, tmp_path) as cache:
        needed = cache.add("a", written(tmp_path / "a.h5", values)).nbytes
    with FeatureCache(3 * needed + 2 * values.nbytes + 1, tmp_path) as cache:
        for name in "abc":
            cache.add(name, written(tmp_path / f"{name}.h5", values))
        assert cache.pinned_bytes == 2 * values.nbytes
        for name in "abc":
            cache.read(name)
        assert cache.bytes_from_disk == values.nbytes
        cache.add("a", tmp_path / "a.h5")
        assert cache.pinned_bytes == 2 * values.nbytes


def test_what_is_known_of_slides_counts_too_and_features_make_room_for_it(tmp_path):
    """Otherwise memory would grow with the cohort, whatever the budget."""
    values = features()
    with FeatureCache(10**6, tmp_path) as cache:
        for name in "ab":
            cache.add(name, written(tmp_path / f"{name}.h5", values))
        cache.budget_bytes = 3 * cache.facts["a"].nbytes + values.nbytes + 1
        cache.add("c", written(tmp_path / "c.h5", values))
        assert cache.facts_bytes + cache.pinned_bytes <= cache.budget_bytes
        assert cache.pinned_bytes == values.nbytes
        for name in "abc":
            np.testing.assert_array_equal(cache.read(name), values)
        assert cache.bytes_from_disk == 2 * values.nbytes


def test_row_chunked_files_are_copied_once_and_said_so(tmp_path, capsys):
    values = features(50)
    path = write_chunked(tmp_path / "s.h5", values)
    reads = []

    def read(path):
        reads.append(path)
        return read_foreign(path)

    with FeatureCache(0, tmp_path / "scratch") as cache:
        for name in "ab":
            cache.add(name, path, read)
        for _ in range(5):
            np.testing.assert_array_equal(cache.read("a"), values)
        assert cache.repacked == ["a", "b"]
        assert len(reads) == 2
        assert list((tmp_path / "scratch").rglob("*.raw"))
    assert "copied once" in capsys.readouterr().out
    assert not list((tmp_path / "scratch").rglob("*"))


def test_contiguous_files_of_other_tools_are_read_in_place(tmp_path):
    values = features()
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["features"], file["coords"] = values, grid(7)
    with FeatureCache(0, tmp_path / "scratch") as cache:
        facts = cache.add("s", tmp_path / "s.h5", read_foreign)
        np.testing.assert_array_equal(cache.read("s"), values)
        assert not cache.repacked
    assert facts.encoder["tool"] == "other"
    assert facts.tile_side_level0 == (16.0, 16.0)


def test_what_a_reader_changes_is_not_read_in_place(tmp_path):
    path = written(tmp_path / "s.h5", features())
    with FeatureCache(0, tmp_path / "scratch") as cache:
        cache.add("s", path, lambda _: ForeignFeatures("other", features()[::-1]))
        np.testing.assert_array_equal(cache.read("s"), features()[::-1])
        assert cache.repacked == ["s"]


def test_copied_features_have_the_same_hashes_whatever_their_type_and_order(tmp_path):
    values = features(40)
    with FeatureCache(0, tmp_path) as cache:
        first = cache.add("a", written(tmp_path / "a.h5", values))
        copied = cache.add("b", written(tmp_path / "b.h5", values[::-1].astype(np.float32)))
        other = cache.add("c", written(tmp_path / "c.h5", features(40, seed=1)))
    assert set(first.row_hashes.tolist()) == set(copied.row_hashes.tolist())
    assert not set(first.row_hashes.tolist()) & set(other.row_hashes.tolist())
    assert first.digest != copied.digest


def test_hashes_of_a_million_near_twins_are_all_different():
    from pathfm.mil.feature_cache import _row_hashes

    bits = np.zeros((2**18, 8), np.uint16)
    for column in range(8):  # rows that differ in few bits, of the same value classes
        bits[:, column] = (np.arange(2**18) >> (column * 3)) & 7
    hashes = _row_hashes(bits.view(np.float16))
    assert len(np.unique(hashes)) == len(np.unique(bits, axis=0))


def test_the_tile_side_is_taken_from_the_file_or_from_the_grid(tmp_path):
    with FeatureCache(0, tmp_path) as cache:
        stated = cache.add("a", written(tmp_path / "a.h5", features(), {"tile_side_level0": 32.0, "tile_height_level0": 8.0}))
        seen = cache.add("b", written(tmp_path / "b.h5", features()))
        alone = cache.add("c", written(tmp_path / "c.h5", features(1)))
    assert stated.tile_side_level0 == (32.0, 8.0)
    assert seen.tile_side_level0 == (16.0, 16.0)
    assert alone.tile_side_level0 == (1.0, 1.0)


def test_absent_damaged_and_changed_files_are_refused_by_name(tmp_path):
    path = written(tmp_path / "s.h5", features(600, 64))
    with FeatureCache(0, tmp_path / "scratch") as cache:
        with pytest.raises(StoreError, match="no feature file"):
            cache.add("x", tmp_path / "x.h5")
        cache.add("s", path)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(StoreError, match="changed"):
            cache.read("s")
        with pytest.raises(StoreError, match="damaged"):
            cache.add("t", path)
        path.unlink()
        with pytest.raises(StoreError, match="cannot be read any more"):
            cache.read("s")
