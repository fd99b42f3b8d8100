"""Slide encoders that others trained (``pathfm/models/slide_encoders.py``): a frozen vector per slide, and one linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from pathfm.errors import SlideError, UsageError
from pathfm.mil.aggregators.contract import Aggregator, Packed, Pooled
from pathfm.mil.aggregators.segments import by_bag
from pathfm.models.slide_encoders import SlideEncoder, check_features, load_slide_encoder


class Pretrained(Aggregator):
    """The vector of a slide encoder, normalised to mean 0 and variance 1, then one linear layer, which alone is trained.

    The encoder is given the features as they are, and corners in level-0 px: positions in tile sides times
    ``tile_side_level0``. Encoders that see the grid only (TITAN, GigaPath) take any side. Its weights are no part of the state:
    ``identity`` tells two of them apart. Neither attention nor gradients pass through it: where it looks is not known.

    Args:
        width: length of a feature.
        outputs: of the network.
        encoder: a name in ``SLIDE_ENCODERS``, or ``python:MODULE:FUNCTION``.
        tile_side_level0: side of a tile [level-0 px].

    Raises:
        UsageError: the encoder is not here, or does not take features of this length.
    """

    projected = False
    uses_positions = True
    duplicates = "change"

    def __init__(self, width: int, outputs: int, encoder: str, tile_side_level0: float = 256.0) -> None:
        super().__init__()
        self.name, self.side = encoder, tile_side_level0
        self._loaded = {"cpu": load_slide_encoder(encoder, torch.device("cpu"))}
        needs = self._loaded["cpu"].needs
        if needs is not None and needs.dim != width:
            what = f"{encoder} takes {needs.dim} features per tile, these are {width}"
            raise UsageError(what, where="mil.aggregator", fix=f"extract with extract.encoder={needs.name}")
        length = self._loaded["cpu"].dim or self._vector(torch.ones(2, width), torch.tensor([[0.0, 0.0], [1.0, 0.0]])).numel()
        self.head = nn.Linear(length, outputs)

    @property
    def identity(self) -> str:
        """Changes whenever the vectors of the same features do."""
        return self._loaded["cpu"].identity

    def check_features(self, attrs: Mapping[str, Any], dim: int) -> None:
        """Whether features are those that the slide encoder was trained on, by the attributes of their file.

        Raises:
            UsageError: features of another tile encoder, pooling, or size of tiles.
        """
        try:
            check_features(self._loaded["cpu"], dict(attrs), dim)
        except SlideError as error:
            raise UsageError(error.what, where="mil.aggregator", fix=error.fix) from None

    def forward(self, packed: Packed) -> Pooled:
        """See ``Aggregator``."""
        bags = zip(by_bag(packed.tile_NH, packed.lengths), by_bag(packed.xy_N2, packed.lengths), strict=True)
        slide_BH = torch.stack([self._vector(tile_LH, xy_L2) for tile_LH, xy_L2 in bags])
        return Pooled(self.head(layer_norm(slide_BH, slide_BH.shape[1:])), slide_BH)

    def _vector(self, tile_LH: Tensor, xy_L2: Tensor) -> Tensor:
        corner_L2 = (xy_L2.double() * self.side).round().long().cpu().numpy()
        # Sorted by place: what others do with the order of tiles is not known.
        order_L = np.lexsort(corner_L2.T)
        feature_LD = tile_LH.detach().float().cpu().numpy()[order_L]
        vector_H = np.asarray(self._on(tile_LH.device)(feature_LD, corner_L2[order_L], self.side), dtype=np.float32)
        if vector_H.ndim != 1 or not np.isfinite(vector_H).all():
            raise SlideError(f"the slide encoder {self.name} gives {list(vector_H.shape)}, not one vector of finite numbers")
        return torch.from_numpy(vector_H).to(tile_LH.device)

    def _on(self, device: torch.device) -> SlideEncoder:
        if str(device) not in self._loaded:
            self._loaded[str(device)] = load_slide_encoder(self.name, device)
        return self._loaded[str(device)]
