"""From the bytes of tiles to what a network sees: resize, crop, normalise, all on the device.

Pillow sets the standard: it resizes rows, rounds to whole 8-bit levels, resizes columns and rounds again, and every recipe that
starts from a PIL image means this. On a CPU torch resizes bytes just so; on a GPU, where torch resizes floats only, both passes
are products with Pillow's weights, rounded here. From 256 to 224 px, by a CPU and a GPU, 0.3 % and 2.4 % of the values differ
from Pillow's (bilinear), 0.5 % and 0.02 % (bicubic), nearly all of them by one level of 255.

Shapes: B tiles, H x W pixels, C = 3 channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

PILLOW_ONE = 1 << 22
"""Pillow's weights are whole multiples of its inverse."""


class Preprocessing:
    """Resizes the whole tile, cuts the middle out, and normalises.

    Args:
        resize_px: side the whole tile is resized to [px].
        input_px: side of the middle that is kept [px].
        mean, std: of the channels, for values in 0..1.
        interpolation: bilinear or bicubic.
        antialias: whether the resize smooths before it shrinks.
    """

    def __init__(
        self,
        resize_px: int,
        input_px: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
        antialias: bool = True,
    ) -> None:
        self.resize_px, self.input_px = resize_px, input_px
        self._interpolation, self._antialias = interpolation, antialias
        mean_C, std_C = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
        self._factor = (1 / (255 * std_C)).float().view(1, 3, 1, 1)
        self._offset = (-mean_C / std_C).float().view(1, 3, 1, 1)

    def to(self, device: torch.device) -> Preprocessing:
        """The same, with its constants on a device: a copy per batch would make the device wait."""
        self._factor, self._offset = self._factor.to(device), self._offset.to(device)
        return self

    def __call__(self, tiles_BHWC: Tensor, enlarged: int = 1) -> Tensor:
        """Normalised images [B, C, s, s] float32 in channels-last order, s = ``enlarged`` x ``input_px``.

        Args:
            tiles_BHWC: RGB, uint8, on the device.
            enlarged: all sides are so many times as long; pixels come from the tile itself, never from a smaller resize.
        """
        images = resized(tiles_BHWC, enlarged * self.resize_px, self._interpolation, self._antialias)
        images = middle(images, enlarged * self.input_px)
        return torch.addcmul(self._offset, images.float(), self._factor)


def resized(tiles_BHWC: Tensor, side_px: int, interpolation: str, antialias: bool = True) -> Tensor:
    """Images [B, C, side, side] of whole levels 0..255, uint8 or float32; nothing is computed when sides agree."""
    images = tiles_BHWC.permute(0, 3, 1, 2)
    if images.shape[2:] == (side_px, side_px):
        return images
    if not antialias:
        return _levels(functional.interpolate(images.float(), size=(side_px, side_px), mode=interpolation))
    if images.device.type == "cpu":
        return functional.interpolate(images, size=(side_px, side_px), mode=interpolation, antialias=True)
    return resized_by_products(images, side_px, interpolation)


def resized_by_products(images_BCHW: Tensor, side_px: int, interpolation: str) -> Tensor:
    """As Pillow does it, in float32: rows, rounded, then columns, rounded [B, C, side, side]."""
    height, width = images_BCHW.shape[2:]
    across_sW = _weights(width, side_px, interpolation, images_BCHW.device)
    down_sH = _weights(height, side_px, interpolation, images_BCHW.device)
    return _levels(down_sH @ _levels(images_BCHW.float() @ across_sW.mT))


@lru_cache(maxsize=16)
def _weights(length: int, side_px: int, interpolation: str, device: torch.device) -> Tensor:
    """What each old pixel of a line adds to each new one [side, length], rounded as Pillow rounds its integers."""
    each_LL = torch.eye(length, dtype=torch.float64)[None, None]
    weights = functional.interpolate(each_LL, size=(side_px, length), mode=interpolation, antialias=True)[0, 0]
    return (weights * PILLOW_ONE).round().div(PILLOW_ONE).float().to(device)


def middle(images_BCHW: Tensor, side_px: int) -> Tensor:
    """The middle [B, C, side, side]; an odd rim is split as torchvision splits it."""
    top, left = (round((length - side_px) / 2) for length in images_BCHW.shape[2:])
    return images_BCHW[:, :, top : top + side_px, left : left + side_px]


def turns_and_flips(tiles_BHWC: Tensor) -> list[Tensor]:
    """The eight ways a square tile can lie (the dihedral group D4), itself first."""
    turned = [tiles_BHWC.rot90(quarters, (1, 2)) for quarters in range(4)]
    return turned + [view.flip(2) for view in turned]


def _levels(values: Tensor) -> Tensor:
    # Halves go up, as in Pillow; torch.round sends them to even numbers, and with sides like 256 and 224 halves are common.
    return values.add(0.5).floor_().clamp_(0, 255)
