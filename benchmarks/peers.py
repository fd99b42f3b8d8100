"""Other readers, where they are installed: cucim, tiffslide, pyvips, fastslide. None of them is needed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np

Reader = Callable[[np.ndarray], int]


def _regions(read: Callable[[int, int, int], np.ndarray], side: int, shrink: int) -> Reader:
    """Regions of level 0, shrunk by an area filter."""

    def run(corners: np.ndarray) -> int:
        for x, y in corners.tolist():
            pixels = read(x, y, side * shrink)
            if shrink > 1:
                cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA)
        return len(corners)

    return run


def _cucim(path: Path, side: int, shrink: int, module: ModuleType) -> Reader:
    image = module.CuImage(str(path))
    return _regions(lambda x, y, size: np.asarray(image.read_region((x, y), (size, size), 0)), side, shrink)


def _tiffslide(path: Path, side: int, shrink: int, module: ModuleType) -> Reader:
    slide = module.TiffSlide(path)
    return _regions(lambda x, y, size: slide.read_region((x, y), 0, (size, size), as_array=True), side, shrink)


def _fastslide(path: Path, side: int, shrink: int, module: ModuleType) -> Reader:
    slide = module.FastSlide.from_file_path(str(path))
    return _regions(lambda x, y, size: np.asarray(slide.read_region((x, y), 0, (size, size)).numpy()), side, shrink)


def _pyvips(path: Path, side: int, shrink: int, module: ModuleType) -> Reader:
    image = module.Image.tiffload(str(path), access="random")
    region = module.Region.new(image.shrink(shrink, shrink) if shrink > 1 else image)

    def run(corners: np.ndarray) -> int:
        for x, y in (corners // shrink).tolist():
            np.frombuffer(region.fetch(x, y, side, side), dtype=np.uint8)
        return len(corners)

    return run


_MAKERS: dict[str, Callable[[Path, int, int, ModuleType], Reader]] = {
    "cucim": _cucim,
    "tiffslide": _tiffslide,
    "fastslide": _fastslide,
    "pyvips": _pyvips,
}


def _if_installed(name: str) -> Callable[[Path, int, int], Reader | None]:
    def make(path: Path, side: int, shrink: int) -> Reader | None:
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError):
            return None
        return _MAKERS[name](path, side, shrink, module)

    return make


PEERS = {name: _if_installed(name) for name in _MAKERS}
"""Name -> maker of a reader (slide, side [px], shrink); None where the peer is not installed."""
