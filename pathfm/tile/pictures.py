"""Pictures by which a person checks a tiling: the whole slide with the fate of every tile, and a sheet of its tiles.

Arrays in, arrays out. Colours are those of Okabe & Ito (2008), which colour-blind eyes tell apart; their pink is left out, for
it cannot be seen on stained tissue. The built-in font knows ASCII only, so nothing but labels, counts and captions is written
into a picture; the slide's name belongs to the file.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from pathfm.errors import StoreError
from pathfm.geometry import Size, fit_within, scale_length

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Colour = tuple[int, int, int]

LONGEST_PX = 1600
"""Longer side of an overlay at most [px]."""
LEAST_PX = 512
"""Smaller overlays are enlarged by a whole number, and narrower ones get a margin: the legend needs room."""
OUTLINED_PX = 7.0
"""Tiles with a shorter side in the picture are filled: outlines would hide what is in them."""
REMOVED_OPACITY, KEPT_OPACITY = (0.55, 0.8), (0.0, 0.3)
"""How strongly tiles are tinted: with an outline, and without one."""
SHOWN_BITS = np.uint8(0xFC)
"""Bits of the slide's picture that an overlay keeps: 64 levels look the same, and make the file a third smaller."""
KEPT, NO_TISSUE = "kept", "no tissue"
COLOURS: dict[str, Colour] = {
    KEPT: (0, 158, 115),
    "white": (150, 150, 150),
    "pen": (213, 94, 0),
    "blur": (240, 228, 66),
    "damage": (86, 180, 233),
    "black": (0, 114, 178),
    "unreadable": (0, 0, 0),
    "outside": (110, 60, 160),
}
"""Colour of a tile by its fate, in the order of the legend."""
OTHER_COLOURS: tuple[Colour, ...] = ((230, 159, 0), (150, 90, 40), (255, 255, 255), (60, 60, 60))
"""Colours of fates that are not named above, in alphabetical order."""
INK: Colour = (27, 37, 48)
PAPER = 255
FONT_PX, LINE_PX, GAP_PX = 13, 18, 8
SHEET_TILE_PX = 224
"""Side of a tile on a contact sheet at most [px]."""


class _Entry(NamedTuple):
    """One entry of the legend: its text, the colour of its swatch (None: no swatch), and whether that is filled."""

    text: str
    colour: Colour | None
    filled: bool = True


def overlay(
    thumbnail: Pixels,
    downsample: float,
    mask: Mask | None,
    boxes_level0: npt.NDArray[np.floating],
    fates: Sequence[str],
    mpp_level0: float | None = None,
) -> Pixels:
    """The slide with its tissue outline and the fate of its tiles, a legend with counts, and a scale bar.

    Kept tiles are outlined (when small: tinted), removed ones tinted by reason, tiles without tissue only counted. Of
    overlapping tiles the later one lies on top.

    Args:
        thumbnail: RGB picture of the whole slide [h, w, 3]; shown with at most ``LONGEST_PX`` on its longer side.
        downsample: level-0 px per thumbnail px.
        mask: the tissue of the whole slide, at any resolution; None: no outline.
        boxes_level0: left, top, right, bottom of the tiles [N, 4]; may reach beyond the slide.
        fates: what became of each tile [N]: ``kept``, ``no tissue``, or why it was removed.
        mpp_level0: micrometres per level-0 px, None when unknown; then the legend says so.

    Returns:
        RGB pixels.
    """
    picture = _canvas(thumbnail)
    px_per_level0 = picture.shape[1] / (thumbnail.shape[1] * downsample)
    colours = _colours(fates)
    _paint_tiles(picture, np.asarray(boxes_level0, dtype=np.float64) * px_per_level0, fates, colours)
    if mask is not None:
        _outline_tissue(picture, mask)
    counts = Counter(fates)
    entries = [_Entry(f"{fate} {counts[fate]:,}", colour, fate != KEPT) for fate, colour in colours.items()]
    if counts[NO_TISSUE]:
        entries.append(_Entry(f"{NO_TISSUE} {counts[NO_TISSUE]:,} (not drawn)", None))
    if mask is not None:
        entries.append(_Entry("tissue", INK, filled=False))
    margin = max(0, LEAST_PX - picture.shape[1])
    picture = np.pad(picture, ((0, 0), (0, margin), (0, 0)), constant_values=PAPER) if margin else picture
    return np.concatenate([picture, _foot(picture.shape[1], entries, mpp_level0 / px_per_level0 if mpp_level0 else None)])


def contact_sheet(tiles: Sequence[Pixels], captions: Sequence[str], columns: int = 4, mpp: float | None = None) -> Pixels:
    """Tiles side by side with a caption under each.

    Args:
        tiles: RGB pixels [H, W, 3] each; shown with at most ``SHEET_TILE_PX`` on the longer side, never enlarged.
        captions: ASCII text for each tile; lines are separated by newlines and cut where they are too long.
        columns: tiles per row.
        mpp: micrometres per tile px; then a scale bar is drawn.

    Returns:
        RGB pixels; a small sheet that says so when there is no tile.
    """
    if not tiles:
        return _foot(LEAST_PX, [_Entry("no tiles", None)], None, scale_bar=False)
    shown = [_shrunk(tile, SHEET_TILE_PX) for tile in tiles]
    side = max(max(tile.shape[:2]) for tile in shown)
    text_px = LINE_PX * max(caption.count("\n") + 1 for caption in captions)
    step_x, step_y = side + GAP_PX, side + text_px + GAP_PX
    sheet: Pixels = np.full((math.ceil(len(shown) / columns) * step_y + GAP_PX, columns * step_x + GAP_PX, 3), PAPER, np.uint8)
    places = [(GAP_PX + index % columns * step_x, GAP_PX + index // columns * step_y) for index in range(len(shown))]
    for (left, top), tile in zip(places, shown, strict=True):
        sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    image = Image.fromarray(sheet)
    pen = ImageDraw.Draw(image)
    for (left, top), caption in zip(places, captions, strict=True):
        for line, text in enumerate(caption.split("\n")):
            pen.text((left, top + side + line * LINE_PX + 1), _cut(text, side), fill=INK, font=_font())
    sheet = np.array(image)
    if mpp is None:
        return sheet
    um_per_px = mpp * tiles[0].shape[1] / shown[0].shape[1]
    return np.concatenate([sheet, _foot(sheet.shape[1], [], um_per_px, most_px=side)])


def sample_evenly(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` of the indices 0 .. count - 1, spread evenly, from the middle of equal stretches."""
    wanted = min(count, wanted)
    return [(2 * index + 1) * count // (2 * wanted) for index in range(wanted)]


def png_bytes(picture: Pixels) -> bytes:
    """RGB pixels [h, w, 3] as PNG; the same pixels give the same bytes.

    Runs are all that is searched for: on pictures of tissue that packs as tightly as a full search, in half the time.
    """
    settings = [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    done, data = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), settings)
    if not done:
        raise StoreError(f"a picture of {picture.shape[1]} x {picture.shape[0]} px cannot be written as PNG")
    encoded: bytes = data.tobytes()
    return encoded


def _shrunk(pixels: Pixels, longest_px: int) -> Pixels:
    size, downsample = fit_within(Size(pixels.shape[1], pixels.shape[0]), longest_px)
    if downsample == 1:
        return pixels
    return np.asarray(cv2.resize(pixels, tuple(size), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _canvas(thumbnail: Pixels) -> Pixels:
    """A copy to draw on, neither too large nor too small."""
    picture = _shrunk(thumbnail, LONGEST_PX) & SHOWN_BITS
    factor = math.ceil(LEAST_PX / max(picture.shape[:2]))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1) if factor > 1 else picture


def _colours(fates: Sequence[str]) -> dict[str, Colour]:
    """The colour of every fate that occurs and is drawn, in the order of the legend; ``kept`` is always there."""
    found = set(fates) - {NO_TISSUE}
    others = sorted(found - COLOURS.keys())
    named = {fate: colour for fate, colour in COLOURS.items() if fate in found or fate == KEPT}
    return named | {fate: OTHER_COLOURS[index % len(OTHER_COLOURS)] for index, fate in enumerate(others)}


def _paint_tiles(picture: Pixels, boxes_px: npt.NDArray[np.float64], fates: Sequence[str], colours: dict[str, Colour]) -> None:
    """Draws all tiles at once: each pixel learns whose it is, and colours and outlines follow from that."""
    codes = {fate: code for code, fate in enumerate(colours, start=1)}
    code_N = np.array([codes.get(fate, 0) for fate in fates], dtype=np.uint8)
    drawn = np.flatnonzero(code_N)
    if not len(drawn):
        return
    height, width = picture.shape[:2]
    edges = np.rint(boxes_px[drawn]).astype(np.int64)
    edges[:, 2:] = np.maximum(edges[:, 2:], edges[:, :2] + 1)
    edges = edges.clip(0, [width, height, width, height])
    owner = np.zeros((height, width), dtype=np.int32)
    for number, (left, top, right, bottom) in enumerate(edges.tolist(), start=1):
        owner[top:bottom, left:right] = number
    fate = np.append(np.uint8(0), code_N[drawn])[owner]
    palette = np.array([(0, 0, 0), *colours.values()], dtype=np.uint8)
    outlined = float(np.median(boxes_px[drawn, 2] - boxes_px[drawn, 0])) >= OUTLINED_PX
    for name, code in codes.items():
        opacity = (KEPT_OPACITY if name == KEPT else REMOVED_OPACITY)[not outlined]
        if opacity:
            _tint(picture, fate == code, palette[code], opacity)
    if outlined:
        border = _borders(owner, fate)
        picture[border] = palette[fate[border]]


def _borders(owner: npt.NDArray[np.integer], fate: npt.NDArray[np.uint8]) -> Mask:
    """Pixels at the left or upper side of their tile, or at any side of an area of one fate [h, w]; none where no tile is."""
    border = np.zeros(owner.shape, dtype=np.bool_)
    border[:, 1:] |= owner[:, 1:] != owner[:, :-1]
    border[1:] |= owner[1:] != owner[:-1]
    border[:, :-1] |= fate[:, 1:] != fate[:, :-1]
    border[:-1] |= fate[1:] != fate[:-1]
    border[[0, -1]] = True
    border[:, [0, -1]] = True
    return border & (fate > 0)


def _tint(picture: Pixels, where: Mask, colour: npt.NDArray[np.uint8], opacity: float) -> None:
    picture[where] = np.rint(picture[where] * np.float32(1 - opacity) + colour * np.float32(opacity)).astype(np.uint8)


def _outline_tissue(picture: Pixels, mask: Mask) -> None:
    """A line along the inner side of the mask's border; the frame of the picture is no border."""
    shown = cv2.resize(mask.astype(np.uint8), (picture.shape[1], picture.shape[0]), interpolation=cv2.INTER_NEAREST)
    inside = cv2.erode(shown, np.ones((3, 3), np.uint8))
    picture[shown != inside] = INK


def _foot(
    width: int, entries: Sequence[_Entry], um_per_px: float | None, *, most_px: int | None = None, scale_bar: bool = True
) -> Pixels:
    """The strip below a picture: a scale bar no longer than ``most_px`` (a quarter of the width) and the legend, in lines."""
    placed = list(_placed(entries, width))
    bar_lines = 1 if scale_bar else 0
    height = (bar_lines + 1 + max((line for _, line, _ in placed), default=-1)) * LINE_PX + 2 * GAP_PX
    image = Image.new("RGB", (width, height), (PAPER,) * 3)
    pen = ImageDraw.Draw(image)
    if scale_bar:
        _draw_scale(pen, um_per_px, most_px or width // 4)
    for left, line, entry in placed:
        top = GAP_PX + (line + bar_lines) * LINE_PX
        if entry.colour:
            swatch = (left, top + 2, left + FONT_PX, top + 2 + FONT_PX)
            pen.rectangle(swatch, fill=entry.colour if entry.filled else None, outline=entry.colour, width=2)
        pen.text((left + (FONT_PX + 5 if entry.colour else 0), top), entry.text, fill=INK, font=_font())
    return np.array(image)


def _placed(entries: Sequence[_Entry], width: int) -> Iterator[tuple[int, int, _Entry]]:
    """Left edge and line of every entry of the legend."""
    left, line = GAP_PX, 0
    for entry in entries:
        length = math.ceil(_font().getlength(entry.text)) + (FONT_PX + 5 if entry.colour else 0)
        if left > GAP_PX and left + length > width - GAP_PX:
            left, line = GAP_PX, line + 1
        yield left, line, entry
        left += length + 2 * GAP_PX


def _draw_scale(pen: ImageDraw.ImageDraw, um_per_px: float | None, most_px: int) -> None:
    if um_per_px is None:
        pen.text((GAP_PX, GAP_PX), "scale unknown", fill=INK, font=_font())
        return
    length_um = round_length(um_per_px * most_px)
    length_px = scale_length(length_um, 1 / um_per_px)
    pen.rectangle((GAP_PX, GAP_PX + 6, GAP_PX + length_px - 1, GAP_PX + 9), fill=INK)
    label = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} um"
    pen.text((GAP_PX + length_px + 6, GAP_PX), label, fill=INK, font=_font())


def round_length(most_um: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is not longer [um]."""
    power = 10.0 ** math.floor(math.log10(most_um))
    return max(step * power for step in (1, 2, 5) if step * power <= most_um * (1 + 1e-9))


@functools.cache
def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(FONT_PX)


def _cut(text: str, width: int) -> str:
    """The text, shortened until it fits."""
    if _font().getlength(text) <= width:
        return text
    text = text[: width // 2]  # no character is narrower than 2 px
    while text and _font().getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
