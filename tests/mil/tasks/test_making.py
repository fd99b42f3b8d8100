from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pathfm.errors import StoreError, UsageError
from pathfm.mil.tasks import task_from_record, tasks_from_record
from pathfm.mil.tasks.contract import Bank
from tests.mil.tasks.conftest import SETTINGS, make, table

MULTI = {**SETTINGS["binary"], "also": [{**SETTINGS[kind], "weight": 0.5} for kind in ("ordinal", "regression", "cox")]}


def rows_of(**columns):
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


REFUSED = {
    "no rows": ({}, [], "nothing to learn from"),
    "unknown column": ({"label": "lesoin"}, None, "no label column 'lesoin', did you mean 'lesion'?"),
    "empty column": ({}, rows_of(label=["", ""]), "'label' is empty"),
    "one class": ({}, rows_of(label=["yes", "yes"]), "needs two classes, but there is yes"),
    "unknown positive": ({"label": "organ", "positive": "Lungs"}, None, "did you mean 'lung'? (classes: colon, lung, skin)"),
    "binary of three": ({"label": "organ", "kind": "binary"}, None, "binary means two classes, but there are 3"),
    "classes that differ in case": ({}, rows_of(label=["Yes", "yes"]), "'Yes' and 'yes' are too alike"),
    "classes that share a column": ({}, rows_of(label=["a,b", "a;b"]), "'a,b' and 'a;b' are too alike"),
    "a missing value as a class": ({}, rows_of(label=["a", "b", "NA"]), "'NA' is no class (leave the cell empty"),
    "numbers as classes": ({"label": "age"}, None, "different numbers: are they classes? (set kind=regression"),
    "ids as classes": ({}, rows_of(label=[f"case {n}" for n in range(30)]), "30 different labels, as 'case 0'"),
    "order without kind": ({"label": "grade", "kind": "ordinal"}, None, "needs an order (set order to ['high', 'low', 'mid']"),
    "order misses a label": (
        {"label": "grade", "order": ["low", "hihg", "mid"]},
        None,
        "misses the label 'high', did you mean",
    ),
    "order names one twice": ({"label": "grade", "order": ["low", "mid", "low"]}, None, "names a class twice"),
    "no columns": ({"kind": "multilabel"}, None, "needs columns"),
    "columns twice": ({"columns": ["braf", "braf"]}, None, "each named once"),
    "unknown of the columns": ({"columns": ["braf", "kars"]}, None, "no label column 'kars', did you mean 'kras'?"),
    "not 0 or 1": ({"columns": ["a"]}, rows_of(a=["0", "1", "2", "x"]), "column 'a': not 0 or 1: '2', 'x' (leave the cell"),
    "only zeros": ({"columns": ["a"]}, rows_of(a=["0", "0", ""]), "column 'a': a column needs both 0 and 1"),
    "not a number": ({"label": "a", "kind": "regression"}, rows_of(a=["1", "1,5", "nan"]), "not a number: '1,5', 'nan'"),
    "one number": ({"label": "a", "kind": "regression"}, rows_of(a=["3", "3.0"]), "all values are 3"),
    "time alone": ({"time": "months"}, None, "survival needs two columns"),
    "unknown time": ({"time": "month", "event": "died"}, None, "no label column 'month', did you mean 'months'?"),
    "negative time": ({"time": "t", "event": "e"}, rows_of(t=["-2", "3"], e=["1", "0"]), "not a time of 0 or more: '-2'"),
    "event not 0/1": ({"time": "t", "event": "e"}, rows_of(t=["2", "3"], e=["1", "dead"]), "column 'e': not 0 or 1: 'dead'"),
    "no event": ({"time": "t", "event": "e"}, rows_of(t=["2", "3"], e=["0", "0"]), "no event was observed"),
    "horizon too late": ({**SETTINGS["cox"], "horizons": [9999]}, None, "nobody is followed to the horizon 9999"),
    "setting of another kind": (
        {"label": "lesion", "horizons": [3]},
        None,
        "horizons has no meaning for a task of kind binary",
    ),
    "intervals for cox": ({**SETTINGS["cox"], "intervals": 5}, None, "leave it out, or set kind=discrete"),
}


@pytest.mark.parametrize(("settings", "rows", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_in_one_line(settings, rows, message):
    with pytest.raises(UsageError) as error:
        make(rows, **settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_kind_follows_settings_then_labels():
    assert make(rows_of(label=["0", "1", ""])).main.kind == "binary"
    assert make(rows_of(label=["0", "1", "2"])).main.kind == "multiclass"
    assert make(rows_of(label=["0", "1"]), kind="multiclass").main.kind == "multiclass"
    assert make(label="age", kind="multiclass").outputs > 20
    for kind in ("multilabel", "ordinal", "cox"):
        assert make(**{**SETTINGS[kind], "kind": "auto"}).main.kind == kind


def test_a_class_that_later_data_bring_is_refused():
    with pytest.raises(UsageError, match="no class 'lugn', did you mean 'lung'"):
        make(**SETTINGS["multiclass"]).encode([{"organ": "lugn"}])


def test_a_table_without_the_label_column_has_missing_targets(kind):
    assert np.isnan(make(**SETTINGS[kind]).encode([{}, {"other": "1"}])).all()


def test_names_of_columns_are_safe_in_a_csv_header():
    tasks = make(rows_of(label=["a, b", 'say "x"', "line\nbreak", "grade 2"]))
    assert tasks.columns == ("probability_a_ b", "probability_grade 2", "probability_line_break", "probability_say _x_")


def test_tasks_lie_side_by_side():
    tasks = make(**MULTI)
    assert [task.kind for task in tasks.tasks] == ["binary", "ordinal", "regression", "cox"]
    assert (tasks.outputs, tasks.targets, len(tasks.columns)) == (2 + 2 + 1 + 1, 1 + 1 + 1 + 2, 2 + 3 + 1 + 4)
    assert tasks.columns[:6] == (
        "probability_no",
        "probability_yes",
        "grade_probability_low",
        "grade_probability_mid",
        "grade_probability_high",
        "age_value",
    )
    assert tasks.slice_of(tasks.tasks[3]) == (slice(5, 6), slice(3, 5), slice(6, 10))
    assert tasks.columns[tasks.slice_of(tasks.tasks[3]).columns][0] == "os_risk"
    assert tasks.whole_fold


def test_same_classes_in_two_tasks_have_columns_of_their_own():
    rows = rows_of(a=["no", "yes"], b=["yes", "no"])
    assert len(set(make(rows, label="a", also=[{"label": "b"}]).columns)) == 4


def test_the_loss_is_the_weighted_sum_and_each_task_sees_its_own_bags():
    """Missing labels are missing per task."""
    rows = table()
    for index, row in enumerate(rows):
        row[("lesion", "grade", "age", "months")[index % 4]] = ""
    tasks = make(rows, **MULTI)
    target, output = tasks.encode(rows), torch.from_numpy(np.random.default_rng(0).normal(size=(60, tasks.outputs)))
    weight = torch.from_numpy(tasks.balance(target))
    place = torch.arange(0, 60, 7)
    bank = Bank(output, torch.from_numpy(target), place)
    alone = 0.0
    for number, task in enumerate(tasks.tasks):
        at = tasks.slice_of(task)
        part = Bank(output[:, at.outputs], bank.target_FT[:, at.targets], place)
        loss = task.loss(output[place][:, at.outputs], part.target_FT[place], weight[place, number], part)
        alone += task.weight * loss.item()
        assert np.isnan(target[number::4, at.targets]).all()
    assert tasks.loss(output[place], bank.target_FT[place], weight[place], bank).item() == pytest.approx(alone)


def test_a_task_without_labels_in_a_batch_leaves_the_others_alone():
    tasks, single = make(**MULTI), make(**SETTINGS["binary"])
    target = tasks.encode(table())
    target[:, 1:] = np.nan
    output = torch.from_numpy(np.random.default_rng(0).normal(size=(60, tasks.outputs))).requires_grad_()
    loss = tasks.loss(output, torch.from_numpy(target), torch.ones(60, 4))
    loss.backward()
    assert loss.item() == single.loss(output[:, :2], torch.from_numpy(target[:, :1]), torch.ones(60, 1)).item()
    assert not output.grad[:, 2:].any()


def test_several_tasks_survive_their_record_and_predict_the_same():
    tasks = make(**MULTI)
    output = np.random.default_rng(0).normal(size=(60, tasks.outputs))
    states = tasks.fit_state(output, tasks.encode(table()))
    again = tasks_from_record(tasks.record())
    assert again == tasks
    np.testing.assert_array_equal(again.predict(output, states), tasks.predict(output, states))
    assert set(states) == {"lesion", "grade", "age", "os"}


@pytest.mark.parametrize("record", [{}, {"tasks": []}, {"tasks": [{"kind": "oracle"}]}, {"tasks": [{"kind": "binary"}]}])
def test_a_damaged_record_is_refused(record):
    with pytest.raises(StoreError, match="record"):
        tasks_from_record(record)


def test_a_record_with_a_strange_field_is_refused():
    with pytest.raises(StoreError, match="not the record of a task"):
        task_from_record({**make(**SETTINGS["binary"]).main.record(), "wings": 2})


def test_the_examples_of_the_docs_are_as_they_say():
    page = (Path(__file__).resolve().parents[3] / "docs" / "tasks.md").read_text(encoding="utf-8")
    examples = page.split("```yaml\n")[1].split("```")[0].split("mil:")[1:]
    rows = [
        {
            **row,
            "diagnosis": ("normal", "tumour")[index % 2],
            "grade": f"G{index % 3 + 1}",
            "os_months": str(index + 1),
            "os_event": "1",
        }
        for index, row in enumerate(table(80))
    ]
    kinds = [[task.kind for task in make(rows, **yaml.safe_load(f"mil:{text}")["mil"]).tasks] for text in examples]
    single = [["binary"], ["binary"], ["multilabel"], ["ordinal"], ["regression"], ["cox"], ["discrete"]]
    assert kinds == [*single, ["binary", "ordinal", "cox"]]
