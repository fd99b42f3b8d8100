"""An earlier run's splits and a cohort that has grown, in every scheme."""

import csv
import json
import random
from collections import Counter
from dataclasses import replace

import pytest

from pathfm.errors import UsageError
from pathfm.mil.held_out import held_out_patients
from pathfm.mil.saved_splits import kept_splits, read_splits
from pathfm.mil.splits import PatientFacts, make_splits
from pathfm.mil.stage import run_mil
from pathfm.mil_settings import MilSettings
from pathfm.store.cohort import Cohort
from pathfm.store.commit import content_digest, write_json
from pathfm.store.pinned import Pinned, PinnedSlide, write_pinned

from .conftest import planted

PARTS = ("train", "validation", "test")
SITES = ("north", "south", "east", "west", "isle", "coast")
SCHEMES = ("folds", "repeats", "monte-carlo", "column", "numbers", "site", "site-preserved")
COLUMNS = {"column": ("train", "train", "test"), "numbers": ("0", "1", "2")}


def cohort(patients, scheme, start=0):
    stratum = {f"p{number:03d}": "positive" if number % 4 < 2 else "negative" for number in range(start, patients)}
    side = COLUMNS.get(scheme, ("",))
    of = {name: int(name[1:]) for name in stratum}
    sites = (*SITES, "new") if patients > 36 else SITES
    return stratum, {
        name: PatientFacts((sites[number % len(sites)] if number >= 36 else SITES[number % 6],), (side[number % len(side)],))
        for name, number in of.items()
    }


def settings(scheme, **more):
    split = {"scheme": {"repeats": "folds", "numbers": "column"}.get(scheme, scheme)}
    split |= {"repeats": 2} if scheme == "repeats" else {"rounds": 4} if scheme == "monte-carlo" else {}
    return MilSettings.model_validate({"folds": 3, "split": split, **more})


def sides(fold):
    return {name: part for part in PARTS for name in getattr(fold, part)}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_old_patients_keep_their_places_and_new_ones_are_dealt(scheme):
    before = make_splits(*cohort(36, scheme), (), settings(scheme))
    now, facts = cohort(47, scheme, start=3)  # three are gone, eleven are new, some of them from a new site
    splits = make_splits(now, facts, (), settings(scheme), before=before)
    former = dict(zip(before.names, before.folds, strict=True))
    for name, fold in zip(splits.names, splits.folds, strict=True):
        assert sorted([*fold.train, *fold.validation, *fold.test]) == sorted(now)
        was = sides(former[name]) if name in former else {}
        assert {n: part for n, part in sides(fold).items() if n in was} == {n: part for n, part in was.items() if n in now}
        assert {now[n] for n in fold.train} == {"positive", "negative"}
    assert splits.origin.startswith(
        f"extended from the splits {before.hash[:12]}: 33 patients keep their places, 11 are new, 3"
    )
    assert splits.notes[0] == splits.origin
    fresh = make_splits(now, facts, (), settings(scheme))
    assert splits.folds != fresh.folds
    if scheme in {"site", "site-preserved"}:
        for fold in splits.folds:
            tested = {facts[n].site[0] for n in fold.test}
            assert not tested & {facts[n].site[0] for n in (*fold.train, *fold.validation)}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_cohort_gives_the_same_record_however_often(scheme, tmp_path):
    before = make_splits(*cohort(36, scheme), (), settings(scheme))
    grown = make_splits(*cohort(44, scheme), (), settings(scheme), before=before)
    write_json(tmp_path / "splits.json", grown.record())
    again = kept_splits(tmp_path, settings(scheme))
    assert again == grown
    stratum, facts = ({n: of[n] for n in random.Random(1).sample(sorted(of), len(of))} for of in cohort(44, scheme))
    assert make_splits(stratum, facts, (), settings(scheme), before=again) == grown
    relabelled = stratum | {"p001": "negative"}
    assert make_splits(relabelled, facts, (), settings(scheme), before=again).folds == grown.folds


@pytest.mark.parametrize(
    "changed",
    [{"seed": 1}, {"label": "other"}, {"folds": 4}, {"inner_fraction": 0.4}, {"split": {"repeats": 2}}],
    ids=lambda changed: next(iter(changed)),
)
def test_other_settings_cut_the_cohort_anew(changed):
    stratum, facts = cohort(36, "folds")
    before = make_splits(stratum, facts, (), settings("folds"))
    other = MilSettings.model_validate({"folds": 3, **changed})
    assert make_splits(stratum, facts, (), other, before=before) == make_splits(stratum, facts, (), other)


def test_other_settings_of_other_schemes_and_leaks_do_not():
    stratum, facts = cohort(36, "folds")
    before = make_splits(stratum, facts, (), settings("folds"))
    other = MilSettings.model_validate({"folds": 3, "split": {"rounds": 3, "test_fraction": 0.4, "leaks": "merge"}})
    new = cohort(40, "folds")
    assert make_splits(*new, (), other, before=before).folds == make_splits(*new, (), settings("folds"), before=before).folds


def test_a_sister_joins_her_sibling_and_one_who_ties_two_sides_is_refused():
    before = make_splits(*cohort(36, "folds"), (), settings("folds"))
    now, facts = cohort(38, "folds")
    pair = frozenset({"p036", before.folds[1].test[0]})
    splits = make_splits(now, facts, [pair], settings("folds"), before=before)
    assert pair <= set(splits.folds[1].test) and any("kept on one side" in note for note in splits.notes)
    torn = [pair, frozenset({"p036", before.folds[2].test[0]})]
    with pytest.raises(UsageError, match=r"put on different sides before: fold 1: .*; fold 2: "):
        make_splits(now, facts, torn, settings("folds"), before=before)


def test_sites_that_grow_together_across_folds_are_refused():
    before = make_splits(*cohort(36, "site-preserved"), (), settings("site-preserved"))
    now, facts = cohort(36, "site-preserved")
    one, other = (facts[fold.test[0]].site[0] for fold in before.folds[:2])
    facts["p000"] = PatientFacts((one, other))
    with pytest.raises(UsageError, match="different sides before"):
        make_splits(now, facts, (), settings("site-preserved"), before=before)


def test_when_too_many_have_left_it_says_what_to_do():
    stratum, facts = cohort(36, "folds")
    before = make_splits(stratum, facts, (), settings("folds"))
    gone = set(before.folds[0].validation)
    with pytest.raises(UsageError, match=r"fold 0 leaves no patient .*to stop by.*mil.split.keep=false"):
        make_splits({n: s for n, s in stratum.items() if n not in gone}, facts, (), settings("folds"), before=before)


def test_splits_that_were_changed_by_hand_are_not_built_upon(tmp_path):
    record = make_splits(*cohort(36, "folds"), (), settings("folds")).record()
    record["folds"][0]["test"].append(record["folds"][0]["train"].pop())
    write_json(tmp_path / "splits.json", record)
    with pytest.raises(UsageError, match=r"splits.json: the splits do not have the hash.*delete it"):
        kept_splits(tmp_path, settings("folds"))
    assert kept_splits(tmp_path / "none", settings("folds")) is None


@pytest.fixture(scope="module")
def growing(tmp_path_factory):
    return planted(tmp_path_factory.mktemp("growing"), patients=28, slides_each=1, stores=False)


def run(growing, rows, **mil):
    study = growing.study(folds=3, epochs=1, **mil)
    return run_mil(study, Cohort(tuple(rows), ("label",)), growing.inputs)


def test_the_stage_grows_its_splits_and_a_rerun_does_nothing(growing, capsys):
    rows, folder = growing.cohort.rows, growing.inputs.mil_dir
    run(growing, rows[:24])
    before = read_splits(folder / "splits.json")
    assert run(growing, rows[:24]).did_nothing and not before.origin
    run(growing, rows[2:])
    after = read_splits(folder / "splits.json")
    assert f"extended from the splits {before.hash[:12]}: 22 patients keep their places, 4 are new, 2 are gone" in after.notes
    assert "splits: extended from" in capsys.readouterr().out
    assert after.notes[0] in json.loads((folder / "metrics.json").read_text())["splits"]["notes"]
    was = {name: number for number, fold in enumerate(before.folds) for name in fold.test}
    now = {name: number for number, fold in enumerate(after.folds) for name in fold.test}
    assert all(now[name] == was[name] for name in now.keys() & was.keys()) and len(now) == 26
    assert max(Counter(now.values()).values()) - min(Counter(now.values()).values()) <= 1
    with (folder / "predictions.csv").open(newline="") as stream:
        assert {row["patient_id"] for row in csv.DictReader(stream) if row["predicted"]} == set(now)
    digest = content_digest(folder)
    assert run(growing, rows[2:]).did_nothing and content_digest(folder) == digest
    run(growing, rows[2:], seed=1)
    assert "splits: cut anew, since other settings made the earlier ones (seed)" in capsys.readouterr().out
    assert not read_splits(folder / "splits.json").origin


def test_who_is_held_out_stays_so_once_an_encoder_was_pretrained(growing, tmp_path):
    study = growing.study(seen_in_pretraining="exclude").model_copy(update={"out": tmp_path})
    rows = growing.cohort.rows
    first = held_out_patients(study, Cohort(rows[:24], ("label",)))
    learned = {row.slide_id: PinnedSlide("s") for row in rows[:24] if row.patient_id not in first}
    write_pinned(tmp_path, Pinned("t", learned, tuple(sorted(first))))
    assert held_out_patients(study, growing.cohort) != first  # nothing was learned yet: the list does not count
    (tmp_path / "encoder" / "e" / "checkpoints" / "step-1").mkdir(parents=True)
    assert held_out_patients(study, growing.cohort) == first
    sites = [replace(row, site="a" if row.patient_id in {*first, "p025", rows[0].patient_id} else "b") for row in rows]
    by_site = growing.study(seen_in_pretraining="exclude", split={"scheme": "site"}).model_copy(update={"out": tmp_path})
    assert held_out_patients(by_site, Cohort(tuple(sites), ("label",))) == first | ({"p025"} | ({"p000"} & first))


@pytest.mark.parametrize("point", ["mil.stage.after_splits", "mil.stage.before_metrics"])
def test_a_kill_while_the_splits_grow_changes_nothing(growing, monkeypatch, point):
    def killed(name):
        if name == point:
            raise KeyboardInterrupt

    rows, undisturbed, disturbed = growing.cohort.rows, growing.into("undisturbed"), growing.into(point)
    study = growing.study(folds=3, epochs=1)
    for inputs in (undisturbed, disturbed):
        run_mil(study, Cohort(rows[:24], ("label",)), inputs)
    run_mil(study, growing.cohort, undisturbed)
    with monkeypatch.context() as patched:
        patched.setattr("pathfm.mil.stage.crash_point", killed)
        with pytest.raises(KeyboardInterrupt):
            run_mil(study, growing.cohort, disturbed)
    assert read_splits(disturbed.mil_dir / "splits.json").origin and not (disturbed.mil_dir / "metrics.json").exists()
    run_mil(study, growing.cohort, disturbed)
    assert content_digest(disturbed.mil_dir) == content_digest(undisturbed.mil_dir)
