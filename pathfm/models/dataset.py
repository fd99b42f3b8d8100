"""Tiles of many stores as one torch dataset, for notebooks and training loops of one's own."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from pathfm.store.tile_store import TileStore, open_tiles


class TileSample(NamedTuple):
    """One tile: image uint8 [3, H, W] (or what the transform makes of it), its slide, its number there, its level-0 corner."""

    image: Any
    slide_id: str
    tile: int
    xy_level0: torch.Tensor


class TileDataset(Dataset[TileSample]):
    """All tiles of the given stores, in order; random access costs one positioned read and one decode.

    Args:
        stores: paths of tile stores, or one folder of them.
        transform: applied to the uint8 image [3, H, W].
    """

    def __init__(
        self, stores: Sequence[Path | str] | Path | str, transform: Callable[[torch.Tensor], Any] | None = None
    ) -> None:
        paths = sorted(Path(stores).glob("*.zarr")) if isinstance(stores, (str, Path)) else stores
        self.stores: list[TileStore] = [open_tiles(path) for path in paths]
        self._ends = list(accumulate(len(store) for store in self.stores))
        self._transform = transform

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> TileSample:
        """Tile ``index`` over all stores.

        Raises:
            IndexError: there is no such tile.
            StoreError: its pixels are damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"tile {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        store = self.stores[number]
        tile = index - (self._ends[number - 1] if number else 0)
        image: Any = torch.from_numpy(store[tile].copy()).permute(2, 0, 1)
        if self._transform is not None:
            image = self._transform(image)
        return TileSample(image, store.slide_id, tile, torch.from_numpy(store.xy_level0[tile]))
