"""pathfm: a foundation-model pipeline for pathology (tile, pretrain, extract, classify).

For notebooks::

    from pathfm import TileDataset, open_features, open_slide, open_tiles
"""

from importlib import import_module

__version__ = "0.1.0"

_NOTEBOOK = {
    "TileDataset": "pathfm.models.dataset",
    "open_features": "pathfm.store.feature_file",
    "read_features": "pathfm.store.interop.features",
    "open_slide": "pathfm.slides.reader",
    "open_tiles": "pathfm.store.tile_store",
}
"""What notebooks use, and where it lives; loaded when first asked for, so that importing pathfm costs nothing."""


def __getattr__(name: str) -> object:
    if name not in _NOTEBOOK:
        raise AttributeError(f"module 'pathfm' has no attribute {name!r}")
    return getattr(import_module(_NOTEBOOK[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_NOTEBOOK])
