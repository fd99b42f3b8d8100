"""Batches of bags, and augmentation of their features in training: mixed statistics, mixed bags, silenced channels, noise.

Mixing two bags by a Beta law: Zhang et al., mixup (ICLR 2018), here by the share of the tiles each gives, as bags differ in
length. Mixing channel statistics: Zhou et al., MixStyle (ICLR 2021), with its Beta(0.1, 0.1).

Legend: B bags, N tiles of a bag, D feature length, R judged rows (each bag once; twice when bags are mixed).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pathfm.mil.projection import Stretch
from pathfm.mil_settings import AugmentSettings

STYLE_ALPHA = 0.1
TINY = 1e-6


class Batch(NamedTuple):
    """Bags that make up one step.

    Attributes:
        stretches: tiles of the bags, bag after bag; a mixed bag has two stretches.
        lengths: tiles of each bag.
        place_R: places of the targets by which the bags are judged: of all bags, then (if mixed) of what was mixed into each.
        share_R: how much each judgement counts; a bag's shares add up to 1.
    """

    stretches: tuple[Stretch, ...]
    lengths: tuple[int, ...]
    place_R: tuple[int, ...]
    share_R: tuple[float, ...]


def make_batch(stretches: Sequence[Stretch], places: Sequence[int]) -> Batch:
    """Bags as they are."""
    lengths = tuple(len(stretch.rest_ND) for stretch in stretches)
    return Batch(tuple(stretches), lengths, tuple(places), (1.0,) * len(places))


def is_active(settings: AugmentSettings) -> bool:
    """Whether anything would be changed."""
    return any((settings.noise, settings.dropout, settings.mixup, settings.statistics))


def augment(batch: Batch, settings: AugmentSettings, mean_D: Tensor, scale_D: Tensor, draw: torch.Generator) -> Batch:
    """A changed copy of a batch of unmixed bags; partners are other bags of the batch (of a bag alone: itself).

    Args:
        batch: from ``make_batch``.
        settings: what to do, and how much.
        mean_D: mean of the training tiles, which silenced channels have.
        scale_D: their standard deviation, the unit of the noise.
        draw: CPU generator, the source of all chance.
    """
    stretches = list(batch.stretches)
    if settings.statistics:
        stretches = _mix_statistics(stretches, settings.statistics, draw)
    mixed = batch._replace(stretches=tuple(stretches))
    if settings.mixup:
        mixed = _mix_bags(mixed, settings.mixup, draw)
    return mixed._replace(stretches=tuple(_disturb(stretch, settings, mean_D, scale_D, draw) for stretch in mixed.stretches))


def _mix_statistics(stretches: list[Stretch], chance: float, draw: torch.Generator) -> list[Stretch]:
    """Some bags get means and deviations of their channels between their own and those of a partner."""
    partners = _partners(len(stretches), draw)
    facts = [(s.centre_D + s.rest_ND.float().mean(0), s.rest_ND.float().std(0, correction=0)) for s in stretches]
    mixed = []
    for stretch, own, partner in zip(stretches, facts, partners, strict=True):
        share, is_mixed = _beta(STYLE_ALPHA, draw), _uniform(draw) < chance
        if not is_mixed:
            mixed.append(stretch)
            continue
        mean_D, deviation_D = (share * mine + (1 - share) * theirs for mine, theirs in zip(own, facts[partner], strict=True))
        # A channel that does not vary in this bag has nothing that could be stretched.
        gain_D = torch.where(own[1] > TINY, deviation_D / own[1].clamp_min(TINY), 1.0)
        rest_ND = (stretch.rest_ND.float() - (own[0] - stretch.centre_D)) * gain_D
        mixed.append(Stretch(rest_ND.to(stretch.rest_ND.dtype), mean_D, stretch.xy_N2))
    return mixed


def _mix_bags(batch: Batch, alpha: float, draw: torch.Generator) -> Batch:
    """Each bag keeps the larger share of its tiles, and gets the rest of the share from those of a partner."""
    partners = _partners(len(batch.lengths), draw)
    stretches: list[Stretch] = []
    lengths, shares = [], []
    for own, partner in enumerate(partners):
        share = _beta(alpha, draw)
        share = max(share, 1 - share)
        theirs = _some(batch.stretches[partner], math.floor((1 - share) * batch.lengths[partner]), draw)
        mine = _some(batch.stretches[own], math.ceil(share * batch.lengths[own]), draw)
        stretches += [mine, theirs]
        lengths.append(len(mine.rest_ND) + len(theirs.rest_ND))
        shares.append(share)
    place_R = batch.place_R + tuple(batch.place_R[partner] for partner in partners)
    return Batch(tuple(stretches), tuple(lengths), place_R, (*shares, *(1 - share for share in shares)))


def _disturb(stretch: Stretch, settings: AugmentSettings, mean_D: Tensor, scale_D: Tensor, draw: torch.Generator) -> Stretch:
    """Silences channels, then adds noise to the others."""
    rest_ND, centre_D = stretch.rest_ND, stretch.centre_D
    kept_D = (torch.rand(len(centre_D), generator=draw) >= settings.dropout).to(centre_D.device)
    if settings.noise:
        noise_ND = torch.randn(rest_ND.shape, generator=draw).to(centre_D.device)
        rest_ND = (rest_ND.float() + noise_ND * (settings.noise * scale_D)).to(rest_ND.dtype)
    if settings.dropout:
        rest_ND, centre_D = rest_ND * kept_D, torch.where(kept_D, centre_D, mean_D)
    return Stretch(rest_ND, centre_D, stretch.xy_N2)


def _partners(count: int, draw: torch.Generator) -> list[int]:
    """For each bag another one, each chosen once: neighbours in a drawn circle."""
    circle = torch.randperm(count, generator=draw).tolist()
    partner_of = dict(zip(circle, circle[1:] + circle[:1], strict=True))
    return [partner_of[own] for own in range(count)]


def _some(stretch: Stretch, count: int, draw: torch.Generator) -> Stretch:
    """So many of the tiles, drawn."""
    rows = torch.randperm(len(stretch.rest_ND), generator=draw)[:count].sort().values
    return stretch.rows(rows.to(stretch.rest_ND.device))


def _beta(alpha: float, draw: torch.Generator) -> float:
    """A draw from Beta(alpha, alpha), for which the tensor library takes no generator."""
    seed = int(torch.randint(2**62, (), generator=draw))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def _uniform(draw: torch.Generator) -> float:
    return float(torch.rand((), generator=draw, dtype=torch.float64))
