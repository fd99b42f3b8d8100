"""5 folds x 3 seeds: one pass of the bags per epoch for all of them, against 15 trainings of our own, each with its passes."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from benchmarks.measure import Options, Spent, Table, cpu_ratio, in_turn, machine, wall_ratio
from benchmarks.mil_bags import DIM, cached, two_classes, write_bags
from pathfm.mil.bags import Bags
from pathfm.mil.feature_cache import FeatureCache
from pathfm.mil.fit import FoldJob, Machine, fit_folds
from pathfm.mil.passes import Reader
from pathfm.mil_settings import MilSettings
from pathfm.workers import usable_cores

BAGS, TILES, EPOCHS = 50, 2000, 3
QUICK_BAGS, QUICK_TILES = 20, 100
FOLDS, SEEDS = 5, (1, 2, 3)


def run(options: Options) -> list[Table]:
    """CPU and wall seconds of both, and the bytes that were read and cast."""
    bags, tiles = (QUICK_BAGS, QUICK_TILES) if options.quick else (BAGS, TILES)
    paths = write_bags(options.work / f"mil-{bags}x{tiles}", [tiles] * bags)
    with tempfile.TemporaryDirectory(dir=options.work) as scratch, FeatureCache(0, Path(scratch)) as cache:
        work = Lockstep(cached(cache, paths))
        times = in_turn({"15 trainings": work.one_by_one, "in lock-step": work.together}, [0], max(2, options.passes))
    table = Table(
        f"mil_lockstep: {FOLDS} folds x {len(SEEDS)} seeds, {bags} bags x {tiles:,} x {DIM} float16, {EPOCHS} epochs",
        ("", "wall s", "CPU s", "wall / 15 alone", "CPU / 15 alone", "GB read", "GB cast", "times all bags per pass"),
        notes=(
            "Both: bf16, 128 wide, 8 bags per step, without starting up and without checking the files. All bags are read",
            f"once more, for the last validation. Lock-step uses {usable_cores()} threads, a training alone one.",
            machine(),
        ),
    )
    for name, samples in times.items():
        read, cast = (count / 1e9 for count in work.bytes[name])
        all_bags = work.bags.dim * 2 * sum(work.bags.lengths) * (EPOCHS + 1) / 1e9
        table.rows.append((name, *_middle(samples), *_ratios(samples, times["15 trainings"]), read, cast, read / all_bags))
    return [table]


class Lockstep:
    """The same trainings in two ways; ``bytes`` has what the last run of each read and cast."""

    def __init__(self, bags: Bags) -> None:
        self.bags, self.bytes = bags, {}
        self.settings = MilSettings(epochs=EPOCHS, patience=EPOCHS, precision="bf16", max_bag_tiles=None)
        self.tasks, self.target_BT = two_classes(self.settings, len(bags))
        # Each class in every fold: pairs of neighbours stay together.
        parts = [[place for place in range(len(bags)) if place // 2 % FOLDS == fold] for fold in range(FOLDS)]
        self.jobs = []
        for fold in range(FOLDS):
            held = (fold + 1) % FOLDS
            train = [place for part in range(FOLDS) if part not in (fold, held) for place in parts[part]]
            self.jobs.append(FoldJob(fold, tuple(sorted(train)), tuple(parts[held]), SEEDS))

    def together(self, _: int) -> int:
        """All in one process and one pass per epoch."""
        return self._count("in lock-step", [self.jobs], usable_cores())

    def one_by_one(self, _: int) -> int:
        """Every fold and seed for itself."""
        alone = [[FoldJob(job.number, job.train, job.validation, (seed,))] for job in self.jobs for seed in job.seeds]
        return self._count("15 trainings", alone, 1)

    def _count(self, name: str, runs: Sequence[Sequence[FoldJob]], workers: int) -> int:
        before, cast, networks, show = self.bags.cache.bytes_read, 0, [], Reader.show

        def shown(reader: Reader, place: int, *rest: int) -> object:
            nonlocal cast
            bag = show(reader, place, *rest)
            cast += bag.drawn.rest_ND.nbytes
            return bag

        with mock.patch.object(Reader, "show", shown):
            for jobs in runs:
                done = lambda _, fitted: networks.extend(fitted)  # noqa: E731 - one line
                fit_folds(self.bags, self.target_BT, self.tasks, jobs, self.settings, done, Machine(workers=workers))
        self.bytes[name] = (self.bags.cache.bytes_read - before, cast)
        return len(networks)


def _middle(samples: Sequence[Spent]) -> tuple[float, float]:
    return statistics.median(sample.wall_s for sample in samples), statistics.median(sample.cpu_s for sample in samples)


def _ratios(samples: Sequence[Spent], reference: Sequence[Spent]) -> tuple[float, float]:
    return wall_ratio(samples, reference), cpu_ratio(samples, reference)
