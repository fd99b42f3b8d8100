"""The small labelled set of tiles that the teacher is probed with during training: a CSV with path, label, group and part."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from pathfm.errors import UsageError
from pathfm.geometry import scale_length

COLUMNS = ("path", "label", "group", "part")
PARTS = ("train", "val")


@dataclass(frozen=True)
class ProbeTable:
    """Labelled tiles in two parts that share no group.

    Attributes:
        paths: image files.
        labels: class numbers, by the sorted names of the classes.
        groups: patients, or whatever must not be on both sides.
        is_train: whether a tile is for fitting; the others are for scoring.
        classes: their number.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    groups: tuple[str, ...]
    is_train: tuple[bool, ...]
    classes: int

    def pixels(self, side_px: int, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """The middle square of tiles ``start`` to ``stop``, [n, side_px, side_px, 3].

        Raises:
            UsageError: a file is no image, or smaller than that.
        """
        return np.stack([_middle(path, side_px) for path in self.paths[start:stop]])


def read_probe_table(path: Path) -> ProbeTable:
    """Reads and checks the table. Relative paths start at its folder.

    Raises:
        UsageError: the file or a column is missing, a row is incomplete, a part is unknown, a group is in both parts, or a
            class is not in both; the message names the row.
    """
    if not path.is_file():
        raise UsageError("there is no such file", where=f"pretrain.health.probe: {path}")
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        reader = csv.DictReader(stream)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise UsageError(
                f"no column {', '.join(missing)}", where=str(path), fix=f"the probe table has the columns {', '.join(COLUMNS)}"
            )
        rows = [(f"{path}:{reader.line_num}", {name: (row[name] or "").strip() for name in COLUMNS}) for row in reader]
    for problem in (*_bad_rows(rows, path.parent), *_bad_parts(rows, path)):
        raise problem
    classes = sorted({row["label"] for _, row in rows})
    return ProbeTable(
        paths=tuple(path.parent / row["path"] for _, row in rows),
        labels=tuple(classes.index(row["label"]) for _, row in rows),
        groups=tuple(row["group"] for _, row in rows),
        is_train=tuple(row["part"] == "train" for _, row in rows),
        classes=len(classes),
    )


def _bad_rows(rows: list[tuple[str, dict[str, str]]], folder: Path) -> Iterator[UsageError]:
    part_of: dict[str, str] = {}
    for place, row in rows:
        empty = [name for name in COLUMNS if not row[name]]
        if empty:
            yield UsageError(f"no {', '.join(empty)}", where=place, fix="every tile needs all of them")
        elif row["part"] not in PARTS:
            yield UsageError(
                f"part {row['part']!r} is unknown", where=place, fix=f"write {' or '.join(PARTS)}; never a test set"
            )
        elif not (folder / row["path"]).is_file():
            yield UsageError(f"{row['path']}: there is no such file", where=place, fix="paths start at the table's folder")
        elif part_of.setdefault(row["group"], row["part"]) != row["part"]:
            yield UsageError(
                f"group {row['group']!r} is in both parts", where=place, fix="a patient's tiles are all train or all val"
            )


def _bad_parts(rows: list[tuple[str, dict[str, str]]], path: Path) -> Iterator[UsageError]:
    parts = [{row["label"] for _, row in rows if row["part"] == part} for part in PARTS]
    if min(len(labels) for labels in parts) < 2:
        yield UsageError("train and val need tiles of two labels or more each", where=str(path))
    elif parts[0] != parts[1]:
        alone = ", ".join(sorted(parts[0] ^ parts[1]))
        yield UsageError(f"only one part has the label {alone}", where=str(path), fix="give both parts tiles of every label")


def _middle(path: Path, side_px: int) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except OSError as error:
        raise UsageError("not a readable image", where=str(path), fix="take it out of pretrain.health.probe") from error
    return middle(pixels, side_px)


def middle(pixels: npt.NDArray[np.uint8], side_px: int) -> npt.NDArray[np.uint8]:
    """The middle of an image [H, W, 3] as a square of ``side_px``; smaller images are enlarged first, as crops of them are."""
    height, width = pixels.shape[:2]
    if min(height, width) < side_px:
        larger = side_px / min(height, width)
        size = (max(side_px, scale_length(width, larger)), max(side_px, scale_length(height, larger)))
        pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
    top, left = (pixels.shape[0] - side_px) // 2, (pixels.shape[1] - side_px) // 2
    return pixels[top : top + side_px, left : left + side_px]
