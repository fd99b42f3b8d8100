import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from pathfm.errors import StoreError, TrainingError, UsageError
from pathfm.geometry import Size
from pathfm.pretrain.catalogue import build_catalogue
from pathfm.pretrain.data import TileBatches, load_batches
from pathfm.pretrain.reading import TileReader
from pathfm.pretrain_settings import HighResolutionSettings, SamplingSettings
from pathfm.store.tile_store import TileCodec, TileStoreInfo, TileStoreWriter
from tests.pretrain.conftest import tiny

TILE_PX = 40


def write_store(folder: Path, slide_id: str, count: int, shard_tiles: int = 8, quality=None) -> Path:
    """Tiles that all have the value of their number."""
    path = folder / f"{slide_id}.zarr"
    path.mkdir(parents=True)
    writer = TileStoreWriter(path, TileCodec("zstd"), TILE_PX, shard_tiles)
    for tile in range(count):
        column = (quality[tile],) if quality is not None else ()
        writer.append(np.full((TILE_PX, TILE_PX, 3), tile % 256, np.uint8), (tile, 0), column)
    names = ("tissue",) if quality is not None else ()
    writer.finish(TileStoreInfo(slide_id, "", TILE_PX, 0.5, 40.0, Size(99, 99), names), None)
    return path


@pytest.fixture
def numbered(tmp_path):
    return [write_store(tmp_path, slide_id, count) for slide_id, count in (("a", 30), ("b", 17), ("c", 5))]


def batches(paths, rank=0, world=1, **changes):
    settings = tiny(**changes)
    return TileBatches(build_catalogue(paths, settings.sampling, {}), settings, settings.crops, 16, rank, world)


def same(first, second):
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(first, second, strict=True))


def test_an_epoch_shows_every_tile_once_and_the_next_in_another_order(numbered):
    data = batches(numbered, sampling=SamplingSettings(slide_power=1.0))
    epochs = [[pair for step in range(start, start + 13) for pair in data.sources(step)] for start in (0, 13)]
    everything = {(slide_id, tile) for slide_id, count in (("a", 30), ("b", 17), ("c", 5)) for tile in range(count)}
    assert all(len(epoch) == 52 and set(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_the_pixels_are_those_of_the_sources(numbered):
    data = batches(numbered)
    for step in range(20):
        batch = data[step]
        assert batch.global_crops[:4, 0, 0, 0].tolist() == [tile for _, tile in data.sources(step)]
        assert batch.replaced == 0


def test_too_few_tiles_is_an_error_that_says_so(tmp_path):
    with pytest.raises(TrainingError, match=r"pretrain.batch_size: 3 tiles in 2 stores are fewer than one batch of 4"):
        batches([write_store(tmp_path, "a", 2), write_store(tmp_path, "b", 1)])


def test_a_batch_that_cannot_be_cut_is_an_error_that_says_so(numbered):
    with pytest.raises(UsageError, match=r"a batch of 8 cannot be cut into 2 parts for 3 processes.*multiple of 6"):
        batches(numbered, world=3, batch_size=8, accumulate=2)


def test_the_rows_of_a_batch_fit_together(numbered):
    batch = batches(numbered)[3]
    assert batch.global_crops.shape == (8, 32, 32, 3) and batch.local_crops.shape == (8, 16, 16, 3)
    value = batch.global_crops[:, 0, 0, 0]
    assert torch.equal(value[:4], value[4:]) and torch.equal(batch.local_crops[:4, 0, 0, 0], value[:4])
    assert batch.masks_CP.sum() == len(batch.masked_M) == len(batch.weight_M)
    assert batch.masks_CP.flatten()[batch.masked_M].all()
    assert batch.weight_M.sum() == pytest.approx(4)  # one per masked crop, half of the eight


def test_no_local_crops_is_allowed(numbered):
    crops = tiny().crops.model_copy(update={"local_count": 0})
    assert batches(numbered, crops=crops)[0].local_crops.shape == (0, 16, 16, 3)


def test_seed_and_step_decide_everything(stores):
    data, other = batches(stores), batches(stores, seed=1)
    assert same(data[1], batches(stores[::-1])[1])
    assert not torch.equal(data[1].global_colour, data[2].global_colour)
    assert not torch.equal(data[1].global_colour, other[1].global_colour)
    assert not torch.equal(data[1].global_crops, other[1].global_crops)


@pytest.mark.parametrize(("accumulate", "world"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_pieces_together_are_the_whole_batch(stores, accumulate, world):
    whole = batches(stores, batch_size=8)
    for step in (0, 7):
        parts = [
            batches(stores, rank, world, batch_size=8, accumulate=accumulate)[step * accumulate + part]
            for part in range(accumulate)
            for rank in range(world)
        ]
        expected = whole[step]
        for name in ("global_crops", "local_crops", "global_colour", "local_colour", "masks_CP"):
            rows = [getattr(part, name).unflatten(0, (-1, 8 // accumulate // world)) for part in parts]
            assert torch.equal(torch.cat(rows, dim=1).flatten(0, 1), getattr(expected, name)), name
        assert sum(part.weight_M.sum() for part in parts) == pytest.approx(8)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # there may be fewer cores than processes here
def test_worker_processes_change_nothing(tmp_path, stores):
    settings = tiny()
    catalogue = build_catalogue(stores, settings.sampling, {}).saved(tmp_path / "catalogue", "")
    data = TileBatches(catalogue, settings, settings.crops, 16)
    alone, shared = ([*load_batches(data, range(3, 8), count)] for count in (0, 3))
    assert len(alone) == len(shared) == 5
    assert all(same(*pair) for pair in zip(alone, shared, strict=True))


def test_high_resolution_comes_late_and_fits_the_tiles(numbered):
    late = HighResolutionSettings(start=0.5, global_px=64, local_px=32)
    crops = tiny().crops.model_copy(update={"global_px": 16})
    data = batches(numbered, steps=8, crops=crops, high_resolution=late)
    assert [data.crops_at(step).global_px for step in range(8)] == [16] * 4 + [32] * 4
    before, after = data[3], data[4]
    assert before.global_crops.shape[1] == 16 and before.masks_CP.shape[1] == 1
    assert after.global_crops.shape[1] == 32 and after.masks_CP.shape[1] == 4
    never = batches(numbered, steps=8)
    assert never.crops_at(7) == never.crops_at(10**6) == tiny().crops


def test_tiles_of_better_quality_come_more_often(tmp_path):
    quality = np.random.default_rng(0).uniform(0, 1, 40)
    quality[5], quality[6] = 0, np.nan
    path = write_store(tmp_path, "a", 40, quality=quality)
    settings = tiny(sampling=SamplingSettings(quality=("tissue",)))
    reader = TileReader(build_catalogue([path], settings.sampling, {}), settings)
    drawn = Counter(place.tile for place in reader.places(np.arange(100_000)))
    wanted = np.nan_to_num(quality) / np.nansum(quality)
    found = np.array([drawn[tile] for tile in range(40)]) / 100_000
    assert found[[5, 6]].tolist() == [0, 0]
    assert found == pytest.approx(wanted, rel=0.01, abs=1e-4)


def test_quality_weights_only_the_tiles_within_the_cap(tmp_path):
    path = write_store(tmp_path, "a", 40, quality=np.linspace(0.5, 1, 40))
    sampling = SamplingSettings(quality=("tissue",), max_tiles_per_slide=10)
    data = batches([path], sampling=sampling)
    assert len({tile for step in range(100) for _, tile in data.sources(step)}) == 10


def test_quality_that_is_nought_everywhere_weighs_nothing(tmp_path):
    data = batches([write_store(tmp_path, "a", 9, quality=np.zeros(9))], sampling=SamplingSettings(quality=("tissue",)))
    assert len({tile for step in range(9) for _, tile in data.sources(step)}) == 9


def harmed(path: Path, shard: int) -> None:
    file = path / "tiles" / "c" / str(shard) / "0" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[0:4] = b"\0\0\0\0"  # the first tile of the shard is no zstd data any more
    file.write_bytes(data)


def test_a_damaged_tile_is_replaced_by_another_of_its_slide_and_told_once(numbered, caplog):
    harmed(numbered[0], 0)
    harmed(numbered[0], 2)
    data = batches(numbered, sampling=SamplingSettings(slide_power=1.0))
    pixels = [(data[step], data.sources(step)) for step in range(26)]
    replaced = 0
    for batch, sources in pixels:
        for value, (slide_id, tile) in zip(batch.global_crops[:4, 0, 0, 0].tolist(), sources, strict=True):
            bad = slide_id == "a" and tile in (0, 16)
            replaced += bad
            assert value == (tile + 1 if bad else tile)
    assert replaced == sum(batch.replaced for batch, _ in pixels) == 4
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and "slide a, tile" in told[0] and "a.zarr" in told[0]


def test_a_lost_shard_costs_its_tiles_only(numbered):
    shutil.rmtree(numbered[0] / "tiles" / "c" / "1")
    data = batches(numbered, sampling=SamplingSettings(slide_power=1.0))
    assert sum(data[step].replaced for step in range(13)) == 8


def test_a_slide_without_a_readable_tile_is_an_error_that_names_it(numbered):
    data = batches(numbered)
    shutil.rmtree(numbered[2] / "tiles")
    with pytest.raises(StoreError, match=r"c\.zarr.*shard cannot be opened"):
        [data[step] for step in range(20)]


def test_open_files_are_bounded(tmp_path):
    paths = [write_store(tmp_path, f"s{number:02}", 16, shard_tiles=2) for number in range(24)]
    data = batches(paths, sampling=SamplingSettings(run_tiles=2, window_runs=6), batch_size=8)
    most = 0
    before = len([*Path("/proc/self/fd").iterdir()])
    for step in range(100):
        data[step]
        most = max(most, len([*Path("/proc/self/fd").iterdir()]) - before)
    assert 6 <= most <= 2 * 6 + 1
