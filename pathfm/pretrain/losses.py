"""The losses of self-distillation as plain functions. float64 stays float64; everything else is computed in float32.

DINO: Caron et al. 2021; iBOT: Zhou et al. 2022; Sinkhorn-Knopp centring: Caron et al. 2020 (SwAV); KoLeo: Sablayrolles et al.
2019; KDE: Zimmermann et al. 2024 (Virchow2); Gram anchoring: Simeoni et al. 2025 (DINOv3); composition: Oquab et al. 2023.
Shapes: N rows, K prototypes, T teacher views, V student views, B images, M masked patches, P patches, D features. In a process
group, centres and Sinkhorn sums run over all processes, whose numbers of rows may differ; KoLeo and KDE compare the rows of
all processes, of which each holds as many. Every function returns a value whose mean over the processes is what one process
with all rows would return, with gradients of which the same holds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pathfm.pretrain.processes import gather_rows, max_over_processes, sum_over_processes

Context: TypeAlias = Any
"""What autograd hands to a function; torch gives it no type."""
CENTER_MOMENTUM = 0.9
SINKHORN_ITERATIONS = 3
KOLEO_EPSILON = 1e-8
KOLEO_CLOSEST = 1e-6
"""Unit vectors closer than this differ by rounding alone (float32); the direction between them says nothing."""
TINY = 1e-30
PIECE = {"cpu": 2**18}
"""Logits worked on at a time: what the cache of a core holds. Other devices want few, large pieces."""
LARGE_PIECE = 2**26


@torch.no_grad()
def softmax_targets(logits_NK: Tensor, center_K: Tensor, temperature: float) -> Tensor:
    """Teacher distributions: centred, sharpened softmax. Returns [N, K]."""
    targets_NK = torch.empty_like(logits_NK, dtype=_wide(logits_NK.dtype))
    for piece in _pieces(logits_NK):
        torch.softmax((_widened(logits_NK[piece]) - center_K) / temperature, dim=-1, out=targets_NK[piece])
    return targets_NK


def sum_of_rows(logits_NK: Tensor) -> Tensor:
    """The sum of logits over rows [K]: what ``moved_center`` wants, without a wide copy of all of them."""
    total_K = logits_NK.new_zeros(logits_NK.shape[1], dtype=_wide(logits_NK.dtype))
    for piece in _pieces(logits_NK):
        total_K += logits_NK[piece].sum(dim=0, dtype=total_K.dtype)
    return total_K


def moved_center(center_K: Tensor, total_K: Tensor, count: int, momentum: float = CENTER_MOMENTUM) -> Tensor:
    """The moving average of the teacher's logits after one more step. Targets of that step use the centre before it.

    Without a row on any process it stays where it is.

    Args:
        center_K: before.
        total_K: sum of this process's logits of the step.
        count: rows in that sum.
        momentum: share of the old centre.
    """
    everything_K = sum_over_processes(total_K)
    rows = sum_over_processes(everything_K.new_tensor(float(count)))
    moved_K = center_K * momentum + everything_K / rows.clamp_min(1) * (1 - momentum)
    return torch.where(rows > 0, moved_K, center_K)


def sinkhorn_targets(logits_NK: Tensor, temperature: float, iterations: int = SINKHORN_ITERATIONS) -> Tensor:
    """Teacher distributions in which every prototype gets the same share of the batch. Returns [N, K].

    All processes must call it, also one without rows. What is alternately scaled are the rows and columns of
    exp(logits / temperature), kept apart from the matrix: a scaling is then a product with a vector, which reads the matrix
    once and writes nothing. The largest logit of each row is taken off before exp and put back into the row's factor, so that
    no logit overflows and no row vanishes.
    """
    with torch.no_grad(), torch.autocast(logits_NK.device.type, enabled=False):
        shares_NK, largest_N = _exponentials(logits_NK, temperature)
        largest = max_over_processes(torch.cat([largest_N, largest_N.new_full((1,), -torch.inf)]).max())
        count = sum_over_processes(largest_N.new_tensor(float(len(logits_NK)))).clamp_min(1)
        row_N = torch.exp(largest_N - largest)
        for rounds_left in reversed(range(iterations)):
            column_K = 1 / (sum_over_processes(shares_NK.T @ row_N).clamp_min(TINY) * shares_NK.shape[1])
            if rounds_left:
                row_N = 1 / ((shares_NK @ column_K).clamp_min(TINY) * count)
        for piece in _pieces(shares_NK):  # the last rows are scaled by sums that round less than a product with a vector
            shares_RK = shares_NK[piece].mul_(column_K)
            shares_RK.div_(shares_RK.sum(dim=1, keepdim=True).clamp_min(TINY))
        return shares_NK


def _exponentials(logits_NK: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """exp(logits / temperature - the largest of the row) [N, K], not below the smallest normal number, and the largest [N]."""
    shares_NK = torch.empty_like(logits_NK, dtype=_wide(logits_NK.dtype))
    largest_N, smallest = shares_NK.new_empty(len(shares_NK)), math.log(torch.finfo(shares_NK.dtype).tiny)
    for piece in _pieces(logits_NK):
        shares_RK = torch.div(_widened(logits_NK[piece]), temperature, out=shares_NK[piece])
        largest_N[piece] = shares_RK.amax(dim=1)
        shares_RK.sub_(largest_N[piece].unsqueeze(1)).clamp_min_(smallest).exp_()
    return shares_NK, largest_N


def dino_loss(student_VBK: Tensor, targets_TBK: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of every student view against every teacher view, mean over images, summed over pairs."""
    return dino_loss_paired(student_VBK, targets_TBK.sum(dim=0).expand(len(student_VBK), -1, -1), temperature)


def dino_loss_paired(student_VBK: Tensor, targets_VBK: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each student view against its own target (already swapped), mean over images, summed over views."""
    views, images, _ = student_VBK.shape
    weight_VB = targets_VBK.new_full((views, images), 1 / images)
    return _cross_entropy(student_VBK, targets_VBK, weight_VB, temperature)


def ibot_loss(student_MK: Tensor, targets_MK: Tensor, weight_M: Tensor, images: int, temperature: float) -> Tensor:
    """Cross-entropy on masked patches; 0 when there are none.

    Args:
        student_MK: logits of the masked patches.
        targets_MK: teacher distributions of the same patches, seen unmasked.
        weight_M: 1 / (masked patches of the patch's image).
        images: global crops in the batch, masked or not.
        temperature: of the student.
    """
    return _cross_entropy(student_MK[None], targets_MK[None], weight_M[None] / images, temperature)


def _cross_entropy(student_VNK: Tensor, targets_VNK: Tensor, weight_VN: Tensor, temperature: float) -> Tensor:
    wide = _wide(student_VNK.dtype)
    loss: Tensor = _CrossEntropy.apply(student_VNK, targets_VNK.to(wide), weight_VN.to(wide), temperature)
    return loss


class _CrossEntropy(torch.autograd.Function):
    """Weighted sum of -sum_k p log softmax(z / T), whose gradient is that of z only: w (mass softmax(z / T) - p) / T.

    Written out because a log-softmax over many prototypes keeps several float32 matrices of the size of all logits; this keeps
    the logits as they came and a few numbers per row, and works on pieces that stay in the cache.
    """

    @staticmethod
    def forward(ctx: Context, student_VNK: Tensor, targets_VNK: Tensor, weight_VN: Tensor, temperature: float) -> Tensor:
        largest_VN, total_VN, mass_VN, dot_VN = (torch.empty_like(weight_VN) for _ in range(4))
        for piece in _pieces(student_VNK):
            scaled_RK, targets_RK = _widened(student_VNK[piece]) / temperature, targets_VNK[piece]
            largest_VN[piece] = scaled_RK.amax(dim=-1)
            scaled_RK.sub_(largest_VN[piece].unsqueeze(-1))
            mass_VN[piece] = targets_RK.sum(dim=-1)
            dot_VN[piece] = (targets_RK * scaled_RK).sum(dim=-1)
            total_VN[piece] = scaled_RK.exp_().sum(dim=-1)
        ctx.temperature = temperature
        ctx.save_for_backward(student_VNK, targets_VNK, weight_VN, largest_VN, mass_VN / total_VN)
        return (weight_VN * (mass_VN * total_VN.log() - dot_VN)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        student_VNK, targets_VNK, weight_VN, largest_VN, share_VN = ctx.saved_tensors
        gradient_VNK, scale_VN = torch.empty_like(student_VNK), weight_VN * (gradient / ctx.temperature)
        for piece in _pieces(student_VNK):
            softmax_RK = _widened(student_VNK[piece]) / ctx.temperature
            softmax_RK.sub_(largest_VN[piece].unsqueeze(-1)).exp_().mul_(share_VN[piece].unsqueeze(-1))
            gradient_VNK[piece] = softmax_RK.sub_(targets_VNK[piece]).mul_(scale_VN[piece].unsqueeze(-1))
        return gradient_VNK, None, None, None


def koleo_loss(features_BD: Tensor) -> Tensor:
    """Minus the mean log distance of each feature to its nearest neighbour on the unit sphere, over all processes.

    Features closer than ``KOLEO_CLOSEST`` count as that far apart and get no gradient. A single row has no neighbour: 0.
    """
    with torch.autocast(features_BD.device.type, enabled=False):
        unit_BD = functional.normalize(_widened(features_BD), dim=-1, eps=KOLEO_EPSILON)
        all_ND, first = gather_rows(unit_BD)
        if len(all_ND) < 2:
            return 0 * unit_BD.sum()
        with torch.no_grad():
            nearest_B = _without_self(unit_BD @ all_ND.T, first, -2.0).argmax(dim=1)
        distance_B = functional.pairwise_distance(unit_BD, all_ND[nearest_B], eps=KOLEO_EPSILON)
        return -torch.log(distance_B.clamp_min(KOLEO_CLOSEST) + KOLEO_EPSILON).mean()


def kde_loss(features_BD: Tensor, concentration: float) -> Tensor:
    """Mean log density of the features under a von Mises-Fisher kernel estimate made of all others, over all processes.

    That is mean_i log mean_{j != i} exp(concentration cos_ij): the lower, the further spread. A single row has no others: 0.
    """
    with torch.autocast(features_BD.device.type, enabled=False):
        unit_BD = functional.normalize(_widened(features_BD), dim=-1, eps=KOLEO_EPSILON)
        all_ND, first = gather_rows(unit_BD)
        if len(all_ND) < 2:
            return 0 * unit_BD.sum()
        kernel_BN = _without_self(concentration * (unit_BD @ all_ND.T), first, -torch.inf)
        return (torch.logsumexp(kernel_BN, dim=1) - kernel_BN.new_tensor(len(all_ND) - 1.0).log()).mean()


def _without_self(similarity_BN: Tensor, first: int, value: float) -> Tensor:
    """Similarities of rows ``first``, ``first`` + 1, ... to all rows, with ``value`` in place of each row's to itself."""
    rows_B1 = torch.arange(first, first + len(similarity_BN), device=similarity_BN.device)[:, None]
    return similarity_BN.scatter(1, rows_B1, value)


def gram_loss(student_NPD: Tensor, anchor_NPD: Tensor, negatives: Literal["keep", "clip", "clip_anchor"] = "keep") -> Tensor:
    """Mean squared difference of the patch-to-patch cosines of each image.

    Args:
        student_NPD: patch features.
        anchor_NPD: patch features of the anchor; no gradient.
        negatives: keep negative cosines (as DINOv3 is trained), clip both sides' at 0, or clip the anchor's alone.
    """
    with torch.autocast(student_NPD.device.type, enabled=False):
        student_NPP, anchor_NPP = _cosines(student_NPD), _cosines(anchor_NPD.detach())
        if negatives != "keep":
            anchor_NPP = anchor_NPP.clamp_min(0)
        if negatives == "clip":
            student_NPP = student_NPP.clamp_min(0)
        return functional.mse_loss(student_NPP, anchor_NPP)


def _cosines(features_NPD: Tensor) -> Tensor:
    unit_NPD = functional.normalize(_widened(features_NPD), dim=-1)
    return unit_NPD @ unit_NPD.mT


def feature_loss(student_ND: Tensor, teacher_ND: Tensor, cosine_share: float = 0.9) -> Tensor:
    """How far features are from those of a frozen teacher: 0.9 of 1 - cosine and 0.1 of smooth L1, mean over rows.

    As AM-RADIO matches spatial features (Ranzinger et al. 2024): direction is what features are used for, and the rest keeps
    their lengths alike. The teacher gets no gradient.
    """
    with torch.autocast(student_ND.device.type, enabled=False):
        student_ND, teacher_ND = _widened(student_ND), _widened(teacher_ND.detach())
        angle = 1 - functional.cosine_similarity(student_ND, teacher_ND, dim=-1).mean()
        return cosine_share * angle + (1 - cosine_share) * functional.smooth_l1_loss(student_ND, teacher_ND)


def mean_entropy(targets_NK: Tensor) -> Tensor:
    """Mean entropy of distributions [nat]: log K is uniform collapse; near 0 with one prototype in use is mode collapse."""
    entropy_N: Tensor = torch.special.entr(targets_NK).sum(dim=-1)
    return entropy_N.mean()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _widened(values: Tensor) -> Tensor:
    return values.to(_wide(values.dtype))


def _pieces(logits: Tensor) -> Iterator[tuple[int | slice, ...]]:
    """Indices of groups of rows of [N, K] or [V, N, K] logits, worked on one after another. No row depends on another."""
    *views, count, prototypes = logits.shape
    rows = max(1, PIECE.get(logits.device.type, LARGE_PIECE) // prototypes)
    slices = [slice(start, start + rows) for start in range(0, count, rows)]
    return itertools.product(*map(range, views), slices)
