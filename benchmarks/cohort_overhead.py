"""A cohort of thousands of tiny slides through the whole study in one process: what a slide costs beside the real work.

The real work is what no pipeline can leave out: decoding and encoding the JPEG of each tile, and the encoder's forward pass,
done here in a plain loop. Everything else (finding slides, leases, stores, records, feature files, receipts) is overhead.
"""

from __future__ import annotations

import csv
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import torch

from benchmarks.measure import Options, Table, machine
from pathfm.config import load_study
from pathfm.jobs import Jobs
from pathfm.running import RunOptions, run_study
from pathfm.study import Study

SLIDES, QUICK_SLIDES, TILES, SIDE_PX = 2000, 100, 4, 64
ENCODER = "untrained:vit_tiny_patch16_224"
SETTINGS = (
    "cohort.folder_of_tiles=true",
    "tile.mpp=native",
    f"tile.tile_px={SIDE_PX}",
    "tile.tissue.method=off",
    "tile.filters.max_white=1.0",
    f"extract.encoder={ENCODER}",
    f"extract.input_px={SIDE_PX}",
    "extract.precision=fp32",
    "extract.controls=false",
    "mil.label=label",
    "mil.positive=yes",
    "mil.epochs=5",
    "mil.folds=2",
    "mil.ensemble=1",
    "mil.numbers.bootstrap=100",
)


def run(options: Options) -> list[Table]:
    """Seconds of each stage, per slide, for a first run and for one that finds everything made."""
    count = QUICK_SLIDES if options.quick else SLIDES
    table_file = _write_cohort(options.work / f"cohort-{count}", count)
    out = options.work / f"cohort-{count}-out"
    shutil.rmtree(out, ignore_errors=True)
    study = load_study(None, [*SETTINGS, f"cohort.table={table_file}", f"out={out}"])
    real = _real_work(table_file)
    first, again = _timed(study), _timed(study)
    table = Table(
        f"cohort_overhead: {count} slides of {TILES} tiles of {SIDE_PX} px, in one process",
        ("stage", "first run s", "ms per slide", "nothing to do s", "ms per slide"),
        notes=(
            f"The real work in a plain loop: {real:.1f} s ({1000 * real / count:.1f} ms per slide).",
            f"Overhead of tile and extract: {1000 * (first['tile'] + first['extract'] - real) / count:.1f} ms per slide;",
            f"of everything else but learning (plan, check, receipts): "
            f"{1000 * (first['plan'] + first['check'] + first['receipts']) / count:.1f} ms per slide.",
            machine(),
        ),
    )
    for stage in first:
        table.rows.append((stage, first[stage], 1000 * first[stage] / count, again[stage], 1000 * again[stage] / count))
    return [table]


def _write_cohort(folder: Path, count: int) -> Path:
    """Folders of tiles with a class each, and their table."""
    table = folder / "cohort.csv"
    if table.is_file():
        return table
    draw = np.random.default_rng(0)
    rows = []
    for number in range(count):
        place = folder / "slides" / f"s{number:05d}"
        place.mkdir(parents=True, exist_ok=True)
        for tile in range(TILES):
            pixels = cv2.GaussianBlur(draw.integers(60, 220, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8), (0, 0), 1 + number % 2)
            cv2.imwrite(str(place / f"{tile}.jpg"), pixels)
        rows.append((place.name, f"slides/{place.name}", f"p{number:05d}", ("no", "yes")[number % 2]))
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("slide_id", "path", "patient_id", "label"))
        writer.writerows(rows)
    return table


def _real_work(table: Path) -> float:
    """Seconds for decoding, encoding and the forward passes of all tiles, a slide at a time."""
    import timm

    with torch.inference_mode(), torch.random.fork_rng():
        encoder = timm.create_model(ENCODER.partition(":")[2], img_size=SIDE_PX, num_classes=0).eval()
        started = time.perf_counter()
        for place in sorted((table.parent / "slides").iterdir()):
            tiles = np.stack([cv2.imread(str(path)) for path in sorted(place.iterdir())])
            for tile in tiles:
                cv2.imencode(".jpg", tile)
            encoder(torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255)
        return time.perf_counter() - started


def _timed(study: Study) -> dict[str, float]:
    """Wall seconds of a run, by stage; what the run does between them is its plan and its receipts."""
    seconds: dict[str, float] = {}

    @contextmanager
    def clock(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

    work, write, plan = Jobs.work, "pathfm.running.write_receipts", "pathfm.running.make_plan"
    from pathfm import running

    def timed(name: str, function):
        def inner(*arguments, **more):
            with clock(name):
                return function(*arguments, **more)

        return inner

    def timed_work(jobs: Jobs, stage: str):
        with clock(stage):
            return work(jobs, stage)

    seconds.update({"plan": 0.0, "check": 0.0})
    with (
        mock.patch.object(Jobs, "work", timed_work),
        mock.patch(write, timed("receipts", running.write_receipts)),
        mock.patch(plan, timed("plan", running.make_plan)),
        clock("whole"),
    ):
        run_study(study, RunOptions())
    return seconds
