"""The drift reference of a bundle: rare false alarms, shifts that are found, nobody named, bundles without one."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import betabinom, binom

from pathfm.errors import StoreError
from pathfm.mil.bundle import BundleError, open_bundle, write_bundle
from pathfm.mil.drift import DriftReference, drift_reference, fit_reference, flag_texts, reference_from_record, slide_facts
from pathfm.mil.drift_cohort import LEAST_WINDOW, LEVEL, cohort_flags
from pathfm.mil.drift_facts import BY_NAME, SlideFacts, facts_from_record
from pathfm.mil.inputs import Deploy
from pathfm.mil.stage import run_mil
from pathfm.store.feature_file import open_features
from pathfm.store.tile_store import open_tiles, write_tiles
from pathfm.study import ExtractSettings, TileSettings

from .bundles import facts_in

DIM = 16
SHIFTS = {
    "haematoxylin": ({"haematoxylin": 0.25}, "much haematoxylin"),
    "blur": ({"sharpness": -110.0}, "blurrier"),
    "pen": ({"pen": 0.4}, "much pen"),
    "tissue": ({"tiles": -1.0}, "little tissue"),
    "damage": ({"damage": 0.3}, "damaged"),
}


def drawn(rng, shift=None, scanner=None):
    """Facts of a slide of an imagined hospital: lopsided, mostly zero, and plain numbers; and its mean feature."""
    pen = rng.exponential(0.03) * (rng.random() < 0.1)
    numbers = {
        "sharpness": np.exp(rng.normal(5, 0.15)),
        "tiles": rng.integers(300, 2000),
        "pen": pen,
        "dropped": pen + rng.exponential(0.01),
        "damage": 0.01 * (rng.random() < 0.03),
        "white": abs(rng.normal(0.1, 0.02)),
        "haematoxylin": rng.normal(0.22, 0.05),
        "eosin": rng.normal(0.13, 0.03),
        "other": rng.normal(0.23, 0.04),
        "glass": rng.normal(238, 4),
    }
    numbers = {name: float(value) + (shift or {}).get(name, 0.0) for name, value in numbers.items()} | {"features": None}
    numbers["tiles"] = max(numbers["tiles"], 1.0) if "tiles" not in (shift or {}) else 3.0
    scanner = scanner or ("aperio" if rng.random() < 0.7 else "hamamatsu")
    return SlideFacts(scanner, 0.25, int(numbers["tiles"]), {}, numbers), rng.normal(size=DIM)


def trained(rng, patients=40, per_patient=1):
    made = [drawn(rng) for _ in range(patients * per_patient)]
    decisions = {"a": 18, "b": 18, "abstain:uncertain": 3, "abstain:out of distribution": 1}
    owners = [f"patient-{number // per_patient:03d}" for number in range(len(made))]
    return fit_reference([facts for facts, _ in made], np.stack([mean for _, mean in made]), owners, decisions, "b")


def new(rng, reference, **options):
    facts, mean = drawn(rng, **options)
    return replace(facts, numbers={**facts.numbers, "features": float(reference.features.distance(mean)[0])})


def rows(rng, reference, count, share=(0.45, 0.45, 0.1), **options):
    said = ("a", "b", "abstain:uncertain")
    return [
        {"facts": new(rng, reference, **options).record(), "decision": str(rng.choice(said, p=share))} for _ in range(count)
    ]


@pytest.fixture(scope="module")
def reference():
    return trained(np.random.default_rng(0))


@pytest.mark.parametrize(("patients", "per_patient"), [(10, 1), (40, 1), (30, 3)])
def test_slides_like_the_training_are_flagged_as_rarely_as_stated(patients, per_patient):
    hits, trainings, slides = 0, 20, 30
    for seed in range(trainings):
        rng = np.random.default_rng([seed, patients])
        reference = trained(rng, patients, per_patient)
        hits += sum(bool(reference.flags(new(rng, reference))) for _ in range(slides))
    beyond = round(reference.limit.expected * (patients + 1))
    assert beyond >= 1 and (beyond / (patients + 1) <= 0.05 or beyond == 1)
    # Slides that are held against one training share its limit: their number is beta-binomial.
    of_one = betabinom(slides, beyond, patients + 1 - beyond)
    assert hits <= trainings * of_one.mean() + 3.1 * np.sqrt(trainings * of_one.var())


@pytest.mark.parametrize("name", SHIFTS)
def test_a_planted_shift_is_flagged_in_words_with_value_and_range(reference, name):
    shift, words = SHIFTS[name]
    rng = np.random.default_rng(1)
    found = [reference.flags(new(rng, reference, shift=shift)) for _ in range(40)]
    texts = [[text for text in flag_texts(flags) if words in text] for flags in found]
    assert np.mean([bool(text) for text in texts]) > 0.9
    assert all("training" in text for each in texts for text in each)
    assert flag_texts([flag.record() for flag in found[0]]) == flag_texts(found[0])


def test_numbers_are_written_without_exponents():
    assert [BY_NAME["sharpness"].words(value) for value in (13.34, 141.2, 1823.0)] == ["13.3", "141", "1820"]
    assert BY_NAME["pen"].words(0.125) == "12.5%"


def test_an_unknown_scanner_another_scale_and_far_features_are_flagged(reference):
    rng = np.random.default_rng(2)
    usual = new(rng, reference)
    odd = replace(usual, scanner="leica", mpp=0.5, numbers={**usual.numbers, "features": 9.0})
    texts = flag_texts(reference.flags(odd))
    assert texts[0] == "unknown scanner: leica, training has aperio, hamamatsu"
    assert texts[1] == "slide of another scale: 0.5 um per px, training has 0.25"
    assert any(text.startswith("features are far from the training: distance of features 9,") for text in texts)
    unknown = {flag.name for flag in reference.flags(replace(usual, scanner=None, mpp=None))}
    assert {"scanner", "mpp"} <= unknown
    assert "mpp" not in {flag.name for flag in reference.flags(replace(usual, mpp=0.2526))}


def test_what_is_not_known_of_a_slide_is_not_flagged(reference):
    nothing = facts_from_record({"scanner": "aperio", "mpp": 0.25, "tiles": 0, "dropped": {}, "numbers": {}})
    assert reference.flags(nothing) == () and set(nothing.numbers.values()) == {None}


def test_four_patients_are_too_few_to_compare_with():
    few = trained(np.random.default_rng(3), 4, 5)
    assert not few.knows_enough and few.record()["too_few"] and few.record()["numbers"] == {}
    assert few.flags(drawn(np.random.default_rng(3), scanner="leica")[0]) == ()
    assert "too few" in cohort_flags(few, [{"facts": drawn(np.random.default_rng(3))[0].record()}]).verdict
    assert reference_from_record(few.record()).record() == few.record()


def test_the_record_gives_the_same_reference_and_depends_on_no_order():
    made = [drawn(np.random.default_rng([4, number])) for number in range(30)]
    names = [f"p{number:02d}" for number in range(30)]

    def fitted(order):
        return fit_reference([made[n][0] for n in order], None, [names[n] for n in order], {}).record()

    assert fitted(range(30)) == fitted(range(29, -1, -1))
    record = json.loads(json.dumps(fitted(range(30)), allow_nan=False))
    assert reference_from_record(record).record() == fitted(range(30))


def test_counts_of_few_slides_are_not_told_and_no_edge_is_the_value_of_a_slide():
    rng = np.random.default_rng(5)
    made = [drawn(rng, scanner="rare" if number < 3 else "aperio")[0] for number in range(30)]
    record = fit_reference(made, None, [f"p{number}" for number in range(30)], {}).record()
    assert record["scanners"] == {"aperio": 27, "rare": None}
    edges = {name: known["bins"]["edges"] for name, known in record["numbers"].items()}
    values = {name: {facts.numbers[name] for facts in made} for name in edges}
    assert not any(set(edges[name]) & values[name] for name in edges)
    assert all(min(known["bins"]["counts"]) >= 5 for known in record["numbers"].values())


def test_windows_like_the_training_are_rarely_called_shifted():
    hits = 0
    for seed in range(30):
        rng = np.random.default_rng([seed, 6])
        reference = trained(rng, 60)
        hits += bool(cohort_flags(reference, rows(rng, reference, 50)).flags)
    assert hits <= binom.ppf(0.999, 30, LEVEL)


def test_shifts_of_pictures_and_of_answers_are_told_apart(reference):
    rng = np.random.default_rng(7)
    stained = {"haematoxylin": 0.12}
    pictures = cohort_flags(reference, rows(rng, reference, 50, shift=stained))
    assert "haematoxylin" in {flag.name for flag in pictures.flags} and "decided as usual" in pictures.verdict
    answers = cohort_flags(reference, rows(rng, reference, 50, share=(0.2, 0.2, 0.6)))
    assert {flag.name for flag in answers.flags} == {"abstention", "doubt"} and "not watched" in answers.verdict
    both = cohort_flags(reference, rows(rng, reference, 50, share=(0.2, 0.2, 0.6), shift=stained))
    assert "reviewed by a pathologist" in both.verdict and json.dumps(both.record())
    scanner = cohort_flags(reference, rows(rng, reference, 50, scanner="hamamatsu"))
    assert "scanners" in {flag.name for flag in scanner.flags}
    positive = cohort_flags(reference, rows(rng, reference, 50, share=(0.02, 0.88, 0.1)))
    assert "positive" in {flag.name for flag in positive.flags}


def test_only_the_last_slides_with_facts_count_and_few_are_said_to_be_few(reference):
    rng = np.random.default_rng(8)
    failed = [{"slide_id": "broken", "facts": None}] * 30
    few = cohort_flags(reference, [*rows(rng, reference, LEAST_WINDOW - 1), *failed])
    assert few.flags == () and few.slides == LEAST_WINDOW - 1 and "Too few slides" in few.verdict
    old = rows(rng, reference, 50, scanner="leica")
    assert cohort_flags(reference, old).flags
    assert not cohort_flags(reference, [*old, *rows(rng, reference, 50)]).flags


def test_a_round_costs_little(reference):
    rng = np.random.default_rng(9)
    many = rows(rng, reference, 50)
    started = time.perf_counter()
    cohort_flags(reference, many)
    assert time.perf_counter() - started < 1.0  # about 0.01; other tests may run beside this one


def test_a_folder_of_tiles_has_facts_too(tmp_path):
    tiles = np.random.default_rng(10).integers(0, 255, (4, 16, 16, 3), dtype=np.uint8)
    write_tiles(tmp_path / "s.zarr", tiles, slide_id="s", mpp=None)
    facts = slide_facts(open_tiles(tmp_path / "s.zarr"), np.zeros((4, DIM)))
    assert facts.scanner is None and facts.mpp is None and facts.tiles == 4
    assert facts.numbers["sharpness"] is None and facts.numbers["eosin"] is not None
    assert facts_from_record(json.loads(json.dumps(facts.record()))) == facts


@pytest.fixture(scope="module")
def bundle_facts(tmp_path_factory):
    return facts_in(tmp_path_factory.mktemp("trained"))


def test_a_bundle_carries_the_reference_and_guards_it(tmp_path, bundle_facts, reference):
    digest = write_bundle(tmp_path / "bundle", replace(bundle_facts, drift=reference.record()))
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.digest == digest and "drift.json" in bundle.facts["files"]
    found = drift_reference(bundle)
    assert found.record() == reference.record()
    facts = new(np.random.default_rng(11), reference, scanner="leica")
    assert found.flags(facts) == reference.flags(facts) != ()
    path = tmp_path / "bundle" / "drift.json"
    assert "patient-" not in path.read_text()
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(BundleError, match=r"drift\.json is not the file that was locked"):
        drift_reference(bundle)
    with pytest.raises(BundleError, match=r"drift\.json is not the file that was locked"):
        open_bundle(tmp_path / "bundle")


def test_bundles_made_before_have_none_and_newer_ones_say_so(tmp_path, bundle_facts, reference):
    write_bundle(tmp_path / "old", bundle_facts)
    assert drift_reference(open_bundle(tmp_path / "old")) is None
    write_bundle(tmp_path / "newer", replace(bundle_facts, drift={**reference.record(), "format": 2}))
    with pytest.raises(StoreError, match=r"drift\.json is of version 2"):
        drift_reference(open_bundle(tmp_path / "newer"))
    assert DriftReference().flags(drawn(np.random.default_rng(12))[0]) == ()


def test_a_training_locks_what_its_slides_were_like(small):
    deploy = Deploy(TileSettings(), ExtractSettings(encoder="timm:resnet10t.c3_in1k"), None)
    inputs = replace(small.into("with-drift"), deploy=deploy)
    run_mil(small.study(epochs=1), small.cohort, inputs)
    bundle = open_bundle(inputs.mil_dir / "bundle")
    found = drift_reference(bundle)
    assert (found.slides, found.patients, sum(found.decisions.values())) == (48, 24, 24) and found.positive
    assert {"tiles", "haematoxylin", "features"} <= set(found.numbers) and found.limit.expected == pytest.approx(1 / 25)
    text = bundle.read("drift.json").decode()
    assert not any(row.slide_id in text or row.patient_id in text for row in small.cohort.rows)
    row = small.cohort.rows[0]
    store, features = (
        open_tiles(inputs.stores_dir / f"{row.slide_id}.zarr"),
        open_features(inputs.feature_file("main", row.slide_id)),
    )
    facts = slide_facts(store, features.features, found)
    assert found.flags(facts) == ()
    assert {flag.name for flag in found.flags(slide_facts(store, features.features + 50, found))} == {"features"}
