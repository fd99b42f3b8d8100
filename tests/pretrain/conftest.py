"""Small tile stores, and settings with which a step takes milliseconds."""

from pathlib import Path

import numpy as np
import pytest

from pathfm.pretrain.catalogue import build_catalogue
from pathfm.pretrain.data import TileBatches
from pathfm.pretrain_settings import CropSettings, PretrainSettings
from pathfm.store.tile_store import write_tiles
from pathfm.study import ComputeSettings, Study

TILES_PER_SLIDE = {"a": 24, "b": 10, "c": 7}


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("tiles")
    for slide_id, count in TILES_PER_SLIDE.items():
        random = np.random.default_rng(len(slide_id) + count)
        coarse = random.integers(60, 255, (count, 10, 10, 3), dtype=np.uint8)
        write_tiles(folder / f"{slide_id}.zarr", coarse.repeat(4, axis=1).repeat(4, axis=2), slide_id=slide_id, codec="zstd")
    return [folder / f"{slide_id}.zarr" for slide_id in TILES_PER_SLIDE]


def tiny(**changes) -> PretrainSettings:
    defaults = {
        "backbone": "vit_tiny_patch16_224",
        "steps": 3,
        "batch_size": 4,
        "prototypes": 32,
        "head_hidden": 24,
        "head_bottleneck": 16,
        "warmup_steps": 1,
        "freeze_last_layer_steps": 1,
        "registers": 0,
        "health": {"tiles": 16, "maps": 0},
        "koleo_weight": 0.1,
        "kde_weight": 0.0,
        "crops": CropSettings(global_px=32, local_px=16, local_count=2),
    }
    return PretrainSettings(**{**defaults, **changes})


def study(**changes) -> Study:
    return Study(pretrain=tiny(**changes), compute=ComputeSettings(device="cpu", threads=1))


def batches(stores: list[Path], settings: PretrainSettings, patch_px: int = 16) -> TileBatches:
    return TileBatches(build_catalogue(stores, settings.sampling, {}), settings, settings.crops, patch_px)
