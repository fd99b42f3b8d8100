"""Other tools' coordinate files: read as those tools meant them, written as those tools expect them."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import uuid
from pathlib import Path

import h5py
import hypothesis
import hypothesis.extra.numpy
import numpy as np
import pytest
import scipy.ndimage

from pathfm.errors import MissingExtraError, StoreError
from pathfm.geometry import Mpp, Size
from pathfm.store.commit import commit_dir
from pathfm.store.interop import find_coords, read_coords
from pathfm.store.interop.clam import write_clam
from pathfm.store.interop.geojson import tiles_geojson, tissue_geojson, write_geojson
from pathfm.store.interop.trident import write_trident
from pathfm.store.tile_store import TileCodec, TileStoreInfo, TileStoreWriter, open_tiles

CMU, CMU_MPP = "CMU-1-Small-Region", 0.499
REAL = {
    "clam/patches/CMU-1-Small-Region.h5": ("CLAM", 50, (320, 838), 256, 256, None),
    "clam_imgs/patches/CMU-1-Small-Region.h5": ("CLAM", 5, (832, 70), 128, 128, None),
    "clam_level1/patches/her2st_C2.h5": ("CLAM", 177, (1886, 5502), 1023.838, 256, None),
    "trident/20x_256px_0px_overlap/patches/CMU-1-Small-Region_patches.h5": ("TRIDENT", 58, (768, 0), 256, 256, None),
    "trident/10x_256px_32px_overlap/patches/CMU-1-Small-Region_patches.h5": ("TRIDENT", 27, (448, 0), 512, 256, None),
    "trident/20x_256px_0px_overlap/features_vit_tiny_random/CMU-1-Small-Region.h5": ("TRIDENT", 58, (768, 0), 256, 256, None),
    "trident_edge/patches/CMU-1-Small-Region_one_patches.h5": ("TRIDENT", 1, (512, 512), 256, 256, None),
    "trident_edge/patches/CMU-1-Small-Region_empty_patches.h5": ("TRIDENT", 0, None, 256, 256, None),
    "trident_edge/patches/CMU-1-Small-Region_float_ratio_patches.h5": ("TRIDENT", 2, (0, 0), 682.667, 256, None),
    "stamp/vit_tiny_random-49b04e14/CMU-1-Small-Region.h5": ("STAMP", 18, (514, 0), 514, 224, 514 * CMU_MPP / 224),
    "slide2vec/npz/tiles/CMU-1-Small-Region.coordinates.npz": ("slide2vec", 73, (49, 959), 224, 224, CMU_MPP),
    "lazyslide/CMU-1-Small-Region.zarr": ("LazySlide", 31, (563, 2369), 256, 256, CMU_MPP),
}


@pytest.fixture(scope="module")
def real():
    folder = Path(os.environ.get("PATHFM_TEST_INTEROP") or Path(__file__).resolve().parents[3] / "shared" / "interop")
    if not folder.is_dir():
        pytest.skip(f"no files of other tools at {folder} (set PATHFM_TEST_INTEROP)")
    return folder


@pytest.fixture
def make_store(tmp_path):
    """A store without pixels: 224-px tiles at 0.5 mpp by default, from a slide of 0.2494."""

    def make(xy=None, *, side=224 * 0.5 / 0.2494, mpp=0.5, objective=40.0, tile_px=224, quality=True):
        path = tmp_path / "stores" / f"{uuid.uuid4()}.zarr"
        if xy is None:
            columns = np.floor(np.arange(9) * side + 0.5)
            xy = np.stack(np.meshgrid(columns, columns), axis=-1).reshape(-1, 2)
        names = ("tissue", "blur") if quality else ()
        with commit_dir(path) as folder:
            writer = TileStoreWriter(folder, TileCodec("none"), tile_px)
            for row, (x, y) in enumerate(np.asarray(xy, dtype=np.int64).tolist()):
                writer.append_encoded(b"", (x, y), (row / 100, math.nan if row == 1 else 12.5) if quality else ())
            info = TileStoreInfo("a b", "0", tile_px, mpp, side, Size(5000, 4800), names, extra={"objective": objective})
            writer.finish(info, np.zeros((4, 4, 3), np.uint8))
        return open_tiles(path)

    return make


def write_h5(path, coords, attrs=(), file_attrs=(), **datasets):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["coords"] = coords
        for name, values in datasets.items():
            file[name] = values
        file["coords"].attrs.update(dict(attrs))
        file.attrs.update(dict(file_attrs))
    return path


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_read_as_their_tools_meant_them(real, name):
    tool, count, first, side, tile_px, mpp = REAL[name]
    if tool == "LazySlide":
        pytest.importorskip("pyarrow", reason="needs pathfm[interop]")
    tiles = read_coords(real / name, Mpp(CMU_MPP, CMU_MPP))
    assert (tiles.tool, len(tiles.xy_level0), tiles.tile_px) == (tool, count, tile_px)
    assert tiles.xy_level0.dtype == np.float64
    assert tiles.side_level0 == pytest.approx(side, abs=1e-3)
    assert tiles.mpp == (mpp if mpp is None else pytest.approx(mpp))
    if first:
        assert tuple(tiles.xy_level0[0]) == first
    if "CMU" in name and tool != "STAMP":
        assert tiles.size_level0 == Size(2220, 2967)


def test_what_a_clam_tile_covers_is_not_its_spacing(real):
    tiles = read_coords(real / "clam_level1/patches/her2st_C2.h5")
    spacing = np.diff(np.unique(tiles.xy_level0[:, 0])).min()
    assert tiles.side_level0 == pytest.approx(256 * 3.9994, abs=0.1)
    assert abs(spacing - tiles.side_level0) > 200


def test_a_lazyslide_store_gives_away_nobody(real):
    pytest.importorskip("pyarrow", reason="needs pathfm[interop]")
    store = real / "lazyslide" / f"{CMU}.zarr"
    assert "aperio.User" in (store / "zarr.json").read_text()
    words = repr(read_coords(store))
    assert "b414003d" not in words
    assert "12/29/09" not in words


def test_lazyslide_without_pyarrow_names_the_extra(real, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"pathfm\[interop\]"):
        read_coords(real / "lazyslide" / f"{CMU}.zarr")


def test_clam_features_are_refused_because_they_do_not_tell_the_size(real):
    with pytest.raises(StoreError, match="without the size"):
        read_coords(real / f"clam/features/h5_files/{CMU}.h5")


@pytest.mark.parametrize(("mpp", "side_um"), [(0.2527, 112.0), (0.2494, 256.0), (0.499, 256.0)])
def test_stamp_tiles_are_found_by_column_far_from_the_corner(tmp_path, mpp, side_um):
    side = math.ceil(side_um / mpp)
    in_group = max(int(1024 * mpp // side_um), 1)
    columns = np.arange(400)
    um = (columns // in_group * in_group * side * mpp + columns % in_group * side_um).astype(np.float32)
    file = write_h5(
        tmp_path / "s.h5",
        np.stack([um, um[::-1]], axis=1),
        file_attrs={"tile_size_um": side_um, "tile_size_px": 224, "unit": "um"},
    )
    tiles = read_coords(file, mpp)
    np.testing.assert_array_equal(tiles.xy_level0[:, 0], columns * side)
    np.testing.assert_array_equal(tiles.xy_level0[:, 1], columns[::-1] * side)
    assert tiles.side_level0 == side
    with pytest.raises(StoreError, match="STAMP took another"):
        read_coords(file, mpp * 1.01)
    with pytest.raises(StoreError, match="mpp is unknown"):
        read_coords(file)


def test_old_stamp_files_call_the_side_otherwise(tmp_path):
    file = write_h5(tmp_path / "s.h5", np.float32([[0, 256]]), file_attrs={"tile_size": 256.0})
    tiles = read_coords(file, 0.5)
    assert (tiles.side_level0, tiles.xy_level0.tolist()) == (512, [[0, 512]])


def test_atlaspatch_keeps_five_columns_and_attributes_on_the_file(tmp_path):
    facts = {"patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20, "mpp": 0.25}
    file = write_h5(
        tmp_path / "a.h5", np.int32([[512, 1024, 256, 256, 1]]), file_attrs={**facts, "wsi_path": "/home/ann/x.svs"}
    )
    tiles = read_coords(file)
    assert (tiles.tool, tiles.xy_level0.tolist(), tiles.side_level0) == ("AtlasPatch", [[512, 1024]], 512)
    assert (tiles.tile_px, tiles.mpp) == (256, 0.5)
    assert "ann" not in repr(tiles)


@pytest.mark.parametrize(
    ("attrs", "side"),
    [
        ({"patch_size": 256, "patch_level": 0}, 256),
        ({"patch_size": 512, "patch_level": 0, "custom_downsample": 2}, 512),
        ({"patch_size": 256, "patch_level": 1, "downsample": (4.0, 4.0)}, 1024),
        ({"patch_size": 256, "patch_size_level0": 700, "level0_magnification": -1, "target_magnification": -1}, 700),
        ({"patch_size": 256, "level0_magnification": 40, "target_magnification": 20}, 512),
        ({"patch_size": 256, "patch_size_level0": 512, "level0_magnification": "None", "target_magnification": 20}, 512),
    ],
)
def test_variants_of_clam_and_trident(tmp_path, attrs, side):
    assert read_coords(write_h5(tmp_path / "c.h5", np.int64([[0, 0]]), attrs)).side_level0 == side


@pytest.mark.parametrize(
    ("coords", "attrs"),
    [
        ([[0, 0]], {"patch_size": 256, "patch_level": 1}),
        ([[0, 0]], {"patch_size": "big", "patch_level": 0}),
        ([[0, 0]], {"patch_size": 0, "patch_level": 0}),
        ([[0, 0]], {"patch_size": np.zeros(3), "patch_level": 0}),
        ([[0.0, math.nan]], {"patch_size": 256, "patch_level": 0}),
        ([[0.0, 1e30]], {"patch_size": 256, "patch_level": 0}),
        ([0, 0], {"patch_size": 256, "patch_level": 0}),
        ([[0, 0]], {"patch_size": 256, "patch_level": 0, "downsample": -4.0}),
        ([[0, 0]], {"patch_size": 256, "patch_level": 0, "level_dim": 7}),
        ([["a", "b"]], {"patch_size": 256, "patch_level": 0}),
        ([[0, 0]], {}),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_files_that_do_not_say_enough_are_refused_in_one_line(tmp_path, coords, attrs):
    values = np.array(coords)
    with pytest.raises(StoreError) as caught:
        read_coords(write_h5(tmp_path / "c.h5", values.astype("S") if values.dtype.kind == "U" else values, attrs))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.h5", "x.coordinates.npz"])
def test_something_else_under_that_name_is_refused(tmp_path, name):
    for content in (b"", b"hello", b"PK\x03\x04 nothing", b"\x89HDF\r\n\x1a\n"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(StoreError):
            read_coords(tmp_path / name)


def test_absent_files_and_folders_of_others_are_refused(tmp_path, make_store):
    for place in (tmp_path / "absent.h5", tmp_path, make_store().path):
        with pytest.raises(StoreError):
            read_coords(place)


@pytest.mark.parametrize(
    "name", ["clam/patches/CMU-1-Small-Region.h5", "slide2vec/npz/tiles/CMU-1-Small-Region.coordinates.npz"]
)
def test_cut_off_files_are_refused(real, tmp_path, name):
    whole = (real / name).read_bytes()
    copy = tmp_path / Path(name).name
    for share in (0.02, 0.2, 0.5, 0.8, 0.97):
        copy.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(StoreError):
            read_coords(copy)


def test_a_slides_file_is_found_as_tools_name_it(tmp_path, real):
    assert find_coords(real / "clam", CMU) == real / "clam/patches" / f"{CMU}.h5"
    assert find_coords(real / "trident/20x_256px_0px_overlap", CMU).name == f"{CMU}_patches.h5"
    assert find_coords(real / "lazyslide", CMU).name == f"{CMU}.zarr"
    assert find_coords(real / "slide2vec/npz", CMU).name == f"{CMU}.coordinates.npz"
    assert find_coords(real / "stamp/vit_tiny_random-49b04e14", CMU).name == f"{CMU}.h5"
    assert find_coords(real / "clam", "CMU") is None
    for name in ("a [1] *.h5", "patches/a [1] *.h5"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        assert find_coords(tmp_path, "a [1] ?") is None
        if name.startswith("a"):
            assert find_coords(tmp_path, "a [1] *") == tmp_path / name
    with pytest.raises(StoreError, match="two coordinate files"):
        find_coords(tmp_path, "a [1] *")


WRITERS = {
    "CLAM": (write_clam, "clam/patches/CMU-1-Small-Region.h5"),
    "TRIDENT": (write_trident, "trident/20x_256px_0px_overlap/patches/CMU-1-Small-Region_patches.h5"),
}


def layout(path):
    """Names, types and chunks of everything in a coordinate file."""
    with h5py.File(path) as file:
        coords = file["coords"]
        attrs = {name: coords.attrs.get_id(name) for name in coords.attrs}
        types = {name: (attr.dtype, attr.shape) for name, attr in attrs.items()}
        plan = (coords.dtype, coords.chunks, coords.maxshape, coords.compression, coords.shape[1])
        return sorted(file), dict(file.attrs), plan, types


@pytest.mark.parametrize("tool", WRITERS)
def test_written_files_are_laid_out_as_the_tools_own(tmp_path, make_store, real, tool):
    write, theirs = WRITERS[tool]
    write(tmp_path / "ours.h5", make_store(side=256.0, tile_px=256, mpp=0.499, objective=20.0))
    assert layout(tmp_path / "ours.h5") == layout(real / theirs)


@pytest.mark.parametrize("tool", WRITERS)
@pytest.mark.parametrize("count", [0, 1, 81])
def test_what_is_written_is_read_again_as_the_same_boxes(tmp_path, make_store, tool, count):
    store = make_store()
    store = make_store(store.xy_level0[:count])
    for name in ("one.h5", "two.h5"):
        WRITERS[tool][0](tmp_path / name, store)
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()
    assert str(tmp_path).encode() not in (tmp_path / "one.h5").read_bytes()
    tiles = read_coords(tmp_path / "one.h5")
    assert tiles.tool == tool
    assert tiles.size_level0 == store.size_level0
    np.testing.assert_array_equal(tiles.xy_level0, store.xy_level0)
    assert tiles.side_level0 == pytest.approx(store.tile_side_level0, abs=0.5 if tool == "CLAM" else 1e-9)


@pytest.mark.parametrize(
    ("side", "tile_px", "mpp", "objective", "magnifications"),
    [
        (512.0, 256, 0.5, 40.0, (40, 20)),
        (224.449, 224, 0.5, 20.0, (20, 20)),
        (449.08, 224, 0.5, 40.0, (40, 40 * 224 / 449.08)),
        (512.0, 256, 0.5, None, (40, 20)),
        (253.0, 256, 0.499, None, (20, 20 * 256 / 253)),
        (224.0, 224, 0.1136, 83.0, (83, 83)),
        (224.0, 224, 0.5, 2.5, (2.5, 2.5)),
    ],
)
def test_trident_reads_the_very_squares_of_the_store(tmp_path, make_store, side, tile_px, mpp, objective, magnifications):
    write_trident(tmp_path / "t.h5", make_store(side=side, tile_px=tile_px, mpp=mpp, objective=objective))
    with h5py.File(tmp_path / "t.h5") as file:
        attrs = dict(file["coords"].attrs)
    assert (attrs["level0_magnification"], attrs["target_magnification"]) == pytest.approx(magnifications)
    # as its patcher computes what to read
    downsample = (10 / attrs["target_magnification"]) / (10 / attrs["level0_magnification"])
    assert round(attrs["patch_size"] * downsample) == math.floor(side + 0.5) == attrs["patch_size_level0"]
    assert attrs["overlap"] == 0


@pytest.mark.parametrize(("overlap", "side"), [(0, 228.98), (32, 448.5), (112, 512.0), (0, 224.0)])
def test_trident_is_told_the_overlap(tmp_path, make_store, overlap, side):
    columns = np.floor(np.arange(40) * side * (1 - overlap / 224) + 0.5)
    write_trident(tmp_path / "t.h5", make_store(np.stack([columns, 0 * columns], axis=1), side=side))
    with h5py.File(tmp_path / "t.h5") as file:
        assert file["coords"].attrs["overlap"] == overlap


def test_trident_needs_a_magnification(tmp_path, make_store):
    with pytest.raises(StoreError, match="magnification"):
        write_trident(tmp_path / "t.h5", make_store(mpp=None, objective=None))


def area(ring):
    x, y = np.array(ring, dtype=float).T
    return float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]) / 2)


def covered(polygon, shape):
    """Pixels whose centres lie in a polygon, by counting the vertical edges to the left of each (even-odd)."""
    edges = np.zeros((shape[0], shape[1] + 1), dtype=int)
    for ring in polygon:
        for (x, y), (right, bottom) in itertools.pairwise(ring):
            if x == right:
                edges[int(min(y, bottom)) : int(max(y, bottom)), int(x)] += 1
    return np.cumsum(edges, axis=1)[:, :-1] % 2 == 1


@hypothesis.settings(max_examples=200)
@hypothesis.given(hypothesis.extra.numpy.arrays(bool, hypothesis.extra.numpy.array_shapes(min_dims=2, max_dims=2, max_side=9)))
def test_outlines_cover_exactly_the_mask(mask):
    total = np.zeros(mask.shape, dtype=int)
    for feature in tissue_geojson(mask, 1.0):
        outer, *holes = feature["geometry"]["coordinates"]
        assert area(outer) > 0
        assert all(area(hole) < 0 for hole in holes)
        for ring in (outer, *holes):
            corners = [tuple(point) for point in ring]
            assert len(ring) >= 5
            assert corners[0] == corners[-1]
            assert len(set(corners)) == len(corners) - 1
        piece = covered([outer, *holes], mask.shape)
        assert scipy.ndimage.label(piece)[1] == 1
        assert area(outer) + sum(area(hole) for hole in holes) == piece.sum()
        total += piece
    np.testing.assert_array_equal(total, mask)


def test_tissue_for_qupath(tmp_path):
    mask = np.zeros((20, 30), dtype=bool)
    mask[2:12, 3:20] = True
    mask[5:9, 6:12] = False
    mask[6, 8] = True  # an island in the hole
    features = list(tissue_geojson(mask, 32.5, "a"))
    assert [len(feature["geometry"]["coordinates"]) for feature in features] == [2, 1]
    assert features[0]["geometry"]["coordinates"][0][:2] == [[97.5, 65.0], [650.0, 65.0]]
    assert features[0]["properties"]["objectType"] == "annotation"
    assert features[0]["properties"]["classification"]["name"] == "Tissue"
    ids = [feature["id"] for feature in features]
    assert ids == [feature["id"] for feature in tissue_geojson(mask, 32.5, "a")]
    assert not set(ids) & {feature["id"] for feature in tissue_geojson(mask, 32.5, "b")}
    write_geojson(tmp_path / "a.geojson", features)
    assert json.loads((tmp_path / "a.geojson").read_text()) == {"type": "FeatureCollection", "features": features}


def test_tiles_for_qupath(tmp_path, make_store):
    store = make_store()
    write_geojson(tmp_path / "a.geojson", tiles_geojson(store))
    features = json.loads((tmp_path / "a.geojson").read_text())["features"]
    assert len({feature["id"] for feature in features}) == len(store) == 81
    assert {uuid.UUID(feature["id"]).version for feature in features} == {5}
    for (x, y), feature in zip(store.xy_level0.tolist(), features, strict=True):
        (ring,) = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1] == [x, y]
        assert area(ring) == pytest.approx(store.tile_side_level0**2, rel=1e-4)
        assert feature["properties"]["objectType"] == "tile"
    assert features[0]["properties"]["measurements"] == {"tissue": 0.0, "blur": 12.5}
    assert features[1]["properties"]["measurements"] == {"tissue": 0.01}


def test_nothing_to_draw_is_still_geojson(tmp_path):
    write_geojson(tmp_path / "a.geojson", tissue_geojson(np.zeros((3, 3), dtype=bool), 1.0))
    assert json.loads((tmp_path / "a.geojson").read_text())["features"] == []
