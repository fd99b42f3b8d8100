"""Decisions: nested, exact to the last bit, and never depending on what they must not know."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit, softmax
from scipy.stats import beta

from pathfm.errors import SlideError
from pathfm.mil.tasks.classes import Binary, Multiclass, Multilabel, Ordinal
from pathfm.mil.tasks.regression import Regression
from pathfm.mil.trust import OperatingPoint, fit_trust, trust_from_record
from pathfm.mil_settings import NumberSettings
from pathfm.stats.calibration import fit_calibrator
from pathfm.stats.conformal import coverage_limits, fit_conformal
from pathfm.stats.thresholds import choose_threshold

BINARY = Binary("label", ("benign", "malignant"), 1)
THREE = Multiclass("label", ("a", "b", "c"), 2)
SETTINGS = NumberSettings(operating_points=("youden", "sensitivity=0.9", "specificity=0.9"))


def cohort(count, seed=0, dim=8, strength=2.5):
    """Over-confident scores of ``count`` patients in five folds, with mean features."""
    rng = np.random.default_rng(seed)
    label = (rng.random(count) < 0.4).astype(float)
    score = expit(2 * (strength * (label - 0.5) + rng.normal(0, 1, count)))
    names = [f"patient {number:03d}" for number in range(count)]
    return np.stack([1 - score, score], 1), label, names, rng.permutation(count) % 5, rng.normal(size=(count, dim))


def judge(data, settings=SETTINGS, task=BINARY):
    return fit_trust(task, *data, settings)


def dumped(table):
    return json.dumps(table, sort_keys=True, allow_nan=False)


def test_what_is_said_about_a_fold_is_fitted_on_the_others():
    probability, label, names, fold, _ = data = cohort(120)
    _, judged = judge(data)
    others, inside = fold != 2, fold == 2
    calibrated = fit_calibrator("platt", probability[others], label[others].astype(int)).apply(probability[inside])
    found = [decision for decision, is_inside in zip(judged.decisions, inside, strict=True) if is_inside]
    np.testing.assert_array_equal([decision.calibrated_C for decision in found], calibrated)
    sets = fit_conformal(probability[others], label[others].astype(int), np.array(names)[others], BINARY.classes, 0.1).contains(
        probability[inside]
    )
    assert [len(decision.set) for decision in found] == sets.sum(1).tolist()
    threshold = choose_threshold("youden", probability[others, 1], label[others] == 1).value
    for decision, score in zip(found, probability[inside, 1], strict=True):
        if not decision.abstains:
            assert decision.decision == BINARY.classes[int(score >= threshold)]


def test_labels_of_a_fold_have_no_part_in_what_is_said_about_it():
    probability, label, names, fold, mean = cohort(100)
    _, judged = judge((probability, label, names, fold, mean))
    flipped = np.where(fold == 1, 1 - label, label)
    _, other = judge((probability, flipped, names, fold, mean))
    inside = np.flatnonzero(fold == 1)
    assert [judged.decisions[place] for place in inside] == [other.decisions[place] for place in inside]
    assert judged.decisions != other.decisions


def test_the_order_of_the_rows_does_not_matter():
    probability, label, names, fold, mean = cohort(60)
    doubled = [np.concatenate([values, values[::-1]]) for values in (probability, label, names, fold, mean)]
    doubled[0][60:] = doubled[0][60:] ** 2 / (doubled[0][60:] ** 2).sum(1, keepdims=True)
    trust, judged = judge(doubled)
    order = np.random.default_rng(1).permutation(120)
    shuffled, other = judge([values[order] for values in doubled])
    assert dumped(shuffled.record()) == dumped(trust.record())
    assert dumped(other.metrics()) == dumped(judged.metrics())
    assert [judged.decisions[place] for place in order] == list(other.decisions)


def test_a_patient_counts_once_with_the_mean_of_its_bags():
    probability, label, names, fold, mean = cohort(60)
    away = np.random.default_rng(0).uniform(-0.1, 0.1, 60)[:, None] * [1, -1] * np.minimum(*probability.T)[:, None]
    bags = [np.concatenate([values, values]) for values in (probability, label, names, fold, mean)]
    bags[0] = np.concatenate([probability + away, probability - away])
    one, judged_one = judge((probability, label, names, fold, None))
    two, judged_two = judge((*bags[:4], None))
    assert two.n_patients == one.n_patients == 60
    assert two.conformal.count_C == one.conformal.count_C
    assert two.conformal.quantile_C == pytest.approx(one.conformal.quantile_C)
    assert [decision.decision for decision in judged_two.decisions] == 2 * [d.decision for d in judged_one.decisions]


def test_a_patient_is_as_far_as_its_farthest_bag():
    trust, _ = judge(cohort(60))
    near, far = np.zeros(8), np.full(8, 9.0)
    assert trust.distance(np.stack([near, far])) == trust.distance(far) > trust.novelty.limit > trust.distance(near)


def test_a_record_gives_the_same_back_to_the_last_bit_and_names_nobody():
    for settings in (
        SETTINGS,
        replace_numbers(calibration="isotonic", class_wise=True),
        replace_numbers(calibration="temperature"),
    ):
        trust, _ = judge(cohort(90), settings)
        text = dumped(trust.record())
        assert "patient 0" not in text
        back = trust_from_record(json.loads(text))
        assert dumped(back.record()) == text
        assert replace(back, novelty=None) == replace(trust, novelty=None)
        for score in np.linspace(0, 1, 23):
            assert back.decide([1 - score, score], 1.0) == trust.decide([1 - score, score], 1.0)
        assert back.distance(np.ones(8)) == trust.distance(np.ones(8))


def replace_numbers(**changes):
    return NumberSettings.model_validate({**SETTINGS.model_dump(), **changes})


def test_one_class_decides_more_or_none_abstain_with_the_reason():
    trust, _ = judge(cohort(120, strength=1.5))
    unsure = trust.decide([0.5, 0.5])
    assert unsure.decision == "abstain:uncertain"
    assert unsure.set == ("benign", "malignant")
    assert unsure.reasons == ("set at an error rate of 0.1: benign, malignant",)
    assert trust.decide([0.001, 0.999]).decision == "malignant"
    assert trust.decide([0.999, 0.001]).decision == "benign"
    sure, _ = judge(cohort(200, strength=8))
    assert sure.decide([0.5, 0.5]).decision == "abstain:unlike any class"
    far = trust.decide([0.001, 0.999], trust.novelty.limit * 1.01)
    assert far.decision == "abstain:out of distribution"
    assert far.reasons[0].startswith("distance")
    assert trust.decide([0.001, 0.999], trust.novelty.limit).decision == "malignant"
    assert trust.decide([0.001, 0.999], np.nan).decision == "abstain:out of distribution"


def test_a_set_that_contradicts_the_operating_point_abstains():
    trust, _ = judge(cohort(150, strength=1.5))
    assert trust.decide([0.97, 0.03]).decision == "benign"
    sensitive = replace(trust, points=(OperatingPoint("sensitivity=0.99", 0.02),))
    said = sensitive.decide([0.97, 0.03])
    assert said.set == ("benign",)
    assert said.decision == "abstain:uncertain"
    assert said.reasons == ("set at an error rate of 0.1: benign, but the operating point sensitivity=0.99 says malignant",)


def test_too_few_patients_are_a_recorded_refusal_and_the_operating_point_decides():
    trust, judged = judge(cohort(18), replace_numbers(alpha=0.05))
    assert trust.conformal is None
    assert "need 19 calibration patients, there are 18" in judged.metrics()["conformal"]["refused"]
    said = trust.decide([0.01, 0.99])
    assert (said.decision, said.set) == ("malignant", ())
    assert "no conformal set: conformal sets with error rate 0.05 need 19" in said.reasons[0]


def test_folds_without_enough_others_have_no_sets_and_it_is_said():
    trust, judged = judge(cohort(20), replace_numbers(alpha=0.05))
    assert trust.conformal is not None
    table = judged.metrics()["conformal"]
    assert table["coverage"] == {"value": None, "hits": 0, "count": 0}
    assert "20 have no set: the other folds have too few calibration patients" in table["notes"]


def test_coverage_that_could_not_be_measured_says_why():
    conformal = judge(cohort(10))[1].metrics()["conformal"]
    assert conformal["coverage"]["value"] is None and conformal["folds"] == []
    assert (
        conformal["note"].startswith("coverage not measured: ")
        and "need 9 calibration patients, there are " in conformal["note"]
    )


def test_a_calibration_error_of_one_bin_is_not_given_and_a_flat_calibrator_is_named():
    few = judge(cohort(19))[1].metrics()["calibration"]
    assert few["ece"] == {"before": None, "after": None} and "1 bin of 10" in few["note"]
    probability, label, *rest = cohort(100)
    turned = judge((probability[:, ::-1], label, *rest))[1].metrics()["calibration"]
    assert turned["slope"] < 0.005 and "slope 0: the calibrated probability is the same for everyone" in turned["note"]
    assert "note" not in judge(cohort(100))[1].metrics()["calibration"]


def test_class_wise_refusal_names_the_class():
    probability, label, names, fold, mean = cohort(60)
    label[:] = np.arange(60) < 5
    _, judged = judge((probability, label, names, fold, mean), replace_numbers(class_wise=True))
    assert "of class malignant, there are 5" in judged.metrics()["conformal"]["refused"]


def test_no_alpha_no_doubt():
    trust, judged = judge(cohort(60), replace_numbers(alpha=None, max_distance=None))
    assert not any(decision.abstains for decision in judged.decisions)
    assert trust.decide([0.5, 0.5], 1e9).decision in BINARY.classes
    assert judged.metrics()["conformal"] == {"refused": "mil.numbers.alpha is null"}


@pytest.mark.parametrize("calibration", ["temperature", "platt", "isotonic"])
def test_nested_calibration_error_falls_on_an_over_confident_simulator(calibration):
    rng = np.random.default_rng(0)
    z = rng.normal(0, 1.5, 800)
    score, label = expit(3 * z), rng.random(800) < expit(z)
    data = (np.stack([1 - score, score], 1), label, [str(n) for n in range(800)], np.arange(800) % 5, None)
    _, judged = judge(data, replace_numbers(calibration=calibration))
    table = judged.metrics()["calibration"]
    assert table["ece"]["after"] < 0.6 * table["ece"]["before"]
    assert table["brier"]["after"] < table["brier"]["before"]
    assert sum(row["count"] for row in table["reliability"]) == table["n"] == 800
    assert all(row["observed_low"] <= row["observed"] <= row["observed_high"] for row in table["reliability_before"])


def test_operating_points_are_counted_on_the_fold_left_out():
    probability, label, _, fold, _ = data = cohort(150)
    trust, judged = judge(data)
    point = judged.metrics()["operating_points"][1]
    assert (point["name"], point["threshold"]) == ("sensitivity=0.9", trust.points[1].threshold)
    hits = 0
    for number in range(5):
        threshold = choose_threshold("sensitivity=0.9", probability[fold != number, 1], label[fold != number] == 1).value
        hits += int(((probability[:, 1] >= threshold) & (label == 1) & (fold == number)).sum())
    found = point["sensitivity"]
    assert (found["hits"], found["count"]) == (hits, int(label.sum()))
    assert found["low"] == pytest.approx(beta.ppf(0.025, hits, label.sum() - hits + 1))
    assert point["threshold_low"] <= point["threshold"] <= point["threshold_high"]
    # The same threshold on the calibrated scale, the same side of it.
    assert point["threshold_calibrated"] == trust.calibrator.apply([[1 - point["threshold"], point["threshold"]]])[0, 1]


def test_coverage_has_the_limits_of_its_law():
    _, judged = judge(cohort(150))
    table = judged.metrics()["conformal"]
    fewest = min(nested.conformal.count_C[0] for nested in judged.nested.values())
    assert (table["coverage"]["low"], table["coverage"]["high"]) == coverage_limits(150, fewest, 0.1)
    assert table["coverage"]["inside"]
    assert sum(row["count"] for row in table["folds"]) == sum(row["count"] for row in table["classes"]) == 150
    assert sum(table["set_sizes"].values()) == 150
    assert "approximate" in table["notes"][0]
    class_wise = judge(cohort(150), replace_numbers(class_wise=True))[1].metrics()["conformal"]
    assert [row["inside"] for row in class_wise["classes"]] == [True, True]
    assert class_wise["coverage"]["method"] == "Clopper-Pearson"


def test_decisions_add_up_and_count_their_errors():
    _, label, *_ = data = cohort(150)
    _, judged = judge(data)
    table = judged.metrics()["decisions"]
    assert sum(table["counts"].values()) == 150
    decided = [
        (d.decision, BINARY.classes[int(value)]) for d, value in zip(judged.decisions, label, strict=True) if not d.abstains
    ]
    assert table["abstained"]["hits"] == 150 - len(decided)
    assert (table["errors"]["hits"], table["errors"]["count"]) == (sum(a != b for a, b in decided), len(decided))
    assert table["sensitivity"]["count"] + table["specificity"]["count"] == len(decided)


def test_patients_without_a_label_get_a_decision_and_nothing_else():
    probability, label, names, fold, _ = cohort(100)
    known = np.arange(100) >= 10
    label = np.where(known, label, np.nan)
    trust, judged = judge((probability, label, names, fold, None))
    fewer, _ = judge((probability[known], label[known], np.array(names)[known].tolist(), fold[known], None))
    assert trust.record() == fewer.record()
    assert len(judged.decisions) == 100
    assert judged.metrics()["calibration"]["n"] == 90


def test_more_classes_are_calibrated_by_temperature():
    rng = np.random.default_rng(0)
    z = rng.normal(0, 1.5, (400, 3))
    label = (softmax(z, axis=1).cumsum(1) < rng.random((400, 1))).sum(1)
    data = (softmax(3 * z, axis=1), label, [str(n) for n in range(400)], np.arange(400) % 5, None)
    trust, judged = judge(data, task=THREE)
    table = judged.metrics()
    assert trust.calibrator.kind == "temperature"
    assert trust.points == ()
    assert table["calibration"]["ece"]["after"] < 0.5 * table["calibration"]["ece"]["before"]
    assert table["calibration"]["event"] == "most probable class"
    assert "3 classes: calibrated by temperature instead of platt" in table["notes"]
    assert table["conformal"]["coverage"]["inside"]
    assert set(table["decisions"]["counts"]) <= {"a", "b", "c", "abstain:uncertain", "abstain:unlike any class"}


def test_ordinal_and_multilabel_are_not_calibrated_and_say_so():
    rng = np.random.default_rng(0)
    probability = softmax(rng.normal(size=(50, 3)), axis=1)
    rest = ([str(n) for n in range(50)], np.arange(50) % 5, rng.normal(size=(50, 4)))
    trust, judged = judge((probability, rng.integers(0, 3, 50), *rest), task=Ordinal("label", ("a", "b", "c"), 2))
    assert (trust.calibrator, judged.decisions[0].calibrated_C) == (None, ())
    assert "not calibrated: the task is ordinal" in judged.metrics()["notes"]
    assert judged.metrics()["conformal"]["coverage"]["count"] == 50
    targets = rng.integers(0, 2, (50, 3)).astype(float)
    trust, judged = judge((probability, targets, *rest), task=Multilabel("label", ("a", "b", "c")))
    assert "not calibrated, and nothing is decided: the task is multilabel" in judged.metrics()["notes"]
    assert {decision.decision for decision in judged.decisions} <= {"", "abstain:out of distribution"}
    assert trust_from_record(json.loads(dumped(trust.record()))).record() == trust.record()


def test_numbers_only_know_who_is_out_of_distribution():
    rng = np.random.default_rng(0)
    rest = ([str(n) for n in range(40)], np.arange(40) % 5, rng.normal(size=(40, 4)))
    trust, judged = judge((rng.normal(size=(40, 1)), rng.normal(size=(40, 1)), *rest), task=Regression("age"))
    assert trust.decide([3.0], trust.novelty.limit / 2).decision == ""
    assert trust.decide([3.0], trust.novelty.limit * 2).decision == "abstain:out of distribution"
    assert judged.metrics()["novelty"]["flagged"]["count"] == 40
    dumped(judged.metrics())


def test_one_test_part_is_cut_into_five_by_patient():
    probability, label, names, _, mean = cohort(80)
    _, judged = judge((probability, label, names, np.zeros(80, int), mean))
    assert sorted(np.bincount(judged.part_U)) == [16] * 5
    assert len(judged.nested) == 5
    for number in (0, 1):
        assert np.ptp(np.bincount(judged.part_U[judged.cases.label_U == number])) <= 1


def test_a_class_that_the_other_folds_lack_is_noted():
    probability, label, names, fold, mean = cohort(40)
    label = (fold == 3).astype(float)
    _, judged = judge((probability, label, names, fold, mean))
    table = judged.metrics()
    assert "without fold 3: not calibrated: fewer than two classes" in table["notes"]
    assert any(note.startswith("without fold 3: no operating points") for note in table["notes"])
    assert table["calibration"]["n"] == int((fold != 3).sum())
    assert table["operating_points"][0]["sensitivity"] is None
    assert table["operating_points"][0]["specificity"]["count"] == int((fold != 3).sum())


def test_slides_of_a_patient_with_different_classes_count_each_and_it_is_said():
    probability, label, _, fold, mean = cohort(60)
    names = [f"p{number // 2}" for number in range(60)]
    label, fold = np.arange(60) % 2.0, np.arange(60) // 2 % 5
    trust, judged = judge((probability, label, names, fold, mean))
    assert judged.metrics()["unit"] == "bag"
    assert trust.n_patients == 30
    assert trust.conformal.count_C == (30, 30)
    assert any("not independent" in note for note in trust.notes)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_tiny_cohorts_break_nothing(count):
    probability, label, names, _, mean = cohort(count)
    label[0] = 1
    trust, judged = judge((probability, label, names, np.arange(count) % 5, mean))
    dumped(judged.metrics())
    assert trust_from_record(json.loads(dumped(trust.record()))).record() == trust.record()
    assert len(judged.decisions) == count


def test_perfect_scores_stay_below_certainty():
    label = np.arange(50) % 2.0
    data = (np.stack([1 - label, label], 1), label, [str(n) for n in range(50)], np.arange(50) // 2 % 5, None)
    trust, judged = judge(data)
    assert 0.9 < judged.decisions[1].calibrated_C[1] < 1
    assert [decision.decision for decision in judged.decisions] == [BINARY.classes[int(value)] for value in label]
    assert trust.points[0].threshold == 0.5


def test_an_answer_that_is_no_number_is_an_error_of_the_slide():
    trust, _ = judge(cohort(40))
    with pytest.raises(SlideError, match="not a finite number"):
        trust.decide([np.nan, 0.5])


@pytest.mark.long
def test_coverage_of_a_locked_trust_on_new_cohorts():
    alpha, covered, wrong = 0.1, [], []
    for seed in range(1000):
        probability, label, names, fold, _ = cohort(200, seed, strength=1.5)
        trust, _ = judge((probability[:60], label[:60], names[:60], fold[:60], None), NumberSettings())
        said = [trust.decide(row) for row in probability[60:]]
        truth = [BINARY.classes[int(value)] for value in label[60:]]
        covered.append(np.mean([name in one.set for name, one in zip(truth, said, strict=True)]))
        wrong.append(np.mean([not one.abstains and one.decision != name for name, one in zip(truth, said, strict=True)]))
    error = 3 * np.std(covered, ddof=1) / np.sqrt(1000)
    assert 1 - alpha - error <= np.mean(covered) <= 1 - alpha + 1 / 61 + error
    low, high = coverage_limits(140, 60, alpha)
    assert np.mean((np.array(covered) >= low) & (np.array(covered) <= high)) >= 0.93
    assert np.mean(wrong) <= alpha + error
