"""Attention over the slide's thumbnail: arrays in, a picture out, and a writer.

Attention is shown as its rank within the slide. Raw attention sums to one per bag, so its size depends on how many tiles there
are; ranks compare across slides, but they say "most looked at here", not "lesion", and nothing of the sign of the prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from pathfm.geometry import scale_length, scale_point
from pathfm.store.commit import commit_file

Pixels = NDArray[np.uint8]

ALPHA = 0.55
"""Opacity of the colours over the tissue."""
FOOT_PX = 46
"""Height of the strip that carries the colour bar and the scale bar [px]."""
LEAST_WIDTH_PX = 420
"""Narrower pictures are enlarged: the strip needs room."""
OUTLINE = (230, 0, 38)
"""Colour of the lesion outline; no colour of the map is near it."""
INK = (40, 40, 40)


@dataclass(frozen=True)
class Canvas:
    """What the attention is drawn on.

    Attributes:
        thumbnail: RGB picture of the whole slide [h, w, 3].
        downsample: level-0 px per thumbnail px.
        mpp_level0: micrometres per level-0 px, None when unknown (then there is no scale bar).
        lesion: mask of the whole slide at any resolution, outlined when given.
        synthetic: the positions are those of a mosaic, and the picture says so.
    """

    thumbnail: Pixels
    downsample: float
    mpp_level0: float | None = None
    lesion: NDArray[np.bool_] | None = None
    synthetic: bool = False


def attention_percentile(attention_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank of each tile's attention within its slide, in 0..1; ties share the middle, a lone tile gets 0.5."""
    return np.asarray((rankdata(attention_N) - 0.5) / len(attention_N))


def draw_heatmap(canvas: Canvas, xy_level0: NDArray[np.int64], side_level0: float, attention_N: NDArray[np.float64]) -> Pixels:
    """The thumbnail with its tiles coloured by attention percentile, a colour bar and, where known, a scale bar.

    Args:
        canvas: thumbnail and what is known of it.
        xy_level0: upper left corners of the tiles [N, 2].
        side_level0: side of a tile [level-0 px].
        attention_N: attention of the tiles.
    """
    height, width = canvas.thumbnail.shape[:2]
    factor = max(1.0, LEAST_WIDTH_PX / width)
    shown = (scale_length(width, factor), scale_length(height, factor))
    picture = canvas.thumbnail.copy()
    if factor > 1:
        picture = np.asarray(cv2.resize(picture, shown, interpolation=cv2.INTER_NEAREST), dtype=np.uint8)
    px_per_level0 = picture.shape[1] / width / canvas.downsample
    heat, covered = _empty_map(picture.shape[0], picture.shape[1])
    for (x, y), value in zip(xy_level0.tolist(), attention_percentile(attention_N), strict=True):
        left, top = scale_point(x, y, px_per_level0)
        right, bottom = scale_point(x + side_level0, y + side_level0, px_per_level0)
        place = np.s_[max(0, top) : max(bottom, top + 1, 0), max(0, left) : max(right, left + 1, 0)]
        heat[place], covered[place] = value, True
    blended = cv2.addWeighted(_colours(heat), ALPHA, picture, 1 - ALPHA, 0)
    picture[covered] = blended[covered]
    if canvas.lesion is not None:
        _outline(picture, canvas.lesion)
    um_per_px = canvas.mpp_level0 / px_per_level0 if canvas.mpp_level0 else None
    return np.concatenate([picture, _foot(picture.shape[1], um_per_px, canvas.synthetic)])


def write_heatmap(path: Path, picture: Pixels) -> None:
    """Writes an RGB picture as PNG, whole or not at all."""
    encoded = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1]
    with commit_file(path) as temporary:
        temporary.write_bytes(encoded.tobytes())


def _empty_map(height: int, width: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    return np.zeros((height, width)), np.zeros((height, width), dtype=np.bool_)


def _colours(value: NDArray[np.float64]) -> Pixels:
    """Viridis: perceptually uniform, and readable with colour-blindness and in grey."""
    scaled = np.rint(np.clip(value, 0, 1) * 255).astype(np.uint8)
    return np.asarray(cv2.cvtColor(cv2.applyColorMap(scaled, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB), dtype=np.uint8)


def _outline(picture: Pixels, lesion: NDArray[np.bool_]) -> None:
    mask = cv2.resize(lesion.astype(np.uint8), (picture.shape[1], picture.shape[0]), interpolation=cv2.INTER_NEAREST)
    contours = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0]
    cv2.drawContours(picture, contours, -1, OUTLINE, 2)


def _foot(width: int, um_per_px: float | None, synthetic: bool) -> Pixels:
    foot: Pixels = np.full((FOOT_PX, width, 3), 255, dtype=np.uint8)
    bar = width * 2 // 5
    foot[10:20, 10 : 10 + bar] = _colours(np.linspace(0, 1, bar)[None, :].repeat(10, axis=0))
    _write(foot, "0  attention percentile  1", 10)
    if synthetic:
        _write(foot, "mosaic, not tissue", 20 + bar)
    elif um_per_px:
        length_um = _round_length(um_per_px * width / 4)
        length = scale_length(length_um, 1 / um_per_px)
        foot[13:17, width - 10 - length : width - 10] = INK
        _write(foot, f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} um", width - 10 - length)
    return foot


def _round_length(most_um: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is not longer."""
    power = 10.0 ** np.floor(np.log10(most_um))
    return float(max(step * power for step in (1, 2, 5) if step * power <= most_um * (1 + 1e-9)))


def _write(picture: Pixels, text: str, left: int) -> None:
    cv2.putText(picture, text, (left, 36), cv2.FONT_HERSHEY_SIMPLEX, 0.4, INK, 1, cv2.LINE_AA)
