"""Colour of the crops: drawn with the batch, applied to whole batches on the training device.

Brightness, contrast, saturation, hue and grey are one affine map of RGB per image; the stain jitter is one affine map of
optical density per image; the blur is a product with a banded matrix from both sides.
Shapes: N images, C = 3 colours, H = W pixels.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pathfm.models.checkpoints import MEAN, STD
from pathfm.study import CropSettings

DRAWS = 12
"""Numbers per crop: brightness, contrast, saturation, hue [rad], grey, 3 stain factors, 3 stain shifts, blur sigma [px]."""
BLUR_SIGMA_PX = (0.1, 2.0)
NO_BLUR_PX = 1e-3
DARKEST = 1 / 255

LUMA = (0.299, 0.587, 0.114)
YIQ_FROM_RGB = (LUMA, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))
RGB_FROM_HED = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
"""Optical density of the stains per colour, in rows (Ruifrok & Johnston 2001)."""


def draw_colour(crops: CropSettings, batch: int, random: np.random.Generator) -> npt.NDArray[np.float32]:
    """What is done to the colours of every crop, [2 + L, batch, DRAWS]: the two global views, then the local ones."""
    views = 2 + crops.local_count
    shape = (views, batch)
    draws = np.zeros((*shape, DRAWS))
    jittered = random.random(shape) < crops.jitter_probability
    for column, width in enumerate((crops.brightness, crops.contrast, crops.saturation)):
        draws[..., column] = 1 + jittered * random.uniform(-width, width, shape)
    draws[..., 3] = jittered * random.uniform(-crops.hue, crops.hue, shape) * 2 * math.pi
    draws[..., 4] = random.random(shape) < crops.gray_probability
    stained = (random.random(shape) < crops.hed_probability)[..., None]
    draws[..., 5:8] = 1 + stained * crops.hed * random.standard_normal((*shape, 3))
    draws[..., 8:11] = stained * crops.hed * random.standard_normal((*shape, 3))
    first, second, local = crops.blur_probability
    probability = np.array([first, second] + [local] * crops.local_count)[:, None]
    draws[..., 11] = np.where(random.random(shape) < probability, random.uniform(*BLUR_SIGMA_PX, shape), NO_BLUR_PX)
    return draws.astype(np.float32)


def apply_colour(pixels: Tensor, draws_ND: Tensor) -> Tensor:
    """Jitter, blur and normalise crops.

    Args:
        pixels: uint8 [N, H, H, 3].
        draws_ND: what to do, [N, DRAWS].

    Returns:
        float32 [N, 3, H, H], normalised with the ImageNet mean and deviation.
    """
    images = pixels.permute(0, 3, 1, 2).float().div_(255)
    images = _adjust(_jitter_stains(images, draws_ND), draws_ND).clamp_(0, 1)
    _blur_in_place(images, draws_ND[:, 11])
    return images.sub_(_column(MEAN, images)).div_(_column(STD, images))


def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
    return like.new_tensor(values).view(1, 3, 1, 1)


def _affine(images: Tensor, matrix_NCC: Tensor, offset_NC: Tensor) -> Tensor:
    return torch.baddbmm(offset_NC.unsqueeze(-1), matrix_NCC, images.flatten(2)).view_as(images)


def _jitter_stains(images: Tensor, draws_ND: Tensor) -> Tensor:
    """Scales and shifts each stain's concentration (Tellez et al. 2018), in the images that have it on."""
    factor_NC, shift_NC = draws_ND[:, 5:8], draws_ND[:, 8:11]
    chosen = torch.nonzero(((factor_NC != 1) | (shift_NC != 0)).any(dim=1)).squeeze(1)
    if not len(chosen):
        return images
    rgb_from_hed = images.new_tensor(RGB_FROM_HED).T
    hed_from_rgb = torch.linalg.inv(rgb_from_hed)
    matrix_NCC = rgb_from_hed @ (factor_NC[chosen].unsqueeze(-1) * hed_from_rgb)
    log_light = images[chosen].clamp_(min=DARKEST).log_()
    images[chosen] = _affine(log_light, matrix_NCC, -(shift_NC[chosen] @ rgb_from_hed.T)).exp_()
    return images


def _adjust(images: Tensor, draws_ND: Tensor) -> Tensor:
    """Brightness, contrast around the image's mean grey, saturation, hue (a turn of the IQ plane), grey."""
    brightness, contrast, saturation, hue, grey = draws_ND[:, :5].T
    luma_C, identity = images.new_tensor(LUMA), torch.eye(3, device=images.device)
    grey_CC = luma_C.expand(3, 3)
    mean_grey = brightness * (images.mean(dim=(2, 3)) @ luma_C)

    def blend(share: Tensor) -> Tensor:
        return share.view(-1, 1, 1) * identity + (1 - share).view(-1, 1, 1) * grey_CC

    colours = blend(1 - grey) @ _hue_turn(hue) @ blend(saturation)
    matrix_NCC = (contrast * brightness).view(-1, 1, 1) * colours
    # Every factor keeps greys grey, so the grey that contrast adds passes through them unchanged.
    offset_NC = ((1 - contrast) * mean_grey).unsqueeze(1).expand(-1, 3)
    return _affine(images, matrix_NCC, offset_NC)


def _hue_turn(angle_N: Tensor) -> Tensor:
    yiq_from_rgb = angle_N.new_tensor(YIQ_FROM_RGB)
    turn = torch.zeros(len(angle_N), 3, 3, device=angle_N.device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = torch.cos(angle_N)
    turn[:, 2, 1] = torch.sin(angle_N)
    turn[:, 1, 2] = -turn[:, 2, 1]
    rgb_from_yiq: Tensor = torch.linalg.inv(yiq_from_rgb)
    return rgb_from_yiq @ turn @ yiq_from_rgb


def _blur_in_place(images: Tensor, sigma_N: Tensor) -> None:
    """Gaussian blur of the images whose sigma is not NO_BLUR_PX; weights are renormalised at the edges."""
    chosen = torch.nonzero(sigma_N > NO_BLUR_PX * 2).squeeze(1)
    if not len(chosen):
        return
    position = torch.arange(images.shape[-1], device=images.device)
    distance_HH = (position[:, None] - position).float()
    kernel_NHH = torch.softmax(-(distance_HH**2) / (2 * sigma_N[chosen].view(-1, 1, 1) ** 2), dim=-1).unsqueeze(1)
    images[chosen] = kernel_NHH @ images[chosen] @ kernel_NHH.mT
