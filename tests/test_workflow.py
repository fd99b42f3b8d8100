"""Which study a command line means: what an output folder keeps, and which cohort it has."""

from __future__ import annotations

import pytest

from pathfm.config import dump_study, load_study, not_default
from pathfm.errors import UsageError
from pathfm.workflow import open_study, study_from_sources


@pytest.fixture
def kept(tmp_path):
    """Makes the output folder of an earlier command."""
    out = tmp_path / "out"

    def keep(*overrides):
        out.mkdir(exist_ok=True)
        (out / "study.yaml").write_text(dump_study(load_study(None, [f"out={out}", *overrides]), keeps_preset=True))
        return out

    return keep


def test_what_a_folder_keeps_of_a_stage_is_said_with_its_values(kept, capsys):
    out = kept("mil.epochs=2", "mil.folds=2", "mil.numbers.bootstrap=9", "tile.mpp=1.0")
    open_study(out, ["mil.folds=3"], "mil")
    said = f"kept settings of {out / 'study.yaml'}: mil.epochs=2, mil.numbers.bootstrap=9 (change with --set)\n"
    assert capsys.readouterr().out == said
    open_study(out, ["mil.numbers={bootstrap: 7}"], "tile")
    assert "study.yaml: tile.mpp=1.0 (change" in capsys.readouterr().out
    for stage in ("", "extract", "pretrain"):
        open_study(out, (), stage)
    assert capsys.readouterr().out == ""


def test_many_kept_settings_are_counted(kept, capsys):
    names = ("hidden", "attention", "heads", "folds", "ensemble", "search_folds", "epochs", "patience", "batch_bags", "seed")
    open_study(kept(*(f"mil.{name}=7" for name in names)), ["mil.seed=1"], "mil")
    assert "mil.patience=7 and 1 more (change with --set)" in capsys.readouterr().out


def test_a_presets_settings_are_no_choice_of_the_user():
    study = load_study(None, ["pretrain.preset=dino", "pretrain.steps=9"])
    assert not_default(study, "pretrain") == {"pretrain.preset": "dino", "pretrain.steps": "9"}


def test_slides_do_not_replace_a_cohort_table_unless_that_is_said(kept, tmp_path, capsys):
    out = kept(f"cohort.table={tmp_path / 'path.csv'}")
    slides = str(tmp_path / "slidesB")
    with pytest.raises(UsageError, match=r"is path.csv, with .* --out; or add --set cohort.table=null"):
        study_from_sources([slides], [f"out={out}"])
    study = study_from_sources([slides], [f"out={out}", "cohort.table=null"])
    assert (study.cohort.table, study.cohort.slides) == (None, (slides,))
    capsys.readouterr()
    study_from_sources([str(tmp_path / "path.csv")], [f"out={out}"])
    assert capsys.readouterr().out == "", "the same table"
    study_from_sources([str(tmp_path / "new.csv")], [f"out={out}"])
    assert capsys.readouterr().out == f"the cohort of {out} is now new.csv (was path.csv)\n"


def test_other_slides_and_a_table_that_comes_later_are_said(kept, tmp_path, capsys):
    out = kept(f"cohort.slides=[{tmp_path / 'a'}]")
    study_from_sources([str(tmp_path / "a")], [f"out={out}"])
    assert capsys.readouterr().out == ""
    study_from_sources([str(tmp_path / "a"), str(tmp_path / "b")], [f"out={out}"])
    study_from_sources([str(tmp_path / "labels.csv")], [f"out={out}"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"the cohort of {out} is now {now} (was a)" for now in ("a, b", "labels.csv")]
