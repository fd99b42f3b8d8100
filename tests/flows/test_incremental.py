"""A cohort that grows, shrinks and is retrained on: only what must be is made again."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from collections import Counter

import pytest

from pathfm import workflow
from pathfm.classification import mil_train
from pathfm.config import load_study
from pathfm.pretraining import reopen_list
from pathfm.retraining_price import retrain_price
from pathfm.store.commit import content_digest
from pathfm.store.pinned import pinned_file
from tests.flows.conftest import STUDY, run

pytestmark = pytest.mark.long

FAST = ("pretrain.steps=2", "pretrain.warmup_steps=0", "compute.workers=1", "compute.threads=1", "mil.controls=false")


def rows_of(table):
    with table.open(newline="") as stream:
        return list(csv.DictReader(stream))


class Growing:
    """A study whose cohort table is written anew before every run."""

    def __init__(self, folder, table):
        self.folder, self.rows, self.slides = folder, rows_of(table), table.parent
        (folder / "study.yaml").write_text(STUDY.format(out="out", table="cohort.csv"))
        self.out = folder / "out"

    def write(self, places):
        with (self.folder / "cohort.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, self.rows[0])
            writer.writeheader()
            for row in (self.rows[place] for place in places):
                masks = {name: self.slides / row[name] for name in ("path", "lesion_mask") if row.get(name)}
                writer.writerow(row | masks)
        return load_study(self.folder / "study.yaml", FAST)

    def run(self, places):
        """Every stage, in order."""
        study = self.write(places)
        for stage in (workflow.tile, workflow.pretrain, mil_train):
            assert stage(study) == 0

    def made(self, pattern):
        """Files under ``out``: name -> inode and time of change."""
        found = [path for path in self.out.glob(pattern) if not path.name.startswith("record")]
        return {path.relative_to(self.out).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}

    def splits(self):
        return json.loads((self.out / "mil" / "splits.json").read_text())


@pytest.fixture(scope="module")
def growing(tmp_path_factory, cohort_table):
    """Grown from nine to twelve slides; ``before`` and ``after`` each with everything that can be compared."""
    study = Growing(tmp_path_factory.mktemp("growing"), cohort_table)
    study.run(range(9))
    study.before = (study.made("tiles/*/*.zarr"), study.made("features/*/*/*.h5"), study.splits())
    study.encoder = content_digest(next((study.out / "encoder").glob("*/teacher")))
    study.run(range(12))
    study.after = (study.made("tiles/*/*.zarr"), study.made("features/*/*/*.h5"), study.splits())
    return study


def test_only_new_slides_are_tiled_and_extracted_and_old_patients_keep_their_folds(growing):
    for was, now in zip(growing.before[:2], growing.after[:2], strict=True):
        assert len(now) == len(was) * 12 // 9
        assert {name: now[name] for name in was} == was
    assert len(list((growing.out / "encoder").glob("*/teacher"))) == 1
    assert content_digest(next((growing.out / "encoder").glob("*/teacher"))) == growing.encoder
    was, now = growing.before[2], growing.after[2]
    for before, after in zip(was["folds"], now["folds"], strict=True):
        for part, patients in before.items():
            assert set(patients) <= set(after[part])
    old, everyone = ({row["patient_id"] for row in growing.rows[:count]} for count in (9, 12))
    counts = f"{len(old)} patients keep their places, {len(everyone - old)} are new, 0 are gone"
    assert now["origin"] == f"extended from the splits {was['hash'][:12]}: {counts}" and everyone - old
    assert {row["patient_id"] for row in rows_of(growing.out / "mil" / "predictions.csv") if row["predicted"]} == everyone


def test_the_same_again_changes_nothing(growing):
    before = {name: content_digest(growing.out / name) for name in ("tiles", "encoder", "features", "mil", "report")}
    growing.run(range(12))
    assert {name: content_digest(growing.out / name) for name in before} == before


def test_from_the_kept_splits_another_folder_comes_to_the_same(growing, tmp_path, cohort_table):
    """How a run that grew is repeated: with its list and its splits in place, all else follows."""
    again = Growing(tmp_path, cohort_table)
    study = again.write(range(9))
    workflow.tile(study)
    workflow.pretrain(study)
    (again.out / "mil").mkdir()
    shutil.copy(growing.out / "mil" / "splits.json", again.out / "mil")
    again.run(range(12))
    for name in ("tiles", "features", "mil"):
        assert content_digest(again.out / name) == content_digest(growing.out / name)


def test_slides_that_are_removed_vanish_and_nothing_else_happens(growing, tmp_path):
    shutil.copytree(growing.folder, tmp_path / "study")
    less = Growing(tmp_path / "study", growing.slides / "cohort.csv")
    files = less.made("tiles/*/*.zarr") | less.made("features/*/*/*.h5")
    many = Counter(row["label"] for row in growing.rows).most_common(1)[0][0]
    gone = next(row["patient_id"] for row in growing.rows if row["label"] == many)
    less.run([place for place, row in enumerate(growing.rows) if row["patient_id"] != gone])
    assert less.made("tiles/*/*.zarr") | less.made("features/*/*/*.h5") == files
    assert content_digest(next((less.out / "encoder").glob("*/teacher"))) == growing.encoder
    was, now = growing.after[2], less.splits()
    for before, after in zip(was["folds"], now["folds"], strict=True):
        assert after == {part: [name for name in names if name != gone] for part, names in before.items()}
    assert "1 are gone" in now["origin"]


def test_retraining_says_its_price_and_makes_everything_anew(growing, tmp_path):
    shutil.copytree(growing.folder, tmp_path / "study")
    again = Growing(tmp_path / "study", growing.slides / "cohort.csv")
    begun = workflow.begin(again.write(range(12)))
    lines = retrain_price(begun)
    assert lines[0] == "12 slides instead of 9: 3 new, 0 removed" and "12 slides" in lines[2] and "by earlier runs" in lines[1]
    reopen_list(begun)
    again.run(range(12))
    assert len(list((again.out / "encoder").glob("*/teacher"))) == 2
    assert len(json.loads(pinned_file(again.out).read_text())["slides"]) == 12
    assert len(again.made("features/*/pretrained-*/*.h5")) == 24
    assert [fold["test"] for fold in again.splits()["folds"]] == [fold["test"] for fold in growing.after[2]["folds"]]


@pytest.mark.parametrize("point", ["pretraining.frozen", "pretrain.step:2", "store.commit.before_rename:1"])
def test_a_kill_in_pretraining_keeps_the_list_once_something_was_learned(point, tmp_path, cohort_table):
    study = Growing(tmp_path, cohort_table)
    workflow.tile(study.write(range(9)))
    options = (*FAST, "pretrain.checkpoint_every=1", "compute.workers=0")
    settings = [part for option in options for part in ("--set", option)]
    code, _, err = run("pretrain", tmp_path / "study.yaml", *settings, crash_at=point)
    assert code == -signal.SIGKILL, err
    learned = any((study.out / "encoder").glob("*/checkpoints/step-*"))
    assert learned == (point == "pretrain.step:2") and pinned_file(study.out).is_file() == ("rename" not in point)
    workflow.tile(study.write(range(12)))
    code, out, err = run("pretrain", tmp_path / "study.yaml", *settings)
    assert code == 0, err
    assert len(json.loads(pinned_file(study.out).read_text())["slides"]) == (9 if learned else 12)
    assert ("3 slides are not in the list" in out) == learned and len(list((study.out / "encoder").glob("*/teacher"))) == 1
