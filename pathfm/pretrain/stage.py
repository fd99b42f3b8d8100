"""Stage 2: tile stores -> encoder.

``teacher/`` (the result) and ``untrained/`` (the same net before training, a control) are timm folders;
``checkpoints/last.ckpt`` is for resuming.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pathfm.compute import pick_device, seed_everything, usable_cores, use_threads
from pathfm.errors import UsageError
from pathfm.log import get_log
from pathfm.models.checkpoints import export_encoder, read_card
from pathfm.models.vit import MaskedViT, build_backbone
from pathfm.pretrain.data import TileBatches, load_batches
from pathfm.pretrain.method import DinoV2
from pathfm.pretrain.metrics import METRICS, TIMING
from pathfm.pretrain.state import LAST, load_checkpoint
from pathfm.pretrain.training import Training, fit
from pathfm.store.commit import sweep
from pathfm.store.record import Outcome, StageReport
from pathfm.store.tile_store import open_tiles
from pathfm.study import PretrainSettings, Study

VERSION = 1
"""Raised whenever the same tiles and settings give another encoder."""
VERSION = 1
"""Counts changes of this stage that change its output; part of the fingerprint."""
TEACHER, UNTRAINED, CHECKPOINTS = "teacher", "untrained", "checkpoints"


def run_pretrain(study: Study, store_paths: Sequence[Path], encoder_dir: Path, fingerprint: str) -> StageReport:
    """Trains an encoder, or goes on where a killed run stopped, or does nothing when it is there.

    On the CPU a resumed run ends with the same bits as an undisturbed one.

    Args:
        study: all settings; ``pretrain`` and ``compute`` are used.
        store_paths: tile stores, in any order.
        encoder_dir: where the encoder goes.
        fingerprint: of everything it depends on; what carries another one is removed first.

    Raises:
        TrainingError: too few tiles, or a loss that is not finite.
        UsageError: an impossible backbone, crop size or device.
        StoreError: a damaged store or checkpoint.
    """
    teacher_dir, checkpoint_path = encoder_dir / TEACHER, encoder_dir / CHECKPOINTS / LAST
    for folder in (encoder_dir, checkpoint_path.parent):
        sweep(folder)
    if _is_current(teacher_dir, fingerprint):
        kept = tuple(Outcome(slide_id, "kept") for slide_id in sorted(open_tiles(path).slide_id for path in store_paths))
        return StageReport("pretrain", kept, note="the encoder is up to date")
    settings, device = study.pretrain, pick_device(study.compute)
    if settings.warmup_steps >= settings.steps:
        get_log(__name__).warning("pretrain.warmup_steps >= pretrain.steps: the learning rate never reaches its full value")
    use_threads(study.compute)
    seed_everything(settings.seed)
    method = build_method(settings)
    batches = TileBatches(store_paths, settings, method.student.backbone.grid_side(settings.crops.global_px))
    card = {"fingerprint": fingerprint, **_tile_facts(store_paths)}

    resume = load_checkpoint(checkpoint_path, fingerprint)
    if resume is None:
        _clear(encoder_dir)
    if not _is_current(encoder_dir / UNTRAINED, fingerprint):
        _export(method, settings, {**card, "step": 0}, encoder_dir / UNTRAINED)
    if resume:
        method.load_state_dict(resume.method)
    first = resume.step if resume else 0
    if first < settings.steps:
        workers = study.compute.workers or (usable_cores() if device.type == "cuda" else 0)
        loader = load_batches(batches, range(first, settings.steps), workers, pin=device.type == "cuda")
        fit(Training(method, encoder_dir, checkpoint_path, fingerprint, resume), loader, device)
    _export(method, settings, {**card, "step": settings.steps}, teacher_dir)
    outcomes = tuple(
        Outcome(slide_id, "done" if count else "empty", "" if count else "no tiles", {"tiles": count})
        for slide_id, count in batches.used
    )
    return StageReport("pretrain", outcomes, note=f"resumed at step {first}" if first else "")


def build_method(settings: PretrainSettings) -> DinoV2:
    """Fresh networks from the settings and the current random state.

    Raises:
        UsageError: an impossible backbone or crop size.
    """
    vit = build_backbone(
        settings.backbone,
        settings.crops.global_px,
        settings.patch_px,
        registers=settings.registers,
        drop_path=settings.drop_path,
        layer_scale=settings.layer_scale,
    )
    backbone = MaskedViT(vit)
    if settings.crops.local_px % backbone.patch_px:
        raise UsageError(
            f"patches of {backbone.patch_px} px do not divide crops of {settings.crops.local_px} px",
            where="pretrain.crops.local_px",
            fix="use a multiple of the patch side",
        )
    return DinoV2(backbone, settings)


def _is_current(folder: Path, fingerprint: str) -> bool:
    return (read_card(folder) or {}).get("fingerprint") == fingerprint


def _clear(encoder_dir: Path) -> None:
    """Removes what another fingerprint left, so that nothing of two runs lies side by side."""
    for name in (TEACHER, UNTRAINED, CHECKPOINTS):
        if (encoder_dir / name).exists():
            get_log(__name__).warning("%s: made with other settings or tiles; starting anew", encoder_dir / name)
            shutil.rmtree(encoder_dir / name)
    for name in (METRICS, TIMING):
        (encoder_dir / name).unlink(missing_ok=True)


def _tile_facts(store_paths: Sequence[Path]) -> dict[str, Any]:
    """Resolution and size of the tiles, None where the stores differ."""
    stores = [open_tiles(path) for path in store_paths]
    mpp, tile_px = {store.mpp for store in stores}, {store.tile_px for store in stores}
    return {"mpp": mpp.pop() if len(mpp) == 1 else None, "tile_px": tile_px.pop() if len(tile_px) == 1 else None}


def _export(method: DinoV2, settings: PretrainSettings, card: dict[str, Any], folder: Path) -> None:
    export_encoder(method.teacher.backbone.vit, settings.backbone, settings.crops.global_px, card, folder)
