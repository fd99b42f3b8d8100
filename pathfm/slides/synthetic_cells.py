"""Outlines of everything that has one in a synthetic slide: nuclei, glands, lumens, fat cells.

Lengths in the constants are micrometres, in the arrays level-0 pixels. Benign and malignant sheets of cells are made of the
same stain in the same amount; they differ in the size, shape, spacing and order of their nuclei.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Random = np.random.Generator

CELL_PX = 8
"""Level-0 pixels per cell of the region maps."""
CORNERS = 14
"""Corners of a nucleus."""
GLAND_CORNERS = 48


class Stain(NamedTuple):
    """Eosin and haematoxylin [1/100 optical density], and the spread of the haematoxylin from object to object."""

    eosin: float
    haematoxylin: float
    spread: float = 0.0


SMALL_NUCLEUS, LARGE_NUCLEUS = Stain(22, 60, 8), Stain(22, 55, 9)
STROMA_NUCLEUS, GLAND_NUCLEUS = Stain(24, 52, 8), Stain(22, 54, 6)
GLAND_CYTOPLASM = Stain(22, 9)
WHITE = Stain(1, 0)
"""What lets the light through: lumens, vessels, fat."""


@dataclass(frozen=True)
class Layer:
    """Outlines that are filled one after the other, over those of the layers before.

    Attributes:
        outlines_NK2: corners [level-0 px].
        eosin_N: eosin of each [1/100 optical density].
        haematoxylin_N: haematoxylin of each [1/100 optical density].
        rim: haematoxylin added along the outline: the nuclear membrane.
    """

    outlines_NK2: Floats
    eosin_N: npt.NDArray[np.uint8]
    haematoxylin_N: npt.NDArray[np.uint8]
    rim: int = 0


def stroma_cells(rng: Random, where: Mask, mpp: float, grain: float) -> tuple[Layer, ...]:
    """Spindle nuclei of connective tissue, along the grain of its fibres."""
    centres_N2 = _scatter(rng, where, 19.0 / mpp, jitter=0.45)
    count = len(centres_N2)
    half_N = rng.uniform(3.4, 6.0, count) / mpp
    outlines = _ovals(rng, centres_N2, half_N, rng.uniform(0.24, 0.42, count), rng.normal(grain, 0.45, count), 0.06)
    return (_layer(rng, outlines, STROMA_NUCLEUS, rim=8),)


def lymphocytes(rng: Random, where: Mask, mpp: float) -> tuple[Layer, ...]:
    """Small, round, crowded, dark nuclei, and slit-like vessels between them."""
    gaps_N2, radii_N = _gaps(rng, where, mpp)
    centres_N2 = _away_from(_scatter(rng, where, 8.3 / mpp, jitter=0.2), gaps_N2, radii_N + 1.5 / mpp)
    count = len(centres_N2)
    nuclei = _ovals(
        rng, centres_N2, rng.normal(3.15, 0.25, count) / mpp, rng.uniform(0.86, 1.0, count), _angles(rng, count), 0.03
    )
    slits = _ovals(rng, gaps_N2, radii_N * 1.5, np.full(len(gaps_N2), 1 / 2.25), _angles(rng, len(gaps_N2)), 0.06)
    return _layer(rng, nuclei, SMALL_NUCLEUS, rim=10), _layer(rng, slits, WHITE)


def lesion_cells(rng: Random, where: Mask, mpp: float) -> tuple[Layer, ...]:
    """Large, misshapen, crowded nuclei of unequal size with nucleoli, around punched-out lumens: a cribriform carcinoma."""
    gaps_N2, radii_N = _gaps(rng, where, mpp)
    centres_N2 = _away_from(_scatter(rng, where, 14.15 / mpp, jitter=0.17), gaps_N2, radii_N + 3.5 / mpp)
    count = len(centres_N2)
    half_N = np.clip(rng.lognormal(np.log(6.1), 0.22, count), 4.2, 10.0) / mpp
    nuclei = _ovals(rng, centres_N2, half_N, rng.uniform(0.6, 1.0, count), _angles(rng, count), 0.11)
    lumens = _ovals(rng, gaps_N2, radii_N * 1.08, rng.uniform(0.75, 1.0, len(gaps_N2)), _angles(rng, len(gaps_N2)), 0.1)
    shifts_N2 = rng.normal(0, 1.4 / mpp, (count, 2))
    nucleoli = _ovals(rng, centres_N2 + shifts_N2, rng.uniform(0.9, 1.4, count) / mpp, np.ones(count), np.zeros(count), 0.1)
    return (
        _layer(rng, nuclei, LARGE_NUCLEUS, rim=14),
        _layer(rng, nucleoli, Stain(22, 92, 6)),
        _layer(rng, lumens, WHITE),
    )


def glands(rng: Random, where: Mask, mpp: float) -> tuple[Layer, ...]:
    """Benign glands: a ring of columnar nuclei at the base of a pale epithelium around an open lumen."""
    centres_N2 = _scatter(rng, where, 84.0 / mpp, jitter=0.1)
    count = len(centres_N2)
    radius_N = rng.uniform(28.0, 38.0, count) / mpp
    theta_K = np.linspace(0, 2 * np.pi, GLAND_CORNERS, endpoint=False)
    wave_NK = _wave(rng, count, theta_K, 0.10)
    squeeze_N, turn_N = rng.uniform(0.72, 1.0, count), _angles(rng, count)
    base = _place(centres_N2, radius_N[:, None] * wave_NK, theta_K, squeeze_N, turn_N)
    inner_NK = np.maximum(radius_N[:, None] * wave_NK - 17.0 / mpp, 5.0 / mpp)
    lumen = _place(centres_N2, inner_NK, theta_K, squeeze_N, turn_N)
    return (
        _layer(rng, base, GLAND_CYTOPLASM),
        _layer(rng, _columnar_nuclei(rng, base, centres_N2, mpp), GLAND_NUCLEUS, rim=8),
        _layer(rng, lumen, WHITE),
    )


def fat_cells(rng: Random, where: Mask, mpp: float) -> tuple[Layer, ...]:
    """Empty vacuoles with thin walls."""
    centres_N2 = _scatter(rng, where, 38.0 / mpp, jitter=0.035)
    count = len(centres_N2)
    outlines = _ovals(
        rng, centres_N2, rng.uniform(16.5, 19.0, count) / mpp, rng.uniform(0.9, 1.0, count), _angles(rng, count), 0.04
    )
    return (_layer(rng, outlines, WHITE),)


def _columnar_nuclei(rng: Random, base_NK2: Floats, centres_N2: Floats, mpp: float) -> Floats:
    """Nuclei side by side along the inside of each gland's outline, each pointing at the lumen."""
    ring_NK2 = (
        centres_N2[:, None] + (base_NK2 - centres_N2[:, None]) * (1 - 6.5 / mpp / _radii(base_NK2, centres_N2))[..., None]
    )
    step_NK2 = np.roll(ring_NK2, -1, axis=1) - ring_NK2
    # Walk every outline at an even pace: a nucleus wherever the walked length passes a multiple of the nuclei's width.
    walked = np.cumsum(np.hypot(step_NK2[..., 0], step_NK2[..., 1]), axis=1) / (5.4 / mpp)
    places: list[Floats] = []
    for ring_K2, walked_K in zip(ring_NK2, walked, strict=True):
        stops = np.arange(np.floor(walked_K[-1])) * (walked_K[-1] / np.floor(walked_K[-1]))
        closed_K2, at_K = np.vstack([ring_K2, ring_K2[:1]]), np.concatenate([[0.0], walked_K])
        places.append(np.stack([np.interp(stops, at_K, closed_K2[:, axis]) for axis in (0, 1)], axis=1).astype(np.float32))
    if not places:
        return np.zeros((0, CORNERS, 2), dtype=np.float32)
    owners = np.repeat(np.arange(len(places)), [len(each) for each in places])
    centres_M2 = np.vstack(places)
    inward_M2 = centres_N2[owners] - centres_M2
    count = len(centres_M2)
    angle_M = np.arctan2(inward_M2[:, 1], inward_M2[:, 0]) + rng.normal(0, 0.12, count)
    centres_M2 = centres_M2 + rng.normal(0, 0.5 / mpp, (count, 2)).astype(np.float32)
    return _ovals(rng, centres_M2, rng.uniform(4.2, 5.4, count) / mpp, rng.uniform(0.44, 0.56, count), angle_M, 0.04)


def _radii(outlines_NK2: Floats, centres_N2: Floats) -> Floats:
    offset = outlines_NK2 - centres_N2[:, None]
    return np.asarray(np.hypot(offset[..., 0], offset[..., 1]), dtype=np.float32)


def _gaps(rng: Random, where: Mask, mpp: float) -> tuple[Floats, Floats]:
    """Centres and radii of the white gaps in a sheet of cells: as many and as large in a lesion as in a lymphocyte field."""
    centres_N2 = _scatter(rng, where, 42.0 / mpp, jitter=0.3)
    kept = centres_N2[rng.random(len(centres_N2)) < 0.75]
    return kept, (rng.uniform(4.5, 10.0, len(kept)) / mpp).astype(np.float32)


def _away_from(points_N2: Floats, obstacles_M2: Floats, radii_M: Floats) -> Floats:
    """The points that lie in no obstacle."""
    if not len(obstacles_M2) or not len(points_N2):
        return points_N2
    keep_N: Mask = np.ones(len(points_N2), dtype=bool)
    for inside in cKDTree(points_N2).query_ball_point(obstacles_M2, radii_M):
        keep_N[inside] = False
    return points_N2[keep_N]


def _scatter(rng: Random, where: Mask, pitch_px: float, jitter: float) -> Floats:
    """Points [N, 2] (x, y) of a hexagonal grid, shaken, as far as they lie in the region."""
    height, width = where.shape[0] * CELL_PX, where.shape[1] * CELL_PX
    rows = np.arange(0, height, pitch_px * np.sqrt(0.75))
    columns = np.arange(0, width, pitch_px)
    x = columns[None, :] + pitch_px / 2 * (np.arange(len(rows)) % 2)[:, None]
    y = np.broadcast_to(rows[:, None], x.shape)
    points_N2 = np.stack([x.ravel(), y.ravel()], axis=1) + rng.normal(0, jitter * pitch_px, (x.size, 2))
    cell_N2 = np.floor(points_N2 / CELL_PX).astype(np.int64)
    on_map_N = np.all((cell_N2 >= 0) & (cell_N2 < where.shape[::-1]), axis=1)
    points_N2, cell_N2 = points_N2[on_map_N], cell_N2[on_map_N]
    return points_N2[where[cell_N2[:, 1], cell_N2[:, 0]]].astype(np.float32)


def _angles(rng: Random, count: int) -> npt.NDArray[np.float64]:
    return rng.uniform(0, np.pi, count)


def _wave(rng: Random, count: int, theta_K: npt.NDArray[np.float64], roughness: float) -> npt.NDArray[np.float64]:
    """Radius of irregular outlines [N, K] around 1: three low harmonics."""
    order_H = np.array([2, 3, 5])
    height_NH = rng.normal(0, roughness, (count, 3)) / np.array([1.0, 1.2, 1.8])
    phase_NH = rng.uniform(0, 2 * np.pi, (count, 3))
    waves = height_NH[..., None] * np.cos(order_H[:, None] * theta_K + phase_NH[..., None])
    return np.asarray(1 + waves.sum(axis=1))


def _ovals(
    rng: Random,
    centres_N2: npt.NDArray[np.floating],
    half_N: npt.NDArray[np.floating],
    aspect_N: npt.NDArray[np.floating],
    angle_N: npt.NDArray[np.floating],
    roughness: float,
) -> Floats:
    """Irregular ovals [N, K, 2] with the given half long axes, aspects (short over long) and directions."""
    theta_K = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    radius_NK = half_N[:, None] * _wave(rng, len(centres_N2), theta_K, roughness)
    return _place(centres_N2, radius_NK, theta_K, aspect_N, angle_N)


def _place(
    centres_N2: npt.NDArray[np.floating],
    radius_NK: npt.NDArray[np.floating],
    theta_K: npt.NDArray[np.floating],
    aspect_N: npt.NDArray[np.floating],
    angle_N: npt.NDArray[np.floating],
) -> Floats:
    along = radius_NK * np.cos(theta_K)
    across = radius_NK * np.sin(theta_K) * aspect_N[:, None]
    cosine, sine = np.cos(angle_N)[:, None], np.sin(angle_N)[:, None]
    x = centres_N2[:, :1] + along * cosine - across * sine
    y = centres_N2[:, 1:] + along * sine + across * cosine
    return np.stack([x, y], axis=-1).astype(np.float32)


def _layer(rng: Random, outlines_NK2: Floats, stain: Stain, rim: int = 0) -> Layer:
    count = len(outlines_NK2)
    haematoxylin = np.clip(rng.normal(stain.haematoxylin, stain.spread, count), 0, 200)
    return Layer(outlines_NK2, np.full(count, stain.eosin).astype(np.uint8), haematoxylin.astype(np.uint8), rim)
