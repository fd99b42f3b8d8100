"""The tile store: what goes in comes out, by our reader and by plain zarr, and damage is named."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import zarr

from pathfm.errors import StoreError
from pathfm.store.commit import content_digest
from pathfm.store.tile_store import open_tiles, write_tiles


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    coarse = rng.integers(40, 230, (300, 8, 8, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


@pytest.mark.parametrize("codec", ["jpeg", "zstd"])
def test_our_reader_and_plain_zarr_agree(tmp_path, images, codec):
    write_tiles(tmp_path / "a.zarr", images, slide_id="a", codec=codec)
    store = open_tiles(tmp_path / "a.zarr")
    plain = zarr.open_group(tmp_path / "a.zarr", mode="r")
    assert len(store) == plain["tiles"].shape[0] == 300
    for index in (0, 255, 256, 299):
        np.testing.assert_array_equal(store[index], plain["tiles"][index])
    np.testing.assert_array_equal(store.xy_level0, plain["xy_level0"][...])


def test_zstd_is_lossless_and_jpeg_is_close(tmp_path, images):
    write_tiles(tmp_path / "z.zarr", images, slide_id="z", codec="zstd")
    write_tiles(tmp_path / "j.zarr", images, slide_id="j", codec="jpeg")
    np.testing.assert_array_equal(open_tiles(tmp_path / "z.zarr").read(range(300)), images)
    difference = open_tiles(tmp_path / "j.zarr").read(range(300)).astype(int) - images
    assert 0 < np.abs(difference).mean() < 20


def test_same_tiles_give_the_same_bytes(tmp_path, images):
    for name in ("one", "two"):
        write_tiles(tmp_path / name / "a.zarr", images, slide_id="a")
    assert content_digest(tmp_path / "one" / "a.zarr") == content_digest(tmp_path / "two" / "a.zarr")


def test_one_file_per_shard_not_per_tile(tmp_path, images):
    write_tiles(tmp_path / "a.zarr", images, slide_id="a")
    shards = [item for item in (tmp_path / "a.zarr" / "tiles" / "c").rglob("*") if item.is_file()]
    assert len(shards) == 2


def test_names_of_a_tile_folder_survive_any_character(tmp_path, images):
    names = ["plain.png", "with space.png", "ünïcode-😀.png", "line\nbreak.png"]
    write_tiles(tmp_path / "a.zarr", images[:4], slide_id="a", source_names=names)
    assert open_tiles(tmp_path / "a.zarr").source_names == tuple(names)


def test_tiles_without_coordinates_are_flagged(tmp_path, images):
    write_tiles(tmp_path / "a.zarr", images[:5], slide_id="a")
    write_tiles(tmp_path / "b.zarr", images[:5], slide_id="b", xy_level0=np.arange(10).reshape(5, 2))
    assert open_tiles(tmp_path / "a.zarr").coords_synthetic
    assert not open_tiles(tmp_path / "b.zarr").coords_synthetic


def test_an_open_store_can_be_sent_to_a_worker(tmp_path, images):
    write_tiles(tmp_path / "a.zarr", images[:3], slide_id="a")
    store = pickle.loads(pickle.dumps(open_tiles(tmp_path / "a.zarr")))
    assert store[2].shape == (32, 32, 3)


def test_a_newer_version_is_refused_by_name(tmp_path, images):
    write_tiles(tmp_path / "a.zarr", images[:3], slide_id="a")
    path = tmp_path / "a.zarr" / "zarr.json"
    content = json.loads(path.read_text())
    content["attributes"]["pathfm"]["version"] = 99
    path.write_text(json.dumps(content))
    with pytest.raises(StoreError, match=r"newer pathfm .format version 99"):
        open_tiles(tmp_path / "a.zarr")


def test_absent_and_foreign_stores_are_refused(tmp_path):
    with pytest.raises(StoreError, match="no tile store"):
        open_tiles(tmp_path / "a.zarr")
    zarr.open_group(tmp_path / "b.zarr", mode="w")
    with pytest.raises(StoreError, match="not a pathfm tile store"):
        open_tiles(tmp_path / "b.zarr")


def _shard(path):
    return path / "tiles" / "c" / "0" / "0" / "0" / "0"


def test_a_truncated_shard_is_named(tmp_path, images):
    write_tiles(tmp_path / "a.zarr", images[:9], slide_id="a")
    data = _shard(tmp_path / "a.zarr").read_bytes()
    _shard(tmp_path / "a.zarr").write_bytes(data[:-100])
    with pytest.raises(StoreError, match="index is damaged"):
        open_tiles(tmp_path / "a.zarr")[0]


def test_a_damaged_tile_is_named_not_made_up(tmp_path, images):
    write_tiles(tmp_path / "a.zarr", images[:9], slide_id="a", codec="zstd")
    data = bytearray(_shard(tmp_path / "a.zarr").read_bytes())
    data[0:16] = bytes(16)
    _shard(tmp_path / "a.zarr").write_bytes(bytes(data))
    with pytest.raises(StoreError, match="tile 0 is damaged"):
        open_tiles(tmp_path / "a.zarr")[0]


def test_an_absent_shard_is_named(tmp_path, images):
    write_tiles(tmp_path / "a.zarr", images[:9], slide_id="a")
    _shard(tmp_path / "a.zarr").unlink()
    with pytest.raises(StoreError, match="shard cannot be opened"):
        open_tiles(tmp_path / "a.zarr")[0]
