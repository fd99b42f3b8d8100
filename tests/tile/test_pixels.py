"""Tiles read from the slide again are the tiles that a lossless store holds, and of nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from PIL import Image, ImageCms

from pathfm.errors import PathfmError, SlideError, StoreError, UnreadableSlideError
from pathfm.geometry import Size
from pathfm.slides.reader import slide_identity
from pathfm.slides.synthetic import SyntheticSpec, draw_slide
from pathfm.slides.synthetic_tiff import (
    SlideWriter,
    TiffOptions,
    encode_block,
    encode_tiles,
    write_pyramid,
    write_repeated_slide,
)
from pathfm.slides.tile_reading import BANDS_AHEAD, BLOCK_ROWS, read_tiles
from pathfm.store.cohort import SlideRow
from pathfm.store.export import export_tiles
from pathfm.store.tile_store import TileStore, open_tiles
from pathfm.study import TileSettings
from pathfm.tile.pixels import slide_pixels
from pathfm.tile.slide import tile_slide
from pathfm.tile.stage import _fingerprints
from pathfm.tile.task import TileTask
from tests.slides.crosses import pyramid

SIZE, TILE = Size(900, 700), Size(128, 128)
ALL = {"tissue": {"method": "off"}}
BLIND = {"filters": {"measure": False}}
NATIVE = {"mpp": "native", "tile_px": 128}
"""On level 0 of the slides here, tiles coincide with stored tiles."""


@pytest.fixture(scope="module")
def tissue():
    return draw_slide(SyntheticSpec(size_px=SIZE, seed=3))[0]


@pytest.fixture(scope="module")
def slide(tmp_path_factory, tissue):
    path = tmp_path_factory.mktemp("slide") / "slide.svs"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"temp").replace(b"bXYZ", b"rXYZ").replace(b"temp", b"bXYZ")
    write_pyramid(path, pyramid(tissue, (1, 4)), TiffOptions("aperio", TILE, shared_tables=True, icc=swapped))
    return path


def tiled(
    path: Path, out: Path, codec: str = "none", mpp_of_row: float | None = None, **settings: Any
) -> tuple[SlideRow, TileSettings, TileStore]:
    """A slide tiled as the stage does it, with what its tiles can be read again by."""
    chosen = TileSettings.model_validate({"tile_px": 64, "codec": codec, **settings})
    row, identity = SlideRow("slide", path, mpp=mpp_of_row), slide_identity(path)
    place = out / f"{codec}.zarr"
    tile_slide(TileTask(row, chosen, place, identity, _fingerprints(row, chosen, identity)))
    return row, chosen, open_tiles(place)


def pixels(row: SlideRow, settings: TileSettings, store: TileStore, threads: int = 1) -> list[np.ndarray | None]:
    return list(slide_pixels(row, settings, store, threads))


def same(tiles: list[np.ndarray | None], store: TileStore) -> bool:
    return len(tiles) == len(store) and all(np.array_equal(tile, store[row]) for row, tile in enumerate(tiles))


def counts(store: TileStore) -> tuple[dict[str, int], str]:
    return store.attrs["counts"], store.attrs["empty_reason"]


def check_same(path: Path, out: Path, **settings: Any) -> int:
    """Coordinates alone and with pixels: the same tiles, columns, counts and bytes, at every resolution. How many there are."""
    row, chosen, bare = tiled(path, out, **settings)
    _, _, whole = tiled(path, out, "zstd", **settings)
    scales = bare.scales or (None,)
    assert bare.scales == whole.scales
    for scale in scales:
        ours, theirs = open_tiles(bare.path, scale), open_tiles(whole.path, scale)
        assert (ours.has_pixels, theirs.has_pixels) == (False, True)
        assert np.array_equal(ours.xy_level0, theirs.xy_level0)
        assert np.array_equal(ours.quality, theirs.quality)
        assert counts(ours) == counts(theirs)
        for threads in (1, 3):
            assert same(pixels(row, chosen, ours, threads), theirs)
        few = range(1, len(ours), 5)
        for number, tile in zip(few, slide_pixels(row, chosen, ours, 1, few), strict=True):
            assert np.array_equal(tile, theirs[number])
    return len(bare)


WAYS = {
    "shrunk in the decoder": {},
    "tiles that coincide with stored ones": NATIVE,
    "stitched": {"mpp": "native", "tile_px": 100},
    "scaled, overlapping": {"mpp": 0.61, "overlap_px": 9},
    "exactly scaled": {"mpp": 0.51, "mpp_tolerance": 0},
    "several resolutions": {"mpp": (0.5, 1.0, 0.25), "tile_px": 48},
    "room for crops, padded": {"keep_px": 80, "edge": "pad"},
    "room for crops": {"keep_px": 80, "tile_px": 49},
    "made finer": {"mpp": 0.2, "upsample": True},
    "colour profile": {"colour": {"icc": True}},
    "macenko": {"colour": {"normalise": "macenko"}},
    "profile and reinhard": {"colour": {"icc": True, "normalise": "reinhard"}, "mpp": (0.5, 1.0)},
    "openslide": {"reader": "openslide", "mpp": 0.6},
    "mpp of the cohort table": {"mpp_of_row": 0.3},
    "filters": {**ALL, "filters": {"max_white": 0.2, "min_blur": 30}},
    "nothing measured": {**ALL, **BLIND, "edge": "pad"},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_same_as_a_lossless_store(slide, tmp_path, way):
    settings = dict(way)
    assert check_same(slide, tmp_path, mpp_of_row=settings.pop("mpp_of_row", None), **settings) > 4


@pytest.mark.parametrize("options", [TiffOptions("ome", TILE), TiffOptions(tile_px=None, colour="raw")])
def test_the_same_in_other_files(tmp_path, tissue, options):
    write_pyramid(tmp_path / "slide.tiff", [tissue], options)
    assert check_same(tmp_path / "slide.tiff", tmp_path) > 4


def test_the_same_of_a_picture(tmp_path, tissue):
    Image.fromarray(tissue).save(tmp_path / "slide.png", dpi=(25_400 / 0.25,) * 2)
    assert check_same(tmp_path / "slide.png", tmp_path) > 4


@pytest.mark.parametrize("name", ["CMU-1-Small-Region", "TCGA-5P-A9K0_1"])
def test_the_same_of_a_real_slide(shared_data, tmp_path, name):
    path = shared_data / "slides" / f"{name}.svs"
    assert check_same(path, tmp_path, tile_px=224) > 3


def test_the_same_of_tiles_that_another_tool_chose(slide, tmp_path):
    bare = tiled(slide, tmp_path)[-1]
    export_tiles(bare, tmp_path / "theirs", "trident")
    (file,) = (tmp_path / "theirs").rglob("*.h5")
    with h5py.File(file, "r+") as opened:
        coords, about = opened["coords"][...], dict(opened["coords"].attrs)
        del opened["coords"]
        # In any order, off every grid, over the edge, and twice in the same place.
        opened["coords"] = np.concatenate([coords[::-1] + 7, coords[:3] + 7, [[880, 20], [-30, 300]]])
        opened["coords"].attrs.update(about)
    for edge in ("drop", "pad"):
        check_same(slide, tmp_path, coords=file.parent, edge=edge, **ALL, filters={"max_white": 1.0})
        corners = open_tiles(tmp_path / "none.zarr").xy_level0
        assert len(np.unique(corners, axis=0)) < len(corners)
    assert len(corners) == len(bare) + 4  # one of the five lies mostly beyond the edge, where no tissue is


def test_the_same_of_a_folder_of_tiles(tmp_path, tissue):
    folder = tmp_path / "tiles"
    folder.mkdir()
    for number in range(30):
        x, y = number % 10 * 64, number // 10 * 64
        Image.fromarray(tissue[y : y + 64, x : x + 64]).save(folder / f"{number}.{('png', 'jpg')[number % 2]}")
    (folder / "7b.png").write_bytes(b"no picture")
    Image.fromarray(tissue[:80, :80]).save(folder / "large.png")
    filters = {"filters": {"max_white": 0.5}}
    kept = check_same(folder, tmp_path, **filters)
    row, chosen, store = tiled(folder, tmp_path, **filters)
    assert store.source_names[:1] < store.source_names[1:2]
    assert kept == len(store.source_names) < 30
    (folder / "0.png").rename(folder / "99.png")
    with pytest.raises(SlideError, match="the slide has changed since it was tiled"):
        pixels(row, chosen, store)


def test_passed_through_tiles_are_the_same_pixels(slide, tmp_path):
    row, chosen, bare = tiled(slide, tmp_path, **NATIVE)
    _, _, passed = tiled(slide, tmp_path, "auto", **NATIVE)
    assert passed.attrs["passed_through"] is True
    assert same(pixels(row, chosen, bare), passed)


def test_a_slide_without_tiles_gives_none(slide, tmp_path):
    row, chosen, store = tiled(slide, tmp_path, tile_px=2048)
    assert pixels(row, chosen, store) == []


# Tiles that cannot be read


@pytest.fixture
def damaged(tmp_path, tissue):
    """A slide whose tenth stored tile is cut short and filled up with zeros."""
    path, options = tmp_path / "damaged.tiff", TiffOptions(tile_px=TILE)
    write_pyramid(path, pyramid(tissue, (1, 4)), options)
    data, tile = bytearray(path.read_bytes()), list(encode_tiles(tissue, options))[9]
    start = data.index(tile)
    data[start + len(tile) // 2 : start + len(tile) - 2] = bytes(len(tile) - 2 - len(tile) // 2)
    path.write_bytes(data)
    return path


# A thumbnail of the second level, so that it has no damage.
SMALL = {"tissue": {"method": "off", "thumbnail_px": 200}}


def test_damage_that_tiling_did_not_look_for_is_none(damaged, tmp_path):
    everything = {**NATIVE, **SMALL, "filters": {"max_white": 1.0}}
    assert check_same(damaged, tmp_path, **everything) == 34  # measured, so the damaged one is not there
    row, chosen, blind = tiled(damaged, tmp_path, **NATIVE, **SMALL, **BLIND)
    tiles = pixels(row, chosen, blind)
    assert [blind.xy_level0[number].tolist() for number, tile in enumerate(tiles) if tile is None] == [[128, 128]]
    _, _, whole = tiled(damaged, tmp_path, "zstd", **NATIVE, **SMALL, **BLIND)
    assert same([tile for tile in tiles if tile is not None], whole)
    row, chosen, blind = tiled(damaged, tmp_path, **NATIVE, **SMALL, **BLIND, max_unreadable=0.02)
    with pytest.raises(UnreadableSlideError, match="1 of 35 tiles cannot be decoded"):
        pixels(row, chosen, blind)


def test_what_the_scanner_left_out_is_none_unless_padded(tmp_path, tissue):
    path, options = tmp_path / "slide.tiff", TiffOptions(tile_px=TILE)
    with SlideWriter(path, options) as writer:
        writer.write_level([b"" if number == 9 else tile for number, tile in enumerate(encode_tiles(tissue, options))], SIZE)
    assert check_same(path, tmp_path, **NATIVE, **ALL, filters={"max_white": 1}) == 34
    row, chosen, blind = tiled(path, tmp_path, **NATIVE, **ALL, **BLIND, max_unreadable=0)
    missing = [blind.xy_level0[number].tolist() for number, tile in enumerate(pixels(row, chosen, blind)) if tile is None]
    assert missing == [[128, 128]]
    assert check_same(path, tmp_path, **NATIVE, **ALL, filters={"max_white": 1}, edge="pad") == 48


# What is refused


def test_another_slide_or_other_settings_are_refused(slide, tmp_path):
    path = tmp_path / "slide.svs"
    shutil.copyfile(slide, path)
    row, chosen, store = tiled(path, tmp_path, mpp=(0.5, 1.0))
    for changed in ({"edge": "pad"}, {"colour": {"normalise": "macenko"}}, {"codec": "zstd"}, {"tile_px": 65}):
        other = TileSettings.model_validate({**chosen.model_dump(), **changed})
        with pytest.raises(StoreError, match="made with other settings"):
            next(slide_pixels(row, other, store, 1))
    with pytest.raises(StoreError, match="made with other settings"):
        next(slide_pixels(SlideRow("slide", path, mpp=0.3), chosen, store, 1))
    with path.open("ab") as file:
        file.write(b"x")
    for scale in store.scales:
        with pytest.raises(SlideError, match="the slide has changed since it was tiled"):
            next(slide_pixels(row, chosen, open_tiles(store.path, scale), 1))
    path.unlink()
    with pytest.raises(UnreadableSlideError, match="no such file"):
        next(slide_pixels(row, chosen, store, 1))


def test_a_slide_that_changes_meanwhile_never_gives_its_last_tile(slide, tmp_path):
    path = tmp_path / "slide.svs"
    shutil.copyfile(slide, path)
    row, chosen, store = tiled(path, tmp_path)
    tiles = slide_pixels(row, chosen, store, 2)
    for _ in range(len(store) - 1):
        next(tiles)
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(SlideError, match="changed while it was read"):
        next(tiles)


def tampered(store: TileStore, **attrs: Any) -> TileStore:
    """The store with other attributes."""
    file = store.path / "zarr.json"
    about = json.loads(file.read_text())
    about["attributes"]["pathfm"].update(attrs)
    file.write_text(json.dumps(about))
    return open_tiles(store.path)


def test_a_grid_that_does_not_agree_is_refused(slide, tmp_path):
    row, chosen, store = tiled(slide, tmp_path)
    before = store.attrs
    for name, value in {
        "read_level": 1,
        "read_shrink": 4,
        "reader": "openslide",
        "mpp": 0.51,
        "tile_side_level0": 128.5,
    }.items():
        changed = tampered(store, **{**before, name: value})
        with pytest.raises(StoreError, match="in another way than it was tiled"):
            next(slide_pixels(row, chosen, changed, 1))
    changed = tampered(store, **before)
    corners = zarr.open_group(store.path, mode="r+")["xy_level0"]
    moved = corners[...]
    for wrong in (moved + 1, moved[::-1], np.repeat(moved[:1], len(moved), axis=0)):
        corners[...] = wrong
        with pytest.raises(StoreError, match="where tiling would put none"):
            next(slide_pixels(row, chosen, open_tiles(store.path), 1))
    corners[...] = moved
    assert len(pixels(row, chosen, open_tiles(store.path))) == len(store)


def test_a_store_that_tiling_did_not_make_is_refused(slide, tmp_path):
    row, chosen, store = tiled(slide, tmp_path)
    attrs = {name: value for name, value in store.attrs.items() if name != "identity"}
    with pytest.raises(PathfmError, match="made with other settings"):
        next(slide_pixels(row, chosen, TileStore(store.path, {**attrs, "fingerprint": "?"}), 1))


# Memory


def test_what_waits_does_not_grow_with_the_height_of_the_slide(tmp_path, tissue, monkeypatch):
    """Tiles that were read and not yet taken, in slides of twice the height."""
    made: list[int] = []

    def counting(reader, cut, rows, finish, **options):
        return read_tiles(reader, cut, rows, lambda *given: made.append(1) or finish(*given), **options)

    monkeypatch.setattr("pathfm.tile.pixels.read_tiles", counting)
    options = TiffOptions(tile_px=TILE, share_tiles=True)
    block = encode_block(tissue[:256, :256], (1,), options)
    for height in (4096, 8192):
        path = tmp_path / f"{height}.tiff"
        write_repeated_slide(path, Size(512, height), block, options)
        row, chosen, store = tiled(path, tmp_path, tile_px=32, **ALL, **BLIND)
        made.clear()
        ahead = [len(made) - taken for taken, _ in enumerate(slide_pixels(row, chosen, store, 2), start=1)]
        assert len(ahead) == len(made) == len(store) == 8 * height // 64
        assert max(ahead) <= (1 + BANDS_AHEAD) * BLOCK_ROWS * 8
