"""Extraction, from tiles to feature files on disk, against the bare network on batches that lie ready in memory.

Both in one process, in turn, with the same threads and batch size. The clock of an extraction starts when its first batch has
been encoded and stops when its last file is there; starting up is told apart. The bar is the faster of timm's network under
autocast and with bf16 weights; the network as we run it is told beside them.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import timm
import torch

from benchmarks.measure import Options, Spent, Table, machine, run_pathfm
from benchmarks.slide import repeated_slide
from pathfm.compute import pick_device
from pathfm.config import load_study
from pathfm.extract.stream import Device
from pathfm.extract.tiles import Batch
from pathfm.extraction import run_extraction
from pathfm.geometry import Size
from pathfm.models.encoders import TileEncoder, load_encoder
from pathfm.workflow import begin, open_study

MPP, SMALL = 0.5, Size(4096, 3584)
LARGE = {"quick": Size(8192, 4096), "cpu": Size(8192, 8192), "cuda": Size(49_152, 40_960)}
"""A slide of some fifty tiles, and one of more."""
SMALL_SLIDES = {"quick": 2, "cpu": 5, "cuda": 200}
QUICK_BATCH = 16
PREPARED = 4
"""Batches that lie ready."""
AUTOCAST, HALF, OURS = "bare network, autocast", "bare network, bf16 weights", "bare network, as ours runs"


class Net(NamedTuple):
    """A network, and the least share of its bare speed that extraction is to reach."""

    name: str
    shown: str
    bar: float


NETS = {
    "cpu": (Net("vit_small_patch16_224", "ViT-S/16", 0.90), Net("vit_base_patch16_224", "ViT-B/16", 0.95)),
    "cuda": (
        Net("vit_small_patch16_224", "ViT-S/16", 0.95),
        Net("vit_base_patch16_224", "ViT-B/16", 0.95),
        Net("vit_large_patch16_224", "ViT-L/16", 0.95),
        Net("vit_giant_patch14_224", "ViT-g/14", 0.95),
    ),
}


class Job(NamedTuple):
    """What one process measures: a network, and by what is read the folders of tiled slides."""

    net: Net
    sources: Mapping[str, Path]
    settings: tuple[str, ...]
    passes: int
    asked: float


class Taken(NamedTuple):
    """What a piece of work took, and what share of the time the device had work."""

    spent: Spent
    busy: float


class Found(NamedTuple):
    """Figures of one process, by rival: in turn, so that sample i of all is of the same time; and what is said once."""

    taken: Mapping[str, Sequence[Taken]]
    batch: int
    start_s: float


def run(options: Options) -> list[Table]:
    """A table per network, of the processor and of the GPU where there is one."""
    tables = []
    for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            sources = _tiled(Path(folder), options, device)
            settings = [f"compute.device={device}", "extract.precision=bf16", "extract.controls=false"]
            settings += [f"compute.batch_size={QUICK_BATCH}"] * options.quick
            for net in NETS[device][: 1 if options.quick else None]:
                job = Job(net, sources, tuple(settings), 1 if options.quick else options.passes, time.time())
                tables.append(_table(device, net, _in_fresh_process(job)))
    return tables


def _tiled(folder: Path, options: Options, device: str) -> dict[str, Path]:
    """By what is read, output folders of slides that have been tiled."""
    kind = "quick" if options.quick else device
    large, small = repeated_slide(options.work, LARGE[kind]), repeated_slide(options.work, SMALL)
    many = folder / "many"
    many.mkdir()
    for number in range(SMALL_SLIDES[kind]):
        (many / f"{number:03}.svs").symlink_to(small)
    sources = {
        "tile store": (large, "auto"),
        "tile stores, small slides": (many, "auto"),
        "straight from the slide": (large, "none"),
    }
    for name, (slides, codec) in sources.items():
        given = ("--mpp", str(MPP), "--set", f"tile.codec={codec}")
        run_pathfm("tile", str(slides), "--out", str(folder / name), *given)
    return {name: folder / name for name in sources}


def _in_fresh_process(job: Job) -> Found:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(there, job._replace(asked=time.time())))
    process.start()
    there.close()
    try:
        found: Found = here.recv()
    except EOFError as error:
        raise RuntimeError(f"the process that measures {job.net.name} failed") from error
    process.join()
    return found


def _measure(there: Connection, job: Job) -> None:
    """Once to warm up, then in turn, every second time in reverse."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        extractions = {name: _extraction(folder, job) for name, folder in job.sources.items()}
        first, batches = extractions["tile store"]()
        start_s, size = batches[0].since_epoch - job.asked, max(batch.tiles for batch in batches)
        tiles = -(-first.spent.tiles // size)
        bare = Bare(_encoder(job), job.net.name, size)
        rivals: dict[str, Callable[[], Taken]] = {
            **{name: partial(bare.forward, name, tiles) for name in (AUTOCAST, HALF, OURS)},
            **{name: partial(_only_taken, extract) for name, extract in extractions.items()},
        }
        taken: dict[str, list[Taken]] = {name: [] for name in rivals}
        for name in (AUTOCAST, HALF, OURS):
            bare.forward(name, 1)
        for turn in range(job.passes):
            for name in list(rivals)[:: -1 if turn % 2 else 1]:
                taken[name].append(rivals[name]())
    there.send(Found(taken, size, start_s))


class Stamp(NamedTuple):
    """When a batch had been given to the device, what had been spent by then, and what the device was busy with."""

    since_epoch: float
    wall_s: float
    cpu_s: float
    tiles: int
    busy_s: Callable[[], float]


def _only_taken(extract: Callable[[], tuple[Taken, list[Stamp]]]) -> Taken:
    return extract()[0]


def _encoder(job: Job) -> TileEncoder:
    study = load_study(None, [f"extract.encoder=untrained:{job.net.name}", *job.settings])
    return load_encoder(study.extract.encoder, study.extract, pick_device(study.compute))


def _extraction(folder: Path, job: Job) -> Callable[[], tuple[Taken, list[Stamp]]]:
    """Features of tiled slides, made anew each time."""
    study = open_study(folder, [f"extract.encoder=untrained:{job.net.name}", *job.settings])

    def extract() -> tuple[Taken, list[Stamp]]:
        shutil.rmtree(folder / "features", ignore_errors=True)
        run = begin(study)
        with _stamped() as stamps:
            extraction = run_extraction(run)
        wall_s, cpu_s = time.perf_counter(), _cpu_s()
        precision = extraction.sets["main"].recipe["precision"]
        if extraction.report.exit_code or precision != "bf16":
            raise RuntimeError(f"extraction failed, or was not in bf16 but {precision}: {extraction.report}")
        start, later = stamps[0], stamps[1:]
        spent = Spent(cpu_s - start.cpu_s, wall_s - start.wall_s, sum(stamp.tiles for stamp in later))
        return Taken(spent, sum(stamp.busy_s() for stamp in later) / spent.wall_s), stamps

    return extract


@contextmanager
def _stamped() -> Iterator[list[Stamp]]:
    """Notes every batch that is given to the device."""
    stamps: list[Stamp] = []
    plain = Device.begin

    def begin_stamped(device: Device, batch: Batch) -> object:
        since = _Busy(device.is_gpu)
        pending = plain(device, batch)
        stamps.append(Stamp(time.time(), time.perf_counter(), _cpu_s(), batch.count, since.ended()))
        return pending

    with mock.patch.object(Device, "begin", begin_stamped):
        yield stamps


class _Busy:
    """How long the device works on what is asked of it from now on: on a GPU from its first kernel to its last."""

    def __init__(self, gpu: bool) -> None:
        self._start, self._event = time.perf_counter(), _cuda_event() if gpu else None

    def ended(self) -> Callable[[], float]:
        """Nothing more is asked; the seconds can be had once the device is done."""
        start, end = self._event, _cuda_event() if self._event else None
        if start is None or end is None:
            seconds = time.perf_counter() - self._start
            return lambda: seconds
        return lambda: start.elapsed_time(end) / 1000


def _cuda_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


class Bare:
    """Networks alone, and normalised batches that lie ready on the device: those of timm, and the one of our encoder."""

    def __init__(self, encoder: TileEncoder, name: str, size: int) -> None:
        plain = timm.create_model(name, pretrained=False, num_classes=0).eval().requires_grad_(requires_grad=False)
        half = copy.deepcopy(plain).bfloat16()
        self._device, self._size = encoder.device, size
        self._nets = {AUTOCAST: plain.to(self._device), HALF: half.to(self._device), OURS: encoder.model}
        side = encoder.recipe.input_px
        tiles = torch.randint(256, (PREPARED, size, side, side, 3), dtype=torch.uint8, device=self._device)
        images = [encoder.images(each).float() for each in tiles]
        halved = [each.bfloat16() for each in images]
        is_half = {weights.dtype for weights in encoder.model.parameters()} == {torch.bfloat16}
        self._ready = {AUTOCAST: images, HALF: halved, OURS: halved if is_half else images}

    @torch.inference_mode()
    def forward(self, name: str, batches: int) -> Taken:
        """So many batches through one of the networks."""
        net, ready = self._nets[name], self._ready[name]
        wall_s, cpu_s = time.perf_counter(), _cpu_s()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=ready[0].dtype == torch.float32):
            for number in range(batches):
                net.forward_features(ready[number % PREPARED])  # type: ignore[operator]
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return Taken(Spent(_cpu_s() - cpu_s, time.perf_counter() - wall_s, batches * self._size), 1.0)


def _cpu_s() -> float:
    """Of this process, all its threads, and the processes it has seen end."""
    return sum(os.times()[:4])


def _table(device: str, net: Net, found: Found) -> Table:
    table = Table(
        f"extract: {net.shown}, bf16, {device}, batches of {found.batch}; wanted: {net.bar:.2f} of the bare network",
        ("what", "tiles", "CPU ms/tile", "tiles/s", "of bare, CPU", "of bare, wall", "device busy"),
        notes=(
            f"from the start of the process to the first batch: {found.start_s:.1f} s",
            "of bare: what the faster of timm's two took in a pass, over what this took in it; median of the passes",
            "on a machine shared with others the CPU column is the one to go by" if device == "cpu" else _gpu(),
            machine(),
        ),
    )
    cpu, wall = ([_best(found, turn, field) for turn in range(_passes(found))] for field in ("cpu_s", "wall_s"))
    for name, samples in found.taken.items():
        spent = [one.spent for one in samples]
        row = (
            name,
            spent[0].tiles,
            statistics.median(1000 * one.cpu_s / one.tiles for one in spent),
            statistics.median(one.tiles / one.wall_s for one in spent),
            statistics.median(best / (one.cpu_s / one.tiles) for best, one in zip(cpu, spent, strict=True)),
            statistics.median(best / (one.wall_s / one.tiles) for best, one in zip(wall, spent, strict=True)),
            statistics.median(one.busy for one in samples),
        )
        table.rows.append(row)
    return table


def _passes(found: Found) -> int:
    return len(found.taken[HALF])


def _best(found: Found, turn: int, field: str) -> float:
    """Seconds per tile of the faster bare network in one pass."""
    both = (found.taken[name][turn].spent for name in (AUTOCAST, HALF))
    return min(float(getattr(spent, field)) / spent.tiles for spent in both)


def _gpu() -> str:
    return f"{torch.cuda.get_device_name()}; the CPU columns do not matter here"
