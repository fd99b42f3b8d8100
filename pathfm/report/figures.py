"""Charts as SVG data addresses. The same numbers give the same bytes: no date, no random ids, no display."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from pathfm.errors import MissingExtraError
from pathfm.report.results import MilResult, ModelScore, Row, to_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, ACCENT, SECOND = "#1b2530", "#5b6875", "#e3e8ed", "#14568c", "#c2571a"
CONTROL_COLOURS = ("#c2571a", "#5f7f2e", "#7a4e9e", "#8a8f96", "#a8823a", "#3f8f8b")
"""Told apart by people with colour-blindness, and by dash pattern as well."""
CONTROL_DASHES = ("--", "-.", (0, (5, 1, 1, 1, 1, 1)), ":", (0, (8, 2)), (0, (1, 1)))
BACKED: Mapping[str, Any] = {"frameon": True, "facecolor": "white", "edgecolor": "none", "framealpha": 0.85}
"""Keys that may lie on curves."""
MAX_POINTS = 400
"""Points drawn per line: more would not be seen and would swell the page."""

PRETRAINING = ("loss", "dino_global", "ibot", "teacher_entropy")
"""Columns of the pretraining log that are drawn; the teacher's entropy shows a collapse that the loss can hide."""

_STYLE: Mapping[Any, Any] = {
    "svg.hashsalt": "pathfm",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa5b0",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Chart:
    """A picture for the page: its data address, the words for those who cannot see it, its caption, and whether it is wide."""

    uri: str
    alt: str
    caption: str
    wide: bool = False
    form: ClassVar[str] = "chart"


@contextmanager
def _canvas(columns: int, width: float, height: float, slots: list[str], rows: int = 1) -> Iterator[list[Axes]]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("the report needs matplotlib", extra="report") from error
    # A Figure without pyplot: no display is looked for, and neither the user's matplotlibrc nor the caller's settings matter.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(width, height), layout="constrained")
        yield list(figure.subplots(rows, columns, squeeze=False).ravel())
        slots.append(_as_uri(figure))


def _as_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return data_uri(buffer.getvalue(), "image/svg+xml")


def data_uri(content: bytes, kind: str) -> str:
    """Bytes as an address that loads nothing from anywhere."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def roc_chart(result: MilResult) -> Chart | None:
    """ROC curves of the model and the controls on the same splits; None without ``roc.csv``."""
    lines = [(score, _points(result.roc, score.name, "fpr", "tpr")) for score in result.scores]
    lines = [(score, points) for score, points in lines if len(points) > 1]
    if not lines:
        return None
    slots: list[str] = []
    with _canvas(1, 4.6, 4.6, slots) as (axes,):
        axes.plot([0, 1], [0, 1], color="#b6bfc8", linewidth=1, zorder=1)
        control = 0
        for score, points in lines:
            name = f"{score.name}{_key(result, score)}" + " (transductive)" * score.transductive
            style: dict[str, Any] = {"color": ACCENT, "linewidth": 2.4, "zorder": 4}
            if not score.is_primary:
                index = control % len(CONTROL_COLOURS)
                style = {"color": CONTROL_COLOURS[index], "linewidth": 1.3, "linestyle": CONTROL_DASHES[index], "zorder": 3}
                control += 1
            axes.plot(*zip(*_thin(points), strict=True), label=plain(name), **style)
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
        axes.set(xlabel="false positive rate (1 - specificity)", ylabel="true positive rate (sensitivity)")
        axes.legend(loc="lower right", fontsize=8, **BACKED)
    named = ", ".join(f"{score.name}{_key(result, score)}" for score, _ in lines)
    rest = " against all other labels" if len(result.classes) > 2 else ""
    caption = f"ROC curves of “{result.positive}”{rest}, pooled over the test parts."
    caption += " The key gives the AUROC of the table." if len(result.classes) == 2 else ""
    return Chart(slots[0], f"ROC curves: {named}", caption + _transductive(result))


def _key(result: MilResult, score: ModelScore) -> str:
    """The AUROC of a curve; of several classes the table has another one, the mean over them."""
    return f"  {score.auroc.value:.2f}" if score.auroc and len(result.classes) == 2 else ""


def plain(text: str) -> str:
    """A text for a picture: names come from files, where a pair of dollar signs would be read as a formula.

    What the font does not have is a question mark, as in heatmaps: it would be drawn as an empty box.
    """
    return "".join(letter if letter == "\n" or ord(letter) in _drawn() else "?" for letter in text).replace("$", r"\$")


@cache
def _drawn() -> frozenset[int]:
    """Code points of the letters that pictures can have, in titles (bold) as in keys."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = [FontProperties(family=_STYLE["font.family"], weight=weight) for weight in ("normal", "bold")]
    normal, bold = (frozenset(get_font(findfont(font)).get_charmap()) for font in fonts)
    return normal & bold


def training_chart(result: MilResult) -> Chart | None:
    """Training and inner-validation loss of every network of the main model; None without ``curves.csv``."""
    runs: dict[tuple[str, str], list[Row]] = {}
    for row in result.curves:
        if row.get("model") == result.primary:
            runs.setdefault((row.get("fold", ""), row.get("member", "")), []).append(row)
    if not runs:
        return None
    slots: list[str] = []
    with _canvas(2, 9.0, 3.1, slots) as panels:
        for axes, column, title, colour in zip(
            panels, ("train_loss", "validation_loss"), ("training loss", "inner-validation loss"), (ACCENT, SECOND), strict=True
        ):
            for rows in runs.values():
                points = _pairs(rows, "epoch", column)
                axes.plot([x for x, _ in points], [y for _, y in points], color=colour, alpha=0.45, linewidth=1)
            axes.set(title=title + " (transductive)" * result.main.transductive, xlabel="epoch", ylabel="loss")
        panels[1].sharey(panels[0])
        panels[1].autoscale()
    what = f"{len(runs)} networks ({len({fold for fold, _ in runs})} folds)"
    caption = f"Slide classifier: loss of {what}. The test fold plays no part in either curve.{_transductive(result)}"
    return Chart(slots[0], f"Training curves of {what}", caption, wide=True)


def pretraining_chart(rows: Sequence[Row]) -> Chart | None:
    """The loss, its main parts and the teacher's entropy against the step; None without rows."""
    columns = [(name, points) for name in PRETRAINING if (points := _pairs(rows, "step", name))]
    if not columns:
        return None
    slots: list[str] = []
    with _canvas(len(columns), 2.4 * max(len(columns), 2), 2.7, slots) as panels:
        for axes, (name, points) in zip(panels, columns, strict=True):
            thin = _thin(points)
            axes.plot([x for x, _ in thin], [y for _, y in thin], color=ACCENT, linewidth=1.3)
            axes.set(title=name.replace("_", " "), xlabel="step")
            axes.locator_params(axis="x", nbins=4)
    first, last = columns[0][1][0], columns[0][1][-1]
    alt = f"Pretraining: {columns[0][0]} goes from {first[1]:.3g} at step {first[0]:g} to {last[1]:.3g} at step {last[0]:g}"
    return Chart(slots[0], alt, f"Pretraining of the encoder, up to step {last[0]:g}.", wide=True)


def _transductive(result: MilResult) -> str:
    """What a picture has to say when it is cut out of the page."""
    return f" {result.seen.words.capitalize()}." if result.seen and result.seen.transductive else ""


def _points(rows: Sequence[Row], model: str, x: str, y: str) -> list[tuple[float, float]]:
    return _pairs([row for row in rows if row.get("model") == model], x, y)


def _pairs(rows: Sequence[Row], x: str, y: str) -> list[tuple[float, float]]:
    pairs = ((to_number(row.get(x)), to_number(row.get(y))) for row in rows)
    return [(first, second) for first, second in pairs if first is not None and second is not None]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    step = max(1, -(-len(points) // MAX_POINTS))
    return [*points[:-1:step], points[-1]]
