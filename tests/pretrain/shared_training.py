"""What the processes of the tests of several processes do; a module of its own, since they import it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric

from pathfm.pretrain.encoder import build_objective
from pathfm.pretrain.masking import batch_masks
from pathfm.pretrain.method import WATCHED, Inputs, Objective
from pathfm.pretrain.optim import build_optimizer, clip_gradients, set_values
from pathfm.pretrain.processes import process_count, sum_over_processes
from pathfm.pretrain.schedule import Schedules
from pathfm.pretrain.state import load_checkpoint, newest_checkpoint, save_checkpoint
from pathfm.pretrain_settings import PretrainSettings

Results = dict[str, torch.Tensor]


def drawn_inputs(settings: PretrainSettings, step: int, samples: range) -> Inputs:
    """Random images and masks of some samples of a step's batch, in float64: functions of (step, sample)."""
    crops, size = settings.crops, settings.batch_size
    images = [torch.Generator().manual_seed(1000 * step + sample) for sample in samples]
    drawn = [torch.randn(2, 3, crops.global_px, crops.global_px, generator=g, dtype=torch.float64) for g in images]
    local = [
        torch.randn(crops.local_count, 3, crops.local_px, crops.local_px, generator=g, dtype=torch.float64) for g in images
    ]
    rows = [view * size + sample for view in range(2) for sample in samples]
    masks_CP = batch_masks(settings, crops.global_px // 16, rows, (0, settings.seed, step))
    weight_CP = masks_CP / np.maximum(masks_CP.sum(axis=1, keepdims=True), 1)
    return Inputs(
        torch.stack(drawn, dim=1).flatten(0, 1),
        torch.stack(local, dim=1).flatten(0, 1),
        torch.from_numpy(masks_CP),
        torch.from_numpy(np.flatnonzero(masks_CP)),
        torch.from_numpy(weight_CP[masks_CP]),
    )


def train(fabric: Fabric, settings: PretrainSettings, steps: range, folder: Path | None = None) -> Results:
    """Some steps of training: the losses of each, and every weight of student, teacher and centres after them."""
    torch.manual_seed(0)
    objective = build_objective(settings, torch.device("cpu"))[0].double()
    model = fabric.setup_module(objective)
    optimizer = build_optimizer(objective.student, len(objective.student.backbone.blocks), settings)
    wrapped = fabric.setup_optimizers(optimizer)
    if steps.start and folder:
        found = newest_checkpoint(folder, "print")
        assert found is not None and found.step == steps.start
        load_checkpoint(found, objective, optimizer)
    results: Results = {}
    for step in steps:
        values = Schedules(settings)(step)
        set_values(optimizer, values)
        share = settings.batch_size // fabric.world_size // settings.accumulate
        told: list[torch.Tensor] = []
        for part in range(settings.accumulate):
            first = (part * fabric.world_size + fabric.global_rank) * share
            inputs = drawn_inputs(settings, step, range(first, first + share))
            with fabric.no_backward_sync(model, enabled=part < settings.accumulate - 1):
                terms = model(inputs, values)
                fabric.backward(terms["loss"] / settings.accumulate)
            told.append(torch.stack([term.detach() for term in terms.values()]))
        norms = torch.stack(clip_gradients(objective.student, settings.clip_norm))
        wrapped.step()
        wrapped.zero_grad()
        objective.end_step(values.ema)
        means = sum_over_processes(torch.stack(told).mean(dim=0)) / process_count()
        results[f"terms {step}"], results[f"watched {step}"] = means[: -len(WATCHED)], means[-len(WATCHED) :].float()
        results[f"norms {step}"] = norms
    if folder and steps.stop < settings.steps:
        save_checkpoint(folder, "print", steps.stop, (objective, optimizer), {})
    return results | weights(objective)


def weights(objective: Objective) -> Results:
    """All of the state, gathered."""
    state: dict[str, Any] = objective.state_dict()
    return {name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in state.items()}


def train_all(fabric: Fabric, cases: dict[str, PretrainSettings], out: Path) -> None:
    """Every case's whole training, and the cases again in two halves with a checkpoint between; written by the first process.

    ``first half`` checkpoints of the other kind of run, where they are there, are gone on from.
    """
    results = {}
    for name, settings in cases.items():
        results[name] = train(fabric, settings, range(settings.steps))
        train(fabric, settings, range(2), out / f"{name}-{_kind(fabric)}")
        for other in sorted(out.glob(f"{name}-*")):
            results[f"{other.name} resumed"] = train(fabric, settings, range(2, settings.steps), other)
    if fabric.is_global_zero:
        torch.save(results, out / f"{_kind(fabric)}.pt")
    fabric.barrier()


def _kind(fabric: Fabric) -> str:
    return {"SingleDeviceStrategy": "one", "DDPStrategy": "ddp", "ModelParallelStrategy": "fsdp"}[
        type(fabric.strategy).__name__
    ]
