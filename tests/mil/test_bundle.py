"""A bundle is whole, has the same bytes for the same training, and is refused with the reason when a byte is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pathfm.errors import ExitCode, StoreError
from pathfm.mil.bundle import BundleError, check_encoder, locked_settings, open_bundle, salted, write_bundle
from pathfm.store.commit import content_digest
from pathfm.study import MilSettings, TileSettings

from .bundles import DIM, IDENTITY, facts_in, public


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    return facts_in(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def bundle(tmp_path, facts):
    write_bundle(tmp_path / "bundle", facts)
    return tmp_path / "bundle"


def refusal(folder):
    with pytest.raises(BundleError) as caught:
        open_bundle(folder)
    assert caught.value.exit_code == ExitCode.USAGE
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_it_holds_what_was_promised(bundle, facts):
    opened = open_bundle(bundle)
    names = sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())
    assert names == [
        "MODEL_CARD.md",
        "bundle.json",
        "encoder/card.json",
        "encoder/config.json",
        "encoder/manifest.csv",
        "encoder/model.safetensors",
        "members/fold-000-member-000.json",
        "members/fold-000-member-000.safetensors",
        "members/fold-001-member-000.json",
        "members/fold-001-member-000.safetensors",
        "metrics.json",
    ]
    assert opened.digest == write_bundle(bundle, facts)
    weights, said = opened.read_member(opened.member_names[0])
    assert set(said) == {"fold", "member", "network", "aggregator_code", "precision", "tasks", "states", "sha256"} and weights


def test_the_same_training_gives_the_same_bytes_in_whatever_order_and_place(tmp_path, facts):
    again = facts_in(tmp_path / "elsewhere")
    write_bundle(tmp_path / "one", facts)
    write_bundle(tmp_path / "two", replace(again, slides=tuple(reversed(again.slides))))
    assert content_digest(tmp_path / "one") == content_digest(tmp_path / "two")


def test_no_time_host_path_patient_or_slide_is_inside(bundle, facts, tmp_path):
    text = b"".join(path.read_bytes() for path in sorted(bundle.rglob("*")) if path.is_file()).decode(errors="replace")
    for slide in facts.slides:
        assert slide.slide_id not in text and f'"{slide.patient_id}"' not in text
    assert str(facts.members) not in text and str(tmp_path) not in text
    assert '"host"' not in text and '"patients": 2' in text
    assert "nobody's business" not in text


def test_every_flipped_byte_of_every_file_is_refused_by_its_name(bundle):
    for path in sorted(path for path in bundle.rglob("*") if path.is_file() and path.name != "bundle.json"):
        whole = path.read_bytes()
        for place in {0, len(whole) // 2, len(whole) - 1}:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert f"{path.relative_to(bundle).as_posix()} is not the file that was locked" in refusal(bundle)
        path.write_bytes(whole[:-1])
        assert "is not the file that was locked" in refusal(bundle)
        path.write_bytes(whole)
    open_bundle(bundle)


def test_a_changed_bundle_json_has_another_digest(bundle):
    before = open_bundle(bundle).digest
    file = bundle / "bundle.json"
    file.write_text(file.read_text().replace('"fewest_tiles": 20', '"fewest_tiles": 21'))
    assert open_bundle(bundle).digest != before


def test_missing_and_additional_files_are_refused_by_their_names(bundle):
    (bundle / "notes.txt").write_text("hello")
    assert "notes.txt does not belong to it" in refusal(bundle)
    (bundle / "notes.txt").unlink()
    (bundle / "members" / "fold-001-member-000.safetensors").unlink()
    assert "members/fold-001-member-000.safetensors is missing" in refusal(bundle)


def test_a_link_in_place_of_a_file_is_refused(bundle, tmp_path):
    card = bundle / "MODEL_CARD.md"
    (tmp_path / "card").write_bytes(card.read_bytes())
    card.unlink()
    card.symlink_to(tmp_path / "card")
    assert "MODEL_CARD.md" in refusal(bundle)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not a JSON file"),
        ("[]", "not a JSON object"),
        ("{}", "does not describe a bundle"),
        ('{"format": "pathfm-bundle", "version": 99, "files": {}, "code": "9.0"}', "use pathfm 9.0 or newer"),
    ],
)
def test_a_foreign_or_newer_description_is_refused(bundle, content, said):
    (bundle / "bundle.json").write_text(content)
    assert said in refusal(bundle)


def test_no_bundle_is_said_so(tmp_path):
    assert "there is no bundle here" in refusal(tmp_path)


def test_bytes_that_change_after_opening_are_not_used(bundle):
    opened = open_bundle(bundle)
    (bundle / opened.member_names[0]).write_bytes(b"other")
    with pytest.raises(BundleError, match="is not the file that was locked"):
        opened.read_member(opened.member_names[0])


def test_a_network_of_other_tasks_or_without_its_bytes_is_not_locked(tmp_path, facts):
    with pytest.raises(StoreError, match="not the one that was trained"):
        write_bundle(tmp_path / "bundle", replace(facts, tasks={"tasks": []}))
    with pytest.raises(StoreError, match="no finished networks"):
        write_bundle(tmp_path / "bundle", replace(facts, members=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_public_encoders_are_named_and_own_ones_copied(bundle, facts, tmp_path):
    assert open_bundle(bundle).encoder_dir == bundle / "encoder"
    write_bundle(tmp_path / "public", public(facts))
    opened = open_bundle(tmp_path / "public")
    assert opened.encoder_dir is None and not (tmp_path / "public" / "encoder").exists()
    assert opened.facts["encoder"]["identity"] == IDENTITY
    assert locked_settings(opened, {})[1].encoder == "timm:resnet10t.c3_in1k"


def test_settings_are_those_of_training_but_for_pixels_and_what_only_training_needs(bundle, facts):
    tile, extract = locked_settings(open_bundle(bundle), {})
    assert tile == facts.tile.model_copy(update={"codec": "none"})
    assert (extract.precision, extract.also, extract.controls) == ("fp32", (), False)


def test_folders_of_one_cohort_are_asked_for_again(tmp_path, facts):
    tissue = {"annotations": tmp_path / "regions", "include": ["Tumour"]}
    write_bundle(tmp_path / "bundle", replace(facts, tile=TileSettings(tissue=tissue)))
    opened = open_bundle(tmp_path / "bundle")
    assert opened.facts["needs"] == ["tile.tissue.annotations"]
    with pytest.raises(BundleError, match=r"--set tile\.tissue\.annotations=FOLDER"):
        locked_settings(opened, {})
    tile, _ = locked_settings(opened, {"tile.tissue.annotations": "new"})
    assert (tile.tissue.annotations, tile.tissue.include) == (Path("new"), ("Tumour",))


def test_what_was_assumed_of_the_trainings_files_is_not_assumed_of_others(tmp_path, facts):
    write_bundle(tmp_path / "bundle", replace(facts, tile=TileSettings(assume_mpp=0.25)))
    opened = open_bundle(tmp_path / "bundle")
    assert (opened.facts["tile"]["assume_mpp"], opened.facts["needs"]) == (None, [])
    older = replace(opened, facts={**opened.facts, "tile": {**opened.facts["tile"], "assume_mpp": 0.25}})
    for bundle in (opened, older):
        assert locked_settings(bundle, {})[0].assume_mpp is None
        assert locked_settings(bundle, {"tile.assume_mpp": "0.5"})[0].assume_mpp == 0.5


def test_settings_that_name_files_of_the_cohort_stay_outside(tmp_path, facts):
    settings = MilSettings(**{**facts.mil.model_dump(), "features": "/secret", "split": {"scheme": "file", "file": "/secret"}})
    write_bundle(tmp_path / "bundle", replace(facts, mil=settings))
    assert "secret" not in (tmp_path / "bundle" / "bundle.json").read_text()
    assert open_bundle(tmp_path / "bundle").settings.ensemble == facts.mil.ensemble


def test_another_encoder_length_or_precision_is_refused_with_what_differs(bundle):
    opened = open_bundle(bundle)
    check_encoder(opened, IDENTITY, DIM, "here")
    with pytest.raises(BundleError, match="9 features per tile, but the networks were trained on 8"):
        check_encoder(opened, IDENTITY, 9, "here")
    for key in IDENTITY:
        with pytest.raises(BundleError, match=key.removeprefix("recipe_")):
            check_encoder(opened, {**IDENTITY, key: "other"}, DIM, "here")
    with pytest.raises(BundleError, match="pooling"):
        check_encoder(opened, {**IDENTITY, "recipe_pooling": "cls"}, DIM, "here")


def test_training_patients_and_files_are_known_again_and_strangers_are_not(bundle):
    opened = open_bundle(bundle)
    assert opened.trained_on(" P07", "") == "same patient"
    assert opened.trained_on("x", "id-p07") == "same file"
    assert opened.trained_on("p99", "id-p99") == opened.trained_on("sp07", "") == opened.trained_on("x", "") == ""


@pytest.mark.parametrize(("trained", "new"), [("007", "7"), ("7", "007"), ("007", "7.0"), ("7.0", "07")])
def test_patients_are_known_again_by_a_number_without_its_zeros(tmp_path, facts, trained, new):
    one = replace(facts.slides[0], patient_id=trained)
    write_bundle(tmp_path / "bundle", replace(facts, slides=(one, *facts.slides[1:])))
    opened = open_bundle(tmp_path / "bundle")
    assert opened.trained_on(new, "") == opened.trained_on(trained, "") == "same patient"
    assert opened.trained_on("70", "") == opened.trained_on("A7", "") == ""


def test_salts_keep_bundles_from_being_compared(bundle, facts, tmp_path):
    other = facts_in(tmp_path / "other", MilSettings(hidden=6, attention=2))
    write_bundle(tmp_path / "another", other)
    one, two = (set(open_bundle(folder).facts["trained_on"]["patients"]) for folder in (bundle, tmp_path / "another"))
    assert len(one) == len(two) == len(facts.slides) and not one & two
    assert salted("00", "patient", "a") != salted("00", "slide", "a")


@pytest.mark.long
def test_killed_before_the_end_it_is_absent_or_the_old_one(tmp_path, facts):
    code = (
        "import sys; sys.path.insert(0, sys.argv[3]);"
        "from pathlib import Path; from tests.mil.bundles import facts_in; from pathfm.mil.bundle import write_bundle;"
        "write_bundle(Path(sys.argv[2]), facts_in(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "trained"), str(tmp_path / "bundle"), str(Path(__file__).parents[2])]
    killed = {**os.environ, "PATHFM_CRASH_AT": "mil.bundle.before_commit"}
    assert subprocess.run(command, env=killed, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "bundle").exists()
    write_bundle(tmp_path / "bundle", facts)
    before = content_digest(tmp_path / "bundle")
    assert subprocess.run(command, env=killed, check=False).returncode == -signal.SIGKILL
    assert content_digest(tmp_path / "bundle") == before


def test_bundle_json_is_plain_json_without_nan(bundle):
    def refuse(name):
        raise AssertionError(name)

    json.loads((bundle / "bundle.json").read_text(), parse_constant=refuse)


def test_an_auditor_can_check_it_without_pathfm(bundle):
    text = (Path(__file__).parents[2] / "docs" / "bundle.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    command = [sys.executable, "-I", "-c", code]
    said = subprocess.run(command, cwd=bundle.parent, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == open_bundle(bundle).digest
    (bundle / "MODEL_CARD.md").write_text("better numbers")
    assert subprocess.run(command, cwd=bundle.parent, capture_output=True, check=False).returncode == 1
