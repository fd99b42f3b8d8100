"""What every reader must do, whatever stands behind it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from pathfm.geometry import Mpp, Size
from pathfm.jpeg import decode
from pathfm.slides.image_reader import ArrayReader
from pathfm.slides.reader import READERS, SlideMetadata, SlideReader, open_slide, slide_identity
from pathfm.slides.synthetic_tiff import TiffOptions, encode_tiles, write_pyramid

WIDTH, HEIGHT, MPP = 300, 200, 0.25
PER_CM = 10_000 / MPP
RESOLUTION = {"resolution": (PER_CM, PER_CM), "resolutionunit": "CENTIMETER"}
PATIENT = "Jane^Roe 1961-02-03"


def picture():
    """Noise with a red, a green and a blue corner: any mix-up of axes, channels or offsets shows."""
    rgb = np.random.default_rng(1).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    rgb[:20, :20], rgb[:20, -20:], rgb[-20:, :20] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return rgb


def tiled_tiff(folder: Path):
    path = folder / "tiled.tiff"
    options = {"tile": (64, 64), "compression": "zlib", "photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(picture(), description=PATIENT, software=PATIENT, datetime="2001:01:01 00:00:00", **options, **RESOLUTION)
        tiff.write(picture()[::2, ::2], subfiletype=1, **options)
    return open_slide(path), picture()


def strip_tiff(folder: Path):
    path = folder / "strips.tif"
    tifffile.imwrite(
        path,
        picture(),
        photometric="rgb",
        compression="zlib",
        rowsperstrip=17,
        description=PATIENT,
        metadata=None,
        **RESOLUTION,
    )
    return open_slide(path), picture()


def plain_tiff(folder: Path):
    path = folder / "plain.tif"
    tifffile.imwrite(path, picture(), photometric="rgb", description=PATIENT, metadata=None, **RESOLUTION)
    return open_slide(path), picture()


def planar_tiff(folder: Path):
    path = folder / "planar.tif"
    planes = np.ascontiguousarray(picture().transpose(2, 0, 1))
    options = {"photometric": "rgb", "planarconfig": "separate", "metadata": None}
    tifffile.imwrite(path, planes, compression="zlib", rowsperstrip=31, description=PATIENT, **options, **RESOLUTION)
    return open_slide(path), picture()


def ome_tiff(folder: Path):
    path = folder / "picture.ome.tif"
    names = {"axes": "YXS", "PhysicalSizeX": MPP, "PhysicalSizeY": MPP, "Name": PATIENT}
    tifffile.imwrite(path, picture(), photometric="rgb", tile=(64, 64), compression="zlib", metadata=names)
    return open_slide(path), picture()


def oriented_tiff(folder: Path):
    path = folder / "oriented.tif"
    options = {"photometric": "rgb", "tile": (64, 64), "metadata": None, "description": PATIENT}
    tifffile.imwrite(path, picture(), extratags=[(274, "H", 1, 3, True)], **options, **RESOLUTION)
    return open_slide(path), picture()


def png(folder: Path):
    from PIL.PngImagePlugin import PngInfo

    note = PngInfo()
    note.add_text("Patient", PATIENT)
    dpi = 25_400 / MPP
    Image.fromarray(picture()).save(folder / "picture.png", pnginfo=note, dpi=(dpi, dpi))
    return open_slide(folder / "picture.png"), picture()


def jpeg(folder: Path):
    path = folder / "picture.jpg"
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = PATIENT, 6
    Image.fromarray(picture()).save(path, quality=95, subsampling=0, exif=exif, comment=PATIENT.encode())
    return open_slide(path), np.asarray(Image.open(path))


def direct(folder: Path, options: TiffOptions):
    """A slide of JPEG tiles, and its pixels as OpenSlide (or, where that knows it not, the decoder alone) reads them."""
    path = folder / "direct.tiff"
    write_pyramid(path, [picture()], options)
    reader = open_slide(path)
    assert reader.name == "direct"
    tiles = [decode(tile) for tile in encode_tiles(picture(), replace(options, shared_tables=False))]
    columns, (width, height) = -(-WIDTH // 64), (64, 64)
    whole = np.zeros((256, 64 * columns, 3), np.uint8)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        whole[row * height : (row + 1) * height, column * width : (column + 1) * width] = tile
    return reader, whole[:HEIGHT, :WIDTH]


def direct_generic(folder: Path):
    return direct(folder, TiffOptions(tile_px=Size(64, 64), colour="444", quality=98, mpp=Mpp(MPP, MPP), comment=PATIENT))


def direct_aperio(folder: Path):
    options = TiffOptions("aperio", Size(64, 64), "444", 98, shared_tables=True, mpp=Mpp(MPP, MPP), comment=PATIENT)
    return direct(folder, options)


def direct_big_endian(folder: Path):
    options = TiffOptions(tile_px=Size(64, 64), colour="444", quality=98, byte_order="big", mpp=Mpp(MPP, MPP))
    return direct(folder, options)


def direct_ome(folder: Path):
    return direct(folder, TiffOptions("ome", Size(64, 64), "444", 98, mpp=Mpp(MPP, MPP), comment=PATIENT))


def array(folder: Path):
    return ArrayReader(picture(), Mpp(MPP, MPP)), picture()


BUILDERS: dict[str, Callable[[Path], tuple[SlideReader, np.ndarray]]] = {
    "openslide": tiled_tiff,
    "direct generic": direct_generic,
    "direct aperio": direct_aperio,
    "direct big-endian": direct_big_endian,
    "direct ome": direct_ome,
    "tiff strips": strip_tiff,
    "tiff plain": plain_tiff,
    "tiff planar": planar_tiff,
    "tiff ome": ome_tiff,
    "tiff oriented": oriented_tiff,
    "png": png,
    "jpeg": jpeg,
    "array": array,
}
NO_SCALE = {"jpeg"}


@pytest.fixture(params=BUILDERS)
def case(request, tmp_path):
    reader, expected = BUILDERS[request.param](tmp_path)
    with reader:
        yield request.param, reader, expected


def test_the_whole_picture(case):
    _, reader, expected = case
    assert np.array_equal(reader.read_region(0, 0, 0, Size(WIDTH, HEIGHT)), expected)
    assert reader.metadata.size_level0 == Size(WIDTH, HEIGHT) == reader.metadata.levels[0].size


@pytest.mark.parametrize("corner", [(0, 0), (37, 51), (64, 128), (259, 159)])
def test_a_region_is_a_crop_of_the_picture(case, corner):
    _, reader, expected = case
    x, y = corner
    region = reader.read_region(x, y, 0, Size(41, 40))
    assert region.dtype == np.uint8
    assert region.flags.c_contiguous
    assert np.array_equal(region, expected[y : y + 40, x : x + 41])


@pytest.mark.parametrize("corner", [(-10, -15), (WIDTH - 20, HEIGHT - 25), (-10, HEIGHT - 25)])
def test_outside_the_scan_is_white(case, corner):
    _, reader, expected = case
    framed = np.pad(expected, ((50, 50), (50, 50), (0, 0)), constant_values=255)
    x, y = corner
    assert np.array_equal(reader.read_region(x, y, 0, Size(40, 40)), framed[y + 50 : y + 90, x + 50 : x + 90])


def test_far_outside_is_white(case):
    _, reader, _ = case
    assert (reader.read_region(10 * WIDTH, 5, 0, Size(8, 9)) == 255).all()
    assert reader.read_region(-500, -500, 0, Size(8, 9)).shape == (9, 8, 3)


def test_corners_have_their_colours(case):
    _, reader, _ = case
    for x, y, channel in ((4, 4, 0), (WIDTH - 8, 4, 1), (4, HEIGHT - 8, 2)):
        mean = reader.read_region(x, y, 0, Size(4, 4)).mean(axis=(0, 1))
        assert mean[channel] > 240
        assert np.delete(mean, channel).max() < 15


def test_a_level_that_is_not_there(case):
    _, reader, _ = case
    with pytest.raises(IndexError):
        reader.read_region(0, 0, len(reader.metadata.levels), Size(4, 4))


def test_thumbnail(case):
    _, reader, expected = case
    small, downsample = reader.thumbnail(75)
    assert small.shape == (50, 75, 3)
    assert downsample == pytest.approx(4)
    assert abs(small.astype(float).mean() - expected.mean()) < 2
    assert small[1, 1].tolist() == pytest.approx([255, 0, 0], abs=12)
    same, downsample = reader.thumbnail(5000)
    assert same.shape == (HEIGHT, WIDTH, 3)
    assert downsample == 1


def test_scale(case):
    name, reader, _ = case
    if name in NO_SCALE:
        assert reader.metadata.mpp is None
    else:
        assert reader.metadata.mpp == pytest.approx((MPP, MPP), rel=1e-3)
        assert reader.metadata.mpp_source


def test_nothing_but_the_allowed_fields_leaves_a_reader(case):
    _, reader, _ = case
    allowed = {"vendor", "mpp", "mpp_source", "objective", "levels", "size_level0", "icc_sha256", "notes"}
    assert set(SlideMetadata.__dataclass_fields__) == allowed == set(vars(reader.metadata))
    told = repr(reader.metadata) + repr({key: value for key, value in vars(type(reader)).items() if not callable(value)})
    assert "Roe" not in told
    assert "1961" not in told
    assert "2001:01" not in told


def test_the_reader_is_named(case):
    _, reader, _ = case
    assert reader.name in {*READERS, "direct"}


def test_closing_twice(case):
    _, reader, _ = case
    reader.close()
    reader.close()


@pytest.mark.parametrize("name", sorted(set(BUILDERS) - {"array"}))
def test_identity_is_of_the_content(name, tmp_path):
    BUILDERS[name](tmp_path)[0].close()
    (path,) = tmp_path.iterdir()
    before = slide_identity(path)
    moved = path.rename(tmp_path / f"other{path.suffix}")
    assert slide_identity(moved) == before
    data = bytearray(moved.read_bytes())
    data[len(data) // 2] ^= 1
    moved.write_bytes(data)
    assert slide_identity(moved) != before
