"""Which patches of which global crops the student does not see.

Blocks as in BEiT (Bao et al. 2021), the shares stratified over the batch as in DINOv2; random patches complete a mask to its
exact count as in DINOv3, so that equal ratios give equal counts. Shapes: C global crops, P patches of a crop.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from pathfm.geometry import scale_length

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
        if height >= side or width >= side:
            continue
        top, left = random.integers(side - height + 1), random.integers(side - width + 1)
        block = mask[top : top + height, left : left + width]
        if 0 < block.size - int(block.sum()) <= largest:
            block[...] = True
            return True
    return False


def batch_masks(
    crops: int, grid_side: int, probability: float, ratio: tuple[float, float], key: tuple[int, ...]
) -> npt.NDArray[np.bool_]:
    """Masks of a batch of global crops, a pure function of ``key``.

    Exactly ``floor(crops * probability)`` crops are masked; the i-th of them hides a share drawn from the i-th of equal slices
    of ``ratio`` (at least one patch); which crops these are is drawn without replacement.

    Args:
        crops: global crops in the batch.
        grid_side: patches along a side.
        probability: share of crops that are masked.
        ratio: smallest and largest share of hidden patches.
        key: what the draw depends on, as (seed, step).

    Returns:
        [C, P], True is hidden.
    """
    masks_CP = np.zeros((crops, grid_side * grid_side), dtype=bool)
    masked = math.floor(crops * probability)
    chosen = np.random.default_rng(key).permutation(crops)[:masked]
    bounds = np.linspace(*ratio, masked + 1)
    for order, crop in enumerate(chosen.tolist()):
        random = np.random.default_rng((*key, crop))
        count = max(1, math.floor(masks_CP.shape[1] * random.uniform(bounds[order], bounds[order + 1])))
        masks_CP[crop] = block_mask(grid_side, count, random).reshape(-1)
    return masks_CP
