"""Charts of what the slide classifier found. What does not exist for a task is None, never an empty picture.

Legend: N bags, T times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pathfm.report import mil_predictions, mil_words
from pathfm.report.figures import (
    ACCENT,
    BACKED,
    CONTROL_COLOURS,
    CONTROL_DASHES,
    GRID,
    MUTED,
    SECOND,
    Chart,
    _canvas,
    _thin,
    plain,
)
from pathfm.report.results import MilResult, TaskResult, estimate
from pathfm.stats.curves import precision_recall_points, roc_points
from pathfm.stats.survival import kaplan_meier

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Content = Mapping[str, Any]
Floats = NDArray[np.float64]
CHANCE_LINE: Mapping[str, Any] = {"color": "#9aa5b0", "linewidth": 1, "linestyle": (0, (4, 3)), "zorder": 1}
OFFSET: Mapping[str, Any] = {"textcoords": "offset points"}
COLOURS = (ACCENT, *CONTROL_COLOURS)
DASHES = ("-", *CONTROL_DASHES)
MOST_LINES = len(COLOURS)
LEAST_FOR_TERCILES = 90
"""Patients from which on three risk groups can be told apart, else two."""
MOST_LOOKS = 8
"""Slides whose deletion and insertion curves are drawn."""


def ranking_chart(result: MilResult) -> Chart | None:
    """Precision and recall of the main model, and, of several classes or columns, its ROC curves; None without scores."""
    found = mil_predictions.ranked(result)[:MOST_LINES]
    if not found:
        return None
    # Of two classes ``roc.csv`` has the ROC curves of all models.
    several, slots = result.task.kind != "binary" or not result.roc, list[str]()
    with _canvas(1 + several, 4.6 * (1 + several), 4.6, slots) as panels:
        for place, each in enumerate(found):
            look: dict[str, Any] = {"color": COLOURS[place], "linestyle": DASHES[place], "linewidth": 2.0}
            points = precision_recall_points(each.score_N, each.positive_N)
            curve = [(0.0, points[0]["precision"]), *((row["recall"], row["precision"]) for row in points)]
            share = float(each.positive_N.mean())
            steps = {**look, "label": plain(f"{each.name} (share {share:.2f})"), "drawstyle": "steps-pre"}
            panels[-1].plot(*zip(*_thin(curve), strict=True), **steps)
            panels[-1].axhline(share, **{**CHANCE_LINE, "color": look["color"], "linewidth": 0.8})
            if several:
                corners = [(row["false_positive_rate"], row["true_positive_rate"]) for row in _roc(each)]
                panels[0].plot(*zip(*_thin(corners), strict=True), label=plain(each.name), **look)
        if several:
            panels[0].plot([0, 1], [0, 1], **CHANCE_LINE)
            panels[0].set(xlabel="false positive rate (1 - specificity)", ylabel="true positive rate (sensitivity)")
            panels[0].legend(loc="lower right", fontsize=8, **BACKED)
        panels[-1].set(xlabel="recall (sensitivity)", ylabel="precision (share of calls that are right)")
        panels[-1].legend(loc="upper right" if several else "lower left", fontsize=8, **BACKED)
        for axes in panels:
            axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.03))
    what = "ROC curves, and precision against recall," if several else "Precision against recall"
    names = ", ".join(each.name for each in found)
    rest = "each label against all others" if result.task.one_of and len(found) > 1 else names
    whose = "the locked classifier" if result.content.get("validation_of") else "the main model"
    caption = f"{what} of {whose}, one point for each {result.level}: {rest}. Precision in steps, whose area is the average "
    caption += "precision. Dashed: what guessing reaches (the share of positives)."
    return Chart(slots[0], f"{what} of the main model", caption + _seen(result), wide=several)


def _roc(each: mil_predictions.Ranked) -> list[dict[str, float]]:
    return roc_points(each.score_N, each.positive_N)


def reliability_chart(trust: Content) -> Chart | None:
    """Probability against observed share, before and after calibration, with counts; None without a reliability table."""
    calibration = trust.get("calibration") or {}
    before, after = calibration.get("reliability_before"), calibration.get("reliability")
    states = {"before calibration": before, f"after calibration ({calibration.get('kind')})": after}
    if calibration.get("kind") == "none" or before == after:
        states = {"not calibrated": after or before}
    # A single bin says no more than the share of all.
    drawn = {name: rows for name, rows in states.items() if rows and len(rows) > 1}
    if not drawn:
        return None
    slots: list[str] = []
    with _canvas(len(drawn), 4.4 * len(drawn), 4.3, slots) as panels:
        for axes, (name, rows), colour in zip(panels, drawn.items(), (SECOND, ACCENT), strict=False):
            axes.plot([0, 1], [0, 1], **CHANCE_LINE)
            for row in rows:
                low, high = row.get("observed_low", row["observed"]), row.get("observed_high", row["observed"])
                axes.plot([row["mean"]] * 2, [low, high], color=colour, linewidth=1.4, alpha=0.7)
                axes.annotate(f"{row['count']:g}", (row["mean"], high), (0, 3), ha="center", fontsize=7, **OFFSET)
            axes.plot([row["mean"] for row in rows], [row["observed"] for row in rows], "o-", color=colour, markersize=5)
            axes.set(title=name, xlim=(-0.02, 1.02), ylim=(-0.02, 1.08), aspect="equal")
            axes.set(xlabel="mean predicted probability of the bin", ylabel="observed share")
    event = calibration.get("event", "the label")
    caption = (
        f"Reliability of the probability of {_quoted(event)}: bins of equally many {_unit(trust)}s, the number above each, "
        "with 95 % intervals of the observed share. On the dashed line, probabilities mean what they say."
    )
    return Chart(slots[0], f"Reliability of the probability of {event}", caption, wide=len(drawn) > 1)


def decision_chart(task: TaskResult, unit: str) -> Chart | None:
    """Net benefit of acting on the model, on all, on nobody; None where the task has no decision curve."""
    rows = task.content.get("decision_curve")
    if not rows:
        return None
    slots: list[str] = []
    x = [row["threshold"] for row in rows]
    with _canvas(1, 8.6, 3.4, slots) as (axes,):
        axes.plot(x, [row["all"] for row in rows], color=SECOND, linewidth=1.4, linestyle="--", label="act on all")
        axes.plot(x, [row["none"] for row in rows], color=MUTED, linewidth=1.4, linestyle=":", label="act on nobody")
        axes.plot(x, [row["model"] for row in rows], color=ACCENT, linewidth=2.2, label="act on the model")
        highest = max(row["all"] for row in rows)
        axes.set(xlim=(0, 1), ylim=(-0.35 * highest, 1.15 * highest))
        axes.set(xlabel="probability from which on one acts", ylabel=f"net benefit per {unit}")
        axes.legend(loc="upper right", fontsize=8, **BACKED)
    from_what = "calibrated on the other folds" if task.content.get("decision_curve_calibrated") else "not calibrated"
    caption = (
        f"Decision curve of {_quoted(task.positive)}, from probabilities that are {from_what}: true "
        "positives minus false positives, weighted by the odds of the threshold. Useful where it lies above both other lines."
    )
    return Chart(slots[0], "Decision curve: net benefit against threshold", caption, wide=True)


def fraction_chart(result: MilResult) -> Chart | None:
    """The main metric against the number of training patients; None where that was not asked for."""
    name = result.task.metric
    rows = [(row, estimate(row.get(name))) for row in result.content.get("label_fractions") or []]
    points = [(float(row["n_patients"]), row, found) for row, found in rows if found is not None]
    if len(points) < 2:
        return None
    slots: list[str] = []
    with _canvas(1, 5.4, 3.8, slots) as (axes,):
        x, y = [count for count, _, _ in points], [found.value for _, _, found in points]
        for count, _, found in points:
            if found.low is not None and found.high is not None:
                axes.plot([count, count], [found.low, found.high], color=ACCENT, linewidth=1.5, alpha=0.7)
        axes.plot(x, y, "o-", color=ACCENT, linewidth=2)
        for count, row, found in points:
            axes.annotate(
                f"{row['fraction']:.0%}", (count, found.value), (6, -11), textcoords="offset points", fontsize=8, color=MUTED
            )
        _chance(axes, name, result)
        axes.set(xlabel="training patients (mean over the folds)", ylabel=mil_words.title(name))
        axes.set_xlim(0, 1.1 * max(x))
    caption = (
        "What more labelled patients would bring: the main model trained on shares of the training patients, judged on the "
        "same test parts, with 95 % intervals. A curve that still rises asks for more patients."
    )
    return Chart(slots[0], f"{mil_words.title(name)} against the number of training patients", caption + _seen(result))


def permutation_chart(result: MilResult) -> Chart | None:
    """The main metric of trainings on shuffled labels beside that of the model; None where there were none."""
    found = result.content.get("permutations")
    if not found:
        return None
    values, slots = sorted(found["values"]), list[str]()
    with _canvas(1, 5.4, 2.6, slots) as (axes,):
        axes.axvspan(found["low"], found["high"], color=GRID, zorder=0)
        axes.hist(values, bins=min(20, 4 + math.isqrt(len(values))), color=MUTED, alpha=0.75, label="shuffled labels")
        axes.axvline(found["observed"], color=ACCENT, linewidth=2.4, label="the model")
        axes.locator_params(axis="y", integer=True)
        axes.margins(y=0.25)
        axes.set(xlabel=mil_words.title(result.task.metric), ylabel="trainings")
        axes.legend(loc="upper left", fontsize=8, ncols=2)
    caption = f"{len(values)} trainings on shuffled labels (grey: their middle 95 %) and the model on the true ones (line)."
    alt = f"{mil_words.title(result.task.metric)} of shuffled labels and of the model"
    return Chart(slots[0], alt, caption + _seen(result))


def scatter_chart(result: MilResult) -> Chart | None:
    """Predicted against true values of a regression; None for other tasks."""
    if result.task.kind != "regression":
        return None
    said_N, true_N = mil_predictions.numbers(result)
    if not len(said_N):
        return None
    slots: list[str] = []
    low, high = float(min(said_N.min(), true_N.min())), float(max(said_N.max(), true_N.max()))
    room = 0.04 * (high - low or 1.0)
    with _canvas(1, 4.6, 4.6, slots) as (axes,):
        axes.plot([low, high], [low, high], **CHANCE_LINE)
        axes.scatter(true_N, said_N, s=18, color=ACCENT, alpha=0.55, linewidths=0)
        axes.set(xlim=(low - room, high + room), ylim=(low - room, high + room), aspect="equal")
        axes.set(xlabel=plain(f"true {result.label}"), ylabel=plain(f"predicted {result.label}"))
    caption = f"Predicted against true {result.label}: {len(said_N)} {result.level}s, out of fold. Dashed: equal."
    return Chart(slots[0], f"Predicted against true {result.label}", caption + _seen(result))


def survival_chart(result: MilResult, time: str, event: str) -> Chart | None:
    """Kaplan-Meier curves of risk groups, with the numbers at risk; None for other tasks, or with one group."""
    if result.task.kind not in {"cox", "discrete"}:
        return None
    found = mil_predictions.risks(result, time, event)
    groups = 3 if len(found.risk_N) >= LEAST_FOR_TERCILES else 2
    group_N = mil_predictions.risk_groups(found, groups)
    if len(set(group_N.tolist())) < groups:
        return None
    names = ("lowest risk", "middle risk", "highest risk") if groups == 3 else ("lower risk", "higher risk")
    colours = (ACCENT, "#5f7f2e", SECOND)[:: 2 if groups == 2 else 1]
    slots: list[str] = []
    last = float(found.time_N.max())
    with _canvas(1, 6.4, 4.6, slots) as (axes,):
        for group, (name, colour) in enumerate(zip(names, colours, strict=True)):
            inside = group_N == group
            _draw_survival(axes, found.time_N[inside], found.event_N[inside], name, colour)
        axes.set(xlim=(0, last), ylim=(0, 1.03), ylabel="share without the event")
        axes.legend(loc="lower left", fontsize=8, **BACKED)
        _draw_at_risk(axes, found.time_N, group_N, (names, colours))
        # The empty lines are where the numbers at risk stand.
        axes.set_xlabel(plain(time) + "\n" * (groups + 1))
    what = "terciles" if groups == 3 else "halves"
    caption = (
        f"Kaplan-Meier curves of {len(group_N)} patients in {what} of predicted risk, cut within each test part (networks of "
        "different folds have scales of their own). Bands: 95 % (log-log Greenwood); marks: censored."
    )
    return Chart(slots[0], f"Kaplan-Meier curves of {what} of predicted risk", caption + _seen(result))


def _draw_survival(axes: Axes, time_N: Floats, event_N: NDArray[np.bool_], name: str, colour: str) -> None:
    curve = kaplan_meier(time_N, event_N)
    x = np.concatenate([[0.0], curve.time_T, [time_N.max()]])
    y = curve.at(x)
    axes.step(
        x, y, where="post", color=colour, linewidth=2, label=f"{name}: {len(time_N)} patients, {int(event_N.sum())} events"
    )
    low, high = _greenwood(curve.time_T, time_N, event_N)
    axes.fill_between(curve.time_T, low, high, step="post", color=colour, alpha=0.13, linewidth=0)
    lost_N = time_N[~event_N]
    axes.plot(lost_N, curve.at(lost_N), "|", color=colour, markersize=6)


def _greenwood(time_T: Floats, time_N: Floats, event_N: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Limits [T] of survival on the log-log scale (Kalbfleisch and Prentice 1980); nothing where it is 1 or 0."""
    at_risk = np.array([(time_N >= time).sum() for time in time_T], dtype=np.float64)
    events = np.array([(event_N & (time_N == time)).sum() for time in time_T], dtype=np.float64)
    left = np.maximum(at_risk - events, 1e-9)
    survival = np.clip(np.cumprod(1 - events / at_risk), 1e-9, 1 - 1e-9)
    spread = 1.959964 * np.sqrt(np.cumsum(events / (at_risk * left))) / np.abs(np.log(survival))
    low, high = survival ** np.exp(np.minimum(spread, 50.0)), survival ** np.exp(-np.minimum(spread, 50.0))
    return np.where(at_risk > events, low, np.nan), np.where(at_risk > events, high, np.nan)


def _draw_at_risk(axes: Axes, time_N: Floats, group_N: NDArray[np.intp], looks: tuple[Sequence[str], Sequence[str]]) -> None:
    """Numbers at risk below the axis, in the colours of the curves."""
    ticks = [float(tick) for tick in axes.get_xticks() if 0 <= tick <= time_N.max()]
    axes.set_xticks(ticks)
    places: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "annotation_clip": False}
    axes.annotate("at risk", (0, 0), (-30, -46), ha="right", fontsize=8, color=MUTED, **places)
    for group, colour in enumerate(looks[1]):
        for tick in ticks:
            left = int(((group_N == group) & (time_N >= tick)).sum())
            axes.annotate(str(left), (tick, 0), (0, -46 - 11 * group), ha="center", fontsize=8, color=colour, **places)


def looks_chart(result: MilResult) -> Chart | None:
    """Deletion and insertion curves of the shown bags; None where there are none."""
    looks = result.content.get("looks") or {}
    curves = dict(list((looks.get("deletion_insertion") or {}).items())[:MOST_LOOKS])
    if not curves:
        return None
    columns = min(4, len(curves))
    rows, slots = -(-len(curves) // columns), list[str]()
    with _canvas(columns, 2.6 * columns, 2.5 * rows + 0.3, slots, rows) as panels:
        for axes, (name, curve) in zip(panels, curves.items(), strict=False):
            for key, colour, dash, word in (
                ("insertion_K", ACCENT, "-", "highest tiles alone"),
                ("deletion_K", SECOND, "--", "without the highest"),
                ("random_K", MUTED, ":", "tiles at random"),
            ):
                axes.plot(curve["kept_K"], curve[key], color=colour, linestyle=dash, linewidth=1.6, label=word)
            axes.set_title(plain(name), fontsize=8)
            axes.locator_params(nbins=4)
            if result.classes:  # probabilities: one scale, so that small changes look small
                axes.set_ylim(-0.03, 1.03)
        for axes in panels[len(curves) :]:
            axes.set_visible(False)
        panels[0].legend(fontsize=7, **BACKED)
        for place, axes in enumerate(panels[: len(curves)]):
            axes.set_xlabel("tiles left", fontsize=8)
            if place % columns == 0:
                axes.set_ylabel(plain(_asked(result)), fontsize=8)
    caption = (
        f"Do the tiles that the {looks.get('kind', 'attention')} points at decide? {_capital(_asked(result))} from the highest "
        "tiles alone, from all but the highest, and from as many drawn at random. Where the first two do not part from chance "
        "(dotted), the map says little about the decision."
    )
    return Chart(slots[0], "Deletion and insertion curves of the shown slides", caption + _seen(result), wide=True)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _asked(result: MilResult) -> str:
    """What the deletion curves show."""
    kind = result.task.kind
    if kind == "regression":
        return f"predicted {result.label}"
    if kind in {"cox", "discrete"}:
        return "predicted risk"
    return f"probability of {result.positive or result.classes[0]}"


def _chance(axes: Axes, name: str, result: MilResult) -> None:
    chance = mil_words.chance_of(name, len(result.classes))
    if chance is not None:
        axes.axhline(chance, **CHANCE_LINE)


def _seen(result: MilResult) -> str:
    """What a picture has to say when it is cut out of the page."""
    return f" {result.seen.words.capitalize()}." if result.seen and result.seen.transductive else ""


def _quoted(name: object) -> str:
    return "the most probable class" if name == "most probable class" else f"“{name}”"


def _unit(trust: Content) -> str:
    return str(trust.get("unit") or "patient")
