"""The sections about a slide classifier, the same for a study's own page and for an external validation."""

from __future__ import annotations

from pathfm.mil_settings import MilSettings
from pathfm.report import mil_figures, mil_words
from pathfm.report.figures import roc_chart
from pathfm.report.mil_blocks import (
    Card,
    Fold,
    Heading,
    Item,
    Section,
    Table,
    Words,
    header,
    limits,
    numeral,
    pair,
    row,
    some,
)
from pathfm.report.mil_tables import (
    comparison_table,
    flow_table,
    fold_table,
    leak_table,
    levels_table,
    models_table,
    parts_table,
    search_table,
    split_names,
    spoken_p,
    subgroup_table,
)
from pathfm.report.mil_trust import trust_items
from pathfm.report.operating import operating
from pathfm.report.results import MilResult, TaskResult

PREDICT = "pathfm mil predict --bundle OUT/mil/bundle SLIDES --out FOLDER"


def is_external(result: MilResult) -> bool:
    """Whether a locked classifier was judged, and nothing trained."""
    return bool(result.content.get("validation_of"))


def result_sections(result: MilResult, settings: MilSettings | None) -> tuple[Section, ...]:
    """All that is about numbers and decisions; parts that do not exist for the task are not there.

    Args:
        result: what was found.
        settings: how it was trained (columns of survival times); None where nobody knows.
    """
    also = tuple(item for task in result.also for item in _also(task, result))
    sections = (
        Section(
            "controls",
            "Is the model better than simple controls?",
            "Controls",
            () if is_external(result) else _controls(result),
        ),
        Section("curves", "Curves and decisions", "Curves", _curves(result, settings)),
        Section("numbers", "All numbers", "Numbers", _numbers(result)),
        Section("trust", "Can its decisions be trusted?", "Trust", _trust(result)),
        Section("also", "What else the network predicts", "Also", also),
    )
    return tuple(section for section in sections if section.items)


def _controls(result: MilResult) -> tuple[Item, ...]:
    if result.controls:
        lead = (
            "Every row was trained and judged on the same splits. A model is worth its cost only when it beats what colour, "
            "the amount of tissue and an untrained network reach."
        )
    else:
        lead = "No controls were run, so it is not known what colour or the amount of tissue alone would reach."
    return some(
        Words(lead),
        models_table(result.task),
        comparison_table(result.task),
        *_permutations(result),
    )


def _permutations(result: MilResult) -> tuple[Item | None, ...]:
    found = result.content.get("permutations")
    if not found:
        return ()
    title = mil_words.title(result.task.metric)
    words = (
        f"Trained {len(found['values'])} times on shuffled labels, the model reached {title} {found['low']:.2f} to "
        f"{found['high']:.2f} (middle 95 %), against {found['observed']:.2f} on the true ones: p {spoken_p(found['p'])} (with "
        f"so many trainings it cannot be below {1 / (len(found['values']) + 1):.2g}). These had one network per fold."
    )
    return (Heading("Shuffled labels, many times"), Words(words), mil_figures.permutation_chart(result))


def _curves(result: MilResult, settings: MilSettings | None) -> tuple[Item, ...]:
    ranking = mil_figures.ranking_chart(result)
    survival = None
    if settings and settings.time and settings.event:
        survival = mil_figures.survival_chart(result, settings.time, settings.event)
    curves = (pair(roc_chart(result), ranking),) if result.task.kind == "binary" else (ranking,)
    decisions = some(decision_table(result), mil_figures.decision_chart(result.task, result.level))
    return some(*curves, mil_figures.scatter_chart(result), survival, *decisions)


def decision_table(result: MilResult) -> Table | None:
    """True against predicted (most probable) label; None for tasks without exclusive labels."""
    found = operating(result) if result.task.one_of else None
    if found is None:
        return None
    rows = [row(name, *(str(count) for count in found.row(name)), found.recall(name)) for name in found.classes]
    seen = f"; {result.seen.words}" if result.main.transductive and result.seen else ""
    caption = f"{result.level.capitalize()}s by true and most probable label, pooled over the test parts{seen}"
    return Table(caption, header("true label", *(f"predicted {name}" for name in found.classes), "recognised"), tuple(rows))


def _numbers(result: MilResult) -> tuple[Item, ...]:
    task = result.task
    folds, groups = fold_table(task), subgroup_table(task)
    notes = [Words(str(note), "muted") for note in task.main.content.get("notes", [])]
    refused = {name: each["refused"] for name, each in (task.main.content.get("levels") or {}).items() if "refused" in each}
    notes += [Words(f"There are no numbers per {name}: {reason}.", "muted") for name, reason in refused.items()]
    fraction = mil_figures.fraction_chart(result)
    return some(
        levels_table(task, result.level),
        *notes,
        parts_table(task),
        *((Heading("Folds"), folds, Words(task.content["folds"]["note"], "muted")) if folds else ()),
        *((Heading("Groups"), groups) if groups else ()),
        *((Heading("How many labelled patients it takes"), fraction) if fraction else ()),
    )


def _trust(result: MilResult) -> tuple[Item, ...]:
    items = trust_items(result.task, split_names(result))
    reliability = mil_figures.reliability_chart(result.task.content.get("trust") or {})
    if reliability is None:
        return items
    # Below the table of calibration, which comes first.
    place = next((number for number, item in enumerate(items) if isinstance(item, Table)), 0) + 1
    return (*items[:place], reliability, *items[place:])


def _also(task: TaskResult, result: MilResult) -> tuple[Item, ...]:
    found = task.headline
    between = f" (95 % interval {limits(found)})" if limits(found) else ""
    value = numeral(found.value if found else None)
    details = some(
        levels_table(task, result.level),
        parts_table(task),
        fold_table(task),
        subgroup_table(task),
        mil_figures.reliability_chart(task.content.get("trust") or {}),
        mil_figures.decision_chart(task, result.level),
        *trust_items(task, split_names(result)),
    )
    return some(
        Heading(f"{task.label} ({task.kind})"),
        Words(f"{mil_words.headline(task.metric)} {value}{between}."),
        models_table(task) if task.controls else None,
        comparison_table(task),
        Fold(f"All numbers of {task.label}", details),
    )


def design_items(result: MilResult) -> tuple[Item, ...]:
    """Who was judged by whom: flow, splits, shared data, nested search."""
    splits, leaks, search = result.content.get("splits") or {}, leak_table(result), search_table(result)
    return some(
        flow_table(result),
        None if flow_adds_up(result) else Words("The counts of this table do not add up: please report this.", "alarm"),
        Words(f"Splits: scheme {splits['scheme']}; fingerprint of the splits ", code=splits["hash"])
        if "hash" in splits
        else None,
        *(Words(str(note), "muted") for note in splits.get("notes", [])),
        *((Heading("Shared data"), leaks) if leaks else ()),
        *((Heading("Nested search"), search) if search else ()),
    )


def bundle_section(result: MilResult) -> Section | None:
    """The locked classifier and how it is used; None where none was locked."""
    if not result.bundle or is_external(result):
        return None
    locked = "The networks, thresholds and calibration above are locked in the study’s folder mil/bundle. Its SHA-256 is "
    use = "New slides are predicted, and judged where the table has labels, by "
    rest = (
        "Nothing is fitted to them. MODEL_CARD.md in that folder says what it was trained on and where it should not be used."
    )
    items = (Words(locked, code=result.bundle), Words(use, code=PREDICT), Words(rest, "muted"))
    return Section("bundle", "The locked classifier", "Bundle", items)


def methods(result: MilResult) -> str:
    """How the intervals of the headline numbers were found."""
    names = (result.task.metric, result.task.second, "localisation_auroc")
    found = [(name, result.main.numbers.get(name)) for name in names]
    return "; ".join(f"{mil_words.headline(name)}: {each.method}" for name, each in found if each and each.method)


def cards(result: MilResult) -> list[Card]:
    """The headline numbers."""
    task, found = result.task, list[Card]()
    for name in (task.metric, task.second, "localisation_auroc"):
        estimate = result.main.numbers.get(name)
        if estimate is None:
            continue
        about, detail = mil_words.metric(name), mil_words.detail(name, task.positive_of_two)
        chance = mil_words.chance_of(name, len(task.classes))
        if name == "localisation_auroc":
            slides = result.main.localisation_slides
            detail = "tile scores against marked tiles" + (f" on {slides} slides" if slides else "")
        elif name == "balanced_accuracy" and chance is not None:
            detail = f"{detail}; chance is {chance:.2g}"
        elif name == "auroc" and task.kind != "binary":
            detail = f"mean over the {'columns' if task.kind == 'multilabel' else 'labels, each against the rest'}; {detail}"
        found.append(Card(mil_words.headline(name), estimate, detail, chance, not about.lower_is_better))
    return found


def described(result: MilResult) -> str:
    """What was predicted, for the first sentence of a page: the classes, where it has some, and the positive of two."""
    names = (" or " if result.task.one_of else ", ").join(result.classes)
    positive = f"; positive: {result.task.positive_of_two}" if result.task.positive_of_two else ""
    return f" ({names}{positive})" if names else ""


def flow_adds_up(result: MilResult) -> bool:
    """Whether the losses and the rest make up the cohort, of slides and of patients."""
    kinds = [counts for counts in (result.content.get("flow") or {}).values() if isinstance(counts, dict)]
    return all(counts["cohort"] == sum(count for name, count in counts.items() if name != "cohort") for counts in kinds)
