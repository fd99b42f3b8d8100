"""Pixels of tiles that pages show, by slide and number; a grey square with the reason where there are none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pathfm.errors import PathfmError, StoreError
from pathfm.store.feature_file import read_feature_attrs
from pathfm.store.tile_store import TileStore, open_tiles

GREY, GREY_PX = 208, 200
"""Colour and side of the square that stands for a tile without pixels."""


ReadTile = Callable[[TileStore, int], NDArray[np.uint8] | None]
"""Pixels [H, W, 3] of one tile of a store."""


class Look(NamedTuple):
    """RGB pixels [H, W, 3]; with a problem they are a grey square."""

    pixels: NDArray[np.uint8]
    problem: str = ""


class TileLooks:
    """Tiles of the stores of a study, as its feature files number them.

    Args:
        stores_dir: folder of tile stores.
        features_dir: folder of feature files; a store that was made anew since numbers its tiles otherwise.
        read_tile: reads a tile of a store without pixels from its slide.
    """

    def __init__(self, stores_dir: Path, features_dir: Path, read_tile: ReadTile | None = None) -> None:
        self._stores_dir, self._features_dir, self._read_tile = stores_dir, features_dir, read_tile
        self._stores: dict[str, TileStore | str] = {}

    def look(self, slide_id: str, tile: int) -> Look:
        """One tile."""
        if slide_id not in self._stores:
            self._stores[slide_id] = self._open(slide_id)
        store = self._stores[slide_id]
        if isinstance(store, str):
            return _grey(store)
        try:
            if store.has_pixels or self._read_tile is None:
                return Look(store[tile])
            pixels = self._read_tile(store, tile)
        except PathfmError as error:
            return _grey(error.what)
        return _grey("it cannot be read from the slide") if pixels is None else Look(pixels)

    def _open(self, slide_id: str) -> TileStore | str:
        """The store, or why it cannot be used."""
        try:
            store = open_tiles(self._stores_dir / f"{slide_id}.zarr")
        except StoreError as error:
            return error.what
        attrs = read_feature_attrs(self._features_dir / f"{slide_id}.h5") or {}
        if attrs.get("store_fingerprint", store.fingerprint) != store.fingerprint:
            return "the slide was tiled anew since its features were made"
        return store if store.has_pixels or self._read_tile is not None else "no pixels in the store"


def _grey(problem: str) -> Look:
    return Look(np.full((GREY_PX, GREY_PX, 3), GREY, dtype=np.uint8), problem)
