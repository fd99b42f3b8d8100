"""What a pretraining run left on disk, and its curves."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from pathfm.errors import StoreError
from pathfm.pretrain_settings import PretrainSettings
from pathfm.report.figures import ACCENT, CONTROL_COLOURS, CONTROL_DASHES, MUTED, Chart, _canvas
from pathfm.report.results import Row, read_rows, to_number
from pathfm.store.commit import read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CARDS = ("teacher", "untrained")
"""Folders whose card names the settings; the second is there from the start."""
BINS = 240
"""Points along a curve; each shows the mean of its steps, and a band their range."""
LOOKS = tuple(zip((ACCENT, *CONTROL_COLOURS), ("-", (0, (4, 4)), *CONTROL_DASHES[1:]), strict=True))
"""Colour and dashes of curves: of two that lie on each other both are seen."""
ROOM = 1.08
"""Where an axis from 0 ends, as a multiple of the highest value: no curve lies on the edge."""
LEAST_PER_ROW, MOST_PER_ROW = 3, 4
NORM, CLIPPED = "grad_norm_", "clipped_"

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """What a run left in its folder.

    Attributes:
        steps: rows of the metrics, one per step, with what of them was clipped.
        times: rows about speed, with the share of the time that was spent waiting for data.
        looks: rows of the looks at the teacher.
        alarms: rows of alarms.
        pictures: step -> picture file, in order.
        settings: of the run, None when no card tells.
    """

    steps: tuple[Row, ...]
    times: tuple[Row, ...]
    looks: tuple[Row, ...]
    alarms: tuple[Row, ...]
    pictures: Mapping[int, Path]
    settings: PretrainSettings | None

    @property
    def levels(self) -> dict[str, float]:
        """Values that curves are seen against: the entropy of uniform targets [nat], and the clipping norm."""
        return {"log K": math.log(self.settings.prototypes), "clip": self.settings.clip_norm} if self.settings else {}

    def points(self, table: str, column: str) -> Points:
        """Step and value of every row of a table (steps, times, looks) that has one."""
        pairs = ((to_number(row.get("step")), to_number(row.get(column))) for row in getattr(self, table))
        return [(x, y) for x, y in pairs if x is not None and y is not None]


def read_run(encoder_dir: Path) -> Run:
    """Reads what is there of a run; missing files are empty tables.

    Raises:
        StoreError: a table is damaged, or there is no run at all.
    """
    steps, health = read_rows(encoder_dir / "metrics.csv"), encoder_dir / "health"
    if not steps:
        raise StoreError("no pretraining has run here", where=str(encoder_dir), fix="run: pathfm pretrain")
    settings = _settings(encoder_dir)
    return Run(
        steps=tuple(_with_more(row, settings) for row in steps),
        times=tuple(_with_share(row) for row in read_rows(encoder_dir / "timing.csv")),
        looks=read_rows(health / "snapshots.csv"),
        alarms=read_rows(health / "alarms.csv"),
        pictures={int(path.stem.partition("-")[2]): path for path in sorted(health.glob("step-*.png"))},
        settings=settings,
    )


def _settings(encoder_dir: Path) -> PretrainSettings | None:
    """Settings by preset and differences, as the card tells them."""
    path = next((path for name in CARDS if (path := encoder_dir / name / "card.json").is_file()), None)
    card = read_json(path) if path else {}
    if "preset" not in card:
        return None
    given: dict[str, Any] = {"preset": card["preset"]}
    for name, value in dict(card.get("differs") or {}).items():
        *tables, key = name.split(".")
        place = given
        for table in tables:
            place = place.setdefault(table, {})
        place[key] = value
    try:
        return PretrainSettings.model_validate(given)
    except ValidationError:  # of another version
        return None


def _with_more(row: Row, settings: PretrainSettings | None) -> Row:
    """A step with the whole DINO loss, and with 1 for every gradient norm that was clipped, else 0."""
    parts = [to_number(row.get(name)) for name in ("dino_global", "dino_local")]
    if None not in parts:
        row = {**row, "dino": str(sum(part for part in parts if part is not None))}
    if settings is None:
        return row
    limit = settings.clip_norm
    norms = {name.removeprefix(NORM): to_number(value) for name, value in row.items() if name.startswith(NORM)}
    return {**row, **{CLIPPED + name: str(int(norm > limit)) for name, norm in norms.items() if norm is not None}}


def _with_share(row: Row) -> Row:
    waited, seconds = to_number(row.get("data_wait_seconds")), to_number(row.get("seconds"))
    return row if waited is None or not seconds else {**row, "data_wait_share": str(waited / seconds)}


class Panel(NamedTuple):
    """One small diagram: its title with the unit, its table, and what is drawn of it.

    Attributes:
        title: what it shows.
        table: steps, times or looks.
        columns: column -> name in the key; a name that ends in _ stands for all columns that begin with it.
        level: a value to see the curves against.
        axis: plain; zero, which begins there; or log.
    """

    title: str
    table: str
    columns: Mapping[str, str]
    level: str = ""
    axis: str = "plain"


class Section(NamedTuple):
    """A heading, how to read what is below it, and the diagrams."""

    name: str
    reading: str
    panels: tuple[Panel, ...]


SECTIONS = (
    Section(
        "Losses",
        "What is minimised. The DINO loss is the teacher's entropy plus the divergence below: a loss that stays near log K is "
        "normal until shortly after the warm-up, and a fault when the targets below stay uniform as well.",
        (
            Panel("loss", "steps", {"loss": "loss"}),
            Panel(
                "DINO loss [nat]", "steps", {"dino": "sum", "dino_global": "global crops", "dino_local": "local crops"}, "log K"
            ),
            Panel("iBOT loss [nat]", "steps", {"ibot": "masked patches"}),
            Panel("distillation", "steps", {"cls": "tile", "patches": "patches"}),
            Panel("spread of features", "steps", {"koleo": "KoLeo", "kde": "KDE"}),
            Panel("Gram loss", "steps", {"gram": "Gram"}),
        ),
    ),
    Section(
        "Targets",
        "Entropy at log K: uniform targets, nothing to learn from. Entropy near 0 with few prototypes in use: one answer for "
        "every image. Healthy runs lie between, with a divergence above 0 and more and more prototypes in use.",
        (
            Panel("teacher entropy [nat]", "steps", {"teacher_entropy": "entropy"}, "log K"),
            Panel("divergence from the teacher [nat]", "steps", {"teacher_kl": "divergence"}, axis="zero"),
            Panel(
                "share of the prototypes",
                "steps",
                {"prototype_perplexity": "perplexity of a step", "prototypes_used": "chosen in 100 steps"},
                axis="zero",
            ),
        ),
    ),
    Section(
        "Features of the teacher",
        "From fixed tiles. RankMe should rise and stay; a fall below a quarter of its plateau is a collapse. When patches of a "
        "tile become alike (cosine to 1), or like the class token, dense features decay; outliers mean missing registers.",
        (
            Panel("RankMe", "looks", {"rankme": "RankMe"}, axis="zero"),
            Panel(
                "mean cosine",
                "looks",
                {
                    "patch_cosine": "patch to patch",
                    "cls_patch_cosine": "patch to class",
                    "cls_cosine": "tile to tile",
                    "d4_cosine": "turned, mirrored",
                },
            ),
            Panel("outlier patches, share", "looks", {"outliers": "outliers"}, axis="zero"),
            Panel("alignment, uniformity", "looks", {"alignment": "alignment", "uniformity": "uniformity"}),
            Panel("norm", "looks", {"cls_norm": "class token", "patch_norm": "patches, median"}, axis="zero"),
        ),
    ),
    Section(
        "Probes",
        "On the labelled tiles of pretrain.health.probe: fitted on train, scored on val. The best checkpoint is chosen on "
        "these numbers, so they are no test.",
        (
            Panel("AUROC", "looks", {"probe_linear": "linear", "probe_knn": "kNN"}),
            Panel("balanced accuracy", "looks", {"probe_linear_accuracy": "linear", "probe_knn_accuracy": "kNN"}),
        ),
    ),
    Section(
        "Optimisation",
        "Gradient norms before clipping. When nearly all steps are clipped and norms grow, or when the student is far (40 % or "
        "more) from its own average, the teacher, the learning rate is too high.",
        (
            Panel("gradient norm", "steps", {NORM: ""}, "clip", "log"),
            Panel("share of clipped steps", "steps", {CLIPPED: ""}, axis="zero"),
            Panel("distance of student and teacher", "steps", {"ema_distance": "relative"}, axis="zero"),
            Panel("learning rate", "steps", {"lr": "lr"}, axis="zero"),
            Panel("teacher temperature", "steps", {"teacher_temperature": "temperature"}),
            Panel("weight decay", "steps", {"weight_decay": "decay"}),
            Panel("teacher momentum", "steps", {"ema": "momentum"}),
        ),
    ),
    Section(
        "Speed",
        "Not part of the result: these differ between machines.",
        (
            Panel("images per second", "times", {"images_per_second": "speed"}, axis="zero"),
            Panel("share of time waiting for data", "times", {"data_wait_share": "share"}, axis="zero"),
            Panel("peak memory [GB]", "times", {"peak_memory_gb": "memory"}, axis="zero"),
        ),
    ),
)


def charts(run: Run, section: Section) -> tuple[Chart, ...]:
    """Rows of diagrams; what has no values, or only zeros, is left out.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    panels = [(panel, curves) for panel in section.panels if (curves := _curves(run, panel))]
    rows = max(1, -(-len(panels) // MOST_PER_ROW))
    columns = max(LEAST_PER_ROW, -(-len(panels) // rows))
    starts = range(0, len(panels), columns)
    return tuple(_chart(panels[start : start + columns], columns, run.levels) for start in starts)


def _curves(run: Run, panel: Panel) -> dict[str, Points]:
    """Points by the name in the key."""
    there = getattr(run, panel.table)[0] if getattr(run, panel.table) else {}
    columns: dict[str, str] = {}
    for column, name in panel.columns.items():
        family = [each for each in there if each.startswith(column)] if column.endswith("_") else []
        columns |= {each: each.removeprefix(column).replace("_", " ") for each in family} or {column: name}
    found = {name: run.points(panel.table, column) for column, name in columns.items()}
    shown = {name: points for name, points in found.items() if points}
    # A term that is off, as a loss without weight, is 0 all the time.
    return shown if panel.axis == "zero" else {name: p for name, p in shown.items() if any(y for _, y in p)}


def _chart(panels: Sequence[tuple[Panel, dict[str, Points]]], columns: int, levels: Mapping[str, float]) -> Chart:
    slots: list[str] = []
    with _canvas(columns, 10.8, 2.7, slots) as all_axes:
        for axes in all_axes[len(panels) :]:
            axes.set_axis_off()
        for axes, (panel, curves) in zip(all_axes, panels, strict=False):
            _draw(axes, panel, curves, levels)
    ends = [
        f"{panel.title}, {name}: {points[-1][1]:.3g} at the end" for panel, curves in panels for name, points in curves.items()
    ]
    return Chart(slots[0], "At the last step: " + "; ".join(ends), "")


def _draw(axes: Axes, panel: Panel, curves: Mapping[str, Points], levels: Mapping[str, float]) -> None:
    values = [y for points in curves.values() for _, y in points]
    for (colour, dash), (name, points) in zip(itertools.cycle(LOOKS), curves.items(), strict=False):
        size = max(1, -(-len(points) // BINS))
        parts = [points[start : start + size] for start in range(0, len(points), size)]
        x = [statistics.fmean(x for x, _ in part) for part in parts]
        y = [statistics.fmean(y for _, y in part) for part in parts]
        if size > 1 and set(values) != {0.0, 1.0}:
            low, high = [min(y for _, y in part) for part in parts], [max(y for _, y in part) for part in parts]
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        look: dict[str, Any] = {"color": colour, "linestyle": dash, "marker": "." if len(x) <= 30 else ""}
        # Not clipped: a curve along the edge, as shares of 0, is seen in its whole width.
        axes.plot(x, y, **look, linewidth=1.4, label=name, clip_on=False)
    level = levels.get(panel.level)
    if level is not None:
        axes.axhline(level, color=MUTED, linewidth=1, linestyle="--", label=panel.level)
    if panel.axis == "log" and min(values) > 0:
        axes.set_yscale("log")
    elif panel.axis == "zero":
        axes.set_ylim(bottom=min(0.0, *values), top=ROOM * max(values) if max(values) > 0 else None)
    axes.set(title=panel.title, xlabel="step")
    axes.locator_params(axis="x", nbins=5)
    if len(curves) > 1 or level is not None:
        axes.legend(fontsize=7.5, handlelength=1.4, borderaxespad=0.2, frameon=True, framealpha=0.85, edgecolor="none")
