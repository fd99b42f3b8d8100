"""The plan of a study, its jobs one by one, and all of them in one process: the same receipts and the same artifacts."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pathfm import workers
from pathfm.config import load_study
from pathfm.errors import ExitCode, UsageError
from pathfm.jobs import Jobs, Made, drop_old_receipts, run_job, write_receipts
from pathfm.mil.plan import check_plan
from pathfm.running import RunOptions, explained, plan_study, run_study, summary
from pathfm.store.commit import content_digest, read_json, write_json
from pathfm.store.receipts import read_receipt, receipt_path, write_receipt
from pathfm.study_plan import make_plan, plan_file, read_plan, write_plan
from pathfm.workflow import begin, study_to_oneself
from tests.flows.conftest import STUDY, read_receipts

GROUPS = "compute.group_slides=4"
COMPARED = ("tiles", "encoder", "features", "mil", "report", "receipts")


@pytest.fixture
def study(study_file):
    return load_study(study_file, [GROUPS, "compute.workers=1", "compute.threads=1"])


def _state(plan):
    return {job.name: job.state for job in plan.jobs}


def _tiled(study, tmp_path):
    """The study with check and tile done in this process, and its run."""
    run = begin(study)
    plan = make_plan(run)
    for stage in ("check", "tile"):
        write_receipts(run, plan.of(stage), Jobs(run).work(stage))
    return run


def _other_table(study, change):
    """The study with another cohort table; paths in it are absolute."""
    lines = study.cohort.table.read_text().splitlines()
    table = study.out.parent / "other.csv"
    folder = study.cohort.table.parent
    absolute = [
        lines[0],
        *(line.replace("slides/", f"{folder}/slides/").replace("masks/", f"{folder}/masks/") for line in lines[1:]),
    ]
    table.write_text("\n".join(change(absolute)) + "\n")
    return study.model_copy(update={"cohort": study.cohort.model_copy(update={"table": table})})


def test_a_plan_says_what_is_stale_and_why(study, tmp_path):
    plan = make_plan(begin(study))
    assert {job.stage: job.state for job in plan.jobs} == dict.fromkeys(
        ("check", "tile", "pretrain", "extract", "mil", "report"), "new"
    )
    assert len(plan.of("tile")) == len(plan.of("extract")) == 3
    assert next(summary(plan)) == "check     1 job, 12 slides: 1 new"
    run = _tiled(study, tmp_path)
    plan = make_plan(run)
    assert {state for name, state in _state(plan).items() if name.startswith(("check", "tile"))} == {"current"}
    assert "tile (3 of 3 jobs): up to date" in list(explained(plan))

    changed = study.model_copy(update={"tile": study.tile.model_copy(update={"jpeg_quality": 80})})
    told = list(explained(make_plan(begin(changed))))
    assert "tile 1-of-4: stale - tile.jpeg_quality: 90 -> 80" in told

    group = plan.of("tile")[0]
    shutil.rmtree(run.layout.store(group.slide_ids[0]))
    job = make_plan(run).job("tile", group.group)
    assert job.state == "gone"
    assert group.slide_ids[0] in job.why[0]


def test_a_row_more_or_less_touches_one_group(study, tmp_path):
    run = _tiled(study, tmp_path)
    fewer = _other_table(study, lambda lines: lines[:-1])
    again = make_plan(begin(fewer))
    stale = [job for job in again.of("tile") if job.state != "current"]
    assert len(stale) == 1
    gone = run.cohort.rows[-1].slide_id
    assert stale[0].why == (f"no longer there: {gone}",)
    assert again.job("check").state == "stale"


def test_a_label_only_touches_what_learns_from_it(study, tmp_path):
    _tiled(study, tmp_path)
    other = _other_table(study, lambda lines: [lines[0], *(line.replace("normal", "healthy") for line in lines[1:])])
    plan = make_plan(begin(other))
    assert {job.state for job in plan.of("tile")} == {"current"}
    assert plan.job("check").state == "stale"


def test_the_order_of_the_table_changes_nothing(study, tmp_path):
    _tiled(study, tmp_path)
    plan = make_plan(begin(_other_table(study, lambda lines: [lines[0], *reversed(lines[1:])])))
    assert {job.state for job in (plan.job("check"), *plan.of("tile"))} == {"current"}


def test_a_failed_slide_is_a_row_and_is_tried_again(study, tmp_path):
    table = study.cohort.table
    slides = tmp_path / "slides"
    shutil.copytree(table.parent, slides)
    broken = slides / "slides" / sorted(path.name for path in (slides / "slides").iterdir())[0]
    whole = broken.read_bytes()
    broken.write_bytes(b"no slide")
    study = study.model_copy(update={"cohort": study.cohort.model_copy(update={"table": slides / table.name})})
    run = _tiled(study, tmp_path)
    plan = make_plan(run)
    (job,) = [job for job in plan.of("tile") if job.state != "current"]
    assert job.state == "failed"
    receipt = read_receipt(receipt_path(study.out, "tile", job.group))
    (failed,) = receipt.failed
    assert broken.stem.startswith(failed.slide_id)
    assert str(tmp_path) not in failed.reason
    broken.write_bytes(whole)
    write_plan(plan_file(study.out), make_plan(run))
    plan_study(study)
    assert run_job(study.out, "tile", job.group) == ExitCode.DONE
    assert not read_receipt(receipt_path(study.out, "tile", job.group)).failed


def test_receipts_of_a_former_grouping_do_not_stay(study, tmp_path):
    _tiled(study, tmp_path)
    finer = study.model_copy(update={"compute": study.compute.model_copy(update={"group_slides": 2})})
    run = begin(finer)
    plan = make_plan(run)
    assert {job.state for job in plan.of("tile")} == {"new"}
    write_receipts(run, plan.of("tile"), Jobs(run).work("tile"))
    drop_old_receipts(study.out, plan)
    assert {receipt.group for receipt in read_receipts(study.out, ("tile",))} == {job.group for job in plan.of("tile")}


def test_a_digest_is_only_believed_of_what_is_older_than_its_receipt(study, tmp_path):
    run = _tiled(study, tmp_path)
    job = make_plan(run).of("tile")[0]
    path = receipt_path(study.out, "tile", job.group)
    right, store = read_receipt(path), run.layout.store(job.slide_ids[0])
    wrong = replace(right.slides[0], artifacts=dict.fromkeys(right.slides[0].artifacts, "0" * 64))
    write_receipt(study.out, replace(right, slides=(wrong, *right.slides[1:])))
    write_receipts(run, [job], Jobs(run).work("tile"))
    assert read_receipt(path) != right, "nothing has changed since it was written"
    os.utime(store)
    write_receipts(run, [job], Jobs(run).work("tile"))
    assert read_receipt(path) == right
    write_receipt(study.out, replace(right, slides=(wrong, *right.slides[1:])))
    write_receipts(run, [replace(job, state="forced")], Jobs(run).work("tile"))
    assert read_receipt(path) == right


def test_another_split_file_of_the_same_name_is_another_one(study, tmp_path):
    found = []
    for folder, text in (("a", "{}"), ("b", "{ }")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "splits.json").write_text(text)
        split = study.mil.split.model_copy(update={"scheme": "file", "file": tmp_path / folder / "splits.json"})
        changed = study.model_copy(update={"mil": study.mil.model_copy(update={"split": split})})
        found.append(make_plan(begin(changed)).job("mil").fingerprint)
    assert found[0] != found[1]


def test_what_is_only_asked_for_writes_nothing(study, capsys):
    assert run_study(study, RunOptions(why=True)) == run_study(study, RunOptions(dry_run=True)) == ExitCode.DONE
    assert "mil: new - it has never run" in capsys.readouterr().out
    assert not study.out.exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("mil.aggregator=clammb", "no aggregator is named 'clammb', did you mean 'clam-mb'"),
        ("mil.options={gates: 2}", "abmil has no option 'gates'"),
        ("mil.search={aggregator: [mean, maxx]}", "no aggregator is named 'maxx'"),
        ("mil.search={lr: [0.1, fast]}", "mil.search.lr"),
        ("mil.search_folds=5", "too few patients per class for 5 folds"),
        ("mil.folds=50", "too few patients per class for 50 folds"),
        ("mil.split={scheme: site}", "mil.split|site"),
        ("mil.split={scheme: file, file: none.json}", "none.json"),
        ("mil.label=labl", "did you mean 'label'"),
        ("mil.numbers.subgroups=[sitee]", "no column 'sitee'"),
    ],
)
def test_what_mil_could_not_do_is_refused_before_anything_is_made(study, study_file, setting, said):
    search = ["mil.search={lr: [0.1, 0.01]}"] if "search_folds" in setting else []
    wrong = load_study(study_file, [GROUPS, *search, setting])
    for command in (run_study, plan_study, lambda study: run_study(study, RunOptions(dry_run=True))):
        with pytest.raises(UsageError, match=said):
            command(wrong)
    assert not [path.name for path in study.out.glob("*") if path.name in {"study.yaml", "tiles", "receipts"}]
    assert run_study(wrong, RunOptions(dry_run=True, until="extract")) == ExitCode.DONE, "mil is not asked for"


def test_the_split_before_pretraining_is_tried_too(study_file):
    study = load_study(study_file, ["mil.seen_in_pretraining=exclude"])
    check_plan(study, begin(study).cohort, study.out / "mil")
    assert not (study.out / "mil").exists()


def test_features_from_elsewhere_are_refused_with_the_command_that_takes_them(study, tmp_path):
    given = study.model_copy(update={"mil": study.mil.model_copy(update={"features": tmp_path})})
    with pytest.raises(UsageError, match="pathfm mil train"):
        run_study(given)


def test_jobs_want_the_settings_that_were_planned(study, tmp_path):
    with pytest.raises(UsageError, match=r"nothing is planned|no study.yaml"):
        run_job(study.out, "tile", "1-of-4")
    plan_study(study)
    assert read_plan(study.out) == make_plan(begin(study))
    with pytest.raises(UsageError, match="not those that were planned"):
        run_job(study.out, "tile", "1-of-4", ["tile.jpeg_quality=80"])
    with pytest.raises(UsageError, match="no job tile 9-of-9"):
        run_job(study.out, "tile", "9-of-9")
    with pytest.raises(UsageError, match="has not run"):
        run_job(study.out, "report")
    write_json(plan_file(study.out), read_json(plan_file(study.out)) | {"format": 1})
    with pytest.raises(UsageError, match="another version"):
        read_plan(study.out)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"until": "train"}, "there is no stage 'train'"),
        ({"forcerun": ("tile", "mil"), "until": "extract"}, "--forcerun mil is about a stage after --until extract"),
        ({"retrain_encoder": True, "until": "tile"}, "--retrain-encoder is about a stage after --until tile"),
        ({"engine": "snakemake", "why": True, "unlock": True}, "--why and --unlock are two things"),
        ({"engine": "snakemake", "dry_run": True, "snakemake_report": True}, "--dry-run and --snakemake-report"),
        ({"why": True, "profile": "slurm"}, "--profile is for Snakemake"),
        ({"engine": "snakemake", "profile": "nosuch"}, "there is no such profile|needs Snakemake"),
        ({"replay": Path("record.json"), "yes": True}, "a replay does the whole"),
    ],
)
def test_options_that_would_be_passed_over_without_a_word_are_refused(study, options, said):
    with pytest.raises(UsageError, match=said):
        run_study(study, RunOptions(**options))
    assert not study.out.exists()


def test_nothing_is_planned_while_an_engine_works_on_the_study(study, monkeypatch):
    monkeypatch.setattr("pathfm.running.make_plan", lambda *arguments: pytest.fail("it was planned"))
    with study_to_oneself(study.out):
        for command in (run_study, plan_study):
            with pytest.raises(UsageError, match="another engine works on this study"):
                command(study)


def test_an_engine_of_this_machine_is_known_at_once_and_those_of_others_are_watched(study, monkeypatch):
    class Waits(Exception):
        pass

    def wait(seconds):
        raise Waits

    monkeypatch.setattr("time.sleep", wait)
    workers._host.cache_clear()
    monkeypatch.setattr("platform.node", lambda: "login-1.cluster")
    with study_to_oneself(study.out):
        with pytest.raises(UsageError, match="host login_1, pid"), study_to_oneself(study.out):
            pass
        workers._host.cache_clear()
        monkeypatch.setattr("platform.node", lambda: "login")
        with pytest.raises(Waits), study_to_oneself(study.out):
            pass
    workers._host.cache_clear()


def test_an_encoder_that_has_learned_from_all_slides_is_not_retrained(study, monkeypatch, capsys):
    monkeypatch.setattr("pathfm.running._in_this_process", lambda run, plan: None)
    run = begin(study)
    write_receipts(run, make_plan(run).of("pretrain"), Made())
    assert run_study(study, RunOptions(retrain_encoder=True)) == ExitCode.DONE, "there is no price to accept"
    assert "the encoder was pretrained on just these slides: it stays as it is" in capsys.readouterr().out
    with pytest.raises(UsageError, match="add --yes"):
        run_study(_other_table(study, lambda lines: lines[:-1]), RunOptions(retrain_encoder=True))
    assert "the encoder is pretrained anew" in capsys.readouterr().out


@pytest.mark.long
def test_jobs_one_by_one_make_what_one_process_makes(tmp_path, cohort_table):
    made = {}
    for name in ("whole", "jobs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "study.yaml").write_text(STUDY.format(out="out", table=cohort_table))
        study = load_study(tmp_path / name / "study.yaml", [GROUPS])
        if name == "whole":
            assert run_study(study) == ExitCode.DONE
        else:
            plan_study(study)
            for job in reversed(read_plan(study.out).of("tile")):
                run_job(study.out, "tile", job.group)
            for job in read_plan(study.out).jobs:
                run_job(study.out, job.stage, job.group)
        (study.out / "receipts" / "plan.json").unlink()
        made[name] = {part: content_digest(study.out / part) for part in COMPARED}
        assert {job.state for job in make_plan(begin(study)).jobs} == {"current"}
    assert made["whole"] == made["jobs"]
    assert all(receipt.all_artifacts for receipt in read_receipts(tmp_path / "jobs" / "out") if receipt.stage != "check")
