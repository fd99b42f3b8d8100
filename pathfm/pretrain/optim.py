"""Which parameter learns how fast: groups, values per step, clipping (as DINOv2 codes them)."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pathfm.pretrain.method import Networks
from pathfm.pretrain.schedule import Cosine, linear
from pathfm.study import PretrainSettings

REFERENCE_BATCH = 1024
BETAS = (0.9, 0.999)


class StepValues(NamedTuple):
    """Everything that changes with the step."""

    lr: float
    weight_decay: float
    ema: float
    teacher_temperature: float
    last_layer_lr: float


class Schedules:
    """Values per step from the settings; a pure function of the step."""

    def __init__(self, settings: PretrainSettings) -> None:
        peak = settings.lr * math.sqrt(settings.batch_size / REFERENCE_BATCH)
        self._settings = settings
        self._lr = Cosine(peak, settings.lr_min, settings.steps, warmup=settings.warmup_steps)
        self._weight_decay = Cosine(*settings.weight_decay, settings.steps)
        self._ema = Cosine(*settings.ema, settings.steps)

    def __call__(self, step: int) -> StepValues:
        """The values at a step, counted from 0."""
        settings, lr = self._settings, self._lr(step)
        return StepValues(
            lr=lr,
            weight_decay=self._weight_decay(step),
            ema=self._ema(step),
            teacher_temperature=linear(step, *settings.teacher_temperature, settings.teacher_warmup_steps),
            last_layer_lr=0.0 if step < settings.freeze_last_layer_steps else lr,
        )


def lr_factor(name: str, depth: int, layer_decay: float, patch_embed_lr: float) -> float:
    """Learning-rate factor of a parameter: ``layer_decay`` per layer below the top; tokens and embeddings lie below block 0."""
    layer = depth + 1
    if block := re.search(r"\bblocks\.(\d+)\.", name):
        layer = int(block[1]) + 1
    elif re.search(r"\b(pos_embed|patch_embed|mask_token|cls_token|reg_token)\b", name):
        layer = 0
    factor = layer_decay ** (depth + 1 - layer)
    return float(factor * patch_embed_lr if "patch_embed" in name else factor)


def decays(name: str) -> bool:
    """Whether weight decay applies: not to biases, norms and LayerScale, but to tokens, positions and prototype lengths."""
    return not (name.endswith(".bias") or "norm" in name or "gamma" in name)


def build_optimizer(networks: Networks, settings: PretrainSettings) -> torch.optim.AdamW:
    """AdamW with one group per distinct (learning-rate factor, weight decay or not, last layer or not)."""
    depth = len(networks.backbone.vit.blocks)
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in networks.named_parameters():
        factor = 1.0
        if name.startswith("backbone."):
            factor = lr_factor(name, depth, settings.layer_decay, settings.patch_embed_lr)
        groups.setdefault((factor, decays(name), "last_layer" in name), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr_factor": factor, "decays": decay, "last_layer": last}
            for (factor, decay, last), parameters in groups.items()
        ],
        betas=BETAS,
        fused=True,
    )


def set_values(optimizer: torch.optim.Optimizer, values: StepValues) -> None:
    """Puts the step's learning rate and weight decay into every group. A frozen last layer has rate 0, so no decay either."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr_factor"] * (values.last_layer_lr if group["last_layer"] else values.lr)
        group["weight_decay"] = values.weight_decay if group["decays"] else 0.0


def clip_gradients(networks: Networks, max_norm: float) -> list[Tensor]:
    """Clips the gradient norm of each sub-module on its own; returns the norms before clipping, in ``submodules`` order."""
    return [nn.utils.clip_grad_norm_(module.parameters(), max_norm) for _, module in networks.named_children()]


def submodules(networks: Networks) -> list[str]:
    """Names of the sub-modules that are clipped on their own."""
    return [name for name, _ in networks.named_children()]
