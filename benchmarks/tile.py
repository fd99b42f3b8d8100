"""The whole ``pathfm tile`` (tissue, quality columns, JPEG store, pictures) against an OpenSlide loop that stores nothing.

256-px tiles at 0.5 um from 0.25, on a slide of 49,152 x 40,960 px: more than 5,000 tiles are kept. The loop reads the very
tiles that were kept, half of them before each run and half after it.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.measure import Options, Run, Spent, Table, run_pathfm, spent
from benchmarks.read import Case, with_openslide
from benchmarks.slide import repeated_slide, small_slide
from pathfm.geometry import Size
from pathfm.store.tile_store import open_tiles

SIZE, QUICK_SIZE = Size(49_152, 40_960), Size(8_192, 8_192)


def tile(slide: Path, folder: Path, *arguments: str) -> tuple[Run, np.ndarray]:
    """Tiles a slide of 0.25 um and tells what it took and the corners [n, 2] of what was kept [level-0 px]."""
    taken = run_pathfm("tile", str(slide), "--out", str(folder), "--tile-px", "256", *arguments)
    (attributes,) = (path for path in folder.rglob("*.zarr") if (path / "zarr.json").is_file())
    return taken, open_tiles(attributes).xy_level0


def run(options: Options) -> list[Table]:
    """Tiles per CPU-second of both, start-up included and apart."""
    slide, small = repeated_slide(options.work, QUICK_SIZE if options.quick else SIZE), small_slide(options.work)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        _, corners = tile(slide, Path(folder), "--mpp", "0.5")
    loop = with_openslide(Case(slide, 256, 2), pil=True)
    loops: list[Spent] = []
    runs: list[Run] = []
    starts: list[Run] = []
    for _ in range(options.passes):
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            starts.append(tile(small, Path(folder) / "small", "--mpp", "0.5")[0])
            first = spent(loop, corners[::2])
            runs.append(tile(slide, Path(folder) / "large", "--mpp", "0.5")[0])
            second = spent(loop, corners[1::2])
        loops.append(Spent(first.cpu_s + second.cpu_s, first.wall_s + second.wall_s, len(corners)))
    return [_table(len(corners), loops, runs, starts)]


def _table(count: int, loops: list[Spent], runs: list[Run], starts: list[Run]) -> Table:
    start = statistics.median(run.cpu_s for run in starts)
    table = Table(
        f"pathfm tile: {count} tiles of 256 px at 0.5 um from 0.25",
        ("what", "CPU s", "wall s", "tiles per CPU-s", "ratio to the loop"),
        notes=(f"start-up (a run on a small slide): {start:.2f} CPU-s", _memory(runs)),
    )
    rows: dict[str, list[tuple[float, float]]] = {
        "openslide + PIL, nothing stored": [(loop.cpu_s, loop.wall_s) for loop in loops],
        "pathfm tile, all of it": [(run.cpu_s, run.wall_s) for run in runs],
        "pathfm tile, without start-up": [(run.cpu_s - start, run.wall_s) for run in runs],
    }
    for name, taken in rows.items():
        cpu, wall = (statistics.median(values) for values in zip(*taken, strict=True))
        ratio = statistics.median(loop.cpu_s / mine for loop, (mine, _) in zip(loops, taken, strict=True))
        table.rows.append((name, cpu, wall, count / cpu, ratio))
    return table


def _memory(runs: list[Run]) -> str:
    largest, together = max(run.largest_mb for run in runs), max(run.together_mb for run in runs)
    return f"peak memory: {largest:.0f} MB the largest process, {together:.0f} MB all together"
