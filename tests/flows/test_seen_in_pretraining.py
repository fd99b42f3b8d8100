"""From slides to the refusal: an exported encoder knows its pretraining slides however they come back."""

from __future__ import annotations

import csv
import json
import shutil

import cv2
import numpy as np
import pytest

from pathfm import workflow
from pathfm.config import load_study
from pathfm.errors import UsageError
from pathfm.geometry import Size
from pathfm.mil.held_out import held_out_slides
from pathfm.mil.seen import check_refusal, look_for_seen
from pathfm.slides.reader import open_slide
from pathfm.slides.synthetic import SyntheticSpec, write_slide
from pathfm.store.manifest import MANIFEST, name_key
from tests.flows.conftest import STUDY

FAST = ("pretrain.steps=1", "pretrain.warmup_steps=0", "extract.controls=false", "compute.workers=1", "compute.threads=1")


def study_of(folder, table, *overrides):
    folder.mkdir()
    (folder / "study.yaml").write_text(STUDY.format(out="out", table=table))
    return load_study(folder / "study.yaml", [*FAST, *overrides])


def rows_of(table):
    with table.open(newline="") as stream:
        return list(csv.DictReader(stream))


def teacher_of(study):
    (teacher,) = (study.out / "encoder").glob("*/teacher")
    return teacher


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, cohort_table):
    """A study that has pretrained an encoder on twelve slides."""
    study = study_of(tmp_path_factory.mktemp("seen") / "study", cohort_table)
    workflow.tile(study)
    workflow.pretrain(study)
    return study


@pytest.fixture(scope="module")
def newcomers(pretrained, tmp_path_factory, cohort_table):
    """Cohort table of slides that come from elsewhere: some of them did not."""
    folder = tmp_path_factory.mktemp("newcomers")
    known = rows_of(cohort_table)
    files = [cohort_table.parent / row["path"] for row in known]
    shutil.copy(files[0], folder / "renamed.tiff")
    with open_slide(files[1]) as slide:
        picture = slide.read_region(0, 0, 0, Size(512, 512))
    height, width = picture.shape[:2]
    saved = cv2.resize(picture[height // 128 :, width // 128 :], None, fx=0.9, fy=0.9, interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(folder / "saved.png"), cv2.cvtColor(saved, cv2.COLOR_RGB2BGR))
    cv2.imwrite(str(folder / "turned.png"), cv2.cvtColor(np.rot90(picture), cv2.COLOR_RGB2BGR))
    lines = ["slide_id,path,patient_id,label,mpp", "renamed,renamed.tiff,N1,normal,", "saved,saved.png,N2,lesion,0.5"]
    lines += ["turned,turned.png,N3,lesion,0.5", f"relative,new-0.tiff,{known[2]['patient_id']},lesion,"]
    for number in range(4):
        write_slide(
            folder / f"new-{number}.tiff", SyntheticSpec(size_px=Size(512, 512), seed=9000 + number, lesion=number % 2 == 1)
        )
        lines.append(f"stranger-{number},new-{number}.tiff,N{10 + number},{'lesion' if number % 2 else 'normal'},")
    lines = [line for line in lines if not line.startswith("stranger-0")]  # that file came as a relative of patient 2
    (folder / "cohort.csv").write_text("\n".join(lines) + "\n")
    study = study_of(folder / "study", folder / "cohort.csv", f"extract.encoder=local-dir:{teacher_of(pretrained)}")
    workflow.tile(study)
    return study


def seen_in(study):
    run = workflow.begin(study)
    return look_for_seen(study, run.cohort, run.layout.tiles)


@pytest.mark.long
def test_renamed_saved_again_turned_and_related_slides_are_found_and_strangers_are_not(newcomers, cohort_table):
    seen, known = seen_in(newcomers), rows_of(cohort_table)
    found = {slide_id: {each.reason: each.match for each in evidence} for slide_id, evidence in seen.evidence.items()}
    assert set(found) == {"renamed", "saved", "turned", "relative"}
    assert found["renamed"]["same file"] == found["renamed"]["same picture"] == name_key("slide", known[0]["slide_id"])
    assert found["saved"] == found["turned"] == {"same picture": name_key("slide", known[1]["slide_id"])}
    assert set(found["relative"]) == {"same patient"}


@pytest.mark.long
def test_the_refusal_names_every_slide_and_its_evidence(newcomers):
    seen = seen_in(newcomers)
    with pytest.raises(UsageError) as caught:
        check_refusal(seen, set(seen.patients.values()))
    for words in ("renamed: same file as", "saved: same picture as", "turned: same picture as", "relative: same patient as"):
        assert words in str(caught.value)
    assert "stranger" not in str(caught.value)


@pytest.mark.long
def test_the_encoder_folder_names_no_slide_and_no_patient(pretrained, cohort_table):
    teacher = teacher_of(pretrained)
    text = (teacher / MANIFEST).read_text() + json.dumps(json.loads((teacher / "card.json").read_text()))
    for row in rows_of(cohort_table):
        assert row["slide_id"] not in text and row["patient_id"] not in text


@pytest.mark.long
def test_the_control_has_seen_what_its_first_weights_have_and_nothing_else(pretrained, newcomers, tmp_path):
    teacher, table = teacher_of(pretrained), newcomers.cohort.table
    continued = study_of(tmp_path / "init", table, f"pretrain.init=local-dir:{teacher}")
    distilled = study_of(tmp_path / "distill", table, "pretrain.preset=distill", f"pretrain.teacher=local-dir:{teacher}")
    inherited = (teacher / MANIFEST).read_text().splitlines()
    for study in (continued, distilled):
        shutil.copytree(newcomers.out / "tiles", study.out / "tiles")
        workflow.pretrain(study)
        assert set(inherited) < set((teacher_of(study) / MANIFEST).read_text().splitlines())
    assert (teacher_of(continued).parent / "untrained" / MANIFEST).read_text().splitlines() == inherited
    assert not (teacher_of(distilled).parent / "untrained" / MANIFEST).exists()


@pytest.mark.long
def test_held_out_patients_take_no_part_in_pretraining(pretrained, tmp_path, cohort_table):
    study = study_of(tmp_path / "exclude", cohort_table, "mil.seen_in_pretraining=exclude")
    shutil.copytree(pretrained.out / "tiles", study.out / "tiles")
    workflow.pretrain(study)
    run = workflow.begin(study)
    held_out = held_out_slides(study, run.cohort)
    assert held_out
    lines = (teacher_of(study) / MANIFEST).read_text().splitlines()[1:]
    kept = {row.slide_id for row in run.cohort.rows} - held_out
    assert {line.split(",")[0] for line in lines} == {name_key("slide", slide_id) for slide_id in kept}
