"""kill -9 in the middle of each stage, the same command again: what comes out is what an undisturbed run gives."""

from __future__ import annotations

import os
import shutil
import signal
import time

import pytest

from pathfm.store.commit import content_digest
from tests.flows.conftest import STUDY, pathfm, run

pytestmark = pytest.mark.long

COMPARED = ("tiles", "encoder", "features", "mil", "report")
POINTS = (
    "pretrain.step:4",
    "pretrain.checkpoint.before_rename:2",
    "extract.slide:5",
    "store.feature_file.between_datasets:7",
    "mil.member.before_commit:2",
    "mil.stage.before_metrics",
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cohort_table):
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "study.yaml").write_text(STUDY.format(out="out", table=cohort_table))
    code, _, err = run("run", folder / "study.yaml")
    assert code == 0, err
    return {name: content_digest(folder / "out" / name) for name in COMPARED}


def _finish_and_compare(study_file, undisturbed):
    code, _, err = run("run", study_file)
    assert code == 0, err
    assert {name: content_digest(study_file.parent / "out" / name) for name in COMPARED} == undisturbed
    code, out, _ = run("run", study_file)
    assert code == 0
    assert "everything is up to date" in out


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point(study_file, undisturbed, point):
    code, _, err = run("run", study_file, crash_at=point)
    assert code == -signal.SIGKILL, err
    assert not (study_file.parent / "out" / "report" / "index.html").exists()
    _finish_and_compare(study_file, undisturbed)


def test_killed_while_tiling(study_file, undisturbed):
    process = pathfm("run", study_file)
    folder = study_file.parent / "out" / "tiles"
    while len(list(folder.glob("*/*.zarr"))) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert 3 <= len(list(folder.glob("*/*.zarr"))) < 12
    _finish_and_compare(study_file, undisturbed)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8])
def test_killed_at_any_moment(study_file, undisturbed, share):
    started = time.monotonic()
    run("run", study_file)
    whole = time.monotonic() - started
    killed = False
    for attempt in range(3):  # a run that was faster than the first ends before its kill: try an earlier moment
        shutil.rmtree(study_file.parent / "out")
        process = pathfm("run", study_file)
        time.sleep(whole * share * 0.8**attempt)
        killed = process.poll() is None
        if killed:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if killed:
            break
    assert killed
    code, _, err = run("run", study_file)
    assert code == 0, err
    assert {name: content_digest(study_file.parent / "out" / name) for name in COMPARED} == undisturbed
