"""``pathfm run STUDY --replay RECORD``: the study of a record once more, in a folder of its own, and whether all is the same.

A record is a run manifest (``runs/<time>-<run>.json``). It has the settings, and the fingerprint and the content digest of
every job. What was decided once is taken over from the folder of the record: the frozen list of pretraining slides, and the
folds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pathfm.config import ENCODER_NAMES, PATHS, bullet_list, load_study
from pathfm.errors import ExitCode, PathfmError, StoreError, UsageError
from pathfm.log import say
from pathfm.running import run_study
from pathfm.settings import Settings
from pathfm.store.commit import read_json, write_json
from pathfm.store.pinned import pinned_file
from pathfm.store.receipts import read_receipt, receipt_path
from pathfm.study import Study
from pathfm.study_plan import StudyPlan, make_plan
from pathfm.workflow import begin

PLACES = PATHS | ENCODER_NAMES | {"name", "cohort.slides", "extract.also", "extract.weights", "tile.tissue.plugin"}
"""Settings that a record only has without their folders: they are the given study's."""
TAKEN_OVER = ("encoder/pinned.json", "mil/splits.json", "receipts/pretrain/all.json")
"""What was decided once, below an output folder."""


def replay(study: Study, record: Path) -> ExitCode:
    """Runs the study of a record anew and compares.

    Args:
        study: of the record, with the places of its slides here; it goes into ``study.out``, or beside it where that is taken.
        record: a run manifest.

    Returns:
        3 when something came out differently.

    Raises:
        UsageError: not a record of a study, or the study's slides, tables or settings are not those of the record.
    """
    recorded = _jobs_of(record)
    home = record.absolute().parent.parent
    out = study.out if not study.out.exists() else study.out.with_name(f"{study.out.name}-replay")
    if out.exists():
        fix = "remove it, or add --set out=FOLDER, one that is not there"
        raise UsageError("a replay needs a folder of its own", where=str(out), fix=fix)
    again = _as_recorded(study, read_json(record)["settings"]).model_copy(update={"out": out})
    try:
        _take_over(home, out)
        plan = make_plan(begin(again))
        _check_same(plan, recorded, record)
    except PathfmError:
        shutil.rmtree(out, ignore_errors=True)
        raise
    code = run_study(again)
    different = list(_differences(out, plan, recorded))
    for line in different:
        say(line)
    if different:
        return ExitCode.SOME_FAILED
    say(f"replayed: {len(recorded)} jobs, all with the same content as in {record.name}")
    return code


def _take_over(home: Path, out: Path) -> None:
    """Copies what was decided once."""
    for name in TAKEN_OVER:
        if (home / name).is_file():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(home / name, out / name)
    if pinned_file(out).is_file():
        write_json(pinned_file(out), {**read_json(pinned_file(out)), "binding": True})


def _jobs_of(record: Path) -> Mapping[str, Mapping[str, Any]]:
    if not record.is_file():
        raise UsageError("there is no such record", where=str(record), fix="records are in the folder runs of an output folder")
    try:
        jobs: dict[str, dict[str, Any]] = read_json(record)["jobs"]
    except (KeyError, StoreError):
        jobs = {}
    if not jobs:
        raise UsageError("this is not the record of a study that was run", where=str(record), fix="name a file of OUT/runs")
    return jobs


def _as_recorded(study: Study, settings: Mapping[str, Any]) -> Study:
    """The study with the recorded settings; where things are is the given study's."""
    given, recorded = _by_name(study, study.model_dump(mode="json")), _by_name(study, settings)
    decided = {name: value for name, value in recorded.items() if name not in PLACES}
    for name, value in decided.items():
        if value != given[name] and not name.startswith("compute."):
            say(f"as recorded: {name}={json.dumps(value, ensure_ascii=False)}")
    return load_study(None, [f"{name}={json.dumps(value)}" for name, value in {**given, **decided}.items()])


def _by_name(model: Settings, table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What a table says of the settings that there are: dotted name -> value, which may be a table itself."""
    found: dict[str, Any] = {}
    for name in (name for name in type(model).model_fields if name in table):
        inner, path = getattr(model, name), prefix + name
        found |= _by_name(inner, table[name], f"{path}.") if isinstance(inner, Settings) else {path: table[name]}
    return found


def _check_same(plan: StudyPlan, recorded: Mapping[str, Mapping[str, Any]], record: Path) -> None:
    """Whether the same would be made of the same."""
    planned = {f"{job.stage}/{job.group}": job for job in plan.jobs}
    problems = [f"{name}: not recorded" for name in planned if name not in recorded]
    problems += [f"{name}: not part of this study" for name in recorded if name not in planned]
    for name, job in planned.items():
        was = recorded.get(name, {})
        if was and was.get("fingerprint") != job.fingerprint:
            before = was.get("inputs", {})
            changed = sorted(key for key in {*before, *job.inputs} if before.get(key) != job.inputs.get(key))
            problems.append(f"{name}: differs in {', '.join(changed[:5]) or 'its settings or the version of pathfm'}")
    if problems:
        raise UsageError(
            f"this would not be what was recorded: {bullet_list(problems, 20)}",
            where=str(record),
            fix="give the slides and tables of then, and the pathfm of then",
        )


def _differences(out: Path, plan: StudyPlan, recorded: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for job in plan.jobs:
        receipt = read_receipt(receipt_path(out, job.stage, job.group))
        was = recorded[f"{job.stage}/{job.group}"]
        if receipt is None:
            yield f"{job.name}: not made"
        elif receipt.content != was.get("content"):
            yield f"{job.name}: other content, {receipt.content[:12]} instead of {str(was.get('content'))[:12]}"
