"""CLAM: ``patches/<slide_id>.h5``, its attributes on ``coords``.

A tile is ``patch_size`` pixels of pyramid level ``patch_level``. The spacing of the grid says nothing: on upper levels CLAM
steps by a downsample cut to a whole number, 3 where the level has 3.999.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pathfm.geometry import Size, scale_length
from pathfm.store.interop.coords_file import Attribute, CoordsFile, write_coords_file
from pathfm.store.interop.foreign import ForeignTiles, UnfitError, needed, number
from pathfm.store.tile_store import TileStore


def is_clam(file: CoordsFile) -> bool:
    """Whether CLAM wrote it (coordinates; its feature files say nothing of the tiles)."""
    return "patch_level" in file.attrs


def read_clam(file: CoordsFile) -> ForeignTiles:
    """Tiles of CLAM, of its present layout or of the older one that keeps pixels in ``imgs``.

    Raises:
        UnfitError: the size of the tiles cannot be known.
    """
    level = number(file.attrs, "patch_level")
    if "downsample" not in file.attrs and level != 0:
        raise UnfitError("tiles of an upper level without its downsample")
    downsample = float(np.exp(np.log(np.asarray(file.attrs.get("downsample", 1.0), dtype=np.float64)).mean()))
    side = file.picture_px or round(needed(file.attrs, "patch_size"))
    size = file.attrs.get("level_dim") if level == 0 else None
    return ForeignTiles(
        "CLAM", file.coords[:, :2], side * downsample, side, None, None if size is None else Size(int(size[0]), int(size[1]))
    )


def write_clam(path: Path, store: TileStore) -> None:
    """Writes the tiles of a store as CLAM's coordinates, at the place given.

    CLAM reads a tile without scaling it, so tiles are given as what they cover on level 0, rounded to a pixel; the transform of
    the encoder resizes them.
    """
    size = np.array(store.size_level0, dtype=np.int64)
    attrs: dict[str, Attribute] = {
        "patch_size": scale_length(store.tile_side_level0, 1),
        "patch_level": 0,
        "downsample": np.ones(2),
        "downsampled_level_dim": size,
        "level_dim": size,
        "name": store.slide_id,
        "save_path": "",
    }
    write_coords_file(path, store.xy_level0, attrs)
