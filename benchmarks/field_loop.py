"""The loop that the field runs, written from its description: ``python -m benchmarks.field_loop NET OUT SLIDE TILES.npy ...``.

One slide after another, each with a DataLoader of its own whose worker processes read with OpenSlide and resize with PIL; fp32;
all features of a slide in memory until they are saved. Tissue detection is not part of it: corners and side of the tiles are
given. The network is loaded once for all slides, which is kinder than a process for each.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import openslide
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from pathfm.workers import usable_cores

INPUT_PX, BATCH = 224, 64
WORKERS_PER_CORE = 0.75
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


class Tiles(Dataset[torch.Tensor]):
    """Normalised tiles [3, 224, 224] of a slide, from level 0.

    Args:
        slide: the file.
        boxes: left, top and side [n, 3] [level-0 px].
    """

    def __init__(self, slide: Path, boxes: np.ndarray) -> None:
        self._path, self._boxes = slide, boxes
        self._slide: openslide.OpenSlide | None = None
        self._mean, self._std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    def __len__(self) -> int:
        return len(self._boxes)

    def __getitem__(self, index: int) -> torch.Tensor:
        self._slide = self._slide or openslide.OpenSlide(self._path)
        left, top, side = self._boxes[index].tolist()
        picture = self._slide.read_region((left, top), 0, (side, side)).convert("RGB")
        if side != INPUT_PX:
            picture = picture.resize((INPUT_PX, INPUT_PX), Image.Resampling.BICUBIC)
        values = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div(255)
        return (values - self._mean) / self._std


@torch.inference_mode()
def main(name: str, out: Path, slides: list[tuple[Path, Path]]) -> None:
    """A file of features per slide."""
    net = timm.create_model(name, pretrained=False, num_classes=0).eval()
    workers = max(1, int(WORKERS_PER_CORE * usable_cores()))
    for slide, tiles in slides:
        loader = DataLoader(Tiles(slide, np.load(tiles)), batch_size=BATCH, num_workers=workers)
        features = [net(images_BCHW) for images_BCHW in loader]
        torch.save(torch.cat(features), out / f"{slide.stem}.pt")


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[3:]]
    main(sys.argv[1], Path(sys.argv[2]), list(zip(given[::2], given[1::2], strict=True)))
