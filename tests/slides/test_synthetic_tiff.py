"""Slides written as scanners do: OpenSlide and tifffile take them for the real thing, pixel for pixel."""

import struct

import cv2
import numpy as np
import openslide
import pytest
import simplejpeg
import tifffile

from pathfm import jpeg
from pathfm.geometry import Mpp, Size
from pathfm.slides.synthetic_streams import encode_stream, split_tables
from pathfm.slides.synthetic_tiff import (
    PATIENT,
    SlideWriter,
    TiffOptions,
    encode_block,
    encode_tiles,
    label_picture,
    write_pyramid,
    write_repeated_slide,
)
from tests.slides.crosses import draw_crosses, find_cross, pyramid


@pytest.fixture(scope="module")
def picture():
    """Smooth colours with crosses, of an odd size."""
    rows, columns = np.mgrid[0:701, 0:1003]
    colours = np.stack([120 + columns / 10, 90 + rows / 8, 200 - columns / 12], axis=-1).astype(np.uint8)
    ink = draw_crosses(Size(1003, 701), [(100.5 + 150 * x, 90 + 170 * y) for x in range(6) for y in range(4)])
    return np.minimum(colours, ink)


def stored_tile(page, number):
    """A tile's stored stream made whole, decoded by simplejpeg."""
    page.parent.filehandle.seek(page.dataoffsets[number])
    stream = page.parent.filehandle.read(page.databytecounts[number])
    if page.compression == 1:
        return np.frombuffer(stream, np.uint8).reshape(page.tilelength, page.tilewidth, 3)
    whole, _ = jpeg.Wrapper(page.jpegtables, rgb=page.photometric == 2).wrap(stream)
    return jpeg.decode(whole)


def opened(slide, level=0):
    region = slide.read_region((0, 0), level, slide.level_dimensions[level])
    return np.asarray(region)[..., :3]


@pytest.mark.parametrize("shared_tables", [True, False])
@pytest.mark.parametrize("colour", ["420", "422", "444", "rgb"])
@pytest.mark.parametrize("tile", [Size(256, 256), Size(240, 240), Size(256, 128)])
def test_an_svs_is_aperio_to_openslide_pixel_for_pixel(picture, tmp_path, tile, colour, shared_tables):
    options = TiffOptions("aperio", tile, colour, shared_tables=shared_tables, comment="a note")
    levels = pyramid(picture, (1, 2, 4))
    write_pyramid(tmp_path / "s.svs", levels, options)
    with openslide.OpenSlide(tmp_path / "s.svs") as slide, tifffile.TiffFile(tmp_path / "s.svs") as tiff:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert float(slide.properties["openslide.mpp-x"]) == float(slide.properties["openslide.mpp-y"]) == 0.25
        assert float(slide.properties["openslide.objective-power"]) == 40
        assert slide.level_dimensions == tuple(level.shape[1::-1] for level in levels)
        assert set(slide.associated_images) == {"thumbnail", "label", "macro"}
        assert [page.is_tiled for page in tiff.pages] == [True, False, True, True, False, False]
        assert tiff.pages[0].photometric == (2 if colour == "rgb" else 6)
        assert bool(tiff.pages[0].jpegtables) == shared_tables
        shown = opened(slide)
        assert np.abs(shown.astype(int) - picture).mean() < 3
        across = -(-picture.shape[1] // tile.width)
        assert np.array_equal(shown[: tile.height, : tile.width], stored_tile(tiff.pages[0], 0))
        inner = shown[tile.height : 2 * tile.height, tile.width : 2 * tile.width]
        assert np.array_equal(inner, stored_tile(tiff.pages[0], across + 1))


def test_the_label_page_shows_the_name(picture, tmp_path):
    write_pyramid(tmp_path / "s.svs", [picture], TiffOptions("aperio"))
    with openslide.OpenSlide(tmp_path / "s.svs") as slide:
        label = np.asarray(slide.associated_images["label"])[..., :3]
        assert PATIENT in slide.properties["aperio.Filename"]
    assert np.array_equal(label, label_picture(Size(387, 463)))


def test_nothing_says_that_rgb_is_rgb():
    stream = encode_stream(np.full((16, 16, 3), (200, 40, 90), np.uint8), "rgb", 95)
    assert b"Adobe" not in stream
    assert b"JFIF" not in stream
    wrong = simplejpeg.decode_jpeg(stream)
    assert np.abs(wrong.astype(int) - (200, 40, 90)).max() > 50
    right, frame = jpeg.Wrapper(None, rgb=True).wrap(stream)
    assert np.abs(jpeg.decode(right).astype(int) - (200, 40, 90)).max() <= 2
    assert frame.components == 3


def test_abbreviated_streams_have_no_tables():
    stream = encode_stream(np.zeros((16, 16, 3), np.uint8), "420", 80)
    tables, rest = split_tables(stream)
    kinds = [kind for kind, _ in jpeg.segments(rest)]
    assert not {jpeg.DQT, jpeg.DHT, 0xE0} & set(kinds)
    assert {kind for kind, _ in jpeg.segments(tables)} == {jpeg.DQT, jpeg.DHT}
    with pytest.raises(ValueError):
        jpeg.decode(rest)


@pytest.mark.parametrize("byte_order", ["little", "big"])
@pytest.mark.parametrize("big", [True, False])
@pytest.mark.parametrize("colour", ["420", "rgb", "raw"])
def test_generic_tiffs_of_every_kind(picture, tmp_path, byte_order, big, colour):
    options = TiffOptions(colour=colour, mpp=Mpp(0.25, 0.2527), big=big, byte_order=byte_order, shared_tables=colour == "420")
    levels = pyramid(picture, (1, 2.7))
    write_pyramid(tmp_path / "s.tiff", levels, options)
    head = (tmp_path / "s.tiff").read_bytes()[:4]
    assert struct.unpack("<2sH" if byte_order == "little" else ">2sH", head)[1] == (43 if big else 42)
    with tifffile.TiffFile(tmp_path / "s.tiff") as tiff:
        assert [(page.imagewidth, page.imagelength) for page in tiff.pages] == [(1003, 701), (371, 260)]
        assert np.abs(stored_tile(tiff.pages[0], 0).astype(int) - picture[:256, :256]).mean() < 3
    if not big and byte_order == "big":
        # OpenSlide 4.0.1 takes big-endian files of the classic kind for no TIFF at all, whoever wrote them.
        assert openslide.OpenSlide.detect_format(tmp_path / "s.tiff") is None
        return
    with openslide.OpenSlide(tmp_path / "s.tiff") as slide:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.2527, rel=1e-6)
        assert slide.level_dimensions == ((1003, 701), (371, 260))
        difference = np.abs(opened(slide).astype(int) - picture)
    assert difference.max() == 0 if colour == "raw" else difference.mean() < 3


@pytest.mark.parametrize("byte_order", ["little", "big"])
def test_ome_keeps_its_pyramid_in_subifds(picture, tmp_path, byte_order):
    levels = pyramid(picture, (1, 2, 4))
    for colour, name in (("raw", "raw.ome.tiff"), ("444", "jpeg.ome.tiff")):
        options = TiffOptions("ome", Size(256, 256), colour, mpp=Mpp(0.5, 0.4), big=True, byte_order=byte_order)
        write_pyramid(tmp_path / name, levels, options)
        with tifffile.TiffFile(tmp_path / name) as tiff:
            assert tiff.is_ome
            assert 'PhysicalSizeX="0.5" PhysicalSizeXUnit="µm" PhysicalSizeY="0.4"' in tiff.ome_metadata
            assert [level.shape for level in tiff.series[0].levels] == [level.shape for level in levels]
            if colour == "raw":
                assert all(
                    np.array_equal(found.asarray(), level) for found, level in zip(tiff.series[0].levels, levels, strict=True)
                )
            else:
                tile = stored_tile(tiff.series[0].levels[1].pages[0], 0)
                assert np.abs(tile.astype(int) - levels[1][:256, :256]).mean() < 3


def test_a_flat_tiff_has_strips_and_no_scale(picture, tmp_path):
    write_pyramid(tmp_path / "flat.tif", [picture], TiffOptions(tile_px=None, colour="raw", mpp=None))
    assert openslide.OpenSlide.detect_format(tmp_path / "flat.tif") is None
    with tifffile.TiffFile(tmp_path / "flat.tif") as tiff:
        assert not tiff.pages[0].is_tiled
        assert 282 not in tiff.pages[0].tags
        assert np.array_equal(tiff.asarray(), picture)


def test_a_missing_tile_has_no_bytes(picture, tmp_path):
    options = TiffOptions("aperio")
    tiles = list(encode_tiles(picture, options))
    tiles[1] = b""
    with SlideWriter(tmp_path / "s.svs", options) as slide:
        slide.write_level(tiles, Size(1003, 701))
    with tifffile.TiffFile(tmp_path / "s.svs") as tiff:
        assert (tiff.pages[0].dataoffsets[1], tiff.pages[0].databytecounts[1]) == (0, 0)


def test_a_slide_of_any_size_costs_one_block(tmp_path):
    options = TiffOptions("aperio", shared_tables=True, share_tiles=True)
    block = draw_crosses(Size(1024, 1024), [(300, 200), (700, 900)])
    write_repeated_slide(tmp_path / "s.svs", Size(20_000, 9_000), encode_block(block, (1, 4), options), options)
    assert (tmp_path / "s.svs").stat().st_size < 650_000
    with openslide.OpenSlide(tmp_path / "s.svs") as slide:
        assert slide.level_dimensions == ((20_000, 9_000), (5_000, 2_250))
        for level, downsample in enumerate((1, 4)):
            corner = (5 * 1024 + 200, 3 * 1024 + 100)
            region = np.asarray(slide.read_region(corner, level, (200 // downsample, 200 // downsample)))[..., :3]
            assert find_cross(region) == pytest.approx((100 / downsample, 100 / downsample), abs=0.05)
    with pytest.raises(ValueError, match="whole tiles"):
        encode_block(block, (1, 8), options)


def test_the_same_options_give_the_same_bytes(picture, tmp_path):
    for name in ("a.svs", "b.svs"):
        write_pyramid(tmp_path / name, pyramid(picture, (1, 4)), TiffOptions("aperio", shared_tables=True))
    assert (tmp_path / "a.svs").read_bytes() == (tmp_path / "b.svs").read_bytes()


@pytest.mark.parametrize("centre", [(32, 32), (30.5, 33.25), (29.1, 34.9)])
def test_a_cross_is_found_where_it_was_drawn(centre):
    picture = draw_crosses(Size(64, 64), [centre])
    assert find_cross(picture) == pytest.approx(centre, abs=0.02)
    stored = jpeg.decode(jpeg.encode(picture, 90))
    assert find_cross(stored) == pytest.approx(centre, abs=0.05)
    half = cv2.resize(picture, (32, 32), interpolation=cv2.INTER_AREA)
    assert find_cross(half) == pytest.approx((centre[0] / 2, centre[1] / 2), abs=0.02)


def test_a_picture_without_a_cross_has_none():
    assert find_cross(draw_crosses(Size(64, 64), [])) is None
