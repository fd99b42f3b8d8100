"""Marker-pen ink, told from tissue by its colour. Colours in, names of inks out.

Ink and stain absorb light (optical density = -log10 of the light let through, per channel); their colours are the ratios of
the three densities, whatever the amount. Haematoxylin and eosin absorb green most; brown (DAB) absorbs blue most, and some red.
What neither does: let green through best (green ink), absorb green and blue alike and no red (red ink), absorb red far more
than blue (blue ink), or absorb all three alike until little is left (black ink). Where stain and ink do overlap, at low
density, a colour is stain: a tile is dropped for its ink, and strokes are seldom thin all over, while stains may be. Other
stains may well have the colour of an ink (toluidine blue, Giemsa, trichromes): for these the columns mean nothing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

INKS = ("green", "red", "blue", "black")
"""Colours of ink, in the order of their numbers, which start at 1."""
UNLIT = 8
"""A colour whose brightest channel is below this is no light at all (an unscanned or fluorescence area), not black ink."""

Floats = npt.NDArray[np.float64]


def optical_density(rgb: npt.NDArray[np.integer]) -> Floats:
    """Absorbance of colours [..., 3], 0 for white; black, which has none, gets that of a single grey level."""
    return np.asarray(-np.log10((rgb.astype(np.float64) + 1) / 256))


def ink_of(rgb: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8]:
    """Which ink colours are of.

    Args:
        rgb: colours [..., 3], 0 to 255.

    Returns:
        Numbers [...]: 0 for none, else the place in ``INKS`` plus one.
    """
    red, green, blue = np.moveaxis(optical_density(rgb), -1, 0)
    least, most = np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue)
    over_glass = (red >= 1.5 * green) & (blue <= 0.7 * green)
    over_tissue = (red >= 0.6) & (red >= green) & (blue <= 0.4 * red)
    inks = {
        "green": (red >= 0.2) & (red - green >= 0.1) & (red >= 1.25 * green) & (blue >= 0.7 * green),
        "red": (green >= 0.35) & (red <= 0.3 * green) & (blue >= 0.68 * green) & (blue <= 1.25 * green),
        "blue": (red >= 0.4) & (blue <= 0.6 * red) & (over_glass | over_tissue),
        "black": (least >= 0.7) & (least >= 0.7 * most) & (rgb.max(axis=-1) >= UNLIT),
    }
    return np.asarray(np.select([inks[name] for name in INKS], range(1, len(INKS) + 1), 0), dtype=np.uint8)
