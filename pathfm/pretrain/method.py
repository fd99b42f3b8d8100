"""DINOv2 (Oquab et al. 2023): a student learns from its own moving average, on whole crops and on masked patches.

Shapes: B tiles, L local crops, K prototypes, M masked patches, D features; crops are view-major. Losses are fp32.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pathfm.models.vit import MaskedViT
from pathfm.pretrain import losses
from pathfm.pretrain.head import DinoHead
from pathfm.study import PretrainSettings


class Inputs(NamedTuple):
    """Normalised crops and masks of a step; fields as in ``data.Batch``."""

    global_images: Tensor
    local_images: Tensor
    masks_CP: Tensor
    masked_M: Tensor
    weight_M: Tensor


class Terms(NamedTuple):
    """The loss and its parts before weighting (KoLeo is the sum over both global crops), and the teacher's entropy [nat]."""

    loss: Tensor
    dino_global: Tensor
    dino_local: Tensor
    ibot: Tensor
    koleo: Tensor
    teacher_entropy: Tensor


class Networks(nn.Module):
    """What student and teacher both are: a backbone and its projection heads (one for both losses, unless asked for two)."""

    def __init__(self, backbone: MaskedViT, settings: PretrainSettings) -> None:
        super().__init__()
        shape = (backbone.embed_dim, settings.head_hidden, settings.head_bottleneck, settings.prototypes)
        self.backbone = backbone
        self.dino_head = DinoHead(*shape)
        self.ibot_head = DinoHead(*shape) if settings.separate_ibot_head else None

    def project(self, cls_ND: Tensor, patches_MD: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of class tokens [N, K] and of masked patches [M, K]; one pass when they share a head."""
        if self.ibot_head is not None:
            return self.dino_head(cls_ND), self.ibot_head(patches_MD)
        both = self.dino_head(torch.cat([cls_ND, patches_MD]))
        return both[: len(cls_ND)], both[len(cls_ND) :]


class DinoV2(nn.Module):
    """Student, teacher and centres. ``forward`` gives the losses of a step, ``update_teacher`` follows the optimiser."""

    center_dino: Tensor
    center_ibot: Tensor

    def __init__(self, backbone: MaskedViT, settings: PretrainSettings) -> None:
        super().__init__()
        self.settings = settings
        self.student = Networks(backbone, settings)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("center_dino", torch.zeros(settings.prototypes))
        self.register_buffer("center_ibot", torch.zeros(settings.prototypes))
        self.train()

    def train(self, mode: bool = True) -> DinoV2:
        """As always, but the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, inputs: Inputs, temperature: float) -> Terms:
        """Losses of one step. ``temperature`` is the teacher's. The centres move on, in training mode."""
        settings = self.settings
        targets_VBK, patch_targets_MK = self._targets(inputs, temperature)
        seen, local = self.student.backbone([inputs.global_images, inputs.local_images], [inputs.masks_CP, None])
        masked_MD = seen.patches_NPD.flatten(0, 1)[inputs.masked_M]
        logits_NK, patch_logits_MK = self.student.project(torch.cat([seen.cls_ND, local.cls_ND]), masked_MD)
        views_VBK = logits_NK.view(2 + settings.crops.local_count, -1, settings.prototypes)

        terms = 2 + 2 * settings.crops.local_count
        dino_global = losses.dino_loss_paired(views_VBK[:2], targets_VBK.flip(0), settings.student_temperature) / terms
        dino_local = losses.dino_loss(views_VBK[2:], targets_VBK, settings.student_temperature) / terms
        ibot = losses.ibot_loss(
            patch_logits_MK, patch_targets_MK, inputs.weight_M, len(inputs.global_images), settings.student_temperature
        )
        first_BD, second_BD = seen.cls_ND.chunk(2)
        koleo = losses.koleo_loss(first_BD) + losses.koleo_loss(second_BD)
        loss = settings.dino_weight * (dino_global + dino_local) + settings.ibot_weight * ibot + settings.koleo_weight * koleo
        return Terms(loss, dino_global, dino_local, ibot, koleo, losses.mean_entropy(targets_VBK))

    @torch.no_grad()
    def _targets(self, inputs: Inputs, temperature: float) -> tuple[Tensor, Tensor]:
        """Teacher distributions of the global crops [2, B, K] and of the patches hidden from the student [M, K]."""
        cls_ND, patches_NPD = self.teacher.backbone.tokens(inputs.global_images)
        logits_NK, patch_logits_MK = self.teacher.project(cls_ND, patches_NPD.flatten(0, 1)[inputs.masked_M])
        targets_NK = self._centred(logits_NK, self.center_dino, temperature)
        return targets_NK.view(2, -1, targets_NK.shape[1]), self._centred(patch_logits_MK, self.center_ibot, temperature)

    def _centred(self, logits_NK: Tensor, center_K: Tensor, temperature: float) -> Tensor:
        """Targets; without rows (nothing is masked) nothing moves."""
        if not len(logits_NK):
            return logits_NK.float()
        if self.settings.centering == "sinkhorn":
            return losses.sinkhorn_targets(logits_NK, temperature)
        targets_NK = losses.softmax_targets(logits_NK, center_K, temperature)
        if self.training:
            center_K.copy_(losses.updated_center(center_K, logits_NK))
        return targets_NK

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Moves every parameter of the teacher, backbone and heads, towards the student's."""
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - momentum)
