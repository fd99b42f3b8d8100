"""Feature files: readable with plain h5py, whole or absent, and nothing that is not a number."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest

from pathfm.errors import StoreError
from pathfm.store.feature_file import open_features, read_feature_attrs, write_features

PROGRAM = """
import sys, numpy as np
from pathlib import Path
from pathfm.store.feature_file import write_features
write_features(Path(sys.argv[1]), np.ones((5, 3), np.float32), np.zeros((5, 2), np.int64), {"fingerprint": "f"})
"""


def _write(path, rows=7):
    features = np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float16)
    write_features(path, features, np.arange(rows * 2).reshape(rows, 2), {"fingerprint": "f", "slide_id": "a", "mpp": 0.5})
    return features


def test_round_trip_and_plain_h5py(tmp_path):
    features = _write(tmp_path / "a.h5")
    read = open_features(tmp_path / "a.h5")
    np.testing.assert_array_equal(read.features, features)
    assert read.fingerprint == "f"
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["features"].chunks is None
        assert file["features"].dtype == np.float16
        np.testing.assert_array_equal(file["coords"][:], read.coords)


def test_same_features_give_the_same_bytes(tmp_path):
    _write(tmp_path / "a.h5")
    _write(tmp_path / "b.h5")
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


@pytest.mark.parametrize("point", ["store.feature_file.between_datasets", "store.commit.before_rename"])
def test_a_kill_leaves_no_file(tmp_path, point):
    environment = {**os.environ, "PATHFM_CRASH_AT": point}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "a.h5")], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "a.h5").exists()


def test_what_is_not_finite_or_does_not_fit_is_refused(tmp_path):
    with pytest.raises(StoreError, match="not finite"):
        write_features(tmp_path / "a.h5", np.full((2, 3), np.nan), np.zeros((2, 2), np.int64), {})
    with pytest.raises(StoreError, match="2 feature rows for 3 tiles"):
        write_features(tmp_path / "a.h5", np.zeros((2, 3)), np.zeros((3, 2), np.int64), {})
    assert list(tmp_path.iterdir()) == []


def test_truncated_foreign_and_newer_files_are_refused(tmp_path):
    _write(tmp_path / "a.h5", rows=5000)
    data = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(data[: len(data) // 2])
    with pytest.raises(StoreError, match="damaged"):
        open_features(tmp_path / "cut.h5")
    assert read_feature_attrs(tmp_path / "cut.h5") is None
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["features"] = np.zeros((2, 2))
    with pytest.raises(StoreError, match="not a pathfm feature file"):
        open_features(tmp_path / "foreign.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs["version"] = 7
    with pytest.raises(StoreError, match="newer pathfm"):
        open_features(tmp_path / "a.h5")
