"""A bundle is asked about feature files: every slide has its row, alone and together with its patient's others."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save

from pathfm.mil.bundle import BundleError, open_bundle, write_bundle
from pathfm.mil.feature_cache import FeatureCache
from pathfm.mil.network import build_network, spec_of
from pathfm.mil.predict import Ensemble, Verdict, predict
from pathfm.mil.prediction_table import Known, Result, flow, patient_rows, prediction_cells, slide_rows
from pathfm.mil.seen import Seen
from pathfm.mil.tasks import make_tasks
from pathfm.mil_settings import MilSettings
from pathfm.store.cohort import Cohort, SlideRow
from pathfm.store.feature_file import write_features
from pathfm.store.record import Outcome

from .bundles import DIM, IDENTITY, SETTINGS, facts_in

CPU = torch.device("cpu")


def feature_file(folder, slide_id, count=30, dim=DIM, seed=0, **attrs):
    rng = np.random.default_rng([seed, *slide_id.encode()])
    xy = np.stack([np.arange(count) % 5, np.arange(count) // 5], 1).astype(np.int64) * 64
    path = folder / f"{slide_id}.h5"
    write_features(path, rng.normal(size=(count, dim)).astype(np.float16), xy, {"fingerprint": "f", **IDENTITY, **attrs})
    return path


def bundle_of(folder, settings=SETTINGS, **changed):
    write_bundle(folder / "bundle", replace(facts_in(folder, settings), **changed))
    return open_bundle(folder / "bundle")


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    return Ensemble(bundle_of(tmp_path_factory.mktemp("bundle")), CPU)


@pytest.fixture
def slides(tmp_path):
    return {slide_id: feature_file(tmp_path, slide_id) for slide_id in ("a1", "a2", "b1", "c1")}


PATIENTS = {"a1": "A", "a2": "A", "b1": "B", "c1": "c1"}


def cohort_of(*slide_ids, labels=None):
    rows = [
        SlideRow(slide_id, slide_id, patient_id=None if slide_id == "c1" else slide_id[0].upper(), labels=labels or {})
        for slide_id in slide_ids
    ]
    return Cohort(tuple(rows))


def asked(ensemble, slides, tmp_path, order=("a1", "a2", "b1", "c1"), look=None):
    with FeatureCache(1 << 20, tmp_path / "scratch") as cache:
        return predict(ensemble, slides, cohort_of(*order), PATIENTS, cache, look)


def test_all_slides_of_a_patient_are_one_bag_and_each_is_asked_about_alone_too(ensemble, slides, tmp_path):
    answers = asked(ensemble, slides, tmp_path)
    patients = answers.of_patients(ensemble)
    assert sorted(answers.slides) == sorted(slides) and sorted(patients) == ["A", "B", "c1"]
    assert patients["A"].tiles == 60
    mean = (answers.slides["a1"].prediction_P + answers.slides["a2"].prediction_P) / 2
    assert not np.array_equal(patients["A"].prediction_P, mean)
    assert patients["B"] is answers.slides["b1"]


def test_other_levels_are_averaged_and_as_far_as_their_farthest(tmp_path, slides):
    ensemble = Ensemble(bundle_of(tmp_path / "slide", MilSettings(**{**SETTINGS.model_dump(), "level": "slide"})), CPU)
    answers = asked(ensemble, slides, tmp_path)
    patient, both = answers.of_patients(ensemble)["A"], [answers.slides["a1"], answers.slides["a2"]]
    assert np.allclose(patient.prediction_P, np.mean([verdict.prediction_P for verdict in both], axis=0), atol=1e-12)
    assert patient.distance["label"] == max(verdict.distance["label"] for verdict in both)


def test_an_unsorted_table_loses_no_slide_of_a_patient_and_changes_nothing(ensemble, slides, tmp_path):
    one, two = (
        asked(ensemble, slides, tmp_path),
        asked(ensemble, dict(reversed(slides.items())), tmp_path, ("c1", "b1", "a2", "a1")),
    )
    for slide_id, verdict in one.slides.items():
        assert np.array_equal(verdict.said_MP, two.slides[slide_id].said_MP)
    assert [unit.unit_id for unit in one.order] == [unit.unit_id for unit in two.order]
    assert all(np.array_equal(a.said_MP, b.said_MP) for a, b in zip(one.units, two.units, strict=True))


def test_one_slide_that_cannot_be_used_does_not_stop_the_others(ensemble, slides, tmp_path):
    slides["bad"] = tmp_path / "bad.h5"
    slides["bad"].write_bytes(b"no features")
    slides["long"] = feature_file(tmp_path, "long", dim=DIM + 1)
    slides["other"] = feature_file(tmp_path, "other", recipe_weights_sha256="cd" * 32)
    slides["empty"] = feature_file(tmp_path, "empty", count=0)
    answers = asked(ensemble, slides, tmp_path)
    assert sorted(answers.slides) == ["a1", "a2", "b1", "c1"]
    assert "9 features per tile" in answers.failed["long"]
    assert "another encoder" in answers.failed["other"]
    assert answers.failed["bad"] and "tiles" in answers.failed["empty"]


def test_dropout_is_off_and_asking_twice_gives_the_same(ensemble, slides, tmp_path):
    one, two = asked(ensemble, slides, tmp_path), asked(ensemble, slides, tmp_path)
    assert all(np.array_equal(one.slides[name].said_MP, two.slides[name].said_MP) for name in slides)


def test_pictures_see_the_attention_of_the_answer(ensemble, slides, tmp_path):
    seen = {}
    asked(ensemble, slides, tmp_path, look=lambda slide_id, explained, facts: seen.update({slide_id: (explained, facts)}))
    assert sorted(seen) == sorted(slides)
    explained, facts = seen["a1"]
    assert explained.kind == "attention" and explained.value_NC.shape == (30, 1) and len(facts) == 30
    assert explained.value_NC.sum() == pytest.approx(1)


def result_of(ensemble, answers, cohort, tmp_path, **outcomes):
    ids = [row.slide_id for row in cohort.rows]
    patients = {slide_id: PATIENTS.get(slide_id, slide_id) for slide_id in ids}
    known = Known(patients, dict.fromkeys(ids, "hash"), {"b1": "same file"}, has_labels=False)
    done = {slide_id: outcomes.get(slide_id, Outcome(slide_id, "done")) for slide_id in ids}
    return Result(cohort, tmp_path, ensemble, known, Seen("mark", False, patients), answers, done)


def test_nobody_disappears_and_rows_say_who_made_them(ensemble, slides, tmp_path):
    cohort = cohort_of("c1", "b1", "a2", "a1", "lost", "gone")
    with FeatureCache(1 << 20, tmp_path / "scratch") as cache:
        patients = {row.slide_id: PATIENTS.get(row.slide_id, row.slide_id) for row in cohort.rows}
        answers = predict(ensemble, slides, cohort, patients, cache)
    lost = Outcome("lost", "failed", "the file is damaged")
    result = result_of(ensemble, answers, cohort, tmp_path, lost=lost)
    rows = {row["slide_id"]: row for row in slide_rows(result)}
    assert list(rows) == ["a1", "a2", "b1", "c1", "gone", "lost"]
    assert (rows["lost"]["outcome"], rows["lost"]["reason"]) == ("failed", "the file is damaged")
    assert rows["gone"]["outcome"] == "left out"
    assert len({tuple(row) for row in rows.values()}) == 1
    used = rows["a1"]
    assert float(used["probability_normal"]) + float(used["probability_tumour"]) == pytest.approx(1, abs=2e-6)
    assert float(used["calibrated_normal"]) + float(used["calibrated_tumour"]) == pytest.approx(1, abs=2e-6)
    assert float(used["lowest"]) <= float(used["probability_tumour"]) <= float(used["highest"])
    assert used["decision"] in {"normal", "tumour"} or used["decision"].startswith("abstain:")
    assert used["bundle"] == ensemble.bundle.digest and used["code"] and used["slide_identity"] == "hash"
    assert rows["b1"]["trained_on"] == "same file" and used["trained_on"] == ""
    people = {row["patient_id"]: row for row in patient_rows(result)}
    assert list(people) == ["A", "B", "c1", "gone", "lost"]
    assert (people["A"]["n_slides"], people["A"]["n_slides_used"], people["lost"]["outcome"]) == ("2", "2", "no slide")
    counts = flow(result, ())["slides"]
    assert counts["cohort"] == 6 == sum(count for fate, count in counts.items() if fate != "cohort")


def test_a_slide_far_from_the_training_abstains_with_the_reason(ensemble, tmp_path):
    path = tmp_path / "far.h5"
    xy = np.arange(60, dtype=np.int64).reshape(30, 2)
    write_features(path, np.full((30, DIM), 90, np.float16), xy, {"fingerprint": "f", **IDENTITY})
    with FeatureCache(1 << 20, tmp_path / "scratch") as cache:
        answers = predict(ensemble, {"far": path}, cohort_of("far"), {"far": "F"}, cache)
    cells = prediction_cells(ensemble, answers.slides["far"])
    assert cells["decision"] == "abstain:out of distribution" and "limit" in cells["doubts"]


def test_regression_and_survival_have_their_columns_without_classes(tmp_path, slides):
    settings = MilSettings(**{**SETTINGS.model_dump(), "label": "age", "kind": "regression"})
    tasks = make_tasks(settings, [{"age": str(age)} for age in range(20, 60)])
    facts = facts_in(tmp_path / "binary")
    for number in range(2):
        network = build_network(spec_of(settings, DIM, 1))
        network.draw_weights(torch.Generator().manual_seed(number))
        data = save(dict(network.state_dict()))
        state = tasks.fit_state(np.zeros((40, 1)), np.arange(20.0, 60.0)[:, None])
        path = facts.members / f"fold-{number}" / "member-0.safetensors"
        path.write_bytes(data)
        said = {"fold": number, "member": 0, "network": network.spec.record(), "tasks": tasks.record(), "states": state}
        path.with_suffix(".json").write_text(json.dumps({**said, "sha256": hashlib.sha256(data).hexdigest()}))
    write_bundle(tmp_path / "bundle", replace(facts, mil=settings, tasks=tasks.record(), trust={}))
    ensemble = Ensemble(open_bundle(tmp_path / "bundle"), CPU)
    cells = prediction_cells(ensemble, asked(ensemble, slides, tmp_path).slides["a1"])
    assert list(cells) == [*tasks.columns, "lowest", "highest"]
    assert float(cells["lowest"]) <= float(cells[tasks.columns[0]]) <= float(cells["highest"])


def test_numbers_in_small_units_are_not_rounded_away(ensemble, monkeypatch):
    tasks = make_tasks(MilSettings(label="dose", kind="regression"), [{"dose": f"{dose}e-8"} for dose in range(40)])
    monkeypatch.setattr(ensemble, "tasks", tasks)
    monkeypatch.setattr(ensemble, "trust", {})
    said = prediction_cells(ensemble, Verdict(30, np.array([[1.2e-8], [3.4e-8]])))
    assert said == {tasks.columns[0]: "2.3e-08", "lowest": "1.2e-08", "highest": "3.4e-08"}
    said = prediction_cells(ensemble, Verdict(30, np.array([[123456.789]])))
    assert said["lowest"] == "123456.79" and set(prediction_cells(ensemble, None).values()) == {""}


def test_a_bundle_of_unknown_parts_is_refused_in_one_line(tmp_path):
    bundle = bundle_of(tmp_path)
    for broken in (
        {"tasks": {"tasks": [{"kind": "prophecy"}]}},
        {"trust": {"label": {}}},
        {"trust": {"other": bundle.facts["trust"]["label"]}},
    ):
        with pytest.raises(BundleError) as caught:
            Ensemble(replace(bundle, facts={**bundle.facts, **broken}), CPU)
        assert "\n" not in str(caught.value)
