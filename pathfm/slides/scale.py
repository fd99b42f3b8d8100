"""How large a slide's pixels are: every key that says so, in a fixed order, checked against the others and the objective.

Pure: a mapping of property names to texts in, numbers and names of keys out. Values that are not numbers are never quoted,
because people write names into any field.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from pathfm.geometry import Mpp, mpp_is_sane

KEYS = (
    ("openslide.mpp-x", "openslide.mpp-y", 1.0),
    ("aperio.MPP", "aperio.MPP", 1.0),
    ("mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_X", "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_Y", 1.0),
    ("ventana.ScanRes", "ventana.ScanRes", 1.0),
    ("sakura.ResolutionMmPerPix", "sakura.ResolutionMmPerPix", 1e3),
    (
        "dicom.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing[1]",
        "dicom.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing[0]",
        1e3,
    ),
)
"""Keys of a scale along x and y, and micrometres per unit of their numbers. DICOM names rows, whose spacing is y, first."""
OBJECTIVES = (
    "openslide.objective-power",
    "aperio.AppMag",
    "hamamatsu.SourceLens",
    "mirax.GENERAL.OBJECTIVE_MAGNIFICATION",
    "ventana.Magnification",
    "leica.objective",
    "trestle.Objective Power",
    "sakura.NominalLensMagnification",
    "dicom.OpticalPathSequence[0].ObjectiveLensPower",
)
"""Keys of the objective's power."""
TEXTS = ("openslide.comment", "tiff.ImageDescription")
"""Free text that may hold a scale; nothing but numbers is taken from it."""
OTHER_TAGS = frozenset({"trestle", "leica", "ventana"})
"""Vendors whose TIFF resolution tags hold micrometres, or belong to another picture of the file."""
MICROMETRES = {
    "um": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "micrometer": 1.0,
    "nm": 1e-3,
    "mm": 1e3,
    "cm": 1e4,
    "centimeter": 1e4,
    "inch": 25_400.0,
}
DEFAULT_DPI = (1.0, 2.54, 72.0, 96.0, 100.0, 150.0, 200.0, 300.0, 600.0, 1200.0)
"""Resolutions that software writes where none is known; 2.54 is one pixel per centimetre."""
UM_PER_INCH = 25_400.0
AXIS_TOLERANCE, KEY_TOLERANCE, OBJECTIVE_TOLERANCE = 0.01, 0.02, 0.3
"""Relative differences between x and y, between two keys, and from what the objective means, that are worth a word."""
OBJECTIVE_MPP = 10.0
"""Micrometres per pixel times objective power: 40x is taken to mean 0.25."""
OBJECTIVE_SANE = (0.5, 200.0)

_NUMBER = r"[+-]?(?:\d+(?:[.,]\d*)?|[.,]\d+)(?:[eE][+-]?\d+)?"
_MPP = re.compile(rf"\b(?:mpp(?:[_-]?x)?|microns?[ _-]?per[ _-]?pixel)[\"']?\s*[=:]\s*[\"']?({_NUMBER})", re.IGNORECASE)
_APP_MAG = re.compile(rf"\b(?:AppMag|NominalMagnification)\s*=\s*[\"']?({_NUMBER})")
_PHYSICAL_SIZE = re.compile(r"\b(PhysicalSize[XY](?:Unit)?)=\"([^\"]*)\"")
_UNIT_LINE = re.compile(r"^unit=(\S+)", re.MULTILINE)


class Scale(NamedTuple):
    """What a file says of its pixels' size.

    Attributes:
        mpp: micrometres per level-0 pixel; None when no key gives a microscope's.
        source: the key of ``mpp``; without one, the first key that was refused and why; empty when there is no key at all.
        notes: contradictions between keys, axes and the objective, in whole sentences.
        objective: power of the objective, None when not given.
    """

    mpp: Mpp | None
    source: str
    notes: tuple[str, ...]
    objective: float | None


class _Witness(NamedTuple):
    """What one key says [um per px]; None: nothing, NaN: not a number."""

    key: str
    x: float | None
    y: float | None


def find_scale(facts: Mapping[str, str]) -> Scale:
    """The scale by the first key with a sane value; the others only bear witness.

    Args:
        facts: OpenSlide's properties as they are, or ``tiff.XResolution``, ``tiff.YResolution`` (pixels per unit) with
            ``tiff.ResolutionUnit`` (inch, centimeter or none), ``tiff.ImageDescription`` and ``ome.PhysicalSizeX``,
            ``ome.PhysicalSizeXUnit`` (likewise Y) of a TIFF.
    """
    mpp, source, refused = None, "", ""
    notes: list[str] = []
    rivals: dict[str, str] = {}
    for witness in _witnesses(facts):
        found, problem = _judged(witness)
        if found is None:
            refused = refused or problem
        elif mpp is None:
            mpp, source = found, witness.key
            notes += [note for note in (problem, _anisotropy(found)) if note]
        elif abs(math.log(found.mean / mpp.mean)) > KEY_TOLERANCE:
            # One word per differing value: several keys often hold copies of one number.
            rivals.setdefault(f"{found.mean:.4g}", f"{source} says {mpp.mean:.4g}, {witness.key} says {found.mean:.4g}")
    objective = _objective(facts)
    against = _against_objective(mpp, objective)
    return Scale(mpp, source or refused, (*notes, *rivals.values(), *([against] if against else [])), objective)


def refusal(key: str, value: float) -> str:
    """Why a value [um per px] is not taken for a microscope's, as one clause that names its key."""
    if math.isnan(value):
        return f"{key} is not a number"
    dpi = UM_PER_INCH / value if value else 0.0
    default = next((each for each in DEFAULT_DPI if abs(dpi / each - 1) < 0.005), None)
    if default is None:
        return f"{key} says {value:.4g}, which is no microscope's"
    return f"{key} says {value:.4g}, which is no microscope's but a default of {default:g} dpi"


def number(text: str, um: float = 1.0) -> float:
    """The number that a text consists of [um], NaN when it is anything else.

    Decimal commas, full-width digits and micro signs of any encoding are understood (``0,25``, ``0.25 µm``).

    Args:
        text: a number, with or without a unit of length.
        um: micrometres per unit when the text has none.
    """
    plain = unicodedata.normalize("NFKC", text).strip(" \t\r\n\"'")
    match = re.fullmatch(rf"({_NUMBER}|[+-]?inf|nan)\s*([^\d\s]*)", plain)
    if not match:
        return math.nan
    # What follows a slash is the pixel (um/px).
    unit = match.group(2).partition("/")[0]
    factor = _unit(unit) if unit else um
    return math.nan if factor is None else float(match.group(1).replace(",", ".")) * factor


def _unit(name: str) -> float | None:
    """Micrometres of a unit of length; None for one that is not known."""
    # The micro sign has two code points, and is often garbled by a wrong encoding; nothing else before an m is not ASCII.
    plain = re.sub(r"^(?:\\u00b5|[^\x00-\x7f]+)m$", "um", name.strip().lower())
    return MICROMETRES.get(plain)


def _witnesses(facts: Mapping[str, str]) -> Iterator[_Witness]:
    """All that is said about the scale, most trustworthy first."""
    for x, y, um in KEYS:
        yield _Witness(x, _value(facts, x, um), _value(facts, y, um))
    yield _physical_size(facts)
    yield _philips(facts)
    yield _ome(facts)
    for text, key in {facts[key]: key for key in reversed(TEXTS) if key in facts}.items():
        yield _ome({f"ome.{name}": value for name, value in reversed(_PHYSICAL_SIZE.findall(text))})
        found = _MPP.search(text)
        yield _Witness(key, number(found.group(1)) if found else None, None)
    yield _resolution_tags(facts)


def _value(facts: Mapping[str, str], key: str, um: float) -> float | None:
    return number(facts[key], um) if facts.get(key, "").strip() else None


def _physical_size(facts: Mapping[str, str]) -> _Witness:
    """Hamamatsu VMS and VMU: the whole scan in nanometres."""
    key = "hamamatsu.PhysicalWidth"
    width, height = (_value(facts, f"openslide.level[0].{side}", 1.0) for side in ("width", "height"))
    x, y = (_value(facts, f"hamamatsu.Physical{side}", 1e-3) for side in ("Width", "Height"))
    return _Witness(key, x / width if x is not None and width else None, y / height if y is not None and height else None)


def _philips(facts: Mapping[str, str]) -> _Witness:
    """Two quoted numbers in millimetres: spacing of rows, which is y, then of columns."""
    key = "philips.DICOM_PIXEL_SPACING"
    parts = facts.get(key, "").replace('"', " ").split()
    if not parts:
        return _Witness(key, None, None)
    y, x = (number(part, 1e3) for part in parts) if len(parts) == 2 else (math.nan, math.nan)
    return _Witness(key, x, y)


def _ome(facts: Mapping[str, str]) -> _Witness:
    """OME's physical size of a pixel. A unit that is not known (such as OME's own "pixel") says nothing of the scale."""
    units = (_unit(facts.get(f"ome.PhysicalSize{axis}Unit", "um")) for axis in "XY")
    sizes = (_value(facts, f"ome.PhysicalSize{axis}", um) if um else None for axis, um in zip("XY", units, strict=True))
    return _Witness("ome.PhysicalSizeX", *sizes)


def _resolution_tags(facts: Mapping[str, str]) -> _Witness:
    """TIFF's pixels per unit; ImageJ keeps the unit in its description."""
    key = "tiff.XResolution"
    unit, description = facts.get("tiff.ResolutionUnit", "inch"), facts.get("tiff.ImageDescription", "")
    if unit == "none" and description.startswith("ImageJ=") and (line := _UNIT_LINE.search(description)):
        unit = line.group(1)
    um = _unit(unit)
    if um is None or facts.get("openslide.vendor") in OTHER_TAGS:
        return _Witness(key, None, None)
    # Zero means that nothing was set.
    per_unit = (_value(facts, f"tiff.{axis}Resolution", 1.0) for axis in "XY")
    return _Witness(key, *(um / value if value else None for value in per_unit))


def _judged(witness: _Witness) -> tuple[Mpp | None, str]:
    """The scale a key gives, and what is wrong with it. A value for one axis stands for both."""
    key, *values = witness
    x, y = values[0] if values[0] is not None else values[1], values[1] if values[1] is not None else values[0]
    if x is None or y is None:
        return None, ""
    if mpp_is_sane(x) and mpp_is_sane(y):
        return Mpp(x, y), ""
    if mpp_is_sane(x) or mpp_is_sane(y):
        (good, bad), axis = ((x, y), "y") if mpp_is_sane(x) else ((y, x), "x")
        return Mpp(good, good), f"{refusal(f'{key} along {axis}', bad)}; the other axis stands for both"
    return None, refusal(key, x)


def _anisotropy(mpp: Mpp) -> str:
    difference = abs(math.log(mpp.x / mpp.y))
    return f"pixels are not square: {mpp.x:.4g} x {mpp.y:.4g} mpp" if difference > AXIS_TOLERANCE else ""


def _objective(facts: Mapping[str, str]) -> float | None:
    named = (facts[key].rstrip("xX× ") for key in OBJECTIVES if key in facts)
    written = (found.group(1) for key in TEXTS if (found := _APP_MAG.search(facts.get(key, ""))))
    powers = (number(text) for text in (*named, *written))
    return next((power for power in powers if OBJECTIVE_SANE[0] <= power <= OBJECTIVE_SANE[1]), None)


def _against_objective(mpp: Mpp | None, objective: float | None) -> str:
    if objective is None:
        return ""
    means = f"objective {objective:g}x would mean {OBJECTIVE_MPP / objective:.4g} mpp"
    if mpp is None:
        return f"{means}, the file gives none"
    conflict = abs(math.log(mpp.mean * objective / OBJECTIVE_MPP)) > math.log(1 + OBJECTIVE_TOLERANCE)
    return f"{means}, the file says {mpp.mean:.4g}" if conflict else ""
