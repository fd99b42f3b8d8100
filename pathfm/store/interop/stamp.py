"""STAMP: ``<extractor>-<hash>/<slide_id>.h5``, coordinates in micrometres, attributes on the file.

STAMP cuts tiles of a whole number of level-0 pixels, ``ceil(tile_size_um / mpp)``, side by side from the corner of the slide.
The micrometres in the file are those of groups of tiles, plus the nominal side for each tile within a group; so a tile is found
by its column and row of the grid of whole pixels, neither by dividing by the mpp nor by the nominal side.
"""

from __future__ import annotations

import math

import numpy as np

from pathfm.geometry import Mpp
from pathfm.store.interop.coords_file import CoordsFile
from pathfm.store.interop.foreign import ForeignTiles, UnfitError, needed, positive, whole

GROUP_PX = 1024
"""STAMP reads groups of tiles up to this side at once [level-0 px]."""


def is_stamp(file: CoordsFile) -> bool:
    """Whether STAMP wrote it; older versions call the side of a tile ``tile_size``."""
    return "tile_size_um" in file.file_attrs or "tile_size" in file.file_attrs


def read_stamp(file: CoordsFile, mpp_level0: Mpp | float | None) -> ForeignTiles:
    """Tiles of STAMP.

    Args:
        file: as read.
        mpp_level0: micrometres per level-0 pixel that STAMP took for the slide (it uses that of x for both axes).

    Raises:
        UnfitError: without mpp, or one that does not fit the coordinates.
    """
    facts = file.file_attrs
    if facts.get("unit", "um") not in {"um", b"um"}:
        raise UnfitError("coordinates that are no micrometres")
    if mpp_level0 is None:
        raise UnfitError("coordinates in micrometres, and the slide's mpp is unknown")
    mpp = mpp_level0.x if isinstance(mpp_level0, Mpp) else mpp_level0
    side_um = needed(facts, "tile_size_um" if "tile_size_um" in facts else "tile_size")
    side = math.ceil(side_um / mpp)
    cells = np.rint(file.coords[:, :2] / (side * mpp))
    off = np.abs(file.coords[:, :2] / mpp - cells * side)
    if off.size and off.max() > max(1, GROUP_PX // side):
        raise UnfitError(f"coordinates that lie on no grid of STAMP's at {mpp:g} mpp: STAMP took another for this slide")
    tile_px = positive(facts, "tile_size_px")
    return ForeignTiles("STAMP", cells * side, float(side), whole(tile_px), side * mpp / tile_px if tile_px else None)
