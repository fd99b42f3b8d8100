"""The slides that are measured on: drawn once and kept.

``benchmark_slide``: 20,480 px square at 0.25 um, one section on 75 % of it, laid out as Aperio does with levels 1, 4, 16, 32,
so that 0.5 um has to come from level 0, as on most 40x slides. ``repeated_slide``: any size, of which one block is drawn.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import openslide
import tifffile

from benchmarks.measure import Options, Table
from pathfm.errors import PathfmError
from pathfm.geometry import Box, Mpp, Size, fit_within
from pathfm.jpeg import Pixels
from pathfm.slides.reader import open_slide
from pathfm.slides.synthetic_draw import draw_block, make_look
from pathfm.slides.synthetic_plan import SyntheticSpec, make_plan
from pathfm.slides.synthetic_tiff import (
    THUMBNAIL_PX,
    SlideWriter,
    TiffOptions,
    encode_block,
    encode_tiles,
    shrink,
    write_pyramid,
    write_repeated_slide,
)

VERSION = 1
"""Raised when the slides change, so that old ones are not taken for new."""
SIDE_PX, BLOCK_PX = 20_480, 8_192
"""The benchmark slide, and the block that larger slides repeat: whole tiles at every level."""
MPP = 0.25
DRAW_PX = 1024
DOWNSAMPLES = (1, 4, 16, 32)
GRAIN = 2.5
"""Sensor noise against that of the other synthetic slides: it brings a tile of tissue to the bytes that real ones have."""
OPTIONS = TiffOptions("aperio", mpp=Mpp(MPP, MPP), shared_tables=True)


def benchmark_slide(work: Path) -> Path:
    """The 20,480 px slide, drawn in bands."""
    spec = SyntheticSpec(size_px=Size(SIDE_PX, SIDE_PX), mpp=MPP, seed=20, tissue_fraction=0.75, lesion=True)
    return _once(work / f"slide-{SIDE_PX}-v{VERSION}.svs", lambda path: _write(path, spec))


def repeated_slide(work: Path, size: Size) -> Path:
    """A slide of any size that repeats one block; the file holds each tile of the block once."""
    spec = SyntheticSpec(size_px=Size(BLOCK_PX, BLOCK_PX), mpp=MPP, seed=21, tissue_fraction=0.75, lesion=True)
    options = replace(OPTIONS, share_tiles=True, big=True)

    def write(path: Path) -> None:
        write_repeated_slide(path, size, encode_block(np.concatenate(list(_bands(spec))), DOWNSAMPLES, options), options)

    return _once(work / f"repeated-{size.width}x{size.height}-v{VERSION}.svs", write)


def small_slide(work: Path) -> Path:
    """A slide of a few tiles: a run on it is all start-up."""
    spec = SyntheticSpec(size_px=Size(1024, 1024), mpp=MPP, seed=22, tissue_fraction=0.7)

    def write(path: Path) -> None:
        picture = np.concatenate(list(_bands(spec)))
        write_pyramid(path, [picture, shrink(picture, Size(256, 256))], OPTIONS)

    return _once(work / f"small-v{VERSION}.svs", write)


def _once(path: Path, write: Callable[[Path], None]) -> Path:
    """A file that is written unless it is there, whole or not at all."""
    if not path.exists():
        part = path.with_suffix(".part")
        write(part)
        part.replace(path)
    return path


def _bands(spec: SyntheticSpec) -> Iterator[Pixels]:
    """A slide's pixels in bands of ``DRAW_PX`` rows, drawn in blocks that fit in little memory."""
    plan = make_plan(spec)
    look = make_look(spec, plan.grain)
    look = replace(look, noise=look.noise * GRAIN)
    for top in range(0, spec.size_px.height, DRAW_PX):
        lefts = range(0, spec.size_px.width, DRAW_PX)
        boxes = [Box(left, top, left + DRAW_PX, top + DRAW_PX) for left in lefts]
        yield np.concatenate([draw_block(plan, look, spec, box)[0] for box in boxes], axis=1)


def _write(path: Path, spec: SyntheticSpec) -> None:
    """Level 0 goes to the file as it is drawn; of the others, a sixteenth of it and less, pictures are kept."""
    quarter: list[Pixels] = []

    def level0() -> Iterator[bytes]:
        for band in _bands(spec):
            quarter.append(shrink(band, Size(band.shape[1] // 4, band.shape[0] // 4)))
            yield from encode_tiles(band, OPTIONS)

    with SlideWriter(path, OPTIONS) as slide:
        slide.write_level(level0(), spec.size_px)
        picture = np.concatenate(quarter)
        slide.write_picture("thumbnail", shrink(picture, fit_within(spec.size_px, THUMBNAIL_PX)[0]))
        for downsample in DOWNSAMPLES[1:]:
            size = Size(spec.size_px.width // downsample, spec.size_px.height // downsample)
            slide.write_level(encode_tiles(shrink(picture, size), OPTIONS), size, downsample)
        slide.write_labels()


def tissue_tiles(path: Path, side: int) -> np.ndarray:
    """Which of the whole tiles of ``side`` level-0 px are mostly tissue, from the coarsest level: bool [rows, columns]."""
    with tifffile.TiffFile(path) as tiff:
        page = max((page for page in tiff.pages if page.is_tiled), key=lambda page: page.imagewidth)
        rows, columns = page.imagelength // side, page.imagewidth // side
    with openslide.OpenSlide(path) as slide:
        thumbnail = np.asarray(slide.get_thumbnail((2048, 2048)))[..., :3]
    dark = (thumbnail.max(axis=2).astype(int) - thumbnail.min(axis=2) > 20).astype(np.float32)
    scale = side * thumbnail.shape[1] / page.imagewidth
    corner = dark[: round(rows * scale), : round(columns * scale)]
    return np.asarray(cv2.resize(corner, (columns, rows), interpolation=cv2.INTER_AREA) > 0.5)


def run(options: Options) -> list[Table]:
    """Bytes per tile of the benchmark slide, and of real ones."""
    paths = [benchmark_slide(options.work), *real_slides(options)]
    table = Table(
        "slides: stored tiles of level 0", ("slide", "px", "MB", "tile px", "tissue tiles %", "bytes per tissue tile")
    )
    for path in paths:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages[0]
            columns = -(-page.imagewidth // page.tilewidth)
            tissue = tissue_tiles(path, page.tilewidth)
            rows, across = np.nonzero(tissue)
            lengths = [page.databytecounts[row * columns + column] for row, column in zip(rows, across, strict=True)]
            size = f"{page.imagewidth} x {page.imagelength}"
            row = (path.stem, size, path.stat().st_size / 1e6, page.tilewidth, 100 * tissue.mean(), statistics.mean(lengths))
        table.rows.append(row)
    return [table]


def real_slides(options: Options) -> list[Path]:
    """Slides with JPEG tiles in the folder that was given."""
    return [path for path in sorted(options.data.rglob("*.svs")) if _has_jpeg_tiles(path)] if options.data else []


def _has_jpeg_tiles(path: Path) -> bool:
    try:
        with tifffile.TiffFile(path) as tiff:
            if not (tiff.pages[0].is_tiled and tiff.pages[0].compression == 7):
                return False
        with open_slide(path, "openslide") as slide:
            slide.thumbnail(256)
        return True
    except (tifffile.TiffFileError, OSError, PathfmError):
        return False
