"""The page of a running batch: the latest slides and their flags, every watched number over time, how often nothing is decided.

Everything is shown against the training of the bundle; nothing is computed anew but shares and running medians.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pathfm import __version__
from pathfm.log import plural
from pathfm.report.figures import ACCENT, MUTED, Chart, _canvas, plain
from pathfm.report.page import render_template
from pathfm.stats.thresholds import share_limits
from pathfm.store.commit import commit_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
"""One slide: ``slide_id``, and where known ``time`` (ISO 8601), ``facts``, ``flags`` (records) and ``decision``."""
LISTED, DRAWN, WINDOW, PER_BAR = 100, 300, 50, 25
"""Slides in the table, slides in the diagrams, slides that the headline numbers are about, slides per point of a rate."""
RUNNING = 15
"""Slides of a running median."""
MANY = 100
"""Slides in a diagram above which their points are small."""
ALARM, BAND = "#9b2c1f", "#dfe9f2"
ABSTAIN = "abstain:"


class _Card(NamedTuple):
    """A headline number."""

    label: str
    value: str
    detail: str
    kind: str = ""


class _Rate(NamedTuple):
    """A share with its exact 95 % interval."""

    hits: int
    total: int

    @property
    def limits(self) -> tuple[float, float]:
        return share_limits(self.hits, self.total)

    @property
    def share(self) -> float:
        return self.hits / self.total

    @property
    def words(self) -> str:
        low, high = self.limits
        return f"{self.share:.0%} ({low:.0%} to {high:.0%})"


def write_drift_page(path: Path, reference: Mapping[str, Any], rows: Sequence[Row], shifts: Mapping[str, Any]) -> Path:
    """Writes one HTML file that loads nothing, whole or not at all; the same rows give the same bytes.

    Args:
        path: the file.
        reference: record of the bundle's ``DriftReference``.
        rows: slides in the order of time; of those before the last ``DRAWN`` only the scanner is looked at.
        shifts: record of the ``CohortFlags`` of these rows.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    html = render_drift_page(reference, rows, shifts)
    with commit_file(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


def render_drift_page(reference: Mapping[str, Any], rows: Sequence[Row], shifts: Mapping[str, Any]) -> str:
    """The page as HTML. Everything that came from a file is escaped.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    drawn = rows[-DRAWN:]
    context = {
        "cards": _cards(reference, rows, shifts),
        "shifts": shifts,
        "compared": bool(shifts["tests"]) and not reference["too_few"],
        "rows": [_cells(row) for row in reversed(rows[-LISTED:])],
        "total": len(rows),
        "rate": _rate_chart(reference, drawn),
        "charts": [] if reference["too_few"] else list(_charts(reference, drawn)),
        "drawn": len(drawn),
        "scanners": _scanners(reference, rows[-WINDOW:], rows),
        "reference": reference,
        "expected": reference["limit"]["expected"],
        "window": WINDOW,
        "version": __version__,
    }
    return render_template("drift.html.j2", context)


def _flags(row: Row) -> Sequence[Mapping[str, str]]:
    return row.get("flags") or ()


def _decision(row: Row) -> str:
    return str(row.get("decision") or "")


def _rate(decisions: Sequence[str]) -> _Rate | None:
    """How often nothing was decided, of those that could be."""
    said = [decision for decision in decisions if decision]
    return _Rate(sum(decision.startswith(ABSTAIN) for decision in said), len(said)) if said else None


def _training_rate(reference: Mapping[str, Any]) -> _Rate | None:
    return _rate([name for name, count in reference["decisions"].items() for _ in range(count)])


def _cards(reference: Mapping[str, Any], rows: Sequence[Row], shifts: Mapping[str, Any]) -> list[_Card]:
    last = rows[-WINDOW:]
    flagged, rate, known = (
        sum(bool(_flags(row)) for row in last),
        _rate([_decision(row) for row in last]),
        _training_rate(reference),
    )
    of = f"of the last {plural(len(last), 'slide')}"
    by_chance = "" if reference["too_few"] else f"; about {reference['limit']['expected'] * len(last):.1f} by chance"
    many = rate is not None and known is not None and rate.limits[0] > known.limits[1]
    found = len(shifts["flags"])
    trained = f"{plural(reference['slides'], 'slide')} of {plural(reference['patients'], 'patient')}"
    return [
        _Card("Slides", f"{len(rows):,}", "since the first one here"),
        _Card("Flagged", f"{flagged}", of + by_chance, "warn" if flagged else ""),
        _Card(
            "No decision",
            f"{rate.share:.0%}" if rate else "–",
            f"{rate.words if rate else 'none was asked for'}; training {known.words if known else 'not known'}",
            "alarm" if many else "",
        ),
        _Card(
            "Shifts",
            f"{found}" if shifts["tests"] else "–",
            f"{of}, {plural(shifts['tests'], 'test')}" if shifts["tests"] else "not tested yet",
            "alarm" if found else "",
        ),
        _Card("Training", "too few" if reference["too_few"] else f"{reference['slides']:,}", trained),
    ]


def _cells(row: Row) -> dict[str, Any]:
    decision, facts = _decision(row), row.get("facts") or {}
    return {
        "slide_id": row["slide_id"],
        "time": str(row.get("time") or "")[:16].replace("T", " "),
        "decision": decision.removeprefix(ABSTAIN) if decision.startswith(ABSTAIN) else decision,
        "abstains": decision.startswith(ABSTAIN),
        "scanner": facts.get("scanner") or "not stated",
        "tiles": facts.get("tiles"),
        "flags": [flag["sentence"] for flag in _flags(row)],
    }


def _scanners(reference: Mapping[str, Any], last: Sequence[Row], rows: Sequence[Row]) -> list[tuple[str, int, int, str]]:
    """Scanner, slides of the window, slides of all rows, slides of the training."""

    def counts(chosen: Sequence[Row]) -> Counter[str]:
        return Counter(str(row["facts"]["scanner"] or "not stated") for row in chosen if row.get("facts"))

    recent, ever, known = counts(last), counts(rows), reference["scanners"]
    words = {name: f"{count:,}" if count is not None else "fewer than 5" for name, count in known.items()}
    return [(name, recent[name], ever[name], words.get(name, "none")) for name in sorted({*ever, *known})]


def _charts(reference: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[Chart]:
    """One small diagram per watched number that is known of any slide."""
    for name, known in reference["numbers"].items():
        points = [
            (place, float(value), any(flag["name"] == name for flag in _flags(row)))
            for place, row in enumerate(rows)
            if (value := ((row.get("facts") or {}).get("numbers") or {}).get(name)) is not None
        ]
        if not points:
            continue
        slots: list[str] = []
        with _canvas(1, 4.0, 2.1, slots) as (axes,):
            _draw_number(axes, known, points)
            _date_axis(axes, rows)
        flagged = sum(is_flagged for _, _, is_flagged in points)
        alt = f"{known['label']} of {plural(len(points), 'slide')}: {flagged} outside what the training has"
        yield Chart(slots[0], alt, "")


def _draw_number(axes: Axes, known: Mapping[str, Any], points: Sequence[tuple[int, float, bool]]) -> None:
    """Points over the training's range; those flagged stand out by colour and shape."""
    low, high = known["range"]
    values = [value for _, value, _ in points]
    shown = [*values, known["middle"], *(limit for limit in (low, high) if limit is not None)]
    margin = 0.08 * (max(shown) - min(shown) or abs(shown[0]) or 1.0)
    bottom, top = min(shown) - margin, max(shown) + margin
    axes.axhspan(bottom if low is None else low, top if high is None else high, color=BAND, linewidth=0, zorder=0)
    axes.axhline(known["middle"], color=MUTED, linewidth=0.9, linestyle="--", zorder=1)
    size = 6.0 if len(points) <= MANY else 3.4
    usual = [(x, y) for x, y, is_flagged in points if not is_flagged]
    odd = [(x, y) for x, y, is_flagged in points if is_flagged]
    axes.plot([x for x, _ in usual], [y for _, y in usual], "o", color=ACCENT, markersize=size, markeredgewidth=0, alpha=0.6)
    axes.plot([x for x, _ in odd], [y for _, y in odd], "D", color=ALARM, markersize=size + 0.6)
    if len(values) > RUNNING:
        middle = [statistics.median(values[end - RUNNING : end]) for end in range(RUNNING, len(values) + 1)]
        axes.plot([x for x, _, _ in points[RUNNING - 1 :]], middle, color=ACCENT, linewidth=1.5)
    axes.set(title=plain(known["label"]), ylim=(bottom, top))
    if known["form"].endswith("%"):
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    axes.locator_params(axis="y", nbins=4)


def _date_axis(axes: Axes, rows: Sequence[Row]) -> None:
    """Slides stand at equal distances; a few of them are dated, by the time where all are of one day.

    Where even the minute is that of the tick before, by the second; and where times tell nothing apart, by their number.
    """
    ticks = sorted({round(part * (len(rows) - 1) / 3) for part in range(4)})
    times = [str(row.get("time") or "") for row in rows]
    one_day = len({time[:10] for time in times}) == 1
    parts = (slice(11, 16), slice(11, 19)) if one_day else (slice(10),)
    labels = [[times[tick][part] for tick in ticks] for part in parts]
    numbers = [str(tick + 1) for tick in ticks]
    told = next((names for names in labels if all(names) and len(set(names)) == len(ticks)), numbers if one_day else labels[0])
    axes.set_xticks(ticks, [name or number for name, number in zip(told, numbers, strict=True)], fontsize=7)
    if day := times[0][:10] if one_day else "":
        axes.set_xlabel(f"{day}{' (UTC)' if times[0].endswith('+00:00') else ''}", fontsize=7)
    axes.set_xlim(-0.5 - len(rows) * 0.02, len(rows) - 0.5 + len(rows) * 0.02)
    axes.grid(visible=False, axis="x")


def _rate_chart(reference: Mapping[str, Any], rows: Sequence[Row]) -> Chart | None:
    """How often nothing was decided, group by group of slides; None where nothing could be."""
    said = [(place, decision) for place, row in enumerate(rows) if (decision := _decision(row))]
    # Counted from the newest back, so that the last group is a whole one; what is left over comes first and says little.
    groups = [said[max(0, end - PER_BAR) : end] for end in range(len(said), 0, -PER_BAR)][::-1]
    groups = [group for group in groups if len(group) == PER_BAR or len(groups) == 1]
    points = [(statistics.fmean(x for x, _ in group), _rate([name for _, name in group])) for group in groups]
    found = [(x, rate) for x, rate in points if rate is not None]
    if not found:
        return None
    known, slots = _training_rate(reference), list[str]()
    with _canvas(1, 9.0, 2.5, slots) as (axes,):
        if known is not None:
            axes.axhspan(*known.limits, color=BAND, linewidth=0, zorder=0)
            axes.axhline(known.share, color=MUTED, linewidth=0.9, linestyle="--", zorder=1)
        x, y = [x for x, _ in found], [rate.share for _, rate in found]
        reach = [[rate.share - rate.limits[0] for _, rate in found], [rate.limits[1] - rate.share for _, rate in found]]
        axes.errorbar(x, y, yerr=reach, color=ACCENT, marker="o", markersize=4, linewidth=1.4, elinewidth=1, capsize=3)
        axes.set(ylim=(-0.02, 1.02))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        _date_axis(axes, rows)
    last = found[-1][1]
    caption = f"Groups of {PER_BAR} slides with exact 95 % intervals; band and dashed line: the training, out of fold."
    return Chart(slots[0], f"Share without a decision, at last {last.words}", caption, wide=True)
