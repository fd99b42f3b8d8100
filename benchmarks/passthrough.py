"""Tiles per CPU-second when stored tiles go into the store unchanged, at the mpp of level 0.

Two slides that differ in size alone are tiled without tissue detection, and the difference of their CPU is divided by the
difference of their tiles: what is done once a run (start-up, pictures) drops out.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from benchmarks.measure import Options, Table
from benchmarks.slide import repeated_slide
from benchmarks.tile import tile
from pathfm.geometry import Size

SIZES, QUICK_SIZES = (Size(16_384, 16_384), Size(49_152, 40_960)), (Size(8_192, 8_192), Size(16_384, 16_384))
COMMON = ("--mpp", "0.25", "--set", "tile.tissue.method=off", "--set", "compute.workers=1")
KINDS = {"quality columns off": ("--set", "tile.filters.measure=false"), "quality columns on": ()}


def run(options: Options) -> list[Table]:
    """A row with the quality columns, and one without."""
    slides = [repeated_slide(options.work, size) for size in (QUICK_SIZES if options.quick else SIZES)]
    table = Table(
        "pass-through: 256-px tiles at the slide's 0.25 um", ("what", "tiles", "CPU s", "tiles per CPU-s, start-up apart")
    )
    for name, settings in KINDS.items():
        rates, counts, seconds = [], [], []
        for _ in range(options.passes):
            with tempfile.TemporaryDirectory(dir=options.work) as folder:
                (less, few), (more, many) = (tile(slide, Path(folder) / slide.stem, *COMMON, *settings) for slide in slides)
            rates.append((len(many) - len(few)) / (more.cpu_s - less.cpu_s))
            counts.append(len(many))
            seconds.append(more.cpu_s)
        table.rows.append((name, counts[0], statistics.median(seconds), statistics.median(rates)))
    return [table]
