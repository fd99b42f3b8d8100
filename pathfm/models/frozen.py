"""A frozen encoder as a teacher: whatever network, with class and patch features of images that are normalised our way.

Shapes: N images, P patches of an image (row-major), D features.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pathfm.errors import UsageError
from pathfm.models.checkpoints import MEAN, STD
from pathfm.models.networks import Network, load_network


class Features(NamedTuple):
    """Of N images: one vector each, and one for each cell of a square grid [N, P, D] (None where a network has no grid)."""

    pooled_ND: Tensor
    patches_NPD: Tensor | None


class FrozenEncoder:
    """An encoder that is looked at and never trained. It is no module: its weights belong into nobody's checkpoint.

    Args:
        name: as in ``extract.encoder``.
        device: where it runs.

    Raises:
        UsageError: no such encoder, or its weights are not to be had here.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        network = _loaded(name)
        self._model: nn.Module = network.model.eval().requires_grad_(False).to(device)
        card = network.card
        self._input_px = card.input_px
        ours, theirs = (
            torch.tensor(values, device=device).view(2, 1, 3, 1, 1) for values in ((MEAN, STD), (card.mean, card.std))
        )
        self._factor, self._offset = ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1]
        self._prefix = getattr(self._model, "num_prefix_tokens", None)
        with torch.no_grad():
            sample = self(torch.zeros(1, 3, self._input_px, self._input_px, device=device))
        self.dim = sample.pooled_ND.shape[1]
        self.patch_dim = None if sample.patches_NPD is None else sample.patches_NPD.shape[2]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Features of images [N, 3, H, H] normalised our way; they are resized to the side that the encoder was made for."""
        images = images * self._factor.to(images.dtype) + self._offset.to(images.dtype)
        if images.shape[-1] != self._input_px:
            side = (self._input_px, self._input_px)
            images = functional.interpolate(images, size=side, mode="bicubic", antialias=True)
        out: Tensor = self._model.forward_features(images)  # type: ignore[operator]
        pooled: Tensor = self._model.forward_head(out, pre_logits=True)  # type: ignore[operator]
        if self._prefix is not None and out.ndim == 3:
            patches = out[:, self._prefix :]
        elif out.ndim == 4 and hasattr(self._model, "stages"):
            patches = out.flatten(2).mT if out.shape[1] == pooled.shape[1] else out.flatten(1, 2)
        else:
            return Features(pooled, None)
        return Features(pooled, patches if math.isqrt(patches.shape[1]) ** 2 == patches.shape[1] else None)


def _loaded(name: str) -> Network:
    try:
        return load_network(name)
    except UsageError as error:
        raise UsageError(error.what, where="pretrain.teacher", fix=error.fix) from error
