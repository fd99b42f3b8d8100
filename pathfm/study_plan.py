"""What a study's jobs are, what each depends on, and which of them have to run: known before any of them has run.

A job is a stage for a group of slides, or for all. Its fingerprint covers the stage's settings and version and what goes in:
slides by content, upstream fingerprints. It says what *would* be made, so it needs no upstream artifact: engines can be told
everything at once. Whether an artifact is up to date is decided by the stages themselves when they run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pathfm.config import fingerprint
from pathfm.encoder_pin import encoder_digest, origin_digests
from pathfm.errors import SlideError, StoreError, UsageError
from pathfm.log import track
from pathfm.pretrain_settings import PATH_SCHEMES
from pathfm.store.cohort import SlideRow
from pathfm.store.commit import content_digest, read_json, write_json
from pathfm.store.manifest import file_digest
from pathfm.store.pinned import read_pinned
from pathfm.store.receipts import ALL, FOLDER, NEEDS, STAGES, Receipt, groups_of, read_receipt, receipt_path
from pathfm.study import ComputeSettings, Study, TileSettings
from pathfm.workflow import Run

FORMAT = 2
FILE = "plan.json"
LOOKS = 8
"""Slides that are looked at side by side."""
SHOWN = 5
"""Slides, or settings, that an explanation names."""
PLACES_OF_STUDY = ("compute.", "out", "cohort.table", "cohort.slides", "cohort.clinical", "cohort.tile_labels")
"""Settings that say where things are, or how the work is done."""
TILE_SETTINGS = "tile settings"
NOT_SLIDES = frozenset({"sampling", "weights", TILE_SETTINGS})
"""Inputs of pretraining that are no slides."""


@dataclass(frozen=True)
class Planned:
    """One job.

    Attributes:
        stage: of ``pathfm.store.receipts.STAGES``.
        group: of slides, or ``all``.
        fingerprint: what it depends on.
        settings: dotted name -> value.
        inputs: what else it depends on, by name.
        slide_ids: of the group, sorted.
        state: current; new (never run); stale; failed (some of its slides failed: they are tried again); gone (something that
            it made is not there any more); forced (it is asked for).
        why: sentences that say what has changed.
    """

    stage: str
    group: str
    fingerprint: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    slide_ids: tuple[str, ...]
    state: str = "new"
    why: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For people: ``tile 3-of-8``."""
        return self.stage if self.group == ALL else f"{self.stage} {self.group}"


ByStage = dict[str, dict[str, Planned]]
"""Stage -> group -> job."""


@dataclass(frozen=True)
class StudyPlan:
    """All jobs of a study, in the order of the stages.

    Attributes:
        jobs: in that order.
        settings: digest of the settings that they were planned with.
        cache_dir: ``compute.cache_dir`` of the run, which the study's folder does not keep; empty: none.
    """

    jobs: tuple[Planned, ...]
    settings: str
    cache_dir: str = ""

    def job(self, stage: str, group: str = ALL) -> Planned:
        """One job.

        Raises:
            UsageError: there is no such job.
        """
        for job in self.jobs:
            if (job.stage, job.group) == (stage, group):
                return job
        known = ", ".join(job.group for job in self.jobs if job.stage == stage) or "none"
        raise UsageError(f"this study has no job {stage} {group}", fix=f"groups of this stage: {known}")

    def of(self, stage: str) -> tuple[Planned, ...]:
        """The jobs of a stage."""
        return tuple(job for job in self.jobs if job.stage == stage)

    def up_to(self, stage: str) -> StudyPlan:
        """The plan without what comes after a stage; empty: all of it."""
        stages = STAGES[: STAGES.index(stage) + 1] if stage else STAGES
        return replace(self, jobs=tuple(job for job in self.jobs if job.stage in stages))

    @property
    def stale(self) -> tuple[Planned, ...]:
        """The jobs that have to run."""
        return tuple(job for job in self.jobs if job.state != "current")


def make_plan(run: Run, forced: Sequence[str] = (), retrain: bool = False) -> StudyPlan:
    """The jobs of a study. Looks at every slide (some dozens of small reads) and at the receipts, at nothing else.

    Args:
        run: the study.
        forced: stages that are to run again, and with them what comes after.
        retrain: the encoder is to be pretrained on all slides of the cohort again.
    """
    stages: ByStage = {}
    for job in _jobs(run, retrain):
        judged = _judged(run.layout.out, job)
        upstream = [other for other in _before(job, stages) if other.state != "current" and _feeds(other, job)]
        if judged.stage in forced:
            judged = replace(judged, state="forced", why=(*judged.why, "it is to run again (--forcerun)"))
        elif judged.state == "current" and upstream:
            more = f" and {len(upstream) - 1} more" if len(upstream) > 1 else ""
            judged = replace(judged, state="stale", why=(f"it follows on {upstream[0].name}{more}",))
        stages.setdefault(job.stage, {})[job.group] = judged
    jobs = tuple(job for groups in stages.values() for job in groups.values())
    return StudyPlan(jobs, settings_digest(run.study), str(run.study.compute.cache_dir or ""))


def _before(job: Planned, stages: ByStage) -> list[Planned]:
    """The jobs that must be done before a job; of tiles, extraction needs those of its own group only."""
    needed = [(stage, stages.get(stage, {})) for stage in NEEDS[job.stage]]
    of_group = ("tile",) if job.stage == "extract" else ()
    return [other for stage, jobs in needed for other in ([jobs[job.group]] if stage in of_group else jobs.values())]


def _feeds(upstream: Planned, job: Planned) -> bool:
    """Whether a job that runs makes the next one run. New slides do not touch the encoder, whose list of slides is frozen."""
    return upstream.stage != "check" and job.stage != "pretrain"


def settings_digest(study: Study) -> str:
    """Of everything that decides what the jobs of a study are."""
    compute = ComputeSettings(group_slides=study.compute.group_slides)
    return fingerprint(flat(study.model_copy(update={"out": Path(), "compute": compute})))


def flat(settings: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    """Settings, or a table of them, as a flat table: dotted name -> plain value."""
    return dict(_flat(settings.model_dump(mode="json") if isinstance(settings, BaseModel) else settings, ""))


def _flat(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _jobs(run: Run, retrain: bool) -> Iterator[Planned]:
    """Every job, not yet judged."""
    slides = _planned_slides(run)
    groups = groups_of(run.cohort.rows, run.study.compute.group_slides)
    cohort = {row.slide_id: _row_digest(row) for row in run.cohort.rows}
    tiles = {group: {row.slide_id: slides[row.slide_id] for row in rows} for group, rows in groups.items()}
    yield _job("check", ALL, run.study, {"cohort": fingerprint(cohort)}, cohort)
    for group, inputs in tiles.items():
        yield _job("tile", group, run.study, inputs, inputs)
    encoder = _other_encoder(run.study)
    if run.study.has_own_encoder:
        pretrain = _pretrain_job(run, slides, retrain)
        yield pretrain
        encoder = fingerprint([pretrain.fingerprint, encoder])
    made, more = {}, {"encoder": encoder, TILE_SETTINGS: _tile_settings(run.study)}
    for group, inputs in tiles.items():
        job = _job("extract", group, run.study, {**inputs, **more}, inputs)
        made[group] = job.fingerprint
        yield job
    truth, split = run.study.cohort.tile_labels, run.study.mil.split.file
    facts = {"tile labels": file_digest(truth) if truth else "", "split file": content_digest(split) if split else ""}
    facts |= {"features": fingerprint(sorted(made.items()))}
    classifier = _job("mil", ALL, run.study, {**cohort, **facts}, cohort)
    yield classifier
    yield _job("report", ALL, run.study, {"mil": classifier.fingerprint}, cohort)


def _job(stage: str, group: str, study: Study, inputs: Mapping[str, str], slide_ids: Iterable[str]) -> Planned:
    settings = _settings_of(stage, study)
    whole = fingerprint({"stage": stage, "version": _version(stage), "inputs": dict(inputs)}, settings)
    return Planned(stage, group, whole, settings, dict(inputs), tuple(sorted(slide_ids)))


def _settings_of(stage: str, study: Study) -> dict[str, Any]:
    """The settings that a stage depends on. Folders and files count by their content, which is among the inputs."""
    if stage == "check":
        return {name: _placeless(value) for name, value in flat(study).items() if not name.startswith(PLACES_OF_STUDY)}
    table = study.pretrain.decisive() if stage == "pretrain" else getattr(study, stage)
    return {name: _placeless(value) for name, value in flat(table).items()}


def _placeless(value: object) -> object:
    """A setting without the machine's folders: what lies there is among the inputs."""
    if isinstance(value, list):
        return [_placeless(each) for each in value]
    scheme, _, place = value.partition(":") if isinstance(value, str) else ("", "", "")
    if scheme in PATH_SCHEMES:
        return f"{scheme}:{Path(place).name}"
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _version(stage: str) -> int:
    """What goes up when a stage makes something else of the same."""
    if stage == "tile":
        from pathfm.tile.stage import VERSION
    elif stage == "pretrain":
        from pathfm.pretrain import VERSION
    elif stage == "extract":
        from pathfm.extract.sets import VERSION
    elif stage == "mil":
        from pathfm.mil.ensemble import VERSION
    elif stage == "report":
        from pathfm.report.stage import VERSION
    else:
        return 1
    return VERSION


def _row_digest(row: SlideRow) -> str:
    """What a row of the cohort table says besides where the slide is."""
    return fingerprint({
        "patient": row.patient_id, "specimen": row.specimen_id, "mpp": row.mpp, "site": row.site, "split": row.split,
        "labels": dict(row.labels), "lesion_mask": file_digest(row.lesion_mask) if row.lesion_mask else "",
    })  # fmt: skip


def _planned_slides(run: Run) -> dict[str, str]:
    """Slide -> what its tiles depend on besides the settings."""
    rows = run.cohort.rows
    with ThreadPoolExecutor(LOOKS) as pool:
        found = list(track(pool.map(lambda row: _look(row, run.study.tile), rows), "look at slides", len(rows)))
    return dict(zip((row.slide_id for row in rows), found, strict=True))


def _look(row: SlideRow, settings: TileSettings) -> str:
    from pathfm.tile.stage import slide_inputs

    try:
        return fingerprint(slide_inputs(row, settings))
    except (SlideError, StoreError):  # tiling tells why
        return "unreadable"


def _pretrain_job(run: Run, slides: Mapping[str, str], retrain: bool) -> Planned:
    """Pretraining depends on the slides that there were when it first ran: they are frozen then."""
    from pathfm.mil.held_out import held_out_slides
    from pathfm.pretraining import sampling_facts

    out, pinned = held_out_slides(run.study, run.cohort), read_pinned(run.layout.out)
    is_open = retrain or (pinned is not None and not pinned.slides)
    receipt = None if is_open else read_receipt(receipt_path(run.layout.out, "pretrain", ALL))
    listed = {name: slide.store for name, slide in pinned.slides.items()} if pinned and not is_open else {}
    was = {name: value for name, value in receipt.inputs.items() if name not in NOT_SLIDES} if receipt else {}
    without = dict.fromkeys(pinned.without_tiles, "") if pinned and listed else {}
    frozen = {**listed, **was} if receipt else {**listed, **without} or slides
    # Once the list is frozen, a slide that had no tiles then changes nothing by being readable.
    current = {name: slides[name] for name in frozen if name in slides and (not receipt or not listed or name in listed)}
    inputs = {name: value for name, value in sorted({**frozen, **current}.items()) if name not in out}
    before = {name: slide.facts for name, slide in pinned.slides.items() if slide.facts} if pinned else {}
    facts = {name: row for name, row in {**before, **sampling_facts(run)}.items() if name in inputs}
    weights = fingerprint(origin_digests(run.study.pretrain))
    more = {"sampling": fingerprint(facts) if facts else "", "weights": weights}
    return _job("pretrain", ALL, run.study, {**inputs, **more, TILE_SETTINGS: _tile_settings(run.study)}, inputs)


def _tile_settings(study: Study) -> str:
    from pathfm.tile.stage import tile_settings_digest

    return tile_settings_digest(study.tile)


def _other_encoder(study: Study) -> str:
    """What decides the features of an encoder that was not pretrained here: folders and files by content, others by name."""
    names = (study.extract.encoder, *study.extract.also)
    given = study.extract.weights
    return fingerprint(
        [[_placeless(name), encoder_digest(name)] for name in names], file_digest(given) if given and given.is_file() else ""
    )


def _judged(out: Path, job: Planned) -> Planned:
    """The job with its state, by its receipt."""
    try:
        receipt = read_receipt(receipt_path(out, job.stage, job.group))
    except StoreError as error:
        return replace(job, state="stale", why=(error.what,))
    if receipt is None:
        has_others = job.group != ALL and any(receipt_path(out, job.stage, ALL).parent.glob("*.json"))
        return replace(
            job, why=("the groups are others now: what its slides have is kept" if has_others else "it has never run",)
        )
    if receipt.fingerprint != job.fingerprint:
        return replace(
            job, state="stale", why=tuple(_changes(receipt, job)) or ("a newer version of pathfm makes something else",)
        )
    gone = [path for path in receipt.all_artifacts if not (out / path).exists()]
    if gone:
        return replace(job, state="gone", why=(f"{_some(gone)} not there any more",))
    if receipt.failed:
        return replace(job, state="failed", why=(f"{_some([slide.slide_id for slide in receipt.failed])} failed: tried again",))
    return replace(job, state="current")


def _changes(receipt: Receipt, job: Planned) -> Iterator[str]:
    """What differs between a receipt and what is wanted now."""
    for name in sorted({*receipt.settings, *job.settings}):
        was, now = receipt.settings.get(name), job.settings.get(name)
        if _plain(was) != _plain(now):
            yield f"{job.stage}.{name}: {_plain(was)} -> {_plain(now)}"
    named = {
        "new": sorted(job.inputs.keys() - receipt.inputs.keys()),
        "changed": sorted(
            name for name in job.inputs.keys() & receipt.inputs.keys() if job.inputs[name] != receipt.inputs[name]
        ),
        "no longer there": sorted(receipt.inputs.keys() - job.inputs.keys()),
    }
    for what, names in named.items():
        if names:
            yield f"{what}: {_some(names)}"


def _plain(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def plan_file(out: Path) -> Path:
    """Where the plan of a study lies that an engine's jobs read."""
    return out / FOLDER / FILE


def write_plan(path: Path, plan: StudyPlan) -> None:
    """Writes a plan: the order of the stages; by stage and group all of a job, and the names of those that come before it."""
    stages: ByStage = {}
    for job in plan.jobs:
        stages.setdefault(job.stage, {})[job.group] = job
    written = {
        stage: {
            group: {**asdict(job), "after": [f"{other.stage}/{other.group}" for other in _before(job, stages)]}
            for group, job in jobs.items()
        }
        for stage, jobs in stages.items()
    }
    about = {"format": FORMAT, "settings": plan.settings, "cache_dir": plan.cache_dir}
    write_json(path, {**about, "order": STAGES, "stages": written})


def read_plan(out: Path) -> StudyPlan:
    """The plan that was written last.

    Raises:
        UsageError: there is none, or another version of pathfm has written it.
    """
    path, fix = plan_file(out), "run `pathfm plan STUDY` first"
    if not path.is_file():
        raise UsageError("nothing is planned here", where=str(out), fix=fix)
    found = read_json(path)
    if found.get("format") != FORMAT:
        raise UsageError("a plan of another version of pathfm", where=str(path), fix=fix)
    jobs = []
    for job in (job for groups in found["stages"].values() for job in groups.values()):
        job.pop("after")
        jobs.append(Planned(**{**job, "slide_ids": tuple(job["slide_ids"]), "why": tuple(job["why"])}))
    jobs.sort(key=lambda job: (STAGES.index(job.stage), int(job.group.partition("-of-")[0]) if job.group != ALL else 0))
    return StudyPlan(tuple(jobs), found["settings"], found.get("cache_dir", ""))
