"""Is it the same picture as OpenSlide's? Bit by bit at full size; shrunk in the decoder, against an area filter after it."""

from __future__ import annotations

import math

import cv2
import numpy as np
import openslide
import tifffile

from benchmarks.measure import Options, Table
from benchmarks.read import Case
from benchmarks.slide import benchmark_slide, real_slides
from pathfm.slides.reader import open_slide
from pathfm.slides.tile_reading import Cut, read_tiles

SHRINKS = (1, 2, 4)
MOST_TILES = 600


def run(options: Options) -> list[Table]:
    """A row per slide and factor, over its tissue tiles (every so-many-th of large slides)."""
    table = Table(
        "fidelity: our tiles against OpenSlide and an area filter, tissue tiles",
        ("slide", "shrunk", "tiles", "not identical", "PSNR dB", "worst tile dB", "mean shift px", "largest shift px"),
        notes=("PSNR of all tiles pooled; shift by phase correlation, against the area filter; - means identical",),
    )
    for path in [benchmark_slide(options.work), *real_slides(options)]:
        with tifffile.TiffFile(path) as tiff:
            side = tiff.pages[0].tilewidth
        for shrink in SHRINKS:
            case = Case(path, side, shrink)
            if case.pieces:
                table.rows.append((path.stem, shrink, *_compare(case, 40 if options.quick else MOST_TILES)))
    return [table]


def _compare(case: Case, most: int) -> tuple[int, int, float | str, float | str, float, float]:
    corners = np.concatenate(case.pieces)
    corners = corners[:: -(-len(corners) // most)]
    errors, shifts = [], []
    with openslide.OpenSlide(case.path) as slide, open_slide(case.path) as reader:
        left_top = corners // case.shrink
        cut = Cut(0, case.shrink, np.concatenate([left_top, left_top + case.side], axis=1), case.side)
        ours = read_tiles(reader, cut, range(len(corners)), lambda _, tile: tile.pixels)
        for (x, y), (_, mine) in zip(corners.tolist(), ours, strict=True):
            region = np.asarray(slide.read_region((x, y), 0, (case.side * case.shrink,) * 2))[..., :3]
            theirs = cv2.resize(region, (case.side, case.side), interpolation=cv2.INTER_AREA) if case.shrink > 1 else region
            errors.append(float(((mine.astype(float) - theirs) ** 2).mean()))
            shifts.append(_shift(mine, theirs))
    differing = sum(error > 0 for error in errors)
    mean_shift, largest = math.hypot(*np.mean(shifts, axis=0)), max(math.hypot(*shift) for shift in shifts)
    return len(errors), differing, _psnr(float(np.mean(errors))), _psnr(max(errors)), round(mean_shift, 4), round(largest, 4)


def _psnr(error: float) -> float | str:
    return 10 * math.log10(255**2 / error) if error else "-"


def _shift(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    window = cv2.createHanningWindow(one.shape[1::-1], cv2.CV_64F)
    (x, y), _ = cv2.phaseCorrelate(one.mean(axis=2), other.mean(axis=2), window)
    return x, y
