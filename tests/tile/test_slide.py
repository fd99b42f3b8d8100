"""One slide -> one store: what is kept, what is counted, what is said of it, and that the same slide gives the same store."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import zarr
from PIL import Image, ImageCms

from pathfm.errors import MissingMppError, SlideError, StoreError, UnreadableSlideError
from pathfm.geometry import Box, Mpp, Size
from pathfm.slides.reader import open_slide
from pathfm.slides.synthetic import SyntheticSpec, draw_slide
from pathfm.slides.synthetic_tiff import PATIENT, SlideWriter, TiffOptions, encode_tiles, write_pyramid
from pathfm.store.cohort import SlideRow
from pathfm.store.commit import content_digest
from pathfm.store.export import export_tiles
from pathfm.store.tile_store import TileStore, open_tiles
from pathfm.study import TileSettings
from pathfm.tile.quality import Quality
from pathfm.tile.slide import tile_slide
from pathfm.tile.task import Made, TileTask
from tests.slides.crosses import pyramid
from tests.tile.test_crosses import SIZE as CROSS_SIZE
from tests.tile.test_crosses import misses, plant, stored

SIZE = Size(900, 700)
TILE = Size(128, 128)
ALL = {"tissue": {"method": "off"}}
PLAIN = {**ALL, "filters": {"measure": False}}
NATIVE = {"mpp": "native", "tile_px": 128}
"""On level 0 of the slides here, tiles coincide with stored tiles."""
WHOLE_TILES = 7 * 5


@pytest.fixture(scope="module")
def tissue():
    return draw_slide(SyntheticSpec(size_px=SIZE, seed=3))[0]


@pytest.fixture(scope="module")
def slide(tmp_path_factory, tissue):
    path = tmp_path_factory.mktemp("slide") / "slide.svs"
    options = TiffOptions("aperio", TILE, shared_tables=True, comment=PATIENT)
    write_pyramid(path, pyramid(tissue, (1, 4)), options)
    return path


def run(
    path: Path, folder: Path, threads: int = 1, row: dict[str, Any] | None = None, **settings: Any
) -> tuple[Made, TileStore]:
    """Tiles a slide, with its pictures beside the store."""
    chosen = TileSettings.model_validate({"tile_px": 64, **settings})
    pictures = folder / "overlay.png", folder / "sheet.jpg"
    row = {"slide_id": "slide", "path": path, **(row or {})}
    made = tile_slide(TileTask(SlideRow(**row), chosen, folder / "slide.zarr", "id", ("a", "b"), pictures, threads))
    return made, open_tiles(folder / "slide.zarr")


def dotted(path: Path, picture: np.ndarray, mpp: float = 0.5) -> Path:
    """A PNG with a scale."""
    Image.fromarray(picture).save(path, dpi=(25_400 / mpp, 25_400 / mpp))
    return path


def width(path: Path) -> int:
    with Image.open(path) as picture:
        return picture.width


def noisy(colour: tuple[int, int, int], side: int = 64) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 6, (side, side, 1))
    return np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)


# One store


def test_a_slide_becomes_a_store_with_pictures(slide, tmp_path):
    made, store = run(slide, tmp_path)
    assert made.counts == store.attrs["counts"]
    assert made.counts["grid"] == 7 * 5
    assert sum(made.counts.values()) == 2 * made.counts["grid"]
    assert 0 < made.counts["kept"] == len(store)
    assert made.empty_reason == store.attrs["empty_reason"] == ""
    assert (store.mpp, store.tile_px, store.tile_sides_level0, store.size_level0) == (0.5, 64, (128.0, 128.0), SIZE)
    assert store.quality_names == Quality._fields
    assert (store.quality[:, 0] >= 0.5).all()
    assert (store.xy_level0 % 128 == 0).all()
    about = {key: store.attrs[key] for key in ("vendor", "reader", "mpp_source", "objective", "read_level", "read_shrink")}
    assert about == {
        "vendor": "aperio",
        "reader": "direct",
        "mpp_source": "openslide.mpp-x",
        "objective": 40,
        "read_level": 0,
        "read_shrink": 2,
    }
    assert store.attrs["slide_mpp"] == [0.25, 0.25]
    assert store.thumbnail.shape[1] * store.thumbnail_downsample == SIZE.width
    assert store.tissue.shape == store.thumbnail.shape[:2]
    assert width(tmp_path / "overlay.png") >= store.thumbnail.shape[1]
    assert width(tmp_path / "sheet.jpg") > 4 * 64
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert PATIENT.encode() in slide.read_bytes()
    assert not any(PATIENT.encode() in file.read_bytes() for file in files)


@pytest.mark.parametrize("settings", [{"mpp": (0.5, 1.0)}, {**NATIVE, "codec": "auto"}, {"mpp": 0.61, "overlap_px": 9}])
def test_the_same_slide_gives_the_same_store_with_any_number_of_threads(slide, tmp_path, settings):
    digests = set()
    for number, threads in enumerate((1, 1, 2, 4)):
        (tmp_path / str(number)).mkdir()
        _, store = run(slide, tmp_path / str(number), threads, **{"tile_px": 32, "shard_tiles": 16, **settings})
        assert len(store) > 10
        digests.add(content_digest(store.path))
    assert len(digests) == 1


def test_a_check_that_fails_keeps_the_store_from_appearing(slide, tmp_path):
    def lost():
        raise StoreError("the right to write it is lost")

    task = TileTask(SlideRow("slide", slide), TileSettings(tile_px=64), tmp_path / "slide.zarr", "id", ("a", "b"))
    with pytest.raises(StoreError, match="lost"):
        tile_slide(task, lost)
    assert not list(tmp_path.iterdir())


def test_a_store_says_which_of_two_fingerprints_holds(tmp_path, tissue):
    write_pyramid(tmp_path / "slide.tiff", [tissue], TiffOptions(mpp=None))
    with pytest.raises(MissingMppError, match="no mpp"):
        run(tmp_path / "slide.tiff", tmp_path)
    assert not (tmp_path / "slide.zarr").exists()
    _, store = run(tmp_path / "slide.tiff", tmp_path, assume_mpp=0.25)
    assert (store.fingerprint, store.attrs["mpp_source"]) == ("b", "assumed")
    _, store = run(tmp_path / "slide.tiff", tmp_path, row={"mpp": 0.25}, assume_mpp=1.0)
    assert (store.fingerprint, store.attrs["mpp_source"]) == ("a", "cohort table")
    _, store = run(tmp_path / "slide.tiff", tmp_path, mpp="native")
    assert (store.mpp, store.attrs["mpp_source"], store.attrs["slide_mpp"]) == (None, "unknown", None)


# Several resolutions


def test_the_same_tissue_at_several_mpp_in_one_store(tmp_path):
    scales, mpp = (0.5, 1.0, 2.0), 0.2527
    picture, points = plant(Size(2 * CROSS_SIZE.width, 2 * CROSS_SIZE.height), (scales[-1] / mpp,) * 2)
    write_pyramid(tmp_path / "slide.svs", pyramid(picture, (1, 4)), TiffOptions("aperio", TILE, mpp=Mpp(mpp, mpp)))
    settings = {**PLAIN, "mpp": scales, "codec": "zstd", "mpp_tolerance": 0.0}
    made, store = run(tmp_path / "slide.svs", tmp_path, **settings)
    assert store.scales == scales
    assert open_tiles(store.path, 0.5).mpp == store.mpp == 0.5
    assert made.counts["kept"] == len(store)
    seen = {}
    for wanted in scales:
        one = open_tiles(store.path, wanted)
        assert (one.mpp, one.slide_id, one.size_level0) == (wanted, "slide", store.size_level0)
        assert np.array_equal(one.thumbnail, store.thumbnail)
        assert one.thumbnail_downsample == store.thumbnail_downsample
        assert pickle.loads(pickle.dumps(one)).mpp == wanted
        if wanted != 0.5:
            assert one.attrs["scale_of"] == "slide"
            assert made.counts[f"kept at {wanted:g} mpp"] == len(one)
        # Crosses are drawn for the coarsest scale: at the finer ones they are larger, so their ends count less.
        if wanted == 2.0:
            assert np.abs(misses(stored(one), one.tile_sides_level0, points)).max() <= 0.5
        plain = zarr.open_group(store.path, mode="r")
        group = plain if wanted == 0.5 else plain[f"{wanted:g}mpp"]
        assert np.array_equal(group["tiles"][len(one) - 1], one[len(one) - 1])
        seen[wanted] = one
    with pytest.raises(StoreError, match=r"no tiles of 0\.7 mpp.*\n?.*0\.5, 1, 2"):
        open_tiles(store.path, 0.7)
    coarse, fine = seen[2.0], seen[0.5]
    x, y = (int(value) for value in coarse.xy_level0[0])
    side = coarse.tile_side_level0
    below = fine.overlapping(Box(x, y, x + int(side), y + int(side)))
    assert len(below) == 16
    # What the 16 fine tiles show together is what the coarse one shows, to half a pixel of each scale.
    mosaic = np.zeros((256, 256, 3), np.uint8)
    for number in below:
        left, top = np.rint((fine.xy_level0[number] - (x, y)) / fine.tile_side_level0 * 64).astype(int)
        mosaic[top : top + 64, left : left + 64] = fine[number]
    shrunk = cv2.resize(mosaic, (64, 64), interpolation=cv2.INTER_AREA).mean(axis=2)
    (dx, dy), _ = cv2.phaseCorrelate(shrunk, coarse[0].mean(axis=2))
    assert max(abs(dx), abs(dy)) < 0.5 * (0.5 + 2.0) / 2.0


# Pixels


def test_pass_through_keeps_the_scanners_own_pixels(slide, tmp_path):
    (tmp_path / "blind").mkdir()
    _, seen = run(slide, tmp_path, **NATIVE)
    _, blind = run(slide, tmp_path / "blind", **NATIVE, filters={"measure": False})
    assert seen.attrs["passed_through"] is blind.attrs["passed_through"] is True
    assert blind.quality_names == ("tissue", "outside")
    tiles = {tuple(corner): blind.encoded(row) for row, corner in enumerate(blind.xy_level0)}
    assert 5 < len(seen) <= len(blind)
    with open_slide(slide, "openslide") as reader:
        for row, corner in enumerate(seen.xy_level0):
            assert seen.encoded(row) == tiles[tuple(corner)]
            assert np.array_equal(seen[row], reader.read_region(*(int(value) for value in corner), 0, TILE))
    assert np.array_equal(seen[0], zarr.open_group(seen.path, mode="r")["tiles"][0])


def test_filters_drop_tiles_that_would_pass_through(slide, tmp_path):
    made, store = run(slide, tmp_path, **NATIVE, **ALL, filters={"max_white": 0.2})
    assert store.attrs["passed_through"]
    assert made.counts["white"] > 0
    assert (store.quality[:, store.quality_names.index("white")] <= 0.2).all()


@pytest.mark.parametrize(
    "settings", [{"tile_px": 112}, {"overlap_px": 16}, {"mpp": 0.5}, {"codec": "jpeg"}, {"colour": {"normalise": "reinhard"}}]
)
def test_what_does_not_coincide_is_encoded(slide, tmp_path, settings):
    _, store = run(slide, tmp_path, **{**NATIVE, **settings})
    assert store.attrs["passed_through"] is False
    assert store.attrs["codec"] == "jpeg"
    assert store.encoded(0)[:2] == b"\xff\xd8"


def test_zstd_is_exact_and_jpeg_is_close(slide, tmp_path):
    for codec, least in (("zstd", np.inf), ("jpeg", 30)):
        _, store = run(slide, tmp_path, **NATIVE, **PLAIN, codec=codec, jpeg_quality=95)
        assert len(store) == WHOLE_TILES
        with open_slide(slide, "openslide") as reader:
            for row in (0, 17, 34):
                theirs = reader.read_region(*(int(value) for value in store.xy_level0[row]), 0, TILE)
                error = ((store[row].astype(float) - theirs) ** 2).mean()
                assert (10 * np.log10(255**2 / error) if error else np.inf) >= least


def test_coordinates_alone(slide, tmp_path):
    (tmp_path / "whole").mkdir()
    _, whole = run(slide, tmp_path / "whole")
    for filters in ({}, {"measure": False}):
        _, store = run(slide, tmp_path, codec="none", filters=filters)
        assert store.has_pixels is False
        assert not (store.path / "tiles").exists()
        with pytest.raises(StoreError, match="coordinates only"):
            store[0]
        assert width(tmp_path / "sheet.jpg") > 4 * 64
    _, store = run(slide, tmp_path, codec="none")
    assert np.array_equal(store.xy_level0, whole.xy_level0)
    assert np.array_equal(store.quality, whole.quality)


# What is dropped, and why


def test_each_filter_counts_what_it_drops(tmp_path):
    fine, damaged = noisy((205, 150, 190)), noisy((205, 150, 190))
    damaged[32:] = noisy((120, 60, 120))[32:]
    tiles = [fine, noisy((248, 248, 248)), noisy((30, 140, 90)), np.zeros_like(fine), damaged, np.full_like(fine, 170), fine]
    path = dotted(tmp_path / "slide.png", np.concatenate(tiles, axis=1))
    made, store = run(path, tmp_path, **ALL, filters={"min_blur": 20})
    assert made.counts == {"grid": 7, "kept": 2, "black": 1, "blur": 1, "damage": 1, "pen": 1, "white": 1}
    assert store.xy_level0.tolist() == [[0, 0], [6 * 64, 0]]
    made, store = run(path, tmp_path, **PLAIN)
    assert made.counts == {"grid": 7, "kept": 7}
    made, _ = run(path, tmp_path, **ALL, filters={"max_pen": 1, "max_white": 1, "max_black": 1, "max_damage": 1})
    assert made.counts == {"grid": 7, "kept": 7}


def test_a_stain_of_the_colour_of_ink_is_noted(tmp_path):
    path = dotted(tmp_path / "slide.png", np.concatenate([noisy((30, 140, 90))] * 3 + [noisy((205, 150, 190))], axis=1))
    made, store = run(path, tmp_path, **ALL)
    assert made.counts == {"grid": 4, "kept": 1, "pen": 3}
    assert "tile.filters.max_pen" in store.attrs["notes"][0]


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


@pytest.mark.parametrize("codec", ["auto", "jpeg"])
def test_a_tile_that_cannot_be_decoded_is_dropped_and_counted(damaged, tmp_path, codec):
    made, store = run(damaged, tmp_path, **NATIVE, **SMALL, codec=codec, filters={"max_white": 1})
    assert made.counts == {"grid": WHOLE_TILES, "kept": WHOLE_TILES - 1, "unreadable": 1}
    assert [128, 128] not in store.xy_level0.tolist()  # the second of the second row: a row has eight


def test_too_many_of_them_and_the_slide_fails_and_leaves_nothing(damaged, tmp_path):
    with pytest.raises(UnreadableSlideError, match="1 of 35 tiles cannot be decoded"):
        run(damaged, tmp_path, **NATIVE, **SMALL, max_unreadable=0.02)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.tiff"]


def test_what_the_scanner_left_out_is_outside(tmp_path, tissue):
    path, options = tmp_path / "slide.tiff", TiffOptions(tile_px=TILE)
    with SlideWriter(path, options) as writer:
        writer.write_level([b"" if number == 9 else tile for number, tile in enumerate(encode_tiles(tissue, options))], SIZE)
    keep = {**ALL, "filters": {"max_white": 1}}
    for native in ({"codec": "zstd"}, {"codec": "auto"}, {"codec": "auto", "filters": {"measure": False}}):
        made, store = run(path, tmp_path, **{**NATIVE, **keep, **native})
        assert made.counts == {"grid": WHOLE_TILES, "kept": WHOLE_TILES - 1, "outside": 1}
        assert [128, 128] not in store.xy_level0.tolist()
    made, store = run(path, tmp_path, **NATIVE, **keep, edge="pad")
    assert made.counts == {"grid": 8 * 6, "kept": 8 * 6}
    outside = dict(zip(map(tuple, store.xy_level0.tolist()), store.quality[:, 1], strict=True))
    assert outside[128, 128] == 1
    assert outside[0, 0] == 0
    assert outside[896, 0] == pytest.approx(124 / 128)
    assert (store[9] == 255).all()


def test_padding_is_white_and_flagged(slide, tmp_path):
    made, store = run(slide, tmp_path, **PLAIN, codec="zstd", edge="pad", keep_px=80)
    assert made.counts == {"grid": 8 * 6, "kept": 8 * 6}
    assert store.tile_px == 80
    assert store.tile_sides_level0 == (160.0, 160.0)
    assert store.xy_level0[0].tolist() == [-16, -16]
    assert (store[0][:8] == 255).all()
    assert (store[0][:, :8] == 255).all()
    assert store.quality[0, 1] == pytest.approx(1 - 72**2 / 80**2)


def test_annotations_include_and_exclude(slide, tmp_path):
    def square(name, left, top, right, bottom):
        ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
        shape = {"type": "Polygon", "coordinates": [ring]}
        return {"type": "Feature", "geometry": shape, "properties": {"classification": {"name": name}}}

    drawn = [square("Tumor", 0, 0, 512, 512), square("Fold", 0, 0, 128, 512)]
    (tmp_path / "slide.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": drawn}))
    annotated = {"method": "off", "annotations": tmp_path, "include": ["Tumor"], "exclude": ["Fold"]}
    made, store = run(slide, tmp_path, filters={"measure": False}, tissue=annotated)
    assert made.counts == {"grid": 35, "kept": 12, "no tissue": 23}
    assert store.xy_level0.max(axis=0).tolist() == [384, 384]
    assert store.xy_level0.min(axis=0).tolist() == [128, 0]
    made, store = run(slide, tmp_path, tissue={**annotated, "include": ["Tumour"]})
    assert (made.counts["kept"], len(store)) == (0, 0)
    assert "did you mean Tumor" in store.attrs["notes"][0]


def left_half(thumbnail, mpp):
    """A mask of one's own."""
    mask = np.zeros(thumbnail.shape[:2], dtype=bool)
    mask[:, : thumbnail.shape[1] // 2] = True
    return mask


def test_a_mask_of_ones_own(slide, tmp_path):
    _, store = run(
        slide,
        tmp_path,
        tissue={"plugin": f"{__name__}:left_half", "min_area_um2": 0, "max_hole_um2": 0},
        filters={"measure": False},
    )
    assert store.xy_level0[:, 0].max() == 3 * 128
    assert len(store) == 4 * 5


def test_why_a_slide_is_empty(slide, tmp_path):
    made, store = run(slide, tmp_path, tile_px=1024)
    assert made.empty_reason == "slide of 900 x 700 px is smaller than one tile (2048 x 2048 level-0 px at 0.5 mpp)"
    assert store.attrs["empty_reason"] == made.empty_reason
    assert (len(store), store.xy_level0.shape, store.quality.shape) == (0, (0, 2), (0, len(Quality._fields)))
    glass = dotted(tmp_path / "glass.png", np.full((800, 1200, 3), 243, np.uint8))
    made, store = run(glass, tmp_path)
    assert made.empty_reason == "no tile of 216 was kept: no tissue 216"
    made, _ = run(glass, tmp_path, **ALL)
    assert made.empty_reason == "no tile of 216 was kept: white 216"


# What other tools chose


@pytest.mark.parametrize("tool", ["clam", "trident"])
def test_tiles_that_another_tool_chose(slide, tmp_path, tool):
    (tmp_path / "ours").mkdir()
    _, ours = run(slide, tmp_path / "ours", codec="zstd")
    export_tiles(ours, tmp_path / "theirs", tool)
    _, again = run(slide, tmp_path, codec="zstd", coords=tmp_path / "theirs", **ALL)
    assert np.array_equal(again.xy_level0, ours.xy_level0)
    assert again.tile_side_level0 == ours.tile_side_level0
    assert all(np.array_equal(again[row], ours[row]) for row in range(len(ours)))
    with pytest.raises(SlideError, match="no file of coordinates"):
        run(slide, tmp_path, row={"slide_id": "other"}, coords=tmp_path / "theirs")


# Colour and notes


def test_the_scanners_profile_is_applied_on_request_and_said(tmp_path, tissue):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"temp").replace(b"bXYZ", b"rXYZ").replace(b"temp", b"bXYZ")
    write_pyramid(tmp_path / "slide.svs", [tissue], TiffOptions("aperio", TILE, icc=swapped))
    common = {**NATIVE, **PLAIN, "codec": "zstd"}
    _, plain = run(tmp_path / "slide.svs", tmp_path, **common)
    before = plain[17]
    _, applied = run(tmp_path / "slide.svs", tmp_path, **common, colour={"icc": True})
    assert (plain.attrs["icc_applied"], applied.attrs["icc_applied"]) == (False, True)
    assert len(applied.attrs["icc_sha256"]) == 64
    assert np.abs(applied[17].astype(int) - before[..., ::-1]).max() <= 1
    _, applied = run(tmp_path / "slide.svs", tmp_path, **{**common, "codec": "auto"}, colour={"icc": True})
    assert applied.attrs["passed_through"] is False


def test_stains_are_estimated_and_normalised_on_request(slide, tmp_path):
    _, plain = run(slide, tmp_path, codec="zstd")
    before, xy = plain.read(range(len(plain))), plain.xy_level0
    _, normal = run(slide, tmp_path, codec="zstd", colour={"normalise": "macenko"})
    assert plain.attrs["stains"] == normal.attrs["stains"]
    assert set(plain.attrs["stains"]) == {"haematoxylin", "eosin", "max_concentration", "glass"}
    # Quality is measured before colours change, so the same tiles are kept.
    assert np.array_equal(normal.xy_level0, xy)
    assert np.abs(normal.read(range(len(xy))).astype(int) - before).mean() > 2
    blank = dotted(tmp_path / "blank.png", np.full((300, 400, 3), 243, np.uint8))
    _, store = run(blank, tmp_path, colour={"normalise": "macenko"}, **ALL)
    assert "colours are not normalised" in store.attrs["notes"][0]
    assert store.attrs["stains"] is None


def test_contradictions_are_noted(slide, tmp_path):
    _, store = run(slide, tmp_path, row={"mpp": 0.3})
    assert store.attrs["slide_mpp"] == [0.3, 0.3]
    assert "the cohort table says 0.3 mpp, the file 0.25" in store.attrs["notes"]


# Engines


@pytest.mark.parametrize("dialect", ["aperio", "generic"])
def test_both_engines_keep_the_same_tiles(tmp_path, tissue, dialect):
    path = tmp_path / "slide.tiff"
    write_pyramid(path, pyramid(tissue, (1, 4)), TiffOptions(dialect, TILE))
    for settings, least in (({"mpp": 0.25}, np.inf), ({"mpp": 0.5}, 40.0)):
        stores = []
        for engine in ("auto", "openslide"):
            (tmp_path / engine).mkdir(exist_ok=True)
            _, store = run(path, tmp_path / engine, codec="zstd", reader=engine, **settings)
            stores.append(store)
        ours, theirs = stores
        assert (ours.attrs["reader"], theirs.attrs["reader"]) == ("direct", "openslide")
        assert np.array_equal(ours.xy_level0, theirs.xy_level0)
        assert ours.attrs["counts"] == theirs.attrs["counts"]
        error = ((ours.read(range(len(ours))).astype(float) - theirs.read(range(len(ours)))) ** 2).mean()
        assert (10 * np.log10(255**2 / error) if error else np.inf) >= least


def test_both_engines_on_a_real_slide(shared_data, tmp_path):
    path, stores = shared_data / "slides" / "CMU-1-Small-Region.svs", []
    for engine in ("auto", "openslide"):
        (tmp_path / engine).mkdir()
        stores.append(run(path, tmp_path / engine, tile_px=240, codec="zstd", reader=engine)[1])
    ours, theirs = stores
    assert ours.mpp == pytest.approx(0.499)
    assert len(ours) > 20
    assert ours.attrs["counts"] == theirs.attrs["counts"]
    assert np.array_equal(ours.quality, theirs.quality)
    assert all(np.array_equal(ours[row], theirs[row]) for row in range(len(ours)))
