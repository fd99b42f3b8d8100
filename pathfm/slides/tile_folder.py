"""A folder of pre-cut tiles as one slide (cytology, sets that come as tiles)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pathfm.errors import UnreadableSlideError
from pathfm.geometry import Size
from pathfm.slides.reader import TILE_SUFFIXES, Pixels, is_tile_name, open_slide, unreadable


class TileFolder:
    """The pictures of a folder in natural order of their names (``tile_2`` before ``tile_10``).

    Hidden files and files that are no pictures by their suffix are left out; sub-folders are not searched. Tiles may differ in
    size. Nothing is read before it is asked for.

    Raises:
        UnreadableSlideError: there is no such folder, or no picture in it.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise unreadable("there is no such folder of tiles", path, "check the path")
        self._path = path
        files = (each.name for each in path.iterdir() if each.is_file() and not each.name.startswith("."))
        self.names: tuple[str, ...] = tuple(sorted((name for name in files if is_tile_name(name)), key=natural_order))
        if not self.names:
            raise unreadable("the folder holds no tile pictures", path, f"readable: {', '.join(sorted(TILE_SUFFIXES))}")

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[tuple[str, Pixels | UnreadableSlideError]]:
        """Every tile's name with its pixels [H, W, 3], or with the error of a tile that cannot be decoded."""
        for name in self.names:
            try:
                yield name, self.read(name)
            except UnreadableSlideError as error:
                yield name, error

    def read(self, name: str) -> Pixels:
        """The pixels [H, W, 3] of one tile.

        Raises:
            UnreadableSlideError: the file cannot be decoded; it is named.
        """
        with open_slide(self._path / name) as tile:
            return tile.read_region(0, 0, 0, tile.metadata.size_level0)

    def sizes(self) -> dict[str, Size]:
        """Width and height of every readable tile; decodes them all."""
        return {name: Size(tile.shape[1], tile.shape[0]) for name, tile in self if not isinstance(tile, UnreadableSlideError)}


def natural_order(name: str) -> tuple[tuple[str | int, ...], str]:
    """Sort key that compares runs of digits by their value; the name itself decides between equals."""
    # Splitting at captured digits alternates text and numbers, so that text is never compared with a number.
    parts = re.split(r"([0-9]+)", name.lower())
    return tuple(int(part) if index % 2 else part for index, part in enumerate(parts)), name
