"""From a plan to pixels: two stains in optical density, then light, blur and noise.

Colour follows Ruifrok and Johnston (2001): optical density is a sum of stain vectors times stain amounts. The vectors are the
haematoxylin and eosin of Macenko et al. (2009). Every pattern repeats with ``TEXTURE_PX`` and is placed by absolute position,
so a slide comes out the same whatever blocks it is drawn in.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import scipy.fft

from pathfm.geometry import Box
from pathfm.slides.reader import Pixels
from pathfm.slides.synthetic_cells import CELL_PX, Floats, Layer, Mask
from pathfm.slides.synthetic_plan import Plan, SyntheticSpec

HAEMATOXYLIN = (0.5626, 0.7201, 0.4062)
EOSIN = (0.2159, 0.8012, 0.5581)
TEXTURE_PX = 1024
SUBPIXEL_BITS = 3
"""Outlines are placed on 1/8 px."""
BLEED_PX = 8
"""Drawn around a block and cut off again, so that blur sees its neighbours."""
STROMA = (36.0, 4.0)
SHEET = (26.0, 13.0)
"""Eosin and haematoxylin of fibres, and between the nuclei of lesions and lymphocyte fields alike [1/100 optical density]."""
PENS = {"green": (0.75, 0.12, 0.55), "blue": (0.95, 0.6, 0.1), "black": (1.1, 1.1, 1.05)}
"""Optical density of ink [R, G, B]."""
EDGE = 0.14
"""How far the edges of regions are frayed."""
NOISE = 2.0
"""Standard deviation of sensor noise [grey levels]."""


@dataclass(frozen=True)
class Look:
    """How a slide was stained and scanned, and its repeating patterns [TEXTURE_PX, TEXTURE_PX].

    Attributes:
        stains_23: optical density vectors of haematoxylin and eosin.
        amounts: factors on haematoxylin and eosin.
        glass: colour of empty glass [R, G, B].
        fibre: eosin of fibres, around 1.
        chromatin: haematoxylin in nuclei, around 1.
        noise: sensor noise [grey levels], per channel.
        edge: what frays the edges of regions.
    """

    stains_23: Floats
    amounts: tuple[float, float]
    glass: Floats
    fibre: Floats
    chromatin: Floats
    noise: Floats
    edge: Floats


def make_look(spec: SyntheticSpec, grain: float) -> Look:
    """The stain of a slide's laboratory and of its day, unrelated to what the slide shows."""
    rng, site = np.random.default_rng([spec.seed, 10]), np.random.default_rng([spec.site, 11])
    stains = np.array([HAEMATOXYLIN, EOSIN]) + site.normal(0, 0.025, (2, 3)) + rng.normal(0, 0.03, (2, 3))
    amounts = np.exp(site.normal(0, 0.10, 2) + rng.normal(0, 0.14, 2))
    glass = 238.0 + rng.uniform(-6, 6) + rng.normal(0, 1.5, 3)
    return Look(
        stains_23=(stains / np.linalg.norm(stains, axis=1, keepdims=True)).astype(np.float32),
        amounts=(float(amounts[0]), float(amounts[1])),
        glass=glass.astype(np.float32),
        fibre=_fibres(rng, grain, spec.mpp),
        chromatin=1 + 0.22 * _texture(rng, 0.6 / spec.mpp),
        noise=rng.normal(0, NOISE, (TEXTURE_PX, TEXTURE_PX, 3)).astype(np.float32),
        edge=_texture(rng, 3.0 / spec.mpp),
    )


def draw_block(plan: Plan, look: Look, spec: SyntheticSpec, box: Box) -> tuple[Pixels, Mask]:
    """Pixels [H, W, 3] and lesion mask [H, W] of a part of a slide."""
    wide = Box(box.left - BLEED_PX, box.top - BLEED_PX, box.right + BLEED_PX, box.bottom + BLEED_PX)
    edge = EDGE * _repeat(look.edge, wide)
    tissue, focus, lymph = (_frayed(_enlarge(region, wide), edge) for region in (plan.tissue, plan.focus, plan.lymph))
    eosin, haematoxylin = _stain_amounts(plan, look, wide, np.maximum(focus, lymph))
    thickness = tissue * (1 + 0.75 * _enlarge(plan.fold, wide))
    # Chromatin is uneven where there is much of it: in nuclei.
    uneven = 1 + (_repeat(look.chromatin, wide) - 1) * np.clip(haematoxylin / 0.5, 0.25, 1)
    stain_h = haematoxylin * uneven * thickness * look.amounts[0]
    stain_e = eosin * (1 + 0.7 * (uneven - 1) + 0.06 * edge / EDGE) * thickness * look.amounts[1]
    density = stain_h[..., None] * look.stains_23[0] + stain_e[..., None] * look.stains_23[1]
    if spec.pen:
        density += _enlarge(plan.pen, wide)[..., None] * np.array(PENS[spec.pen], dtype=np.float32)
    light = cv2.GaussianBlur(np.exp(density * np.float32(-np.log(10))) * look.glass, (0, 0), 0.35 / spec.mpp)
    rgb = np.clip(light + _repeat(look.noise, wide) + 0.5, 0, 255).astype(np.uint8)
    lesion = (focus > 0.5) & (tissue > 0.5) if spec.lesion else np.zeros(tissue.shape, dtype=bool)
    inner = np.s_[BLEED_PX:-BLEED_PX, BLEED_PX:-BLEED_PX]
    return np.ascontiguousarray(rgb[inner]), lesion[inner]


def _stain_amounts(plan: Plan, look: Look, box: Box, sheet: Floats) -> tuple[Floats, Floats]:
    """Eosin and haematoxylin [H, W] in optical density: fibres, sheets of cells, and every outline over them."""
    fibre = _repeat(look.fibre, box)
    eosin = cv2.convertScaleAbs(STROMA[0] * fibre * (1 - sheet) + SHEET[0] * sheet)
    haematoxylin = cv2.convertScaleAbs(STROMA[1] * fibre * (1 - sheet) + SHEET[1] * sheet)
    for layer in plan.layers:
        _fill(layer, box, eosin, haematoxylin)
    return eosin.astype(np.float32) / 100, haematoxylin.astype(np.float32) / 100


def _fill(layer: Layer, box: Box, eosin: Pixels, haematoxylin: Pixels) -> None:
    """Draws the outlines of a layer that touch the block."""
    low, high = layer.outlines_NK2.min(axis=1), layer.outlines_NK2.max(axis=1)
    touches = (high >= (box.left, box.top)) & (low < (box.right, box.bottom))
    chosen = np.flatnonzero(touches.all(axis=1))
    corners = layer.outlines_NK2[chosen] - np.array([box.left, box.top], dtype=np.float32)
    fixed = np.rint(corners * 2**SUBPIXEL_BITS).astype(np.int32)
    values = zip(fixed, layer.eosin_N[chosen].tolist(), layer.haematoxylin_N[chosen].tolist(), strict=True)
    for outline, eosin_value, haematoxylin_value in values:
        cv2.fillPoly(eosin, [outline], eosin_value, shift=SUBPIXEL_BITS)
        cv2.fillPoly(haematoxylin, [outline], haematoxylin_value, shift=SUBPIXEL_BITS)
        if layer.rim:
            cv2.polylines(haematoxylin, [outline], True, haematoxylin_value + layer.rim, 1, shift=SUBPIXEL_BITS)


def _enlarge(cells: Floats, box: Box) -> Floats:
    """The part of a region map under a block, at level-0 pixels."""
    shift = [(box.left + 0.5) / CELL_PX - 0.5, (box.top + 0.5) / CELL_PX - 0.5]
    matrix = np.array([[1 / CELL_PX, 0, shift[0]], [0, 1 / CELL_PX, shift[1]]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    enlarged: Floats = cv2.warpAffine(
        cells, matrix, tuple(box.size), flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=0
    )
    return enlarged


def _frayed(region: Floats, edge: Floats) -> Floats:
    """A soft region map made narrow and rough at its edge, and left alone far from it."""
    return np.clip((region - 0.5 + edge * 4 * region * (1 - region)) * 6 + 0.5, 0, 1)


def _repeat(texture: Floats, box: Box) -> Floats:
    rows = np.arange(box.top, box.bottom) % TEXTURE_PX
    columns = np.arange(box.left, box.right) % TEXTURE_PX
    return texture.take(rows, axis=0).take(columns, axis=1)


def _texture(rng: np.random.Generator, sigma_px: float) -> Floats:
    """Repeating smooth noise with mean 0 and standard deviation 1."""
    return _filtered(rng, 0.0, sigma_px, sigma_px)


def _filtered(rng: np.random.Generator, grain: float, along_px: float, across_px: float) -> Floats:
    """Noise blurred along and across a direction, in Fourier space: it repeats without a seam, whatever the width."""
    fx, fy = (2 * np.pi * scipy.fft.rfftfreq(TEXTURE_PX))[None, :], (2 * np.pi * scipy.fft.fftfreq(TEXTURE_PX))[:, None]
    along, across = fx * np.cos(grain) + fy * np.sin(grain), fy * np.cos(grain) - fx * np.sin(grain)
    response = np.exp(-0.5 * ((along * along_px) ** 2 + (across * across_px) ** 2)).astype(np.float32)
    shape = (TEXTURE_PX, TEXTURE_PX)
    spectrum = scipy.fft.rfft2(rng.standard_normal(shape, dtype=np.float32))
    return _normal(scipy.fft.irfft2(spectrum * response, s=shape))


def _normal(field: Floats) -> Floats:
    result: Floats = (field - field.mean()) / field.std()
    return result


def _fibres(rng: np.random.Generator, grain: float, mpp: float) -> Floats:
    """Wavy bundles of collagen: noise stretched along the grain and bent, with pale clefts between the bundles."""
    fine, coarse = _filtered(rng, grain, 9.0 / mpp, 0.7 / mpp), _filtered(rng, grain, 24.0 / mpp, 2.2 / mpp)
    total: Floats = np.asarray(0.7 * fine + coarse)
    grid = np.indices(total.shape, dtype=np.float32)
    y, x = grid[0], grid[1]
    for bend_um, wave_um in ((26.0, 65.0), (3.0, 9.0)):
        x, y = x + bend_um / mpp * _texture(rng, wave_um / mpp), y + bend_um / mpp * _texture(rng, wave_um / mpp)
    bent: Floats = cv2.remap(total, x % TEXTURE_PX, y % TEXTURE_PX, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    bundles = _normal(bent)
    clefts = np.clip((-bundles - 1.25) / 0.6, 0, 1)
    return np.asarray(np.clip(1 + 0.16 * bundles, 0.5, 1.6) * (1 - 0.8 * clefts), dtype=np.float32)
