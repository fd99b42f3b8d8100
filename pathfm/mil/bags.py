"""Bags: the tiles of all slides of a unit (a patient, a specimen, a slide), read from a cache when they are needed.

Legend: B bags, N tiles of a bag, D feature length.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathfm.errors import StoreError
from pathfm.mil.feature_cache import FeatureCache, SlideFacts, encoder_identity

__all__ = ["Bag", "Bags", "check_same_encoder", "encoder_identity", "tile_places"]


class Bag(NamedTuple):
    """Tiles of a bag, slide after slide.

    Attributes:
        feature_ND: float16 or float32, as stored; never to be written to.
        xy_N2: float32, where they lie, in tile sides from the corner of their slide's tiles; slides lie side by side, one tile
            apart. Zeros where nothing says where tiles lie.
    """

    feature_ND: Tensor
    xy_N2: Tensor


class Bags:
    """Units over a cache; nothing is held here but where their tiles lie.

    Args:
        cache: has every slide of the units.
        units: slide_ids of each bag; their tiles follow each other in this order.

    Raises:
        StoreError: features of different lengths or encoders.
    """

    def __init__(self, cache: FeatureCache, units: Sequence[tuple[str, ...]]) -> None:
        self.cache, self.units = cache, tuple(units)
        check_same_encoder([facts for place in range(len(self)) for facts in self._facts(place)], "features")
        self.lengths = tuple(sum(map(len, self._facts(place))) for place in range(len(self)))
        self.dim = self._facts(0)[0].dim if self.units else 0

    def __len__(self) -> int:
        return len(self.units)

    def read(self, place: int) -> Bag:
        """The bag at a place."""
        parts = [self.cache.read(slide_id) for slide_id in self.units[place]]
        value_ND = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return Bag(torch.from_numpy(value_ND), torch.from_numpy(tile_places(self._facts(place))))

    def digest(self, place: int) -> str:
        """SHA-256 of the bag: of the digests of its slides' values, in their order, and of where their tiles lie."""
        digest = hashlib.sha256("\n".join(facts.digest for facts in self._facts(place)).encode())
        digest.update(tile_places(self._facts(place)).tobytes())
        return digest.hexdigest()

    def statistics(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [D], float32, over all tiles of bags; features that never vary get 1. Nothing is read."""
        slides = [facts for place in places for facts in self._facts(place)]
        count = sum(map(len, slides))
        mean_D = np.sum([facts.sum_D for facts in slides], axis=0) / count
        square_D = np.sum([facts.square_D for facts in slides], axis=0) / count
        scale_D = np.sqrt(np.maximum(square_D - mean_D**2, 0))
        scale_D = np.where(scale_D > 1e-6 * (1 + np.abs(mean_D)), scale_D, 1.0)
        return torch.from_numpy(mean_D).float(), torch.from_numpy(scale_D).float()

    def mean(self, place: int) -> NDArray[np.float64]:
        """Mean feature [D] of a bag. Nothing is read."""
        total_D: NDArray[np.float64] = np.sum([facts.sum_D for facts in self._facts(place)], axis=0)
        return total_D / self.lengths[place]

    def split(self, place: int, value_N: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Values per tile of a bag (first axis N), handed back to its slides."""
        ends = np.cumsum([len(facts) for facts in self._facts(place)])
        return dict(zip(self.units[place], np.split(value_N, ends[:-1]), strict=True))

    def _facts(self, place: int) -> list[SlideFacts]:
        return [self.cache.facts[slide_id] for slide_id in self.units[place]]


def tile_places(slides: Sequence[SlideFacts]) -> NDArray[np.float32]:
    """Where the tiles of a bag lie [N, 2], as ``Bag.xy_N2``."""
    parts, left = [], 0.0
    for facts in slides:
        if facts.xy_level0 is None or not len(facts):
            parts.append(np.zeros((len(facts), 2)))
            continue
        xy_N2 = (facts.xy_level0 - facts.xy_level0.min(axis=0)) / facts.tile_side_level0
        xy_N2[:, 0] += left
        parts.append(xy_N2)
        left = xy_N2[:, 0].max() + 2
    return np.concatenate(parts).astype(np.float32)


def check_same_encoder(slides: Iterable[SlideFacts], where: str) -> None:
    """Refuse to mix features of different encoders.

    Raises:
        StoreError: feature length or recipe differ, naming a slide that differs from most.
    """
    kinds: dict[tuple[int, tuple[tuple[str, str], ...]], list[str]] = {}
    for slide in slides:
        kinds.setdefault((slide.dim, tuple(sorted(slide.encoder.items()))), []).append(slide.slide_id)
    if len(kinds) < 2:
        return
    lengths = Counter(length for length, _ in kinds)
    odd = min(kinds.values(), key=lambda slide_ids: (len(slide_ids), slide_ids))
    what = (
        f"features of different lengths ({', '.join(map(str, sorted(lengths)))})"
        if len(lengths) > 1
        else "features of different encoders"
    )
    fix = "make the features of all slides anew, with one encoder"
    raise StoreError(f"{what}: {odd[0]} differs from most", where=where, fix=fix)
