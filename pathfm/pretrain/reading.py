"""Pixels of the samples of a run: which tile of which store, and reading it. One damaged tile ends no training."""

from __future__ import annotations

import resource
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pathfm.errors import StoreError
from pathfm.log import get_log
from pathfm.pretrain.catalogue import Catalogue
from pathfm.pretrain.order import Indices, Order
from pathfm.pretrain_settings import PretrainSettings
from pathfm.store.shards import OPEN_SHARDS
from pathfm.store.tile_store import TileStore, open_tiles

Pixels = npt.NDArray[np.uint8]


class Place(NamedTuple):
    """A sample: its entry in the catalogue, its number among the used tiles of the entry, and its number in the store."""

    entry: int
    rank: int
    tile: int


@dataclass
class _Open:
    """An open store: the shard files it has opened, and where the shares of its used tiles end when they differ."""

    store: TileStore
    shards: set[int] = field(default_factory=set)
    ends: npt.NDArray[np.float64] | None = None


class TileReader:
    """Finds and reads the samples of a run.

    Stores stay open as long as their shard files are no more than two windows need, or half of what the system allows.

    Args:
        catalogue: all tiles.
        settings: sampling and seed.
    """

    def __init__(self, catalogue: Catalogue, settings: PretrainSettings) -> None:
        self._catalogue, self._sampling = catalogue, settings.sampling
        self._order = Order(catalogue.line, settings.sampling, settings.seed)
        self._most_files = min(2 * settings.sampling.window_runs, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._opened: OrderedDict[int, _Open] = OrderedDict()
        self._files = 0
        self._told: set[int] = set()

    def __getstate__(self) -> dict[str, object]:
        # Open files do not cross a process border; each worker opens its own.
        return {**self.__dict__, "_opened": OrderedDict(), "_files": 0}

    @property
    def epoch(self) -> int:
        """Samples per epoch."""
        return self._order.epoch

    def places(self, number_B: Indices) -> list[Place]:
        """Where the samples of these numbers are.

        Raises:
            StoreError: quality columns cannot be read.
        """
        draws = self._order.draws(number_B)
        if self._sampling.quality:
            rank_B = np.array([self._weighted(*draw) for draw in zip(*(column.tolist() for column in draws), strict=True)])
        else:
            rank_B = self._order.ranks(draws)
        tile_B = self._order.tiles(draws.entry_B, rank_B)
        return [Place(*place) for place in zip(draws.entry_B.tolist(), rank_B.tolist(), tile_B.tolist(), strict=True)]

    def source(self, place: Place) -> tuple[str, int]:
        """slide_id and tile number of a sample."""
        return self._catalogue.slide_id(place.entry), place.tile

    def read(self, place: Place) -> tuple[Pixels, bool]:
        """The tile of a sample [side, side, 3], and whether it is another one since its own is damaged.

        Then it is the next of its slide that can be read, at doubling distances: damage is often that of a whole shard file.

        Raises:
            StoreError: neither it nor any of those can be read.
        """
        try:
            return self._read(place), False
        except (StoreError, OSError) as error:
            damage = error
        used = int(self._catalogue.used_E[place.entry])
        for step in range(used.bit_length()):
            rank = (place.rank + (1 << step)) % used
            tile = int(self._order.tiles(np.array([place.entry]), np.array([rank]))[0])
            try:
                pixels = self._read(Place(place.entry, rank, tile))
            except (StoreError, OSError):
                continue
            self._tell(place, tile, damage)
            return pixels, True
        raise (
            damage if isinstance(damage, StoreError) else StoreError(str(damage), where=str(self._catalogue.path(place.entry)))
        )

    def _read(self, place: Place) -> Pixels:
        opened = self._open(place.entry)
        if (shard := place.tile // opened.store.attrs["shard_tiles"]) not in opened.shards:
            opened.shards.add(shard)
            self._files += len(opened.shards) <= OPEN_SHARDS
        pixels = opened.store[place.tile]
        if pixels.shape != (opened.store.tile_px, opened.store.tile_px, 3):
            raise StoreError(f"tile {place.tile} has the shape {pixels.shape}", where=str(opened.store.path))
        return pixels

    def _open(self, entry: int) -> _Open:
        if entry not in self._opened:
            self._opened[entry] = _Open(open_tiles(self._catalogue.path(entry)))
        self._opened.move_to_end(entry)
        while self._files > self._most_files and len(self._opened) > 1:
            _, closed = self._opened.popitem(last=False)
            self._files -= min(len(closed.shards), OPEN_SHARDS)
        return self._opened[entry]

    def _weighted(self, entry: int, place: float) -> int:
        """Number of the used tile at a place of a slide in which tiles are as wide as the product of their quality columns."""
        opened = self._open(entry)
        if opened.ends is None:
            used = np.arange(self._catalogue.used_E[entry])
            tiles = self._order.tiles(np.full(len(used), entry), used)
            columns = [opened.store.quality_names.index(name) for name in self._sampling.quality]
            weights = np.nan_to_num(opened.store.quality[tiles][:, columns].astype(np.float64)).clip(min=0).prod(axis=1)
            opened.ends = np.cumsum(weights if weights.any() else np.ones(len(used)))
        return int(np.searchsorted(opened.ends, place * opened.ends[-1], side="right"))

    def _tell(self, place: Place, tile: int, damage: Exception) -> None:
        if place.entry in self._told:
            return
        self._told.add(place.entry)
        slide_id, path = self._catalogue.slide_id(place.entry), self._catalogue.path(place.entry)
        what = "pretrain: slide %s, tile %d cannot be read, tile %d comes in its place, and so on for this slide (%s: %s)"
        get_log(__name__).warning(what, slide_id, place.tile, tile, path, getattr(damage, "what", damage))
