"""What is particular to one reader or one kind of file."""

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from pathfm.errors import UnreadableSlideError
from pathfm.geometry import Size
from pathfm.slides import image_reader, reader, tiff_reader
from pathfm.slides.image_reader import ArrayReader
from pathfm.slides.reader import NOT_DECODED, checked_mpp, is_tile_folder, on_white, open_slide, slide_identity

DATA = Path(os.environ.get("PATHFM_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real slides are not here (set PATHFM_TEST_DATA)")


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 255, (height, width, channels), dtype=np.uint8)


def encoded(kind):
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(buffer, kind)
    return buffer.getvalue()


def tiled(path, rgb, **options):
    tifffile.imwrite(path, rgb, photometric="rgb", tile=(64, 64), metadata=None, **options)
    return path


BROKEN = {
    "empty.svs": b"",
    "text.svs": b"this is no slide\n" * 50,
    "zeros.tif": bytes(2000),
    "no-directory.tif": b"II*\0\xff\xff\xff\x7f",
    "header.svs": b"II*\0\x08\0\0\0\x01\0",
    "short.png": encoded("PNG")[:900],
    "short.jpg": encoded("JPEG")[:900],
    "short.bmp": encoded("BMP")[:900],
    "bad.dcm": bytes(128) + b"DICM" + b"garbage" * 20,
    "bad.mrxs": b"nothing",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_has_a_named_error(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(BROKEN[name])
    with pytest.raises(UnreadableSlideError, match=name) as caught:
        open_slide(path)
    assert caught.value.fix
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_unfit_folder(tmp_path):
    for path in (tmp_path / "none.svs", tmp_path):
        with pytest.raises(UnreadableSlideError, match=path.name):
            open_slide(path)
    with pytest.raises(UnreadableSlideError, match=r"none\.svs"):
        slide_identity(tmp_path / "none.svs")


@pytest.mark.parametrize("size", [300, 3000, 20_000])
@pytest.mark.parametrize("where", ["openslide", "tiff"])
def test_a_truncated_slide_fails_by_name_or_reads_right(where, size, tmp_path):
    rgb = noise(256, 256)
    path = tmp_path / "cut.tif"
    tifffile.imwrite(
        path, rgb, photometric="rgb", metadata=None, **({"tile": (64, 64)} if where == "openslide" else {"rowsperstrip": 9})
    )
    with path.open("r+b") as file:
        file.truncate(size)
    try:
        with open_slide(path) as slide:
            region = slide.read_region(0, 0, 0, Size(256, 256))
    except UnreadableSlideError as error:
        assert "cut.tif" in str(error)
    else:
        assert np.array_equal(region, rgb)


def damaged_tile(tmp_path, *, every=False):
    """A tiled slide whose tile at (64, 0), or every one, is rubbish, and its right pixels."""
    rgb = noise(256, 256)
    path = tiled(tmp_path / "damaged.tif", rgb, compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        places = list(zip(tiff.pages[0].dataoffsets, tiff.pages[0].databytecounts, strict=True))
    data = bytearray(path.read_bytes())
    for offset, count in places if every else places[1:2]:
        data[offset : offset + count] = b"\xab" * count
    path.write_bytes(data)
    return path, rgb


@pytest.mark.parametrize("module", [reader, tiff_reader])
def test_one_damaged_tile_is_named_and_the_others_still_read(module, tmp_path, monkeypatch):
    path, rgb = damaged_tile(tmp_path)
    slide = open_slide(path) if module is reader else tiff_reader.open_tiff(path)
    with slide:
        for _ in range(2):
            with pytest.raises(UnreadableSlideError, match=r"x=70 y=3 of level 0"):
                slide.read_region(70, 3, 0, Size(16, 16))
            assert np.array_equal(slide.read_region(128, 0, 0, Size(64, 64)), rgb[:64, 128:192])
        monkeypatch.setattr(reader, "THUMBNAIL_READ_PX", 64)
        small, _ = slide.thumbnail(64)
    assert (small[:16, 16:32] == NOT_DECODED).all()
    assert abs(small[16:].astype(float).mean() - rgb[64:].mean()) < 3


def test_a_slide_that_is_all_damaged_has_no_thumbnail(tmp_path):
    path, _ = damaged_tile(tmp_path, every=True)
    with open_slide(path) as slide, pytest.raises(UnreadableSlideError):
        slide.thumbnail(64)


def test_a_thumbnail_reads_bounded_regions(monkeypatch):
    asked = []

    class Watched(ArrayReader):
        def read_region(self, x_level0, y_level0, level, size):
            asked.append(size)
            return super().read_region(x_level0, y_level0, level, size)

    yx = np.indices((700, 1100)) // 5
    rgb = np.stack([yx[0], yx[1], yx[0]], axis=-1).astype(np.uint8)
    whole, _ = ArrayReader(rgb).thumbnail(130)
    monkeypatch.setattr(reader, "THUMBNAIL_READ_PX", 100)
    pieces, _ = Watched(rgb).thumbnail(130)
    assert max(max(size) for size in asked) <= 101
    assert np.abs(whole.astype(int) - pieces).max() <= 1


def test_transparent_is_white():
    rgba = np.zeros((2, 2, 4), dtype=np.uint8)
    rgba[0, 0], rgba[0, 1], rgba[1, 0] = (10, 20, 30, 255), (10, 20, 30, 0), (0, 100, 255, 128)
    assert on_white(rgba).tolist() == [[[10, 20, 30], [255, 255, 255]], [[127, 177, 255], [255, 255, 255]]]


def test_transparent_files_are_white(tmp_path):
    rgba = np.dstack([noise(40, 30), np.zeros((40, 30), dtype=np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    tifffile.imwrite(tmp_path / "clear.tif", rgba, photometric="rgb", extrasamples=["unassalpha"], metadata=None)
    for name in ("clear.png", "clear.tif"):
        with open_slide(tmp_path / name) as slide:
            assert (slide.read_region(0, 0, 0, Size(30, 40)) == 255).all()


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "grey.jpg"])
def test_grey_becomes_rgb(name, tmp_path):
    grey = np.tile(np.arange(64, dtype=np.uint8)[:, None] * 3, (1, 80))
    Image.fromarray(grey).save(tmp_path / name)
    with open_slide(tmp_path / name) as slide:
        region = slide.read_region(8, 16, 0, Size(16, 16))
    assert np.abs(region.astype(int) - grey[16:32, 8:24, None]).max() <= 2


UNFIT = {
    "deep.tif": (noise(64, 64).astype(np.uint16), {"photometric": "rgb"}),
    "deep-tiled.tif": (noise(64, 64).astype(np.uint16), {"photometric": "rgb", "tile": (32, 32)}),
    "deep-grey.tif": (noise(64, 64)[..., 0].astype(np.uint16), {}),
    "float.tif": (noise(64, 64)[..., 0].astype(np.float32), {}),
    "channels.ome.tif": (noise(5, 64, 64), {"photometric": "minisblack", "metadata": {"axes": "CYX"}}),
    "channels-tiled.ome.tif": (noise(5, 64, 64), {"photometric": "minisblack", "metadata": {"axes": "CYX"}, "tile": (32, 32)}),
}


@pytest.mark.parametrize("name", UNFIT)
def test_deep_and_fluorescence_pictures_are_refused(name, tmp_path):
    pixels, options = UNFIT[name]
    tifffile.imwrite(tmp_path / name, pixels, **options)
    with pytest.raises(UnreadableSlideError, match="8-bit"):
        open_slide(tmp_path / name)


def test_deep_png_is_refused(tmp_path):
    Image.fromarray(noise(9, 9)[..., 0].astype(np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UnreadableSlideError, match="8-bit"):
        open_slide(tmp_path / "deep.png")


def test_huge_pictures_are_refused_by_name(tmp_path, monkeypatch):
    Image.fromarray(noise(40, 40)).save(tmp_path / "huge.png")
    tifffile.imwrite(tmp_path / "huge.tif", noise(40, 40), photometric="rgb", rowsperstrip=40, metadata=None)
    monkeypatch.setattr(image_reader, "MAX_IMAGE_PX", 1000)
    monkeypatch.setattr(tiff_reader, "MAX_SEGMENT_PX", 1000)
    for name in ("huge.png", "huge.tif"):
        with pytest.raises(UnreadableSlideError, match="more than 1000 pixels"):
            open_slide(tmp_path / name)


def test_a_decompression_bomb_is_refused_by_name(tmp_path, monkeypatch):
    Image.fromarray(noise(40, 40)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(UnreadableSlideError, match=r"bomb\.png"):
        open_slide(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    ("x", "y", "kept"), [(0.25, 0.25, True), (0.25, 0.26, True), (352.78, 352.78, False), (0.0, 0.0, False)]
)
def test_scales_are_checked(x, y, kept):
    mpp, source = checked_mpp(x, y, "some.key")
    assert mpp == ((x, y) if kept else None)
    assert source.startswith("some.key")
    assert ("says" in source) != kept


def test_scale_of_one_axis_or_none():
    assert checked_mpp(0.5, None, "key") == ((0.5, 0.5), "key")
    assert checked_mpp(None, None, "key") == (None, "")


def test_a_default_resolution_tag_is_no_scale(tmp_path):
    tiled(tmp_path / "a.tif", noise(64, 64), resolution=(72, 72), resolutionunit="INCH")
    tifffile.imwrite(tmp_path / "b.tif", noise(64, 64), photometric="rgb", resolution=(72, 72), resolutionunit="INCH")
    for name in ("a.tif", "b.tif"):
        with open_slide(tmp_path / name) as slide:
            assert slide.metadata.mpp is None
            assert "352.8" in slide.metadata.mpp_source


def test_colour_profiles_are_only_hashed(tmp_path):
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tag = (34675, 7, len(profile), profile, True)
    tiled(tmp_path / "a.tif", noise(64, 64), extratags=[tag])
    tifffile.imwrite(tmp_path / "b.tif", noise(64, 64), photometric="rgb", extratags=[tag], metadata=None)
    Image.fromarray(noise(64, 64)).save(tmp_path / "c.png", icc_profile=profile)
    hashes = set()
    for name in ("a.tif", "b.tif", "c.png"):
        with open_slide(tmp_path / name) as slide:
            hashes.add(slide.metadata.icc_sha256)
            assert np.array_equal(slide.read_region(0, 0, 0, Size(64, 64)), noise(64, 64))
    assert len(hashes) == 1
    assert None not in hashes


def test_arrays_are_checked():
    for wrong in (np.zeros((4, 4), dtype=np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), dtype=np.uint8)):
        with pytest.raises(ValueError, match="RGB uint8"):
            ArrayReader(wrong)


def test_identity_of_folders_and_mirax(tmp_path):
    for where in ("a", "b"):
        (tmp_path / where / "slide").mkdir(parents=True)
        (tmp_path / where / "slide.mrxs").write_bytes(b"same")
        (tmp_path / where / "slide" / "Data0000.dat").write_bytes(b"one")
    a, b = tmp_path / "a", tmp_path / "b"
    assert slide_identity(a) == slide_identity(b)
    assert slide_identity(a / "slide.mrxs") == slide_identity(b / "slide.mrxs")
    (b / "slide" / "Data0000.dat").write_bytes(b"two")
    assert slide_identity(a) != slide_identity(b)
    assert slide_identity(a / "slide.mrxs") != slide_identity(b / "slide.mrxs")
    assert is_tile_folder(a)
    assert not is_tile_folder(a / "slide.mrxs")


def test_identity_of_large_files_sees_head_tail_and_size(tmp_path):
    path = tmp_path / "large"
    data = bytearray(np.random.default_rng(0).bytes(2_000_000))
    path.write_bytes(data)
    seen = {slide_identity(path)}
    for place in (0, 100_000, len(data) // 2 + 5, len(data) - 1):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        seen.add(slide_identity(path))
    path.write_bytes(data + b"\0")
    seen.add(slide_identity(path))
    assert len(seen) == 6


@needs_data
@pytest.mark.parametrize("path", sorted((DATA / "malformed").glob("*")), ids=lambda path: path.name)
def test_real_malformed_files(path):
    with pytest.raises(UnreadableSlideError, match=path.name), open_slide(path) as slide:
        slide.read_region(0, 0, 0, Size(16, 16))


@needs_data
def test_a_malformed_dicom_among_others_is_itself(tmp_path):
    shutil.copy(DATA / "malformed" / "small_dicom.dcm", tmp_path)
    with pytest.raises(UnreadableSlideError, match="small_dicom"):
        open_slide(tmp_path / "small_dicom.dcm")


@needs_data
@pytest.mark.parametrize(
    ("name", "kind", "size", "mpp"),
    [
        ("slides/CMU-1-Small-Region.svs", "direct", (2220, 2967), 0.499),
        ("slides/TCGA-CR-7395-01A-01-TS1.svs", "openslide", (4443, 3567), None),
        ("slides/TCGA-5P-A9K0_3.svs", "openslide", (497, 185), 0.19448),
        ("slides/her2st_B4.svs", "direct", (9272, 9923), 0.25),
        ("formats/boxes.tiff", "openslide", (300, 250), None),
        ("formats/cells.ome.tif", "tiff", (93, 131), 0.25),
        ("formats/kidney-48-5-ihc.tif", "tiff", (1493, 901), None),
        ("formats/orient3_gray_jpeg_3level.tif", "direct", (120, 180), None),
        ("formats/rgba_lzw_2level.tiff", "openslide", (600, 600), None),
        ("formats/test3-DAPI-2-387.ndpi", "openslide", (3968, 4864), 0.228),
        ("formats/yb10kx5k.zstd.tiff", "openslide", (10000, 5000), None),
        ("formats/dicom/w2d-jpeg2000", "openslide", (957, 715), 16.783),
        ("formats/dicom/boxes", "openslide", (16, 16), 0.499),
    ],
)
def test_real_slides(name, kind, size, mpp):
    with open_slide(DATA / name) as slide:
        assert (slide.name, slide.metadata.size_level0) == (kind, size)
        assert slide.metadata.mpp == (None if mpp is None else pytest.approx((mpp, mpp), rel=2e-3))
        small, downsample = slide.thumbnail(128)
        assert max(small.shape) <= 128
        assert downsample == pytest.approx(max(max(size) / 128, 1.0))
        for level in range(len(slide.metadata.levels)):
            assert slide.read_region(0, 0, level, Size(16, 16)).shape == (16, 16, 3)


@needs_data
def test_real_users_and_dates_stay_inside():
    with open_slide(DATA / "slides" / "CMU-1-Small-Region.svs") as slide:
        told = repr(slide.metadata)
    assert "b414003d" not in told
    assert "12/29/09" not in told
