"""What jobs have told of is what ``pathfm verify`` goes by: a receipt that is removed or written anew hides nothing."""

from __future__ import annotations

import json
import shutil

import pytest

from pathfm import workflow
from pathfm.chain import PATTERN, told
from pathfm.config import load_study
from pathfm.errors import ExitCode, UsageError
from pathfm.jobs import run_job
from pathfm.models.encoder_folders import write_folder
from pathfm.models.networks import load_network
from pathfm.running import RunOptions, explained, run_study
from pathfm.store.receipts import read_receipt, receipt_path
from pathfm.study_plan import make_plan, plan_file, read_plan, write_plan
from pathfm.verification import verify
from pathfm.workflow import begin, keep_settings
from tests.flows.conftest import STUDY

UNTIL = RunOptions(until="tile")


@pytest.fixture
def table(tmp_path, cohort_table):
    """The cohort's first three slides, in a table of their own."""
    lines = cohort_table.read_text().splitlines()[:4]
    folder = cohort_table.parent
    path = tmp_path / "cohort.csv"
    path.write_text("\n".join(lines).replace("slides/", f"{folder}/slides/").replace("masks/", f"{folder}/masks/") + "\n")
    return path


@pytest.fixture
def opened(tmp_path, table):
    """The study of that table, with settings."""
    (tmp_path / "study.yaml").write_text(STUDY.format(out="out", table=table))

    def load(*overrides):
        return load_study(tmp_path / "study.yaml", ["compute.workers=1", "compute.threads=1", *overrides])

    return load


def stores(study):
    return sorted(study.out.glob("tiles/*/*.zarr"))


def alter(store):
    """Another byte in the pixels of a store."""
    chunk = max((path for path in store.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    raw = bytearray(chunk.read_bytes())
    raw[len(raw) // 2] ^= 1
    chunk.write_bytes(raw)


def receipts(study):
    return sorted(receipt_path(study.out, "tile", "all").parent.glob("*.json"))


def jobs_told(study, kind="job_done"):
    return [said for path in sorted(study.out.glob(PATTERN)) for said in told(path, kind) if said["stage"] == "tile"]


@pytest.mark.long
def test_an_altered_store_cannot_be_made_official(opened, capsys):
    study = opened()
    assert run_study(study, UNTIL) == verify(study.out) == ExitCode.DONE
    store = stores(study)[0]
    altered = f"  {store.stem}: a job told of other content than the one before it"
    alter(store)
    (receipt,) = receipts(study)
    receipt.unlink()
    capsys.readouterr()
    assert verify(study.out) == ExitCode.SOME_FAILED
    assert f"receipts/tile/{receipt.name}: missing, although a job told of it" in capsys.readouterr().out
    for options in (UNTIL, RunOptions(until="tile", forcerun=("tile",)), UNTIL):
        assert run_study(study, options) == ExitCode.DONE
        assert verify(study.out) == ExitCode.SOME_FAILED
        assert altered in capsys.readouterr().out
    shutil.rmtree(store)
    assert run_study(study, UNTIL) == verify(study.out) == ExitCode.DONE
    assert "note" not in capsys.readouterr().out


@pytest.mark.long
def test_a_stage_that_is_run_again_by_force_makes_no_alteration_official(opened, capsys):
    study = opened()
    run_study(study, UNTIL)
    alter(stores(study)[1])
    assert run_study(study, RunOptions(until="tile", forcerun=("tile",))) == ExitCode.DONE
    assert verify(study.out) == ExitCode.SOME_FAILED
    assert capsys.readouterr().out.count("nothing was made of it in between") == 1


@pytest.mark.long
def test_receipts_that_went_with_their_artifacts_and_groups_that_are_no_more_are_no_alarm(opened, capsys):
    study = opened("compute.group_slides=1")
    run_study(study, UNTIL)
    before = receipts(study)
    study = opened()
    assert run_study(study, UNTIL) == verify(study.out) == ExitCode.DONE
    assert len(before) > 1 and len(receipts(study)) == 1 and "note" not in capsys.readouterr().out
    assert {said["group"] for said in jobs_told(study, "job_dropped")} == {path.stem for path in before}
    for path in (*stores(study), receipts(study)[0].parent):
        shutil.rmtree(path)
    assert verify(study.out) == ExitCode.DONE
    assert "missing, and so is all that it was about" in capsys.readouterr().out


@pytest.mark.long
def test_what_an_honest_command_has_made_again_is_a_note_and_hides_nothing_else(opened, table, capsys):
    study = opened()
    run_study(study, UNTIL)
    head, first, *others = table.read_text().splitlines()
    column = head.split(",").index("mpp") if "mpp" in head.split(",") else None
    cells = first.split(",")
    if column is None:
        lines = [f"{head},mpp", f"{first},0.49", *(f"{line}," for line in others)]
    else:
        cells[column] = "0.49"
        lines = [head, ",".join(cells), *others]
    table.write_text("\n".join(lines) + "\n")
    assert workflow.tile(opened()) == ExitCode.DONE
    store, other, _ = stores(study)
    capsys.readouterr()
    assert verify(study.out) == ExitCode.DONE
    assert f"note: tiles/{store.parent.name}/{store.name}: made again since by the stage tile" in capsys.readouterr().out
    alter(other)
    assert verify(study.out) == ExitCode.SOME_FAILED
    assert f"{other.name}: differs from what was made" in capsys.readouterr().out
    shutil.rmtree(other)
    assert run_study(opened(), UNTIL) == verify(study.out) == ExitCode.DONE
    assert "note" not in capsys.readouterr().out
    shutil.rmtree(store)
    assert workflow.tile(opened()) == verify(study.out) == ExitCode.DONE
    alter(store)  # work on the same gives the same
    assert verify(study.out) == ExitCode.SOME_FAILED


@pytest.mark.long
def test_a_job_that_the_plan_calls_current_has_a_new_receipt_once_its_stage_has_worked(opened):
    study = opened("compute.group_slides=1")
    run_study(study, UNTIL)
    before = len(jobs_told(study))
    run_study(study, UNTIL)
    assert len(jobs_told(study)) == before
    store = stores(study)[0]
    content = json.loads((store / "zarr.json").read_text())
    content["attributes"]["pathfm"]["fingerprint"] = "another"
    (store / "zarr.json").write_text(json.dumps(content))
    assert {job.state for job in make_plan(begin(study)).of("tile")} == {"current"}
    run_study(study, UNTIL)
    (again,) = jobs_told(study)[before:]
    assert list(again["slides"]) == [store.stem]


def test_jobs_of_an_engine_read_slides_through_the_cache_of_the_study(opened, tmp_path):
    (tmp_path / "file").write_text("")
    study = opened(f"compute.cache_dir={tmp_path}/file/cache")
    keep_settings(begin(study))
    write_plan(plan_file(study.out), make_plan(begin(study)))
    assert "cache_dir: null" in (study.out / "study.yaml").read_text()
    group = read_plan(study.out).of("tile")[0].group
    with pytest.raises(UsageError, match="cache folder cannot be written"):
        run_job(study.out, "tile", group)
    with pytest.raises(UsageError, match=f"{tmp_path}/file/other"):  # what a job is told itself counts
        run_job(study.out, "tile", group, [f"compute.cache_dir={tmp_path}/file/other"])


def why(study):
    return [line for line in explained(make_plan(begin(study))) if line.startswith("extract")]


@pytest.mark.long
def test_an_encoder_folder_that_says_something_else_is_another_encoder(opened, tmp_path, capsys):
    network = load_network("untrained:vit_tiny_patch16_224", 64)
    write_folder(network.model, network.card, tmp_path / "enc")
    study = opened("extract.encoder=local-dir:" + str(tmp_path / "enc"))
    until = RunOptions(until="extract")
    assert run_study(study, until) == verify(study.out) == ExitCode.DONE
    (before,) = study.out.glob("features/*/local-dir*")
    assert why(study) == ["extract 1-of-1: up to date"]
    card = json.loads((tmp_path / "enc" / "card.json").read_text())
    for changed, is_other in (({"note": "tried"}, False), ({"recipe": card["recipe"] | {"mean": [0.6, 0.5, 0.5]}}, True)):
        (tmp_path / "enc" / "card.json").write_text(json.dumps(card | changed))
        assert why(study) == [f"extract 1-of-1: {'stale - changed: encoder' if is_other else 'up to date'}"]
        assert run_study(study, until) == verify(study.out) == ExitCode.DONE
        assert len(list(study.out.glob("features/*/local-dir*"))) == 1 + is_other
    receipt = read_receipt(next(receipt_path(study.out, "extract", "all").parent.glob("*.json")))
    assert receipt.all_artifacts and not [name for name in receipt.all_artifacts if f"/{before.name}/" in name]
