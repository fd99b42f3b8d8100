"""What one run of pretraining is: the same in every process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathfm.models.lora import merged_state
from pathfm.models.vit import MaskedViT, build_backbone
from pathfm.pretrain.catalogue import Catalogue
from pathfm.pretrain.data import TileBatches
from pathfm.pretrain.probe_table import ProbeTable, read_probe_table
from pathfm.pretrain.reading import Pixels, TileReader
from pathfm.pretrain_settings import PretrainSettings
from pathfm.study import ComputeSettings
from pathfm.workers import usable_cores

CHECKPOINTS, INITIAL_MANIFEST = "checkpoints", "initial-manifest.csv"
LOOKED_AT = 7_919
"""Added to the seed, so that the tiles looked at are not simply the first batches."""


@dataclass(frozen=True)
class Job:
    """One run, the same in every process.

    Attributes:
        settings: of pretraining, with crops that fit the tiles.
        compute: of this computer.
        folder: where the encoder goes.
        fingerprint: of everything it depends on.
        catalogue: the tiles.
        patch_px: side of the backbone's patches [px].
        card: what is said of the encoder, apart from its training.
    """

    settings: PretrainSettings
    compute: ComputeSettings
    folder: Path
    fingerprint: str
    catalogue: Catalogue
    patch_px: int
    card: Mapping[str, Any]

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / CHECKPOINTS

    def batches(self, rank: int, world: int) -> TileBatches:
        """What one of the processes trains on."""
        return TileBatches(self.catalogue, self.settings, self.settings.crops, self.patch_px, rank, world)

    def fixed_tiles(self) -> Pixels:
        """The tiles that are looked at now and then: the same ones at every look, drawn as the training draws."""
        settings, side = self.settings, self.catalogue.tile_px
        reader = TileReader(self.catalogue, settings.model_copy(update={"seed": settings.seed + LOOKED_AT}))
        count = min(settings.health.tiles, reader.epoch)
        places = reader.places(np.arange(count) * (reader.epoch // count))
        tiles = [reader.read(place)[0] for place in places]
        starts = [(len(tile) - side) // 2 for tile in tiles]
        return np.stack([tile[start : start + side, start : start + side] for tile, start in zip(tiles, starts, strict=True)])

    @property
    def probe(self) -> ProbeTable | None:
        """Labelled tiles to look at, if there are any."""
        return read_probe_table(self.settings.health.probe) if self.settings.health.probe else None

    @property
    def workers(self) -> int:
        """Processes that read and cut tiles for each process that trains; 0 where it does that itself."""
        if self.compute.workers or self.compute.device == "cpu" or not torch.cuda.is_available():
            return self.compute.workers
        return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def whole(backbone: MaskedViT, settings: PretrainSettings) -> MaskedViT:
    """A backbone that is whole and plain: itself, or a copy with shards gathered and LoRA merged. All processes call it."""
    if settings.train != "lora" and not any(hasattr(tensor, "full_tensor") for tensor in backbone.parameters()):
        return backbone
    state: dict[str, Tensor] = {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in backbone.state_dict().items()
    }
    with torch.random.fork_rng(devices=[]):
        plain = MaskedViT(build_backbone(settings, settings.crops.global_px))
    plain.position_offset = backbone.position_offset
    if settings.train == "lora":
        state = merged_state(state)
    plain.load_state_dict(state)
    return plain.to(next(iter(state.values())).device).eval()
