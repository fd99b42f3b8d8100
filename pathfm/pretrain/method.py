"""Self-distillation: a student learns from its own moving average, on whole crops and on masked patches.

That is DINO, iBOT, DINOv2 and DINOv3: which of the losses are on, and how the teacher is centred, is data (``presets.py``).
Shapes: B tiles, L local crops, K prototypes, M masked patches, P patches of a crop, D features; crops are view-major. Losses
are fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pathfm.models.vit import MaskedViT, Tokens
from pathfm.pretrain import losses
from pathfm.pretrain.diagnostics import PrototypeUse, perplexity_share
from pathfm.pretrain.head import DinoHead
from pathfm.pretrain.schedule import StepValues
from pathfm.pretrain_settings import PretrainSettings

Terms = dict[str, Tensor]
"""The loss, its parts before weighting, and what is watched: scalars by name, ``loss`` first."""


WATCHED = ("teacher_entropy", "teacher_kl", "prototype_perplexity", "prototypes_used")
"""Numbers about the teacher's targets (``diagnostics.py``)."""
PROTOTYPE_WINDOW = 100
"""Steps over which the prototypes in use are counted."""


class Inputs(NamedTuple):
    """Normalised crops and masks of a step, as in ``data.Batch``; ``plain_images`` are the global crops uncoloured."""

    global_images: Tensor
    local_images: Tensor
    masks_CP: Tensor
    masked_M: Tensor
    weight_M: Tensor
    plain_images: Tensor | None = None


class Learner(nn.Module):
    """What student and teacher are, whatever the method: a backbone, and the heads that it needs while it learns."""

    backbone: MaskedViT


class Objective(nn.Module):
    """What a training loop needs of a method. ``forward(inputs, values)`` gives the terms of one part of a step.

    Attributes:
        student: what is optimised; each of its direct children has its gradients clipped on its own.
        teacher: its moving average, which is exported.
        terms: names of what ``forward`` returns, in order.
    """

    student: Learner
    teacher: Learner
    terms: tuple[str, ...]

    @torch.no_grad()
    def end_step(self, momentum: float) -> None:
        """Moves every parameter of the teacher, backbone and heads, towards the student's."""
        torch._foreach_lerp_(local(self.teacher), local(self.student), 1 - momentum)

    def refresh_anchor(self) -> None:
        """Makes the present teacher the Gram anchor, where there is one."""

    def train(self, mode: bool = True) -> Objective:
        """As always, but what is not trained stays in eval mode."""
        super().train(mode)
        for name, module in self.named_children():
            module.train(mode and name == "student")
        return self


class Networks(Learner):
    """What student and teacher both are: a backbone and its projection heads (one for both losses, unless asked for two)."""

    def __init__(self, backbone: MaskedViT, settings: PretrainSettings) -> None:
        super().__init__()
        self.backbone = backbone
        self.dino_head = DinoHead(backbone.embed_dim, settings)
        self.ibot_head = DinoHead(backbone.embed_dim, settings) if settings.separate_ibot_head else None

    def project(self, cls_ND: Tensor, patches_MD: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of class tokens [N, K] and of masked patches [M, K]; one pass when they share a head."""
        if self.ibot_head is not None:
            return self.dino_head(cls_ND), self.ibot_head(patches_MD)
        both = self.dino_head(torch.cat([cls_ND, patches_MD]))
        # One split: two slices would each fill a gradient of the size of both.
        cls_NK, patches_MK = torch.split(both, [len(cls_ND), len(patches_MD)])
        return cls_NK, patches_MK


class Center(nn.Module):
    """The moving average of the teacher's logits. It moves once per step, by the mean over all parts and processes."""

    mean_K: Tensor

    def __init__(self, prototypes: int) -> None:
        super().__init__()
        self.register_buffer("mean_K", torch.zeros(prototypes))
        self._total_K: Tensor | None = None
        self._count = 0

    def see(self, logits_NK: Tensor) -> None:
        """Takes in one part's logits."""
        total_K = losses.sum_of_rows(logits_NK)
        self._total_K = total_K if self._total_K is None else self._total_K + total_K
        self._count += len(logits_NK)

    def move(self) -> None:
        """Ends the step."""
        if self._total_K is not None:
            self.mean_K.copy_(losses.moved_center(self.mean_K, self._total_K, self._count))
        self._total_K, self._count = None, 0


class SelfDistillation(Objective):
    """Student, teacher and centres. ``forward`` gives the losses of a part of a step; ``end_step`` follows the optimiser."""

    student: Networks
    teacher: Networks

    def __init__(self, backbone: MaskedViT, settings: PretrainSettings) -> None:
        super().__init__()
        self.settings = settings
        self.student = Networks(backbone, settings)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.anchor = copy.deepcopy(self.teacher.backbone) if settings.gram.start < 1 else None
        self.center_dino, self.center_ibot = Center(settings.prototypes), Center(settings.prototypes)
        self.prototype_use = PrototypeUse(settings.prototypes, PROTOTYPE_WINDOW)
        gram = ("gram",) if self.anchor is not None else ()
        self.terms = ("loss", "dino_global", "dino_local", "ibot", "koleo", "kde", *gram, *WATCHED)
        self.train()

    def forward(self, inputs: Inputs, values: StepValues) -> Terms:
        """Losses of one part of a step."""
        settings, crops = self.settings, self.settings.crops
        targets_VBK, patch_targets_MK = self._targets(inputs, values.teacher_temperature)
        views = [inputs.global_images, inputs.local_images] if crops.local_count else [inputs.global_images]
        seen, *local = self.student.backbone(views, [inputs.masks_CP, None][: len(views)])
        masked_MD = seen.patches_NPD.flatten(0, 1)[inputs.masked_M]
        cls_ND = torch.cat([seen.cls_ND, *(tokens.cls_ND for tokens in local)])
        logits_NK, patch_logits_MK = self.student.project(cls_ND, masked_MD)
        views_VBK = logits_NK.view(2 + crops.local_count, -1, settings.prototypes)
        global_VBK, local_VBK = torch.split(views_VBK, [2, crops.local_count])

        terms = 2 + 2 * crops.local_count
        parts = {
            "dino_global": losses.dino_loss_paired(global_VBK, targets_VBK.flip(0), settings.student_temperature) / terms,
            "dino_local": losses.dino_loss(local_VBK, targets_VBK, settings.student_temperature) / terms
            if crops.local_count
            else logits_NK.new_zeros(()),
            "ibot": losses.ibot_loss(
                patch_logits_MK, patch_targets_MK, inputs.weight_M, len(inputs.global_images), settings.student_temperature
            ),
            **self._spread(seen.cls_ND),
        }
        if self.anchor is not None:
            parts["gram"] = self._gram(seen, inputs) if values.gram_weight else logits_NK.new_zeros(())
        loss = self._weighted(parts, values)
        return {"loss": loss, **parts, **self._watched(parts, targets_VBK, values.step)}

    def _weighted(self, parts: Terms, values: StepValues) -> Tensor:
        settings = self.settings
        loss = settings.dino_weight * (parts["dino_global"] + values.local_weight * parts["dino_local"])
        loss = loss + settings.ibot_weight * parts["ibot"] + values.gram_weight * parts.get("gram", 0.0)
        return loss + settings.koleo_weight * parts["koleo"] + settings.kde_weight * parts["kde"]

    def _spread(self, cls_ND: Tensor) -> Terms:
        """KoLeo and KDE of the class tokens, summed over the two global crops; never between two crops of a tile."""
        settings, nothing, crops = self.settings, cls_ND.new_zeros((), dtype=torch.float32), cls_ND.chunk(2)
        koleo = [losses.koleo_loss(crop_BD) for crop_BD in crops] if settings.koleo_weight else []
        kde = [losses.kde_loss(crop_BD, settings.kde_concentration) for crop_BD in crops] if settings.kde_weight else []
        return {"koleo": sum(koleo, nothing), "kde": sum(kde, nothing)}

    def _gram(self, seen: Tokens, inputs: Inputs) -> Tensor:
        """Patch similarities of the student against those of the anchor, which sees the crops larger and in plain colours."""
        assert self.anchor is not None and inputs.plain_images is not None
        factor, patch_px = self.settings.gram.scale, self.anchor.patch_px
        side = self.anchor.grid_side(inputs.plain_images.shape[-1])
        with torch.no_grad():
            px = max(side, round(side * factor)) * patch_px
            larger = functional.interpolate(inputs.plain_images, size=(px, px), mode="bicubic", antialias=False)
            patches_NPD = self.anchor.tokens(larger).patches_NPD
            grid = patches_NPD.mT.reshape(*patches_NPD.mT.shape[:2], px // patch_px, px // patch_px)
            anchor_NPD = functional.interpolate(grid.float(), size=(side, side), mode="bicubic").flatten(2).mT
        return losses.gram_loss(seen.patches_NPD, anchor_NPD)

    def _watched(self, parts: Terms, targets_VBK: Tensor, step: int) -> Terms:
        """The DINO loss is the teacher's entropy plus a divergence; and how many prototypes are in use."""
        with torch.no_grad():
            targets_NK = targets_VBK.flatten(0, 1)
            entropy = losses.mean_entropy(targets_NK)
            cross_entropy = parts["dino_global"] * (1 + self.settings.crops.local_count)
            used = self.prototype_use(targets_NK, step)
            numbers = (entropy, cross_entropy - entropy, perplexity_share(targets_NK), used)
            return dict(zip(WATCHED, numbers, strict=True))

    @torch.no_grad()
    def _targets(self, inputs: Inputs, temperature: float) -> tuple[Tensor, Tensor]:
        """Teacher distributions of the global crops [2, B, K] and of the patches hidden from the student [M, K]."""
        cls_ND, patches_NPD = self.teacher.backbone.tokens(inputs.global_images)
        logits_NK, patch_logits_MK = self.teacher.project(cls_ND, patches_NPD.flatten(0, 1)[inputs.masked_M])
        targets_NK = self._centred(logits_NK, self.center_dino, temperature)
        return targets_NK.view(2, -1, targets_NK.shape[1]), self._centred(patch_logits_MK, self.center_ibot, temperature)

    def _centred(self, logits_NK: Tensor, center: Center, temperature: float) -> Tensor:
        """Targets. Also without rows (nothing is masked here), since other processes may have some."""
        if self.settings.centering == "sinkhorn":
            return losses.sinkhorn_targets(logits_NK, temperature)
        targets_NK = losses.softmax_targets(logits_NK, center.mean_K, temperature)
        if self.training and self.settings.centering == "softmax":
            center.see(logits_NK)
        return targets_NK

    def end_step(self, momentum: float) -> None:
        """Moves the teacher, and the centres."""
        super().end_step(momentum)
        self.center_dino.move()
        self.center_ibot.move()

    @torch.no_grad()
    def refresh_anchor(self) -> None:
        """Makes the present teacher the Gram anchor, where there is one."""
        if self.anchor is not None:
            torch._foreach_copy_(local(self.anchor), local(self.teacher.backbone))


def local(module: nn.Module) -> list[Tensor]:
    """This process's part of every parameter (under FSDP2 a shard, else all of it)."""
    return [parameter.to_local() if hasattr(parameter, "to_local") else parameter for parameter in module.parameters()]
