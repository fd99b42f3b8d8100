"""AtlasPatch: ``patches/<slide_id>.h5``, rows (x, y, width, height, level), TRIDENT's attributes on the file."""

from __future__ import annotations

from dataclasses import replace

from pathfm.store.interop.coords_file import CoordsFile
from pathfm.store.interop.foreign import ForeignTiles, positive
from pathfm.store.interop.trident import read_trident


def is_atlaspatch(file: CoordsFile) -> bool:
    """Whether AtlasPatch wrote it."""
    return file.coords.shape[1] == 5 and "patch_size_level0" in file.file_attrs


def read_atlaspatch(file: CoordsFile) -> ForeignTiles:
    """Tiles of AtlasPatch.

    Raises:
        UnfitError: the size of the tiles cannot be known.
    """
    tiles = read_trident(file.file_attrs, file, "AtlasPatch")
    mpp = positive(file.file_attrs, "mpp")
    return replace(tiles, mpp=mpp * tiles.side_level0 / tiles.tile_px) if mpp and tiles.tile_px else tiles
