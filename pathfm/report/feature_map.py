"""Maps of features: scatter plots of tiles and slides, and slides whose tiles are coloured by their principal components.

Legend: N points. The same points give the same bytes.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pathfm.errors import MissingExtraError
from pathfm.geometry import scale_length, scale_point
from pathfm.report.feature_points import UNKNOWN, columns, read_points
from pathfm.report.figures import _STYLE, INK, Chart, data_uri, plain
from pathfm.stats.projection import explained_share
from pathfm.store.cohort import Cohort

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Pixels = NDArray[np.uint8]

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7a5c00", "#000000")
"""Okabe & Ito (2008), their yellow darkened: it cannot be seen on white. Shapes differ as well."""
SHAPES = "osD^vPX*"
OTHERS, GREYS = "others", ("#c3cad1", "#8d96a0")
"""Name of the entry for all other values; its colour, and that of points without a value."""
LAYERS = 8
"""Points are drawn in so many mixed layers, or the last class would cover the others."""
DIRECT_LABELS = 24
"""Up to so many slides are named beside their points."""
DPI = 130
PALE, OPACITY = 0.35, 0.82
"""How much of the thumbnail's contrast is left under the colours, and how opaque they are."""
GAP_PX, FONT_PX = 12, 14


class ScatterMap(NamedTuple):
    """Points on two axes.

    Attributes:
        what: tiles or slides.
        method: PCA or UMAP.
        xy_N2: where they are.
        axes: names of the two axes.
    """

    what: str
    method: str
    xy_N2: NDArray[np.float64]
    axes: tuple[str, str]


def scatter_png(points: ScatterMap, column: str, value_N: Sequence[str], names_N: Sequence[str] = ()) -> bytes:
    """The map as PNG, coloured by a column; the most frequent values have colours of their own, the rest are ``others``.

    Args:
        points: the map.
        column: what it is coloured by.
        value_N: value of the column for each point.
        names_N: names written beside the points, when there are at most ``DIRECT_LABELS`` of them.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("maps need matplotlib", extra="report") from error
    buffer = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, "axes.grid": False})
        figure = Figure(figsize=(8.6, 5.6), layout="constrained")
        axes = figure.subplots()
        _draw_points(axes, points, value_N, named=0 < len(names_N) <= DIRECT_LABELS)
        if 0 < len(names_N) <= DIRECT_LABELS:
            _write_names(axes, points.xy_N2, names_N)
        axes.set(xlabel=points.axes[0], ylabel=points.axes[1], title=f"{points.method} of {points.what}, by {_plain(column)}")
        axes.tick_params(labelbottom=False, labelleft=False, length=0)
        axes.legend(
            loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8.5, title=_plain(column), alignment="left", title_fontsize=9
        )
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def legend_entries(value_N: Sequence[str]) -> list[tuple[str, str, str, int]]:
    """Value, colour, shape and number of points of each entry of the legend; the last one may be ``others``.

    The values with most points have colours of their own; they are listed in sorted order, so that a value keeps its colour.
    """
    counts = Counter(value_N)
    most = sorted((value for value in counts if value != UNKNOWN), key=lambda value: (-counts[value], value))[: len(COLOURS)]
    entries = [(value, COLOURS[i], SHAPES[i], counts[value]) for i, value in enumerate(sorted(most))]
    rest = len(counts.keys() - set(most) - {UNKNOWN})
    if rest:
        others = sum(counts.values()) - counts[UNKNOWN] - sum(counts[value] for value in most)
        entries.append((f"{rest} {OTHERS}", GREYS[0], "o", others))
    if UNKNOWN in counts:
        entries.append((UNKNOWN, GREYS[1], "h", counts[UNKNOWN]))
    return entries


def _draw_points(axes: Axes, points: ScatterMap, value_N: Sequence[str], named: bool) -> None:
    entries = legend_entries(value_N)
    own = {entry[0]: number for number, entry in enumerate(entries)}
    rest = next((number for number, entry in enumerate(entries) if entry[0].endswith(f" {OTHERS}")), 0)
    entry_N = np.array([own.get(value, rest) for value in value_N])
    area = 60.0 if named else float(np.clip(30_000 / max(len(entry_N), 1), 7, 45))
    for layer in range(LAYERS):
        for number, (_, colour, shape, _) in enumerate(entries):
            mine = np.flatnonzero(entry_N == number)[layer::LAYERS]
            order = 1 if colour in GREYS else 2 + layer
            x_n, y_n = points.xy_N2[mine].T
            axes.scatter(x_n, y_n, s=area, c=colour, marker=shape, alpha=0.85, zorder=order, edgecolors="white", linewidths=0.3)
    for value, colour, shape, count in entries:
        label = _plain(value) + f"  ({count:,})" * (len(value_N) > len(entries))
        axes.scatter([], [], s=46, c=colour, marker=shape, label=label, linewidths=0)
    axes.margins(0.06)


def _write_names(axes: Axes, xy_N2: NDArray[np.float64], names_N: Sequence[str]) -> None:
    """Names beside the points, away from the right edge."""
    middle = (xy_N2[:, 0].min() + xy_N2[:, 0].max()) / 2
    for (x, y), name in zip(xy_N2.tolist(), names_N, strict=True):
        left = x > middle
        axes.annotate(
            _plain(name),
            (x, y),
            (-6 if left else 6, 4),
            textcoords="offset points",
            fontsize=7.5,
            ha="right" if left else "left",
        )


def _plain(text: str, longest: int = 28) -> str:
    """A name for a picture that is not too long."""
    return plain(text if len(text) <= longest else f"{text[: longest - 1]}…")


def component_axes(share_K: NDArray[np.float64]) -> tuple[str, str]:
    """Names of the first two axes, with their share of the variance."""
    return f"component 1 ({share_K[0]:.0%} of the variance)", f"component 2 ({share_K[1]:.0%})"


def effect_words(column: str, what: str, share: float | None) -> str:
    """What the share of the variance says, empty when there is none."""
    return "" if share is None else f"{column} explains {share:.0%} of the variance of the {what}."


def feature_map_chart(features_dir: Path, cohort: Cohort, label: str) -> Chart | None:
    """The PCA map of the tiles coloured by a label, for the report; None where no slide has features, or none this label.

    Raises:
        StoreError: no slide has usable features.
    """
    slide_ids = [row.slide_id for row in cohort.rows if (features_dir / f"{row.slide_id}.h5").is_file()]
    value_of = columns(cohort, slide_ids, label)[0].get(label)
    if not value_of:
        return None
    points = read_points(features_dir, slide_ids)
    components = points.components
    xy_N2 = components.project(points.sample_ND)[:, :2]
    tiles = ScatterMap("tiles", "PCA", xy_N2, component_axes(components.share_K))
    png = scatter_png(tiles, label, [value_of[points.slide_ids[index]] for index in points.slide_N])
    share = explained_share(points.mean_SD, [value_of[slide_id] for slide_id in points.slide_ids])
    caption = (
        f"Features of {points.sample_words} on their first two principal components. {effect_words(label, 'slides', share)}"
    )
    return Chart(data_uri(png, "image/png"), f"PCA map of tile features by {label}", caption.strip())


def colour_map(
    slide: tuple[Pixels, float],
    xy_level0_N2: NDArray[np.int64],
    sides_level0: tuple[float, float],
    rgb_N3: Pixels,
    words: str,
) -> Pixels:
    """The slide twice: as it is, and pale with every tile in its colour. Of overlapping tiles the later one lies on top.

    Args:
        slide: RGB thumbnail of the whole slide [h, w, 3], and its level-0 px per px.
        xy_level0_N2: upper left corners of the tiles.
        sides_level0: width and height of a tile [level-0 px].
        rgb_N3: their colours.
        words: ASCII line below the picture.
    """
    thumbnail, downsample = slide
    painted = np.rint(255 - PALE * (255 - thumbnail.astype(np.float32)))
    for (x, y), colour in zip(xy_level0_N2.tolist(), rgb_N3.astype(np.float32), strict=True):
        left, top = scale_point(x, y, 1 / downsample)
        right, bottom = scale_point(x + sides_level0[0], y + sides_level0[1], 1 / downsample)
        place = np.s_[max(0, top) : max(bottom, top + 1, 0), max(0, left) : max(right, left + 1, 0)]
        painted[place] = (1 - OPACITY) * painted[place] + OPACITY * colour
    gap = np.full((len(thumbnail), GAP_PX, 3), 255, dtype=np.uint8)
    pair = np.concatenate([thumbnail, gap, np.rint(painted).astype(np.uint8)], axis=1)
    font = ImageFont.load_default(FONT_PX)
    width = max(pair.shape[1], math.ceil(font.getlength(words)) + 2 * GAP_PX)
    foot = Image.new("RGB", (width, FONT_PX + 2 * GAP_PX), (255, 255, 255))
    ImageDraw.Draw(foot).text((GAP_PX, GAP_PX), words, fill=INK, font=font)
    wide = np.pad(pair, ((0, 0), (0, width - pair.shape[1]), (0, 0)), constant_values=255)
    return np.concatenate([wide, np.asarray(foot)])


def tile_atlas(xy_N2: NDArray[np.float64], shape: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Which points stand for the cells of a grid laid over a map: (row, column, point), one for each cell that holds any.

    Of the points of a cell the one nearest to its centre stands for it, of equally near ones the first.
    """
    low, width = xy_N2.min(axis=0), np.maximum(np.ptp(xy_N2, axis=0), np.finfo(np.float64).tiny)
    place_N2 = (xy_N2 - low) / width * np.array(shape[::-1])
    cell_N2 = np.minimum(place_N2.astype(np.int64), np.array(shape[::-1]) - 1)
    distance_N = np.square(place_N2 - cell_N2 - 0.5).sum(axis=1)
    best: dict[tuple[int, int], int] = {}
    for point in np.argsort(distance_N, kind="stable").tolist():
        column, row = cell_N2[point].tolist()
        best.setdefault((shape[0] - 1 - row, column), point)
    return sorted((row, column, point) for (row, column), point in best.items())


def atlas_picture(cells: Sequence[tuple[int, int, Pixels]], shape: tuple[int, int], side_px: int) -> Pixels:
    """Tiles [H, W, 3] laid out on a white grid of ``shape`` (rows, columns); each is (row, column, pixels)."""
    picture: Pixels = np.full((shape[0] * side_px, shape[1] * side_px, 3), 255, dtype=np.uint8)
    for row, column, tile in cells:
        small = cv2.resize(tile, (scale_length(side_px, 1) - 2,) * 2, interpolation=cv2.INTER_AREA)
        picture[row * side_px + 1 : (row + 1) * side_px - 1, column * side_px + 1 : (column + 1) * side_px - 1] = small
    return picture
