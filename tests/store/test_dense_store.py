"""Dense stores: plain zarr reads them, they appear whole or not at all, and damage is told."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zarr

from pathfm.errors import StoreError
from pathfm.store import dense_store
from pathfm.store.commit import content_digest, sweep
from pathfm.store.dense_store import DenseWriter, open_dense, patch_frame, read_dense_attrs

SHAPE = (3, 4, 8)
TILE_BYTES = 3 * 4 * 8 * 2
ATTRS = {"slide_id": "s1", "fingerprint": "f00d", "mpp": float("nan"), "tile_px": 224}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(dense_store, "SHARD_BYTES", 4 * TILE_BYTES)


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, *SHAPE)).astype(np.float32)


def corners(count: int) -> np.ndarray:
    return np.arange(2 * count, dtype=np.int64).reshape(count, 2)


def written(path: Path, values: np.ndarray, splits: list[int] | None = None, dtype: str = "float16") -> Path:
    with DenseWriter(path, len(values), SHAPE, dtype, corners(len(values)), ATTRS) as writer:
        for start, stop in zip([0, *(splits or [])], [*(splits or []), len(values)], strict=True):
            writer.write(start, values[start:stop])
    return path


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_plain_zarr_reads_what_we_read(tmp_path, dtype):
    values = rows(10)
    path = written(tmp_path / "s1.zarr", values, [3, 4], dtype)
    group = zarr.open_group(path, mode="r")
    np.testing.assert_array_equal(group["features"][...], values.astype(dtype))
    np.testing.assert_array_equal(group["coords"][...], corners(10))
    assert group["features"].chunks == (1, *SHAPE) and group["valid"][...].all()
    store = open_dense(path)
    assert (len(store), store.grid, store.dim, store.slide_id, store.fingerprint) == (10, (3, 4), 8, "s1", "f00d")
    assert store.attrs["mpp"] is None and store.attrs["tile_px"] == 224
    np.testing.assert_array_equal(store.read([9, 0, 4]), values[[9, 0, 4]].astype(dtype))
    np.testing.assert_array_equal(store[7], group["features"][7])
    np.testing.assert_array_equal(store.coords, corners(10))
    assert store.valid.tolist() == [True] * 10
    with pytest.raises(IndexError):
        store[10]
    store.close()


def test_a_slide_is_a_few_files(tmp_path, monkeypatch):
    monkeypatch.undo()
    path = written(tmp_path / "s1.zarr", rows(500))
    assert len([file for file in path.rglob("*") if file.is_file()]) == 7  # one shard, coords, valid, and four of metadata


@pytest.mark.parametrize("splits", [[1], [4], [1, 2, 3, 4, 5, 6, 7, 8], [3, 9]])
def test_bytes_do_not_depend_on_how_tiles_were_split(tmp_path, splits):
    values = rows(10)
    assert content_digest(written(tmp_path / "a.zarr", values, splits)) == content_digest(written(tmp_path / "b.zarr", values))


def test_no_tiles(tmp_path):
    path = written(tmp_path / "s1.zarr", rows(0))
    store = open_dense(path)
    assert len(store) == 0 and store.coords.shape == (0, 2) and store.read([]).shape == (0, *SHAPE)
    assert zarr.open_group(path, mode="r")["features"].shape == (0, *SHAPE)


def test_unreadable_tiles_are_zeros_and_said(tmp_path):
    values = rows(5)
    values[2] = np.nan
    with DenseWriter(tmp_path / "s1.zarr", 5, SHAPE, "float16", corners(5), ATTRS) as writer:
        writer.write(0, values, np.array([True, True, False, True, True]))
    store = open_dense(tmp_path / "s1.zarr")
    assert store.valid.tolist() == [True, True, False, True, True] and not store[2].any() and store[1].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_what_is_not_finite_is_refused(tmp_path, bad):
    values = rows(3)
    values[1, 0, 0, 0] = bad
    with pytest.raises(StoreError, match="not finite"):
        written(tmp_path / "s1.zarr", values)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("start", "count", "shape"), [(1, 2, SHAPE), (0, 6, SHAPE), (0, 2, (4, 3, 8))], ids=["a gap", "too many", "another shape"]
)
def test_tiles_out_of_order_are_refused(tmp_path, start, count, shape):
    writer = DenseWriter(tmp_path / "s1.zarr", 5, SHAPE, "float16", corners(5), ATTRS)
    with pytest.raises(StoreError, match="tiles"):
        writer.write(start, np.zeros((count, *shape), dtype=np.float32))
    writer.abort()
    writer.abort()
    assert not list(tmp_path.iterdir())


def test_tiles_left_out_leave_what_was_there(tmp_path):
    path = written(tmp_path / "s1.zarr", rows(5))
    before = content_digest(path)
    with (
        pytest.raises(StoreError, match="4 of 5 tiles"),
        DenseWriter(path, 5, SHAPE, "float16", corners(5), ATTRS) as writer,
    ):
        writer.write(0, rows(4))
    assert content_digest(path) == before and [file.name for file in tmp_path.iterdir()] == ["s1.zarr"]


def test_a_lost_lease_changes_nothing(tmp_path):
    def check() -> None:
        raise StoreError("the lease is lost")

    writer = DenseWriter(tmp_path / "s1.zarr", 2, SHAPE, "float16", corners(2), ATTRS, check)
    writer.write(0, rows(2))
    with pytest.raises(StoreError, match="lease is lost"):
        writer.commit()
    writer.abort()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(self: object, chunk: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dense_store._ShardStream, "append", full)
    with pytest.raises(StoreError, match="disk is full"):
        written(tmp_path / "s1.zarr", rows(2))
    assert not list(tmp_path.iterdir())


KILLED = """
import numpy, sys
from pathlib import Path
from pathfm.store.dense_store import DenseWriter
with DenseWriter(Path(sys.argv[1]), 3, (3, 4, 8), "float16", numpy.zeros((3, 2), dtype=numpy.int64), {}) as writer:
    writer.write(0, numpy.ones((3, 3, 4, 8)))
"""


def test_a_kill_leaves_what_was_there(tmp_path):
    path = written(tmp_path / "s1.zarr", rows(2))
    before = content_digest(path)
    environment = {**os.environ, "PATHFM_CRASH_AT": "store.dense_store.before_metadata"}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=environment)
    assert killed.returncode == -signal.SIGKILL and content_digest(path) == before
    assert len(list(tmp_path.iterdir())) == 2  # the torn one lies beside it, until it is swept
    sweep(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["s1.zarr"] and open_dense(path)[1].any()


def test_memory_does_not_grow_with_the_slide(tmp_path, monkeypatch):
    monkeypatch.setattr(dense_store, "SHARD_BYTES", 400 * TILE_BYTES)
    batch = rows(8)

    def peak(count: int) -> int:
        tracemalloc.start()
        with DenseWriter(tmp_path / f"{count}.zarr", count, SHAPE, "float16", corners(count), ATTRS) as writer:
            for start in range(0, count, 8):
                writer.write(start, batch)
            most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    few, many = peak(400), peak(1200)
    assert many - few < 60 * 800  # a byte of validity and sixteen of coordinates per tile, where features take 192


def test_damage_is_told(tmp_path):
    path = written(tmp_path / "s1.zarr", rows(6))
    shard = path / "features/c/0/0/0/0"
    content = bytearray(shard.read_bytes())
    content[TILE_BYTES + 4 + 10] ^= 1  # a bit of tile 1
    shard.write_bytes(content)
    store = open_dense(path)
    assert store[0].any() and read_dense_attrs(path)
    with pytest.raises(StoreError, match=r"tile 1 is damaged .*extract"):
        store[1]
    shard.write_bytes(content[:-7])
    with pytest.raises(StoreError, match=r"damaged .*extract"):
        open_dense(path)
    shard.unlink()
    assert read_dense_attrs(path) is None


def test_what_is_no_dense_store_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"no dense features .*extract\.dense"):
        open_dense(tmp_path / "absent.zarr")
    zarr.create_group(tmp_path / "foreign.zarr")
    with pytest.raises(StoreError, match="not a store of pathfm's"):
        open_dense(tmp_path / "foreign.zarr")
    path = written(tmp_path / "s1.zarr", rows(1))
    meta = path / "zarr.json"
    meta.write_text(meta.read_text().replace('"version": 1', '"version": 99'))
    with pytest.raises(StoreError, match="newer pathfm"):
        open_dense(path)
    for name, damage in {"grid": [4], "dim": None, "dtype": "text", "shard_tiles": 0, "tiles": "x", "slide_id": 5}.items():
        content = json.loads(meta.read_text())
        content["attributes"]["pathfm"] |= {"version": 1, name: damage}
        meta.write_text(json.dumps(content))
        with pytest.raises(StoreError, match=f"attribute {name} is damaged"):
            open_dense(path)
        written(path, rows(1))
    with pytest.raises(StoreError, match="coordinates of 2"):
        DenseWriter(path, 3, SHAPE, "float16", corners(2), ATTRS)


def test_patches_lie_where_the_resize_and_the_crop_put_them():
    # Pixel centres of a 512 px tile, taken through a resize to 256 and a crop to the middle 224.
    frame = patch_frame(512.0, 256, 224, 14)
    assert frame == {"patch_px": 16.0, "patch_stride_level0": 32.0, "patch_offset_level0": 32.0}
    assert patch_frame(448.5, 224, 224, 16)["patch_offset_level0"] == 0.0
    whole = patch_frame(448.5, 224, 224, 16)["patch_stride_level0"] * 16
    assert whole == pytest.approx(448.5)
