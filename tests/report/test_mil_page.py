import base64
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pathfm.errors import UsageError
from pathfm.report import mil_figures, mil_words
from pathfm.report.figures import plain, roc_chart
from pathfm.report.mil_blocks import Heading, Item, Scale, Table, Words, scale_of
from pathfm.report.mil_predictions import Risks, probability_columns, ranked, risk_groups, risks, said_by_slide, said_of
from pathfm.report.mil_sections import bundle_section, cards, described, design_items, flow_adds_up, result_sections
from pathfm.report.mil_tables import fold_table, models_table, subgroup_table
from pathfm.report.mil_validation import validation_page
from pathfm.report.results import Estimate, MilResult, read_mil
from pathfm.report.summary import key_numbers, summarise, warnings
from pathfm.stats.metrics import auroc
from tests.report.conftest import write_csv
from tests.report.mil_results import FOLDS, KINDS, PATIENTS, content_of, settings_of, write_folder

CHARTS = {
    "binary": ("ROC", "Precision", "Decision curve", "Reliability"),
    "multiclass": ("ROC curves, and precision", "Reliability"),
    "ordinal": ("ROC curves, and precision", "Reliability"),
    "multilabel": ("ROC curves, and precision",),
    "regression": ("Predicted against true",),
    "cox": ("Kaplan-Meier",),
    "discrete": ("Kaplan-Meier",),
}


def read(folder: Path) -> MilResult:
    result = read_mil(folder)
    assert result is not None
    return result


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("kinds")
    return {kind: write_folder(base / kind, kind) for kind in KINDS}


def everything(items: tuple[Item, ...]) -> list[Item]:
    """All parts, those inside others as well."""
    return [part for item in items for part in (item, *everything(getattr(item, "items", ())))]


def text_of(items: tuple[Item, ...]) -> str:
    """All words of a section."""
    found = []
    for part in everything(items):
        if isinstance(part, Table):
            found += [part.caption] + [f"{cell.text} {cell.why} {cell.tag}" for row in part.rows for cell in row.cells]
        elif isinstance(part, Words | Heading):
            found.append(part.text)
    return "\n".join(found)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_numbers_and_pictures_and_nothing_empty(folders: dict[str, Path], kind: str) -> None:
    result = read(folders[kind])
    sections = result_sections(result, settings_of(kind))
    shown = {section.key: section.items for section in sections}
    assert set(shown) == {"controls", "curves", "numbers", "trust"}
    captions = [part.caption for items in shown.values() for part in everything(items) if part.form == "chart"]  # type: ignore[union-attr]
    assert all(any(caption.startswith(words) for caption in captions) for words in CHARTS[kind]), captions
    for items in shown.values():
        assert items and all(part.rows for part in everything(items) if isinstance(part, Table))
        assert all(part.text and "None" not in part.text for part in everything(items) if isinstance(part, Words))
    words = text_of(shown["controls"] + shown["numbers"])
    headline = result.task.headline
    assert headline is not None and f"{headline.value:.3f}" in words
    assert mil_words.headline(result.task.metric) in words and "Nadeau and Bengio" in words
    assert [card.title for card in cards(result)] == [
        mil_words.headline(name) for name in (result.task.metric, result.task.second)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_validation_page_of_every_kind_is_self_contained(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    content = json.loads((folders[kind] / "metrics.json").read_text())
    kept = ("classes", "kind", "label", "level", "n_patients", "n_slides", "positive", "trust", "flow", "seen_in_pretraining")
    numbers = {key: value for key, value in content["models"]["our encoder"].items() if key not in {"levels", "transductive"}}
    external = {key: content[key] for key in kept} | {"primary": "bundle", "validation_of": "b" * 64, "also": {}, "notes": []}
    folder = tmp_path / "of elsewhere <i>"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({**external, "models": {"bundle": numbers}}))
    page = validation_page(folder, settings_of(kind))
    html = page.read_text(encoding="utf-8")
    assert page == folder / "index.html" and "b" * 64 in html and "Nothing was fitted" in html
    assert (
        "<i>" not in html
        and "<script" not in html
        and str(tmp_path) not in html
        and "http" not in html.replace("http-equiv", "")
    )
    assert "simple controls" not in html and "Fold by fold" not in html
    before = page.read_bytes()
    validation_page(folder, settings_of(kind))
    assert page.read_bytes() == before


def test_curves_of_a_validation_are_those_of_its_numbers(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    rng = np.random.default_rng(3)
    score, sick = rng.random(40).round(2), np.arange(40) % 3 == 0
    value = auroc(score[5:], sick[5:])
    content = {key: json.loads((folders["binary"] / "metrics.json").read_text())[key] for key in ("kind", "label")}
    content |= {
        "classes": ["well", "sick"],
        "positive": "sick",
        "level": "patient",
        "n_slides": 80,
        "n_patients": 35,
        "primary": "bundle",
        "notes": [],
    }
    content |= {"validation_of": "b" * 64, "trained_on": {"rule": "exclude", "patients": 5}}
    content["models"] = {"bundle": {"auroc": {"value": value, "low": 0.1, "high": 0.9, "method": "x"}}}
    (folder / "metrics.json").write_text(json.dumps(content))
    names = "patient_id,label,trained_on,probability_well,probability_sick"
    # The five patients that the networks learned from, and one without a label, are not among the judged ones.
    rows = [(f"P{n}", ("well", "sick")[int(sick[n])], "same" * (n < 5), 1 - score[n], score[n]) for n in range(40)]
    write_csv(folder / "patients.csv", names, [*rows, ("P99", "", "", 0.1, 0.9)])
    write_csv(folder / "predictions.csv", names, [(*row[:3], rng.random(), rng.random()) for row in rows * 2])
    result = read(folder)
    (found,) = ranked(result)
    points = mil_figures._roc(found)
    x, y = ([point[name] for point in points] for name in ("false_positive_rate", "true_positive_rate"))
    assert np.trapezoid(y, x) == pytest.approx(result.task.headline.value)  # type: ignore[union-attr]
    html = validation_page(folder).read_text(encoding="utf-8")
    assert f"<h1>External validation of {content['label']}</h1>" in html and "one point for each patient" in html
    content["level"] = "slide"
    (folder / "metrics.json").write_text(json.dumps(content))
    assert len(ranked(read(folder))[0].score_N) == 70


def test_validation_without_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no slide has a label"):
        validation_page(tmp_path)
    (tmp_path / "metrics.json").write_text('{"models": {}}')
    with pytest.raises(UsageError, match="no slide has a label"):
        validation_page(tmp_path)


def test_further_tasks_have_their_own_numbers(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "two", "binary")
    content = json.loads((folder / "metrics.json").read_text())
    other = json.loads((folders["regression"] / "metrics.json").read_text())
    content["also"] = {"size": {key: other[key] for key in ("kind", "classes", "positive", "models", "folds", "trust")}}
    (folder / "metrics.json").write_text(json.dumps(content))
    result = read(folder)
    also = next(section for section in result_sections(result, None) if section.key == "also")
    assert "size (regression)" in text_of(also.items) and "Mean absolute error" in text_of(also.items)


def test_no_difference_is_called_not_significant(tmp_path: Path) -> None:
    result = read(write_folder(tmp_path / "weak", "multiclass", skill=0.0))
    controls = next(section for section in result_sections(result, None) if section.key == "controls")
    assert "not significantly different" in text_of(controls.items)
    assert any("not significantly different" in line or "adds nothing" in line for line in warnings(result))
    assert any("chance" in line for line in warnings(result))


def test_a_model_that_stands_apart_has_no_warning(folders: dict[str, Path]) -> None:
    assert warnings(read(folders["binary"])) == ()


@pytest.mark.parametrize(
    ("classes", "warned"), [("lesion/normal", True), ("mutated/wild-type", True), ("abnormal/lesion", False)]
)
def test_a_positive_class_that_nobody_chose_and_that_sounds_healthy_is_told_first(tmp_path, classes, warned) -> None:
    folder, names = write_folder(tmp_path / "swapped", "binary"), classes.split("/")
    text = (folder / "metrics.json").read_text().replace('"sick"', f'"{names[1]}"').replace('"well"', f'"{names[0]}"')
    (folder / "metrics.json").write_text(text)
    silent = settings_of("binary").model_copy(update={"positive": None})
    told = [line for line in warnings(read(folder), silent) if line.startswith("Nobody chose the positive class")]
    assert bool(told) == warned and all(f"set mil.positive={names[0]}" in line for line in told)
    assert warnings(read(folder), settings_of("binary")) == warnings(read(folder)) == ()


def test_what_decisions_are_about_is_named_in_every_table(folders: dict[str, Path]) -> None:
    result = read(folders["binary"])
    parts = [part for section in result_sections(result, None) for part in everything(section.items)]
    tables = {part.caption.partition(",")[0]: part for part in parts if isinstance(part, Table)}
    heads = [cell.text for cell in tables["Operating points"].header]
    assert heads[-2:] == ["sensitivity for “sick”", "specificity for “sick”"]
    names = {row.cells[0].text: row.cells[0].why for row in tables["All numbers of the our encoder"].rows}
    assert names["Sensitivity"].startswith("share of “sick”") and "all but “sick”" in names["Specificity"]
    assert "sensitivity for “sick”" in [row.cells[0].text for row in tables["Decisions"].rows]
    assert "abstain:" not in text_of(tuple(parts)) and "Not decided: " in text_of(tuple(parts))
    assert described(result) == " (sick or well; positive: sick)"
    several = text_of(tuple(part for section in result_sections(read(folders["multiclass"]), None) for part in section.items))
    assert "share of positives that are called so" in several


def test_shuffled_labels_below_zero_are_no_leak_for_numbers(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "r", "regression")
    content = json.loads((folder / "metrics.json").read_text())
    many = content.pop("permutations")
    for value, leaks in ((-0.3, False), (0.3, True)):
        shuffled = {"r2": {"value": value, "low": value - 0.1, "high": value + 0.1, "method": "bootstrap"}}
        content["models"]["shuffled labels"] = shuffled
        (folder / "metrics.json").write_text(json.dumps(content))
        assert any("leaks" in line and "one shuffle" in line for line in warnings(read(folder))) == leaks
    # Many shuffles are asked instead of one: these lie off 0.
    for low, leaks in ((-0.1, False), (0.4, True)):
        content["permutations"] = many | {"low": low}
        (folder / "metrics.json").write_text(json.dumps(content))
        lines = [line for line in warnings(read(folder)) if "leaks" in line]
        assert bool(lines) == leaks and not any("one shuffle" in line for line in lines)


@pytest.mark.parametrize(("kind", "metric"), [("ordinal", "kappa"), ("regression", "r2")])
def test_no_page_claims_an_interval_that_there_is_not(tmp_path: Path, kind: str, metric: str) -> None:
    folder = write_folder(tmp_path / "none", kind)
    content = json.loads((folder / "metrics.json").read_text())
    content.pop("permutations")
    for value in (0.21, 0.0):
        for name in ("our encoder", "shuffled labels"):
            content["models"].setdefault(name, {})[metric] = {"value": value, "low": None, "high": None, "method": "none"}
        (folder / "metrics.json").write_text(json.dumps(content))
        lines = [line for line in warnings(read(folder)) if "interval" in line or "chance" in line]
        assert not any("interval" in line for line in lines)
        assert bool(lines) == (value == 0.0)


def test_every_control_that_is_not_beaten_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "c", "binary")
    content = json.loads((folder / "metrics.json").read_text())
    model, model_value = content["models"]["our encoder"], content["models"]["our encoder"]["auroc"]["value"]
    for name, value, p, p_holm in (
        ("tile count", -0.1, 0.34, 0.34),
        ("untrained encoder", -0.2, 0.03, 0.11),
        ("other", 0.01, 0.9, 0.9),
        ("bad", -0.4, 0.001, 0.005),
    ):
        content["models"][name] = model | {"auroc": model["auroc"] | {"value": model_value + value}}
        content["comparisons"].append(content["comparisons"][0] | {"other": name, "p": p, "p_holm": p_holm})
    model["localisation_auroc"] = {"value": 0.3, "low": 0.2, "high": 0.41, "method": "bootstrap"}
    (folder / "metrics.json").write_text(json.dumps(content))
    lines = warnings(read(folder))
    assert "The controls" not in lines[0] and "The control “other” is at least as good" in lines[0]
    assert "the controls “tile count” (p 0.34) and “untrained encoder” (p 0.11) are not significantly different" in lines[1]
    assert "localisation AUROC lies below 0.5" in lines[2] and "bad" not in " ".join(lines)


def test_small_groups_have_counts_only(folders: dict[str, Path]) -> None:
    table = subgroup_table(read(folders["binary"]).task)
    assert table is not None
    rome = next(row for row in table.rows if row.cells[0].text == "Rome")
    assert rome.cells[1].text == "4" and "2 sick" in rome.cells[1].why
    assert [cell.text for cell in rome.cells[2:]] == ["–", "–"] and "too few" in rome.cells[2].why


def test_flow_adds_up_or_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    result = read(folders["binary"])
    assert flow_adds_up(result)
    table = next(item for item in design_items(result) if isinstance(item, Table))
    slides = [int(row.cells[1].text.replace("– ", "-")) for row in table.rows]
    assert slides[0] + sum(slides[1:-1]) == slides[-1] == PATIENTS
    folder = write_folder(tmp_path / "odd", "binary")
    content = json.loads((folder / "metrics.json").read_text())
    content["flow"]["patients"]["used"] = 7
    (folder / "metrics.json").write_text(json.dumps(content))
    assert "do not add up" in text_of(design_items(read(folder)))


def test_design_names_splits_leaks_and_search(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "leak", "binary")
    content = json.loads((folder / "metrics.json").read_text())
    leak = {"kind": "same picture", "slides": ["S01", "S02"], "patients": ["P01", "P02"], "detail": "3 bits", "crosses": True}
    content["leaks"] = [leak]
    (folder / "metrics.json").write_text(json.dumps(content))
    result = read(folder)
    words = text_of(design_items(result))
    for part in ("scheme folds", "one patient is in no test part", "same picture", "S01, S02", "lr 0.01"):
        assert part in words
    assert any("share data" in line for line in warnings(result))


def test_folds_have_their_names(folders: dict[str, Path], tmp_path: Path) -> None:
    table = fold_table(read(folders["binary"]).task)
    assert table is not None and len(table.rows) == FOLDS + 1 and table.rows[0].cells[0].text == "fold 0"
    folder = write_folder(tmp_path / "sites", "binary")
    content = json.loads((folder / "metrics.json").read_text())
    content["folds"]["names"] = content["splits"]["names"] = ["Oslo", "Rome", "Bern", "Cork"]
    (folder / "metrics.json").write_text(json.dumps(content))
    sections = {section.key: text_of(section.items) for section in result_sections(read(folder), None)}
    assert "Rome" in sections["numbers"] and "Rome" in sections["trust"] and "fold 1" not in sections["trust"]
    assert "Oslo  " in text_of(design_items(read(folder)))


def test_bundle_names_its_digest_and_the_command(folders: dict[str, Path], tmp_path: Path) -> None:
    assert bundle_section(read(folders["binary"])) is None
    folder = write_folder(tmp_path / "b", "binary")
    (folder / "bundle").mkdir()
    (folder / "bundle" / "bundle.json").write_bytes(b"{}")
    section = bundle_section(read(folder))
    assert section is not None
    codes = [item.code for item in section.items if isinstance(item, Words)]
    assert codes[0].startswith("44136fa355b3678a") and "pathfm mil predict --bundle" in codes[1]


@pytest.mark.parametrize("kind", KINDS)
def test_printed_lines_are_short_and_of_the_kind(folders: dict[str, Path], kind: str) -> None:
    result = read(folders[kind])
    summary = summarise("x", "f", (), result)
    lines = key_numbers(summary)
    assert summary["primary_metric"] == result.task.metric and lines[1].startswith(mil_words.title(result.task.metric))
    assert summary["primary_low"] <= summary["primary_value"] <= summary["primary_high"]
    assert (summary["auroc"] is None) == (kind in {"regression", "cox", "discrete"})
    assert len(lines) <= 8 and all(len(line) < 160 for line in lines)


def test_pictures_show_the_numbers_of_the_file(folders: dict[str, Path]) -> None:
    result = read(folders["multilabel"])
    for name, each in zip(result.classes, ranked(result), strict=True):
        column = result.main.content["per_column"][name]
        assert auroc(each.score_N, each.positive_N) == pytest.approx(column["auroc"]["value"])
    binary = read(folders["binary"])
    assert auroc(*ranked(binary)[0][1:]) == pytest.approx(binary.task.headline.value)  # type: ignore[union-attr]
    assert said_by_slide(binary)["S01"][0] == "predicted probability of sick" and "P01" in said_by_slide(binary)


def test_risk_groups_are_cut_inside_folds(folders: dict[str, Path]) -> None:
    found = risks(read(folders["cox"]), "months", "dead")
    group_N = risk_groups(found, 2)
    for fold in np.unique(found.fold_N):
        inside = found.fold_N == fold
        assert found.risk_N[inside][group_N[inside] == 0].max() <= found.risk_N[inside][group_N[inside] == 1].min()
    assert len(found.time_N) == PATIENTS and abs(int((group_N == 0).sum()) - int((group_N == 1).sum())) <= FOLDS
    shifted = Risks(found.risk_N + 100 * (found.fold_N == "1"), *found[1:])
    assert (risk_groups(shifted, 2) == group_N).all()


def test_the_risk_of_a_patient_is_that_of_all_slides_also_of_those_whose_row_has_no_label(folders: dict[str, Path]) -> None:
    rows = [{"patient_id": "p", "risk": "0.2", "label": ""}, {"patient_id": "p", "risk": "0.4", "label": "months=3 dead=1"}]
    result = replace(read(folders["cox"]), predictions=(*rows, {"patient_id": "q", "risk": "0.9", "label": "months=3"}))
    found = risks(result, "months", "dead")
    assert found.risk_N.tolist() == pytest.approx([0.3]) and (found.time_N.tolist(), found.event_N.tolist()) == ([3], [True])


def test_bands_of_survival_are_those_of_a_plain_calculation() -> None:
    time, event = np.array([1.0, 2, 2, 3, 4, 5]), np.array([1, 1, 0, 1, 0, 1], dtype=bool)
    low, high = mil_figures._greenwood(np.array([1.0, 2, 3, 5]), time, event)
    # By hand: S(2) = 5/6 * 4/5, sum d / (n (n - d)) = 1/30 + 1/20.
    survival, spread = 2 / 3, 1.959964 * np.sqrt(1 / 30 + 1 / 20) / abs(np.log(2 / 3))
    assert low[1] == pytest.approx(survival ** np.exp(spread)) and high[1] == pytest.approx(survival ** np.exp(-spread))
    assert np.isnan(low[3]) and np.isnan(high[3])


def test_survival_picture_needs_the_columns(folders: dict[str, Path]) -> None:
    result = read(folders["cox"])
    assert mil_figures.survival_chart(result, "months", "dead") is not None
    assert mil_figures.survival_chart(result, "weeks", "dead") is None
    assert mil_figures.survival_chart(read(folders["binary"]), "months", "dead") is None


def test_names_with_signs_of_formulas_are_drawn_as_they_are(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", "binary")
    for name in ("metrics.json", "predictions.csv"):
        path = folder / name
        path.write_text(re.sub("sick", r"$sick^$", path.read_text()))
    chart = mil_figures.ranking_chart(read(folder))
    assert chart is not None and b"<svg" in base64.b64decode(chart.uri.partition(",")[2])


def test_names_in_other_scripts_are_drawn_as_question_marks_and_written_as_they_are(folders, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", "binary")
    for name in ("metrics.json", "predictions.csv", "roc.csv"):
        path = folder / name
        path.write_text(path.read_text().replace("our encoder", "日本|x").replace("\\u65e5", "日"))
    result = read(folder)
    assert roc_chart(result) is not None and "日本|x" in text_of(result_sections(result, None)[0].items)  # warnings are errors
    assert plain("日本|x é\n$") == "??|x é\n\\$"


def test_small_numbers_are_shown(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "small", "regression")
    content = json.loads((folder / "metrics.json").read_text())
    content["models"]["our encoder"]["mae"] = {"value": 3.2e-7, "low": 2.1e-7, "high": 4.4e-7, "method": "bootstrap"}
    (folder / "metrics.json").write_text(json.dumps(content))
    result = read(folder)
    numbers = text_of(tuple(part for section in result_sections(result, None) for part in section.items))
    assert "3.2e-07 2.1e-07 to 4.4e-07" in numbers
    assert "3.2e-07" in validation_page(folder).read_text(encoding="utf-8")


def test_the_row_of_the_tile_count_says_which_way_it_was_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "c", "binary")
    content = json.loads((folder / "metrics.json").read_text())
    count = content["models"]["our encoder"] | {"direction": "fewer tiles, more sick"}
    content["models"]["tile count"] = count
    (folder / "metrics.json").write_text(json.dumps(content))
    (row,) = (row for row in models_table(read(folder).task).rows if row.cells[0].text == "tile count")
    assert row.cells[0].why.endswith("; here fewer tiles, more sick")


def test_labels_of_several_columns_are_read_by_name() -> None:
    assert said_of("er=1 pr=0", ("er", "pr")) == {"er": "1", "pr": "0"}
    assert (said_of("her=1", ("er",)), said_of("a.b=2", ("a.b",)), said_of("", ("x",))) == ({}, {"a.b": "2"}, {})
    # A name that ends another one; and tables that name columns of further tasks behind.
    assert said_of("braf mut=0", ("braf mut", "mut")) == {"braf mut": "0"}
    assert said_of("braf mut=0 mut=1 age=50", ("braf mut", "mut")) == {"braf mut": "0", "mut": "1"}
    row: dict[str, Any] = {"probability_a": 1, "probability_b": 2, "grade_probability_a": 3}
    assert probability_columns(row, 2) == ["probability_a", "probability_b"]


def test_scales_hold_chance_and_everything_drawn() -> None:
    scale = scale_of([Estimate(0.7, 0.62, 0.8), None], [0.5])
    assert scale.low <= 0.5 and scale_of([Estimate(-0.2, -3.0, 0.1)], [0.0]).low == -1.0
    assert Scale(-1.0).ticks == (-1.0, -0.5, 0.0, 0.5, 1.0)


def test_metrics_that_are_new_have_a_name() -> None:
    assert mil_words.title("auc_12.5") == "AUC at 12.5" and mil_words.title("some_new") == "some new"
    assert mil_words.chance_of("balanced_accuracy", 4) == 0.25 and mil_words.chance_of("brier", 2) is None


def test_trust_says_why_there_are_no_sets(tmp_path: Path) -> None:
    content, _, _ = content_of("binary")
    folder = write_folder(tmp_path / "t", "binary")
    content["trust"]["conformal"] = {"refused": "too few patients to calibrate"}
    (folder / "metrics.json").write_text(json.dumps(content))
    trust = next(section for section in result_sections(read(folder), None) if section.key == "trust")
    assert "There are none: too few patients to calibrate." in text_of(trust.items)
