"""A training step of DINOv2 in the official order of operations (Oquab et al. 2023), written plainly and with nothing slowed.

One backbone call per crop size with torch's own choice of attention, stochastic depth over subsets of the batch, one call of
the shared head for class tokens and masked patches, weight normalisation inside it, targets and losses over all prototypes with
log-softmax, AdamW and the teacher's average with ``foreach``, gradients clipped per sub-module, bf16 autocast on request.
What the official code does beyond that and costs time is left out: padding masked patches to an upper bound, reading every
loss back each step.

Shapes: B tiles, L local crops, N images, P patches, M masked patches, D features, K prototypes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pathfm.pretrain.method import Inputs, Networks, SelfDistillation
from pathfm.pretrain.optim import build_optimizer, set_values
from pathfm.pretrain.schedule import StepValues

Residual = Callable[[Tensor], Tensor]


class Losses(NamedTuple):
    """The loss and its parts, KoLeo summed over both global crops."""

    loss: Tensor
    dino_global: Tensor
    dino_local: Tensor
    ibot: Tensor
    koleo: Tensor


class OfficialStep:
    """Copies of student and teacher, trained by the official steps."""

    def __init__(self, objective: SelfDistillation) -> None:
        self.settings = objective.settings
        self.student, self.teacher = copy.deepcopy(objective.student), copy.deepcopy(objective.teacher)
        self.center_dino, self.center_ibot = (center.mean_K[None] for center in (objective.center_dino, objective.center_ibot))
        groups = build_optimizer(self.student, len(self.student.backbone.blocks), self.settings).param_groups
        kept = ("params", "lr_factor", "decays", "last_layer")
        self.optimizer = torch.optim.AdamW(
            [{name: group[name] for name in kept} for group in groups], betas=groups[0]["betas"], foreach=True
        )

    def step(self, inputs: Inputs, values: StepValues) -> Losses:
        """Losses, gradients, optimiser, teacher."""
        set_values(self.optimizer, values)
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.losses(inputs, values.teacher_temperature)
        losses.loss.backward()
        for module in self.student.children():
            nn.utils.clip_grad_norm_(module.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        self.update_teacher(values.ema)
        return losses

    def losses(self, inputs: Inputs, temperature: float) -> Losses:
        """The forward half of a step."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.settings.precision == "bf16"):
            targets_2BK, patch_targets_MK = self._targets(inputs, temperature)
            drop_path = self.settings.drop_path
            cls_global_ND, patches_NPD = features(self.student, inputs.global_images, inputs.masks_CP, drop_path)
            cls_local_ND, _ = features(self.student, inputs.local_images, None, drop_path)
            masked_MD = patches_NPD.flatten(0, 1).index_select(0, inputs.masked_M)
            parts = (cls_local_ND, cls_global_ND, masked_MD)
            logits = head(self.student, torch.cat(parts)).split([len(part) for part in parts])
            return self._losses(logits, targets_2BK, patch_targets_MK, cls_global_ND, inputs.weight_M)

    def _losses(
        self,
        logits: tuple[Tensor, ...],
        targets_2BK: Tensor,
        patch_targets_MK: Tensor,
        cls_global_ND: Tensor,
        weight_M: Tensor,
    ) -> Losses:
        local_NK, global_NK, patches_MK = logits
        settings, local_count = self.settings, self.settings.crops.local_count
        terms = 2 + 2 * local_count
        student_t = settings.student_temperature
        dino_local = dino_loss(local_NK.chunk(local_count), list(targets_2BK), student_t) / terms
        dino_global = dino_loss([global_NK], [targets_2BK.flatten(0, 1)], student_t) * 2 / terms
        log_student_MK = functional.log_softmax(patches_MK.float() / student_t, dim=-1)
        ibot = -((patch_targets_MK * log_student_MK).sum(dim=-1) * weight_M).sum() / len(cls_global_ND)
        koleo = koleo_loss(cls_global_ND.chunk(2)[0]) + koleo_loss(cls_global_ND.chunk(2)[1])
        loss = settings.dino_weight * (dino_local + dino_global) + settings.koleo_weight * koleo + settings.ibot_weight * ibot
        return Losses(loss, dino_global, dino_local, ibot, koleo)

    @torch.no_grad()
    def _targets(self, inputs: Inputs, temperature: float) -> tuple[Tensor, Tensor]:
        """Targets [2, B, K] of the global crops, swapped so that each meets the other crop, and of masked patches [M, K]."""
        cls_ND, patches_NPD = features(self.teacher, inputs.global_images, None, 0.0)
        first_BD, second_BD = cls_ND.chunk(2)
        masked_MD = patches_NPD.flatten(0, 1).index_select(0, inputs.masked_M)
        both = head(self.teacher, torch.cat([second_BD, first_BD, masked_MD]))
        logits_NK, patch_logits_MK = both[: len(cls_ND)], both[len(cls_ND) :]
        if self.settings.centering == "sinkhorn":
            targets_NK, patch_targets_MK = (sinkhorn(z.float(), temperature) for z in (logits_NK, patch_logits_MK))
        else:
            targets_NK = functional.softmax((logits_NK - self.center_dino) / temperature, dim=-1)
            patch_targets_MK = functional.softmax((patch_logits_MK - self.center_ibot) / temperature, dim=-1)
            self.center_dino = self.center_dino * 0.9 + logits_NK.float().mean(dim=0, keepdim=True) * 0.1
            self.center_ibot = self.center_ibot * 0.9 + patch_logits_MK.float().mean(dim=0, keepdim=True) * 0.1
        return targets_NK.view(2, -1, targets_NK.shape[1]), patch_targets_MK

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """The teacher's parameters move towards the student's."""
        teacher, student = list(self.teacher.parameters()), list(self.student.parameters())
        torch._foreach_mul_(teacher, momentum)
        torch._foreach_add_(teacher, student, alpha=1 - momentum)


def features(networks: Networks, images: Tensor, mask_NP: Tensor | None, drop_path: float) -> tuple[Tensor, Tensor]:
    """Class tokens [N, D] and patches [N, P, D] after the last norm."""
    vit = networks.backbone.vit
    embedded = vit.patch_embed(images)
    if mask_NP is not None:
        hidden = mask_NP.view(*embedded.shape[:3], 1)
        embedded = torch.where(hidden, networks.backbone.mask_token.to(embedded.dtype), embedded)
    x = vit._pos_embed(embedded)
    for block in vit.blocks:
        x = add_residual(x, lambda part, block=block: block.ls1(block.attn(block.norm1(part))), drop_path)
        x = add_residual(x, lambda part, block=block: block.ls2(block.mlp(block.norm2(part))), drop_path)
    x = vit.norm(x)
    return x[:, 0], x[:, vit.num_prefix_tokens :]


def add_residual(x: Tensor, residual: Residual, drop_path: float) -> Tensor:
    """x + residual(x) for a random part of the batch, scaled up to the size of the batch."""
    if not drop_path:
        return x + residual(x)
    kept = max(int(len(x) * (1 - drop_path)), 1)
    chosen = torch.randperm(len(x))[:kept]
    change = residual(x[chosen]).flatten(1).to(x.dtype)
    return torch.index_add(x.flatten(1), 0, chosen, change, alpha=len(x) / kept).view_as(x)


def head(networks: Networks, x: Tensor) -> Tensor:
    """Logits [N, K]."""
    last = networks.dino_head.last_layer
    unit = functional.normalize(networks.dino_head.mlp(x), dim=-1, p=2, eps=1e-12)
    return functional.linear(unit, torch._weight_norm(last.weight_v, last.weight_g, 0))


def dino_loss(student: list[Tensor] | tuple[Tensor, ...], targets: list[Tensor], temperature: float) -> Tensor:
    """Cross-entropy of every student view with every target, mean over images, summed over pairs."""
    loss = torch.zeros(())
    for logits_BK in student:
        log_student_BK = functional.log_softmax(logits_BK.float() / temperature, dim=-1)
        for targets_BK in targets:
            loss = loss - (targets_BK * log_student_BK).sum(dim=-1).mean()
    return loss


def sinkhorn(logits_NK: Tensor, temperature: float) -> Tensor:
    """Three rounds of equal shares for prototypes and rows."""
    shares_KN = torch.exp(logits_NK / temperature).t()
    prototypes, rows = shares_KN.shape
    shares_KN /= shares_KN.sum()
    for _ in range(3):
        shares_KN /= shares_KN.sum(dim=1, keepdim=True)
        shares_KN /= prototypes
        shares_KN /= shares_KN.sum(dim=0, keepdim=True)
        shares_KN /= rows
    shares_KN *= rows
    return shares_KN.t()


def koleo_loss(features_BD: Tensor) -> Tensor:
    """Minus the mean log distance to the nearest neighbour."""
    with torch.autocast("cpu", enabled=False):
        unit_BD = functional.normalize(features_BD.float(), dim=-1, eps=1e-8)
        with torch.no_grad():
            similarity_BB = unit_BD @ unit_BD.t()
            similarity_BB.view(-1)[:: len(unit_BD) + 1].fill_(-1)
            nearest_B = similarity_BB.argmax(dim=1)
        distance_B = functional.pairwise_distance(unit_BD, unit_BD[nearest_B], eps=1e-8)
        return -torch.log(distance_B + 1e-8).mean()
