"""From first weights to exported encoder: what every process of a run does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from pathfm.compute import seed_everything, use_threads
from pathfm.models.checkpoints import export_encoder, load_encoder_folder, read_card
from pathfm.models.drift import Labelled, drift
from pathfm.models.lora import add_lora, train_last
from pathfm.models.vit import MaskedViT, build_backbone
from pathfm.models.weights import load_initial
from pathfm.pretrain.job import INITIAL_MANIFEST, Job, whole
from pathfm.pretrain.method import Objective, SelfDistillation
from pathfm.pretrain.training import Training
from pathfm.pretrain_settings import PretrainSettings
from pathfm.store.commit import write_json
from pathfm.store.manifest import MANIFEST
from pathfm.study import ComputeSettings

TEACHER, STUDENT, UNTRAINED, BEST = "teacher", "student", "untrained", "best"
DRIFT = "drift.json"


def train_encoder(fabric: Fabric, job: Job) -> None:
    """Trains and exports; every process of a run calls it.

    Raises:
        TrainingError: training is not healthy.
        PreemptedError: the scheduler wants its machine back.
        UsageError: an impossible network.
        StoreError: a damaged checkpoint.
    """
    use_threads(job.compute)
    batches = job.batches(fabric.global_rank, fabric.world_size)
    seed_everything(job.settings.seed)
    objective, origin = build_objective(job.settings, fabric.device)
    card = {**job.card, "fingerprint": job.fingerprint, **({"init": origin} if origin else {})}
    if fabric.is_global_zero and not _is_current(job.folder / UNTRAINED, job.fingerprint):
        _export(whole(objective.teacher.backbone, job.settings), job, {**card, "step": 0}, UNTRAINED)
    _prepare_blocks(objective, job.compute)
    Training(fabric, job, objective, batches, lambda best, step: _export(best, job, {**card, "step": step}, BEST)).run()
    # The teacher comes last: where it is, everything is.
    for name, networks in ((STUDENT, objective.student), (TEACHER, objective.teacher)):
        backbone = whole(networks.backbone, job.settings)
        if fabric.is_global_zero and not _is_current(job.folder / name, job.fingerprint):
            if name == TEACHER and job.settings.init:
                _write_drift(job, backbone)
            _export(backbone, job, {**card, "step": job.settings.steps}, name)
    fabric.barrier()


def build_objective(settings: PretrainSettings, device: torch.device) -> tuple[Objective, dict[str, Any]]:
    """Fresh networks from the settings and the present random state, on the CPU, and where their first weights are from.

    Raises:
        UsageError: an impossible backbone, crop size, or place of weights.
    """
    backbone = MaskedViT(build_backbone(settings, settings.crops.global_px))
    origin = load_initial(backbone, settings.init) if settings.init else {}
    if settings.train == "last":
        train_last(backbone, settings.train_blocks)
    if settings.train == "lora":
        add_lora(backbone.vit, settings.lora_rank)
    if settings.teacher is None:
        return SelfDistillation(backbone, settings), origin
    from pathfm.models.frozen import FrozenEncoder
    from pathfm.pretrain.distill import Distillation

    return Distillation(backbone, settings, FrozenEncoder(settings.teacher, device)), origin


def shard(objective: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shards blocks, heads and what is left over all processes (FSDP2), student and teacher alike."""
    data = mesh["data_parallel"]
    for name in ("student", "teacher"):
        networks = objective.get_submodule(name)
        for block in networks.backbone.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=data)
        for part in networks.children():
            fully_shard(part, mesh=data)
    fully_shard(objective, mesh=data)
    return objective


def _prepare_blocks(objective: Objective, compute: ComputeSettings) -> None:
    for block in objective.student.backbone.blocks:
        block.recomputes = compute.checkpoint_activations  # type: ignore[assignment]
    if compute.compile:
        for block in (*objective.student.backbone.blocks, *objective.teacher.backbone.blocks):
            block.compile()


def _write_drift(job: Job, backbone: MaskedViT) -> None:
    """How far continued pretraining has moved the features away from those of the weights it started from."""
    initial, table, side = load_encoder_folder(job.folder / UNTRAINED).model, job.probe, job.settings.crops.global_px
    labelled = None
    if table:
        labelled = Labelled(table.pixels(side, 0, len(table.paths)), table.labels, table.groups, table.is_train)
    initial.to(next(backbone.parameters()).device)
    write_json(job.folder / DRIFT, drift(initial, backbone.vit, job.fixed_tiles(), labelled))


def _is_current(folder: Path, fingerprint: str) -> bool:
    return (read_card(folder) or {}).get("fingerprint") == fingerprint


def _export(backbone: MaskedViT, job: Job, card: dict[str, Any], name: str) -> None:
    seen = job.folder / (INITIAL_MANIFEST if name == UNTRAINED else MANIFEST)
    manifest = seen if seen.is_file() else None
    export_encoder(backbone.vit, job.settings, job.settings.crops.global_px, card, job.folder / name, manifest)
