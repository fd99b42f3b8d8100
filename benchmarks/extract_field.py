"""Slides per hour, from slides to ViT-S features: ours (bf16) against the loop that the field runs (fp32), on the same tiles.

Each is one process with all it starts, start-up included. Ours also finds the tissue and measures the tiles' quality; the loop
(``benchmarks.field_loop``) is given the tiles. With ``--data``, on the folder's HER2ST slides; else on synthetic ones.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.measure import Options, Run, Table, machine, run_module, run_pathfm
from benchmarks.slide import repeated_slide
from pathfm.geometry import Size
from pathfm.models.processor import cpu_has_bf16
from pathfm.store.tile_store import open_tiles
from pathfm.workers import usable_cores

NET, MPP, WANTED = "vit_small_patch16_224", "0.5", 3.5
SIZE, QUICK_SIZE = Size(8192, 8192), Size(4096, 3584)
LOOP = "the field's loop: fp32, tiles given"
PATTERN = "her2st_*.svs"


def run(options: Options) -> list[Table]:
    """Wall and CPU time of the whole cohort."""
    slides = sorted(options.data.rglob(PATTERN)) if options.data and not options.quick else []
    slides = slides or [repeated_slide(options.work, QUICK_SIZE if options.quick else SIZE)]
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        boxes = _boxes(slides, Path(name))
        rivals: dict[str, Callable[[Path], Run]] = {
            LOOP: partial(_loop, slides, boxes),
            "pathfm extract, straight from the slide": partial(_straight, slides),
            "pathfm tile, then pathfm extract": partial(_tile_extract, slides),
        }
        runs = _in_turn(rivals, 1 if options.quick else options.passes, options.work)
        tiles = sum(len(np.load(file)) for file in boxes)
    return [_table(slides, tiles, runs)]


def _in_turn(rivals: Mapping[str, Callable[[Path], Run]], passes: int, work: Path) -> dict[str, list[Run]]:
    """Every rival into an empty folder, one right after the other, every second time in reverse."""
    runs: dict[str, list[Run]] = {rival: [] for rival in rivals}
    for turn in range(passes):
        for rival in list(rivals)[:: -1 if turn % 2 else 1]:
            with tempfile.TemporaryDirectory(dir=work) as out:
                runs[rival].append(rivals[rival](Path(out)))
    return runs


def _boxes(slides: Sequence[Path], folder: Path) -> list[Path]:
    """Files with left, top and side [n, 3] [level-0 px] of the tiles that are kept, by slide."""
    run_pathfm("tile", *map(str, slides), "--out", str(folder), "--mpp", MPP, "--set", "tile.codec=none")
    files = []
    for slide in slides:
        (path,) = (folder / "tiles").rglob(f"{slide.stem}.zarr")
        store = open_tiles(path)
        sides = np.full((len(store), 1), round(store.tile_side_level0))
        files.append(folder / f"{slide.stem}.npy")
        np.save(files[-1], np.concatenate([store.xy_level0, sides], axis=1))
    return files


def _loop(slides: Sequence[Path], boxes: Sequence[Path], out: Path) -> Run:
    pairs = [str(path) for pair in zip(slides, boxes, strict=True) for path in pair]
    return run_module("benchmarks.field_loop", NET, str(out), *pairs)


def _straight(slides: Sequence[Path], out: Path) -> Run:
    mpp = ("--set", f"tile.mpp={MPP}")
    return run_pathfm("extract", *map(str, slides), "--encoder", f"untrained:{NET}", "--out", str(out), *_SETTINGS, *mpp)


def _tile_extract(slides: Sequence[Path], out: Path) -> Run:
    tiled = run_pathfm("tile", *map(str, slides), "--out", str(out), "--mpp", MPP)
    extracted = run_pathfm("extract", str(out), "--encoder", f"untrained:{NET}", *_SETTINGS)
    both = zip(tiled[:2], extracted[:2], strict=True)
    return Run(*(sum(pair) for pair in both), *(max(pair) for pair in zip(tiled[2:], extracted[2:], strict=True)))


_SETTINGS = ("--set", "extract.controls=false", "--set", "extract.precision=bf16", "--set", "compute.device=cpu")


def _table(slides: Sequence[Path], tiles: int, runs: dict[str, list[Run]]) -> Table:
    table = Table(
        f"extract_field: {len(slides)} slides ({slides[0].stem} ...), {tiles} tiles at {MPP} um, {NET}; wanted: {WANTED} x",
        ("what", "CPU s", "wall s", "slides/hour", "slides/hour of CPU", "x the loop, CPU", "x the loop, wall"),
        notes=(
            f"slides/hour of CPU: on {usable_cores()} cores that do nothing else, by the CPU seconds; memory of the largest "
            f"process: {', '.join(f'{max(run.largest_mb for run in each):.0f} MB' for each in runs.values())}",
            f"bf16 is {'computed by this CPU itself' if cpu_has_bf16() else 'emulated by this CPU'}; {_has_amx()}",
            machine(),
        ),
    )
    for name, mine in runs.items():
        cpu, wall = (statistics.median(values) for values in zip(*(run[:2] for run in mine), strict=True))
        hour = 3600 * len(slides)
        gains = (statistics.median(a[i] / b[i] for a, b in zip(runs[LOOP], mine, strict=True)) for i in (0, 1))
        table.rows.append((name, cpu, wall, hour / wall, hour * usable_cores() / cpu, *gains))
    return table


def _has_amx() -> str:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return "it has AMX" if "amx_bf16" in flags else "it has no AMX, for which the wanted figure is meant"
