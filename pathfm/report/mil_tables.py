"""Tables of what the slide classifier reached: models, levels, classes, folds, groups. None where there is nothing to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pathfm.log import plural
from pathfm.report import mil_words
from pathfm.report.mil_blocks import Bar, Cell, Scale, Table, TableRow, header, number_cell, numeral, row, scale_of
from pathfm.report.results import Estimate, MilResult, ModelScore, TaskResult, estimate, estimates
from pathfm.stats.comparison import chance_of_a_miss

Content = Mapping[str, Any]
FLOW_WORDS: Mapping[str, str] = {"cohort": "in the cohort", "no file": "without a file", "no label": "without a label"}


ORDER = ("cohort", "no file", "failed", "empty", "no label", "left out", "used")
"""From the cohort to the numbers."""


def scale_of_models(task: TaskResult) -> Scale:
    """An axis for the main metric of all models, with chance on it."""
    chance = mil_words.chance_of(task.metric, len(task.classes))
    return scale_of([score.numbers.get(task.metric) for score in task.scores], [] if chance is None else [chance])


def models_table(task: TaskResult) -> Table:
    """The model and its controls: main metric, drawn, the second metric, localisation where any has it."""
    scale, chance = scale_of_models(task), mil_words.chance_of(task.metric, len(task.classes))
    localised = any(score.localisation for score in task.scores)
    names = [task.second] + ["localisation_auroc"] * localised
    title = mil_words.headline(task.metric)
    head: tuple[Cell, ...] = (Cell("Model"), Cell(title, number=True), Cell(f"{title}, drawn", bar=Bar(Estimate(0.0), scale)))
    head += tuple(Cell(mil_words.headline(name), number=True) for name in names)

    def of(score: ModelScore) -> TableRow:
        found = score.numbers.get(task.metric)
        bar = Cell(bar=Bar(found, scale, chance, score.is_primary)) if found else Cell()
        first = Cell(score.name, score.explanation, tag=score.seen_words)
        cells = (first, number_cell(found), bar, *(number_cell(score.numbers.get(name)) for name in names))
        return TableRow(cells, score.is_primary)

    return Table("Model and controls, with 95 % intervals", head, tuple(map(of, task.scores)), scale)


def comparison_table(task: TaskResult) -> Table | None:
    """The main metric of the model minus that of every control, with the verdict in words."""
    found = task.content.get("comparisons") or []
    if not found:
        return None
    rows = []
    for each in found:
        difference = estimate({**each, "value": each["difference"]})
        chances = [Cell("–" if p is None else spoken_p(p), number=True) for p in (each["p"], mil_words.corrected_p(each))]
        verdict = Cell(each["verdict"], each.get("method") or "")
        rows.append(row(f"against {each['other']}", number_cell(difference), *chances, verdict))
    head = (*header("The model", f"difference in {mil_words.title(task.metric)}", "p", "p (Holm)"), Cell("Verdict"))
    caption = (
        "Differences on the same patients; 95 % intervals are of each alone, p (Holm) is corrected for "
        f"{plural(len(found), 'comparison')}, and the verdict follows it"
    )
    return Table(caption, head, tuple(rows))


def spoken_p(p: float) -> str:
    """A p value as text."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def levels_table(task: TaskResult, level: str) -> Table:
    """All metrics of the main model, at the level of the bags and at those above."""
    entry = task.main.content
    levels = {level: entry, **(entry.get("levels") or {})}
    usable = {name: content for name, content in levels.items() if "refused" not in content}
    found = {name: estimates(content) for name, content in usable.items()}
    metrics = metric_names(list(found.values()))
    rows = [
        row(
            mil_words.headline(name),
            *(number_cell(numbers.get(name)) for numbers in found.values()),
            why=mil_words.detail(name, task.positive_of_two),
            primary=name == task.metric,
        )
        for name in metrics
    ]
    counts = [str(content.get("n_bags", "–")) for content in usable.values()]
    rows.append(row("judged", *counts, why="bags of this level"))
    heads = [f"per {name}" for name in found]
    return Table(f"All numbers of the {task.main.name}, with 95 % intervals", header("Metric", *heads), tuple(rows))


def metric_names(found: Sequence[Mapping[str, object]]) -> list[str]:
    """The metrics that any of these has, in the order of tables; AUCs at single times by time."""
    names = {name for numbers in found for name in numbers}
    times = sorted((name for name in names - set(mil_words.METRICS) if name.startswith("auc_")), key=_time)
    return [name for name in mil_words.METRICS if name in names] + times


def _time(name: str) -> float:
    return float(name.removeprefix("auc_"))


def parts_table(task: TaskResult) -> Table | None:
    """Numbers of every class against the rest, or of every column."""
    parts = task.main.content.get("per_class") or task.main.content.get("per_column")
    if not parts:
        return None
    found = {name: estimates(content) for name, content in parts.items()}
    names = [name for name in metric_names(list(found.values())) if name in {"auroc", "auprc", "sensitivity", "specificity"}]
    rows = [row(part, *(number_cell(numbers.get(name)) for name in names)) for part, numbers in found.items()]
    what = "column" if "per_column" in task.main.content else "label"
    caption = "Every column by itself" if what == "column" else "Every label against all others"
    heads = [mil_words.headline(name) for name in names]
    return Table(f"{caption}, with 95 % intervals", header(what, *heads), tuple(rows))


def fold_table(task: TaskResult) -> Table | None:
    """The main metric fold by fold, and its mean with the corrected interval."""
    folds = task.content.get("folds")
    if not folds or not folds["values"]:
        return None
    names = folds.get("names") or ()
    rows = [row(part_name(number, names), numeral(value, 3)) for number, value in enumerate(folds["values"])]
    mean = number_cell(estimate({**folds, "value": folds["mean"]}))
    rows.append(row("mean", mean, why=_corrected(folds), primary=True))
    return Table("Fold by fold", header("Test part", mil_words.headline(folds["metric"])), tuple(rows))


def split_names(result: MilResult) -> Sequence[str]:
    """Names of the folds, as those of sites; none in results of older versions."""
    names: Sequence[str] = (result.content.get("splits") or {}).get("names") or ()
    return names


def part_name(number: int, names: Sequence[str]) -> str:
    """What a fold is called."""
    return names[number] if number < len(names) else f"fold {number}"


def _corrected(folds: Content) -> str:
    p = folds.get("p_vs_chance")
    return "corrected resampled t-test" + ("" if p is None else f"; against chance p {spoken_p(p)}")


def subgroup_table(task: TaskResult) -> Table | None:
    """The main and the second metric group by group; only counts where a group is too small."""
    groups = task.content.get("subgroups") or []
    if not groups:
        return None
    names = [task.metric, task.second]
    rows = []
    for group in groups:
        counts = ", ".join(f"{count} {name}" for name, count in group.get("counts", {}).items())
        cells: list[Cell | str] = [Cell(str(group["n_patients"]), counts, number=True)]
        numbers = estimates(group)
        cells += [Cell("–", group["note"], number=False), *[Cell("–", number=True)] * (len(names) - 1)] if group["note"] else [
            number_cell(numbers.get(name)) for name in names
        ]  # fmt: skip
        rows.append(row(group["value"], *cells, why=group["column"]))
    heads = ("patients", *map(mil_words.headline, names))
    caption, judged = "Group by group, with 95 % intervals", sum(not group["note"] for group in groups)
    if judged > 1:
        chance = chance_of_a_miss(judged)
        caption += f". Of {judged} such intervals at least one misses its truth by chance in up to {chance:.0%} of studies"
    return Table(caption, header("Group", *heads), tuple(rows))


def flow_table(result: MilResult) -> Table | None:
    """Slides and patients from the cohort to the numbers; the losses and the rest add up to the cohort."""
    flow = result.content.get("flow") or {}
    kinds = {name: counts for name, counts in flow.items() if isinstance(counts, Mapping)}
    if not kinds:
        return None
    always = {"cohort", "used"}
    names = [name for name in ORDER if name in always or any(counts.get(name) for counts in kinds.values())]

    def cells(name: str) -> list[str]:
        sign = "" if name in always else "– "
        return [f"{sign}{counts.get(name, 0):,}" for counts in kinds.values()]

    rows = [row(FLOW_WORDS.get(name, name), *cells(name), primary=name == "used") for name in names]
    judged = {"slides": result.n_slides, "patients": result.n_patients}
    if any(counts.get("used") != judged.get(kind) for kind, counts in kinds.items()):
        rows.append(row("judged", *(f"{judged[kind]:,}" for kind in kinds), why="used, and in a test part"))
    return Table("From the cohort to the numbers", header("", *kinds), tuple(rows))


def search_table(result: MilResult) -> Table | None:
    """What each outer fold chose for itself, and how close the runner-up was."""
    found = result.content.get("search") or []
    if not found:
        return None
    rows = []
    for choice in found:
        means = sorted((each["mean"] for each in choice["candidates"] if each["mean"] is not None), reverse=True)
        chosen = ", ".join(f"{name} {value}" for name, value in choice["chosen"].items())
        best, next_best = (numeral(means[place] if place < len(means) else None, 3) for place in (0, 1))
        rows.append(
            row(part_name(choice["fold"], split_names(result)), Cell(chosen), best, next_best, str(len(choice["candidates"])))
        )
    title = mil_words.title(result.task.metric)
    head = (Cell("Outer fold"), Cell("chosen"), *header("", f"inner {title}", "next best", "tried")[1:])
    return Table("Settings that each fold chose on its own training patients", head, tuple(rows))


def leak_table(result: MilResult) -> Table | None:
    """Slides that are the same in some way."""
    leaks = result.content.get("leaks") or []
    if not leaks:
        return None
    rows = [
        row(each["kind"], Cell(", ".join(each["slides"])), Cell(", ".join(each["patients"])), Cell(each["detail"]))
        for each in leaks
    ]
    return Table("Slides that share data", tuple(map(Cell, ("What", "Slides", "Patients", "Detail"))), tuple(rows))
