"""Which tissue the regions that people drew on a slide keep, and which they leave out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pathfm.store.interop.annotations import Annotations, Mask, draw_regions
from pathfm.study import TissueSettings


def apply_annotations(mask: Mask, annotations: Annotations, downsample: float, settings: TissueSettings) -> Mask:
    """Tissue [h, w] within the regions of the classes to include (all of it, if none is named) and outside those to exclude.

    Where no region is of a class to include, nothing is left; ``unmatched_classes`` says why.

    Args:
        mask: the tissue found.
        annotations: the slide's regions.
        downsample: level-0 px per mask pixel.
        settings: the classes to include and to exclude; their names are compared as they are written.
    """
    result = mask.copy()
    if settings.include:
        result &= _drawn(annotations, settings.include, downsample, mask.shape)
    if settings.exclude:
        result &= ~_drawn(annotations, settings.exclude, downsample, mask.shape)
    return result


def _drawn(annotations: Annotations, names: Iterable[str], downsample: float, shape: tuple[int, ...]) -> Mask:
    """The union of all regions of these classes [h, w]."""
    wanted = set(names)
    return draw_regions((region for region in annotations.regions if region.name in wanted), (downsample, downsample), shape)


def unmatched_classes(annotations: Annotations, settings: TissueSettings) -> str:
    """Which classes of the settings no region of the slide has, and what its classes are called; "" when there are none.

    A slide need not have regions of every class, so this is no error: it is the reason when nothing was kept, and a note
    otherwise.
    """
    missing = [name for name in (*settings.include, *settings.exclude) if name not in annotations.names]
    if not missing:
        return ""
    known = annotations.names
    folded = {name.casefold(): name for name in known}
    close = [folded[match] for name in missing for match in difflib.get_close_matches(name.casefold(), folded, n=1)]
    advice = f"did you mean {', '.join(close)}?" if close else f"its classes: {', '.join(known) or 'none'}"
    return f"no annotated region is of class {', '.join(missing)} ({advice})"
