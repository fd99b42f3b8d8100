"""The model card says what CLAIM and TRIPOD+AI ask for, from measured numbers, and says so where there are none."""

from __future__ import annotations

import pytest

from pathfm.mil.bundle import open_bundle, write_bundle
from pathfm.mil.card import encoder_licence, model_card, number, without_names

from .bundles import METRICS, facts_in


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    write_bundle(folder / "bundle", facts_in(folder))
    return (folder / "bundle" / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize(
    "words",
    [
        "Intended use, users and setting: (to be stated",
        "Ethics approval and de-identification: (to be stated",
        "Learned from 40 patients; numbers rest on 40 patients with 40 slides",
        "Partition: folds, patients never on two sides; hash c0ffee",
        "|  | cohort | failed | used |",
        "| slides | 42 | 2 | 40 |",
        "Tiles of 64 px at 0.5 um per px (in training 0.5 to 0.5)",
        "Encoder pretrained (8 features, fp32), inside this bundle.",
        "| auroc | 0.900 (0.800 to 0.950, 95 %, DeLong) |",
        "encoder and tile count, auroc: not significantly different.",
        "Calibration: none.",
        "Coverage of the ensemble is approximate",
        "not valid on another scanner",
        r"| site | A\|B | 20 | 9 | not known |",
        "Licence of the encoder: not stated by its card",
        "- a note",
        "2 notes about single slides or patients are not in the bundle",
    ],
)
def test_it_says(card, words):
    assert words in card


def test_it_is_made_of_what_is_there(tmp_path):
    write_bundle(tmp_path / "bundle", facts_in(tmp_path))
    about = {key: value for key, value in open_bundle(tmp_path / "bundle").facts.items() if key != "files"}
    text = model_card(about, {})
    assert "No numbers are recorded." in text and "None were asked for" in text and "not recorded" in text


def test_trust_is_told_with_intervals(tmp_path):
    write_bundle(tmp_path / "bundle", facts_in(tmp_path))
    about = open_bundle(tmp_path / "bundle").facts
    share = {"value": 0.875, "low": 0.7, "high": 0.96, "method": "Clopper-Pearson"}
    trust = {
        "calibration": {"kind": "platt", "ece": {"before": 0.2, "after": 0.05}, "reliability": [{}]},
        "operating_points": [{"name": "youden", "threshold": 0.41, "sensitivity": share, "specificity": None}],
        "conformal": {"alpha": 0.1, "coverage": share},
    }
    text = model_card(about, {**METRICS, "trust": trust})
    assert "Calibration: kind platt; ece before 0.2, after 0.05." in text
    assert "youden: threshold 0.41, sensitivity 0.875 (0.700 to 0.960, 95 %, Clopper-Pearson), specificity not known." in text
    assert "Conformal sets: alpha 0.1; coverage 0.875 (0.700 to 0.960" in text
    refused = model_card(about, {**METRICS, "trust": {"conformal": {"refused": "19 patients are needed"}}})
    assert "Conformal sets: refused 19 patients are needed." in refused


def test_numbers_that_do_not_exist_are_not_made_up():
    assert number(None) == number({"value": None, "low": 0.1, "high": 0.2}) == "not known"
    assert number({"value": 0.5}) == "0.500"


def test_small_numbers_keep_their_digits():
    assert number({"value": 3.21e-7, "low": 1e-7, "high": 0.0125}) == "3.21e-07 (1e-07 to 0.013, 95 %)"
    assert number({"value": 0.0, "low": 1e-17, "high": 0.01}) == "0.000 (0.000 to 0.010, 95 %)"


def test_names_of_slides_and_patients_stay_at_home():
    kept = without_names({"notes": ["slide 1: bad", "10 slides", "all is well"], "leaks": []}, {"1", "p"})
    assert kept["notes"] == ["10 slides", "all is well", "1 notes about single slides or patients are not in the bundle"]


def test_the_licence_of_the_encoder_is_found(tmp_path):
    assert encoder_licence("uni2-h", None) and not encoder_licence("timm:resnet10t", None)
    assert encoder_licence("pretrained", tmp_path) == ""
    (tmp_path / "config.json").write_text('{"pretrained_cfg": {"license": "mit"}}')
    assert encoder_licence("pretrained", tmp_path) == "mit"
