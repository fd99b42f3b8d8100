"""Single tiles of a store in random order: our reader, and zarr-python on the same files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import zarr

from benchmarks.measure import Options, Table, cpu_ms, cpu_ratio, in_turn
from benchmarks.read import whole_streams
from benchmarks.slide import benchmark_slide, tissue_tiles
from pathfm import jpeg
from pathfm.store.tile_store import open_tiles, write_tiles

TILES, READS, PIECES = 1024, 200, 10


def run(options: Options) -> list[Table]:
    """Both on the same tiles."""
    slide = benchmark_slide(options.work)
    streams, _ = whole_streams(slide)
    chosen = np.flatnonzero(tissue_tiles(slide, 256))[:TILES]
    order = np.random.default_rng(0).integers(0, len(chosen), (PIECES, READS))
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        path = Path(folder) / "slide.zarr"
        write_tiles(path, np.stack([jpeg.decode(streams[index]) for index in chosen]), slide_id="slide", mpp=0.25)
        store, plain = open_tiles(path), zarr.open_group(path, mode="r")["tiles"]
        rivals = {
            "pathfm": lambda piece: len([store[int(index)] for index in piece]),
            "zarr-python": lambda piece: len([plain[int(index)] for index in piece]),
        }
        samples = in_turn(rivals, list(order), options.passes)
    table = Table(f"random reads: {TILES} tiles of 256 px, JPEG", ("reader", "CPU ms/tile", "CPU / pathfm's"))
    for name, mine in samples.items():
        table.rows.append((name, cpu_ms(mine), cpu_ratio(mine, samples["pathfm"])))
    return [table]
