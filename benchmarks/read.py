"""CPU of reading alone, tile by tile, per tissue tile: no tissue detection, no quality columns, no store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import openslide
import simplejpeg
import tifffile
from PIL import Image

from benchmarks.measure import Options, Spent, Table, cpu_ms, cpu_ratio, in_turn, wall_ratio
from benchmarks.peers import PEERS
from benchmarks.slide import benchmark_slide, real_slides, tissue_tiles
from pathfm.jpeg import Wrapper
from pathfm.slides.reader import open_slide
from pathfm.slides.tile_reading import Cut, read_tiles

Corners = np.ndarray
"""Upper left corners [n, 2] (x, y) of tiles [level-0 px], row by row."""
Reader = Callable[[Corners], int]
PIECE_TILES = 150
"""Tiles of one piece of work, in whole rows: small against the noise of a machine, large against the cost of starting."""
UNALIGNED_PX = 100


@dataclass(frozen=True)
class Case:
    """Tiles of ``side`` px that are read from level 0, shrunk.

    Attributes:
        path: the slide.
        side: of a tile, as of the tiles in the file [px].
        shrink: level-0 pixels per pixel.
        offset: of the grid against that of the tiles in the file [level-0 px].
    """

    path: Path
    side: int
    shrink: int
    offset: int = 0

    @property
    def pieces(self) -> list[Corners]:
        """The tissue tiles, in whole rows, a piece at a time."""
        side = self.side * self.shrink
        pieces: list[Corners] = []
        waiting: list[tuple[int, int]] = []
        for row, tissue in enumerate(tissue_tiles(self.path, side)[:-1, :-1]):
            waiting += [(int(column) * side + self.offset, row * side + self.offset) for column in np.flatnonzero(tissue)]
            if len(waiting) >= PIECE_TILES:
                pieces.append(np.array(waiting))
                waiting = []
        return pieces or ([np.array(waiting)] if waiting else [])


def with_ours(case: Case, threads: int = 1) -> Reader:
    """This package's reading of tiles."""
    reader = open_slide(case.path)

    def read(corners: Corners) -> int:
        left_top = corners // case.shrink
        cut = Cut(0, case.shrink, np.concatenate([left_top, left_top + case.side], axis=1), case.side)
        done = read_tiles(reader, cut, range(len(corners)), lambda _, tile: tile.pixels is not None, threads=threads)
        return sum(result is True for _, result in done)

    return read


def with_openslide(case: Case, *, pil: bool) -> Reader:
    """``read_region`` of level 0 and a resize: PIL's, as most tools do, or OpenCV's area filter."""
    slide = openslide.OpenSlide(case.path)
    size, side = (case.side * case.shrink,) * 2, (case.side,) * 2

    def read(corners: Corners) -> int:
        for x, y in corners.tolist():
            region = slide.read_region((x, y), 0, size)
            if pil:
                picture = region.convert("RGB")
                np.asarray(picture if case.shrink == 1 else picture.resize(side, Image.Resampling.BICUBIC))
            else:
                pixels = np.asarray(region)[..., :3]
                cv2.resize(pixels, side, interpolation=cv2.INTER_AREA) if case.shrink > 1 else np.ascontiguousarray(pixels)
        return len(corners)

    return read


def bare_decode(case: Case, *, scaled: bool = True) -> Reader:
    """The same stored streams, held in memory, decoded by simplejpeg one by one, and nothing else: the floor."""
    streams, columns = whole_streams(case.path)
    least = case.side // case.shrink if scaled else 0

    def read(corners: Corners) -> int:
        for x, y in (corners // case.side).tolist():
            for row in range(y, y + case.shrink):
                for column in range(x, x + case.shrink):
                    simplejpeg.decode_jpeg(streams[row * columns + column], "RGB", min_width=least, min_height=least)
        return len(corners)

    return read


def whole_streams(path: Path) -> tuple[list[bytes], int]:
    """Level 0's stored tiles as streams that decode alone, and tiles per row."""
    with tifffile.TiffFile(path) as tiff, path.open("rb") as file:
        page = tiff.pages[0]
        wrapper = Wrapper(page.jpegtables, rgb=page.photometric == 2)
        streams = []
        for offset, length in zip(page.dataoffsets, page.databytecounts, strict=True):
            file.seek(offset)
            streams.append(wrapper.wrap(file.read(length))[0])
        return streams, -(-page.imagewidth // page.tilewidth)


def _cases(options: Options) -> Iterator[tuple[str, Case]]:
    synthetic = benchmark_slide(options.work)
    for shrink, mpp in ((2, "0.5"), (1, "0.25")):
        yield f"{synthetic.stem}, {mpp} um from 0.25", Case(synthetic, 256, shrink)
        yield f"{synthetic.stem}, {mpp} um from 0.25, grid off by {UNALIGNED_PX} px", Case(synthetic, 256, shrink, UNALIGNED_PX)
    for path in real_slides(options):
        with tifffile.TiffFile(path) as tiff:
            side = tiff.pages[0].tilewidth
        for shrink in (2, 1):
            yield f"{path.stem}, level 0 shrunk {shrink} x", Case(path, side, shrink)


def _rivals(case: Case) -> dict[str, Reader]:
    rivals = {
        "openslide + PIL": with_openslide(case, pil=True),
        "openslide + area filter": with_openslide(case, pil=False),
        "pathfm, 1 thread": with_ours(case),
        "pathfm, 2 threads": with_ours(case, 2),
    }
    if not case.offset:
        rivals["bare decode"] = bare_decode(case)
        if case.shrink > 1:
            rivals["bare decode, full size"] = bare_decode(case, scaled=False)
    for name, make in PEERS.items():
        rival = make(case.path, case.side, case.shrink)
        if rival:
            rivals[name] = rival
    return rivals


def run(options: Options) -> list[Table]:
    """A table per slide and resolution."""
    tables = []
    for title, case in list(_cases(options))[: 1 if options.quick else None]:
        pieces = case.pieces[: 2 if options.quick else None]
        if not pieces:
            continue
        samples = in_turn(_rivals(case), pieces, options.passes)
        tables.append(_table(f"{title}: {sum(map(len, pieces))} tissue tiles of {case.side} px", samples))
    return tables


def _table(title: str, samples: dict[str, list[Spent]]) -> Table:
    columns = ("reader", "CPU ms/tile", "tiles/s", "CPU / bare decode", "openslide CPU / its", "wall, 1 thread / its")
    table = Table(title, columns)
    bare, slow, single = samples.get("bare decode"), samples["openslide + PIL"], samples["pathfm, 1 thread"]
    for name, mine in samples.items():
        speed = sum(sample.tiles for sample in mine) / sum(sample.wall_s for sample in mine)
        gain = wall_ratio(single, mine) if name.startswith("pathfm") else "-"
        table.rows.append((name, cpu_ms(mine), speed, cpu_ratio(mine, bare) if bare else "-", cpu_ratio(slow, mine), gain))
    return table
