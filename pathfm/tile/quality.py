"""Numbers that tell what a tile shows: stored with every tile, never hidden. Tiles in, numbers out.

Columns of colour are taken from a small copy of the tile (cells of about four pixels) through tables over all colours, in
steps of eight grey levels: whatever is known of a colour costs one look.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from pathfm.study import FilterSettings
from pathfm.tile.damage import straight_step
from pathfm.tile.pen import INKS, ink_of, optical_density

Pixels = npt.NDArray[np.uint8]

WHITE_LEVEL = 224
"""Colours whose darkest channel is at least this count as white; a multiple of the tables' step."""
BLACK_LEVEL = 32
"""Colours whose brightest channel is below this count as black; a multiple of the tables' step."""
GLASS_DENSITY = 0.15
"""Colours whose largest optical density is below this are not stained (Macenko 2009)."""
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Optical density [R, G, B] of haematoxylin, eosin and DAB (Ruifrok and Johnston 2001)."""
SMALL_PX = 96
"""Tiles are halved until a side is below this [px]."""

WHITE, BLACK = 1 << 3, 1 << 4
"""Bits of a colour's class beside the number of its ink."""


class Quality(NamedTuple):
    """One row of the store's ``quality`` array. All but ``blur`` are 0 to 1.

    Attributes:
        tissue: share of the tile that is tissue by the mask.
        outside: share of the tile outside the scan.
        white: share of near-white pixels.
        black: share of near-black pixels.
        blur: variance of the Laplacian of the grey image at the tile's own resolution; low means out of focus.
        saturation: mean HSV saturation.
        pen: share of marker-pen ink, all colours together.
        pen_green: share of green ink.
        pen_red: share of red ink.
        pen_blue: share of blue ink.
        pen_black: share of black ink.
        damage: height of the largest straight step, as a share of the grey range: JPEG damage that decodes cleanly.
        haematoxylin: share of the tile's stain density that is haematoxylin; 0 without stain.
        eosin: share that is eosin; the rest is neither.
    """

    tissue: float
    outside: float
    white: float
    black: float
    blur: float
    saturation: float
    pen: float
    pen_green: float
    pen_red: float
    pen_blue: float
    pen_black: float
    damage: float
    haematoxylin: float
    eosin: float


class _Tables(NamedTuple):
    """What is known of every colour [32768], red in the highest bits.

    Attributes:
        classes: number of the ink, and the bits ``WHITE`` and ``BLACK``.
        amounts: [32768, 4] saturation, density of haematoxylin, of eosin, and of all stains.
    """

    classes: Pixels
    amounts: npt.NDArray[np.float32]


def measure(tile: Pixels, tissue: float, outside: float = 0.0) -> Quality:
    """Quality of one tile whose shares of tissue and of area outside the scan are known.

    Args:
        tile: pixels [H, W, 3], at least 16 x 16.
        tissue: share of the tile that is tissue.
        outside: share of the tile outside the scan.
    """
    tables = _tables()
    small = _shrink(tile) >> 3
    colours = (small[..., 0].astype(np.intp) << 10) | (small[..., 1].astype(np.intp) << 5) | small[..., 2]
    counts = np.bincount(tables.classes[colours].ravel(), minlength=2 * BLACK) / colours.size
    saturation, haematoxylin, eosin, stain = cv2.mean(tables.amounts.take(colours, axis=0))
    inks = counts.reshape(-1, WHITE).sum(axis=0)[1 : len(INKS) + 1].tolist()
    stain = stain or 1.0
    return Quality(
        tissue=tissue,
        outside=outside,
        white=float(counts[WHITE:BLACK].sum()),
        black=float(counts[BLACK:].sum()),
        blur=_blur(tile),
        saturation=saturation,
        pen=sum(inks),
        pen_green=inks[0],
        pen_red=inks[1],
        pen_blue=inks[2],
        pen_black=inks[3],
        damage=straight_step(tile),
        haematoxylin=haematoxylin / stain,
        eosin=eosin / stain,
    )


def removed_by(quality: Quality, filters: FilterSettings) -> str:
    """Name of the first column whose limit a tile breaks; empty for a tile that is kept.

    Damage comes first, since the colours of a damaged tile tell nothing; pen before black, since black ink is both.
    """
    if not filters.measure:
        return ""
    broken = {
        "damage": quality.damage > filters.max_damage,
        "white": quality.white > filters.max_white,
        "pen": quality.pen > filters.max_pen,
        "black": quality.black > filters.max_black,
        "blur": quality.blur < filters.min_blur,
    }
    return next((name for name, is_broken in broken.items() if is_broken), "")


def perceptual_hash(picture: Pixels) -> str:
    """Difference hash of a picture [h, w, 3] as 16 hex digits: equal for renamed and re-saved copies of a slide."""
    small = cv2.resize(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), (9, 8), interpolation=cv2.INTER_AREA).astype(np.int16)
    bits = (small[:, 1:] > small[:, :-1]).reshape(-1)
    return f"{int(''.join('1' if bit else '0' for bit in bits), 2):016x}"


def stain_densities(rgb: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Densities of haematoxylin, eosin and DAB [..., 3] in colours [..., 3], by colour deconvolution; 0 for glass.

    Ruifrok and Johnston 2001. Negative densities, which no stain has, count as 0.
    """
    density = optical_density(rgb)
    stains = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
    amounts = np.maximum(density @ np.linalg.inv(stains), 0)
    return np.asarray(amounts * (density.max(axis=-1, keepdims=True) >= GLASS_DENSITY))


@cache
def _tables() -> _Tables:
    levels = np.arange(4, 256, 8)
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    low, high = rgb.min(axis=1), rgb.max(axis=1)
    classes = ink_of(rgb) + WHITE * (low >= WHITE_LEVEL) + BLACK * (high < BLACK_LEVEL)
    stains = stain_densities(rgb)
    amounts = np.column_stack([(high - low) / high, stains[:, :2], stains.sum(axis=1)])
    return _Tables(classes.astype(np.uint8), amounts.astype(np.float32))


def _shrink(tile: Pixels) -> Pixels:
    """A small copy by area means. Halving is the one factor that OpenCV shrinks by fast."""
    while min(tile.shape[:2]) >= SMALL_PX:
        size = (tile.shape[1] // 2, tile.shape[0] // 2)
        tile = np.asarray(cv2.resize(tile, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    return tile


def _blur(tile: Pixels) -> float:
    # Whole numbers of 16 bits hold any Laplacian of 8-bit pixels, and are ten times as fast to sum up as floats.
    edges = cv2.Laplacian(cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY), cv2.CV_16S)
    return float(cv2.norm(edges, cv2.NORM_L2SQR) / edges.size - cv2.mean(edges)[0] ** 2)
