"""The tiles of a store that holds coordinates alone, read from the slide: the pixels that a lossless store would hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from pathfm.errors import SlideError, StoreError, UnreadableSlideError
from pathfm.slides.reader import SlideReader, is_tile_folder, open_slide, slide_identity
from pathfm.slides.tile_folder import TileFolder
from pathfm.slides.tile_reading import TileRead, read_tiles
from pathfm.store.cohort import SlideRow
from pathfm.store.tile_store import TileStore, open_tiles
from pathfm.study import TileSettings
from pathfm.tile.grid import Grid
from pathfm.tile.scene import look, slide_colours, slide_grids, slide_scale
from pathfm.tile.stage import store_is_current
from pathfm.tile.task import check_unreadable

Pixels = npt.NDArray[np.uint8]

AHEAD = 4
"""Pictures of a folder that each thread reads ahead."""
TILE_AGAIN = "run `pathfm tile` again"


def slide_pixels(
    row: SlideRow, settings: TileSettings, store: TileStore, threads: int, numbers: Sequence[int] | None = None
) -> Iterator[Pixels | None]:
    """The tiles of a store in its order, read from the slide, with the change of colour that its settings ask for.

    That it is the same slide is checked before the first tile, and once more before the last one is handed over.

    Args:
        row: the slide; a local copy may stand in for its path.
        settings: those the store was made with.
        store: one resolution of the slide.
        threads: threads that decode; a single one is the caller's own.
        numbers: which tiles of the store are wanted, ascending; default: all.

    Yields:
        Pixels [tile_px, tile_px, 3], not to be written into; None for a tile that a store with pixels would not have: it cannot
        be decoded, or the scanner left it out. (Tiling knows these tiles too, unless ``filters.measure`` is off.)

    Raises:
        SlideError: the slide has changed since it was tiled, cannot be opened, or more than ``settings.max_unreadable`` of its
            tiles cannot be decoded.
        StoreError: the store is not what these settings make of the slide.
    """
    identity = _checked_identity(row, settings, store)
    wanted = range(len(store)) if numbers is None else numbers
    tiles: Iterator[Pixels | UnreadableSlideError | None]
    if is_tile_folder(row.path):
        tiles = _from_folder(row, store, wanted, threads)
    else:
        tiles = _from_slide(row, settings, store, wanted, threads)
    unreadable = 0
    for count, tile in enumerate(tiles, start=1):
        unreadable += isinstance(tile, UnreadableSlideError)
        if count == len(wanted):
            if numbers is None:
                check_unreadable(unreadable, count, settings)
            if slide_identity(row.path) != identity:
                raise SlideError("the slide changed while it was read", fix=TILE_AGAIN)
        yield None if isinstance(tile, UnreadableSlideError) else tile


def _checked_identity(row: SlideRow, settings: TileSettings, store: TileStore) -> str:
    """What the slide was when it was tiled; an error unless the store is what tiling would make of it now."""
    whole = open_tiles(store.path.parent) if "scale_of" in store.attrs else store
    identity: str = whole.attrs.get("identity", "")
    if not store_is_current(store, row, settings):
        if identity and slide_identity(row.path) != identity:
            raise SlideError("the slide has changed since it was tiled", fix=TILE_AGAIN)
        raise StoreError("the store is damaged, or was made with other settings", where=str(store.path), fix=TILE_AGAIN)
    return identity


def _from_slide(
    row: SlideRow, settings: TileSettings, store: TileStore, wanted: Sequence[int], threads: int
) -> Iterator[Pixels | UnreadableSlideError | None]:
    with open_slide(row.path, settings.reader) as reader:
        mpp = slide_scale(reader.metadata, row, settings).mpp
        grid = _grid_of(store, reader, slide_grids(reader.metadata, mpp, row, settings))
        changes = settings.colour.icc or settings.colour.normalise != "none"
        scene = look(reader, mpp, row, settings) if changes else None
        recolour = slide_colours(reader, scene, settings.colour).recolour if scene else ()

        def finish(_: int, tile: TileRead) -> Pixels | None:
            pixels = tile.pixels
            if pixels is None or (tile.outside > 0 and settings.edge == "drop"):
                return None
            for transform in recolour:
                pixels = transform(pixels)
            return pixels

        rows = _rows_of(store, grid)
        for _, tile in read_tiles(reader, grid.cut, [rows[number] for number in wanted], finish, threads=threads):
            yield tile


def _grid_of(store: TileStore, reader: SlideReader, grids: list[Grid]) -> Grid:
    """The grid that a store's tiles come from, by all that it says of it."""
    for grid in grids:
        now = {
            "reader": reader.name,
            "size_level0": list(reader.metadata.size_level0),
            "tile_px": grid.cut.side,
            "mpp": grid.mpp,
            "tile_side_level0": grid.side_level0[0],
            "tile_height_level0": grid.side_level0[1],
            "read_level": grid.cut.level,
            "read_shrink": grid.cut.shrink,
        }
        if all(store.attrs.get(name) == value for name, value in now.items()):
            return grid
    raise StoreError("the slide would be read in another way than it was tiled", where=str(store.path), fix=TILE_AGAIN)


def _rows_of(store: TileStore, grid: Grid) -> list[int]:
    """Numbers in the grid of a store's tiles [N], ascending."""
    # Tiles that another tool chose may lie in the same place twice, so each is searched for behind the one before.
    places = enumerate(grid.corners_level0.tolist())
    rows = [next((row for row, corner in places if corner == wanted), -1) for wanted in store.xy_level0.tolist()]
    if -1 in rows:
        raise StoreError("its tiles lie where tiling would put none", where=str(store.path), fix=TILE_AGAIN)
    return rows


def _from_folder(
    row: SlideRow, store: TileStore, wanted: Sequence[int], threads: int
) -> Iterator[Pixels | UnreadableSlideError]:
    folder, names = TileFolder(row.path), store.source_names or ()

    def read(name: str) -> Pixels | UnreadableSlideError:
        try:
            return folder.read(name)
        except UnreadableSlideError as error:
            return error

    waiting: deque[Future[Pixels | UnreadableSlideError]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for number in wanted:
            waiting.append(pool.submit(read, names[number]))
            if len(waiting) > AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
