"""``python -m benchmarks``: start-up, tiling and random reads on a synthetic slide, in CPU time."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr

from pathfm.geometry import Size
from pathfm.slides.synthetic import SyntheticSpec, write_slide
from pathfm.store.cohort import SlideRow
from pathfm.store.record import library_versions
from pathfm.store.tile_store import TileStore, open_tiles
from pathfm.study import TileSettings
from pathfm.tile.slide import tile_slide

READS = 400


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process for a piece of work."""
    started = time.process_time()
    work()
    return time.process_time() - started


def start_up() -> str:
    """Wall time of ``pathfm --help``: the median of five."""
    walls = []
    for _ in range(5):
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "pathfm", "--help"], check=True, stdout=subprocess.DEVNULL)
        walls.append(time.monotonic() - started)
    return f"pathfm --help            {sorted(walls)[2] * 1000:7.0f} ms"


def tiling(folder: Path) -> tuple[str, TileStore]:
    """CPU time per tile of a whole slide, detection, quality columns and JPEG store included."""
    slide = write_slide(folder / "slide.tiff", SyntheticSpec(size_px=Size(4096, 4096), seed=1)).path
    target = folder / "slide.zarr"
    settings = TileSettings(tile_px=128)
    spent = cpu_seconds(lambda: tile_slide(SlideRow("slide", slide), settings, target, "identity", ("a", "b")))
    store = open_tiles(target)
    return f"tile, 128 px at 0.5 mpp  {spent / len(store) * 1000:7.2f} ms CPU per kept tile ({len(store)} tiles)", store


def random_reads(store: TileStore) -> list[str]:
    """CPU time per tile of random reads: our reader, and zarr-python on the same files."""
    order = np.random.default_rng(0).integers(0, len(store), READS)
    plain = zarr.open_group(store.path, mode="r")["tiles"]
    ours = cpu_seconds(lambda: [store[int(index)] for index in order])
    theirs = cpu_seconds(lambda: [plain[int(index)] for index in order])
    return [
        f"random read, pathfm      {ours / READS * 1000:7.3f} ms CPU per tile",
        f"random read, zarr-python {theirs / READS * 1000:7.3f} ms CPU per tile ({theirs / ours:.1f} x)",
    ]


def main() -> None:
    """Prints all figures."""
    print(", ".join(f"{name} {version}" for name, version in library_versions().items()))
    print(start_up())
    with tempfile.TemporaryDirectory() as folder:
        line, store = tiling(Path(folder))
        print(line)
        print("\n".join(random_reads(store)))
    print(f"peak memory              {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:7.0f} MB")


main()
