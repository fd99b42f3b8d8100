"""Features of slides and of the bags they make up. Files are read once; the order of a table plays no role.

Legend: N tiles, D feature length.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathfm.errors import StoreError
from pathfm.mil.roster import Unit
from pathfm.store.feature_file import open_features


@dataclass(frozen=True)
class SlideFeatures:
    """Features of one slide, checked.

    Attributes:
        slide_id: the slide.
        feature_ND: float16 or float32, as stored.
        xy_level0: upper left corners of the tiles [N, 2] in level-0 pixels.
        encoder: what made the features; equal for features that may be mixed.
        digest: SHA-256 over the values.
    """

    slide_id: str
    feature_ND: NDArray[np.floating]
    xy_level0: NDArray[np.int64]
    encoder: Mapping[str, str]
    digest: str


def read_slide(path: Path) -> SlideFeatures:
    """Reads and checks one feature file.

    Raises:
        StoreError: absent, damaged, foreign, or a value that is not finite.
    """
    file = open_features(path)
    if not file.valid.all():
        unread = int((~file.valid).sum())
        fix = "tile the slide with tile.filters.measure=true, which leaves them out"
        raise StoreError(f"{unread} of its tiles could not be read", where=str(path), fix=fix)
    digest = hashlib.sha256(file.features.tobytes())
    digest.update(f"{file.features.dtype}{file.features.shape}".encode())
    return SlideFeatures(path.stem, file.features, file.coords, encoder_identity(file.attrs), digest.hexdigest())


NO_MATTER = ("recipe_encoder", "recipe_card", "recipe_hash", "recipe_arithmetic", "recipe_compiled")
"""What of a recipe may differ between machines: the name of a folder, and the ways to compute in half precision, all of which
keep ``extract.min_fidelity``."""


def encoder_identity(attrs: Mapping[str, object]) -> dict[str, str]:
    """What must agree before features of two files are mixed: the recipe, with the weights' hash in place of their name."""
    recipe = {name: str(value) for name, value in attrs.items() if name.startswith("recipe_")}
    if "recipe_weights_sha256" in recipe:
        for name in NO_MATTER:
            recipe.pop(name, None)
    return recipe


def check_same_encoder(slides: Iterable[SlideFeatures], where: str) -> None:
    """Refuse to mix features of different encoders.

    Raises:
        StoreError: feature length or recipe differ, naming a slide that differs from most.
    """
    kinds: dict[tuple[int, tuple[tuple[str, str], ...]], list[str]] = {}
    for slide in slides:
        kinds.setdefault((slide.feature_ND.shape[1], tuple(sorted(slide.encoder.items()))), []).append(slide.slide_id)
    if len(kinds) < 2:
        return
    lengths = Counter(length for length, _ in kinds)
    odd = min(kinds.values(), key=lambda slide_ids: (len(slide_ids), slide_ids))
    what = (
        f"features of different lengths ({', '.join(map(str, sorted(lengths)))})"
        if len(lengths) > 1
        else "features of different encoders"
    )
    raise StoreError(f"{what}: {odd[0]} differs from most", where=where, fix="run `pathfm extract` again for all slides")


def make_bag(unit: Unit, slides: Mapping[str, SlideFeatures]) -> Tensor:
    """Features [N, D] of all tiles of a unit, slide after slide in the order of ``slide_ids``."""
    parts = [slides[slide_id].feature_ND for slide_id in unit.slide_ids]
    return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))


def split_by_slide(
    unit: Unit, slides: Mapping[str, SlideFeatures], value_N: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Values per tile of a bag, handed back to its slides."""
    ends = np.cumsum([len(slides[slide_id].feature_ND) for slide_id in unit.slide_ids])
    return dict(zip(unit.slide_ids, np.split(value_N, ends[:-1]), strict=True))


def tile_statistics(bags: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D] over all tiles of the given (training) bags; features that never vary get 1."""
    count, total, square = 0, torch.zeros(()), torch.zeros(())
    for bag in bags:
        value_ND = bag.double()
        count, total, square = count + len(bag), total + value_ND.sum(0), square + value_ND.square().sum(0)
    mean = total / count
    deviation = (square / count - mean.square()).clamp_min(0).sqrt()
    return mean.float(), torch.where(deviation > 1e-6 * (1 + mean.abs()), deviation, 1.0).float()
