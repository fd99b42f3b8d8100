"""Stage 2: tile stores -> encoder.

``teacher/`` (the result), ``student/`` and ``untrained/`` (the same net before training, a control) are timm folders;
``checkpoints/`` are for resuming, ``health/`` and ``metrics.csv`` tell how it went.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pathfm.log import get_log
from pathfm.models.checkpoints import provenance, read_card
from pathfm.models.vit import MaskedViT, build_backbone
from pathfm.pretrain.catalogue import Catalogue, build_catalogue, shared_catalogue
from pathfm.pretrain.encoder import BEST, STUDENT, TEACHER, UNTRAINED, shard, train_encoder
from pathfm.pretrain.job import CHECKPOINTS, INITIAL_MANIFEST, Job
from pathfm.pretrain.launch import in_processes, process_rank
from pathfm.pretrain.metrics import EVENTS, METRICS, TIMING
from pathfm.pretrain.views import fitting_crops
from pathfm.pretrain_settings import CropSettings, PretrainSettings
from pathfm.store.commit import sweep
from pathfm.store.manifest import MANIFEST, ORIGIN_KNOWN, manifest_of, write_manifest
from pathfm.store.record import Outcome, StageReport
from pathfm.store.tile_store import open_tiles
from pathfm.study import Study

HEALTH, CATALOGUE = "health", ".catalogue"


def run_pretrain(
    study: Study,
    store_paths: Sequence[Path],
    encoder_dir: Path,
    fingerprint: str,
    facts: Mapping[str, Mapping[str, str]] | None = None,
    patient_of: Mapping[str, str | None] | None = None,
) -> StageReport:
    """Trains an encoder, or goes on where a killed run stopped, or does nothing when it is there.

    On the CPU a resumed run ends with the same bits as an undisturbed one.

    Args:
        study: all settings; ``pretrain`` and ``compute`` are used.
        store_paths: tile stores, in any order.
        encoder_dir: where the encoder goes.
        fingerprint: of everything it depends on; what carries another one is removed first.
        facts: columns of the cohort table by slide_id, for sampling weights.
        patient_of: patient by slide_id where known, for the manifest of what the encoder has seen.

    Raises:
        TrainingError: too few tiles, or training is not healthy.
        PreemptedError: SIGTERM or SIGUSR1; everything is saved.
        UsageError: an impossible backbone, crop size, device or number of processes.
        StoreError: a damaged store or checkpoint.
    """
    first = process_rank() == 0
    if first:
        for folder in (encoder_dir, encoder_dir / CHECKPOINTS):
            sweep(folder)
    if (read_card(encoder_dir / TEACHER) or {}).get("fingerprint") == fingerprint:
        kept = tuple(Outcome(slide_id, "kept") for slide_id in sorted(open_tiles(path).slide_id for path in store_paths))
        return StageReport("pretrain", kept, note="the encoder is up to date")
    if first:
        _clear_others(encoder_dir, fingerprint)
    sampling = study.pretrain.sampling
    catalogue = shared_catalogue(
        encoder_dir / CATALOGUE,
        f"{fingerprint} {sorted(map(str, store_paths))}",
        lambda: build_catalogue(store_paths, sampling, facts or {}),
        first,
    )
    settings, patch_px = _fitted(study.pretrain, catalogue)
    if settings.warmup_steps >= settings.steps:
        get_log(__name__).warning("pretrain.warmup_steps >= pretrain.steps: the learning rate never reaches its full value")
    if first:
        _write_manifests(encoder_dir, settings, catalogue, store_paths, patient_of or {})
    before = _steps_done(encoder_dir)
    card = _card(settings, catalogue, store_paths)
    job = Job(settings, study.compute, encoder_dir, fingerprint, catalogue, patch_px, card)
    in_processes(train_encoder, study.compute, shard, job)
    outcomes = tuple(
        Outcome(slide_id, "done" if count else "empty", "" if count else "no tiles", {"tiles": count})
        for slide_id, count in catalogue.used
    )
    notes = [f"resumed at step {before}"] if before else []
    if settings.crops != study.pretrain.crops:
        notes.append(_said_of(settings.crops, catalogue.tile_px))
    return StageReport("pretrain", outcomes, note="; ".join(notes))


def _fitted(settings: PretrainSettings, catalogue: Catalogue) -> tuple[PretrainSettings, int]:
    """The settings with crops that fit into the smallest tiles, said aloud when they are smaller; and the side of a patch."""
    patch_px = MaskedViT(build_backbone(settings, settings.crops.global_px)).patch_px
    crops = fitting_crops(settings.crops, catalogue.tile_px, patch_px)
    if crops != settings.crops:
        get_log(__name__).warning("pretrain: %s", _said_of(crops, catalogue.tile_px))
    return settings.model_copy(update={"crops": crops}), patch_px


def _write_manifests(
    encoder_dir: Path,
    settings: PretrainSettings,
    catalogue: Catalogue,
    store_paths: Sequence[Path],
    patient_of: Mapping[str, str | None],
) -> None:
    """What the trained networks will have seen, and what the weights they start from have."""
    used = {slide_id for slide_id, count in catalogue.used if count}
    seen = [path for path in store_paths if open_tiles(path).slide_id in used]
    write_manifest(encoder_dir / MANIFEST, seen, patient_of, _inherited(settings.init, settings.teacher))
    if initial := _inherited(settings.init):
        write_manifest(encoder_dir / INITIAL_MANIFEST, [], {}, initial)


def _inherited(*names: str | None) -> list[Path]:
    """Manifests of the encoders that the run starts or learns from: it has seen, at second hand, what they saw."""
    folders = [Path(name.partition(":")[2]) for name in names if name and name.startswith("local-dir:")]
    return [manifest for folder in folders if (manifest := manifest_of(folder))]


def _said_of(crops: CropSettings, tile_px: int) -> str:
    return f"tiles of {tile_px} px have room for crops of {crops.global_px} and {crops.local_px} px at their own scale"


def _steps_done(encoder_dir: Path) -> int:
    """Steps of the newest checkpoint by its name, for the record."""
    names = sorted(place.name for place in (encoder_dir / CHECKPOINTS).glob("step-*"))
    return int(names[-1].partition("-")[2]) if names else 0


def _clear_others(encoder_dir: Path, fingerprint: str) -> None:
    """Removes what another fingerprint left, so that nothing of two runs lies side by side."""
    cards = [read_card(encoder_dir / name) for name in (TEACHER, STUDENT, UNTRAINED)]
    if all(card is None or card.get("fingerprint") == fingerprint for card in cards) and any(cards):
        return
    for name in (TEACHER, STUDENT, UNTRAINED, BEST, CHECKPOINTS, HEALTH, EVENTS):
        if (encoder_dir / name).exists() and any((encoder_dir / name).iterdir()):
            get_log(__name__).warning("%s: made with other settings or tiles; starting anew", encoder_dir / name)
            shutil.rmtree(encoder_dir / name)
    for name in (METRICS, TIMING):
        (encoder_dir / name).unlink(missing_ok=True)


def _card(settings: PretrainSettings, catalogue: Catalogue, store_paths: Sequence[Path]) -> dict[str, Any]:
    """What the encoder's card says of its tiles and settings; resolution and size are None where the stores differ."""
    mpp, tile_px = (sorted(set(column.tolist())) for column in (catalogue.mpp_E, catalogue.tile_px_E))
    known, origins = len(mpp) == 1 and not math.isnan(mpp[0]), (settings.init, settings.teacher)
    return {
        "mpp": mpp[0] if known else None,
        "tile_px": tile_px[0] if len(tile_px) == 1 else None,
        ORIGIN_KNOWN: len(_inherited(*origins)) == sum(name is not None for name in origins),
        "crops_px": [settings.crops.global_px, settings.crops.local_px],
        **provenance(settings.decisive(), {store.slide_id: store.fingerprint for store in map(open_tiles, store_paths)}),
    }
