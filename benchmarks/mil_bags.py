"""What the benchmarks of slide classifiers share: feature files of random bags with a planted signal, and settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np

from pathfm.mil.bags import Bags
from pathfm.mil.feature_cache import FeatureCache
from pathfm.mil.tasks import TaskSet, make_tasks
from pathfm.mil_settings import MilSettings
from pathfm.store.feature_file import write_features
from pathfm.store.interop.foreign_features import ForeignFeatures

DIM = 1024
PLANTED, SHIFT = 0.05, 1.0
"""Share of the tiles of a positive bag that carry the signal, and how large it is in the first channels."""


def planted_bag(number: int, tiles: int) -> np.ndarray:
    """Features [N, D] float16 of a bag; those with an odd number are positive."""
    generator = np.random.default_rng(number)
    feature_ND = generator.standard_normal((tiles, DIM), dtype=np.float32)
    if number % 2:
        feature_ND[: max(1, round(PLANTED * tiles)), :32] += SHIFT
    return feature_ND.astype(np.float16)


def grid(tiles: int) -> np.ndarray:
    """Coordinates [N, 2] of tiles of 256 pixels, in rows of a hundred."""
    return np.stack([np.arange(tiles) % 100, np.arange(tiles) // 100], 1).astype(np.int64) * 256


def write_bags(folder: Path, lengths: Sequence[int]) -> list[Path]:
    """Feature files of this study, one per bag; those that are there are kept."""
    paths = [folder / f"bag-{number:04d}.h5" for number in range(len(lengths))]
    for number, (path, tiles) in enumerate(zip(paths, lengths, strict=True)):
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_features(path, planted_bag(number, tiles), grid(tiles), {"fingerprint": "benchmark"})
    return paths


def write_chunked(folder: Path, paths: Sequence[Path]) -> list[Path]:
    """The same features with one row per chunk, as TRIDENT writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    copies = [folder / path.name for path in paths]
    for path, copy in zip(paths, copies, strict=True):
        if not copy.is_file():
            with h5py.File(path, "r") as source, h5py.File(copy, "w") as target:
                target.create_dataset("features", data=source["features"][()], chunks=(1, DIM), maxshape=(None, DIM))
                target["coords"] = source["coords"][()]
    return copies


def read_chunked(path: Path) -> ForeignFeatures:
    """Reads such a file."""
    with h5py.File(path, "r") as file:
        return ForeignFeatures("trident", file["features"][()], file["coords"][()].astype(np.float64), 256.0)


def cached(cache: FeatureCache, paths: Sequence[Path], read: Callable[[Path], ForeignFeatures] | None = None) -> Bags:
    """A bag per file."""
    units = [(cache.add(str(number), path, read).slide_id,) for number, path in enumerate(paths)]
    return Bags(cache, units)


def two_classes(settings: MilSettings, count: int) -> tuple[TaskSet, np.ndarray]:
    """The task of telling odd bags from even ones, and the targets."""
    rows = [{"label": "positive" if number % 2 else "negative"} for number in range(count)]
    tasks = make_tasks(settings, rows)
    return tasks, tasks.encode(rows)
