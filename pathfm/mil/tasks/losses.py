"""What losses share: a mean over the bags that have a target, and chains of steps.

Legend: B bags, K steps.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from pathfm.mil.tasks.contract import Floats

TINY = 1e-12


def weighted_mean(loss_B: Tensor, weight_B: Tensor, known_B: Tensor) -> Tensor:
    """Mean of weight x loss over the bags that are known; 0 with a gradient of 0 when none is.

    Not over the sum of their weights: weights have mean 1 over a whole part, and in a batch of one bag would cancel.
    """
    weight_B = torch.where(known_B, weight_B, 0.0).to(loss_B.dtype)
    return (torch.where(known_B, loss_B, 0.0) * weight_B).sum() / known_B.sum().clamp_min(1)


def chain_loss(stop_BK: Tensor, passed_B: Tensor, stopped_B: Tensor) -> Tensor:
    """Negative log-likelihood [B] of bags that pass ``passed`` steps and then, where ``stopped``, stop at the next.

    ``stop_BK`` are the logits of stopping at a step that is reached. This is the likelihood of CORN (Shi et al. 2021) for
    grades, and of discrete hazards (Gensheimer and Narasimhan 2019) for times.
    """
    step_K = torch.arange(stop_BK.shape[1], device=stop_BK.device)
    passes_BK = step_K < passed_B[:, None]
    stops_BK = (step_K == passed_B[:, None]) & stopped_B[:, None]
    return (torch.where(passes_BK, softplus(stop_BK), 0.0) + torch.where(stops_BK, softplus(-stop_BK), 0.0)).sum(1)


def log_passing(stop_BK: Floats) -> Floats:
    """Log chance [B, K] of passing each step that is reached."""
    return -np.logaddexp(0.0, stop_BK)


def balanced(label_F: Floats) -> Floats:
    """Weights [F] with which every class that is present counts the same; mean 1 over the labelled, 1 for all others."""
    weight = np.ones(len(label_F))
    known = ~np.isnan(label_F)
    present, place, count = np.unique(label_F[known], return_inverse=True, return_counts=True)
    weight[known] = known.sum() / (max(1, len(present)) * count[place])
    return weight
