"""All tiles of a slide, in order, read as fast as its reader allows: the hot path of the tile stage.

Stored tiles are decoded once, in raster order, and shared by the tiles that overlap them; what no later tile needs is let go,
so memory is bounded by about two rows of stored tiles. Decoding and everything the caller does with a tile runs in threads
(the decoder and OpenCV let go of the interpreter's lock); results come back in order whatever the number of threads.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
import numpy.typing as npt

from pathfm import jpeg
from pathfm.errors import UnreadableSlideError
from pathfm.geometry import Box, Size, contains
from pathfm.slides.direct import DAMAGED, DirectReader, assemble, damage
from pathfm.slides.reader import Pixels, Region, SlideReader
from pathfm.slides.source import LostSourceError
from pathfm.slides.stored import StoredLevel

BLOCK_COLUMNS, BLOCK_ROWS = 16, 8
"""Tiles that one thread works on at a time, at most."""
BAND_BYTES = 160 * 10**6
"""Pixels of a band of blocks, at most: finished tiles wait in memory until the whole band can be told in order."""
BANDS_AHEAD = 2
"""Bands under way beyond the one that is waited for."""

T = TypeVar("T")


class Cut(NamedTuple):
    """How tiles are cut from a slide.

    Attributes:
        level: pyramid level they are read from.
        shrink: power of two by which that level is shrunk first (in the JPEG decoder where that is possible).
        boxes: [N, 4] left, top, right, bottom of each tile in pixels of the shrunk level, row by row.
        side: width and height of the tiles [px]; boxes of another size are scaled to it by an area filter.
    """

    level: int
    shrink: int
    boxes: npt.NDArray[np.int64]
    side: int

    def box(self, index: int) -> Box:
        """Where a tile lies."""
        return Box(*(int(edge) for edge in self.boxes[index]))


class TileRead(NamedTuple):
    """One tile as it was read.

    Attributes:
        pixels: [side, side, 3]; None when they were not asked for.
        outside: share that lies outside the scan (white).
        stored: the slide's own JPEG stream of exactly this tile, made whole; None when there is none.
    """

    pixels: Pixels | None
    outside: float
    stored: bytes | None = None


Outcome = tuple[int, T | UnreadableSlideError]


def coincides(reader: SlideReader, cut: Cut) -> bool:
    """Whether every tile is exactly one stored JPEG tile."""
    stored = reader.stored[cut.level] if isinstance(reader, DirectReader) else None
    if stored is None or cut.shrink != 1 or stored.tile != (cut.side, cut.side):
        return False
    left, top, right, bottom = cut.boxes.T
    inside = (right <= stored.size.width) & (bottom <= stored.size.height)
    aligned = (left % cut.side == 0) & (top % cut.side == 0)
    return bool((inside & aligned & (right - left == cut.side) & (bottom - top == cut.side)).all())


def read_tiles(
    reader: SlideReader,
    cut: Cut,
    chosen: Sequence[int],
    finish: Callable[[int, TileRead], T],
    *,
    threads: int = 1,
    pixels: bool = True,
    stored: bool = False,
) -> Iterator[Outcome[T]]:
    """Reads the chosen tiles and yields each with what ``finish`` makes of it, in the given order.

    Args:
        reader: the slide.
        cut: where tiles lie.
        chosen: numbers of the wanted tiles, ascending.
        finish: called in a thread with a tile's number and what was read.
        threads: threads that decode and finish.
        pixels: decode the pixels.
        stored: hand over stored streams; the tiles must ``coincide``.

    Yields:
        (number, result), or (number, UnreadableSlideError) for a tile whose data cannot be decoded; nothing is filled in.
    """
    if not chosen:
        return
    if not pixels and not stored:
        yield from ((index, finish(index, TileRead(None, _outside(reader, cut, index)))) for index in chosen)
        return
    read = _one_by_one(reader, cut, pixels, stored) or _Stitcher(reader, cut)
    if threads == 1 and not _is_remote(reader):
        yield from _finished(read(chosen), finish)
        return
    bands = _bands(cut, chosen)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[list[Future[list[Outcome[T]]]]] = deque()
        for band in bands:
            waiting.append([pool.submit(_listed, read, block, finish) for block in band])
            if len(waiting) > BANDS_AHEAD:
                yield from _in_order(waiting.popleft())
        while waiting:
            yield from _in_order(waiting.popleft())


def _is_remote(reader: SlideReader) -> bool:
    """Whether tiles come from a server: in blocks then, so that what is fetched together fits into memory."""
    return isinstance(reader, DirectReader) and reader.is_remote


def _outside(reader: SlideReader, cut: Cut, index: int) -> float:
    """Share of a tile beyond the level's edges, without a look at its pixels."""
    box, size = cut.box(index), reader.metadata.levels[cut.level].size
    width = max(0, min(box.right, -(-size.width // cut.shrink)) - max(box.left, 0))
    height = max(0, min(box.bottom, -(-size.height // cut.shrink)) - max(box.top, 0))
    return 1 - width * height / (box.size.width * box.size.height)


def _bands(cut: Cut, chosen: Sequence[int]) -> Iterator[list[list[int]]]:
    """The chosen tiles in bands of rows, and each band in blocks of columns: what one thread works on at a time."""
    rows = [list(row) for _, row in groupby(chosen, key=lambda index: int(cut.boxes[index, 1]))]
    row_bytes = 3 * cut.side**2 * max((len(row) for row in rows), default=1)
    deep = max(1, min(BLOCK_ROWS, BAND_BYTES // row_bytes))
    for start in range(0, len(rows), deep):
        blocks: dict[int, list[int]] = {}
        for index in itertools.chain.from_iterable(rows[start : start + deep]):
            blocks.setdefault(int(cut.boxes[index, 0]) // (BLOCK_COLUMNS * cut.side), []).append(index)
        yield [blocks[number] for number in sorted(blocks)]


def _in_order(band: list[Future[list[Outcome[T]]]]) -> Iterator[Outcome[T]]:
    """The results of a band, row by row as tiles are numbered."""
    return iter(sorted((outcome for future in band for outcome in future.result()), key=lambda outcome: outcome[0]))


def _listed(read: _Read, block: Sequence[int], finish: Callable[[int, TileRead], T]) -> list[Outcome[T]]:
    return list(_finished(read(block), finish))


def _finished(
    tiles: Iterator[tuple[int, TileRead | UnreadableSlideError]], finish: Callable[[int, TileRead], T]
) -> Iterator[Outcome[T]]:
    for index, tile in tiles:
        yield index, tile if isinstance(tile, UnreadableSlideError) else finish(index, tile)


_Read = Callable[[Sequence[int]], Iterator[tuple[int, TileRead | UnreadableSlideError]]]


def _one_by_one(reader: SlideReader, cut: Cut, pixels: bool, stored: bool) -> _Read | None:
    """How tiles are read that have nothing to do with each other; None when they share stored tiles."""
    level = reader.stored[cut.level] if isinstance(reader, DirectReader) else None
    if level is not None and not stored:
        return None

    def read(block: Sequence[int]) -> Iterator[tuple[int, TileRead | UnreadableSlideError]]:
        if level is not None:
            level.fetch(number for index in block for number in level.numbers(cut.box(index), 1))
        for index in block:
            try:
                yield index, _stored(level, cut.box(index), pixels) if level is not None else _region(reader, cut, index)
            except LostSourceError:
                raise
            except UnreadableSlideError as error:
                yield index, error

    return read


def _region(reader: SlideReader, cut: Cut, index: int) -> TileRead:
    """A tile through ``SlideReader.read``, whatever the reader does inside."""
    left, top, right, bottom = (edge * cut.shrink for edge in cut.box(index))
    return _scaled(reader.read(left, top, cut.level, Size(right - left, bottom - top)), cut.side)


def _stored(level: StoredLevel, box: Box, pixels: bool) -> TileRead:
    """A tile that is a stored tile: the stream itself where it can be passed on, and its pixels where they are wanted."""
    (number,) = level.numbers(box, 1)
    try:
        found = level.stream(number)
        if found is None:
            return TileRead(np.full((level.tile.height, level.tile.width, 3), 255, dtype=np.uint8), 1.0)
        stream, frame = found
        passed = jpeg.sealed(stream, frame.scan) if frame.components == 3 else None
        return TileRead(jpeg.decode(stream) if pixels or passed is None else None, 0.0, passed)
    except (ValueError, OSError) as error:
        raise UnreadableSlideError(damage(error)) from error


class _Stitcher:
    """Tiles put together from stored tiles, each decoded once for all the tiles of a block that it is part of.

    Blocks leave what reaches below them to the next band. A block that comes too early for it decodes it again: the same
    pixels, at the cost of a few percent.
    """

    def __init__(self, reader: SlideReader, cut: Cut) -> None:
        assert isinstance(reader, DirectReader)
        level = reader.stored[cut.level]
        assert level is not None
        self._level, self._cut = level, cut
        self._apart = _apart(cut.boxes)
        self._left_over: dict[int, Pixels | UnreadableSlideError | None] = {}

    def __call__(self, block: Sequence[int]) -> Iterator[tuple[int, TileRead | UnreadableSlideError]]:
        level, cut = self._level, self._cut
        self._forget(level.first_at(int(cut.boxes[block[0], 1]), cut.shrink))
        decoded: dict[int, Pixels | UnreadableSlideError | None] = {}
        for top, row in groupby(((index, cut.box(index)) for index in block), key=lambda tile: tile[1].top):
            # Rows only go down: what ends above this one is not needed again.
            first, tiles = level.first_at(top, cut.shrink), list(row)
            decoded = {number: pixels for number, pixels in decoded.items() if number >= first}
            needed = (number for _, box in tiles for number in level.numbers(box, cut.shrink))
            level.fetch(number for number in needed if number not in decoded and number not in self._left_over)
            for index, box in tiles:
                yield index, self._stitch(box, decoded)
        below = level.first_at(int(cut.boxes[block[-1], 3]), cut.shrink)
        self._left_over.update({number: pixels for number, pixels in decoded.items() if number >= below})

    def _forget(self, first: int) -> None:
        """Lets go of what bands above left and nobody came for."""
        for number in list(self._left_over):
            if number < first:
                self._left_over.pop(number, None)

    def _stitch(self, box: Box, decoded: dict[int, Pixels | UnreadableSlideError | None]) -> TileRead | UnreadableSlideError:
        tiles: dict[int, Pixels | None] = {}
        for number in self._level.numbers(box, self._cut.shrink):
            pixels = decoded[number] if number in decoded else self._decode(number)
            if not (self._apart and contains(box, self._level.box(number, self._cut.shrink))):
                decoded[number] = pixels
            if isinstance(pixels, UnreadableSlideError):
                return pixels
            tiles[number] = pixels
        return _scaled(assemble(self._level, self._cut.shrink, box, tiles), self._cut.side)

    def _decode(self, number: int) -> Pixels | UnreadableSlideError | None:
        if number in self._left_over:
            return self._left_over.pop(number, None)
        try:
            return self._level.decode(number, self._cut.shrink)
        except LostSourceError:
            raise
        except DAMAGED as error:
            return UnreadableSlideError(damage(error))


def _apart(boxes: npt.NDArray[np.int64]) -> bool:
    """Whether tiles, row by row, share no pixels: then a stored tile inside one of them concerns no other."""
    same_row = boxes[1:, 1] == boxes[:-1, 1]
    beside = bool((boxes[1:, 0] >= boxes[:-1, 2])[same_row].all())
    rows = np.unique(boxes[:, [1, 3]], axis=0)
    return beside and bool((rows[1:, 0] >= rows[:-1, 1]).all())


def _scaled(region: Region, side: int) -> TileRead:
    height, width = region.pixels.shape[:2]
    if (width, height) == (side, side):
        return TileRead(*region)
    # The area filter only shrinks; tiles finer than the slide are made on request alone.
    way = cv2.INTER_AREA if width >= side and height >= side else cv2.INTER_CUBIC
    return TileRead(np.asarray(cv2.resize(region.pixels, (side, side), interpolation=way)), region.outside)
