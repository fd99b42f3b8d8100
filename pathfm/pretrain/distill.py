"""Distillation: a small student learns the features of a frozen encoder, of whole crops and of their patches.

As Virchow2G-Mini and the small Kaiko networks are made from large ones. Teacher features are standardised per vector, so that
encoders of any scale can teach; the student speaks their language through linear layers that are not exported. What is exported
is the moving average of the student. Shapes: N crops, P patches, D features.
"""

from __future__ import annotations

import copy
import math

from torch import Tensor, nn
from torch.nn import functional

from pathfm.models.frozen import FrozenEncoder
from pathfm.models.vit import MaskedViT
from pathfm.pretrain import losses
from pathfm.pretrain.method import Inputs, Learner, Objective, Terms
from pathfm.pretrain.schedule import StepValues
from pathfm.pretrain_settings import PretrainSettings


class Pupil(Learner):
    """A backbone, and linear layers from its features to those of the encoder it learns from."""

    def __init__(self, backbone: MaskedViT, encoder: FrozenEncoder) -> None:
        super().__init__()
        self.backbone = backbone
        self.cls_head = nn.Linear(backbone.embed_dim, encoder.dim)
        self.patch_head = nn.Linear(backbone.embed_dim, encoder.patch_dim) if encoder.patch_dim else None


class Distillation(Objective):
    """Student, its moving average, and the encoder it learns from, which is part of neither state nor optimiser."""

    student: Pupil
    teacher: Pupil

    def __init__(self, backbone: MaskedViT, settings: PretrainSettings, encoder: FrozenEncoder) -> None:
        super().__init__()
        self.settings, self._encoder = settings, encoder
        backbone.mask_token.requires_grad_(False)  # nothing is masked
        self.student = Pupil(backbone, encoder)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.terms = ("loss", "cls", "patches")
        self.train()

    def forward(self, inputs: Inputs, values: StepValues) -> Terms:
        """Losses of one part of a step."""
        wanted = self._encoder(inputs.global_images)
        (seen,) = self.student.backbone([inputs.global_images], [None])
        cls = losses.feature_loss(self.student.cls_head(seen.cls_ND), _standardised(wanted.pooled_ND))
        patches = cls.new_zeros(())
        if self.student.patch_head is not None and wanted.patches_NPD is not None:
            target_NPD = _on_grid(_standardised(wanted.patches_NPD), seen.patches_NPD.shape[1])
            patches = losses.feature_loss(self.student.patch_head(seen.patches_NPD), target_NPD)
        return {"loss": self.settings.dino_weight * cls + self.settings.ibot_weight * patches, "cls": cls, "patches": patches}


def _standardised(features: Tensor) -> Tensor:
    return functional.layer_norm(features.float(), features.shape[-1:])


def _on_grid(patches_NPD: Tensor, wanted: int) -> Tensor:
    """Features of a square grid, resampled to one of another number of cells."""
    side, wanted_side = math.isqrt(patches_NPD.shape[1]), math.isqrt(wanted)
    if side == wanted_side:
        return patches_NPD
    grid = patches_NPD.mT.reshape(*patches_NPD.mT.shape[:2], side, side)
    return functional.interpolate(grid, size=(wanted_side, wanted_side), mode="bilinear", antialias=True).flatten(2).mT
