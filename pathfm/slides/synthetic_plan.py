"""What a synthetic slide shows and where: regions of tissue and the outlines of everything in them.

Lengths are in micrometres in the constants and in level-0 pixels in the arrays. A plan holds no pixels, so that slides of any
size can be drawn block by block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from pathfm.geometry import Size, scale_length
from pathfm.slides import synthetic_cells
from pathfm.slides.synthetic_cells import CELL_PX, Floats, Layer, Mask, Random

Bytes = npt.NDArray[np.uint8]

DEFAULT_SIZE = Size(1536, 1536)
MARGIN = 0.06
"""Share of the slide's side that stays glass."""
REGION_UM = 70.0
"""Length over which the kind of tissue changes [um]."""
LYMPH_SHARE, FAT_SHARE, GLAND_SHARE = 0.07, 0.10, 0.42
"""Shares of the tissue, in every slide."""

PenColour = Literal["", "green", "blue", "black"]


@dataclass(frozen=True)
class SyntheticSpec:
    """One synthetic slide.

    Attributes:
        size_px: width and height [level-0 px].
        mpp: micrometres per pixel.
        seed: decides everything that is not given.
        lesion: whether the focus is a lesion; without one it is a lymphocyte field of the same area and colour.
        lesion_fraction: share of the tissue that the focus takes.
        tissue_fraction: share of the slide that is tissue.
        pen: colour of a pen mark, empty for none.
        fold: whether the tissue is folded somewhere.
        site: laboratory, which has a tendency in its stain.
    """

    size_px: Size = DEFAULT_SIZE
    mpp: float = 0.5
    seed: int = 0
    lesion: bool = False
    lesion_fraction: float = 0.18
    tissue_fraction: float = 0.55
    pen: PenColour = ""
    fold: bool = False
    site: int = 0


@dataclass(frozen=True)
class Plan:
    """A slide before it is drawn.

    Attributes:
        tissue: 1 in tissue, 0 on glass, on cells of ``CELL_PX``; soft, as all maps.
        focus: the lesion, or the lymphocyte field in its place.
        lymph: further lymphocyte fields, in every slide.
        fold: strength of the fold.
        pen: strength of the pen mark.
        grain: direction of the fibres [rad].
        layers: everything with an outline, in drawing order.
    """

    tissue: Floats
    focus: Floats
    lymph: Floats
    fold: Floats
    pen: Floats
    grain: float
    layers: tuple[Layer, ...]


def make_plan(spec: SyntheticSpec) -> Plan:
    """Decides on every region and outline of a slide. The same spec gives the same plan."""
    # One stream per matter: a lesion must not shift the random numbers of all that follows it.
    shape, regions, cells, extras = (np.random.default_rng([spec.seed, index]) for index in range(4))
    cell_um = CELL_PX * spec.mpp
    grain = shape.uniform(0, np.pi)
    tissue = _outline(shape, spec)
    free = tissue.copy()
    focus = _take_foci(regions, free, spec, cell_um)
    lymph, fat, gland = (_take(regions, free, share * tissue.sum(), cell_um) for share in (LYMPH_SHARE, FAT_SHARE, GLAND_SHARE))
    sheet = synthetic_cells.lesion_cells if spec.lesion else synthetic_cells.lymphocytes
    layers = (
        *synthetic_cells.stroma_cells(cells, free | gland, spec.mpp, grain),
        *synthetic_cells.glands(cells, gland, spec.mpp),
        *synthetic_cells.fat_cells(cells, fat, spec.mpp),
        *synthetic_cells.lymphocytes(cells, lymph, spec.mpp),
        *sheet(cells, focus, spec.mpp),
    )
    return Plan(
        tissue=_soft(tissue, 1.0),
        focus=_soft(focus, 1.5),
        lymph=_soft(lymph, 1.5),
        fold=_fold(extras, tissue, spec),
        pen=_pen_stroke(extras, tissue, spec),
        grain=grain,
        layers=layers,
    )


def _noise(rng: Random, shape: tuple[int, int], sigma: float) -> Floats:
    """Smooth noise with mean 0 and standard deviation 1."""
    field = cv2.GaussianBlur(rng.standard_normal(shape, dtype=np.float32), (0, 0), max(sigma, 0.5))
    result: Floats = (field - field.mean()) / max(float(field.std()), 1e-6)
    return result


def _outline(rng: Random, spec: SyntheticSpec) -> Mask:
    """An irregular piece of tissue of exactly the wanted area."""
    height, width = (-(-side // CELL_PX) for side in (spec.size_px.height, spec.size_px.width))
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    angle, stretch = rng.uniform(0, np.pi), rng.uniform(0.8, 1.25)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    distance = np.hypot(along / stretch, across * stretch)
    height_map = -distance + 0.16 * _noise(rng, (height, width), width / 14) + 0.03 * _noise(rng, (height, width), width / 60)
    border = np.maximum(np.abs(x), np.abs(y)) - (1 - 2 * MARGIN)
    height_map -= 8 * np.maximum(border + 0.04, 0)
    return _highest(height_map, spec.tissue_fraction * height * width)


def _highest(field: npt.NDArray[np.floating], count: float) -> Mask:
    """The ``count`` cells with the highest values."""
    flat = np.sort(field, axis=None)
    return np.asarray((field >= flat[max(0, flat.size - max(1, round(count)))]) & np.isfinite(field))


def _take(rng: Random, free: Mask, count: float, cell_um: float) -> Mask:
    """Blotches of the free tissue, which they then occupy."""
    field = np.where(free, _noise(rng, free.shape, REGION_UM / cell_um), -np.inf)
    taken = _highest(field, min(count, free.sum()))
    free &= ~taken
    return taken


def _take_foci(rng: Random, free: Mask, spec: SyntheticSpec, cell_um: float) -> Mask:
    """One to three compact foci inside the tissue."""
    depth = cv2.distanceTransform(free.astype(np.uint8), cv2.DIST_L2, 3)
    inside = np.argwhere(depth > min(100.0 / cell_um, 0.6 * float(depth.max())))
    centres = inside[rng.integers(len(inside), size=rng.integers(1, 4))]
    y, x = np.indices(free.shape)
    nearest = np.min([np.hypot(y - centre[0], x - centre[1]) for centre in centres], axis=0)
    field = -nearest * cell_um + 25.0 * _noise(rng, free.shape, 45.0 / cell_um)
    taken = _highest(np.where(free, field, -np.inf), spec.lesion_fraction * free.sum())
    free &= ~taken
    return taken


def _soft(mask: Mask, sigma: float) -> Floats:
    result: Floats = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), sigma)
    return result


def _fold(rng: Random, tissue: Mask, spec: SyntheticSpec) -> Floats:
    canvas = np.zeros(tissue.shape, dtype=np.uint8)
    if spec.fold:
        _stroke(rng, canvas, tissue, width_um=22.0, cell_um=CELL_PX * spec.mpp)
    return _soft((canvas > 0) & tissue, 1.0)


def _pen_stroke(rng: Random, tissue: Mask, spec: SyntheticSpec) -> Floats:
    canvas = np.zeros(tissue.shape, dtype=np.uint8)
    if spec.pen:
        _stroke(
            rng, canvas, cv2.morphologyEx(tissue.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0, 55.0, 4.0
        )
    return _soft(canvas > 0, 0.8)


def _stroke(rng: Random, canvas: Bytes, through: Mask, width_um: float, cell_um: float) -> None:
    """A wavy line across the picture, through one of the given cells."""
    places = np.argwhere(through)
    centre = places[rng.integers(len(places))][::-1]
    angle, length = rng.uniform(0, np.pi), 0.33 * max(canvas.shape)
    along = np.linspace(-length, length, 40)
    sideways = 0.12 * length * np.sin(along / length * rng.uniform(2, 5) + rng.uniform(0, 6))
    x = centre[0] + along * np.cos(angle) - sideways * np.sin(angle)
    y = centre[1] + along * np.sin(angle) + sideways * np.cos(angle)
    points = np.stack([x, y], axis=1).astype(np.int32)
    cv2.polylines(canvas, [points], isClosed=False, color=1, thickness=scale_length(width_um, 1 / cell_um))
