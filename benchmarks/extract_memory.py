"""Peak memory of extraction for slides of a thousand to a hundred thousand tiles: flat, as features are written as they come.

The stores hold the same few JPEG tiles again and again. The network is a small one of wide features: 100,000 vectors of 512
float32 values are 205 MB.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks.measure import Options, Table, memory_mb, run_module
from pathfm.config import load_study
from pathfm.extract.stage import run_extract
from pathfm.extract.stream import Device
from pathfm.extract.tiles import Batch
from pathfm.geometry import Size
from pathfm.store.cohort import Cohort, SlideRow
from pathfm.store.commit import commit_dir
from pathfm.store.layout import Layout
from pathfm.store.tile_store import TileCodec, TileStoreInfo, TileStoreWriter, open_tiles

COUNTS, QUICK_COUNTS = (1000, 10_000, 100_000), (1000, 5000)
TILE_PX, COLUMNS, KINDS = 32, 400, 64
SPEC, SLIDE, NOTED = f"{TILE_PX}px-0.5mpp-memory", "slide", "memory.txt"
RESET_PEAK = "5"
"""What to tell the kernel (proc(5), clear_refs) to forget the peak so far."""
SETTINGS = (
    "extract.encoder=untrained:resnet10t",
    f"extract.input_px={TILE_PX}",
    "extract.precision=fp32",
    "extract.dtype=float32",
    "extract.controls=false",
    "compute.device=cpu",
)


def run(options: Options) -> list[Table]:
    """A row per slide, each in a process of its own."""
    table = Table(
        "extract_memory: one slide, features of 512 float32 values",
        ("tiles", "CPU s", "wall s", "features MB", "peak MB", "peak MB after the first batch", "over the first batch"),
        notes=("over the first batch: the largest memory after it, less the memory held when it had been encoded",),
    )
    for count in QUICK_COUNTS if options.quick else COUNTS:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            layout = Layout(Path(folder), SPEC)
            write_store(layout.store(SLIDE), count)
            taken = run_module("benchmarks.extract_memory", folder)
            (file,) = layout.out.rglob(f"{SLIDE}.h5")
            size_mb = file.stat().st_size / 1e6
            held_mb, later_mb = map(float, (layout.out / NOTED).read_text().split())
        table.rows.append((count, taken.cpu_s, taken.wall_s, size_mb, taken.largest_mb, later_mb, later_mb - held_mb))
    return [table]


def write_store(path: Path, count: int) -> None:
    """A store of JPEG tiles, few of them different."""
    coarse = np.random.default_rng(0).integers(0, 256, (KINDS, 4, 4, 3), dtype=np.uint8)
    kinds = coarse.repeat(TILE_PX // 4, axis=1).repeat(TILE_PX // 4, axis=2)
    size = Size(COLUMNS * TILE_PX, -(-count // COLUMNS) * TILE_PX)
    with commit_dir(path) as folder:
        writer = TileStoreWriter(folder, TileCodec("jpeg"), TILE_PX)
        for number in range(count):
            xy = (number % COLUMNS * TILE_PX, number // COLUMNS * TILE_PX)
            writer.append(kinds[number % KINDS], xy, (), "")
        info = TileStoreInfo(SLIDE, "in memory", TILE_PX, 0.5, float(TILE_PX), size, (), 8.0, coords_synthetic=False)
        writer.finish(info, np.zeros((16, 16, 3), dtype=np.uint8))


def main(out: Path) -> None:
    """The features of the one slide in this folder; notes memory at the first batch, and the most held after it [MB]."""
    layout, held_mb, plain = Layout(out, SPEC), 0.0, Device.begin

    def begin(device: Device, batch: Batch) -> object:
        nonlocal held_mb
        pending = plain(device, batch)
        if not held_mb:
            held_mb = memory_mb("self", "status", "VmRSS")
            Path("/proc/self/clear_refs").write_text(RESET_PEAK)
        return pending

    study = load_study(None, [f"out={out}", *SETTINGS])
    with mock.patch.object(Device, "begin", begin):
        report = run_extract(study, Cohort((SlideRow(SLIDE, out / f"{SLIDE}.svs"),)), layout).report
    if report.exit_code or report.outcomes[0].counts["tiles"] != len(open_tiles(layout.store(SLIDE))):
        sys.exit(f"extraction failed: {report}")
    (out / NOTED).write_text(f"{held_mb} {memory_mb('self', 'status', 'VmHWM')}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
