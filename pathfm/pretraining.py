"""The pretraining stage of a study: which tiles and facts it depends on, and where its encoder lies."""

from __future__ import annotations

from pathlib import Path

from pathfm.config import fingerprint
from pathfm.errors import StoreError, UsageError
from pathfm.log import say
from pathfm.pretrain_settings import PATH_SCHEMES
from pathfm.store.manifest import file_digest
from pathfm.store.tile_store import open_tiles
from pathfm.workflow import Run, stores_of

PAGE = "training.html"


def run_pretraining(run: Run) -> None:
    """The pretraining stage, noted; and the page of the run."""
    from pathfm.pretrain.launch import process_rank
    from pathfm.pretrain.stage import run_pretrain
    from pathfm.report.pretrain_page import write_pretrain_page

    folder, paths = encoder_folder(run), list(pretraining_stores(run).values())
    patient_of = {row.slide_id: row.patient_id for row in run.cohort.rows}
    report = run_pretrain(run.study, paths, folder, pretrain_fingerprint(run), sampling_facts(run), patient_of)
    if process_rank() == 0:
        run.note(report)
        if not report.did_nothing or not (folder / PAGE).is_file():
            say(f"page: {write_pretrain_page(folder, folder / PAGE)}")


def pretraining_stores(run: Run) -> dict[str, Path]:
    """The tile stores that pretraining sees, by slide: all, or without those of patients that are kept for judging.

    Raises:
        StoreError: there are none.
    """
    from pathfm.mil.held_out import held_out_slides

    out = held_out_slides(run.study, run.cohort)
    stores = {slide_id: path for slide_id, path in sorted(stores_of(run).items()) if slide_id not in out}
    if not stores:
        fix = "run `pathfm tile`, and see its record for the reasons"
        raise StoreError("no slide has tiles", where=str(run.layout.tiles), fix=fix)
    return stores


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
    from pathfm.pretrain import VERSION

    stores = pretraining_stores(run)
    inputs = {slide_id: open_tiles(path).fingerprint for slide_id, path in stores.items()}
    facts = {slide_id: row for slide_id, row in sampling_facts(run).items() if slide_id in stores}
    settings = run.study.pretrain
    weights = [_weights_digest(name) for name in (settings.init, settings.teacher)]
    return fingerprint({"version": VERSION, "stores": inputs, "facts": facts, "weights": weights}, settings.decisive())


def _weights_digest(name: str | None) -> str:
    """Of the file behind a name that is a path: other weights under the same name make another encoder."""
    scheme, _, rest = (name or "").partition(":")
    file = Path(rest, "model.safetensors") if scheme == "local-dir" else Path(rest)
    return file_digest(file) if scheme in PATH_SCHEMES and file.is_file() else ""


def encoder_folder(run: Run) -> Path:
    """Folder of the encoder that the study pretrains."""
    return run.layout.encoder(run.study.pretrain.backbone, pretrain_fingerprint(run))
