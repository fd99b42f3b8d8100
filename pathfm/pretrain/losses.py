"""The losses of DINOv2 as plain functions, all in fp32.

DINO: Caron et al. 2021; iBOT: Zhou et al. 2022; Sinkhorn-Knopp centring: Caron et al. 2020 (SwAV); KoLeo: Sablayrolles et al.
2019; their composition: Oquab et al. 2023. Shapes: N rows, K prototypes, T teacher views, V student views, B images,
M masked patches, D features. In a process group, centres and Sinkhorn sums run over all processes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

CENTER_MOMENTUM = 0.9
SINKHORN_ITERATIONS = 3
KOLEO_EPSILON = 1e-8
TINY = 1e-30


def _reduce(value: Tensor, operation: str = "sum") -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value, op=dist.ReduceOp.MAX if operation == "max" else dist.ReduceOp.SUM)
    return value


def softmax_targets(logits_NK: Tensor, center_K: Tensor, temperature: float) -> Tensor:
    """Teacher distributions: centred, sharpened softmax. Returns [N, K]."""
    return functional.softmax((logits_NK.float() - center_K) / temperature, dim=-1)


def updated_center(center_K: Tensor, logits_NK: Tensor, momentum: float = CENTER_MOMENTUM) -> Tensor:
    """The moving average of the teacher's logits after one more batch. Targets of that batch use the centre before it."""
    total_K = _reduce(logits_NK.float().sum(dim=0))
    count = _reduce(torch.tensor(float(len(logits_NK)), device=logits_NK.device))
    return center_K * momentum + total_K / count * (1 - momentum)


def sinkhorn_targets(logits_NK: Tensor, temperature: float, iterations: int = SINKHORN_ITERATIONS) -> Tensor:
    """Teacher distributions in which every prototype gets the same share of the batch. Returns [N, K].

    The largest logit is taken off first: it cancels exactly, and without it large logits overflow.
    """
    scaled_NK = logits_NK.float() / temperature
    largest = _reduce(scaled_NK.max(), "max")
    shares_NK = torch.exp(scaled_NK - largest)
    prototypes = shares_NK.shape[1]
    rows = _reduce(torch.tensor(float(len(shares_NK)), device=shares_NK.device))
    shares_NK = shares_NK / _reduce(shares_NK.sum())
    for _ in range(iterations):
        shares_NK = shares_NK / _reduce(shares_NK.sum(dim=0, keepdim=True)).clamp_min(TINY) / prototypes
        shares_NK = shares_NK / shares_NK.sum(dim=1, keepdim=True).clamp_min(TINY) / rows
    return shares_NK * rows


def dino_loss(student_VBK: Tensor, targets_TBK: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of every student view against every teacher view, mean over images, summed over pairs."""
    log_student_VBK = functional.log_softmax(student_VBK.float() / temperature, dim=-1)
    return -(targets_TBK.sum(dim=0) * log_student_VBK).sum(dim=(0, 2)).mean()


def dino_loss_paired(student_VBK: Tensor, targets_VBK: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each student view against its own target (already swapped), mean over images, summed over views."""
    log_student_VBK = functional.log_softmax(student_VBK.float() / temperature, dim=-1)
    return -(targets_VBK * log_student_VBK).sum(dim=(0, 2)).mean()


def ibot_loss(student_MK: Tensor, targets_MK: Tensor, weight_M: Tensor, images: int, temperature: float) -> Tensor:
    """Cross-entropy on masked patches.

    Args:
        student_MK: logits of the masked patches.
        targets_MK: teacher distributions of the same patches, seen unmasked.
        weight_M: 1 / (masked patches of the patch's image).
        images: global crops in the batch, masked or not.
        temperature: of the student.
    """
    log_student_MK = functional.log_softmax(student_MK.float() / temperature, dim=-1)
    return -((targets_MK * log_student_MK).sum(dim=-1) * weight_M).sum() / images


def koleo_loss(features_BD: Tensor) -> Tensor:
    """Minus the mean log distance of each feature to its nearest neighbour on the unit sphere. Needs two rows or more."""
    with torch.autocast(features_BD.device.type, enabled=False):
        unit_BD = functional.normalize(features_BD.float(), dim=-1, eps=KOLEO_EPSILON)
        with torch.no_grad():
            similarity_BB = unit_BD @ unit_BD.T
            nearest_B = similarity_BB.fill_diagonal_(-1).argmax(dim=1)
        distance_B = functional.pairwise_distance(unit_BD, unit_BD[nearest_B], eps=KOLEO_EPSILON)
        return -torch.log(distance_B + KOLEO_EPSILON).mean()


def mean_entropy(targets_NK: Tensor) -> Tensor:
    """Mean entropy of distributions [nat]: log K is uniform collapse; near 0 with one prototype in use is mode collapse."""
    entropy_N: Tensor = torch.special.entr(targets_NK).sum(dim=-1)
    return entropy_N.mean()
