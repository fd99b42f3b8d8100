"""Coordinate files of other tools, read and written, and GeoJSON for QuPath. Specified in ``docs/interop.md``."""

from pathfm.store.interop.foreign import ForeignTiles
from pathfm.store.interop.reading import find_coords, read_coords

__all__ = ["ForeignTiles", "find_coords", "read_coords"]
