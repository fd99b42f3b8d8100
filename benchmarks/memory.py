"""Peak memory and time of ``pathfm tile`` on squares of 20, 60 and 100 thousand pixels: memory flat, time linear."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.measure import Options, Table
from benchmarks.slide import repeated_slide
from benchmarks.tile import tile
from pathfm.geometry import Size

SIDES, QUICK_SIDES = (20_000, 60_000, 100_000), (8_192, 16_384)


def run(options: Options) -> list[Table]:
    """A row per side."""
    table = Table(
        "memory: 256-px tiles at 0.5 um from 0.25, one slide",
        ("side px", "tiles", "CPU s", "wall s", "CPU ms/tile", "largest process MB", "all processes MB"),
    )
    for side in QUICK_SIDES if options.quick else SIDES:
        slide = repeated_slide(options.work, Size(side, side))
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            taken, corners = tile(slide, Path(folder), "--mpp", "0.5")
        count = len(corners)
        each = 1000 * taken.cpu_s / count
        table.rows.append((side, count, taken.cpu_s, taken.wall_s, each, taken.largest_mb, taken.together_mb))
    return [table]
