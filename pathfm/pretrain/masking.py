"""Which patches of which global crops the student does not see.

Blocks as in BEiT (Bao et al. 2021), the shares stratified over the batch as in DINOv2; single patches complete a mask to its
exact count as in DINOv3, so that equal ratios give equal counts.
Shapes: B tiles of a batch, R rows asked for, P patches of a crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pathfm.geometry import scale_length
from pathfm.pretrain_settings import PretrainSettings

Mask = npt.NDArray[np.bool_]

MIN_BLOCK = 4
MAX_SHARE_OF_BLOCK = 0.5
LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
TRIES_PER_BLOCK = 10


def block_mask(grid_side: int, count: int, random: np.random.Generator) -> Mask:
    """Blocks of at least four patches until ``count`` is near, then single patches. [side, side], ``count`` True (hidden)."""
    mask = np.zeros((grid_side, grid_side), dtype=bool)
    while (missing := count - int(mask.sum())) >= MIN_BLOCK:
        if not _add_block(mask, min(missing, math.floor(MAX_SHARE_OF_BLOCK * mask.size)), random):
            break
    visible = np.flatnonzero(~mask)
    mask.flat[random.permutation(visible)[: count - int(mask.sum())]] = True
    return mask


def _add_block(mask: Mask, largest: int, random: np.random.Generator) -> bool:
    """Hides one block that adds between 1 and ``largest`` patches; False when none was found in ten draws."""
    side = len(mask)
    for _ in range(TRIES_PER_BLOCK):
        area = random.uniform(MIN_BLOCK, max(MIN_BLOCK, largest))
        aspect = math.exp(random.uniform(*LOG_ASPECT))
        height, width = scale_length(math.sqrt(area), math.sqrt(aspect)), scale_length(math.sqrt(area), math.sqrt(1 / aspect))
        if max(height, width) >= side or height * width < MIN_BLOCK:
            continue
        top, left = random.integers(side - height + 1), random.integers(side - width + 1)
        block = mask[top : top + height, left : left + width]
        if 0 < block.size - int(block.sum()) <= largest:
            block[...] = True
            return True
    return False


def batch_masks(settings: PretrainSettings, grid_side: int, rows: Sequence[int], key: tuple[int, ...]) -> Mask:
    """Masks of some global crops of a batch; a row depends on ``key`` and its number only, not on which others are asked for.

    Exactly ``floor(2B * mask_probability)`` of all 2B crops are masked; the i-th of them hides a share drawn from the i-th of
    equal slices of ``mask_ratio`` (at least one patch); which crops these are is drawn without replacement.

    Args:
        settings: batch_size (B), mask_probability, mask_ratio.
        grid_side: patches along a side.
        rows: numbers of global crops, view * B + sample.
        key: what the draw depends on, as (seed, step).

    Returns:
        [R, P], True is hidden.
    """
    crops, patches, (low, high) = 2 * settings.batch_size, grid_side * grid_side, settings.mask_ratio
    # Numbered after the last crop: numpy seeds (a, b, c) and (a, b, c, 0) alike, so that a bare key would be crop 0's.
    random = np.random.default_rng((*key, crops))
    chosen = random.permutation(crops)[: math.floor(crops * settings.mask_probability)]
    shares = low + (high - low) * (np.arange(len(chosen)) + random.random(len(chosen))) / max(1, len(chosen))
    counts = dict(zip(chosen.tolist(), np.maximum(1, np.floor(patches * shares)).astype(int).tolist(), strict=True))
    masks_RP = np.zeros((len(rows), patches), dtype=bool)
    for place, crop in enumerate(rows):
        if crop in counts:
            masks_RP[place] = block_mask(grid_side, counts[crop], np.random.default_rng((*key, crop))).reshape(-1)
    return masks_RP
