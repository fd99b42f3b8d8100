"""Damage that decodes cleanly: made by flipping bits of real stored tiles, and told from sound tissue."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
import pytest
import tifffile

from pathfm import jpeg
from pathfm.geometry import Size
from pathfm.slides.synthetic import SyntheticSpec, draw_slide
from pathfm.tile.damage import straight_step

LIMIT = 0.03
"""The threshold that the documentation names."""
LARGE = 8
"""Mean error of a tile that counts as gross [grey levels]."""


class _Stored(NamedTuple):
    data: bytes
    scan: int


def _stored_tiles(path):
    """JPEG tiles of level 0 by row and column, made whole."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        wrapper = jpeg.Wrapper(page.jpegtables, rgb=page.photometric == tifffile.PHOTOMETRIC.RGB)
        across = -(-page.imagewidth // page.tilewidth)
        tiles = {}
        for number, (offset, length) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=True)):
            tiff.filehandle.seek(offset)
            data, frame = wrapper.wrap(tiff.filehandle.read(length))
            tiles[divmod(number, across)] = _Stored(data, frame.scan)
    return tiles


def _flip(tile, bits, rng):
    data = bytearray(tile.data)
    for place in rng.choice((len(data) - 2 - tile.scan) * 8, bits, replace=False):
        data[tile.scan + place // 8] ^= 1 << place % 8
    return bytes(data)


def _invisible(tiles, count, rng):
    """Place, damaged stream, pixels and mean error of those among ``count`` damaged tiles that decode without a word."""
    tissue = sorted(place for place, tile in tiles.items() if len(tile.data) > np.median([len(t.data) for t in tiles.values()]))
    for _ in range(count):
        place = tissue[rng.integers(len(tissue))]
        data = _flip(tiles[place], int(rng.integers(1, 4)), rng)
        try:
            pixels = jpeg.decode(data)
        except ValueError:
            continue
        error = np.abs(pixels.astype(np.int16) - jpeg.decode(tiles[place].data)).mean()
        yield place, data, pixels, error


@pytest.mark.parametrize(("name", "recall"), [("CMU-1-Small-Region", 0.88), ("her2st_B4", 0.75), ("her2st_C3", 0.75)])
def test_gross_damage_is_told_from_sound_tissue(shared_data, name, recall):
    tiles = _stored_tiles(shared_data / "slides" / f"{name}.svs")
    damaged = list(_invisible(tiles, 400, np.random.default_rng(11)))
    assert len(damaged) > 40, "most flips were expected to be seen by the decoder, but not nearly all"
    gross = np.array([straight_step(pixels) for _, _, pixels, error in damaged if error > LARGE])
    assert len(gross) > 20
    assert np.mean(gross > LIMIT) >= recall
    sound = np.array([straight_step(jpeg.decode(tile.data)) for tile in list(tiles.values())[::3]])
    assert sound.max() < LIMIT


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_gross_damage_is_seen_at_any_scale_and_place(shared_data, factor):
    """One damaged stored tile within a larger tile that is shrunk in the DCT domain and cut at a random place."""
    tiles = _stored_tiles(shared_data / "slides" / "her2st_B4.svs")
    rng = np.random.default_rng(3)
    reach, caught = factor, []
    for (row, column), data, _, error in _invisible(tiles, 300, rng):
        near = {(y, x) for y in range(row - reach, row + reach + 1) for x in range(column - reach, column + reach + 1)}
        if error < 2 * LARGE or not near <= tiles.keys():
            continue
        streams = {place: tiles[place].data for place in near} | {(row, column): data}
        shrunk = {place: jpeg.decode_shrunk(stream, (256, 256), factor) for place, stream in streams.items()}
        mosaic = _mosaic(shrunk, (row, column), reach)
        start, side = reach * 256 // factor, 256 // factor
        y, x = rng.integers(max(0, start + side - 256), min(start, len(mosaic) - 256) + 1, 2)
        caught.append(straight_step(mosaic[y : y + 256, x : x + 256]) > LIMIT / factor)
    assert len(caught) >= 10
    assert np.mean(caught) >= 0.75


def _mosaic(tiles, centre, reach):
    rows, columns = (range(middle - reach, middle + reach + 1) for middle in centre)
    return np.vstack([np.hstack([tiles[row, column] for column in columns]) for row in rows])


@pytest.fixture(scope="module")
def tissue():
    return draw_slide(SyntheticSpec(size_px=Size(1024, 1024), seed=1))[0]


def test_a_step_has_its_height():
    noise = np.random.default_rng(0).normal(150, 1, (256, 256, 3))
    noise[112:] += (20, -5, 0)
    tile = noise.astype(np.uint8)
    # What is usual around the step holds a ninth of it, three times of which are taken off.
    assert straight_step(tile) == pytest.approx(20 / 255 * 2 / 3, abs=0.005)
    assert straight_step(tile[::-1]) == pytest.approx(straight_step(tile), abs=1e-6)
    assert straight_step(tile[:112]) < 0.002


def test_sound_drawn_tissue(tissue):
    steps = [straight_step(tissue[y : y + 256, x : x + 256]) for y in range(0, 769, 128) for x in range(0, 769, 128)]
    assert max(steps) < LIMIT / 2


@pytest.mark.parametrize("fill", [255, 0])
def test_padding_is_no_damage(tissue, fill):
    tile = tissue[400:656, 400:656].copy()
    tile[150:] = fill
    assert straight_step(tile) < LIMIT / 2
    large = np.full((512, 512, 3), fill, dtype=np.uint8)
    large[:301, :333] = tissue[300:601, 300:633]
    assert straight_step(cv2.resize(large, (256, 256), interpolation=cv2.INTER_AREA)) < LIMIT / 2
