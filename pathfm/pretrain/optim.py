"""Which parameter learns how fast: groups, values per step, clipping (as DINOv2 codes them)."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from pathfm.pretrain.schedule import StepValues
from pathfm.pretrain_settings import PretrainSettings

BETA1 = 0.9


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
    return not (name.endswith("bias") or "norm" in name or "gamma" in name)


def build_optimizer(student: nn.Module, depth: int, settings: PretrainSettings) -> torch.optim.AdamW:
    """AdamW with one group per distinct (learning-rate factor, weight decay or not, last layer or not).

    Parameters that are not trained are left out. Moments exist from the start, so that a checkpoint always holds them.
    """
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = 1.0
        if name.startswith("backbone."):
            factor = lr_factor(name, depth, settings.layer_decay, settings.patch_embed_lr)
        groups.setdefault((factor, decays(name), "last_layer" in name), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters, "lr_factor": factor, "decays": decay, "last_layer": last}
            for (factor, decay, last), parameters in groups.items()
        ],
        betas=(BETA1, settings.beta2),
        fused=True,
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def set_values(optimizer: torch.optim.Optimizer, values: StepValues) -> None:
    """Puts the step's learning rate and weight decay into every group. A frozen last layer has rate 0, so no decay either."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr_factor"] * (values.last_layer_lr if group["last_layer"] else values.lr)
        group["weight_decay"] = values.weight_decay if group["decays"] else 0.0


def clip_gradients(student: nn.Module, max_norm: float) -> list[Tensor]:
    """Clips the gradient norm of each sub-module on its own; returns the norms before clipping, in ``submodules`` order."""
    norms = []
    for name in submodules(student):
        trained = [parameter for parameter in student.get_submodule(name).parameters() if parameter.grad is not None]
        norm = nn.utils.clip_grad_norm_(trained, max_norm)
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    return norms


def submodules(student: nn.Module) -> list[str]:
    """Names of the sub-modules that are clipped on their own: those with something to train."""
    return [name for name, module in student.named_children() if any(p.requires_grad for p in module.parameters())]
