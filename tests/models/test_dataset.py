"""The notebook interface: what the README shows works."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import pathfm
from pathfm import TileDataset, open_tiles
from pathfm.store.tile_store import write_tiles


@pytest.fixture
def stores(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("a", 3), ("b", 1), ("c", 5)):
        write_tiles(
            tmp_path / f"{name}.zarr", rng.integers(0, 255, (count, 32, 32, 3), dtype=np.uint8), slide_id=name, codec="zstd"
        )
    return tmp_path


def test_every_tile_of_every_store_in_order(stores):
    dataset = TileDataset(stores)
    assert [(sample.slide_id, sample.tile) for sample in dataset] == [
        *(("a", i) for i in range(3)),
        ("b", 0),
        *(("c", i) for i in range(5)),
    ]
    np.testing.assert_array_equal(dataset[8].image.permute(1, 2, 0).numpy(), open_tiles(stores / "c.zarr")[4])
    with pytest.raises(IndexError):
        dataset[9]


def test_it_feeds_a_data_loader(stores):
    loader = DataLoader(TileDataset(stores, transform=lambda image: image.float() / 255), batch_size=4)
    images, slide_ids, _, xy = next(iter(loader))
    assert images.shape == (4, 3, 32, 32)
    assert images.dtype == torch.float32
    assert list(slide_ids) == ["a", "a", "a", "b"]
    assert xy.shape == (4, 2)


def test_the_package_offers_what_the_readme_names():
    assert {"TileDataset", "open_features", "open_slide", "open_tiles"} <= set(dir(pathfm))
    with pytest.raises(AttributeError):
        _ = pathfm.no_such_thing
