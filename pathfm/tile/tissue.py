"""Telling tissue from glass on a thumbnail: pictures in, masks out.

Tissue is coloured and uneven. Smear of stain is coloured but even, dust and shadows are uneven but grey, and ink of marker pens
lies on the glass with a colour of its own. ``docs/tissue.md`` says what that finds and what it misses.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from pathfm.errors import SlideError, UsageError
from pathfm.study import TissueSettings

Pixels = npt.NDArray[np.uint8]
Plane = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
MaskFunction = Callable[[Pixels, float | None], Mask]
"""A mask function of one's own: RGB thumbnail [h, w, 3] and its um per pixel (None: unknown) -> mask [h, w]."""

PLUGIN_GROUP = "pathfm.tissue"
DENSITY_RANGE = (0.08, 0.12)
"""Every piece of tissue must reach a stain density between these; Otsu says which."""
SURE_DENSITY = 0.2
"""What is stained this densely is tissue without a look at its texture."""
TEXTURE = 0.015
"""Standard deviation of stain density from which a place counts as uneven; glass has 0.004, smear of stain 0.006, fat 0.05."""
SEED_SHARE = 0.01
"""Uneven places are tissue when at least this share of the piece reaches the density threshold."""
LIGHT_RANGE = (0.04, 0.25)
"""On a dark background, the threshold on brightness is kept in this range [share of white]."""
ENTROPY_RANGE = (1.0, 1.6)
"""The threshold on local grey-level entropy is kept in this range [bit]."""
FLOOR = 0.01
"""Added to a measure before Otsu takes its logarithm, so that dark tissue does not hide pale tissue from it."""
LOG_STEP = 1 / 46
"""Measures are stored as bytes in steps of this much of their natural logarithm."""

DARK_LEVEL, DARK_SHARE, GLASS_LEVEL = 40, 0.3, 170
"""A background is dark where this share of the picture is below the first level and hardly anything reaches the last."""
GLASS_PERCENTILE, DARKEST_GLASS = 95, 150
"""Glass is the bright end of each channel, though never darker than this."""

WORK_MPP, SHORTEST_PX = 4.0, 256
"""Finer thumbnails are shrunk to this scale [um per px], unless that would make them smaller than this [px]."""
SMOOTH_UM = 8.0
"""Detail smaller than this is not tissue [um]."""
TEXTURE_UM = 80.0
"""Side of the square whose texture is measured [um]: fat cells and gaps between fibres are smaller."""
LIGHT_SMOOTH_UM = 32.0
"""On a dark background only nuclei may shine; what lies within this distance of them is tissue [um]."""
COLOURED_INK, BLACK_INK = 1, 2
INK_MPP, RIM_PX = 16.0, 4
"""Ink is judged at this scale [um per px] at the finest; there, the pale rims of strokes are up to so many pixels wide."""
INK_SHARE, INK_TRACE = 0.4, 0.1
"""Share of the pixels at a place that have the colour of ink in a stroke (worn and streaky ones too), and beside one."""
SMALLEST_STROKE_PX = 40
"""Strokes are larger than this at the scale ink is judged at [px]."""
INK_GLASS_SHARE = 0.6
"""Ink with a larger share of its surroundings free of tissue lies on glass."""
MAX_SPECK_SHARE = 0.1
"""Share of the picture that a piece may have to be dropped, or a hole to be filled."""
MAX_INK_SHARE = 0.5
"""A larger share of all tissue than this is not ink but a blue or green stain."""
ENTROPY_SIDE_PX, ENTROPY_LEVELS, ENTROPY_STEPS = 9, 16, 60
"""Entropy is that of this many grey levels within a square of this side; it is stored as bytes, in this many steps a bit."""
NOMINAL_MPP = 8.0
"""Scale taken for thumbnails of slides whose mpp is unknown [um per px]."""
STRIP_ROWS = 256
"""Rows worked on at once, which bounds the memory for real numbers."""


def tissue_mask(thumbnail: Pixels, mpp: float | None, settings: TissueSettings) -> Mask:
    """The tissue in a thumbnail [h, w, 3] as a mask [h, w].

    Pieces smaller than ``min_area_um2`` are dropped and holes up to ``max_hole_um2`` filled, whatever found the tissue; a
    thumbnail of unknown scale is taken to have ``NOMINAL_MPP``.

    Args:
        thumbnail: RGB picture of the whole slide.
        mpp: micrometres per thumbnail pixel, None when unknown.
        settings: method or plug-in, background, smallest piece and largest hole.

    Raises:
        SlideError: the background is dark though ``settings.background`` is bright, or the plug-in returned no mask.
        UsageError: the plug-in cannot be found.
    """
    scale = mpp or NOMINAL_MPP
    if settings.plugin is not None:
        mask = _plugin_mask(settings.plugin, thumbnail, mpp)
    elif settings.method == "off":
        return np.ones(thumbnail.shape[:2], dtype=bool)
    else:
        mask = _found(thumbnail, scale, settings)
    # Of a picture that is smaller than the smallest piece, neither all tissue nor all glass is a speck.
    most = MAX_SPECK_SHARE * mask.size
    mask = _drop_small(mask, min(settings.min_area_um2 / scale**2, most))
    return ~_drop_small(~mask, min(settings.max_hole_um2 / scale**2, most))


def _found(thumbnail: Pixels, scale: float, settings: TissueSettings) -> Mask:
    """Tissue by the settings' method, looked for at the working scale."""
    dark = settings.background == "dark"
    if not dark and has_dark_background(thumbnail):
        fix = "set tile.tissue.background=dark for fluorescence, or leave the slide out"
        raise SlideError("the background is dark: fluorescence, or an inverted picture", fix=fix)
    height, width = thumbnail.shape[:2]
    shrink = max(1.0, min(WORK_MPP / scale, min(height, width) / SHORTEST_PX))
    if shrink > 1:
        size = max(1, round(width / shrink)), max(1, round(height / shrink))
        thumbnail, scale = cv2.resize(thumbnail, size, interpolation=cv2.INTER_AREA), scale * shrink
    if settings.method == "entropy":
        mask = _textured(thumbnail.max(axis=2) if dark else cv2.cvtColor(thumbnail, cv2.COLOR_RGB2GRAY), scale)
    else:
        mask = _lit(thumbnail, scale) if dark else _stained(thumbnail, scale)
    closed = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, _disc(2))
    return np.asarray(cv2.resize(closed, (width, height), interpolation=cv2.INTER_NEAREST) > 0)


def has_dark_background(picture: Pixels) -> bool:
    """Whether a picture [h, w, 3] shows light on black, as fluorescence does; black around bright glass does not count."""
    sample = picture[::4, ::4]
    lit = sample.max(axis=2) >= DARK_LEVEL
    if not lit.any():
        return True
    glass = float(np.percentile(sample.min(axis=2)[lit], GLASS_PERCENTILE))
    return 1 - float(lit.mean()) >= DARK_SHARE and glass < GLASS_LEVEL


class _Stain(NamedTuple):
    """What a thumbnail shows, as bytes [h, w]: log stain density, 1 where that is uneven, and the kind of ink (0: none)."""

    level: Plane
    uneven: Plane
    ink: Plane


def _stained(thumbnail: Pixels, scale: float) -> Mask:
    """Tissue in transmitted light: dense, or uneven around something dense; not ink on glass."""
    stain = _measure_stain(thumbnail, scale)
    dense = stain.level > _threshold(stain.level, DENSITY_RANGE)
    sure = stain.level > _byte(SURE_DENSITY)
    # Smear runs out into the glass without an edge; the inside of pale, even tissue is cut off from the glass by its edges.
    closed = (stain.uneven > 0) | _seeded(stain.uneven == 0, dense, 0.5)
    # A window that only touches tissue is uneven too, half a window too far out: what counts has such windows all around.
    window = _window_px(scale, thumbnail)
    inside = cv2.erode(closed.view(np.uint8), np.ones((window, window), np.uint8)) > 0
    mask = _seeded(inside | sure, dense, SEED_SHARE)
    return mask & ~_ink_on_glass(stain.ink, mask, scale) if stain.ink.any() else mask


def _measure_stain(thumbnail: Pixels, scale: float) -> _Stain:
    height, width = thumbnail.shape[:2]
    result = _Stain(*(np.empty((height, width), np.uint8) for _ in _Stain._fields))
    glass = _glass_colour(thumbnail)
    ramp = np.arange(256, dtype=np.float32)[:, None]
    table = -np.log10(np.clip((ramp + 1) / (glass + 1), 1e-3, 1.0)).astype(np.float32)[None]
    grey = _is_grey(thumbnail)
    sigma, window = _sigma(SMOOTH_UM, scale), _window_px(scale, thumbnail)
    for outer, inner, place in _strips(height, window // 2 + round(4 * sigma) + 1):
        red, green, blue = cv2.split(cv2.LUT(np.ascontiguousarray(thumbnail[outer]), table))
        density = cv2.GaussianBlur(stain_density(red, green, blue, grey), (0, 0), sigma)
        result.level[place] = _bytes(density)[inner]
        result.uneven[place] = (_deviation(density, window) > TEXTURE)[inner]
        result.ink[place] = 0 if grey else ink_colour(red[inner], green[inner], blue[inner])
    return result


def _glass_colour(thumbnail: Pixels) -> Floats:
    """Red, green and blue of the glass [3]: dividing by it removes the lilac tint that some scanners give."""
    counts = np.stack([np.bincount(thumbnail[..., channel].reshape(-1), minlength=256) for channel in range(3)])
    reached = counts.cumsum(axis=1) >= GLASS_PERCENTILE / 100 * counts[0].sum()
    return np.asarray(np.maximum(reached.argmax(axis=1), DARKEST_GLASS), np.float32)


def _is_grey(picture: Pixels) -> bool:
    """Whether no pixel has any colour (a picture of one channel), so that colour cannot tell tissue."""
    red, green, blue = cv2.split(picture)
    return max(int(cv2.absdiff(red, green).max()), int(cv2.absdiff(green, blue).max())) <= 2


def stain_density(red: Floats, green: Floats, blue: Floats, grey: bool = False) -> Floats:
    """How densely stained each place [h, w] is, from the optical densities of its channels [h, w].

    The spread between the channels, and half the mean density as far as colour backs it: dust, shadows and the scanner's black
    borders are dense but grey. A picture without colour is judged by its mean density.
    """
    mean = np.asarray((red + green + blue) / 3, np.float32)
    if grey:
        return mean
    spread = cv2.subtract(cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue))
    return np.asarray(spread + np.minimum(0.5 * mean, 1.5 * spread), np.float32)


def ink_colour(red: Floats, green: Floats, blue: Floats) -> Plane:
    """Where optical densities [h, w] of the channels are those of marker ink, on glass or on tissue, and of which kind.

    Green and blue ink take more red than green light, which haematoxylin does not; red ink takes blue nearly as much as green,
    which eosin does not; black ink takes everything.
    """
    darkest = cv2.max(cv2.max(red, green), blue)
    brightest = cv2.min(cv2.min(red, green), blue)
    green_or_blue = (red > 0.12) & (red - green > 0.28 * red)
    red_ink = (green > 0.2) & (blue > 0.64 * green) & (red < 0.22 * green)
    kind = np.where(green_or_blue | red_ink, np.uint8(COLOURED_INK), np.uint8(0))
    kind[(brightest > 0.5) & (darkest - brightest < 0.3 * darkest)] = BLACK_INK
    return kind


def _ink_on_glass(ink: Plane, mask: Mask, scale: float) -> Mask:
    """The strokes of ink that lie on glass: most of what surrounds each is free of tissue.

    Ink over tissue stays (the tiles' own pen column tells it). So does coloured ink where it is more than half of the tissue:
    then it may be the stain.
    """
    height, width = mask.shape
    factor = min(1.0, scale / INK_MPP)
    small = (max(1, round(width * factor)), max(1, round(height * factor)))
    tissue = _covered(mask, small, 0.6)
    strokes = _drop_small(_covered(ink > 0, small, INK_SHARE), SMALLEST_STROKE_PX)
    count, labels = cv2.connectedComponents(strokes.astype(np.uint8), ltype=cv2.CV_16U)
    rims, ring = cv2.dilate(labels, _disc(RIM_PX)), cv2.dilate(labels, _disc(2 * RIM_PX))
    ring[(rims > 0) | _covered(ink > 0, small, INK_TRACE)] = 0
    around, touching = np.bincount(ring.reshape(-1), minlength=count), np.bincount(ring[tissue], minlength=count)
    on_glass = (touching <= (1 - INK_GLASS_SHARE) * around)[rims] & (rims > 0)
    coloured = _covered(ink == COLOURED_INK, small, INK_SHARE)
    if (coloured & on_glass & tissue).sum() > MAX_INK_SHARE * tissue.sum():
        return np.zeros_like(mask)
    return np.asarray(cv2.resize(on_glass.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0)


def _covered(mask: Mask, size: tuple[int, int], share: float) -> Mask:
    """The places of a smaller picture of which more than a share is covered by the mask."""
    return np.asarray(cv2.resize(mask.view(np.uint8) * 255, size, interpolation=cv2.INTER_AREA) > 255 * share)


def _lit(thumbnail: Pixels, scale: float) -> Mask:
    """Tissue on a dark background: what shines, and what lies close to it."""
    light = cv2.GaussianBlur(thumbnail.max(axis=2), (0, 0), _sigma(LIGHT_SMOOTH_UM, scale))
    table = _bytes(np.linspace(0, 1, 256, dtype=np.float32))
    level = np.asarray(table[light])
    return np.asarray(level > _threshold(level, LIGHT_RANGE))


def _textured(grey: Plane, scale: float) -> Mask:
    """Tissue by texture alone: grey levels [h, w] that differ within a few pixels, however pale or dark."""
    entropy = cv2.GaussianBlur(local_entropy(grey), (0, 0), _sigma(SMOOTH_UM, scale))
    otsu, _ = cv2.threshold(entropy, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    mask = entropy > np.clip(otsu, ENTROPY_RANGE[0] * ENTROPY_STEPS, ENTROPY_RANGE[1] * ENTROPY_STEPS)
    return np.asarray(cv2.erode(mask.astype(np.uint8), _disc(ENTROPY_SIDE_PX // 2)) > 0)


def local_entropy(grey: Plane) -> Plane:
    """Shannon entropy of the grey levels around each pixel [h, w], in ``ENTROPY_STEPS`` a bit: in tissue high however pale."""
    side, entropy = ENTROPY_SIDE_PX, np.empty_like(grey)
    share = np.clip(np.arange(256) / side**2, 1e-9, 1.0)
    table = np.rint(-share * np.log2(share) * ENTROPY_STEPS * 64).astype(np.uint16)
    for outer, inner, place in _strips(len(grey), side // 2):
        bins = grey[outer] // (256 // ENTROPY_LEVELS)
        total = np.zeros(bins.shape, np.uint16)
        for level in range(ENTROPY_LEVELS):
            count = cv2.boxFilter((bins == level).view(np.uint8), cv2.CV_8U, (side, side), normalize=False)
            cv2.add(total, cv2.LUT(count, table), dst=total)
        entropy[place] = (total >> 6)[inner]
    return entropy


def _strips(height: int, halo: int) -> Iterator[tuple[slice, slice, slice]]:
    """Strips of rows: the rows to work on (with a halo), which of these to keep, and where they go."""
    for top in range(0, height, STRIP_ROWS):
        bottom = min(top + STRIP_ROWS, height)
        first = max(0, top - halo)
        yield slice(first, min(bottom + halo, height)), slice(top - first, bottom - first), slice(top, bottom)


def _sigma(length_um: float, scale: float) -> float:
    return max(0.8, length_um / scale / 2)


def _window_px(scale: float, picture: Pixels) -> int:
    """Side of the texture window, odd [px]."""
    shorter: int = min(picture.shape[:2])
    return max(7, min(round(TEXTURE_UM / scale), shorter // 2)) | 1


def _deviation(measure: Floats, window: int) -> Floats:
    """Standard deviation within a square around each place."""
    mean = cv2.blur(measure, (window, window))
    variance = cv2.subtract(cv2.blur(cv2.multiply(measure, measure), (window, window)), cv2.multiply(mean, mean))
    return np.asarray(np.sqrt(np.maximum(variance, 0)), np.float32)


def _bytes(measure: Floats) -> Plane:
    """A measure from 0 to 2.5 as bytes, even steps of its logarithm."""
    logarithm = np.log((np.maximum(measure, 0) + FLOOR) / FLOOR)
    return np.asarray(np.minimum(logarithm / LOG_STEP + 0.5, 255), np.uint8)


def _byte(value: float) -> float:
    """Where a value lies on the scale of ``_bytes``."""
    return float(np.log((value + FLOOR) / FLOOR) / LOG_STEP)


def _threshold(level: Plane, allowed: tuple[float, float]) -> float:
    """Otsu's threshold (1979) of a measure stored as bytes, within the range of values that make sense."""
    otsu, _ = cv2.threshold(level, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return float(np.clip(otsu, _byte(allowed[0]), _byte(allowed[1])))


def _disc(radius: int) -> Plane:
    kernel: Plane = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    return kernel


def _seeded(mask: Mask, seeds: Mask, share: float) -> Mask:
    """The pieces of a mask that are seeds by this share at least."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    seeded = np.zeros(count, np.int64)
    for _, _, place in _strips(len(mask), 0):
        seeded += np.bincount(labels[place][seeds[place]], minlength=count)
    keep = seeded >= np.maximum(1, share * stats[:, cv2.CC_STAT_AREA])
    keep[0] = False
    return np.asarray(keep[labels])


def _drop_small(mask: Mask, area_px: float) -> Mask:
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= area_px
    keep[0] = False
    return np.asarray(keep[labels]) if count > 1 else mask


def _plugin_mask(name: str, thumbnail: Pixels, mpp: float | None) -> Mask:
    mask = load_plugin(name)(thumbnail.copy(), mpp)
    if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape != thumbnail.shape[:2]:
        got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, np.ndarray) else type(mask).__name__
        wanted = f"bool {list(thumbnail.shape[:2])}"
        raise SlideError(f"the tissue plug-in {name} returned {got}, not {wanted}", fix="return a mask of the thumbnail's size")
    return mask


def load_plugin(name: str) -> MaskFunction:
    """A mask function by ``module:function`` or by its name among the entry points ``pathfm.tissue``.

    Raises:
        UsageError: there is no such module, function or entry point.
    """
    where = "tile.tissue.plugin"
    if ":" not in name:
        points = {point.name: point.value for point in entry_points(group=PLUGIN_GROUP)}
        if name not in points:
            known = ", ".join(sorted(points)) or "none"
            fix = f"write module:function, or one of the installed ones: {known}"
            raise UsageError(f"no tissue plug-in is named {name}", where=where, fix=fix)
        name = points[name]
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, ValueError, AttributeError) as error:
        fix = "install the module where pathfm runs, and check both names"
        raise UsageError(f"the tissue plug-in {name} cannot be imported: {error}", where=where, fix=fix) from error
    if not callable(found):
        raise UsageError(f"the tissue plug-in {name} is not a function", where=where, fix="name a function")
    plugin: MaskFunction = found
    return plugin


def mask_fractions(mask: Mask, boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Share of each box [N, 4] (left, top, right, bottom in mask pixels, fractional) that is mask, by a summed-area table."""
    table = cv2.integral(mask.astype(np.uint8), sdepth=cv2.CV_64F)
    height, width = mask.shape
    edges = np.clip(boxes, 0, [width, height, width, height])
    left, top, right, bottom = edges.T
    total = _at(table, right, bottom) - _at(table, left, bottom) - _at(table, right, top) + _at(table, left, top)
    area = np.maximum((right - left) * (bottom - top), 1e-9)
    share: npt.NDArray[np.float32] = (total / area).astype(np.float32)
    return share


def _at(table: npt.NDArray[np.float64], x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A summed-area table read between pixels (bilinear, which is exact for it)."""
    x0 = np.minimum(np.floor(x).astype(int), table.shape[1] - 2)
    y0 = np.minimum(np.floor(y).astype(int), table.shape[0] - 2)
    dx, dy = x - x0, y - y0
    upper = table[y0, x0] * (1 - dx) + table[y0, x0 + 1] * dx
    lower = table[y0 + 1, x0] * (1 - dx) + table[y0 + 1, x0 + 1] * dx
    result: npt.NDArray[np.float64] = upper * (1 - dy) + lower * dy
    return result
