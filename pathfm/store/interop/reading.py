"""Finds the coordinate file of a slide among another tool's files, tells whose it is, and reads it."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path

from pathfm.errors import StoreError
from pathfm.geometry import Mpp
from pathfm.store.interop.atlaspatch import is_atlaspatch, read_atlaspatch
from pathfm.store.interop.clam import is_clam, read_clam
from pathfm.store.interop.coords_file import read_coords_file
from pathfm.store.interop.foreign import ForeignTiles, UnfitError
from pathfm.store.interop.lazyslide import read_lazyslide
from pathfm.store.interop.slide2vec import ENDING, read_slide2vec
from pathfm.store.interop.stamp import is_stamp, read_stamp
from pathfm.store.interop.trident import is_trident, read_trident

ENDINGS = ("_patches.h5", ".h5", ".zarr", ENDING)
"""What follows the slide_id in the names of coordinate files."""
SUBFOLDERS = ("", "patches", "tiles")
"""Where they lie in the folder that a tool wrote."""
TOOLS = "CLAM, TRIDENT, STAMP, AtlasPatch, slide2vec or LazySlide"
DAMAGE = (
    *(OSError, EOFError, ArithmeticError, LookupError, TypeError, ValueError, RuntimeError),
    *(struct.error, zipfile.BadZipFile, zlib.error),
)
"""What libraries raise on files that are damaged or something else."""


def find_coords(folder: Path, slide_id: str) -> Path | None:
    """The coordinate file of a slide in the folder of another tool, None when there is none.

    Raises:
        StoreError: there are several, and which one is meant cannot be known.
    """
    places = [folder / sub / f"{slide_id}{ending}" for sub in SUBFOLDERS for ending in ENDINGS]
    found = [place for place in places if place.exists()]
    if len(found) > 1:
        names = " and ".join(place.relative_to(folder).as_posix() for place in found[:2])
        raise StoreError(f"two coordinate files: {names}", where=str(folder), fix="point tile.coords at one tool's folder")
    return found[0] if found else None


def read_coords(path: Path, mpp_level0: Mpp | float | None = None) -> ForeignTiles:
    """Reads where another tool's tiles lie on a slide. Names, dates and paths in the file are not taken over.

    Args:
        path: coordinates of CLAM, TRIDENT, STAMP, AtlasPatch or slide2vec, or a LazySlide store.
        mpp_level0: the slide's micrometres per pixel; needed for STAMP, whose coordinates are micrometres.

    Raises:
        MissingExtraError: a LazySlide store, and pyarrow is not installed.
        StoreError: absent, damaged, or of none of these tools.
    """
    if not path.exists():
        raise StoreError("no coordinate file", where=str(path))
    try:
        if path.is_dir():
            return read_lazyslide(path)
        return read_slide2vec(path) if path.name.endswith(ENDING) else _read_h5(path, mpp_level0)
    except UnfitError as error:
        raise StoreError(str(error), where=str(path)) from error
    except DAMAGE as error:
        raise StoreError("damaged, or no file of coordinates", where=str(path), fix=f"wanted: a file of {TOOLS}") from error


def _read_h5(path: Path, mpp_level0: Mpp | float | None) -> ForeignTiles:
    file = read_coords_file(path)
    if is_atlaspatch(file):
        return read_atlaspatch(file)
    if is_stamp(file):
        return read_stamp(file, mpp_level0)
    if is_trident(file):
        return read_trident(file.attrs, file)
    if is_clam(file):
        return read_clam(file)
    raise UnfitError(f"coordinates without the size of the tiles (wanted: a file of coordinates of {TOOLS})")
