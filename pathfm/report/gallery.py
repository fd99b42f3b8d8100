"""Slides shown on the page: thumbnail, heatmaps and the highest and lowest tiles, small enough to travel in one file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from pathfm import jpeg
from pathfm.errors import StoreError
from pathfm.geometry import Size, fit_within
from pathfm.report.fates import Fate
from pathfm.report.figures import data_uri
from pathfm.store.commit import read_json
from pathfm.store.tile_store import TileStore, open_tiles

Pixels = npt.NDArray[np.uint8]

BUDGET_BYTES = 6_000_000
"""Pictures of the gallery together, as text of the page: it stays quick to open and small enough to send by mail."""
JPEG_QUALITY = 82
STRIP_PX = 66
"""Height of the strip with colour bar and scale bar that mil draws under its pictures [px]."""
CLASSES = 2
"""Maps side by side are so many times as long as one."""


@dataclass(frozen=True)
class Sides:
    """Longer sides of the pictures of one slide [px]."""

    overview_px: int
    tile_px: int


SIDES = (Sides(800, 144), Sides(640, 128), Sides(520, 112), Sides(400, 88), Sides(280, 64), Sides(180, 48))
"""Tried in this order until the gallery fits its budget."""


@dataclass(frozen=True)
class Listed:
    """Tiles of one slide to be shown: a title, and their numbers in order."""

    title: str
    tiles: tuple[int, ...]


@dataclass(frozen=True)
class Strip:
    """The same as pictures: (tile number, data address)."""

    title: str
    tiles: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class ShownSlide:
    """One slide of the gallery; pictures are data addresses.

    Attributes:
        fate: who it is.
        n_tiles: tiles in its store.
        synthetic: its coordinates are those of a mosaic, not of tissue.
        aspect: width of the overview by its height; the heatmap is drawn just as wide.
        classes: maps of all classes side by side; empty where there is one map.
        scale: length of the scale bar as a share of the overview's width, and in words; None where it is not known.
        strips: highest and lowest tiles.
        has_pixels: false where the tiles' pixels stayed in the slide.
    """

    fate: Fate
    n_tiles: int
    synthetic: bool
    aspect: float
    thumbnail: str
    heatmap: str
    classes: str
    scale: tuple[float, str] | None
    strips: tuple[Strip, ...]
    has_pixels: bool

    @property
    def size(self) -> int:
        """Characters the pictures take on the page."""
        tiles = sum(len(uri) for strip in self.strips for _, uri in strip.tiles)
        return len(self.thumbnail) + len(self.heatmap) + len(self.classes) + tiles


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


def listed_tiles(mil_dir: Path, count: int, looks: str) -> dict[str, tuple[Listed, ...]]:
    """The highest and lowest tiles of every shown slide, by its id: of all maps together, then the highest of each class.

    Args:
        mil_dir: where mil wrote ``top_tiles.json``, ``bottom_tiles.json`` and ``class_tiles.json``.
        count: tiles of each kind.
        looks: what the maps show, as ``attention``.
    """

    def read(name: str) -> dict[str, Any]:
        return read_json(mil_dir / name) if (mil_dir / name).is_file() else {}

    top, bottom, by_class = read("top_tiles.json"), read("bottom_tiles.json"), read("class_tiles.json")
    found: dict[str, tuple[Listed, ...]] = {}
    for slide_id in top:
        parts = [(f"Tiles of highest {looks}", top[slide_id]), (f"Tiles of lowest {looks}", bottom.get(slide_id, ()))]
        parts += [(f"Highest for {name}", each["top"]) for name, each in by_class.get(slide_id, {}).items()]
        listed = (Listed(title, tuple(int(tile) for tile in tiles)[:count]) for title, tiles in parts)
        found[slide_id] = tuple(each for each in listed if each.tiles)
    return found


def build_gallery(chosen: Sequence[Fate], folders: tuple[Path, Path], listed: Mapping[str, Sequence[Listed]]) -> Gallery:
    """Reads and shrinks the pictures of the chosen slides.

    Args:
        chosen: slides to show, in order.
        folders: folder of the tile stores, folder of the heatmaps.
        listed: tiles to show by slide id.
    """
    broken: dict[str, str] = {}
    sources: list[_Source] = []
    for fate in chosen:
        try:
            sources.append(_read(fate, folders, listed.get(fate.slide_id, ())))
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
    classes: Pixels | None
    scale: tuple[float, str] | None
    strips: tuple[tuple[str, tuple[tuple[int, Pixels], ...]], ...]
    has_pixels: bool

    def shown(self, sides: Sides) -> ShownSlide:
        """The slide with its pictures at the given sizes."""
        return ShownSlide(
            fate=self.fate,
            n_tiles=self.n_tiles,
            synthetic=self.synthetic,
            aspect=self.thumbnail.shape[1] / self.thumbnail.shape[0],
            thumbnail=picture_uri(self.thumbnail, sides.overview_px),
            heatmap=picture_uri(self.heatmap, sides.overview_px),
            classes="" if self.classes is None else picture_uri(self.classes, CLASSES * sides.overview_px),
            scale=self.scale,
            strips=tuple(
                Strip(title, tuple((index, picture_uri(tile, sides.tile_px)) for index, tile in tiles))
                for title, tiles in self.strips
            ),
            has_pixels=self.has_pixels,
        )


def _read(fate: Fate, folders: tuple[Path, Path], listed: Sequence[Listed]) -> _Source:
    store = open_tiles(folders[0] / f"{fate.slide_id}.zarr")
    heatmap = _read_picture(folders[1] / f"{fate.slide_id}.png")
    heatmap = without_strip(heatmap, store.thumbnail.shape[1] / store.thumbnail.shape[0])
    by_class = folders[1] / f"{fate.slide_id}.classes.png"
    largest = SIDES[0]

    def tiles(numbers: Sequence[int]) -> tuple[tuple[int, Pixels], ...]:
        # Tiles whose pixels stayed in the slide cannot be shown here.
        known = [number for number in numbers if 0 <= number < len(store) and store.has_pixels]
        return tuple((number, _shrunk(store[number], largest.tile_px)) for number in known)

    strips = tuple((each.title, tiles(each.tiles)) for each in listed)
    return _Source(
        fate=fate,
        n_tiles=len(store),
        synthetic=store.coords_synthetic,
        thumbnail=_shrunk(store.thumbnail, largest.overview_px),
        heatmap=_shrunk(heatmap, largest.overview_px),
        classes=_shrunk(_read_picture(by_class), CLASSES * largest.overview_px) if by_class.is_file() else None,
        scale=None if store.coords_synthetic else scale_bar(store),
        strips=tuple(strip for strip in strips if strip[1]),
        has_pixels=store.has_pixels,
    )


def without_strip(heatmap: Pixels, aspect: float) -> Pixels:
    """The heatmap without the strip below it, whose words would be too small once it is shrunk; the page has them as text.

    Args:
        heatmap: as mil drew it.
        aspect: width of the slide by its height.
    """
    rows = round(heatmap.shape[1] / aspect)
    # A narrow picture has a margin instead of being as wide as its slide: it keeps its strip.
    return heatmap[:rows] if abs(heatmap.shape[0] - rows - STRIP_PX) <= 1 else heatmap


def scale_bar(store: TileStore) -> tuple[float, str] | None:
    """A round length of at most a quarter of the slide's width, as a share of it, and in words; None without mpp."""
    if not store.mpp or not store.tile_side_level0:
        return None
    width_um = store.thumbnail.shape[1] * store.thumbnail_downsample * store.mpp * store.tile_px / store.tile_side_level0
    power = 10.0 ** math.floor(math.log10(width_um / 4))
    length_um = max(step * power for step in (1, 2, 5) if step * power <= width_um / 4 * (1 + 1e-9))
    return length_um / width_um, f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"


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
