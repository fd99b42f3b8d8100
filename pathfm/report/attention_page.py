"""What the heads of a vision transformer look at, as pictures: one sheet (PNG) per tile, and a page that holds them all.

Colours say how many times its even share a patch gets: 1 when attention is spread evenly over all tokens. Patches at or below
that stay grey. All heads of all tiles have one scale, so heads can be compared; rollout, which is far more even, has its own.

Shapes: H heads, h x w patches of a tile.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

from pathfm.errors import MissingExtraError
from pathfm.report.figures import _STYLE, INK, MUTED, data_uri
from pathfm.report.picture_page import Picture, PicturePage, Section, write_picture_page
from pathfm.store.commit import commit_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

LIMITS = (1.1, 1.25, 1.5, 2.0)
"""Ends of the colour scale below which powers of two follow."""
LEAST = 2.0
"""End of the scale of heads that are almost even: what is noise shall not look like a finding."""
SHOWN = 0.995
"""Share of all patches whose values lie within the scale."""
COLOURS, VEIL = "YlOrRd", 0.65
"""Colour map, and the opacity of its end."""
COLUMNS, FEW = 6, 4
"""Heads in a row; in rows of so many when there are no more than that."""
LARGE, BAR, GAP, CAPTION, TITLE, DPI = 3.9, 0.9, 0.15, 0.5, 0.6, 120
"""Sides of the sheet's parts [in]: large panels, room of a colour bar, gaps, room between rows, heading."""
WIDTH = 3 * LARGE + 2 * BAR + 3 * GAP
BAR_SHARE = 0.35
"""Longest part of a tile's side that the scale bar takes."""
NOTES = (
    "Colour: how many times its even share of the attention a patch gets. Grey: its even share or less.",
    "Attention says where the network takes information from, not what it means, and not that a diagnosis rests on it.",
    "Rollout (Abnar and Zuidema 2020) follows attention through all blocks, half of each token passing every block by; it is "
    "far more even than a single head, so its scale is its own.",
)


@dataclass(frozen=True)
class TileAttention:
    """One tile and what the class token looks at in it.

    Attributes:
        slide_id, number: the slide, and the tile's number in its store.
        xy_level0: its upper left corner [level-0 px].
        pixels: [s, s, 3] uint8, what the network sees of it.
        mpp: of these pixels [um per px]; None: unknown.
        heads_Hhw: attention of each head to the patches; over all tokens it sums to 1.
        rollout_hw: the same of attention rollout.
        tokens: all tokens, patches and others: an even share is 1 / tokens.
    """

    slide_id: str
    number: int
    xy_level0: tuple[int, int]
    pixels: npt.NDArray[np.uint8]
    mpp: float | None
    heads_Hhw: npt.NDArray[np.float32]
    rollout_hw: npt.NDArray[np.float32]
    tokens: int

    @property
    def title(self) -> str:
        """The tile for people."""
        x, y = self.xy_level0
        return f"{self.slide_id}, tile #{self.number} at {x:,}, {y:,} (level-0 px)"

    @property
    def file_name(self) -> str:
        """Name of its picture."""
        x, y = self.xy_level0
        return f"{self.slide_id}_{x}_{y}.png"


def write_attention_page(folder: Path, tiles: Sequence[TileAttention], facts: Sequence[tuple[str, str]]) -> Path:
    """Writes a picture for each tile and ``index.html``, which holds them all and loads nothing. The same gives the same bytes.

    Args:
        folder: where to; pictures of the same names are replaced.
        tiles: of one network and block.
        facts: encoder, block and the like, as (name, value).

    Returns:
        The page.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    heads = [tile.heads_Hhw * tile.tokens for tile in tiles]
    ends = _scale_end(heads, LEAST), _scale_end([tile.rollout_hw * tile.tokens for tile in tiles], LIMITS[0])
    words = " · ".join(f"{name} {value}" for name, value in facts)
    sections = []
    for tile in tiles:
        content = _sheet(tile, ends, words)
        with commit_file(folder / tile.file_name) as temporary:
            temporary.write_bytes(content)
        alt = f"{tile.title}: attention of {len(tile.heads_Hhw)} heads, their mean and rollout, laid over the tile"
        lines = (tile.title, *_findings(tile))
        sections.append(Section(tile.title, "", [Picture(data_uri(content, "image/png"), alt, lines[1:])]))
    page = folder / "index.html"
    write_picture_page(page, PicturePage("attention", "What the encoder looks at", facts, NOTES, sections))
    return page


def _findings(tile: TileAttention) -> tuple[str, ...]:
    """The head that is least even, in words."""
    peaks = tile.heads_Hhw.max(axis=(1, 2)) * tile.tokens
    head = int(peaks.argmax())
    return (f"Sharpest head: {head}, whose strongest patch gets {peaks[head]:.1f} times its even share.",)


def _scale_end(values: Sequence[npt.NDArray[np.float32]], least: float) -> float:
    """The round number that almost all values lie below."""
    high = float(np.quantile(np.concatenate([each.ravel() for each in values]), SHOWN))
    ends = [limit for limit in LIMITS if limit >= max(high, least)]
    return ends[0] if ends else 2.0 ** math.ceil(math.log2(high))


def _sheet(tile: TileAttention, ends: tuple[float, float], words: str) -> bytes:
    """PNG: the tile, mean and rollout in large, below them each head, with colour bars."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("pictures of attention need matplotlib", extra="report") from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, "axes.grid": False})
        columns = FEW if len(tile.heads_Hhw) <= FEW else COLUMNS
        side = (WIDTH - (columns + 1) * GAP) / columns
        height = TITLE + CAPTION + LARGE + -(-len(tile.heads_Hhw) // columns) * (side + CAPTION) + 2 * GAP
        figure = Figure(figsize=(WIDTH, height), dpi=DPI)
        figure.text(GAP / WIDTH, 1 - GAP / height, _literal(f"{tile.title}\n{words}"), ha="left", va="top", fontsize=11)
        _draw_large(figure, tile, ends)
        for head, share_hw in enumerate(tile.heads_Hhw * tile.tokens):
            row, column = divmod(head, columns)
            top = TITLE + CAPTION + LARGE + CAPTION + row * (side + CAPTION)
            picture = _overlay(tile.pixels, share_hw, ends[0])
            axes = _panel(figure, (GAP + column * (side + GAP), top, side), picture, f"head {head}")
            detail = f"peak {_times(share_hw.max())}, patches get {100 * share_hw.sum() / tile.tokens:.0f} %"
            axes.set_xlabel(detail, fontsize=7.5, color=MUTED, labelpad=3)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_large(figure: Figure, tile: TileAttention, ends: tuple[float, float]) -> None:
    """The tile, the mean of its heads and rollout, side by side."""
    mean_hw, rollout_hw = tile.heads_Hhw.mean(axis=0) * tile.tokens, tile.rollout_hw * tile.tokens
    top, left = TITLE + CAPTION, GAP
    _scale_bar(_panel(figure, (left, top, LARGE), tile.pixels, "the tile, as the network sees it"), tile)
    for number, (shares, end, title) in enumerate(
        ((mean_hw, ends[0], "mean of all heads"), (rollout_hw, ends[1], "rollout through all blocks"))
    ):
        left = 2 * GAP + LARGE + number * (LARGE + BAR)
        _panel(figure, (left, top, LARGE), _overlay(tile.pixels, shares, end), title)
        _colour_bar(figure, left + LARGE + 0.08, top, end)


def _add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place counted from the sheet's upper left corner [in]."""
    whole = figure.get_figheight()
    return figure.add_axes((left / WIDTH, 1 - (top + height) / whole, width / WIDTH, height / whole))


def _panel(figure: Figure, place: tuple[float, float, float], picture: npt.NDArray[np.uint8], title: str) -> Axes:
    """A picture with a title; ``place``: left, top and side [in]."""
    left, top, side = place
    axes = _add_axes(figure, left, top, side, side)
    axes.imshow(picture, interpolation="bicubic")
    axes.set_title(title)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color="#c7cfd6", linewidth=0.6)
    return axes


def _times(share: float) -> str:
    return f"{share:.2g}×" if share >= 0.01 else "below 0.01×"


def _literal(text: str) -> str:
    """Names come from files: a pair of dollar signs would be read as a formula."""
    return text.replace("$", r"\$")


def _colours() -> Colormap:
    from matplotlib import colormaps

    return colormaps[COLOURS]


def _heat(values: npt.NDArray[Any], end: float) -> npt.NDArray[np.float64]:
    """Where values lie on the scale: 0 at an even share or below, 1 at the end or above."""
    return np.asarray(np.clip(np.log(np.maximum(values, 1.0)) / math.log(end), 0.0, 1.0))


def _overlay(pixels: npt.NDArray[np.uint8], shares_hw: npt.NDArray[np.float32], end: float) -> npt.NDArray[np.uint8]:
    """The tile in grey, its patches coloured by how many times their even share they get."""
    size = (pixels.shape[1], pixels.shape[0])
    heat = cv2.resize(_heat(shares_hw, end), size, interpolation=cv2.INTER_NEAREST)
    return _blended(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), heat)


def _blended(grey: npt.NDArray[np.uint8], heat: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Grey [...] under the colours of heat [...] -> RGB [..., 3]; paler than it was, so that colours stay clear."""
    pale = (0.3 + 0.7 * grey[..., None] / 255) * np.ones(3)
    colour = np.asarray(_colours()(0.2 + 0.8 * heat))[..., :3]
    veil = VEIL * np.sqrt(heat)[..., None]
    return np.rint(255 * (pale * (1 - veil) + colour * veil)).astype(np.uint8)


def _colour_bar(figure: Figure, left: float, top: float, end: float) -> None:
    """The colours as they look over pale tissue, from 1 time the even share to the end."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, LogNorm

    steps = np.linspace(0.0, 1.0, 128)
    looks = ListedColormap(_blended(np.full(128, 225, dtype=np.uint8), steps) / 255)
    bar = figure.colorbar(ScalarMappable(LogNorm(1.0, end), looks), cax=_add_axes(figure, left, top, 0.15, LARGE))
    ticks = [1.0, (1.0 + end) / 2, end] if end <= 2.0 else [2.0**power for power in range(round(math.log2(end)) + 1)]
    bar.set_ticks(ticks, labels=[f"{tick:.3g}×" for tick in ticks])
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.set_label("times its even share", fontsize=8, labelpad=1)


def _scale_bar(axes: Axes, tile: TileAttention) -> None:
    """A bar of a round length in the corner of the tile, where its resolution is known."""
    side_px = tile.pixels.shape[1]
    if tile.mpp is None:
        return
    longest_um = BAR_SHARE * side_px * tile.mpp
    power = 10.0 ** math.floor(math.log10(longest_um))
    length_um = max(step * power for step in (1, 2, 5) if step * power <= longest_um)
    right, bottom, length_px = 0.96 * side_px, 0.95 * side_px, length_um / tile.mpp
    axes.plot([right - length_px, right], [bottom, bottom], color="white", linewidth=5, solid_capstyle="butt")
    axes.plot([right - length_px, right], [bottom, bottom], color="black", linewidth=2.5, solid_capstyle="butt")
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5}
    place = right - length_px / 2, bottom - 0.025 * side_px
    axes.text(*place, f"{length_um:g} µm", ha="center", va="bottom", fontsize=8, color="black", bbox=box)
    axes.set(xlim=(-0.5, side_px - 0.5), ylim=(side_px - 0.5, -0.5))
