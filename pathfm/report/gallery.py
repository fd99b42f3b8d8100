"""Slides shown on the page: thumbnail, heatmap and the tiles of highest attention, small enough to travel in one file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from pathfm import jpeg
from pathfm.errors import StoreError
from pathfm.geometry import Size, fit_within
from pathfm.report.fates import Fate
from pathfm.report.figures import data_uri
from pathfm.store.tile_store import open_tiles

Pixels = npt.NDArray[np.uint8]

BUDGET_BYTES = 6_000_000
"""Pictures of the gallery together, as text of the page: it stays quick to open and small enough to send by mail."""
JPEG_QUALITY = 82


@dataclass(frozen=True)
class Sides:
    """Longer sides of the pictures of one slide [px]."""

    overview_px: int
    tile_px: int


SIDES = (Sides(800, 144), Sides(640, 128), Sides(520, 112), Sides(400, 88), Sides(280, 64), Sides(180, 48))
"""Tried in this order until the gallery fits its budget."""


@dataclass(frozen=True)
class ShownSlide:
    """One slide of the gallery; pictures are data addresses.

    Attributes:
        fate: who it is.
        n_tiles: tiles in its store.
        synthetic: its coordinates are those of a mosaic, not of tissue.
        aspect: width of the overview by its height; the heatmap is drawn just as wide.
        tiles: tiles of highest attention, highest first, as (tile number, picture).
    """

    fate: Fate
    n_tiles: int
    synthetic: bool
    aspect: float
    thumbnail: str
    heatmap: str
    tiles: tuple[tuple[int, str], ...]

    @property
    def size(self) -> int:
        """Characters the pictures take on the page."""
        return len(self.thumbnail) + len(self.heatmap) + sum(len(uri) for _, uri in self.tiles)


@dataclass(frozen=True)
class Gallery:
    """What is shown, what could not be (slide id -> reason), and how many were left out for the page's size."""

    slides: tuple[ShownSlide, ...] = ()
    broken: Mapping[str, str] = field(default_factory=dict)
    left_for_size: int = 0


def choose(fates: Sequence[Fate], positive: str, count: int) -> tuple[Fate, ...]:
    """Slides to show: labels in turn (the positive one first), by slide id within a label. Never by result."""
    labels = sorted({fate.label for fate in fates}, key=lambda label: (label != positive, label))
    groups = [sorted((fate for fate in fates if fate.label == label), key=lambda fate: fate.slide_id) for label in labels]
    turns = [fate for turn in zip_longest(*groups) for fate in turn if fate is not None]
    return tuple(turns[:count])


def build_gallery(chosen: Sequence[Fate], folders: tuple[Path, Path], top: Mapping[str, Sequence[int]]) -> Gallery:
    """Reads and shrinks the pictures of the chosen slides.

    Args:
        chosen: slides to show, in order.
        folders: folder of the tile stores, folder of the heatmaps.
        top: tile numbers of highest attention by slide id, highest first.
    """
    broken: dict[str, str] = {}
    sources: list[_Source] = []
    for fate in chosen:
        try:
            sources.append(_read(fate, folders, top.get(fate.slide_id, ())))
        except StoreError as error:
            broken[fate.slide_id] = error.what
    slides: list[ShownSlide] = []
    for sides in SIDES:
        slides = [source.shown(sides) for source in sources]
        if sum(slide.size for slide in slides) <= BUDGET_BYTES:
            break
    fitting = tuple(_within_budget(slides))
    return Gallery(fitting, broken, len(slides) - len(fitting))


@dataclass(frozen=True)
class _Source:
    """Pixels of one slide, none larger than the page can use."""

    fate: Fate
    n_tiles: int
    synthetic: bool
    thumbnail: Pixels
    heatmap: Pixels
    tiles: tuple[tuple[int, Pixels], ...]

    def shown(self, sides: Sides) -> ShownSlide:
        """The slide with its pictures at the given sizes."""
        return ShownSlide(
            fate=self.fate,
            n_tiles=self.n_tiles,
            synthetic=self.synthetic,
            aspect=self.thumbnail.shape[1] / self.thumbnail.shape[0],
            thumbnail=picture_uri(self.thumbnail, sides.overview_px),
            heatmap=picture_uri(self.heatmap, sides.overview_px),
            tiles=tuple((index, picture_uri(tile, sides.tile_px)) for index, tile in self.tiles),
        )


def _read(fate: Fate, folders: tuple[Path, Path], top: Sequence[int]) -> _Source:
    store = open_tiles(folders[0] / f"{fate.slide_id}.zarr")
    heatmap = _read_picture(folders[1] / f"{fate.slide_id}.png")
    # Tiles whose pixels stayed in the slide cannot be shown here.
    indices = [index for index in top if 0 <= index < len(store) and store.has_pixels]
    largest = SIDES[0]
    return _Source(
        fate=fate,
        n_tiles=len(store),
        synthetic=store.coords_synthetic,
        thumbnail=_shrunk(store.thumbnail, largest.overview_px),
        heatmap=_shrunk(heatmap, largest.overview_px),
        tiles=tuple((index, _shrunk(store[index], largest.tile_px)) for index in indices),
    )


def _within_budget(slides: Sequence[ShownSlide]) -> Iterator[ShownSlide]:
    total = 0
    for slide in slides:
        total += slide.size
        if total > BUDGET_BYTES:
            return
        yield slide


def _read_picture(path: Path) -> Pixels:
    """RGB pixels of a PNG; transparent parts become white."""
    data = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    pixels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
    if pixels is None or pixels.dtype != np.uint8:
        raise StoreError("the heatmap is damaged", where=str(path), fix="run `pathfm mil` again")
    if pixels.ndim == 2:
        return np.repeat(pixels[:, :, None], 3, axis=2)
    rgb = pixels[:, :, 2::-1]
    if pixels.shape[2] == 4:
        opacity = pixels[:, :, 3:].astype(np.float32) / 255
        rgb = np.rint(rgb * opacity + 255 * (1 - opacity)).astype(np.uint8)
    return np.ascontiguousarray(rgb)


def _shrunk(pixels: Pixels, longest_px: int) -> Pixels:
    size, downsample = fit_within(Size(pixels.shape[1], pixels.shape[0]), longest_px)
    if downsample == 1:
        return pixels
    return np.asarray(cv2.resize(pixels, tuple(size), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def picture_uri(pixels: Pixels, longest_px: int) -> str:
    """RGB pixels [H, W, 3] as a JPEG data address, shrunk so that the longer side is at most ``longest_px``."""
    return data_uri(jpeg.encode(_shrunk(pixels, longest_px), JPEG_QUALITY), "image/jpeg")
