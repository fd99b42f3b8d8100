"""Encoders that have seen the patients they are judged on: refused, marked, or judged on the others."""

import csv
import json
from dataclasses import replace

import pytest

from pathfm.errors import UsageError
from pathfm.mil.held_out import held_out_patients, held_out_slides
from pathfm.mil.plan import check_plan
from pathfm.mil.stage import run_mil
from pathfm.store.cohort import Cohort
from pathfm.store.commit import content_digest, write_json
from pathfm.store.manifest import DIGEST, MANIFEST, write_manifest

from .conftest import planted


def encoder_that_saw(folder, study, slide_ids, patients=True):
    """An encoder folder (without a network) pretrained on some slides of a study."""
    folder.mkdir()
    rows = {row.slide_id: row.patient_id if patients else None for row in study.cohort.rows}
    stores = [study.inputs.stores_dir / f"{slide_id}.zarr" for slide_id in slide_ids]
    write_json(folder / "card.json", {DIGEST: write_manifest(folder / MANIFEST, stores, rows)})
    return folder


def external(study, encoder, **mil):
    """Settings with that encoder in use."""
    settings = study.study(**mil)
    return settings.model_copy(update={"extract": settings.extract.model_copy(update={"encoder": f"local-dir:{encoder}"})})


def table(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def metrics(inputs):
    return json.loads((inputs.mil_dir / "metrics.json").read_text())


def slides_of(study, *patients):
    return [row.slide_id for row in study.cohort.rows if row.patient_id in patients]


def test_external_encoders_that_saw_a_patient_are_refused_by_default_and_nothing_is_lost(small, tmp_path):
    encoder = encoder_that_saw(tmp_path / "teacher", small, ["s003-0"])
    inputs = small.into("refused")
    run_mil(small.study(), small.cohort, inputs)
    before = content_digest(inputs.mil_dir)
    with pytest.raises(UsageError) as caught:
        run_mil(external(small, encoder), small.cohort, inputs)
    said = str(caught.value)
    assert caught.value.exit_code == 2
    assert "mil.seen_in_pretraining: the encoder has seen 1 of 24 patients" in said
    assert "s003-0: same picture, 0 of 256 bits differ" in said
    assert "s003-1: same patient as pretraining slide s003-0" in said
    rows = table(inputs.mil_dir / "refused.csv")
    assert [(row["slide_id"], row["evidence"], row["pretraining_slide"]) for row in rows] == [
        ("s003-0", "same picture", "s003-0"),
        ("s003-0", "same patient", "s003-0"),
        ("s003-1", "same patient", "s003-0"),
    ]
    (inputs.mil_dir / "refused.csv").unlink()
    assert content_digest(inputs.mil_dir) == before


def test_an_encoder_that_saw_others_is_used_without_a_word(small, tmp_path):
    strangers = planted(tmp_path / "strangers", patients=4, seed=9)
    rows = tuple(replace(row, patient_id=f"q{row.patient_id}") for row in strangers.cohort.rows)
    strangers.cohort = Cohort(rows, ("label",))
    encoder = encoder_that_saw(tmp_path / "teacher", strangers, [row.slide_id for row in rows])
    inputs = small.into("strangers")
    run_mil(external(small, encoder), small.cohort, inputs)
    content = metrics(inputs)
    assert content["seen_in_pretraining"]["patients_seen"] == 0
    assert not content["seen_in_pretraining"]["transductive"]
    assert not any("transductive" in note for note in content["notes"])
    assert {row["seen_in_pretraining"] for row in table(inputs.mil_dir / "predictions.csv")} == {"0"}


def test_an_encoder_that_tells_nothing_is_said_to_tell_nothing(small, tmp_path):
    (tmp_path / "teacher").mkdir()
    inputs = small.into("unknown")
    run_mil(external(small, tmp_path / "teacher"), small.cohort, inputs)
    content = metrics(inputs)
    assert content["seen_in_pretraining"]["known"] is False and content["seen_in_pretraining"]["share"] is None
    assert any("not recorded" in note for note in content["notes"])


def test_mark_says_transductive_of_what_rests_on_the_encoder_and_of_nothing_else(small, tmp_path):
    encoder = encoder_that_saw(tmp_path / "teacher", small, slides_of(small, "p001", "p002", "p003"), patients=False)
    inputs = small.into("marked")
    run_mil(external(small, encoder, seen_in_pretraining="mark", controls=True), small.cohort, inputs)
    content = metrics(inputs)
    seen = content["seen_in_pretraining"]
    assert (seen["rule"], seen["patients_seen"], seen["patients"], seen["share"]) == ("mark", 3, 24, 0.125)
    assert "transductive: the encoder was pretrained, without labels, on slides of 3 of 24 patients (12%)" in content["notes"]
    assert {name for name, model in content["models"].items() if model["transductive"]} == {
        "pretrained encoder",
        "shuffled labels",
    }
    found = {row["patient_id"] for row in table(inputs.mil_dir / "predictions.csv") if row["seen_in_pretraining"] == "1"}
    assert found == {"p001", "p002", "p003"}
    assert len(table(inputs.mil_dir / "seen.csv")) == 6


def test_the_untrained_control_of_a_run_with_first_weights_is_marked_for_what_these_have_seen(small, tmp_path):
    def marked(place):
        inputs = replace(small.into(f"{place.parent.name}-judged"), encoder_dir=place)
        run_mil(small.study(seen_in_pretraining="mark", controls=True), small.cohort, inputs)
        return metrics(inputs)

    everyone = [row.slide_id for row in small.cohort.rows]
    for name in ("scratch", "init"):
        (tmp_path / name).mkdir()
        encoder_that_saw(tmp_path / name / "teacher", small, everyone)
    (tmp_path / "scratch/untrained").mkdir()
    encoder_that_saw(tmp_path / "init/untrained", small, slides_of(small, "p001", "p002", "p003"))
    scratch, init = (marked(tmp_path / name / "teacher") for name in ("scratch", "init"))
    assert not scratch["models"]["untrained encoder"]["transductive"]
    assert not any("untrained encoder" in note for note in scratch["notes"])
    shares = {name: model["patients_seen_share"] for name, model in init["models"].items() if model["transductive"]}
    assert shares == {"pretrained encoder": 1, "shuffled labels": 1, "untrained encoder": 0.125}
    said = "the untrained encoder has the weights of pretrain.init, which were pretrained on slides of 3 of 24 patients (12%)"
    assert said in init["notes"]


def test_exclude_judges_only_patients_an_external_encoder_has_not_seen(small, tmp_path):
    encoder = encoder_that_saw(tmp_path / "teacher", small, slides_of(small, "p001", "p002", "p003"))
    inputs = small.into("excluded")
    run_mil(external(small, encoder, seen_in_pretraining="exclude", controls=True), small.cohort, inputs)
    content = metrics(inputs)
    assert (content["n_patients"], content["n_slides"], content["flow"]["slides"]["used"]) == (21, 42, 48)
    assert (content["seen_in_pretraining"]["patients_seen"], content["seen_in_pretraining"]["left_out"]) == (0, 3)
    rows = {row["patient_id"]: row for row in table(inputs.mil_dir / "predictions.csv")}
    assert len(rows) == 24
    assert {name for name, row in rows.items() if row["predicted"] == ""} == {"p001", "p002", "p003"}
    assert rows["p001"]["reason"].startswith("not judged")
    assert len(list((inputs.mil_dir / "attention").iterdir())) == 42
    assert run_mil(external(small, encoder, seen_in_pretraining="exclude", controls=True), small.cohort, inputs).did_nothing


def test_exclude_with_nobody_left_is_refused(small, tmp_path):
    encoder = encoder_that_saw(tmp_path / "teacher", small, [row.slide_id for row in small.cohort.rows])
    with pytest.raises(UsageError, match="without the 24 patients seen in pretraining there are not two classes"):
        run_mil(external(small, encoder, seen_in_pretraining="exclude"), small.cohort, small.into("nobody"))


def test_own_encoder_without_held_out_patients_is_judged_on_them_alone(small, tmp_path):
    study = small.study(seen_in_pretraining="exclude", controls=True)
    held_out = held_out_slides(study, small.cohort)
    rest = [row.slide_id for row in small.cohort.rows if row.slide_id not in held_out]
    inputs = replace(small.into("own"), encoder_dir=encoder_that_saw(tmp_path / "teacher", small, rest))
    run_mil(study, small.cohort, inputs)
    content = metrics(inputs)
    test = held_out_patients(study, small.cohort)
    folds = json.loads((inputs.mil_dir / "splits.json").read_text())["folds"]
    assert len(folds) == 1 and set(folds[0]["test"]) == test
    assert content["n_patients"] == len(test) == 8
    assert not content["seen_in_pretraining"]["transductive"]
    assert not any(model["transductive"] for model in content["models"].values())
    judged = {row["patient_id"] for row in table(inputs.mil_dir / "predictions.csv") if row["predicted"]}
    assert judged == test


def test_held_out_patients_are_those_of_the_first_fold_of_the_marked_study(small):
    study = small.study(seen_in_pretraining="exclude")
    run_mil(small.study(), small.cohort, small.into("folds"))
    folds = json.loads((small.base / "folds" / "splits.json").read_text())["folds"]
    assert held_out_patients(study, small.cohort) == set(folds[0]["test"])


def test_the_column_split_decides_who_is_held_out(small):
    def with_split(test):
        return Cohort(tuple(replace(row, split="test" if test(row) else "train") for row in small.cohort.rows), ("label",))

    study = small.study(seen_in_pretraining="exclude")
    cohort = with_split(lambda row: row.patient_id in {"p000", "p001", "p002", "p003"})
    assert held_out_patients(study, cohort) == {"p000", "p001", "p002", "p003"}
    assert len(held_out_slides(study, cohort)) == 8
    with pytest.raises(UsageError, match="both sides of the split: p005"):
        held_out_patients(study, with_split(lambda row: row.slide_id == "s005-0"))
    one_class = with_split(lambda row: row.patient_id == "p000")
    with pytest.raises(UsageError, match="every class needs a patient to test"):
        run_mil(study, one_class, small.into("split"))


@pytest.mark.parametrize("kind", ["survival", "multilabel"])
def test_rare_events_and_columns_are_judged_on_held_out_patients_too(small, tmp_path, kind):
    def row_of(place, row):
        patient = place // 2
        values = (patient * 7 % 11 + 1, int(patient % 4 == 1)) if kind == "survival" else (patient % 2, int(patient == 5))
        return replace(row, labels=dict(zip("ab", map(str, values), strict=True)))

    cohort = Cohort(tuple(row_of(place, row) for place, row in enumerate(small.cohort.rows)), ("a", "b"))
    task = {"time": "a", "event": "b"} if kind == "survival" else {"columns": ["a", "b"]}
    study = small.study(label="m", epochs=1, seen_in_pretraining="exclude", **task).model_copy(update={"out": tmp_path})
    held_out = held_out_slides(study, cohort)
    inputs = small.into(f"rare-{kind}")
    check_plan(study, cohort, inputs.mil_dir)
    rest = [row.slide_id for row in cohort.rows if row.slide_id not in held_out]
    run_mil(study, cohort, replace(inputs, encoder_dir=encoder_that_saw(tmp_path / "teacher", small, rest)))
    (fold,) = json.loads((inputs.mil_dir / "splits.json").read_text())["folds"]
    assert set(fold["test"]) == held_out_patients(study, cohort) and fold["train"] and fold["validation"]


def test_nothing_is_held_out_unless_it_is_asked_for(small):
    assert held_out_slides(small.study(), small.cohort) == frozenset()
    settings = small.study(seen_in_pretraining="exclude")
    public = settings.model_copy(update={"extract": settings.extract.model_copy(update={"encoder": "timm:resnet18"})})
    assert held_out_slides(public, small.cohort) == frozenset()
