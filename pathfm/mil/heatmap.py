"""Tile scores over the slide's thumbnail: arrays in, a picture out, and a writer.

Attention is shown as its rank within the slide. Raw attention sums to one per bag, so its size depends on how many tiles there
are; ranks compare across slides, but they say "most looked at here", not "lesion", and nothing of the sign of the prediction.
Gradient x input has a sign, and is shown as it is: red tiles speak for the class, blue ones against it.

Legend: N tiles, C maps (1, or one per class), h x w px of a picture.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import rankdata

from pathfm.geometry import Size, scale_length
from pathfm.slides.heat_layer import HeatGrid, paint_tiles
from pathfm.store.commit import commit_file

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]
Kind = Literal["attention", "gradient x input"]

ALPHA = 0.55
"""Opacity of the colours over the tissue."""
FOOT_PX, TITLE_PX, GAP_PX, MARGIN_PX = 66, 26, 12, 10
"""Heights of the strips under and over a picture, gap between pictures, and margin within strips [px]."""
LEAST_WIDTH_PX, MOST_PX = 420, 2048
"""Narrower pictures are enlarged, or else get a white border, since the strip needs room; longer ones are shrunk."""
LEAST_TILE_PX = 4
"""Pictures are enlarged until a tile has this side."""
BESIDE = 3
"""Maps of so many classes lie side by side."""
BAR_SHARE = 0.25
"""Longest part of the picture's width that the scale bar takes."""
INK, PAPER, GREY = (40, 40, 40), 255, (150, 150, 150)
SIGNED = ((20, 80, 180), (90, 160, 225), (247, 247, 247), (240, 110, 80), (190, 15, 30))
"""Blue, white, red: told apart with colour-blindness too."""
FONT = ImageFont.load_default(12)
"""The one that Pillow brings along; it has ASCII only."""
END_SHARE = 0.99
"""Share of the tiles whose signed values lie within the colours; what lies beyond has the last colour."""


@dataclass(frozen=True)
class Canvas:
    """What the scores are drawn on.

    Attributes:
        thumbnail: RGB picture of the whole slide [h, w, 3].
        downsample: level-0 px per thumbnail px.
        mpp_level0: micrometres per level-0 px along x, None when unknown (then there is no scale bar).
        lesion: mask of the whole slide at any resolution, outlined when given.
        synthetic: the positions are those of a mosaic, and the picture says so.
    """

    thumbnail: Pixels
    downsample: float
    mpp_level0: float | None = None
    lesion: NDArray[np.bool_] | None = None
    synthetic: bool = False


@dataclass(frozen=True)
class SlideHeat:
    """What a model made of the tiles of a slide: all tiles of its store, in their order.

    Attributes:
        slide_id: the slide.
        xy_level0: upper left corners [N, 2].
        sides_level0: width and height of a tile, which differ where pixels are not square.
        value_NC: scores; NaN: the tile was not looked at.
        names: of the maps; a single map may have "".
        kind: what the scores are.
        logit_NC: of attention, before the softmax.
        main: number of the map that stands for all where one is shown.
    """

    slide_id: str
    xy_level0: NDArray[np.int64]
    sides_level0: tuple[float, float]
    value_NC: Floats
    names: tuple[str, ...] = ("",)
    kind: Kind = "attention"
    logit_NC: Floats | None = None
    main: int = 0

    @property
    def shown_NC(self) -> Floats:
        """What pictures and layers show: the percentile of attention, each map for itself, or signed values as they are."""
        if self.kind == "attention":
            return np.stack([attention_percentile(value_N) for value_N in self.value_NC.T], axis=1)
        return self.value_NC

    @property
    def limit(self) -> float:
        """End of the signed colours, the same for all maps of the slide."""
        size = np.abs(self.value_NC[np.isfinite(self.value_NC)])
        return float(np.quantile(size, END_SHARE, method="higher")) if size.any() else 1.0


def attention_percentile(attention_N: Floats) -> Floats:
    """Rank of each tile's attention within its slide, in 0..1; ties share the middle, a lone tile gets 0.5, NaN stays NaN."""
    known = np.isfinite(attention_N)
    percentile = np.full(len(attention_N), np.nan)
    percentile[known] = (rankdata(attention_N[known]) - 0.5) / max(1, known.sum())
    return percentile


def all_tiles(value_KC: Floats, kept_K: NDArray[np.int64], count: int) -> Floats:
    """Values of the tiles that a network was given, as rows of all ``count`` tiles [N, C]; NaN for the others."""
    value_NC = np.full((count, *value_KC.shape[1:]), np.nan)
    value_NC[kept_K] = value_KC
    return value_NC


def draw_heatmap(canvas: Canvas, heat: SlideHeat, place: int | None = None, most_px: int = MOST_PX) -> Pixels:
    """The thumbnail with its tiles coloured, a colour bar and, where known, a scale bar.

    Where tiles overlap, a pixel has their mean. Tiles that were not looked at are hatched in grey. Very small slides are
    enlarged, very large pictures shrunk.

    Args:
        canvas: thumbnail and what is known of it.
        heat: scores of the tiles.
        place: number of the map; default: the main one.
        most_px: longest side of the picture without its strip.
    """
    place = heat.main if place is None else place
    height, width = canvas.thumbnail.shape[:2]
    picture = _resized(canvas, heat, most_px)
    # Per axis: rounding the sides of the picture must not move its tiles.
    step = (canvas.downsample * width / picture.shape[1], canvas.downsample * height / picture.shape[0])
    grid = HeatGrid((0.0, 0.0), step, Size(picture.shape[1], picture.shape[0]))
    shown_hw = paint_tiles(heat.xy_level0, heat.sides_level0, heat.shown_NC[:, place], grid)
    tiles_hw = paint_tiles(heat.xy_level0, heat.sides_level0, np.zeros(len(heat.xy_level0)), grid)
    if heat.kind != "attention":
        # The tissue in grey: its own pink and violet would be taken for colours of the map.
        picture = np.asarray(cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB), dtype=np.uint8)
    seen, unseen = np.isfinite(shown_hw), np.isfinite(tiles_hw) & ~np.isfinite(shown_hw)
    blended = cv2.addWeighted(_colours(np.nan_to_num(shown_hw), heat), ALPHA, picture, 1 - ALPHA, 0)
    picture[seen] = blended[seen]
    picture[unseen] = picture[unseen] // 2 + PAPER // 2
    picture[unseen & _hatch(*picture.shape[:2])] = GREY
    if canvas.lesion is not None:
        _outline(picture, canvas.lesion)
    if picture.shape[1] < LEAST_WIDTH_PX:
        picture = np.pad(picture, ((0, 0), (0, LEAST_WIDTH_PX - picture.shape[1]), (0, 0)), constant_values=PAPER)
    um_per_px = canvas.mpp_level0 * step[0] if canvas.mpp_level0 and not canvas.synthetic else None
    legend = (
        heat.kind if heat.kind != "attention" else "",
        "hatched: not looked at" if unseen.any() else "",
        "outline: lesion" if canvas.lesion is not None and canvas.lesion.any() else "",
        "mosaic, not tissue" if canvas.synthetic else "",
    )
    foot = _foot(picture.shape[1], heat, heat.names[place], um_per_px)
    _write(foot, "   ".join(filter(None, legend)), (MARGIN_PX, 45), picture.shape[1] - 2 * MARGIN_PX)
    return np.concatenate([picture, foot])


def draw_class_maps(canvas: Canvas, heat: SlideHeat) -> Pixels:
    """All maps of a slide side by side, each under its name; signed colours have one scale."""
    panels, columns = [], min(BESIDE, len(heat.names))
    for place, name in enumerate(heat.names):
        panel = draw_heatmap(canvas, heat, place, MOST_PX // columns)
        title: Pixels = np.full((TITLE_PX, panel.shape[1], 3), PAPER, dtype=np.uint8)
        _write(title, name, (MARGIN_PX, 7), panel.shape[1] - 2 * MARGIN_PX)
        panels.append(np.pad(np.concatenate([title, panel]), ((0, GAP_PX), (0, GAP_PX), (0, 0)), constant_values=PAPER))
    panels += [np.full_like(panels[0], PAPER)] * (-len(panels) % columns)
    rows = [np.concatenate(panels[start : start + columns], axis=1) for start in range(0, len(panels), columns)]
    return np.concatenate(rows)[:-GAP_PX, :-GAP_PX]


def write_heatmap(path: Path, picture: Pixels) -> None:
    """Writes an RGB picture as PNG, whole or not at all."""
    encoded = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1]
    with commit_file(path) as temporary:
        temporary.write_bytes(encoded.tobytes())


def tile_colours(heat: SlideHeat, place: int) -> Pixels:
    """RGB [N, 3] of each tile as the map shows it; grey where it was not looked at."""
    shown_N = heat.shown_NC[:, place]
    colours = _colours(np.nan_to_num(shown_N)[:, None], heat)[:, 0]
    colours[~np.isfinite(shown_N)] = GREY
    return colours


def _resized(canvas: Canvas, heat: SlideHeat, most_px: int) -> Pixels:
    """The thumbnail, large enough for its strip and its tiles, within bounds."""
    height, width = canvas.thumbnail.shape[:2]
    tile_px = max(min(heat.sides_level0) / canvas.downsample, LEAST_TILE_PX / most_px)
    wanted = max(1.0, LEAST_WIDTH_PX / width, LEAST_TILE_PX / tile_px)
    factor = min(wanted, most_px / max(width, height))
    size = Size(scale_length(width, factor), scale_length(height, factor))
    way = cv2.INTER_AREA if factor < 1.0 else cv2.INTER_NEAREST
    return np.array(cv2.resize(canvas.thumbnail, size, interpolation=way), dtype=np.uint8)


def _colours(shown: Floats, heat: SlideHeat) -> Pixels:
    """RGB of values [h, w]: percentiles in viridis (even to the eye, readable in grey), signed values from blue to red."""
    if heat.kind == "attention":
        scaled = np.rint(np.clip(shown, 0, 1) * 255).astype(np.uint8)
        return np.asarray(cv2.cvtColor(cv2.applyColorMap(scaled, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB), dtype=np.uint8)
    place = np.clip(shown / heat.limit, -1, 1)
    stops = np.linspace(-1, 1, len(SIGNED))
    bands = [np.interp(place, stops, band) for band in np.asarray(SIGNED, dtype=np.float64).T]
    return np.asarray(np.rint(np.stack(bands, axis=-1)), dtype=np.uint8)


def _hatch(height: int, width: int) -> NDArray[np.bool_]:
    return np.asarray(np.add.outer(np.arange(height), np.arange(width)) % 6 < 2)


def _outline(picture: Pixels, lesion: NDArray[np.bool_]) -> None:
    """Black with a white core: seen on every colour of both maps."""
    mask = cv2.resize(lesion.astype(np.uint8), (picture.shape[1], picture.shape[0]), interpolation=cv2.INTER_NEAREST)
    contours = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0]
    cv2.drawContours(picture, contours, -1, (0, 0, 0), 4)
    cv2.drawContours(picture, contours, -1, (255, 255, 255), 2)


def _foot(width: int, heat: SlideHeat, name: str, um_per_px: float | None) -> Pixels:
    """The strip under a picture: colour bar with its ends, and the scale bar; room for a line below."""
    foot: Pixels = np.full((FOOT_PX, width, 3), PAPER, dtype=np.uint8)
    bar = width * 2 // 5
    attends = heat.kind == "attention"
    ends = (0.0, 1.0) if attends else (-heat.limit, heat.limit)
    foot[10:20, MARGIN_PX : MARGIN_PX + bar] = _colours(np.linspace(*ends, bar)[None, :].repeat(10, axis=0), heat)
    label = "0   attention percentile" if attends else "against"
    _write(foot, label, (MARGIN_PX, 25), bar)
    room = bar - _length(f"{label}  ")
    far = "1" if attends else _cut(f"for {name}" if name else "for", room)
    _write(foot, far, (MARGIN_PX + bar - _length(far), 25), room)
    if um_per_px:
        length_um = _round_length(um_per_px * width * BAR_SHARE)
        length = scale_length(length_um, 1 / um_per_px)
        foot[13:17, width - MARGIN_PX - length : width - MARGIN_PX] = INK
        label = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} um"
        _write(foot, label, (width - MARGIN_PX - max(length, _length(label)), 25), max(length, _length(label)))
    return foot


def _round_length(most_um: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is not longer."""
    power = 10.0 ** np.floor(np.log10(most_um))
    return float(max(step * power for step in (1, 2, 5) if step * power <= most_um * (1 + 1e-9)))


def _length(text: str) -> int:
    return scale_length(FONT.getlength(text), 1.0)


def _cut(text: str, room_px: int) -> str:
    """The text, cut where it is longer than there is room; letters lose their accents, others that are not ASCII are "?"."""
    bare = (letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    text = "".join(letter if letter.isascii() else "?" for letter in bare)
    shown = text
    while shown and _length(shown) > room_px:
        text = text[:-1]
        shown = f"{text}..." if text else ""
    return shown


def _write(picture: Pixels, text: str, corner: tuple[int, int], room_px: int) -> None:
    image = Image.fromarray(picture)
    ImageDraw.Draw(image).text(corner, _cut(text, room_px), fill=INK, font=FONT)
    picture[:] = np.asarray(image)
