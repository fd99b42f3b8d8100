"""Reading stored JPEG tiles directly: the pixels of OpenSlide, the same with any number of threads, nothing made up."""

from __future__ import annotations

import logging
from dataclasses import replace

import cv2
import numpy as np
import pytest

from pathfm import jpeg
from pathfm.errors import UnreadableSlideError
from pathfm.geometry import Size
from pathfm.slides import direct
from pathfm.slides.reader import open_slide
from pathfm.slides.stored import StoredLevel
from pathfm.slides.synthetic import SyntheticSpec, draw_slide
from pathfm.slides.synthetic_tiff import PATIENT, TiffOptions, encode_tiles, write_pyramid
from pathfm.slides.tile_reading import TileRead, coincides, read_tiles
from pathfm.study import TileSettings
from pathfm.tile.grid import plan_grids
from tests.slides.crosses import pyramid

SIZE = Size(900, 700)
KINDS = {
    "aperio": TiffOptions("aperio", shared_tables=True),
    "aperio rgb": TiffOptions("aperio", Size(240, 240), "rgb", shared_tables=True),
    "aperio 422": TiffOptions("aperio", Size(256, 128), "422"),
    "generic": TiffOptions(tile_px=Size(128, 128)),
    "generic big": TiffOptions(big=True, byte_order="big", colour="444"),
}


@pytest.fixture(scope="module")
def tissue():
    return draw_slide(SyntheticSpec(size_px=SIZE, seed=3))[0]


@pytest.fixture(params=KINDS)
def slide(request, tmp_path, tissue):
    options = replace(KINDS[request.param], comment=PATIENT)
    write_pyramid(tmp_path / "slide.tiff", pyramid(tissue, (1, 2, 4.01)), options)
    return tmp_path / "slide.tiff"


def planned(reader, **settings):
    return plan_grids(reader.metadata.levels, reader.metadata.mpp, TileSettings(**settings))[0].cut


def kept(_, tile):
    return tile


def test_every_level_is_bit_identical_to_openslide(slide):
    with open_slide(slide) as ours, open_slide(slide, "openslide") as theirs:
        assert (ours.name, theirs.name) == ("direct", "openslide")
        for level, (size, _) in enumerate(ours.metadata.levels):
            # From the corner OpenSlide draws exactly, whatever the downsample.
            assert np.array_equal(ours.read_region(0, 0, level, size), theirs.read_region(0, 0, level, size))
        thumbnails = [reader.thumbnail(300)[0] for reader in (ours, theirs)]
        assert np.array_equal(*thumbnails)


@pytest.mark.parametrize("settings", [{"mpp": "native", "tile_px": 100}, {"mpp": 0.25, "tile_px": 64, "overlap_px": 24}])
def test_full_scale_tiles_are_crops_of_openslides_picture(slide, settings):
    with open_slide(slide) as ours, open_slide(slide, "openslide") as theirs:
        cut = planned(ours, **settings)
        whole = theirs.read_region(0, 0, 0, theirs.metadata.size_level0)
        tiles = list(read_tiles(ours, cut, range(len(cut.boxes)), kept))
    assert [index for index, _ in tiles] == list(range(len(cut.boxes)))
    for index, tile in tiles:
        left, top, right, bottom = cut.box(index)
        assert np.array_equal(tile.pixels, whole[top:bottom, left:right])
        assert tile.outside == 0


def test_shrunk_tiles_are_those_of_an_area_filter_but_for_rounding(slide):
    with open_slide(slide) as ours, open_slide(slide, "openslide") as theirs:
        if ours.stored[0].tile.width == 240:
            pytest.skip("hard colour edges of this small RGB picture ring in the DCT")
        cut = planned(ours, mpp=0.5, tile_px=100, mpp_tolerance=0.0)
        assert (cut.level, cut.shrink) == (1, 1)
        cut = cut._replace(level=0, shrink=2)
        direct_tiles = dict(read_tiles(ours, cut, range(len(cut.boxes)), kept))
        area_tiles = dict(read_tiles(theirs, cut, range(len(cut.boxes)), kept))
    error = np.stack([direct_tiles[index].pixels.astype(float) - area_tiles[index].pixels for index in direct_tiles])
    assert 10 * np.log10(255**2 / (error**2).mean()) > 40
    assert abs(error.mean()) < 0.5


@pytest.mark.parametrize("settings", [{"mpp": 0.25, "tile_px": 50}, {"mpp": 0.61, "tile_px": 40, "overlap_px": 8}])
def test_threads_do_not_change_a_pixel_or_the_order(slide, settings):
    with open_slide(slide) as reader:
        cut = planned(reader, **settings)
        chosen = [index for index in range(len(cut.boxes)) if index % 5]
        one, three = (list(read_tiles(reader, cut, chosen, kept, threads=threads)) for threads in (1, 3))
    assert [index for index, _ in one] == chosen == [index for index, _ in three]
    assert all(np.array_equal(a.pixels, b.pixels) for (_, a), (_, b) in zip(one, three, strict=True))


def test_stored_tiles_are_decoded_once(tmp_path, tissue, monkeypatch):
    write_pyramid(tmp_path / "slide.tiff", [tissue], TiffOptions(tile_px=Size(128, 128)))
    decoded = []
    plain = StoredLevel.decode
    with open_slide(tmp_path / "slide.tiff") as reader:
        monkeypatch.setattr(
            StoredLevel, "decode", lambda self, number, shrink: decoded.append(number) or plain(self, number, shrink)
        )
        cut = planned(reader, mpp=0.25, tile_px=100, overlap_px=30)
        for _ in read_tiles(reader, cut, range(len(cut.boxes)), kept):
            pass
    assert sorted(decoded) == sorted(set(decoded))


def test_tiles_that_coincide_pass_through_without_what_people_wrote(slide, tissue):
    with open_slide(slide) as reader:
        tile = reader.stored[0].tile
        if tile.width != tile.height:
            pytest.skip("tiles are square")
        cut = planned(reader, mpp="native", tile_px=tile.width)
        assert coincides(reader, cut)
        assert not coincides(reader, planned(reader, mpp="native", tile_px=tile.width - 16))
        tiles = dict(read_tiles(reader, cut, range(len(cut.boxes)), kept, stored=True))
        blind = dict(read_tiles(reader, cut, range(len(cut.boxes)), kept, stored=True, pixels=False))
    data = slide.read_bytes()
    assert PATIENT.encode() in data
    for index, (pixels, _, stored) in tiles.items():
        assert np.array_equal(jpeg.decode(stored), pixels)
        # A decoder of another family: OpenCV's own libjpeg.
        other = cv2.cvtColor(cv2.imdecode(np.frombuffer(stored, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        assert np.array_equal(other, pixels)
        assert PATIENT.encode() not in stored
        assert blind[index] == TileRead(None, 0.0, stored)
        # The entropy-coded data is the file's own.
        scan = stored[stored.index(b"\xff\xda") :]
        assert scan in data


def test_a_slide_that_would_read_differently_is_read_by_openslide_and_the_log_says_so(tmp_path, tissue, monkeypatch, caplog):
    write_pyramid(tmp_path / "slide.tiff", [tissue], TiffOptions())
    plain = jpeg.decode_shrunk
    monkeypatch.setattr(jpeg, "decode_shrunk", lambda *given: plain(*given) ^ 1)
    with caplog.at_level(logging.WARNING), open_slide(tmp_path / "slide.tiff") as reader:
        assert reader.name == "openslide"
    assert "read by openslide, not directly: tile" in caplog.text
    assert "slide.tiff" not in caplog.text, "it may name a patient"


def test_other_vendors_are_left_to_openslide(tmp_path, tissue, monkeypatch):
    write_pyramid(tmp_path / "slide.tiff", [tissue], TiffOptions())
    monkeypatch.setattr(direct, "VENDORS", set())
    with open_slide(tmp_path / "slide.tiff") as reader:
        assert reader.name == "openslide"


def test_a_damaged_tile_is_unreadable_and_its_neighbours_are_not(tmp_path, tissue):
    path, options = tmp_path / "slide.tiff", TiffOptions(tile_px=Size(128, 128))
    write_pyramid(path, [tissue], options)
    data = bytearray(path.read_bytes())
    tile = list(encode_tiles(tissue, options))[9]
    start = data.index(tile)
    data[start + len(tile) // 2 : start + len(tile) - 2] = bytes(len(tile) - 2 - len(tile) // 2)
    path.write_bytes(data)
    with open_slide(path) as reader:
        assert reader.name == "direct"
        for settings in ({"tile_px": 128}, {"tile_px": 60}):
            cut = planned(reader, mpp="native", **settings)
            results = dict(read_tiles(reader, cut, range(len(cut.boxes)), kept, threads=2))
            bad = {index for index, result in results.items() if isinstance(result, UnreadableSlideError)}
            hit = {index for index in results if 9 in reader.stored[0].numbers(cut.box(index), 1)}
            assert bad == hit
        assert hit
        with pytest.raises(UnreadableSlideError, match="x=128 y=128"):
            reader.read_region(128, 128, 0, Size(10, 10))


def test_a_tile_that_the_scanner_left_out_is_outside_and_white(tmp_path, tissue):
    path = tmp_path / "slide.tiff"
    options = TiffOptions(tile_px=Size(128, 128))
    tiles = encode_tiles(tissue, options)
    from pathfm.slides.synthetic_tiff import SlideWriter

    with SlideWriter(path, options) as writer:
        writer.write_level([b"" if number == 9 else tile for number, tile in enumerate(tiles)], SIZE, 1.0)
    with open_slide(path) as reader:
        assert reader.name == "direct"
        region = reader.read(100, 128, 0, Size(56, 128))
        assert region.outside == pytest.approx(0.5)
        assert (region.pixels[:, 28:] == 255).all()
        cut = planned(reader, mpp="native", tile_px=128)
        assert dict(read_tiles(reader, cut, [8], kept))[8].outside == 1  # the grid has whole tiles only: 7 in a row


def test_real_slides_are_read_directly_and_exactly(shared_data):
    for name in ("CMU-1-Small-Region.svs", "her2st_C3.svs"):
        path = shared_data / "slides" / name
        with open_slide(path) as ours, open_slide(path, "openslide") as theirs:
            assert ours.name == "direct"
            assert ours.metadata == theirs.metadata
            box = (500, 700, 0, Size(1000, 900))
            assert np.array_equal(ours.read_region(*box), theirs.read_region(*box))
