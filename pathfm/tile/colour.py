"""Colour: the scanner's profile, stain vectors, and stain normalisation. Arrays in, arrays out; one estimate per slide.

What a slide's stain looks like is estimated once, on the tissue of its thumbnail, and applied to every tile alike: tiles of one
slide stay comparable, and memory does not grow with the slide. Everything is relative to the slide's own glass, which stays
white. Optical density here is the natural logarithm of glass by pixel.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from pathfm.errors import SlideError
from pathfm.study import ColourSettings

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
Recolour = Callable[[Pixels], Pixels]
"""RGB pixels [H, W, 3] to RGB pixels of the same shape; may be called from many threads at once."""

LEAST_PIXELS = 200
"""Fewer pixels say nothing: of tissue, about a slide's stain; of glass, about its colour, which then is taken as white."""
MOST_PIXELS = 100_000
"""More pixels say nothing new."""
LEAST_DENSITY = 0.25
"""Paler pixels (length of the optical density) point in no direction: noise decides."""
ANGLE_PERCENT, STRENGTH_PERCENT = 1.0, 99.0
"""Macenko et al. (2009): robust ends of the angles [% from either side], and robust maximum of the concentrations [%]."""
LEAST_ANGLE = 0.1
"""Vectors closer than this [rad] are one stain: tissue cannot be split between them."""
GLASS_LEVEL = 170
"""Pixels without tissue count as glass when their darkest channel is above this; others are pen, dirt or the scan's frame."""
WHITE_LIGHTNESS = np.float32(100.0)
"""L* of white."""
MOST_CONTRAST = 2.0
"""Reinhard changes the spread of a channel by this factor at most: thumbnails of different scale differ in contrast."""


class StainVectors(NamedTuple):
    """How the two stains of a slide look; plain numbers, kept as metadata.

    Attributes:
        haematoxylin: optical density of the bluer stain in red, green and blue; unit length.
        eosin: the same of the redder stain.
        max_concentration: robust maximum of the concentration of each.
        glass: RGB of the empty glass that densities refer to.
    """

    haematoxylin: tuple[float, ...]
    eosin: tuple[float, ...]
    max_concentration: tuple[float, ...]
    glass: tuple[float, ...]

    def as_dict(self) -> dict[str, list[float]]:
        """Names and numbers, as JSON keeps them."""
        return {name: list(values) for name, values in zip(self._fields, self, strict=True)}


class LabStatistics(NamedTuple):
    """How the tissue of a slide is coloured, in CIE L*a*b* (L* 0 to 100), relative to its glass.

    Attributes:
        mean: of the three channels.
        deviation: their standard deviations.
        glass: RGB of the empty glass.
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    glass: tuple[float, ...]


REFERENCE_STAINS = StainVectors(
    haematoxylin=(0.65, 0.70, 0.296), eosin=(0.16, 0.89, 0.427), max_concentration=(2.4, 1.4), glass=(255.0, 255.0, 255.0)
)
REFERENCE_LAB = LabStatistics(mean=(58.0, 25.0, -18.0), deviation=(17.0, 8.0, 7.0), glass=(255.0, 255.0, 255.0))
"""What slides are normalised to: round numbers amid those of public slides of several laboratories and scanners."""


def icc_to_srgb(profile: bytes) -> Recolour:
    """The conversion of a scanner's colours to sRGB.

    The intent is perceptual: it is the one table that every table-based profile must hold, and for profiles that are a curve
    and a matrix (most scanners') it equals the relative colorimetric one, which maps the scanner's white to white.

    Args:
        profile: an ICC profile (ISO 15076-1) of an RGB device.

    Raises:
        SlideError: the profile is damaged, or not one of an RGB device.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, target, "RGB", "RGB", ImageCms.Intent.PERCEPTUAL)
    except (ImageCms.PyCMSError, OSError) as error:
        raise SlideError("the colour profile is damaged or not an RGB one", fix="set tile.colour.icc=false") from error

    def recolour(rgb: Pixels) -> Pixels:
        # A transform is only read while it is applied, so threads can share it.
        return np.array(ImageCms.applyTransform(Image.fromarray(rgb), transform))

    return recolour


def estimate_stains(rgb: Pixels, mask: Mask) -> StainVectors | None:
    """Stain vectors of a slide by Macenko et al. (2009, "A method for normalizing histology slides for quantitative analysis").

    The densities of tissue lie near a plane, spanned by their two main directions; the stains are the robust ends of the angles
    within it. Pale pixels are left out by the length of their density (not by each channel, which would lose pure eosin).

    Args:
        rgb: picture of the slide [h, w, 3].
        mask: its tissue [h, w].

    Returns:
        None when there is too little tissue, or only one stain.
    """
    glass = _glass(rgb, mask)
    density_NC = -np.log(_stained_light(rgb, mask, glass))
    if len(density_NC) < LEAST_PIXELS:
        return None
    plane_C2 = np.linalg.eigh(np.cov(density_NC.T))[1][:, :0:-1]
    # Turned so that the mean lies at angle 0: then no angle wraps around, and the arbitrary signs of the axes do not matter.
    towards = np.arctan2(*(density_NC.mean(axis=0) @ plane_C2)[::-1])
    plane_C2 = plane_C2 @ np.array([[np.cos(towards), -np.sin(towards)], [np.sin(towards), np.cos(towards)]])
    x, y = (density_NC @ plane_C2).T
    ends = np.percentile(np.arctan2(y, x), [ANGLE_PERCENT, 100 - ANGLE_PERCENT])
    if ends[1] - ends[0] < LEAST_ANGLE:
        return None
    vectors_2C = np.stack([np.cos(ends), np.sin(ends)], axis=1) @ plane_C2.T
    vectors_2C = np.maximum(vectors_2C, 0.0)  # a stain only takes light away
    vectors_2C /= np.linalg.norm(vectors_2C, axis=1, keepdims=True)
    vectors_2C = vectors_2C[np.argsort(-vectors_2C[:, 0])]  # haematoxylin takes more of the red
    strongest = np.percentile(density_NC @ np.linalg.pinv(vectors_2C), STRENGTH_PERCENT, axis=0)
    return StainVectors(_plain(vectors_2C[0]), _plain(vectors_2C[1]), _plain(strongest), _plain(glass))


def lab_statistics(rgb: Pixels, mask: Mask) -> LabStatistics | None:
    """Colour statistics of a slide's stained pixels, relative to its glass; None when there is too little tissue.

    Args:
        rgb: picture of the slide [h, w, 3].
        mask: its tissue [h, w].
    """
    glass = _glass(rgb, mask)
    light_NC = _stained_light(rgb, mask, glass)
    if len(light_NC) < LEAST_PIXELS:
        return None
    lab_NC = cv2.cvtColor(light_NC.astype(np.float32)[None], cv2.COLOR_RGB2LAB)[0].astype(np.float64)
    return LabStatistics(_plain(lab_NC.mean(axis=0)), _plain(lab_NC.std(axis=0)), _plain(glass))


def make_normaliser(settings: ColourSettings, thumbnail: Pixels, mask: Mask) -> Recolour | None:
    """The stain normalisation of one slide, estimated on its thumbnail.

    Args:
        settings: which method.
        thumbnail: picture of the whole slide [h, w, 3], its colour profile applied if tiles have it applied.
        mask: its tissue [h, w].

    Returns:
        None when none is asked for, and when the slide has too little tissue or only one stain: then its colours stay.
    """
    if settings.normalise == "macenko":
        stains = estimate_stains(thumbnail, mask)
        return macenko(stains) if stains else None
    if settings.normalise == "reinhard":
        statistics = lab_statistics(thumbnail, mask)
        return reinhard(statistics) if statistics else None
    return None


def macenko(stains: StainVectors, reference: StainVectors = REFERENCE_STAINS) -> Recolour:
    """Normalisation by Macenko et al. (2009): concentrations are kept, up to their maxima, and drawn in the reference's stains.

    What is neither stain (the residual) is dropped, as in the paper. The map of densities is one 3 x 3 matrix.
    """
    own_2C = np.array([stains.haematoxylin, stains.eosin])
    reference_2C = np.array([reference.haematoxylin, reference.eosin])
    gain = np.array(reference.max_concentration) / np.maximum(stains.max_concentration, 1e-3)
    matrix_CC = (np.linalg.pinv(own_2C) * gain @ reference_2C).T.astype(np.float32)
    log_light = np.log(_light(np.array(stains.glass)))[None]

    def recolour(rgb: Pixels) -> Pixels:
        # Colours far from both stains, as ink, come out brighter than white.
        light = cv2.exp(np.minimum(cv2.transform(cv2.LUT(rgb, log_light), matrix_CC), np.float32(0)))
        return np.asarray(cv2.convertScaleAbs(light, alpha=255), dtype=np.uint8)

    return recolour


def reinhard(statistics: LabStatistics, reference: LabStatistics = REFERENCE_LAB) -> Recolour:
    """Normalisation by Reinhard et al. (2001, "Color transfer between images"), in CIE L*a*b*, kept off the glass.

    Mean and spread of every channel become the reference's. That alone would dye the glass, so the change fades out between the
    tissue's mean lightness, from which on it is full, and the lightness of glass, where it is none.
    """
    mean, deviation = np.array(statistics.mean), np.array(statistics.deviation)
    gain = np.clip(np.array(reference.deviation) / np.maximum(deviation, 1e-3), 1 / MOST_CONTRAST, MOST_CONTRAST)
    # How far the full change moves a pixel: lab * (gain - 1) + offset.
    change_34 = np.column_stack([np.diag(gain - 1), np.array(reference.mean) - mean * gain]).astype(np.float32)
    span = np.float32(max(WHITE_LIGHTNESS - mean[0], 1.0))
    light_levels = _light(np.array(statistics.glass))[None]

    def recolour(rgb: Pixels) -> Pixels:
        lab: Floats = cv2.cvtColor(cv2.LUT(rgb, light_levels), cv2.COLOR_RGB2LAB)
        share = np.minimum((WHITE_LIGHTNESS - lab[:, :, :1]) / span, np.float32(1))
        lab += share * cv2.transform(lab, change_34)
        light = np.clip(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB), 0, 1)
        return np.asarray(cv2.convertScaleAbs(light, alpha=255), dtype=np.uint8)

    return recolour


def _glass(rgb: Pixels, mask: Mask) -> npt.NDArray[np.float64]:
    """RGB of the slide's empty glass [3]: the median of bright pixels without tissue."""
    empty_NC = _sample(rgb, ~mask)
    darkest_N = empty_NC.min(axis=1)
    # Scanners and stitchers fill what they did not scan with pure white, which is no glass.
    empty_NC = empty_NC[(darkest_N >= GLASS_LEVEL) & (darkest_N < 255)]
    return np.asarray(np.median(empty_NC, axis=0)) if len(empty_NC) >= LEAST_PIXELS else np.full(3, 255.0)


def _stained_light(rgb: Pixels, mask: Mask, glass: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Light that passes through stained pixels of the mask, as a share of what passes glass [N, 3]."""
    light_NC = _light(glass)[_sample(rgb, mask), np.arange(3)].astype(np.float64)
    return np.asarray(light_NC[np.linalg.norm(np.log(light_NC), axis=1) >= LEAST_DENSITY])


def _sample(rgb: Pixels, mask: Mask) -> Pixels:
    """At most ``MOST_PIXELS`` of the masked pixels [N, 3], evenly spread."""
    chosen = np.flatnonzero(mask)
    return np.asarray(rgb.reshape(-1, 3)[chosen[:: len(chosen) // MOST_PIXELS + 1]])


def _light(glass: npt.NDArray[np.float64]) -> Floats:
    """Light that passes, as a share of what passes glass, for every value of every channel [256, 3]; never 0, at most 1."""
    light = np.maximum(np.arange(256.0)[:, None], 1.0) / glass
    return np.asarray(np.minimum(light, 1.0), dtype=np.float32)


def _plain(values: npt.NDArray[np.float64]) -> tuple[float, ...]:
    """Numbers to keep: rounded, so that no machine's last bits enter a store."""
    return tuple(round(float(value), 5) for value in values)
