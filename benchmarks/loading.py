"""What pretraining's data cost: reading and cropping tiles, and the order of samples over a million slides."""

from __future__ import annotations

import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import cv2
import numpy as np

from benchmarks.measure import Options, Table, cpu_ms, cpu_ratio, in_turn
from benchmarks.read import whole_streams
from benchmarks.slide import benchmark_slide, tissue_tiles
from pathfm import jpeg
from pathfm.pretrain.catalogue import Catalogue, Entry, build_catalogue, catalogue_of, open_catalogue
from pathfm.pretrain.data import TileBatches
from pathfm.pretrain.order import Order
from pathfm.pretrain.reading import TileReader
from pathfm.pretrain.views import cut_views
from pathfm.pretrain_settings import CropSettings, PretrainSettings, SamplingSettings
from pathfm.store.tile_store import open_tiles, write_tiles

TILES, STORES, BATCH, PIECES = 1024, 16, 64, 16
SLIDES, QUICK_SLIDES, TILES_PER_SLIDE = 1_000_000, 10_000, 1000
SAMPLES, CHUNK = 1_000_000, 1024
SITES = 20


def run(options: Options) -> list[Table]:
    """Reading from real stores, and a simulation of a list of stores that is too long to write."""
    return [_reading(options), _many_slides(options)]


def _reading(options: Options) -> Table:
    cv2.setNumThreads(1)  # as in the worker processes
    slide = benchmark_slide(options.work)
    streams, _ = whole_streams(slide)
    chosen = np.flatnonzero(tissue_tiles(slide, 256))[:TILES]
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        paths = [Path(folder) / f"{number}.zarr" for number in range(STORES)]
        for number, path in enumerate(paths):
            tiles = np.stack([jpeg.decode(streams[index]) for index in chosen[number::STORES]])
            write_tiles(path, tiles, slide_id=str(number), mpp=0.25)
        samples = in_turn(_rivals(paths), list(range(PIECES)), options.passes)
    bare = samples["bare JPEG decode"]
    crops = PretrainSettings().crops
    table = Table(
        f"loading: {TILES} JPEG tiles of 256 px in {STORES} stores, page cache warm, one process",
        ("work", "CPU ms/tile", "tiles/CPU-s", "decode / it"),
        notes=(f"crops: 2 x {crops.global_px} + {crops.local_count} x {crops.local_px} px; an item is a batch of {BATCH}",),
    )
    for name, mine in samples.items():
        table.rows.append((name, cpu_ms(mine), round(1000 / cpu_ms(mine)), cpu_ratio(bare, mine)))
    return table


def _rivals(paths: Sequence[Path]) -> dict[str, Callable[[int], int]]:
    """What a piece of work is done with; each takes the number of a batch and does the same tiles."""
    settings = PretrainSettings(batch_size=BATCH, steps=PIECES, sampling=SamplingSettings(slide_power=1.0))
    catalogue = build_catalogue(paths, settings.sampling, {})
    reader, batches = TileReader(catalogue, settings), TileBatches(catalogue, settings, settings.crops, 16)
    stores = {open_tiles(path).slide_id: open_tiles(path) for path in paths}
    sources = [batches.sources(number) for number in range(PIECES)]
    shuffled = np.random.default_rng(0).permutation(TILES).reshape(PIECES, BATCH).tolist()
    random = [[sources[number % PIECES][number // PIECES] for number in row] for row in shuffled]
    encoded = [[stores[slide_id].encoded(tile) for slide_id, tile in piece] for piece in random]

    def cropped(crops: CropSettings, number: int) -> int:
        for place in reader.places(number * BATCH + np.arange(BATCH)):
            cut_views(reader.read(place)[0], crops, np.random.default_rng(place))
        return BATCH

    return {
        "bare JPEG decode": lambda number: len([jpeg.decode(data) for data in encoded[number]]),
        "random tiles of stores": lambda number: len([stores[slide_id][tile] for slide_id, tile in random[number]]),
        "samples of a run": lambda number: len([reader.read(at) for at in reader.places(number * BATCH + np.arange(BATCH))]),
        "samples and ten crops": lambda number: cropped(settings.crops, number),
        "whole item: colours, masks": lambda number: len(batches[number].global_crops) // 2,
    }


def _many_slides(options: Options) -> Table:
    """Builds a catalogue of stores that do not exist, and draws from it in fresh processes that map it."""
    slides = QUICK_SLIDES if options.quick else SLIDES
    table = Table(
        f"order: {slides:,} slides, {slides * TILES_PER_SLIDE:,} tiles, weighted by {SITES} sites",
        ("work", "CPU s", "peak MB", "not shared MB", "samples/CPU-s"),
    )
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folder = Path(name) / "catalogue"
        for what, work in (("build and save", _build), (f"draw {SAMPLES:,} samples", _draw)):
            table.rows.append((what, *_in_fresh_process(work, folder, slides)))
        on_disk = sum(file.stat().st_size for file in folder.iterdir())
    note = f"catalogue: {on_disk / 1e6:,.0f} MB, {on_disk / slides:.0f} bytes per slide, shared by all processes of a machine"
    return Table(
        table.title,
        table.columns,
        table.rows,
        (note, "not shared: beyond what the process held before the work"),
    )


def _build(folder: Path, slides: int) -> int:
    tiles = np.random.default_rng(0).integers(1, 2 * TILES_PER_SLIDE, slides).tolist()
    names = [f"TCGA-{number:07}-01Z-00-DX1.{number:036X}" for number in range(slides)]
    place = "/archive/study/out/tiles/256px-0.5mpp-3f9c"
    entries = [
        Entry(name, 0.5, f"{place}/{name}.zarr", count, shard_tiles=256, tile_px=256)
        for name, count in zip(names, tiles, strict=True)
    ]
    facts = {entry.slide_id: {"site": f"site {n % SITES}"} for n, entry in enumerate(entries)}
    catalogue_of(entries, SamplingSettings(weights={"site": {"site 0": 3.0}}), facts).saved(folder, "benchmark")
    return 0


def _draw(folder: Path, _: int) -> int:
    catalogue = open_catalogue(folder, "benchmark")
    assert isinstance(catalogue, Catalogue)
    order = Order(catalogue.line, SamplingSettings(), 0)
    for start in range(0, SAMPLES, CHUNK):
        draws = order.draws(np.arange(start, start + CHUNK))
        order.tiles(draws.entry_B, order.ranks(draws))
    return SAMPLES


def _in_fresh_process(work: Callable[[Path, int], int], folder: Path, slides: int) -> tuple[float, float, float, float]:
    """CPU seconds, peak memory, memory of its own beyond that of the bare process [MB], and samples per CPU second."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(there, work, folder, slides))
    process.start()
    there.close()
    found: tuple[float, float, float, float] = here.recv()
    process.join()
    return found


def _measured(there: Connection, work: Callable[[Path, int], int], folder: Path, slides: int) -> None:
    own_mb = _memory_mb("smaps_rollup", "Private_Dirty")
    start = time.process_time()
    samples = work(folder, slides)
    cpu_s = time.process_time() - start
    own_mb = _memory_mb("smaps_rollup", "Private_Dirty") - own_mb
    there.send((cpu_s, _memory_mb("status", "VmHWM"), own_mb, round(samples / cpu_s)))


def _memory_mb(file: str, key: str) -> float:
    found = re.search(rf"^{key}:\s*(\d+) kB", Path("/proc/self", file).read_text(), re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0
