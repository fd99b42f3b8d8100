"""Peak memory of training classifiers: what imports take, the stated budget of the cache, and a part that does not grow."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.measure import Options, Table, machine, memory_mb, run_module
from benchmarks.mil_bags import DIM, cached, two_classes, write_bags
from pathfm.mil.feature_cache import FeatureCache
from pathfm.mil.fit import FoldJob, Machine, fit_folds
from pathfm.mil_settings import MilSettings

COUNTS, QUICK_COUNTS = (100, 1000), (20, 40)
TILES, KINDS = 5000, 10
RAGGED_KINDS, QUICK_KINDS, SHORTEST = 400, 20, 4
"""Kinds of bags of a ragged cohort, which differ in length by steps from the shortest to ``TILES``."""
FOLDS, SEEDS, WORKERS = 5, (1, 2, 3), 2
BUDGET_MB, ALLOWED_MB = 256, 500
NOTED = "memory.txt"


def run(options: Options) -> list[Table]:
    """A row per cohort, each in a process of its own; bags are a few files under many names, read as if they were many."""
    table = Table(
        f"mil_memory: {FOLDS} folds x {len(SEEDS)} seeds, bags of {DIM} float16, a budget of {BUDGET_MB} MB",
        (
            "bags",
            "tiles of each",
            "features MB",
            "CPU s",
            "wall s",
            "after imports MB",
            "peak MB",
            "beyond imports and budget MB",
            "allowed MB",
        ),
        notes=(
            "bf16, 128 wide, 8 bags per step, at most 4,096 tiles of a bag in training, all in validation; two worker threads",
            machine(),
        ),
    )
    cohorts = {
        f"{TILES:,}": write_bags(options.work / f"mil-{KINDS}x{TILES}", [TILES] * KINDS),
        f"{SHORTEST} to {TILES:,}": write_bags(
            options.work / "mil-ragged", ragged_lengths(QUICK_KINDS if options.quick else RAGGED_KINDS)
        ),
    }
    for tiles, paths in cohorts.items():
        for count in QUICK_COUNTS if options.quick else COUNTS:
            table.rows.append((count, tiles, *_row(options, paths, count)))
    return [table]


def ragged_lengths(kinds: int) -> list[int]:
    """Lengths of bags, all different, in a mixed order."""
    return [SHORTEST + number * 149 % kinds * (TILES - SHORTEST) // (kinds - 1) for number in range(kinds)]


def _row(options: Options, paths: list[Path], count: int) -> tuple[float, ...]:
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        bags = [paths[number % len(paths)] for number in range(count)]
        for number, path in enumerate(bags):
            os.link(path, Path(folder, f"bag-{number:04d}.h5"))
        taken = run_module("benchmarks.mil_memory", folder)
        imports_mb, peak_mb = map(float, Path(folder, NOTED).read_text().split())
    size_mb = sum(path.stat().st_size for path in bags) / 2**20
    return size_mb, taken.cpu_s, taken.wall_s, imports_mb, peak_mb, peak_mb - imports_mb - BUDGET_MB, ALLOWED_MB


def main(folder: Path) -> None:
    """Trains on all bags of a folder for an epoch; notes memory after the imports, and the most there was [MB]."""
    torch.optim.AdamW([torch.zeros(1)])  # the first optimizer imports what the tensor library had put off
    imports_mb = memory_mb("self", "status", "VmRSS")
    settings = MilSettings(epochs=1, precision="bf16")
    with FeatureCache(BUDGET_MB * 2**20, folder / "scratch") as cache:
        bags = cached(cache, sorted(folder.glob("*.h5")))
        for slide_id, facts in cache.facts.items():  # as the stage does once leaks have been looked for
            cache.facts[slide_id] = replace(facts, row_hashes=facts.row_hashes[:0])
        tasks, target_BT = two_classes(settings, len(bags))
        parts = [tuple(place for place in range(len(bags)) if place // 2 % FOLDS == fold) for fold in range(FOLDS)]
        everyone, jobs = set(range(len(bags))), []
        for fold in range(FOLDS):
            held = parts[(fold + 1) % FOLDS]
            jobs.append(FoldJob(fold, tuple(sorted(everyone - {*parts[fold], *held})), held, SEEDS))
        fit_folds(bags, target_BT, tasks, jobs, settings, lambda *_: None, Machine(workers=WORKERS))
    (folder / NOTED).write_text(f"{imports_mb} {memory_mb('self', 'status', 'VmHWM')}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
