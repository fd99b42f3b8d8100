"""Crops of a tile, cut in uint8 by the processor: a random box, resized, mirrored and turned.

Two ways to choose a box: around a crop's own size, so that nuclei keep theirs (ECT, Virchow2: Zimmermann et al. 2024), or as a
share of the tile, which zooms (RandomResizedCrop, as in DINOv2).
Shapes: L local crops, H = W pixels of a crop (h of a local one), C = 3 colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from pathfm.errors import UsageError
from pathfm.geometry import Box, scale_length
from pathfm.pretrain_settings import CropSettings, PretrainSettings

Pixels = npt.NDArray[np.uint8]

ROOM = 1.1
"""A tile is at least this much wider than crops whose scale is their own, so that crops differ in place too."""
TRIES = 10
AVERAGED = 1.25
"""Boxes that shrink by more than this are averaged by area; others are interpolated, which keeps them sharp."""
MIRROR_X, MIRROR_Y, TRANSPOSE = 1, 2, 4
SYMMETRIES = {"d4": range(8), "horizontal": range(2), "none": range(1)}
"""What crops are mirrored and turned by, as sums of the three above: transposed first, then mirrored."""
FLIP_CODE = {MIRROR_X: 1, MIRROR_Y: 0, MIRROR_X + MIRROR_Y: -1}


def fitting_crops(crops: CropSettings, tile_px: int, patch_px: int) -> CropSettings:
    """Crops that a tile has room for: the same, or when their scale is their own, the largest of whole patches that fit.

    Args:
        crops: what is asked for.
        tile_px: side of the stored tiles [px].
        patch_px: side of a patch of the backbone [px].

    Raises:
        UsageError: a crop is no whole number of patches, or not even two patches fit.
    """
    sides = {"global_px": crops.global_px} | ({"local_px": crops.local_px} if crops.local_count else {})
    for name, side in sides.items():
        if side % patch_px:
            fix = f"take {max(patch_px, side // patch_px * patch_px)} or {(side // patch_px + 1) * patch_px}"
            what = f"a crop of {side} px is no whole number of patches of {patch_px} px"
            raise UsageError(what, where=f"pretrain.crops.{name}", fix=fix)
    if crops.global_px < 2 * patch_px:
        what = f"a crop of {crops.global_px} px is one patch, and there is nothing to tell apart in it"
        raise UsageError(what, where="pretrain.crops.global_px", fix=f"take {2 * patch_px} or more")
    if crops.scale_of == "tile":
        return crops
    global_px = min(crops.global_px, _largest_px(tile_px, patch_px, crops.global_scale, crops.aspect))
    local_px = min(crops.local_px, _largest_px(tile_px, patch_px, crops.local_scale, crops.aspect))
    if global_px < crops.global_px:
        local_px = min(local_px, global_px)
    if global_px < 2 * patch_px or (crops.local_count and not local_px):
        what = f"tiles of {tile_px} px have no room for crops of even two patches of {patch_px} px"
        raise UsageError(what, where="pretrain.crops.global_px", fix="set pretrain.crops.scale_of: tile, or store larger tiles")
    return crops.model_copy(update={"global_px": global_px, "local_px": local_px or crops.local_px})


def larger_crops(settings: PretrainSettings, crops: CropSettings, tile_px: int, patch_px: int) -> CropSettings:
    """The crops of the high-resolution phase; ``crops``, those of the other steps, where there is no such phase.

    Args:
        settings: with ``high_resolution``, and the crops that were asked for.
        crops: of ``fitting_crops``.
        tile_px, patch_px: as there.

    Raises:
        UsageError: a crop is no whole number of patches, or tiles have no room for larger crops than ``crops``.
    """
    late = settings.high_resolution
    if late.start >= 1:
        return crops
    asked, place = settings.crops.model_copy(update={"global_px": late.global_px, "local_px": late.local_px}), "high_resolution"
    try:
        larger = fitting_crops(asked, tile_px, patch_px)
    except UsageError as error:
        raise UsageError(error.what, where=error.where.replace("crops", place), fix=error.fix) from error
    if larger.global_px <= crops.global_px:
        what = f"tiles of {tile_px} px have no room for crops of {late.global_px} px"
        fix = f"store larger tiles (tile.keep_px={math.ceil(late.global_px * ROOM - 1e-9)}), or set start to 1"
        if late.global_px <= crops.global_px:
            what, fix = f"crops of {late.global_px} px are not larger than those before it", "raise it, or set start to 1"
        raise UsageError(what, where=f"pretrain.{place}.global_px", fix=fix)
    return larger


def _largest_px(tile_px: int, patch_px: int, scale: tuple[float, float], aspect: tuple[float, float]) -> int:
    """Side of the largest crop of whole patches whose every box fits into a tile; 0: none."""
    longest = math.sqrt(scale[1] * max(aspect[1], 1 / aspect[0]))
    # 110 / (1.1 * 100) is a little less than 1 in binary.
    return patch_px * math.floor(tile_px / (max(ROOM, longest) * patch_px) + 1e-9)


def draw_box(
    side_px: int, of_px: int, scale: tuple[float, float], aspect: tuple[float, float], uniforms: Sequence[float]
) -> Box:
    """A box in a square: its area a share of ``of_px`` squared, its aspect log-uniform, its place uniform.

    The first of ten draws that fits is taken; when none does, the largest box with an allowed aspect, from the middle.

    Args:
        side_px: side of the square [px].
        of_px: side of what ``scale`` is a share of [px].
        scale: range of the area.
        aspect: range of width / height.
        uniforms: numbers in [0, 1): left, top, then area and aspect of each try.
    """
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for area, stretch in zip(uniforms[2::2], uniforms[3::2], strict=True):
        share, ratio = scale[0] + area * (scale[1] - scale[0]), math.exp(low + stretch * (high - low))
        width, height = scale_length(of_px, math.sqrt(share * ratio)), scale_length(of_px, math.sqrt(share / ratio))
        if width <= side_px and height <= side_px:
            left, top = math.floor(uniforms[0] * (side_px - width + 1)), math.floor(uniforms[1] * (side_px - height + 1))
            return Box(left, top, left + width, top + height)
    ratio = min(max(1.0, aspect[0]), aspect[1])
    width, height = scale_length(side_px, min(1.0, ratio)), scale_length(side_px, min(1.0, 1 / ratio))
    left, top = (side_px - width) // 2, (side_px - height) // 2
    return Box(left, top, left + width, top + height)


def cut(tile: Pixels, box: Box, symmetry: int, out_HHC: Pixels) -> None:
    """Writes a box of a tile to ``out_HHC``, resized to it, then transposed and mirrored as ``symmetry`` says."""
    part, out_px = tile[box.top : box.bottom, box.left : box.right], len(out_HHC)
    averaged = min(box.size) > AVERAGED * out_px
    cv2.resize(part, (out_px, out_px), dst=out_HHC, interpolation=cv2.INTER_AREA if averaged else cv2.INTER_CUBIC)
    if symmetry & TRANSPOSE:
        cv2.transpose(out_HHC, dst=out_HHC)
    if (mirror := symmetry % TRANSPOSE) in FLIP_CODE:
        cv2.flip(out_HHC, FLIP_CODE[mirror], dst=out_HHC)


def cut_views(
    tile: Pixels, crops: CropSettings, random: np.random.Generator, into: tuple[Pixels, Pixels] | None = None
) -> tuple[Pixels, Pixels]:
    """The global [2, H, H, C] and local crops [L, h, h, C] of a square tile [side, side, C].

    Args:
        tile: pixels.
        crops: sizes, scales, flips.
        random: everything drawn comes from here.
        into: arrays to fill and return, as slices of a batch; None: new ones. The last three axes are contiguous.
    """
    if into is None:
        shapes = (2, crops.global_px, crops.global_px, 3), (crops.local_count, crops.local_px, crops.local_px, 3)
        into = np.empty(shapes[0], np.uint8), np.empty(shapes[1], np.uint8)
    side_px, symmetries = len(tile), SYMMETRIES[crops.flips]
    scales = [crops.global_scale] * len(into[0]) + [crops.local_scale] * len(into[1])
    draws = random.random((len(scales), 1 + 2 + 2 * TRIES)).tolist()
    for out_HHC, scale, (symmetry, *uniforms) in zip([*into[0], *into[1]], scales, draws, strict=True):
        of_px = len(out_HHC) if crops.scale_of == "crop" else side_px
        box = draw_box(side_px, of_px, scale, crops.aspect, uniforms)
        cut(tile, box, symmetries[math.floor(symmetry * len(symmetries))], out_HHC)
    return into
