"""The stream: rows reach the right slide in order, whatever the batch, the threads, a damaged slide or too little memory."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from pathfm.errors import StoreError, UnreadableSlideError
from pathfm.extract.stream import Device, OutOfMemoryError, run_stream
from pathfm.extract.tiles import Batches, SlideWork
from pathfm.extract.writing import WriterThread
from pathfm.store.tile_store import TileCodec, TileStoreInfo, TileStoreWriter, open_tiles, write_tiles

CPU = torch.device("cpu")
COUNTS = (5, 1, 70, 16, 3)


def marked(slide, tile):
    """A tile whose pixels say which slide and tile it is."""
    return np.full((16, 16, 3), (slide * 10 + 1, tile, 7), dtype=np.uint8)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    made = []
    for slide, count in enumerate(COUNTS):
        path = folder / f"s{slide}.zarr"
        write_tiles(path, np.stack([marked(slide, tile) for tile in range(count)]), slide_id=f"s{slide}", codec="zstd")
        made.append(open_tiles(path))
    return made


class Kept:
    """A writer that keeps what it is given."""

    def __init__(self, log, key, fails=False):
        self.rows, self._log, self._key, self._fails = {}, log, key, fails

    def write(self, start, rows, valid):
        if self._fails:
            raise StoreError("the disk is full")
        self.rows.update({start + number: row.copy() for number, row in enumerate(rows)})

    def commit(self):
        self._log[self._key] = self.rows

    def abort(self):
        self._log.setdefault("aborted", []).append(self._key)


def mean_colour(tiles):
    return tiles.float().mean(dim=(1, 2))


def host_colour(tiles):
    return tiles.astype(np.float32).mean(axis=(1, 2))


def run(works, size, *, encoders=None, host=None, threads=2, fails=(), pixels_of=None):
    log, over = {}, []

    def open_writer(work, number, shape):
        return Kept(log, (work.slide_id, number), fails=work.slide_id in fails)

    device = Device(CPU, {0: mean_colour} if encoders is None else encoders)
    with Batches(works, size, threads, host or {}, pixels_of) as batches, WriterThread(open_writer, over.append) as writer:
        pace = run_stream(batches, device, writer, 1)
    return log, over, pace


@pytest.mark.parametrize("size", [1, 7, 16, 64, 200])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_row_is_its_tile(stores, size, threads):
    log, over, pace = run([SlideWork(store, (0, 1)) for store in stores], size, host={1: (3, host_colour)}, threads=threads)
    assert [work.slide_id for work in over] == [store.slide_id for store in stores]
    assert pace.tiles == sum(COUNTS)
    for slide, count in enumerate(COUNTS):
        for number in (0, 1):
            rows = log[f"s{slide}", number]
            assert sorted(rows) == list(range(count))
            for tile, row in rows.items():
                np.testing.assert_array_equal(row, (slide * 10 + 1, tile, 7))


def test_batches_are_filled_across_slides_and_padded_to_eights(stores):
    seen = []

    def encode(tiles):
        seen.append(len(tiles))
        return mean_colour(tiles)

    run([SlideWork(store, (0,)) for store in stores], 32, encoders={0: encode})
    assert seen == [32, 32, 32]  # 95 tiles: the last of them is padded by one
    seen.clear()
    run([SlideWork(stores[0], (0,))], 32, encoders={0: encode})
    assert seen == [8]


def test_only_what_is_stale_is_computed(stores):
    seen = []

    def second(tiles):
        seen.append(len(tiles))
        return mean_colour(tiles)

    log, _, _ = run([SlideWork(stores[0], (0,)), SlideWork(stores[3], (0, 1))], 8, encoders={0: mean_colour, 1: second})
    assert sum(seen) == 24  # two batches of 8 hold tiles of the second slide, and one more
    assert set(log) == {("s0", 0), ("s3", 0), ("s3", 1)}


def test_a_damaged_slide_fails_alone(stores, tmp_path):
    path = tmp_path / "bad.zarr"
    write_tiles(path, np.stack([marked(9, tile) for tile in range(40)]), slide_id="bad", codec="zstd")
    shard = next((path / "tiles").rglob("0/0/0/0"))
    data = bytearray(shard.read_bytes())
    data[8:24] = bytes(16)
    shard.write_bytes(bytes(data))
    works = [SlideWork(stores[0], (0,)), SlideWork(open_tiles(path), (0,)), SlideWork(stores[2], (0,))]
    log, over, _ = run(works, 8)
    assert {work.slide_id: work.error is None for work in over} == {"s0": True, "bad": False, "s2": True}
    assert set(log) - {"aborted"} == {("s0", 0), ("s2", 0)}
    assert len(log["s2", 0]) == 70


def test_a_file_that_cannot_be_written_fails_its_slide_and_nothing_of_it_appears(stores):
    log, over, _ = run([SlideWork(store, (0,)) for store in stores], 16, fails={"s2"})
    assert [work.slide_id for work in over if work.error] == ["s2"]
    assert ("s2", 0) in log["aborted"]
    assert ("s2", 0) not in log


def test_a_defect_of_the_writer_is_raised(stores):
    def open_writer(work, number, shape):
        raise TypeError("a defect")

    with (
        pytest.raises(TypeError, match="a defect"),
        Batches([SlideWork(store, (0,)) for store in stores], 4, 1, {}) as batches,
        WriterThread(open_writer, lambda work: None) as writer,
    ):
        run_stream(batches, Device(CPU, {0: mean_colour}), writer, 1)


def test_too_little_memory_halves_the_batch_and_changes_nothing(stores):
    sizes = []

    def hungry(tiles):
        if len(tiles) > 16:
            raise torch.OutOfMemoryError("too much")
        sizes.append(len(tiles))
        return mean_colour(tiles)

    log, _, _ = run([SlideWork(store, (0,)) for store in stores], 64, encoders={0: hungry})
    plain, _, _ = run([SlideWork(store, (0,)) for store in stores], 64)
    assert max(sizes) == 16
    assert log.keys() == plain.keys()
    for key, rows in log.items():
        np.testing.assert_array_equal(list(rows.values()), list(plain[key].values()))


def test_an_encoder_that_does_not_fit_at_all_says_so(stores):
    def never(tiles):
        raise torch.OutOfMemoryError("too much")

    with pytest.raises(OutOfMemoryError, match="does not fit into the memory of cpu"):
        run([SlideWork(stores[2], (0,))], 64, encoders={0: never})


def test_other_runtime_errors_pass(stores):
    def wrong(tiles):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        run([SlideWork(stores[0], (0,))], 64, encoders={0: wrong})


@pytest.fixture
def bare_store(tmp_path):
    """A store of 20 tiles whose pixels stay in the slide."""
    writer = TileStoreWriter(tmp_path, TileCodec("none"), 16)
    for tile in range(20):
        writer.append_encoded(b"", (16 * tile, 0))
    from pathfm.geometry import Size

    writer.finish(TileStoreInfo("bare", "0", 16, 0.5, 16.0, Size(320, 16)), np.zeros((4, 4, 3), np.uint8))
    return open_tiles(tmp_path)


def test_tiles_come_straight_from_a_slide_and_unreadable_ones_are_noted(stores, bare_store):
    work = SlideWork(bare_store, (0,))

    def pixels_of(store, threads):
        return (None if tile == 4 else marked(1, tile) for tile in range(20))

    log, _, _ = run([SlideWork(stores[2], (0,)), work], 8, pixels_of=pixels_of)
    assert np.flatnonzero(~work.valid).tolist() == [4]
    for tile, row in log["bare", 0].items():
        np.testing.assert_array_equal(row, (0, 0, 0) if tile == 4 else (11, tile, 7))


def test_a_slide_that_breaks_off_or_is_unreadable_altogether_fails(stores, bare_store):
    def breaks(store, threads):
        yield from (marked(1, tile) for tile in range(3))
        raise UnreadableSlideError("its file is damaged")

    for pixels_of in (breaks, lambda store, threads: iter([None] * 20)):
        log, over, _ = run([SlideWork(bare_store, (0,)), SlideWork(stores[0], (0,))], 8, pixels_of=pixels_of)
        assert {work.slide_id: work.error is None for work in over} == {"bare": False, "s0": True}
        assert set(log) - {"aborted"} == {("s0", 0)}


def test_what_nobody_foresaw_ends_one_slide_only(stores, bare_store):
    def odd(store, threads):
        yield marked(1, 0)
        raise IndexError("nobody foresaw this")

    log, over, _ = run([SlideWork(bare_store, (0,)), SlideWork(stores[2], (0,))], 8, pixels_of=odd)
    errors = {work.slide_id: work.error and work.error.reason for work in over}
    assert errors == {"bare": "internal error: nobody foresaw this (IndexError)", "s2": None}
    assert len(log["s2", 0]) == 70


def test_slides_are_opened_side_by_side(tmp_path):
    from pathfm.geometry import Size

    works = []
    for slide in range(6):
        writer = TileStoreWriter(tmp_path / str(slide), TileCodec("none"), 16)
        for tile in range(5):
            writer.append_encoded(b"", (16 * tile, 0))
        writer.finish(TileStoreInfo(str(slide), "0", 16, 0.5, 16.0, Size(320, 16)), np.zeros((4, 4, 3), np.uint8))
        works.append(SlideWork(open_tiles(tmp_path / str(slide)), (0, 1)))
    open_now, most = set(), []

    def slow(store, threads):
        open_now.add(store.slide_id)
        time.sleep(0.05)
        most.append(len(open_now))
        yield from (marked(int(store.slide_id), tile) for tile in range(5))
        open_now.discard(store.slide_id)

    log, _, _ = run(works, 40, host={1: (3, host_colour)}, pixels_of=slow)
    assert max(most) > 1
    for work in works:
        for number in (0, 1):
            for tile, row in log[work.slide_id, number].items():
                np.testing.assert_array_equal(row, (int(work.slide_id) * 10 + 1, tile, 7))


def test_tiles_of_other_sides_get_batches_of_their_own(stores, tmp_path):
    path = tmp_path / "wide.zarr"
    write_tiles(path, np.full((4, 32, 32, 3), 50, dtype=np.uint8), slide_id="wide", codec="zstd")
    log, over, _ = run([SlideWork(stores[0], (0,)), SlideWork(open_tiles(path), (0,)), SlideWork(stores[3], (0,))], 64)
    assert [work.error for work in over] == [None] * 3
    assert len(log["wide", 0]) == 4
