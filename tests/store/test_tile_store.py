"""The tile store: what goes in comes out, by our reader and by plain zarr, and damage is named."""

from __future__ import annotations

import copy
import itertools
import json
import pickle

import numpy as np
import pytest
import zarr

from pathfm.errors import StoreError
from pathfm.geometry import Box, Size
from pathfm.store.commit import commit_dir, content_digest
from pathfm.store.tile_store import (
    TileCodec,
    TileStoreInfo,
    TileStoreWriter,
    open_tiles,
    scale_group,
    write_tiles,
)


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


def _edit(path, change):
    content = json.loads((path / "zarr.json").read_text())
    change(content["attributes"]["pathfm"])
    (path / "zarr.json").write_text(json.dumps(content))


def test_a_store_of_version_1_still_opens(tmp_path, images):
    write_tiles(tmp_path / "a.zarr", images[:9], slide_id="a", codec="zstd")

    def older(attributes):
        attributes["version"] = 1
        del attributes["has_pixels"]

    _edit(tmp_path / "a.zarr", older)
    store = open_tiles(tmp_path / "a.zarr")
    np.testing.assert_array_equal(store.read(range(9)), images[:9])
    assert (store.has_pixels, store.scales, store.tile_sides_level0) == (True, (), (32.0, 32.0))
    assert store.tissue is None
    assert open_tiles(tmp_path / "a.zarr", None).attrs["version"] == 1
    with pytest.raises(StoreError, match="no tiles of 1 mpp"):
        open_tiles(tmp_path / "a.zarr", 1.0)


def _several(path, images, codec="zstd"):
    """A store of 16 tiles at 0.5 mpp, 4 at 1 and 1 at 2, all of the same square."""
    scales = (0.5, 1.0, 2.0)
    with commit_dir(path) as folder:
        for number, mpp in enumerate(scales):
            across, side = 4 >> number, 64 << number
            place = folder / scale_group(mpp) if number else folder
            place.mkdir(exist_ok=True)
            writer = TileStoreWriter(place, TileCodec(codec), 32, shard_tiles=3)
            for index in range(across * across):
                corner = (side * (index % across), 100 + side * (index // across))
                writer.append(images[100 * number + index], corner, (0.5,))
            extra = {"scale_of": "a"} if number else {"scales": list(scales)}
            info = TileStoreInfo("a", "f", 32, mpp, float(side), Size(300, 400), ("tissue",), 4.0, extra=extra)
            writer.finish(info, None if number else np.full((100, 75, 3), 9, np.uint8))


@pytest.mark.parametrize("codec", ["jpeg", "zstd"])
def test_several_resolutions_in_one_store(tmp_path, images, codec):
    _several(tmp_path / "a.zarr", images, codec)
    store, plain = open_tiles(tmp_path / "a.zarr"), zarr.open_group(tmp_path / "a.zarr", mode="r")
    assert store.scales == (0.5, 1.0, 2.0)
    assert sorted(name for name, _ in plain.groups()) == ["1mpp", "2mpp"]
    for mpp, count, group in ((0.5, 16, plain), (1.0, 4, plain["1mpp"]), (2.0, 1, plain["2mpp"])):
        one = open_tiles(tmp_path / "a.zarr", mpp)
        assert (len(one), one.mpp, one.slide_id) == (count, mpp, "a")
        np.testing.assert_array_equal(one[count - 1], group["tiles"][count - 1])
        np.testing.assert_array_equal(one.xy_level0, group["xy_level0"][...])
        np.testing.assert_array_equal(one.quality, group["quality"][...])
        again = pickle.loads(pickle.dumps(one))
        assert (again.mpp, len(again)) == (mpp, count)
        # The picture of the slide is kept once.
        assert one.thumbnail.shape == (100, 75, 3)
        assert ("thumbnail" in group) == (mpp == 0.5)
    with pytest.raises(StoreError, match=r"no tiles of 4 mpp .*0\.5, 1, 2"):
        open_tiles(tmp_path / "a.zarr", 4.0)


def test_tiles_of_one_resolution_are_found_from_another(tmp_path, images):
    _several(tmp_path / "a.zarr", images)
    fine, middle, coarse = (open_tiles(tmp_path / "a.zarr", mpp) for mpp in (0.5, 1.0, 2.0))
    assert coarse.overlapping(Box(0, 100, 1, 101)).tolist() == [0]
    assert fine.overlapping(Box(0, 100, 256, 356)).tolist() == list(range(16))
    assert middle.overlapping(Box(128, 100, 256, 228)).tolist() == [1]
    # Tiles that only touch share no pixel.
    assert fine.overlapping(Box(64, 164, 128, 228)).tolist() == [5]
    assert fine.overlapping(Box(63, 164, 128, 228)).tolist() == [4, 5]
    assert fine.overlapping(Box(0, 0, 300, 100)).tolist() == []


def test_pixels_that_are_not_square_make_tiles_that_are_not(tmp_path, images):
    write_tiles(tmp_path / "a.zarr", images[:1], slide_id="a", xy_level0=np.array([[10, 20]]))
    _edit(tmp_path / "a.zarr", lambda attributes: attributes.update(tile_height_level0=40.0))
    store = open_tiles(tmp_path / "a.zarr")
    assert store.tile_sides_level0 == (32.0, 40.0)
    assert store.overlapping(Box(10, 59, 11, 60)).tolist() == [0]
    assert store.overlapping(Box(10, 60, 11, 61)).tolist() == []


def test_coordinates_alone(tmp_path):
    with commit_dir(tmp_path / "a.zarr") as folder:
        writer = TileStoreWriter(folder, TileCodec("none"), 32, shard_tiles=2)
        for number in range(5):
            writer.append_encoded(b"", (32 * number, 0), (0.5,))
        info = TileStoreInfo("a", "f", 32, 0.5, 32.0, Size(160, 32), ("tissue",))
        writer.finish(info, np.zeros((32, 160, 3), np.uint8))
    store = open_tiles(tmp_path / "a.zarr")
    assert (len(store), store.has_pixels) == (5, False)
    assert store.xy_level0[:, 0].tolist() == [0, 32, 64, 96, 128]
    for read in (lambda: store[0], lambda: store.encoded(4), lambda: store.read([1])):
        with pytest.raises(StoreError, match=r"coordinates only .*tile\.codec"):
            read()
    with pytest.raises(IndexError):
        store.encoded(5)
    assert sorted(zarr.open_group(store.path, mode="r")) == ["quality", "thumbnail", "xy_level0"]


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


@pytest.mark.parametrize("codec", ["jpeg", "zstd"])
def test_whole_stores_are_told_from_damaged_ones(tmp_path, images, codec):
    path = tmp_path / "a.zarr"

    def cut(file):
        file.write_bytes(file.read_bytes()[:-1])

    def hollow(file):
        file.write_bytes(file.read_bytes()[1:])

    damages = [
        ("tiles/c/5/0/0/0", cut),
        ("tiles/c/1/0/0/0", hollow),
        ("tiles/c/0/0/0/0", lambda file: file.unlink()),
        ("1mpp/tiles/c/1/0/0/0", lambda file: file.unlink()),
        ("2mpp/zarr.json", lambda file: file.unlink()),
        ("2mpp/quality/zarr.json", lambda file: file.unlink()),
        ("xy_level0/zarr.json", lambda file: file.write_text(file.read_text().replace("16", "15"))),
        ("quality/zarr.json", cut),
    ]
    for file, damage in damages:
        _several(path, images, codec)
        assert open_tiles(path).is_whole()
        damage(path / file)
        assert not open_tiles(path).is_whole(), file


DAMAGES = (None, True, -1, 0, 1.5, 2**70, "x", [], ["x"], {}, {"a": None}, [1, 2, 3], float("nan"))


def test_a_damaged_attribute_is_named_at_opening_or_read_as_it_is(tmp_path, images):
    """Whatever stands in the place of one: a store opens and can be read, or is refused by name so that it is made again."""
    _several(tmp_path / "a.zarr", images)
    file = tmp_path / "a.zarr" / "zarr.json"
    good = json.loads(file.read_text())
    names = [*good["attributes"]["pathfm"], "counts", "empty_reason", "tile_height_level0", "slide_mpp"]
    refused = dict.fromkeys(names, 0)
    for name, damage in itertools.product(names, (*DAMAGES, "absent")):
        changed = copy.deepcopy(good)
        changed["attributes"]["pathfm"][name] = damage
        if damage == "absent":
            del changed["attributes"]["pathfm"][name]
        file.write_text(json.dumps(changed))
        try:
            store = open_tiles(tmp_path / "a.zarr")
            assert isinstance(hash((store.slide_id, store.fingerprint, store.tile_sides_level0, store.scales)), int)
            if store.is_whole():
                store.read(range(len(store)))
        except StoreError as error:
            assert name in error.what or name in {"format", "version"} or "tile 0" in error.what, (name, damage, error)
            refused[name] += 1
    assert all(count > 8 for count in refused.values()), refused
    for damage in DAMAGES:
        for path in (("attributes",), ("attributes", "pathfm")):
            changed = copy.deepcopy(good)
            (changed if len(path) == 1 else changed["attributes"])[path[-1]] = damage
            file.write_text(json.dumps(changed))
            with pytest.raises(StoreError, match="not a pathfm tile store"):
                open_tiles(tmp_path / "a.zarr")


@pytest.mark.parametrize("damage", [{"chunk_grid": None}, {"codecs": 5}, {"data_type": [1]}, {"chunk_grid": {"name": []}}])
def test_an_array_whose_metadata_are_damaged_is_named(tmp_path, images, damage):
    write_tiles(tmp_path / "a.zarr", images[:9], slide_id="a")
    file = tmp_path / "a.zarr" / "xy_level0" / "zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    with pytest.raises(StoreError, match="array xy_level0 is damaged"):
        _ = open_tiles(tmp_path / "a.zarr").xy_level0


def test_stores_without_tiles_or_pixels_are_whole(tmp_path, images):
    write_tiles(tmp_path / "a.zarr", images[:0], slide_id="a")
    assert open_tiles(tmp_path / "a.zarr").is_whole()
    _several(tmp_path / "b.zarr", images, "none")
    assert open_tiles(tmp_path / "b.zarr", 1.0).is_whole()
    assert not (tmp_path / "b.zarr" / "tiles").exists()
