"""Passes over all bags: read, thinned out and cast once each, and shown to everybody who learns, in an order of the seed alone.

Legend: N tiles of a bag, D feature length.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from queue import Queue
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from pathfm.mil.bags import Bag, Bags
from pathfm.mil.products import helpers
from pathfm.mil.projection import Stretch
from pathfm.stats.seeds import derive_seed

AHEAD = 1
"""Bags that may wait for each worker while the next one is made ready."""
OWN_PAGES_BYTES = 4 * 2**20
M_MMAP_THRESHOLD = -3
"""Of mallopt(3)."""
PIECE_TILES = 4096
"""Tiles of a bag that is shown whole that are cast at a time."""
CAST_ROWS = 512
"""Tiles that are cast together, so that they stay in the processor's cache meanwhile."""


class Shown(NamedTuple):
    """A bag as all learners are shown it.

    Attributes:
        place: of the bag.
        drawn: its tiles, or those of them that were drawn for this pass.
        whole: gives all of its tiles, piece by piece, each cast when its turn comes; None if nobody needs them.
    """

    place: int
    drawn: Stretch
    whole: Callable[[], Iterator[Stretch]] | None


class Viewer(Protocol):
    """Who is shown bags, and says which."""

    is_over: bool

    def needs(self, place: int) -> bool:
        """Whether it wants to be shown this bag in the next pass."""

    def needs_whole(self, place: int) -> bool:
        """Whether it wants all tiles of this bag."""

    def see(self, shown: Shown) -> None:
        """One of the bags it wanted."""

    def end_pass(self) -> None:
        """All bags have been shown."""


Some = TypeVar("Some", bound=Viewer)


@dataclass(frozen=True)
class Reader:
    """Makes bags ready to be shown.

    Attributes:
        bags: where they are read.
        seed: of the order of the bags and of the tiles drawn from them.
        most: tiles drawn from larger bags; None: all.
        dtype: precision of the features less their mean.
        device: where they go.
    """

    bags: Bags
    seed: int
    most: int | None
    dtype: torch.dtype
    device: torch.device

    def order(self, number: int) -> list[int]:
        """The order of all bags in a pass, whoever wants which of them."""
        generator = torch.Generator().manual_seed(derive_seed("mil order", self.seed, number))
        return torch.randperm(len(self.bags), generator=generator).tolist()

    def show(self, place: int, number: int, whole: bool) -> Shown:
        """The bag at a place, for a pass."""
        bag, centre_D = self.bags.read(place), torch.from_numpy(self.bags.mean(place)).float()
        rows = self._draw(place, number)
        if rows is None:
            drawn = self._stretch(bag.feature_ND, centre_D, bag.xy_N2)
            return Shown(place, drawn, (lambda: iter((drawn,))) if whole else None)
        drawn = self._stretch(bag.feature_ND[rows], centre_D, bag.xy_N2[rows])
        return Shown(place, drawn, partial(self._pieces, bag, centre_D) if whole else None)

    def _pieces(self, bag: Bag, centre_D: Tensor) -> Iterator[Stretch]:
        parts = zip(torch.split(bag.feature_ND, PIECE_TILES), torch.split(bag.xy_N2, PIECE_TILES), strict=True)
        return (self._stretch(feature_ND, centre_D, xy_N2) for feature_ND, xy_N2 in parts)

    def _draw(self, place: int, number: int) -> Tensor | None:
        length = self.bags.lengths[place]
        if self.most is None or length <= self.most:
            return None
        generator = torch.Generator().manual_seed(derive_seed("mil tiles", self.seed, number, place))
        return torch.randperm(length, generator=generator)[: self.most].sort().values

    def _stretch(self, feature_ND: Tensor, centre_D: Tensor, xy_N2: Tensor) -> Stretch:
        if self.device.type == "cuda":
            feature_ND, centre_D, xy_N2 = (
                value.pin_memory().to(self.device, non_blocking=True) for value in (feature_ND, centre_D, xy_N2)
            )
        rest_ND = torch.empty(feature_ND.shape, dtype=self.dtype, device=self.device)
        step = CAST_ROWS if self.device.type == "cpu" else max(len(feature_ND), 1)
        for start in range(0, len(feature_ND), step):
            rest_ND[start : start + step] = feature_ND[start : start + step].float() - centre_D
        return Stretch(rest_ND, centre_D, xy_N2)


def run_passes(reader: Reader, viewers: Sequence[Some], workers: int, over: Callable[[Some], None]) -> Iterator[int]:
    """Shows all bags again and again until nobody needs more; each viewer always sees them from one thread.

    Gives the number of each pass, from 0, when it is done.

    Args:
        reader: of the bags.
        viewers: each sees every bag that it needs once per pass, in the same order.
        workers: threads among which viewers are dealt; those that none are left for help the others. It has no part in what
            viewers see.
        over: is called in this thread with each viewer as it comes to its end.
    """
    _give_back_large_blocks()
    still, number = list(viewers), 0
    with one_thread(), worker_threads(workers) as pool:
        while still:
            _run_pass(reader, number, still, pool, workers)
            for viewer in [viewer for viewer in still if viewer.is_over]:
                over(viewer)
            still = [viewer for viewer in still if not viewer.is_over]
            yield number
            number += 1


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of the tensor library: sums are then made in one order, whatever ``compute.threads`` says.

    Cores are used by training several folds at the same time instead.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def worker_threads(workers: int) -> ThreadPoolExecutor:
    """Threads of which each computes on one core."""
    return ThreadPoolExecutor(max(workers, 1), initializer=torch.set_num_threads, initargs=(1,))


def _give_back_large_blocks() -> None:
    """Has the C library of GNU give large blocks pages of their own, which go when they do.

    By itself it soon takes up to 32 MB from its common store instead, where bags that stay come to lie between what is computed
    from them and goes: memory grows with time. It costs a tenth of the time. Elsewhere nothing happens.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, OWN_PAGES_BYTES)


def _run_pass(reader: Reader, number: int, viewers: Sequence[Viewer], pool: ThreadPoolExecutor, workers: int) -> None:
    hands = [viewers[start::workers] for start in range(min(workers, len(viewers)))]
    queues: list[Queue[Shown | None]] = [Queue(AHEAD) for _ in hands]
    spare = max(workers // len(hands) - 1, 0)
    ends = [pool.submit(_watch, queue, hand, spare) for queue, hand in zip(queues, hands, strict=True)]
    wanted = [place for place in reader.order(number) if any(viewer.needs(place) for viewer in viewers)]
    try:
        for place in wanted:
            shown = reader.show(place, number, any(viewer.needs_whole(place) for viewer in viewers))
            for queue in queues:
                queue.put(shown)
            del shown  # or it would live until the next one is ready
    finally:
        for queue in queues:
            queue.put(None)
    for end in ends:
        end.result()


def _watch(queue: Queue[Shown | None], viewers: Sequence[Viewer], spare: int) -> None:
    arrivals = iter(queue.get, None)
    try:
        with helpers(spare):
            _see_all(arrivals, viewers)
    finally:
        for _ in arrivals:  # the reader must not wait for a thread that has given up
            pass


def _see_all(arrivals: Iterable[Shown], viewers: Sequence[Viewer]) -> None:
    for shown in arrivals:
        for viewer in [viewer for viewer in viewers if viewer.needs(shown.place)]:
            viewer.see(shown)
    for viewer in viewers:
        viewer.end_pass()
