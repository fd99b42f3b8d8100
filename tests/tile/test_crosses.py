"""Planted crosses: what a stored tile shows lies where the store says it does, whatever the file, the reader and the scale."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from pathfm.geometry import Mpp, Size
from pathfm.jpeg import encode
from pathfm.slides.image_reader import ArrayReader
from pathfm.slides.synthetic_tiff import TiffOptions, write_pyramid
from pathfm.slides.tile_reading import read_tiles
from pathfm.store.cohort import SlideRow
from pathfm.store.tile_store import TileStore, open_tiles
from pathfm.study import TileSettings
from pathfm.tile.grid import plan_grids
from pathfm.tile.slide import tile_slide
from pathfm.tile.task import TileTask
from tests.slides.crosses import draw_crosses, find_cross, pyramid

SIZE = Size(1003, 777)
"""Odd on purpose: no level and no tile divides it."""
ARM_PX, WIDTH_PX, ROOM_PX = 7.0, 3.0, 4
"""Of a cross, and around it, in pixels of the tiles."""
HALF_PX = 0.5
"""How far a cross may lie from where the store says it is [px of the tiles]."""

Write = Callable[[Path, np.ndarray, Mpp, tuple[float, ...]], Path]


@dataclass(frozen=True)
class Case:
    """A slide, and how it is tiled."""

    write: Write
    mpp: Mpp
    settings: dict[str, Any]
    levels: tuple[float, ...] = (1,)
    reader: str = "direct"
    read: tuple[int, int] | None = None
    """Level, and power of two by which it is shrunk; None: it does not matter."""
    size: Size = SIZE
    stretched_px: float = 0.0
    """How far a level whose size was rounded lies off at its far edge: at most half a pixel of its own [px of the tiles]."""


def jpeg_tiff(**options: Any) -> Write:
    """A TIFF of JPEG tiles."""

    def write(folder: Path, picture: np.ndarray, mpp: Mpp, downsamples: tuple[float, ...]) -> Path:
        path = folder / "slide.tiff"
        write_pyramid(path, pyramid(picture, downsamples), TiffOptions(**{"tile_px": Size(96, 80), **options}, mpp=mpp))
        return path

    return write


def zlib_tiff(**options: Any) -> Write:
    """A TIFF without JPEG, in tiles or strips; ``ome=True`` makes it one that OpenSlide is not asked to read."""
    ome = options.pop("ome", False)

    def write(folder: Path, picture: np.ndarray, mpp: Mpp, downsamples: tuple[float, ...]) -> Path:
        path = folder / ("slide.ome.tiff" if ome else "slide.tiff")
        names = {"axes": "YXS", "PhysicalSizeX": mpp.x, "PhysicalSizeY": mpp.y} if ome else None
        common = {"photometric": "rgb", "compression": "zlib", **options}
        scale = {"resolution": (10_000 / mpp.x, 10_000 / mpp.y), "resolutionunit": "CENTIMETER"}
        first, *lower = pyramid(picture, downsamples)
        with tifffile.TiffWriter(path, ome=ome) as tiff:
            tiff.write(first, subifds=len(lower) if ome else None, metadata=names, **common, **scale)
            for level in lower:
                tiff.write(level, subfiletype=1, metadata=None, **common)
        return path

    return write


def png(folder: Path, picture: np.ndarray, mpp: Mpp, _: tuple[float, ...]) -> Path:
    path = folder / "slide.png"
    Image.fromarray(picture).save(path, dpi=(25_400 / mpp.x, 25_400 / mpp.y))
    return path


def dicom(folder: Path, picture: np.ndarray, mpp: Mpp, downsamples: tuple[float, ...]) -> Path:
    """A folder with one file per level, as DICOM Supplement 145 lays them out."""
    pydicom = pytest.importorskip("pydicom")
    (folder / "series").mkdir()
    series = pydicom.uid.generate_uid()
    for number, level in enumerate(pyramid(picture, downsamples)):
        whole = pydicom.Dataset()
        whole.file_meta = pydicom.dataset.FileMetaDataset()
        whole.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
        whole.file_meta.MediaStorageSOPClassUID = whole.SOPClassUID = pydicom.uid.VLWholeSlideMicroscopyImageStorage
        whole.file_meta.MediaStorageSOPInstanceUID = whole.SOPInstanceUID = pydicom.uid.generate_uid()
        whole.SeriesInstanceUID, whole.StudyInstanceUID, whole.Modality = series, series, "SM"
        whole.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "RESAMPLED" if number else "NONE"]
        whole.TotalPixelMatrixRows, whole.TotalPixelMatrixColumns = level.shape[:2]
        whole.Rows = whole.Columns = 128
        whole.SamplesPerPixel, whole.PhotometricInterpretation, whole.PlanarConfiguration = 3, "YBR_FULL_422", 0
        whole.BitsAllocated, whole.BitsStored, whole.HighBit, whole.PixelRepresentation = 8, 8, 7, 0
        whole.DimensionOrganizationType, whole.TotalPixelMatrixFocalPlanes = "TILED_FULL", 1
        measures, groups = pydicom.Dataset(), pydicom.Dataset()
        measures.PixelSpacing = [f"{value * picture.shape[1] / level.shape[1] / 1000:.10f}" for value in (mpp.y, mpp.x)]
        groups.PixelMeasuresSequence = [measures]
        whole.SharedFunctionalGroupsSequence = [groups]
        frames = []
        for top, left in itertools.product(range(0, level.shape[0], 128), range(0, level.shape[1], 128)):
            frame = level[top : top + 128, left : left + 128]
            missing = [(0, 128 - frame.shape[0]), (0, 128 - frame.shape[1]), (0, 0)]
            frames.append(encode(np.pad(frame, missing, mode="edge"), 90))
        whole.NumberOfFrames, whole.PixelData = len(frames), pydicom.encaps.encapsulate(frames)
        whole["PixelData"].VR = "OB"
        whole["PixelData"].is_undefined_length = True
        whole.save_as(folder / "series" / f"{number}.dcm", enforce_file_format=True)
    return folder / "series"


def square(mpp: float) -> Mpp:
    return Mpp(mpp, mpp)


APERIO = jpeg_tiff(dialect="aperio", shared_tables=True)
GENERIC = jpeg_tiff()
OME = jpeg_tiff(dialect="ome", colour="444")
TILES, STRIPS = zlib_tiff(tile=(64, 96)), zlib_tiff(rowsperstrip=23)
OPENSLIDE = {"reader": "openslide"}
ODD_LEVELS = (1, 2.5, 4.003, 16.01)

CASES = {
    "aperio, half in the decoder": Case(APERIO, square(0.25), {}, read=(0, 2)),
    "aperio, its own level": Case(APERIO, square(0.125), {}, (1, 4), read=(1, 1)),
    "aperio, a level that is cut off": Case(APERIO, square(0.0833), {}, (1, 3, 6), read=(2, 1), size=Size(1503, 1277)),
    "aperio rgb": Case(jpeg_tiff(dialect="aperio", colour="rgb"), square(0.25), {}, read=(0, 2)),
    "aperio by openslide": Case(APERIO, square(0.25), OPENSLIDE, reader="openslide", read=(0, 2)),
    "aperio level by openslide": Case(APERIO, square(0.125), OPENSLIDE, (1, 4), "openslide", (1, 1)),
    "0.2527 within tolerance": Case(APERIO, square(0.2527), {}, read=(0, 2)),
    "0.2527 exactly": Case(APERIO, square(0.2527), {"mpp_tolerance": 0.0}, read=(0, 1)),
    "0.26": Case(GENERIC, square(0.26), {}, read=(0, 1)),
    "0.3": Case(GENERIC, square(0.3), {}, read=(0, 1)),
    "0.3 by openslide": Case(GENERIC, square(0.3), OPENSLIDE, reader="openslide", read=(0, 1)),
    "0.19448": Case(GENERIC, square(0.19448), {}, read=(0, 2)),
    "0.48": Case(GENERIC, square(0.48), {}, read=(0, 1)),
    "level 2.5": Case(GENERIC, square(0.2), {}, ODD_LEVELS, read=(1, 1)),
    "level 2.5, scaled": Case(GENERIC, square(0.192), {}, ODD_LEVELS, read=(1, 1)),
    "level 2.5 by openslide": Case(GENERIC, square(0.2), OPENSLIDE, ODD_LEVELS, "openslide", (1, 1)),
    "level 4.003": Case(OME, square(0.25), {"mpp": 1.0}, ODD_LEVELS, read=(2, 1)),
    "level 4.003, scaled": Case(OME, square(0.22), {"mpp": 1.0}, ODD_LEVELS, read=(2, 1), stretched_px=0.25),
    "x and y differ": Case(GENERIC, Mpp(0.25, 0.21), {}, read=(0, 2)),
    "y and x differ, ome": Case(OME, Mpp(0.2, 0.26), {}, read=(0, 1)),
    "x and y differ, openslide": Case(GENERIC, Mpp(0.25, 0.21), OPENSLIDE, reader="openslide", read=(0, 2)),
    "x and y differ, strips": Case(STRIPS, Mpp(0.25, 0.3), {}, reader="tiff"),
    "overlap": Case(APERIO, square(0.27), {"overlap_px": 23}),
    "room for crops": Case(APERIO, square(0.25), {"keep_px": 88}),
    "room for crops, odd": Case(GENERIC, square(0.29), {"keep_px": 79, "overlap_px": 5}),
    "padded": Case(APERIO, square(0.29), {"edge": "pad"}),
    "padded room": Case(GENERIC, square(0.25), {"edge": "pad", "keep_px": 95}),
    "padded by openslide": Case(GENERIC, square(0.25), {"edge": "pad", "keep_px": 95, **OPENSLIDE}, reader="openslide"),
    "native": Case(APERIO, square(0.2527), {"mpp": "native"}, read=(0, 1), size=Size(531, 403)),
    "finer than the slide": Case(GENERIC, square(0.6), {"upsample": True}, read=(0, 1), size=Size(531, 403)),
    "an eighth": Case(APERIO, square(0.0625), {}, read=(0, 8), size=Size(1803, 1277)),
    "zlib tiles": Case(TILES, square(0.26), {}, (1, 4), "openslide"),
    "zlib ome": Case(zlib_tiff(tile=(64, 96), ome=True), square(0.19448), {}, (1, 2), "tiff"),
    "zlib strips": Case(STRIPS, square(0.25), {"overlap_px": 7}, reader="tiff"),
    "png": Case(png, square(0.3), {}, reader="image"),
    "png, x and y differ": Case(png, Mpp(0.25, 0.4), {}, reader="image"),
    "dicom": Case(dicom, square(0.25), {}, (1, 4), "openslide"),
    "dicom, its level": Case(dicom, square(0.25), {"mpp": 1.0}, (1, 4), "openslide", (1, 1)),
}


def plant(size: Size, scale: tuple[float, float]) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Crosses at fractions of a pixel, all over a picture; ``scale``: level-0 pixels per pixel of a tile, along x and y."""
    rng = np.random.default_rng(5)
    step = [2 * (ARM_PX + ROOM_PX) * max(scale) + 4] * 2
    places = itertools.product(*(np.arange(step[axis] / 2, size[axis] - step[axis] / 2, step[axis]) for axis in (0, 1)))
    points = [(x + rng.uniform(-2, 2), y + rng.uniform(-2, 2)) for x, y in places]
    least = min(scale)
    return draw_crosses(size, points, ARM_PX * least, WIDTH_PX * least), points


def misses(
    tiles: Iterator[tuple[np.ndarray, np.ndarray]], sides: tuple[float, float], points: list[tuple[float, float]]
) -> list[tuple[float, float]]:
    """How far each cross that a tile holds whole lies from its place [px of the tile], along x and y."""
    found = []
    reach = int(ARM_PX) + ROOM_PX - 1
    for corner, tile in tiles:
        places = (np.array(points) - corner) / np.array(sides) * len(tile)
        for place in places[((places > reach + 1) & (places < len(tile) - reach - 1)).all(axis=1)]:
            left, top = (int(value) - reach for value in place)
            cross = find_cross(tile[top : top + 2 * reach + 1, left : left + 2 * reach + 1])
            assert cross is not None
            found.append((cross[0] + left - place[0], cross[1] + top - place[1]))
    return found


def tiled(path: Path, folder: Path, settings: dict[str, Any]) -> TileStore:
    """A slide, tiled whole: no tissue detection, no filters, no loss."""
    common = {"mpp": 0.5, "tile_px": 72, "codec": "zstd", "tissue": {"method": "off"}, "filters": {"measure": False}}
    chosen = TileSettings.model_validate({**common, **settings})
    tile_slide(TileTask(SlideRow("slide", path), chosen, folder / "slide.zarr", "id", ("a", "b")))
    return open_tiles(folder / "slide.zarr")


def stored(store: TileStore) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return ((store.xy_level0[index], store[index]) for index in range(len(store)))


def scale_of(mpp: Mpp, settings: dict[str, Any]) -> tuple[float, float]:
    wanted = settings.get("mpp", 0.5)
    return (1.0, 1.0) if wanted == "native" else (wanted / mpp.x, wanted / mpp.y)


@pytest.mark.parametrize("name", CASES)
def test_crosses_are_where_the_store_says(name, tmp_path):
    case = CASES[name]
    picture, points = plant(case.size, scale_of(case.mpp, case.settings))
    store = tiled(case.write(tmp_path, picture, case.mpp, case.levels), tmp_path, case.settings)
    assert store.attrs["reader"] == case.reader
    if case.read:
        assert (store.attrs["read_level"], store.attrs["read_shrink"]) == case.read
    assert store.tile_sides_level0[0] == store.tile_side_level0
    found = misses(stored(store), store.tile_sides_level0, points)
    assert len(found) >= 20
    assert np.abs(found).max() <= HALF_PX + case.stretched_px
    # No shift that all of them share.
    assert np.abs(np.mean(found, axis=0)).max() < 0.2 + case.stretched_px


def test_crosses_of_an_array():
    mpp = Mpp(0.27, 0.23)
    picture, points = plant(SIZE, scale_of(mpp, {}))
    reader = ArrayReader(picture, mpp)
    (grid,) = plan_grids(reader.metadata.levels, mpp, TileSettings(tile_px=72))
    tiles = read_tiles(reader, grid.cut, range(len(grid)), lambda _, tile: tile.pixels)
    found = misses(((grid.corners_level0[index], pixels) for index, pixels in tiles), grid.side_level0, points)
    assert len(found) >= 20
    assert np.abs(found).max() <= HALF_PX
