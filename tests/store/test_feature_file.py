"""Feature files: readable with plain h5py, whole or absent, the same however they were written; no damage goes unseen."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
import tracemalloc

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfm.errors import StoreError
from pathfm.store import feature_file
from pathfm.store.feature_file import FeatureWriter, open_features, read_feature_attrs, write_features

PROGRAM = """
import sys, numpy as np
from pathlib import Path
from pathfm.store.feature_file import write_features
write_features(Path(sys.argv[1]), np.ones((5, 3), np.float32), np.zeros((5, 2), np.int64), {"fingerprint": "f"})
"""
ATTRS = {"fingerprint": "f", "slide_id": "a Ünï", "mpp": 0.5, "empty": "", "flag": True, "tile_px": 224}
MANY = {**ATTRS, **{f"recipe_{number}": f"word {number}" for number in range(12)}, "recipe_dim": 4}


def _values(rows=7, dim=4, dtype=np.float16):
    return np.random.default_rng(0).normal(size=(rows, dim)).astype(dtype)


def _grid(rows=7):
    return np.arange(rows * 2).reshape(rows, 2) * 224


def _write(path, rows=7, attrs=ATTRS):
    features = _values(rows)
    write_features(path, features, _grid(rows), attrs)
    return features


def _writer(path, rows=7, dim=4, dtype="float32", **more):
    return FeatureWriter(path, rows, dim, dtype, _grid(rows), ATTRS, **more)


def _is_same(one, other):
    one, other = open_features(one), open_features(other)
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("features", "coords", "valid")]
    return one.attrs == other.attrs and all(np.array_equal(*pair) for pair in pairs)


def _version_1(path, features, coords):
    with h5py.File(path, "w", libver="latest") as file:
        file["features"], file["coords"] = features, coords
        file.attrs.update({"format": "pathfm-features", "version": 1, "fingerprint": "f"})


def test_round_trip_and_plain_h5py(tmp_path):
    features = _write(tmp_path / "a.h5")
    read = open_features(tmp_path / "a.h5")
    np.testing.assert_array_equal(read.features, features)
    assert read.valid.all() and read.valid.dtype == bool
    assert read.fingerprint == "f"
    assert read.attrs == {**ATTRS, "format": "pathfm-features", "version": 2} == read_feature_attrs(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5") as file:
        shapes = {name: (file[name].dtype.str, file[name].shape, file[name].chunks) for name in file}
        np.testing.assert_array_equal(file["features"][:], features)
        np.testing.assert_array_equal(file["coords"][:], _grid())
    assert shapes == {
        "features": ("<f2", (7, 4), None),
        "coords": ("<i8", (7, 2), None),
        "valid": ("|u1", (7,), None),
        "crc32": ("<u4", (7,), None),
    }


@pytest.mark.parametrize(("dtype", "stored"), [("float16", "float16"), ("float32", "float32"), ("float64", "float32")])
def test_types(tmp_path, dtype, stored):
    write_features(tmp_path / "a.h5", _values(dtype=dtype), _grid(), ATTRS)
    assert open_features(tmp_path / "a.h5").features.dtype == stored


@given(data=st.data(), rows=st.integers(0, 12), dtype=st.sampled_from(["float16", "float32"]))
def test_bytes_do_not_depend_on_how_rows_were_split(tmp_path_factory, data, rows, dtype):
    folder = tmp_path_factory.mktemp("split")
    features, valid = _values(rows, 3, np.float32), np.arange(rows) % 4 != 2
    cuts = sorted(data.draw(st.sets(st.integers(0, rows), max_size=6)) | {0, rows})
    parts = data.draw(st.permutations(list(itertools.pairwise(cuts))))
    with FeatureWriter(folder / "whole.h5", rows, 3, dtype, _grid(rows), ATTRS) as writer:
        writer.write(0, features, valid)
    shuffled = dict(reversed(ATTRS.items()))
    with FeatureWriter(folder / "parts.h5", rows, 3, dtype, _grid(rows), shuffled) as writer:
        for start, stop in parts:
            writer.write(start, np.asfortranarray(features[start:stop]), valid[start:stop])
    assert (folder / "whole.h5").read_bytes() == (folder / "parts.h5").read_bytes()
    read = open_features(folder / "parts.h5")
    np.testing.assert_array_equal(read.features, np.where(valid[:, None], features, 0).astype(dtype))
    np.testing.assert_array_equal(read.valid, valid)


def test_tiles_that_could_not_be_read_have_zeros_whatever_is_given(tmp_path):
    with _writer(tmp_path / "a.h5") as writer:
        writer.write(0, np.full((7, 4), np.nan), np.zeros(7, dtype=bool))
    read = open_features(tmp_path / "a.h5")
    assert not read.features.any() and not read.valid.any()


@pytest.mark.parametrize("point", ["store.feature_file.between_datasets", "store.commit.before_rename"])
def test_a_kill_leaves_no_file(tmp_path, point):
    environment = {**os.environ, "PATHFM_CRASH_AT": point}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "a.h5")], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "a.h5").exists()


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda writer: writer.write(0, _values(6)), "1 of 7 rows were not written, the first is 6"),
        (lambda writer: writer.write(1, _values(7)), "rows 1 to 8"),
        (lambda writer: writer.write(-1, _values(2)), "rows -1 to 1"),
        (lambda writer: writer.write(0, _values(7, 5)), "shape"),
        (lambda writer: writer.write(0, _values(4)[0]), "shape"),
        (lambda writer: [writer.write(start, _values(4)) for start in (0, 3)], "written before"),
        (lambda writer: writer.write(2, np.array([[0.0] * 4, [0, 0, np.nan, 0]])), "not finite as float32: tile 3"),
        (lambda writer: writer.write(0, np.full((7, 4), 1e300)), "not finite.*dtype: float32"),
    ],
)
def test_what_does_not_fit_leaves_nothing(tmp_path, wrong, match):
    with pytest.raises(StoreError, match=match), _writer(tmp_path / "a.h5") as writer:
        wrong(writer)
    assert list(tmp_path.iterdir()) == []


def test_what_float16_cannot_hold_is_refused(tmp_path):
    with pytest.raises(StoreError, match="not finite as float16"), _writer(tmp_path / "a.h5", dtype="float16") as writer:
        writer.write(0, np.full((7, 4), 7e4, np.float32))
    with pytest.raises(StoreError, match="2 feature rows for 3 tiles"):
        write_features(tmp_path / "a.h5", np.zeros((2, 3)), np.zeros((3, 2), np.int64), {})
    with pytest.raises(StoreError, match="length 3, where recipe_dim says 4"):
        write_features(tmp_path / "a.h5", np.zeros((2, 3)), np.zeros((2, 2), np.int64), {"recipe_dim": 4})
    assert list(tmp_path.iterdir()) == []


def test_commit_and_abort_end_a_file_that_is_no_block(tmp_path):
    writer = _writer(tmp_path / "a.h5")
    writer.write(0, _values())
    assert not (tmp_path / "a.h5").exists()
    writer.commit()
    writer.abort()
    before = (tmp_path / "a.h5").read_bytes()
    given_up = _writer(tmp_path / "a.h5")
    given_up.write(0, 2 * _values())
    given_up.abort()
    given_up.abort()
    assert (tmp_path / "a.h5").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_check_that_fails_at_the_end_changes_nothing(tmp_path):
    def lost():
        raise StoreError("lease lost")

    before = _write(tmp_path / "a.h5")
    with pytest.raises(StoreError, match="lease lost"), _writer(tmp_path / "a.h5", check=lost) as writer:
        writer.write(0, _values())
    np.testing.assert_array_equal(open_features(tmp_path / "a.h5").features, before)


@pytest.mark.parametrize("room", [0, 30, 200, 250])
def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path, monkeypatch, room):
    before = _write(tmp_path / "a.h5")
    left, pwrite = room, os.pwrite

    def full(handle, data, offset):
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = pwrite(handle, data[:left], offset)
        left -= written
        return written

    monkeypatch.setattr(feature_file.os, "pwrite", full)
    with (
        pytest.raises(StoreError, match=r"a\.h5: the disk is full \(make room") as caught,
        _writer(tmp_path / "a.h5") as writer,
    ):
        writer.write(0, _values())
    assert isinstance(caught.value.__cause__, OSError)
    np.testing.assert_array_equal(open_features(tmp_path / "a.h5").features, before)
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]


def test_a_file_that_is_replaced_while_it_is_read_is_current(tmp_path, monkeypatch):
    _write(tmp_path / "a.h5")
    errors = [OSError(errno.ESTALE, "Stale file handle")]

    class File(h5py.File):
        def __init__(self, *args):
            if errors:
                raise errors.pop()
            super().__init__(*args)

    monkeypatch.setattr(feature_file.h5py, "File", File)
    assert read_feature_attrs(tmp_path / "a.h5")["fingerprint"] == "f" and not errors


def test_a_write_that_stops_half_way_goes_on(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(feature_file.os, "pwrite", lambda handle, data, offset: pwrite(handle, data[:3], offset))
    features = _write(tmp_path / "a.h5")
    np.testing.assert_array_equal(open_features(tmp_path / "a.h5").features, features)


def test_memory_does_not_grow_with_the_slide(tmp_path):
    rows, dim, part = 60_000, 512, np.ones((512, 512), np.float32)
    coords = np.zeros((rows, 2), np.int64)
    tracemalloc.start()
    with FeatureWriter(tmp_path / "a.h5", rows, dim, "float16", coords, ATTRS) as writer:
        for start in range(0, rows, len(part)):
            writer.write(start, part[: rows - start])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6 < (tmp_path / "a.h5").stat().st_size


def test_every_truncation_is_refused(tmp_path):
    _write(tmp_path / "a.h5", rows=64, attrs=MANY)
    data, cut = (tmp_path / "a.h5").read_bytes(), tmp_path / "cut.h5"
    for length in {*range(0, len(data), 41), len(data) - 1, len(data) - 2}:
        cut.write_bytes(data[:length])
        with pytest.raises(StoreError) as caught:
            open_features(cut)
        assert "\n" not in str(caught.value)
        assert read_feature_attrs(cut) is None
        cut.write_bytes(data[:length] + bytes(len(data) - length))  # what a drive may leave of a file after a power cut
        if data[length:].strip(b"\0") and read_feature_attrs(cut):  # what is lost is room that HDF5 does not use
            assert _is_same(cut, tmp_path / "a.h5")


def test_no_flipped_byte_is_ever_used(tmp_path):
    _write(tmp_path / "a.h5", rows=9, attrs=MANY)
    data, copy = (tmp_path / "a.h5").read_bytes(), tmp_path / "b.h5"
    noticed = 0
    for number, place in enumerate(range(0, len(data), 17)):
        copy.write_bytes(data[:place] + bytes([data[place] ^ 1 << number % 8]) + data[place + 1 :])
        try:
            assert _is_same(copy, tmp_path / "a.h5")  # room that HDF5 does not use
        except StoreError:
            noticed += 1
    assert noticed > 100


def test_rows_that_changed_places_are_noticed(tmp_path):
    _write(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["features"][:2] = file["features"][:2][::-1].copy()
    with pytest.raises(StoreError, match="damaged features: 2 rows, the first is 0"):
        open_features(tmp_path / "a.h5")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("rows", [3, 2000])
def test_features_filled_with_nan_do_not_pass_as_current(tmp_path, version, rows):
    features = _values(rows)
    if version == 1:
        _version_1(tmp_path / "a.h5", features, _grid(rows))
    else:
        _write(tmp_path / "a.h5", rows)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["features"][...] = np.nan
    assert read_feature_attrs(tmp_path / "a.h5") is None
    with pytest.raises(StoreError, match=f"not finite: {rows} rows, the first is 0"):
        open_features(tmp_path / "a.h5")


def test_zeros_that_were_never_written_do_not_pass_as_current(tmp_path):
    _write(tmp_path / "a.h5", rows=2000)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["features"][1500:] = 0
    assert read_feature_attrs(tmp_path / "a.h5") is None
    with pytest.raises(StoreError, match="damaged features: 500 rows, the first is 1500"):
        open_features(tmp_path / "a.h5")


def test_a_dimension_that_is_not_the_one_stated_does_not_pass(tmp_path):
    _write(tmp_path / "a.h5", attrs=MANY)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs["recipe_dim"] = 5
    assert read_feature_attrs(tmp_path / "a.h5") is None
    with pytest.raises(StoreError, match="features of length 4, where recipe_dim says 5"):
        open_features(tmp_path / "a.h5")


@pytest.mark.parametrize("missing", ["features", "coords", "valid", "crc32"])
def test_a_dataset_that_is_absent_or_of_another_shape_does_not_pass(tmp_path, missing):
    for instead in (None, np.zeros((8, 4), np.float16), np.zeros((8, 2), np.int64), np.zeros((7,), "S1")):
        _write(tmp_path / "a.h5")
        with h5py.File(tmp_path / "a.h5", "a") as file:
            del file[missing]
            if instead is not None:
                file[missing] = instead
        assert read_feature_attrs(tmp_path / "a.h5") is None
        with pytest.raises(StoreError):
            open_features(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        del file[missing]
        file.create_group(missing)
    assert read_feature_attrs(tmp_path / "a.h5") is None
    with pytest.raises(StoreError, match="damaged"):
        open_features(tmp_path / "a.h5")


def test_version_1_is_read(tmp_path):
    _version_1(tmp_path / "a.h5", _values(), _grid())
    read = open_features(tmp_path / "a.h5")
    np.testing.assert_array_equal(read.features, _values())
    assert read.valid.all() and len(read.valid) == 7
    assert read_feature_attrs(tmp_path / "a.h5")["fingerprint"] == "f"


def test_slides_without_tiles(tmp_path):
    _write(tmp_path / "a.h5", rows=0)
    assert open_features(tmp_path / "a.h5").features.shape == (0, 4)
    assert read_feature_attrs(tmp_path / "a.h5")["mpp"] == 0.5


def test_foreign_and_newer_files_are_refused(tmp_path):
    _write(tmp_path / "a.h5")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["features"] = np.zeros((2, 2))
    with pytest.raises(StoreError, match=r"not a pathfm feature file.*read_features"):
        open_features(tmp_path / "foreign.h5")
    assert read_feature_attrs(tmp_path / "foreign.h5") is None
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs["version"] = 7
    with pytest.raises(StoreError, match="newer pathfm"):
        open_features(tmp_path / "a.h5")
    assert read_feature_attrs(tmp_path / "a.h5") is None
    (tmp_path / "text.h5").write_text("hello")
    for name, match in (("text.h5", "damaged"), ("absent.h5", "no feature file")):
        with pytest.raises(StoreError, match=match):
            open_features(tmp_path / name)
        assert read_feature_attrs(tmp_path / name) is None
