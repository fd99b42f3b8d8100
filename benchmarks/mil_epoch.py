"""Seconds per epoch of one gated-attention network against a plain loop, at equal loss curves; what row-chunked files cost."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import Options, Spent, Table, cpu_ratio, in_turn, machine, wall_ratio
from benchmarks.mil_bags import DIM, cached, read_chunked, two_classes, write_bags, write_chunked
from benchmarks.plain_mil import PlainAttention, PlainTraining
from pathfm.mil.bags import Bags
from pathfm.mil.feature_cache import FeatureCache
from pathfm.mil.fit import Fitted, FoldJob, Machine, fit_folds
from pathfm.mil.network import build_network, spec_of
from pathfm.mil.passes import Reader
from pathfm.mil_settings import MilSettings

BAGS, TILES, EPOCHS = 100, 5000, 3
QUICK_BAGS, QUICK_TILES = 10, 500
HELD = 2
"""Small bags for the validation that every training of ours has."""
THREADS = 2
SEED = 1


def run(options: Options) -> list[Table]:
    """Time of an epoch, loss curves, and contiguous against row-chunked files."""
    bags, tiles = (QUICK_BAGS, QUICK_TILES) if options.quick else (BAGS, TILES)
    paths = write_bags(options.work / f"mil-{bags}x{tiles}", [tiles] * bags + [16] * HELD)
    chunked = write_chunked(options.work / f"mil-{bags}x{tiles}-chunked", paths)
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        from_disk, in_memory, copied = (FeatureCache(size, Path(scratch, str(at))) for at, size in enumerate((0, 2**34, 0)))
        with from_disk, in_memory, copied:
            sets = {
                "pathfm, from disk": cached(from_disk, paths),
                "pathfm, cached": cached(in_memory, paths),
                "pathfm, row-chunked": cached(copied, chunked, read_chunked),
            }
            times = _times(paths[:bags], sets, options.passes)
            curves = _curves(paths[:bags], sets["pathfm, from disk"])
    return [_time_table(times, bags, tiles), curves]


def _settings(epochs: int, precision: str) -> MilSettings:
    return MilSettings(
        hidden=512,
        attention=256,
        dropout=0.25,
        lr=1e-4,
        weight_decay=1e-5,
        epochs=epochs,
        patience=epochs,
        batch_bags=1,
        max_bag_tiles=None,
        balance="none",
        precision=precision,
    )


def _train(bags: Bags, epochs: int, precision: str = "bf16") -> Fitted:
    """One network of ours."""
    settings, count = _settings(epochs, precision), len(bags) - HELD
    tasks, target_BT = two_classes(settings, len(bags))
    job = FoldJob(0, tuple(range(count)), tuple(range(count, len(bags))), (SEED,))
    fitted: list[Fitted] = []
    fit_folds(bags, target_BT, tasks, [job], settings, lambda _, members: fitted.extend(members), Machine(workers=THREADS))
    return fitted[0]


def _plain(paths: list[Path], bags: Bags, epochs: int, standardised: bool = False) -> PlainTraining:
    """The plain loop, from the weights that ours starts from."""
    settings = _settings(epochs, "fp32")
    network = build_network(spec_of(settings, DIM, 2))
    network.draw_weights(torch.Generator().manual_seed(SEED))
    mean_D, scale_D = bags.statistics(range(len(paths)))
    network.mean_D.copy_(mean_D)
    network.scale_D.copy_(scale_D)
    model = PlainAttention(DIM, settings.hidden, settings.attention, 2, settings.dropout)
    model.start_from(network, standardised)
    return PlainTraining(model, paths, settings.lr, settings.weight_decay, epochs)


def _times(paths: list[Path], sets: dict[str, Bags], passes: int) -> dict[str, list[Spent]]:
    plain = _plain(paths, next(iter(sets.values())), EPOCHS)

    def loop(_: int) -> int:
        plain.epoch(np.random.default_rng(0).permutation(len(paths)).tolist())
        return 1

    def ours(bags: Bags) -> Callable[[int], int]:
        return lambda _: len(_train(bags, 1).curve)

    return in_turn({"plain loop": loop, **{name: ours(bags) for name, bags in sets.items()}}, [0], max(passes, 3))


def _time_table(times: dict[str, list[Spent]], bags: int, tiles: int) -> Table:
    table = Table(
        f"mil_epoch: gated attention {DIM}-512-256, one epoch of {bags} bags x {tiles:,} x {DIM} float16",
        ("", "wall s", "CPU s", "wall / plain", "CPU / plain", "wall / from disk", "CPU / from disk"),
        notes=(
            f"plain loop: fp32, one bag per step, {THREADS} threads. Ours: bf16, one bag per step, one thread that learns, one",
            "that helps with its products, one that reads, on as many cores; with building the network and the validation of",
            "two small bags. Medians of runs in turn.",
            machine(),
        ),
    )
    for name, samples in times.items():
        ratios = [
            ratio(samples, times[other]) for other in ("plain loop", "pathfm, from disk") for ratio in (wall_ratio, cpu_ratio)
        ]
        middle = (statistics.median(sample.wall_s for sample in samples), statistics.median(sample.cpu_s for sample in samples))
        table.rows.append((name, *middle, *ratios))
    return table


def _curves(paths: list[Path], bags: Bags) -> Table:
    """Training losses by epoch, from the same weights, in the same order of the bags."""
    reader = Reader(bags, 0, None, torch.float32, torch.device("cpu"))
    table = Table("mil_epoch: mean training loss by epoch", ("", *(f"epoch {epoch}" for epoch in range(1, EPOCHS + 1))))
    for name, standardised in (("plain loop, fp32", False), ("plain loop, fp32, features standardised", True)):
        plain = _plain(paths, bags, EPOCHS, standardised)
        torch.manual_seed(0)
        losses = [plain.epoch([place for place in reader.order(epoch) if place < len(paths)]) for epoch in range(EPOCHS)]
        table.rows.append((name, *losses))
    for precision in ("fp32", "bf16"):
        table.rows.append((f"pathfm, {precision}", *(loss.train for loss in _train(bags, EPOCHS, precision).curve)))
    return table
