"""Colour of the crops: drawn per sample, applied to whole batches on the training device.

Brightness, contrast, saturation, hue and grey are one affine map of RGB per image; the stain jitter is one affine map of
optical density per image; the blur is a Gaussian along each side. ``docs/pretrain-views.md`` compares them with torchvision's.
Shapes: V = 2 + L views of a tile, N images, C = 3 colours, H = W pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from pathfm.models.checkpoints import MEAN, STD
from pathfm.pretrain_settings import CropSettings

DRAWS = 13
"""Numbers per crop: brightness, contrast, saturation, hue [rad], grey (0 or 1), 3 stain factors, 3 stain shifts, blur sigma
[px] (0: none), solarise (0 or 1)."""
NEUTRAL = (1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
"""Draws that change nothing."""
BLUR_SIGMA_PX = (0.1, 2.0)
BLUR_REACH_PX = 4
"""Pixels on either side that a blurred one is made of: a kernel of nine, as in DINOv2."""
DARKEST = 1 / 255
"""Where the logarithm is held, as at the darkest colour but black."""
CACHED = 2**19
"""Values that the CPU takes through all steps together, so that they stay in its cache."""

LUMA = (0.299, 0.587, 0.114)
YIQ_FROM_RGB = (LUMA, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))
HED_IN_RGB = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
"""Optical density of a unit of each stain per colour, in rows (Ruifrok & Johnston 2001)."""


def draw_colour(crops: CropSettings, samples: Sequence[int], key: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """What is done to the colours of every crop, a function of ``key`` and the sample's number only.

    Args:
        crops: probabilities and ranges.
        samples: numbers of the samples in the whole batch.
        key: what the draw depends on beside them, as (seed, step).

    Returns:
        [V, samples, DRAWS]: the two global views, then the local ones.
    """
    streams = [np.random.default_rng((*key, sample)) for sample in samples]
    uniform = np.stack([stream.random((2 + crops.local_count, 10)) for stream in streams], axis=1)
    normal = np.stack([stream.standard_normal((2 + crops.local_count, 6)) for stream in streams], axis=1)

    jittered, stained = uniform[..., :1] < crops.jitter_probability, uniform[..., 1:2] < crops.hed_probability
    gray = uniform[..., 2] < crops.gray_probability
    blurred = uniform[..., 3] < _per_view(crops.blur_probability, crops)
    solarized = uniform[..., 4] < _per_view(crops.solarize_probability, crops)
    widths, turn = np.array([crops.brightness, crops.contrast, crops.saturation]), crops.hue * 2 * math.pi
    low, high = np.append(np.maximum(0, 1 - widths), -turn), np.append(1 + widths, turn)
    draws = np.broadcast_to(np.array(NEUTRAL), (*gray.shape, DRAWS)).copy()
    draws[..., :4] = np.where(jittered, low + (high - low) * uniform[..., 5:9], draws[..., :4])
    draws[..., 4] = gray
    draws[..., 5:11] += stained * crops.hed * normal
    draws[..., 11] = blurred * (BLUR_SIGMA_PX[0] + (BLUR_SIGMA_PX[1] - BLUR_SIGMA_PX[0]) * uniform[..., 9])
    draws[..., 12] = solarized
    return draws.astype(np.float32)


def _per_view(probability: tuple[float, float, float], crops: CropSettings) -> npt.NDArray[np.float64]:
    """Of the first global view, the second, and every local one, [V, 1]."""
    first, second, local = probability
    return np.array([first, second, *[local] * crops.local_count])[:, None]


@torch.no_grad()
def apply_colour(pixels: Tensor, draws_ND: Tensor) -> Tensor:
    """Jitter stains, jitter colours, grey, blur, solarise and normalise crops, in this order.

    Nothing is read back from the device: on the CPU a step is taken only by the images that were drawn for it; elsewhere by
    all, and those not drawn for it keep their values. The results are the same up to rounding, and no image changes another.

    Args:
        pixels: uint8 [N, H, H, 3].
        draws_ND: what to do, [N, DRAWS].

    Returns:
        float32 [N, 3, H, H], normalised with the ImageNet mean and deviation, also where autocast asks for less.
    """
    images = torch.empty(len(pixels), 3, *pixels.shape[1:3], device=pixels.device)
    size = max(1, CACHED // max(1, images[:1].numel()) if _on_cpu(images) else len(images))
    with torch.autocast(images.device.type, enabled=False):
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            _apply(pixels[part], draws_ND[part], images[part])
    return images


def _apply(pixels: Tensor, draws_ND: Tensor, out: Tensor) -> None:
    images = pixels.permute(0, 3, 1, 2).contiguous().float().div_(255)
    stained = (draws_ND[:, 5:8] != 1).any(dim=1) | (draws_ND[:, 8:11] != 0).any(dim=1)
    _change_in_place(images, draws_ND, stained, _jitter_stains)
    _adjust(images, draws_ND, out).clamp_(0, 1)
    _change_in_place(out, draws_ND, draws_ND[:, 11] > 0, _blur)
    _change_in_place(out, draws_ND, draws_ND[:, 12] > 0, _solarize)
    out.sub_(_constants(out.device).mean_1C11).div_(_constants(out.device).std_1C11)


def _change_in_place(images: Tensor, draws_ND: Tensor, chosen_N: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    if not _on_cpu(images):
        images.copy_(torch.where(chosen_N.view(-1, 1, 1, 1), change(images, draws_ND), images))
    elif len(chosen := chosen_N.nonzero().squeeze(1)):
        images[chosen] = change(images[chosen], draws_ND[chosen])


def _on_cpu(images: Tensor) -> bool:
    return images.device.type == "cpu"


class _Constants(NamedTuple):
    """Numbers that live on the training device, since to send them with every batch would make the host wait for it."""

    luma_C: Tensor
    grey_CC: Tensor
    colour_CC: Tensor
    quarter_turn_CC: Tensor
    rgb_from_hed: Tensor
    hed_from_rgb: Tensor
    mean_1C11: Tensor
    std_1C11: Tensor


@functools.cache
def _constants(device: torch.device) -> _Constants:
    grey, yiq, hed = np.tile(LUMA, (3, 1)), np.array(YIQ_FROM_RGB), np.array(HED_IN_RGB).T
    # From red towards yellow, as hue counts, is clockwise in the IQ plane.
    turn = np.linalg.inv(yiq) @ [[0, 0, 0], [0, 0, 1], [0, -1, 0]] @ yiq
    mean, std = np.reshape(MEAN, (1, 3, 1, 1)), np.reshape(STD, (1, 3, 1, 1))
    numbers = (np.array(LUMA), grey, np.eye(3) - grey, turn, hed, np.linalg.inv(hed), mean, std)
    return _Constants(*(torch.tensor(number, dtype=torch.float32, device=device) for number in numbers))


def _jitter_stains(images: Tensor, draws_ND: Tensor) -> Tensor:
    """Scales and shifts each stain's concentration (Tellez et al. 2018)."""
    constants = _constants(images.device)
    matrix_NCC = constants.rgb_from_hed @ (draws_ND[:, 5:8].unsqueeze(-1) * constants.hed_from_rgb)
    offset_NC = -_product(draws_ND[:, 8:11], constants.rgb_from_hed)
    log_light = images.clamp(min=DARKEST).log_()
    return torch.baddbmm(offset_NC.unsqueeze(-1), matrix_NCC, log_light.flatten(2)).exp_().view_as(images)


def _adjust(images: Tensor, draws_ND: Tensor, out: Tensor) -> Tensor:
    """Brightness, contrast around the image's mean grey, saturation, hue, grey: as one map, since none but the last clips.

    A colour is its grey and what differs from grey. Saturation and grey scale the difference, hue turns it in the IQ plane, and
    neither changes the grey; brightness scales everything, and contrast blends with a grey.
    """
    constants, (brightness, contrast, saturation, hue, gray) = _constants(images.device), draws_ND[:, :5].T
    mean_grey = brightness * _product(images.mean(dim=(2, 3)), constants.luma_C.unsqueeze(0)).squeeze(1)
    along, across = (saturation * (1 - gray) * part for part in (torch.cos(hue), torch.sin(hue)))
    colour_NCC = along.view(-1, 1, 1) * constants.colour_CC + across.view(-1, 1, 1) * constants.quarter_turn_CC
    matrix_NCC = (contrast * brightness).view(-1, 1, 1) * (constants.grey_CC + colour_NCC)
    offset_N11 = ((1 - contrast) * mean_grey).view(-1, 1, 1)
    torch.baddbmm(offset_N11, matrix_NCC, images.flatten(2), out=out.flatten(2))
    return out


def _product(vector_NC: Tensor, matrix_KC: Tensor) -> Tensor:
    """[N, K]. Written out: a library's product of few numbers is rounded in another way for another number of rows."""
    return (vector_NC.unsqueeze(1) * matrix_KC).sum(dim=2)


def _blur(images: Tensor, draws_ND: Tensor) -> Tensor:
    """Gaussian of nine pixels along each side, mirrored at the edges."""
    count, side = len(images) * 3, images.shape[-1]
    distance = torch.arange(-BLUR_REACH_PX, BLUR_REACH_PX + 1, device=images.device)
    sigma_N1 = draws_ND[:, 11:12].clamp(min=BLUR_SIGMA_PX[0])
    kernel = torch.softmax(-(distance**2) / (2 * sigma_N1**2), dim=1).repeat_interleave(3, dim=0).view(count, 1, -1, 1)
    padded = functional.pad(images, (BLUR_REACH_PX,) * 4, mode="reflect").view(1, count, side + 8, side + 8)
    down = functional.conv2d(padded, kernel, groups=count)
    return functional.conv2d(down, kernel.mT, groups=count).view_as(images)


def _solarize(images: Tensor, _: Tensor) -> Tensor:
    """Inverts values above a half (128 of 255)."""
    return 0.5 - (images - 0.5).abs()
