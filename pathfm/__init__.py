"""pathfm: a foundation-model pipeline for pathology (tile, pretrain, extract, classify)."""

__version__ = "0.1.0"
