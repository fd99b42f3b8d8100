"""Every scheme of splits: no patient on two sides, no dependence on order, notes for readers, refusals that help."""

import csv
import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from pathfm.errors import UsageError
from pathfm.mil.splits import PatientFacts, make_splits, patient_facts, read_splits
from pathfm.mil_settings import MilSettings
from pathfm.store.cohort import SlideRow
from pathfm.store.commit import write_json

SITES = ("north", "south", "east", "west", "isle", "coast")
SCHEMES = ("folds", "monte-carlo", "column", "numbers", "site", "site-preserved", "file")
PAIRS = [frozenset({"p00", "p06"}), frozenset({"p06", "p12"})]


def cohort(patients=36, side=lambda number: ("train", "val", "test")[number % 3 if number % 2 else 0]):
    """stratum_of and facts: a third positive, six sites, one slide per patient."""
    stratum = {f"p{number:02d}": "positive" if number % 4 < 2 else "negative" for number in range(patients)}
    facts = {
        name: PatientFacts((SITES[number % 6],), (side(number),), (f"slide-{name}",)) for number, name in enumerate(stratum)
    }
    return stratum, facts


def settings(**split):
    own = {name: split.pop(name) for name in ("folds", "seed", "inner_fraction", "kind", "time") if name in split}
    return MilSettings.model_validate({"folds": 3, **own, "split": split})


def made(scheme, tmp_path, together=(), order=None, seed=0):
    side = (lambda number: str(number % 3)) if scheme == "numbers" else (lambda number: ("train", "val", "test")[number % 3])
    stratum, facts = cohort(side=side)
    if order:
        stratum, facts = ({name: of[name] for name in order(sorted(of))} for of in (stratum, facts))
    split = {"scheme": {"numbers": "column"}.get(scheme, scheme)}
    if scheme == "file":
        split["file"] = tmp_path / "splits.json"
        if not split["file"].exists():
            write_json(split["file"], make_splits(stratum, facts, together, settings(seed=5)).record())
    return make_splits(stratum, facts, together, settings(**split, seed=seed)), stratum


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_patient_is_on_two_sides_and_pairs_stay_together(scheme, tmp_path):
    """STAMP's cross-validation stops early on its test fold: here the part to stop by is never the one to test."""
    splits, stratum = made(scheme, tmp_path, PAIRS)
    for fold in splits.folds:
        assert sorted([*fold.train, *fold.validation, *fold.test]) == sorted(stratum)
        side = {name: part for part in ("train", "validation", "test") for name in getattr(fold, part)}
        assert side["p00"] == side["p06"] == side["p12"]
        assert {stratum[name] for name in fold.train} == {"positive", "negative"}
    assert any("kept on one side" in note for note in splits.notes)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_order_of_patients_and_sites_does_not_matter(scheme, tmp_path):
    def mixed(names):
        return random.Random(2).sample(names, len(names))

    assert made(scheme, tmp_path)[0] == made(scheme, tmp_path, order=mixed)[0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_record_is_plain_and_comes_back_whole(scheme, tmp_path):
    splits, _ = made(scheme, tmp_path)
    write_json(tmp_path / "again.json", splits.record())
    again = read_splits(tmp_path / "again.json")
    assert again == splits and again.hash == json.loads((tmp_path / "again.json").read_text())["hash"]
    assert len(splits.names) == len(splits.folds)
    assert str(tmp_path) not in json.dumps(splits.record())


def test_the_default_is_one_test_per_patient():
    stratum, facts = cohort()
    splits = make_splits(stratum, facts, (), MilSettings())
    assert Counter(name for fold in splits.folds for name in fold.test) == dict.fromkeys(stratum, 1)
    assert splits.scheme == "folds" and splits.notes == ()


def test_repeats_cut_anew_and_say_so():
    stratum, facts = cohort()
    splits = make_splits(stratum, facts, (), settings(repeats=3))
    assert set(Counter(name for fold in splits.folds for name in fold.test).values()) == {3}
    assert splits.folds[:3] == make_splits(stratum, facts, (), settings()).folds
    assert len({fold.test for fold in splits.folds}) == 9
    assert splits.names[3] == "repeat 1 fold 0" and any("not independent" in note for note in splits.notes)


def test_monte_carlo_says_that_its_test_parts_overlap():
    """CLAM's "k-fold" splits are Monte Carlo ones under another name."""
    stratum, facts = cohort()
    splits = make_splits(stratum, facts, (), settings(scheme="monte-carlo", rounds=7, test_fraction=0.25))
    assert [len(fold.test) for fold in splits.folds] == [10] * 7  # 5 of 18 + 5 of 18
    assert "overlap" in splits.notes[0] and any("tested more than once" in note for note in splits.notes)


def test_a_column_keeps_its_sides_and_says_who_is_never_tested():
    stratum, facts = cohort(side=lambda number: ("train", "Validation", "test")[number % 3])
    (fold,) = make_splits(stratum, facts, (), settings(scheme="column")).folds
    assert fold.test == tuple(name for name in stratum if facts[name].split == ("test",))
    assert "24 of 36 patients are never tested" in make_splits(stratum, facts, (), settings(scheme="column")).notes


def test_a_column_without_validation_gets_one_out_of_train():
    stratum, facts = cohort(side=lambda number: ("train", "train", "test")[number % 3])
    splits = make_splits(stratum, facts, (), settings(scheme="column"))
    (fold,) = splits.folds
    assert fold.validation and {facts[name].split for name in (*fold.validation, *fold.train)} == {("train",)}
    assert any("no validation part" in note for note in splits.notes)


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (lambda number: "tset" if number == 3 else "train", "'tset' is no side of a split, did you mean 'test'"),
        (lambda number: "" if number == 3 else "train", "1 patients have no split: p03"),
        (lambda number: "test", "no patient who takes part has the split 'train'"),
        (lambda number: "train", "no patient who takes part has the split 'test'"),
        (lambda number: "train" if number == 3 else str(number % 3), "mixed with 'train'"),
        (lambda number: str(1 + number % 3), "fold numbers are 1, 2, 3"),
        (lambda number: "0", "fold numbers are 0"),
    ],
)
def test_a_column_that_cannot_be_used_is_named(side, message):
    with pytest.raises(UsageError, match=message):
        make_splits(*cohort(side=side), (), settings(scheme="column"))


def test_a_column_made_at_random_over_fields_puts_patients_on_two_sides_and_is_refused():
    rng = random.Random(0)
    rows = [
        SlideRow(f"f{n:02d}", Path("x"), patient_id=f"p{n // 6}", split=rng.choice(["train", "test"]), labels={"label": "a"})
        for n in range(36)
    ]
    facts = patient_facts(rows, {row.slide_id: row.patient_id for row in rows})
    with pytest.raises(UsageError, match=r"(?s)6 patients are on two sides of the split.*patient p0: 'test', 'train'"):
        make_splits({f"p{n}": "ab"[n % 2] for n in range(6)}, facts, (), settings(scheme="column"))


@pytest.mark.parametrize("side", [lambda n: str(n % 5), lambda n: ("train", "val", "test")[n % 5 % 3]])
def test_a_column_that_tears_a_pair_is_refused(side):
    with pytest.raises(UsageError, match="two sides: p00, p06"):
        make_splits(*cohort(side=side), PAIRS[:1], settings(scheme="column"))


def test_each_site_is_tested_once_by_networks_that_saw_none_of_it():
    stratum, facts = cohort()
    splits = make_splits(stratum, facts, (), settings(scheme="site"))
    assert splits.names == tuple(f"site {site}" for site in sorted(SITES))
    for name, fold in zip(splits.names, splits.folds, strict=True):
        assert {facts[patient].site[0] for patient in fold.test} == {name.removeprefix("site ")}


def test_sites_that_share_a_patient_are_one():
    stratum, facts = cohort()
    facts["p00"] = PatientFacts(("north", "south"), ("",))
    splits = make_splits(stratum, facts, [frozenset({"p02", "p03"})], settings(scheme="site"))
    assert splits.names == ("site coast", "site east + west", "site isle", "site north + south")
    assert any("east + west; north + south" in note for note in splits.notes)


def test_sites_that_cannot_be_used_are_named():
    stratum, facts = cohort()
    with pytest.raises(UsageError, match=r"36 patients have no site: p00.*36 in all"):
        make_splits(stratum, dict.fromkeys(facts, PatientFacts()), (), settings(scheme="site"))
    with pytest.raises(UsageError, match="all patients are of one site"):
        make_splits(stratum, dict.fromkeys(facts, PatientFacts(("x",))), (), settings(scheme="site"))
    with pytest.raises(UsageError, match=r"6 sites cannot make 8 folds.*mil.folds to 6"):
        make_splits(stratum, facts, (), settings(scheme="site-preserved", folds=8))
    by_class = {name: PatientFacts((stratum[name],)) for name in stratum}
    with pytest.raises(UsageError, match="site negative leaves no patient of negative to learn from"):
        make_splits(stratum, by_class, (), settings(scheme="site"))


def test_a_site_of_one_class_is_noted():
    stratum, facts = cohort()
    facts |= {
        name: PatientFacts(("clinic",)) for name in stratum if facts[name].site == ("north",) and stratum[name] == "positive"
    }
    notes = make_splits(stratum, facts, (), settings(scheme="site")).notes
    assert "site clinic: its test part has no negative" in notes


def test_site_preserved_folds_are_whole_sites_with_like_shares_of_labels():
    rng = random.Random(1)
    sites = [f"site{number:02d}" for number in range(15)]
    weights = [rng.random() ** 2 for _ in sites]
    of = {f"p{n:03d}": rng.choices(sites, weights)[0] for n in range(300)}
    stratum = {name: rng.choices(["a", "b"], [0.8, 0.2])[0] for name in of}
    facts = {name: PatientFacts((site,)) for name, site in of.items()}
    splits = make_splits(stratum, facts, (), settings(scheme="site-preserved"))
    held = [{of[name] for name in fold.test} for fold in splits.folds]
    assert all(not one & other for one, other in itertools.combinations(held, 2))
    for label, total in Counter(stratum.values()).items():
        shares = [sum(stratum[name] == label for name in fold.test) / total for fold in splits.folds]
        assert max(abs(share - 1 / 3) for share in shares) < 0.03


def test_saved_splits_that_were_changed_or_are_of_others_are_refused(tmp_path):
    stratum, facts = cohort()
    path = tmp_path / "splits.json"
    record = make_splits(stratum, facts, (), settings()).record()
    write_json(path, record)
    again = settings(scheme="file", file=path)
    assert make_splits(stratum, facts, (), again).hash == record["hash"]
    fewer = {name: label for name, label in stratum.items() if name not in {"p03", "p07"}}
    with pytest.raises(UsageError, match="2 patients who take no part here: p03, p07"):
        make_splits(fewer, facts, (), again)
    with pytest.raises(UsageError, match="lacks 1 patients: new"):
        make_splits({**stratum, "new": "positive"}, facts, (), again)
    record["folds"][0]["test"].append(record["folds"][0]["train"].pop())
    write_json(path, record)
    with pytest.raises(UsageError, match="do not have the hash"):
        make_splits(stratum, facts, (), again)
    for text in ("{", "[]", '{"folds": 3}', '{"folds": [], "seed": 1}'):
        path.write_text(text)
        with pytest.raises(UsageError):
            read_splits(path)
    with pytest.raises(UsageError, match="file not found"):
        read_splits(tmp_path / "none.json")


def split_tables(folder, shared):
    """Ten folds of slide_ids as MambaMIL and CLAM write them; in each, ``shared`` patients have slides in train and in test."""
    slides = {f"TCGA-{patient:03d}-DX{number}": f"TCGA-{patient:03d}" for patient in range(60) for number in (1, 2)}
    rng = random.Random(0)
    for fold in range(10):
        order = rng.sample(range(60), 60)
        parts = {"train": order[:40], "val": order[40:48], "test": order[48:]}
        columns = {
            part: [name for name, patient in slides.items() if int(patient[-3:]) in set(own)] for part, own in parts.items()
        }
        for patient in parts["train"][:shared]:
            slide = f"TCGA-{patient:03d}-DX2"
            columns["train"].remove(slide)
            columns["test"].append(slide)
        with (folder / f"splits_{fold}.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["", *columns])
            writer.writerows((n, *row) for n, row in enumerate(itertools.zip_longest(*columns.values(), fillvalue="")))
    return slides


def test_published_split_tables_with_patients_in_train_and_test_are_refused(tmp_path):
    """As the LUAD/LUSC splits that MambaMIL ships, with 6 to 13 such patients in each of ten folds."""
    slides = split_tables(tmp_path, shared=6)
    with pytest.raises(UsageError, match=r"(?s)patients are on two sides.*train and test of splits_0.csv") as refusal:
        read_splits(tmp_path, slides)
    assert int(refusal.value.what.split()[0]) > 20


def test_split_tables_without_overlap_are_used_as_they_are(tmp_path):
    slides = split_tables(tmp_path, shared=0)
    stratum = {patient: "ab"[int(patient[-3:]) % 2] for patient in slides.values()}
    facts = {patient: PatientFacts(slides=(f"{patient}-DX1", f"{patient}-DX2")) for patient in stratum}
    splits = make_splits(stratum, facts, (), settings(scheme="file", file=tmp_path))
    assert splits.names[10 - 1] == "splits_9.csv" and {len(fold.test) for fold in splits.folds} == {12}
    with pytest.raises(UsageError, match="2 slides of the splits take no part here: TCGA-007-DX1, TCGA-007-DX2"):
        read_splits(tmp_path, {slide: patient for slide, patient in slides.items() if "007" not in slide})


def test_strata_of_numbers_are_joined_where_classes_are_refused():
    stratum = {f"p{n:02d}": "few" if n == 0 else f"quarter {n % 4}" for n in range(40)}
    with pytest.raises(UsageError, match="few: 1"):
        make_splits(stratum, {}, (), settings(kind="multiclass"))
    assert make_splits(stratum, {}, (), settings(kind="regression")).folds
    assert make_splits(stratum, {}, (), settings(time="months")).folds
    assert make_splits(stratum, {}, (), settings(), kind="cox").folds


def test_facts_come_from_all_slides_in_any_order():
    rows = [
        SlideRow("b", Path("b"), site="x", split="train"),
        SlideRow("a", Path("a"), split="train"),
        SlideRow("c", Path("c"), site="y"),
    ]
    facts = patient_facts(rows, {"a": "p", "b": "p", "c": "q"})
    assert facts == {"p": PatientFacts(("x",), ("train",), ("a", "b")), "q": PatientFacts(("y",), ("",), ("c",))}
    assert facts == patient_facts(rows[::-1], {"a": "p", "b": "p", "c": "q"})
