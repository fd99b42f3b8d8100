"""What a training step and a set of features tell about the health of self-distillation: pure functions of tensors.

Everything returned is a tensor without gradient on the device of its arguments, so that no step waits for the device.
Shapes: N rows, K prototypes, D features, P patches of an image.

Sources: RankMe (Garrido et al. 2023); alignment and uniformity (Wang & Isola 2020);
outlier tokens (Darcet et al. 2023).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

EPSILON = 1e-7
"""Added to the normalised singular values of RankMe, as in the paper."""
OUTLIER_FACTOR = 5.0
"""A token is an outlier when its norm is more than so many times the median."""
NEVER = -(2**40)
"""Step at which a prototype was chosen that never was."""


@torch.no_grad()
def perplexity_share(targets_NK: Tensor) -> Tensor:
    """exp(entropy of the mean target) / K, the mean being taken over the rows of all processes."""
    total_K = targets_NK.float().sum(dim=0)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total_K)
    perplexity: Tensor = torch.special.entr(total_K / total_K.sum()).sum().exp()
    return perplexity / len(total_K)


class PrototypeUse(nn.Module):
    """Which share of the prototypes was some target's largest entry during the last steps; exact, in memory of K numbers.

    Args:
        prototypes: K.
        window: steps looked back, the present one included.
    """

    last_K: Tensor

    def __init__(self, prototypes: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.register_buffer("last_K", torch.full((prototypes,), NEVER, dtype=torch.int64))

    @torch.no_grad()
    def forward(self, targets_NK: Tensor, step: int) -> Tensor:
        """The share after one more step, whose targets are given; each process gives its own rows."""
        self.last_K[targets_NK.argmax(dim=-1)] = step
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.last_K, op=dist.ReduceOp.MAX)
        return (self.last_K > step - self.window).float().mean()


@torch.no_grad()
def relative_distance(teacher: Iterable[Tensor], student: Iterable[Tensor]) -> Tensor:
    """|teacher - student| / |student| over all parameters together."""
    pairs = list(zip(teacher, student, strict=True))
    apart = _norm(torch.stack([_norm(ours - theirs) for ours, theirs in pairs]))
    return apart / _norm(torch.stack([_norm(theirs) for _, theirs in pairs]))


def _norm(tensor: Tensor) -> Tensor:
    """Norm as a plain number, also of a parameter that is sharded over processes."""
    norm: Tensor = torch.linalg.vector_norm(tensor.float())
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


@torch.no_grad()
def rankme(features_ND: Tensor) -> Tensor:
    """Effective rank in [1, min(N, D)]: exp of the entropy of the normalised singular values. Wants N of several D."""
    values = torch.linalg.svdvals(features_ND.double())
    share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) + EPSILON
    rank: Tensor = torch.special.entr(share).sum().exp()
    return rank.float()


class TokenStatistics(NamedTuple):
    """What class and patch tokens [N, ...] of several images say.

    Attributes:
        cls_norm: mean norm of the class tokens.
        patch_norm: median norm of the patch tokens.
        outliers: share of patch tokens whose norm is above ``OUTLIER_FACTOR`` medians: registers are missing.
        patch_cosine: mean cosine between different patches of an image; 1: dense features have collapsed.
        cls_patch_cosine: mean cosine between the class token and the patches; rises as dense features decay.
        cls_cosine: mean cosine between class tokens of different images; 1: collapse.
    """

    cls_norm: Tensor
    patch_norm: Tensor
    outliers: Tensor
    patch_cosine: Tensor
    cls_patch_cosine: Tensor
    cls_cosine: Tensor


@torch.no_grad()
def token_statistics(cls_ND: Tensor, patches_NPD: Tensor) -> TokenStatistics:
    """Statistics of two images or more of two patches or more."""
    cls_ND, patches_NPD = cls_ND.float(), patches_NPD.float()
    norm_NP = torch.linalg.vector_norm(patches_NPD, dim=-1)
    median = norm_NP.median()
    unit_ND, unit_NPD = functional.normalize(cls_ND, dim=-1), functional.normalize(patches_NPD, dim=-1)
    return TokenStatistics(
        cls_norm=torch.linalg.vector_norm(cls_ND, dim=-1).mean(),
        patch_norm=median,
        outliers=(norm_NP > OUTLIER_FACTOR * median).float().mean(),
        patch_cosine=mean_cosine(unit_NPD).mean(),
        cls_patch_cosine=torch.einsum("nd,npd->np", unit_ND, unit_NPD).mean(),
        cls_cosine=mean_cosine(unit_ND),
    )


@torch.no_grad()
def mean_cosine(unit_ND: Tensor) -> Tensor:
    """Mean cosine between different rows of unit length, [..., N, D] -> [...]; no N x N matrix is made."""
    rows = unit_ND.shape[-2]
    together = unit_ND.sum(dim=-2).square().sum(dim=-1)
    return (together - unit_ND.square().sum(dim=(-2, -1))) / (rows * (rows - 1))


@torch.no_grad()
def alignment(first_ND: Tensor, second_ND: Tensor) -> Tensor:
    """Mean squared distance on the unit sphere between two views of the same images; 0: views do not matter."""
    first_ND, second_ND = functional.normalize(first_ND.float(), dim=-1), functional.normalize(second_ND.float(), dim=-1)
    return (first_ND - second_ND).square().sum(dim=-1).mean()


@torch.no_grad()
def uniformity(features_ND: Tensor) -> Tensor:
    """log mean exp(-2 |x - y|^2) over different rows on the unit sphere; 0: collapsed, -4 at most for a uniform sphere."""
    unit_ND = functional.normalize(features_ND.float(), dim=-1)
    square_pairs = torch.pdist(unit_ND).square()
    return torch.logsumexp(-2 * square_pairs, dim=0) - torch.log(torch.tensor(float(len(square_pairs)), device=unit_ND.device))
