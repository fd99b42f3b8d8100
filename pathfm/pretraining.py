"""The pretraining stage of a study: which tiles and facts it depends on, and where its encoder lies."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pathfm.encoder_pin import Stores, counted, encoder_fingerprint, trainable
from pathfm.errors import StoreError, UsageError
from pathfm.faults import crash_point
from pathfm.log import plural, say
from pathfm.store.commit import read_json, recover
from pathfm.store.manifest import CARD
from pathfm.store.pinned import Pinned, PinnedSlide, read_pinned, write_pinned
from pathfm.store.tile_store import TileStore, open_tiles
from pathfm.tile.check import keep_note
from pathfm.workflow import Run, alone_at, stores_of

PAGE = "training.html"
Facts = Mapping[str, Mapping[str, str]]


class PretrainInputs(NamedTuple):
    """What the study's own encoder is, or will be, pretrained on.

    Attributes:
        slides: by slide_id, in order.
        paths: tile stores of those that are there now.
        fingerprint: of the encoder.
        newcomers: slides with tiles that are not in the frozen list, sorted.
    """

    slides: Mapping[str, PinnedSlide]
    paths: Mapping[str, Path]
    fingerprint: str
    newcomers: tuple[str, ...]


def run_pretraining(run: Run) -> None:
    """The pretraining stage, noted; and the page of the run."""
    from pathfm.pretrain.launch import process_rank
    from pathfm.pretrain.stage import run_pretrain
    from pathfm.report.pretrain_page import write_pretrain_page

    _check_training(run)
    inputs = pretrain_inputs(run)
    folder, paths = _folder(run, inputs.fingerprint), list(inputs.paths.values())
    patient_of = {row.slide_id: row.patient_id for row in run.cohort.rows}
    with alone_at(folder, run.study.compute.lease_s) if process_rank() == 0 else nullcontext():
        if process_rank() == 0:
            if note := keep_note(run.study):
                say(f"note: {note}")
            _freeze(run, inputs)
        report = run_pretrain(run.study, paths, folder, inputs.fingerprint, sampling_facts(run), patient_of)
    run.encoder = folder
    if process_rank() == 0:
        run.note(report)
        if inputs.newcomers:
            new, them = plural(len(inputs.newcomers), "slide is", "slides are"), "it" if len(inputs.newcomers) == 1 else "them"
            say(f"{new} not in the list that the encoder was pretrained on; --retrain-encoder adds {them}")
        if not report.did_nothing or not (folder / PAGE).is_file():
            say(f"page: {write_pretrain_page(folder, folder / PAGE)}")


def pretraining_stores(run: Run) -> dict[str, Path]:
    """The tile stores that pretraining sees, by slide: those of the frozen list, without patients who are kept for judging.

    Raises:
        StoreError: there are none.
        UsageError: patients are kept for judging, and no classifier could be trained and judged.
    """
    _check_training(run)
    return dict(pretrain_inputs(run).paths)


def pretrain_inputs(run: Run) -> PretrainInputs:
    """The slides of the encoder as they are now; every process of a run comes to the same.

    Raises:
        StoreError: there are none.
    """
    pinned, out = read_pinned(run.layout.out), _held_out(run)
    paths = _present(run, pinned, out)
    present = {slide_id: open_tiles(path).fingerprint for slide_id, path in paths.items()}
    kept, facts, digest = _settled(run, pinned, present, out)
    if not kept:
        fix = "run `pathfm tile`, and see its record for the reasons"
        if present:
            fix = "all slides of the list that the encoder was pretrained on are gone: --retrain-encoder makes a new one"
        raise StoreError("no slide has tiles", where=str(run.layout.tiles), fix=fix)
    slides = {slide_id: PinnedSlide(store, facts.get(slide_id, {})) for slide_id, store in sorted(kept.items())}
    newcomers = tuple(sorted(present.keys() - kept.keys()))
    return PretrainInputs(slides, {slide_id: paths[slide_id] for slide_id in slides if slide_id in paths}, digest, newcomers)


def reopen_list(run: Run) -> None:
    """What ``--retrain-encoder`` does: the list is open, and the next pretraining makes it of the slides that there are.

    Whatever process comes next sees it so. Who was held out stays held out.
    """
    pinned = read_pinned(run.layout.out)
    if pinned and pinned.slides:
        write_pinned(run.layout.out, replace(pinned, slides={}))
    run.encoder = None


def sampling_facts(run: Run) -> dict[str, dict[str, str]]:
    """The columns of the cohort table that sampling weights name, by slide."""
    columns = sorted(set(run.study.pretrain.sampling.weights) - {"mpp"})
    known = {row.slide_id: {"site": row.site or "", **row.labels} for row in run.cohort.rows}
    missing = [column for column in columns if not all(column in row for row in known.values())]
    if missing:
        fix = f"columns: {', '.join(sorted(next(iter(known.values()), {})))}"
        raise UsageError(f"the cohort has no column {missing[0]!r}", where="pretrain.sampling.weights", fix=fix)
    return {slide_id: {column: row[column] for column in columns} for slide_id, row in known.items()} if columns else {}


def pretrain_fingerprint(run: Run) -> str:
    """Of everything that the encoder depends on."""
    return pretrain_inputs(run).fingerprint


def encoder_folder(run: Run) -> Path:
    """Folder of the encoder that the study pretrains."""
    return _folder(run, pretrain_fingerprint(run))


def _folder(run: Run, digest: str) -> Path:
    return run.layout.encoder(run.study.pretrain.backbone, digest)


def _held_out(run: Run) -> frozenset[str]:
    from pathfm.mil.held_out import held_out_slides

    return held_out_slides(run.study, run.cohort)


def _check_training(run: Run) -> None:
    """Where patients are held out, it is for a classifier: what cannot be trained is refused before days of pretraining."""
    from pathfm.mil.plan import check_plan

    if _held_out(run):
        check_plan(run.study, run.cohort, run.layout.mil)


def _settled(run: Run, pinned: Pinned | None, present: Stores, out: frozenset[str]) -> tuple[dict[str, str], Facts, str]:
    """The slides of the encoder in use or, where that is not finished, of the next one; facts of all; the fingerprint."""
    from pathfm.tile.stage import tile_settings_digest

    before = {slide_id: slide.facts for slide_id, slide in pinned.slides.items() if slide.facts} if pinned else {}
    facts: Facts = {**before, **sampling_facts(run)}
    kept = counted(pinned, present, tile_settings_digest(run.study.tile), out)
    digest = encoder_fingerprint(kept, facts, run.study.pretrain)
    if not _is_finished(_folder(run, digest), digest):
        kept = trainable(pinned, present)
        digest = encoder_fingerprint(kept, facts, run.study.pretrain)
    return kept, facts, digest


def _is_finished(folder: Path, digest: str) -> bool:
    teacher = folder / "teacher"
    recover(teacher)
    return (teacher / CARD).is_file() and read_json(teacher / CARD).get("fingerprint") == digest


def _present(run: Run, pinned: Pinned | None, out: frozenset[str]) -> dict[str, Path]:
    """Tile stores that may be learned from: those that are up to date, and those of the list whose slide cannot be read."""
    paths = {slide_id: path for slide_id, path in stores_of(run).items() if slide_id not in out}
    for row in run.cohort.rows if pinned else ():
        slide = pinned.slides.get(row.slide_id) if pinned else None
        if slide is None or row.slide_id in paths or row.slide_id in out:
            continue
        store = _store(run, row.slide_id)
        if store is not None and store.fingerprint == slide.store and len(store) and store.is_whole():
            paths[row.slide_id] = store.path
    return dict(sorted(paths.items()))


def _store(run: Run, slide_id: str) -> TileStore | None:
    try:
        return open_tiles(run.layout.store(slide_id))
    except StoreError:
        return None


def _freeze(run: Run, inputs: PretrainInputs) -> None:
    """Writes the list before anything is learned from it: a run that was killed goes on with the same slides."""
    from pathfm.mil.held_out import held_out_patients
    from pathfm.tile.stage import tile_settings_digest

    held_out = tuple(sorted(held_out_patients(run.study, run.cohort))) if _held_out(run) else ()
    before = read_pinned(run.layout.out)
    if before and before.slides:
        without, binding = before.without_tiles, before.binding
    else:
        known = {*inputs.slides, *_held_out(run)}
        without, binding = tuple(sorted({row.slide_id for row in run.cohort.rows} - known)), False
    pinned = Pinned(tile_settings_digest(run.study.tile), inputs.slides, held_out, without, binding)
    if before != pinned:
        write_pinned(run.layout.out, pinned)
    crash_point("pretraining.frozen")
