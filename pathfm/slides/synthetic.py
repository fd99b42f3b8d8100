"""Synthetic H&E slides with known truth, for the demo, the tests and the benchmarks.

A positive slide has a lesion that differs from the lymphocyte field in the same place of a negative slide by architecture
(nuclei large, misshapen, crowded, around punched-out lumens) and not by colour; the stain of each slide shifts at random.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from pathfm import jpeg
from pathfm.geometry import Box, Mpp, Size
from pathfm.slides.reader import Pixels
from pathfm.slides.synthetic_cells import Mask
from pathfm.slides.synthetic_draw import Look, draw_block, make_look
from pathfm.slides.synthetic_plan import PenColour, Plan, SyntheticSpec, make_plan
from pathfm.slides.synthetic_tiff import SlideWriter, TiffOptions

VERSION = 1
"""Raised whenever the same spec draws another picture."""
TILE_PX = 256
QUALITY = 80
BLOCK_PX = 2048
"""Blocks drawn at once; a multiple of the tile at every level [px]."""
MAX_DOWNSAMPLE = BLOCK_PX // TILE_PX
MASK_SCALE = 16
"""Level-0 pixels per pixel of a lesion mask."""
SITES = ("north", "south")


class SlideTruth(NamedTuple):
    """What is known of a written slide.

    ``lesion_mask`` is a PNG with 255 in the lesion, ``MASK_SCALE`` level-0 pixels per pixel; ``lesion_share`` of the slide.
    """

    path: Path
    lesion_mask: Path
    lesion_share: float


@dataclass
class _Lower:
    """A pyramid level below the first, whose tiles are kept as they come."""

    downsample: int
    size: Size
    tiles: list[bytes] = field(default_factory=list)


def draw_slide(spec: SyntheticSpec) -> tuple[Pixels, Mask]:
    """Draw a whole slide in memory: pixels [H, W, 3] and lesion mask [H, W]. The same spec gives the same pixels."""
    plan = make_plan(spec)
    look = make_look(spec, plan.grain)
    bands = [_draw_band(plan, look, spec, top) for top in range(0, spec.size_px.height, BLOCK_PX)]
    return np.concatenate([rgb for rgb, _ in bands]), np.concatenate([lesion for _, lesion in bands])


def write_slide(path: Path, spec: SyntheticSpec, lesion_mask: Path | None = None) -> SlideTruth:
    """Write a slide as a pyramid of JPEG tiles that OpenSlide opens with the right mpp, and its lesion mask.

    The slide is drawn in bands, so memory does not grow with its height. The same spec gives the same bytes.

    Args:
        path: the TIFF to write; appears whole or not at all.
        spec: what to draw.
        lesion_mask: the PNG to write; default: ``<name>_lesion.png`` beside the slide.
    """
    lesion_mask = lesion_mask or path.with_name(f"{path.stem}_lesion.png")
    masks: list[Pixels] = []
    lower = [_Lower(each, _lower_size(spec.size_px, each)) for each in _downsamples(spec.size_px)]
    temporary = path.with_name(f".{path.name}.part")
    options = TiffOptions(tile_px=Size(TILE_PX, TILE_PX), mpp=Mpp(spec.mpp, spec.mpp), big=True)
    with SlideWriter(temporary, options) as slide:
        slide.write_level(_level0_tiles(spec, lower, masks), spec.size_px)
        for level in lower:
            slide.write_level(level.tiles, level.size, level.downsample)
    mask = np.concatenate(masks)
    _, png = cv2.imencode(".png", mask)
    # The mask first: a slide that is there has its truth beside it.
    _put(lesion_mask, png.tobytes())
    temporary.replace(path)
    return SlideTruth(path, lesion_mask, float((mask > 0).mean()))


def write_cohort(folder: Path, n_slides: int = 40, seed: int = 7, base: SyntheticSpec | None = None) -> Path:
    """Draw a balanced cohort: half of the slides with a lesion, some patients with two slides.

    The r-th positive and the r-th negative slide share site, fold and pen mark, and the amounts of tissue and focus are drawn
    alike for both, so that none of these tells the label. Slides that are there already are kept: the name of a file holds the
    hash of what it shows.

    Args:
        folder: gets ``slides/``, ``masks/`` and ``cohort.csv``.
        n_slides: number of slides.
        seed: of everything.
        base: size and mpp of the slides.

    Returns:
        The path of the cohort table (slide_id, path, patient_id, site, label, lesion_mask; label: lesion or normal).
    """
    for name in ("slides", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, ...]] = []
    for slide_id, patient_id, spec in _assign(n_slides, seed, base or SyntheticSpec()):
        digest = hashlib.sha256(f"{VERSION} {spec}".encode()).hexdigest()[:8]
        path, mask = (Path("slides") / f"{slide_id}-{digest}.tiff", Path("masks") / f"{slide_id}-{digest}.png")
        if not (folder / path).exists():
            write_slide(folder / path, spec, folder / mask)
        label = "lesion" if spec.lesion else "normal"
        rows.append((slide_id, path.as_posix(), patient_id, SITES[spec.site], label, mask.as_posix()))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("slide_id", "path", "patient_id", "site", "label", "lesion_mask"))
    table.writerows(sorted(rows))
    _put(folder / "cohort.csv", text.getvalue().encode())
    return folder / "cohort.csv"


def _assign(n_slides: int, seed: int, base: SyntheticSpec) -> Iterator[tuple[str, str, SyntheticSpec]]:
    """Slide id, patient id and spec of every slide of a cohort."""
    shuffle = np.random.default_rng([seed, n_slides])
    slide_numbers, patient_numbers = shuffle.permutation(n_slides) + 1, shuffle.permutation(n_slides) + 1
    digits = len(str(n_slides))
    for index in range(n_slides):
        rank = index // 2
        # Of every six slides with a label, the first two are of one patient.
        owner = index - 2 if rank % 6 == 1 else index
        rng = np.random.default_rng([seed, 1000 + rank])
        pens: tuple[PenColour, ...] = ("green", "blue", "black", "", "", "", "", "", "", "", "", "")
        spec = replace(
            base,
            seed=int(shuffle.integers(2**31)),
            lesion=index % 2 == 1,
            lesion_fraction=round(shuffle.uniform(0.15, 0.26), 3),
            tissue_fraction=round(shuffle.uniform(0.48, 0.62), 3),
            pen=pens[rng.integers(len(pens))],
            fold=bool(rng.random() < 0.15),
            site=rank % len(SITES),
        )
        yield f"slide-{slide_numbers[index]:0{digits}}", f"patient-{patient_numbers[owner]:0{digits}}", spec


def _level0_tiles(spec: SyntheticSpec, lower: list[_Lower], masks: list[Pixels]) -> Iterator[bytes]:
    """Encoded tiles of level 0 in file order; those of the levels below and the mask are put aside on the way."""
    plan = make_plan(spec)
    look = make_look(spec, plan.grain)
    for top in range(0, spec.size_px.height, BLOCK_PX):
        rgb, lesion = _draw_band(plan, look, spec, top)
        for level in lower:
            level.tiles.extend(_encode_tiles(_shrink(rgb, level.downsample)))
        masks.append((_shrink(lesion.astype(np.uint8) * 255, MASK_SCALE) > 127).astype(np.uint8) * 255)
        yield from _encode_tiles(rgb)


def _draw_band(plan: Plan, look: Look, spec: SyntheticSpec, top: int) -> tuple[Pixels, Mask]:
    width, height = spec.size_px
    bottom = min(top + BLOCK_PX, height)
    boxes = [Box(left, top, min(left + BLOCK_PX, width), bottom) for left in range(0, width, BLOCK_PX)]
    drawn = [draw_block(plan, look, spec, box) for box in boxes]
    return np.concatenate([rgb for rgb, _ in drawn], axis=1), np.concatenate([lesion for _, lesion in drawn], axis=1)


def _downsamples(size: Size) -> list[int]:
    count = max(0, math.ceil(math.log2(max(size) / (2 * TILE_PX))))
    return [downsample for downsample in (2**step for step in range(1, count + 1)) if downsample <= MAX_DOWNSAMPLE]


def _lower_size(size: Size, downsample: int) -> Size:
    return Size(max(1, size.width // downsample), max(1, size.height // downsample))


def _shrink(picture: Pixels, downsample: int) -> Pixels:
    size = _lower_size(Size(picture.shape[1], picture.shape[0]), downsample)
    whole = picture[: size.height * downsample, : size.width * downsample]
    return np.asarray(cv2.resize(whole, tuple(size), interpolation=cv2.INTER_AREA))


def _encode_tiles(rgb: Pixels) -> Iterator[bytes]:
    height, width = rgb.shape[:2]
    padded = np.pad(rgb, ((0, -height % TILE_PX), (0, -width % TILE_PX), (0, 0)), mode="edge")
    for top in range(0, height, TILE_PX):
        for left in range(0, width, TILE_PX):
            yield jpeg.encode(padded[top : top + TILE_PX, left : left + TILE_PX], QUALITY)


def _put(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(data)
    temporary.replace(path)
