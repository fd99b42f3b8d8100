"""Tiles of many slides as one stream of batches, decoded by threads ahead of the device.

Batches are filled across the borders of slides, so that fifty slides of fifty tiles keep a device as busy as one of thousands.
Each thread decodes straight into the batch (pinned memory where there is a GPU). The order of tiles is that of the slides and
of their stores, whatever the number of threads.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch

from pathfm.errors import PathfmError, SlideError, UnreadableSlideError
from pathfm.log import get_log
from pathfm.store.lease import Lease
from pathfm.store.tile_store import TileStore, open_tiles

AHEAD = 3
"""Batches decoded ahead of the device."""
TASK_TILES = 8
"""Tiles that one thread decodes at a time."""
SLIDES_AT_ONCE = 4
"""Slides that are read side by side where pixels come from them: opening one takes longer than reading fifty tiles."""

log = get_log(__name__)

Pixels = npt.NDArray[np.uint8]
PixelsOf = Callable[[TileStore, int], Iterator[Pixels | None]]
"""All tiles of a store that holds no pixels, in its order, read by so many threads; None: one that cannot be read."""
HostEncode = Callable[[Pixels], npt.NDArray[np.float32]]
"""Features [B, D] of tiles [B, H, W, 3], computed by the decoding threads."""


@dataclass(eq=False)
class SlideWork:
    """A slide under way.

    Attributes:
        store: its tiles.
        sets: numbers of the feature sets that are to be made.
        lease: the right to make them, among several processes.
        error: why it cannot be finished, once that is known.
        is_unwritable: the error came from writing.
        is_over: its files are there, or it has failed and nothing of it will be.
        valid: [N] whether each tile could be read.
    """

    store: TileStore
    sets: tuple[int, ...]
    lease: Lease | None = None
    error: PathfmError | None = None
    is_unwritable: bool = False
    is_over: bool = False
    valid: npt.NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.valid = np.ones(len(self.store), dtype=bool)

    @property
    def slide_id(self) -> str:
        """The slide."""
        return self.store.slide_id


class Segment(NamedTuple):
    """Tiles ``start`` to ``start + len(rows)`` of a slide, in the given rows of a batch."""

    work: SlideWork
    start: int
    rows: slice


@dataclass(eq=False)
class Batch:
    """Tiles uint8 [B, H, W, 3] of one or more slides; ``host``: by feature set, features that threads computed [count, D]."""

    tiles: torch.Tensor
    count: int = 0
    segments: list[Segment] = field(default_factory=list)
    host: Mapping[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    filled: list[Future[None]] = field(default_factory=list)


class Batches:
    """The stream. Iterating yields batches whose tiles are decoded; ``release`` gives their memory back for later ones.

    Args:
        works: the slides, drawn as they are needed.
        size: tiles per batch; only the last has fewer, and the last of each tile side.
        threads: threads that decode.
        host: by feature set, its features' length and the function that computes them from decoded tiles.
        pixels_of: tiles of stores without pixels.
        pinned: for a GPU.
    """

    def __init__(
        self,
        works: Iterable[SlideWork],
        size: int,
        threads: int,
        host: Mapping[int, tuple[int, HostEncode]],
        pixels_of: PixelsOf | None = None,
        pinned: bool = False,
    ) -> None:
        self._works, self._size, self._host, self._pixels_of, self._pinned = works, size, host, pixels_of, pinned
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        # Tiles straight from a slide come in order from one iterator, which has threads of its own.
        self._pullers = [ThreadPoolExecutor(1, thread_name_prefix="slide") for _ in range(SLIDES_AT_ONCE)]
        self._threads, self._turn = threads, 0
        self._free: list[torch.Tensor] = []
        self._local = threading.local()

    def __iter__(self) -> Iterator[Batch]:
        waiting: deque[Batch] = deque()
        for batch in self._planned():
            waiting.append(batch)
            if len(waiting) > AHEAD:
                yield _ready(waiting.popleft())
        while waiting:
            yield _ready(waiting.popleft())

    def release(self, batch: Batch) -> None:
        """The batch is not looked at any more."""
        self._free.append(batch.tiles)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for pool in (*self._pullers, self._decoders):
            pool.shutdown(cancel_futures=True)

    def _planned(self) -> Iterator[Batch]:
        """Batches whose decoding is under way."""
        batch: Batch | None = None
        for work in self._works:
            pulled = None if work.store.has_pixels else self._pulled(work)
            start, tiles = 0, len(work.store)
            while start < tiles and work.error is None:
                if batch is not None and batch.tiles.shape[1] != work.store.tile_px:
                    yield batch
                    batch = None
                batch = batch or self._new(work.store.tile_px)
                count = min(tiles - start, self._size - batch.count)
                segment = Segment(work, start, slice(batch.count, batch.count + count))
                batch.segments.append(segment)
                batch.count += count
                start += count
                self._fill(batch, segment, pulled)
                if batch.count == self._size:
                    yield batch
                    batch = None
        if batch is not None:
            yield batch

    def _new(self, side: int) -> Batch:
        shape = (self._size, side, side, 3)
        while self._free:
            tiles = self._free.pop()
            if tiles.shape == shape:
                break
        else:
            tiles = torch.zeros(shape, dtype=torch.uint8, pin_memory=self._pinned)
        host = {number: np.zeros((self._size, dim), dtype=np.float32) for number, (dim, _) in self._host.items()}
        return Batch(tiles, host=host)

    def _pulled(self, work: SlideWork) -> Iterator[Pixels | None]:
        if self._pixels_of is None:
            raise TypeError("stores without pixels need a function that reads them from the slide")
        self._turn = (self._turn + 1) % SLIDES_AT_ONCE
        return self._pixels_of(work.store, self._threads)

    def _fill(self, batch: Batch, segment: Segment, pulled: Iterator[Pixels | None] | None) -> None:
        """Starts the decoding of a segment."""
        if pulled is not None:
            batch.filled.append(self._pullers[self._turn].submit(self._pull, batch, segment, pulled))
            return
        work, first, rows = segment
        for row in range(rows.start, rows.stop, TASK_TILES):
            part = Segment(work, first + row - rows.start, slice(row, min(row + TASK_TILES, rows.stop)))
            batch.filled.append(self._decoders.submit(self._decode, batch, part))

    def _decode(self, batch: Batch, segment: Segment) -> None:
        work, start, rows = segment
        target = batch.tiles.numpy()
        with _errors_of(work):
            store = self._reader(work.store.path)
            for number, row in enumerate(range(rows.start, rows.stop), start):
                target[row] = store[number]
            self._encode_here(batch, work, rows)

    def _pull(self, batch: Batch, segment: Segment, pulled: Iterator[Pixels | None]) -> None:
        work, start, rows = segment
        target = batch.tiles.numpy()
        with _errors_of(work):
            for number, row in enumerate(range(rows.start, rows.stop), start):
                pixels = next(pulled, None)
                work.valid[number] = pixels is not None
                target[row] = 0 if pixels is None else pixels
            if not work.valid.any():
                raise UnreadableSlideError("none of its tiles can be read", fix="get a new copy of the slide or rescan it")
            # Waited for by whoever waits for this: it is added before this one is done.
            batch.filled.append(self._decoders.submit(self._encode_here, batch, work, rows))

    def _encode_here(self, batch: Batch, work: SlideWork, rows: slice) -> None:
        with _errors_of(work):
            for number in set(work.sets) & self._host.keys():
                batch.host[number][rows] = self._host[number][1](batch.tiles.numpy()[rows])

    def _reader(self, path: Path) -> TileStore:
        """This thread's own reader of a store: its table of open shards is not locked."""
        if getattr(self._local, "path", None) != path:
            self._local.path, self._local.store = path, open_tiles(path)
        store: TileStore = self._local.store
        return store


@contextmanager
def _errors_of(work: SlideWork) -> Iterator[None]:
    """What goes wrong with one slide is its error; the others go on."""
    try:
        yield
    except PathfmError as error:
        work.error = work.error or error
    except Exception as error:  # what nobody foresaw must end this slide only, as a row of the record
        log.error("%s: internal error", work.slide_id, exc_info=error)
        work.error = work.error or SlideError(f"internal error: {' '.join(str(error).split())} ({type(error).__name__})")


def _ready(batch: Batch) -> Batch:
    for future in batch.filled:
        future.result()
    batch.filled = []
    return batch
