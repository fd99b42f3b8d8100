"""Judging: every kind of task, tables in any order, and nothing said that the patients cannot tell."""

import itertools
import json
import math
import time

import numpy as np
import pytest
from sklearn import metrics as reference

from pathfm.errors import UsageError
from pathfm.mil import judging
from pathfm.mil.judging import (
    Answers,
    FoldPart,
    aggregate,
    compare,
    corrected,
    fold_table,
    judge,
    permutation_record,
    subgroup_table,
)
from pathfm.mil.measures import MAIN
from pathfm.mil.tasks.classes import Binary, Multiclass, Multilabel, Ordinal
from pathfm.mil.tasks.regression import Regression
from pathfm.mil.tasks.survival import Cox, Discrete
from pathfm.mil_settings import NumberSettings
from pathfm.stats.intervals import auroc_interval
from tests.stats.plain_survival import concordance_index, time_dependent_auc

NUMBERS = NumberSettings(bootstrap=200)
BINARY = Binary(name="label", classes=("no", "yes"), positive=1)
TASKS = {
    "binary": BINARY,
    "multiclass": Multiclass(name="type", classes=("a", "b", "c"), positive=2),
    "ordinal": Ordinal(name="grade", classes=("low", "middle", "high"), positive=2),
    "multilabel": Multilabel(name="genes", classes=("BRAF", "KRAS")),
    "regression": Regression(name="age"),
    "cox": Cox(name="death", horizons=(0.5, 1.0)),
    "discrete": Discrete(name="death", horizons=(0.5, 1.0)),
}


def cohort(task, bags=90, per_patient=1, seed=0):
    """Predictions that know something, targets some of which are missing, and patients."""
    rng = np.random.default_rng(seed)
    patients = [f"p{place // per_patient:03d}" for place in range(bags)]
    if task.kind == "multilabel":
        target = (rng.random((bags, 2)) < 0.4).astype(float)
        prediction = 1 / (1 + np.exp(-(rng.normal(size=(bags, 2)) + 2 * target - 1)))
        target[rng.random((bags, 2)) < 0.1] = np.nan
    elif task.kind == "regression":
        target = rng.normal(50, 10, (bags, 1))
        prediction = target + rng.normal(0, 5, (bags, 1))
    elif task.classes:
        classes = len(task.classes)
        target = (np.arange(bags) // per_patient % classes).astype(float)[:, None]
        logit = rng.normal(size=(bags, classes)) + 1.5 * np.eye(classes)[target[:, 0].astype(int)]
        prediction = np.exp(logit) / np.exp(logit).sum(axis=1, keepdims=True)
    else:
        time, event = rng.exponential(size=bags), (rng.random(bags) < 0.6).astype(float)
        risk = rng.normal(size=bags) - np.log(time)
        chance = 1 / (1 + np.exp(risk))
        target, prediction = np.stack([time, event], axis=1), np.stack([risk, chance, chance**2], axis=1)
    target[::17] = np.nan
    return prediction, target, patients


def numbers_of(result):
    return {name: entry for name, entry in result.items() if isinstance(entry, dict) and "method" in entry}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_metric_of_every_kind_has_a_value_inside_its_interval(task):
    prediction, target, patients = cohort(task)
    result = judge(task, prediction, target, patients, NUMBERS, 0)
    expected = {"binary", "multiclass", "ordinal", "multilabel"} & {task.kind}
    names = {"auroc", "auprc", "balanced_accuracy", "f1", "brier", "ece", "sensitivity", "specificity"} if expected else set()
    names |= {"ordinal": {"kappa"}, "regression": {"r2", "mae", "pearson"}}.get(task.kind, set())
    names |= {"c_index", "auc_t", "auc_0.5", "auc_1"} if task.kind in ("cox", "discrete") else set()
    assert set(numbers_of(result)) == names and MAIN[task.kind] in names
    for entry in numbers_of(result).values():
        assert entry["low"] <= entry["value"] <= entry["high"]
        assert entry["low"] < entry["high"]
    assert result["notes"] == []
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@pytest.mark.parametrize("per_patient", [1, 3])
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_order_of_rows_changes_nothing_at_all(task, per_patient):
    """STAMP loses slides of an unsorted table."""
    prediction, target, patients = cohort(task, per_patient=per_patient)
    other = cohort(task, per_patient=per_patient, seed=1)[0]
    place = np.random.default_rng(5).permutation(len(patients))
    shuffled = (prediction[place], target[place], [patients[each] for each in place])
    assert judge(task, *shuffled, NUMBERS, 0) == judge(task, prediction, target, patients, NUMBERS, 0)
    mixed = compare(task, Answers("a", shuffled[0]), Answers("b", other[place]), *shuffled[1:], NUMBERS, 0)
    assert mixed == compare(task, Answers("a", prediction), Answers("b", other), target, patients, NUMBERS, 0)
    column = ["x", "y", ""] * 30
    rows = subgroup_table(task, *shuffled, {"site": [column[each] for each in place]}, NUMBERS, 0)
    assert rows == subgroup_table(task, prediction, target, patients, {"site": column}, NUMBERS, 0)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_bags_without_a_target_take_no_part(task):
    prediction, target, patients = cohort(task)
    known = ~np.isnan(target).all(axis=1)
    inside = [name for name, keep in zip(patients, known, strict=True) if keep]
    result = judge(task, prediction, target, patients, NUMBERS, 0)
    assert result == judge(task, prediction[known], target[known], inside, NUMBERS, 0)
    assert result["n_bags"] == known.sum()


def test_values_are_those_of_scikit_learn_and_of_survival():
    prediction, target, patients = (each[1:] for each in cohort(BINARY, 17))
    label, chance = target[:, 0].astype(int), prediction[:, 1]
    judged = numbers_of(judge(BINARY, prediction, target, patients, NUMBERS, 0))
    wanted = {
        "auroc": reference.roc_auc_score(label, chance),
        "auprc": reference.average_precision_score(label, chance),
        "balanced_accuracy": reference.balanced_accuracy_score(label, chance > 0.5),
        "f1": reference.f1_score(label, chance > 0.5),
        "brier": reference.brier_score_loss(label, chance),
        "sensitivity": reference.recall_score(label, chance > 0.5),
        "specificity": reference.recall_score(1 - label, chance <= 0.5),
    }
    assert {name: judged[name]["value"] for name in wanted} == pytest.approx(wanted, rel=1e-12)
    risk, target, patients = (each[1:] for each in cohort(TASKS["cox"], 17))
    result = judge(TASKS["cox"], risk, target, patients, NUMBERS, 0)
    assert result["c_index"]["value"] == pytest.approx(concordance_index(risk[:, 0], *target.T), rel=1e-12)
    assert result["auc_1"]["value"] == pytest.approx(time_dependent_auc(-risk[:, 2], *target.T, 1.0), rel=1e-12)


def test_the_first_class_can_be_the_positive_one():
    prediction, target, patients = cohort(BINARY)
    mirrored = Binary(name="label", classes=("yes", "no"), positive=0)
    assert judge(mirrored, prediction[:, ::-1], 1 - target, patients, NUMBERS, 0)["auroc"]["value"] == pytest.approx(
        judge(BINARY, prediction, target, patients, NUMBERS, 0)["auroc"]["value"]
    )


def test_one_bag_per_patient_has_the_delong_interval_and_several_have_the_patient_bootstrap():
    prediction, target, patients = cohort(BINARY)
    known = ~np.isnan(target[:, 0])
    alone = judge(BINARY, prediction, target, patients, NUMBERS, 0)["auroc"]
    assert alone == auroc_interval(prediction[known, 1], target[known, 0] == 1)._asdict()
    copies = judge(BINARY, np.repeat(prediction, 5, 0), np.repeat(target, 5, 0), np.repeat(patients, 5).tolist(), NUMBERS, 0)
    assert copies["auroc"]["method"] == "bootstrap over patients, logit"
    assert copies["auroc"]["value"] == pytest.approx(alone["value"])
    width, wanted = (each["high"] - each["low"] for each in (copies["auroc"], alone))
    assert 0.85 < width / wanted < 1.2  # five copies of a slide are no more evidence than one
    assert copies["n_patients"] * 5 == copies["n_bags"]


@pytest.mark.parametrize("task", [BINARY, TASKS["multiclass"], TASKS["ordinal"]], ids=["binary", "multiclass", "ordinal"])
def test_one_class_only_is_never_a_perfect_auroc(task):
    """DSMIL sets the AUROC to 1 where there is one class only."""
    prediction, target, patients = cohort(task)
    result = judge(task, prediction, np.zeros_like(target), patients, NUMBERS, 0)
    absent = ("auroc", "auprc", "balanced_accuracy", "f1")
    assert all(result[name] == {"value": None, "low": None, "high": None, "method": "undefined"} for name in absent)
    assert f"auroc: no patient of class {', '.join(task.classes[1:])}" in result["notes"]
    assert result["brier"]["value"] is not None
    if task.kind == "binary":
        assert result["sensitivity"]["value"] is None and result["specificity"]["value"] is not None


def test_nothing_to_judge_is_said():
    for task in TASKS.values():
        prediction, target, patients = cohort(task)
        unknown = np.full_like(target, np.nan)
        result = judge(task, prediction, unknown, patients, NUMBERS, 0)
        assert (result["n_patients"], result[MAIN[task.kind]]["value"]) == (0, None)
        assert result["notes"] == ["no bag has a target"]
        nobody = compare(
            task, Answers("a", prediction), Answers("b", prediction), np.full_like(target, np.nan), patients, NUMBERS, 0
        )
        assert nobody["verdict"] == "a and b cannot be compared: no bag has a target"


@pytest.mark.parametrize("task", [BINARY, TASKS["ordinal"]], ids=["binary", "ordinal"])
@pytest.mark.parametrize("per_patient", [1, 2])
def test_a_perfect_model_is_not_certain_to_be_perfect(task, per_patient):
    _, target, patients = cohort(task, 36, per_patient)
    target = np.where(np.isnan(target), 0.0, target)
    classes, prediction = len(task.classes), np.eye(len(task.classes))[target[:, 0].astype(int)] * 0.8 + 0.1
    result = judge(task, prediction / prediction.sum(1, keepdims=True), target, patients, NUMBERS, 0)
    for name in ("auroc", "auprc", "balanced_accuracy", "f1", "sensitivity", "specificity", *["kappa"] * (classes > 2)):
        entry = result[name]
        assert entry["value"] == pytest.approx(1.0)
        assert 0.3 < entry["low"] < 0.97, name
    if classes == 2:
        positives = len({name for name, label in zip(patients, target[:, 0], strict=True) if label == 1})
        assert result["sensitivity"]["low"] == pytest.approx(0.025 ** (1 / positives))  # Clopper-Pearson


def test_a_model_that_never_says_yes_is_not_certain_to_find_nobody():
    _, target, patients = cohort(BINARY, 40)
    result = judge(BINARY, np.tile([0.9, 0.1], (40, 1)), target, patients, NUMBERS, 0)
    positives = int(np.nansum(target))
    assert result["sensitivity"]["value"] == 0.0
    assert result["sensitivity"]["high"] == pytest.approx(1 - 0.025 ** (1 / positives))
    assert result["specificity"]["low"] < 0.9
    assert result["auroc"]["low"] < 0.3 < 0.7 < result["auroc"]["high"]
    assert result["balanced_accuracy"]["low"] < 0.5 < result["balanced_accuracy"]["high"]


def test_a_perfect_order_of_risks_is_not_certain_either():
    time = np.arange(1.0, 21.0)
    target = np.stack([time, np.ones(20)], axis=1)
    chance = time / 30
    task = Cox(name="death", horizons=(5.0,))
    result = judge(task, np.stack([-time, chance], axis=1), target, [f"p{place}" for place in range(20)], NUMBERS, 0)
    assert result["c_index"] == {"value": 1.0, "low": pytest.approx(0.025**0.1), "high": 1.0, "method": "exact, disjoint pairs"}


def test_a_class_with_one_patient_gets_a_value_and_the_reason_why_no_interval():
    prediction, target, patients = cohort(BINARY, 30)
    target = np.zeros_like(target)
    target[3] = 1.0
    result = judge(BINARY, prediction, target, patients, NUMBERS, 0)
    assert result["auprc"]["value"] is not None and result["auprc"]["low"] is None
    assert "auprc: no interval: a class has one patient" in result["notes"]
    assert result["auroc"]["low"] is not None  # the largest variance there can be


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_handful_of_patients_never_crashes_and_never_warns(task):
    for bags, seed in itertools.product((1, 2, 3, 5), range(4)):
        prediction, target, patients = cohort(task, bags + 1, seed=seed)
        result = judge(task, prediction[1:], target[1:], patients[1:], NUMBERS, 0)
        json.dumps(result, allow_nan=False)
        for entry in numbers_of(result).values():
            assert (entry["value"] is None) <= (entry["low"] is None)


def test_several_classes_are_given_one_by_one_too():
    for name in ("multiclass", "ordinal"):
        prediction, target, patients = cohort(TASKS[name])
        result = judge(TASKS[name], prediction, target, patients, NUMBERS, 0)
        parts = result["per_class"]
        assert set(parts) == set(TASKS[name].classes)
        assert np.mean([part["auroc"]["value"] for part in parts.values()]) == pytest.approx(result["auroc"]["value"])
        assert np.mean([part["sensitivity"]["value"] for part in parts.values()]) == pytest.approx(
            result["balanced_accuracy"]["value"]
        )
        assert all(part["auroc"]["method"] == "DeLong, logit" for part in parts.values())


def test_columns_with_missing_values_are_judged_on_the_bags_that_have_them():
    prediction, target, patients = cohort(TASKS["multilabel"])
    result = judge(TASKS["multilabel"], prediction, target, patients, NUMBERS, 0)
    for place, name in enumerate(("BRAF", "KRAS")):
        known = ~np.isnan(target[:, place])
        alone = reference.roc_auc_score(target[known, place], prediction[known, place])
        assert result["per_column"][name]["auroc"]["value"] == pytest.approx(alone)
        assert result["per_column"][name]["n_bags"] == known.sum()
    assert result["auroc"]["value"] == pytest.approx(
        np.mean([part["auroc"]["value"] for part in result["per_column"].values()])
    )
    target[:, 1] = 0.0
    result = judge(TASKS["multilabel"], prediction, target, patients, NUMBERS, 0)
    assert "auroc: column KRAS: no patient of class KRAS" in result["notes"]
    assert result["per_column"]["BRAF"]["auroc"]["value"] is not None


def test_predictions_that_are_not_finite_are_refused():
    prediction, target, patients = cohort(BINARY)
    prediction[5] = np.nan
    with pytest.raises(ValueError, match="finite"):
        judge(BINARY, prediction, target, patients, NUMBERS, 0)


def test_slides_are_averaged_into_patients_in_any_order():
    prediction = np.array([[0.2, 0.8], [0.1, 0.9], [0.4, 0.6], [0.7, 0.3]])
    target = np.array([[1.0], [0.0], [np.nan], [0.0]])
    groups = ["b", "a", "b", "a"]
    wanted = aggregate(prediction, target, groups)
    assert wanted[2] == ("a", "b")
    assert wanted[0] == pytest.approx(np.array([[0.4, 0.6], [0.3, 0.7]]))
    assert wanted[1].tolist() == [[0.0], [1.0]]
    for order in itertools.permutations(range(4)):
        found = aggregate(prediction[list(order)], target[list(order)], [groups[place] for place in order])
        assert (found[0] == wanted[0]).all() and (found[1] == wanted[1]).all() and found[2] == wanted[2]
    unknown = aggregate(prediction, np.full((4, 2), np.nan), groups)
    assert np.isnan(unknown[1]).all()


def test_slides_of_a_patient_that_contradict_each_other_are_named():
    with pytest.raises(UsageError, match="bags of 'a' have different targets: 0 and 1") as caught:
        aggregate(np.zeros((3, 1)), np.array([[0.0], [1.0], [1.0]]), ["a", "a", "b"])
    assert "1 of 2 groups" in str(caught.value)


def parts_of(task, prediction, target, patients, folds=5):
    places = np.arange(len(patients)) % folds
    return [
        FoldPart(
            prediction[places == fold],
            target[places == fold],
            [name for name, place in zip(patients, places, strict=True) if place == fold],
            sum(places != fold),
        )
        for fold in range(folds)
    ]


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_folds_are_tested_with_what_they_share(task):
    prediction, target, patients = cohort(task, 150)
    table = fold_table(task, parts_of(task, prediction, target, patients))
    assert len(table["values"]) == 5 and table["metric"] == MAIN[task.kind]
    assert table["mean"] == pytest.approx(np.mean(table["values"]))
    assert table["low"] < table["mean"] < table["high"]
    assert "share" in table["note"] and 0 <= table["p_vs_chance"] <= 1
    spread = np.std(table["values"], ddof=1) * math.sqrt(1 / 5 + 1 / 4)
    high = table["mean"] + 2.776445 * spread
    assert table["high"] == pytest.approx(min(high, 1.0), rel=1e-5) and ("cut" in table["note"]) == (high > 1)
    against = fold_table(task, parts_of(task, prediction, target, patients), parts_of(task, prediction, target, patients))
    assert (against["mean"], against["p"]) == (0.0, 1.0)


@pytest.mark.parametrize(("task", "least"), [("binary", 0.0), ("ordinal", -1.0), ("regression", None)])
def test_limits_over_folds_are_possible_values(task, least):
    task = TASKS[task]
    prediction, target, patients = cohort(task, 30)
    rng = np.random.default_rng(0)
    parts = [part._replace(prediction_BP=rng.permuted(part.prediction_BP, axis=0) if fold % 2 else part.prediction_BP)
             for fold, part in enumerate(parts_of(task, prediction, target, patients))]  # fmt: skip
    table = fold_table(task, parts)
    assert table["high"] == 1.0 and "cut" in table["note"] and (least is None or least <= table["low"])


def test_calibration_error_of_a_few_bins_is_not_given():
    prediction, target, patients = cohort(BINARY, 40)
    for count, given in ((29, False), (40, True)):
        found = judge(BINARY, prediction[:count], target[:count], patients[:count], NUMBERS, 0)
        assert (found["ece"]["value"] is not None) == given
        assert any(note.startswith("ece: 2 bins") for note in found["notes"]) != given
    same = judge(BINARY, np.tile([[0.4, 0.6]], (40, 1)), target, patients, NUMBERS, 0)
    assert same["ece"]["value"] is None and "ece: 1 bin " in " ".join(same["notes"])


def test_a_fold_of_one_class_is_left_out_and_shown_as_none():
    prediction, target, patients = cohort(BINARY, 60)
    parts = parts_of(BINARY, prediction, target, patients, 4)  # the class alternates with the bag, and so with the fold
    table = fold_table(BINARY, parts)
    assert table["values"] == [None] * 4 and table["mean"] is None and table["p_vs_chance"] is None
    json.dumps(table, allow_nan=False)


def test_a_better_model_is_found_and_an_equal_one_is_not_significantly_different():
    for task in TASKS.values():
        prediction, target, patients = cohort(task, 150)
        noise = prediction[np.random.default_rng(9).permutation(150)]
        good, bad = Answers("network", prediction), Answers("shuffled", noise)
        found = compare(task, good, bad, target, patients, NUMBERS, 0)
        assert found["verdict"].startswith("network is better than shuffled (p ")
        assert found["low"] > 0 and found["p"] < 0.05 and found["metric"] == MAIN[task.kind]
        assert compare(task, bad, good, target, patients, NUMBERS, 0)["verdict"].startswith("network is better")
        same = compare(task, good, Answers("twin", prediction.copy()), target, patients, NUMBERS, 0)
        assert same["verdict"] == "network and twin are not significantly different (p 1.00)"
        json.dumps([found, same], allow_nan=False)


def test_two_classes_are_compared_by_delong_and_several_slides_by_resampling_patients():
    prediction, target, patients = cohort(BINARY)
    other = Answers("b", cohort(BINARY, seed=1)[0])
    assert compare(BINARY, Answers("a", prediction), other, target, patients, NUMBERS, 0)["method"] == "DeLong, paired"
    shared = [name[:3] for name in patients]
    drawn = compare(BINARY, Answers("a", prediction), other, target, shared, NUMBERS, 0)
    assert drawn["method"] == "bootstrap over patients, paired"


def test_small_groups_are_counted_and_not_judged():
    prediction, target, patients = cohort(BINARY, 60)
    site = ["north"] * 45 + ["south"] * 8 + [""] * 7
    rows = subgroup_table(BINARY, prediction, target, patients, {"site": site}, NUMBERS, 0)
    assert [(row["column"], row["value"]) for row in rows] == [("site", "north"), ("site", "south"), ("site", "unknown")]
    assert rows[0]["auroc"]["low"] < rows[0]["auroc"]["value"] < rows[0]["auroc"]["high"] and rows[0]["note"] == ""
    for row in rows[1:]:
        assert row["auroc"] is None and row["note"].startswith("too few patients for a number: ")
        assert row["n_patients"] == sum(row["counts"].values()) and row["n_positive"] == row["counts"]["yes"]
    assert sum(row["n_patients"] for row in rows) == np.isfinite(target).sum()
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_subgroups_of_every_kind_have_their_numbers(task):
    prediction, target, patients = cohort(task, 120)
    rows = subgroup_table(task, prediction, target, patients, {"age": ["old", "young"] * 60, "one": ["x"] * 120}, NUMBERS, 0)
    known = ~(np.isnan(target).all(axis=1) if task.kind == "multilabel" else np.isnan(target).any(axis=1))
    assert [row["value"] for row in rows][-1] == "x" and rows[-1]["n_patients"] == known.sum()
    whole = judge(task, prediction, target, patients, NUMBERS, 0)
    assert rows[-1][MAIN[task.kind]] == whole[MAIN[task.kind]]


def test_permutations_are_given_with_their_spread():
    record = permutation_record([0.4, 0.5, None, 0.6, 0.55], 0.9)
    assert (record["values"], record["observed"], record["p"]) == ([0.4, 0.5, 0.6, 0.55], 0.9, 0.2)
    assert (record["low"], record["high"]) == pytest.approx((0.4075, 0.59625))
    assert permutation_record([None], 0.9) is None
    assert permutation_record([0.5], None) is None


def test_two_thousand_resamples_of_a_thousand_patients_are_quick():
    prediction, target, patients = cohort(BINARY, 1000)
    never = np.tile([0.9, 0.1], (1000, 1))
    for said, names in ((prediction, patients), (prediction, [name[:3] for name in patients]), (never, patients)):
        start = time.process_time()
        judge(BINARY, said, target, names, NumberSettings(), 0)
        assert time.process_time() - start < 3


def test_the_main_value_is_the_judged_one():
    for task in TASKS.values():
        prediction, target, patients = cohort(task)
        value = judging.main_value(task, prediction, target, patients)
        assert value == judge(task, prediction, target, patients, NUMBERS, 0)[MAIN[task.kind]]["value"]
    assert judging.main_value(BINARY, np.zeros((0, 2)), np.zeros((0, 1)), []) is None


def test_verdicts_follow_p_values_that_know_how_many_comparisons_there_are():
    rng = np.random.default_rng(4)
    positive = np.arange(60) % 2 == 0
    patients = [f"p{place}" for place in range(60)]

    def answers(name, signal):
        chance = 1 / (1 + np.exp(-(rng.normal(size=60) + signal * positive)))
        return Answers(name, np.stack([1 - chance, chance], axis=1))

    target_BT, model = positive[:, None].astype(float), answers("model", 1.1)
    others = [answers("weak", 0.2), answers("weaker", 0.1), answers("none", 0.0)]
    alone = [compare(BINARY, model, other, target_BT, patients, NUMBERS, 0) for other in others]
    together = corrected(alone)
    by_p = sorted(range(3), key=lambda place: alone[place]["p"])
    assert together[by_p[0]]["p_holm"] == pytest.approx(3 * alone[by_p[0]]["p"])
    pairs = list(zip(alone, together, strict=True))
    assert any("better" in one["verdict"] and "not significantly" in both["verdict"] for one, both in pairs)
    assert all(each["p"] == one["p"] and each["p_holm"] >= each["p"] for one, each in pairs)
    unknown = corrected([alone[0] | {"p": None, "low": None, "high": None}])[0]
    assert unknown["p_holm"] is None and corrected(alone[:1])[0]["verdict"] == alone[0]["verdict"]


def test_shares_of_few_patients_have_exact_limits():
    positive = np.arange(30) < 3
    chance = np.where(positive, 0.7, np.linspace(0.1, 0.8, 30))
    found = judge(
        BINARY, np.stack([1 - chance, chance], axis=1), positive[:, None].astype(float), list(map(str, range(30))), NUMBERS, 0
    )
    assert found["sensitivity"]["value"] == 1 and found["sensitivity"]["low"] == pytest.approx(0.025 ** (1 / 3))
    assert found["specificity"]["low"] < found["specificity"]["value"] < found["specificity"]["high"]
    assert found["f1"]["low"] is None and any("f1" in note for note in found["notes"])
