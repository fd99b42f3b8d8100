"""Between reading and storing: the order of colour, quality and filters, and how fates are counted."""

from __future__ import annotations

import numpy as np
import pytest

from pathfm import jpeg
from pathfm.slides.tile_reading import TileRead
from pathfm.store.tile_store import TileCodec
from pathfm.study import TileSettings
from pathfm.tile.finish import KEPT, OUTSIDE, Finisher, counted, why_empty
from pathfm.tile.quality import Quality, measure

SIDE = 64
TISSUE = (200, 140, 185)
INK = (30, 140, 90)


def picture(colour=TISSUE):
    noise = np.random.default_rng(0).normal(0, 6, (SIDE, SIDE, 3))
    return np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)


def finisher(codec="zstd", recolour=(), **settings):
    share = np.array([0.25, 0.75], dtype=np.float32)
    return Finisher(TileSettings.model_validate(settings), TileCodec(codec, 90), share, recolour)


def negative(tile):
    return 255 - tile


def test_a_tile_is_measured_and_encoded():
    fate, quality, data = finisher()(1, TileRead(picture(), 0.0))
    assert fate == KEPT
    assert quality == measure(picture(), 0.75)
    assert np.array_equal(TileCodec("zstd").decode(data, SIDE), picture())
    assert finisher().quality_names == Quality._fields


def test_quality_is_that_before_colours_change():
    fate, quality, data = finisher(recolour=[negative, negative, negative])(0, TileRead(picture(), 0.0))
    assert fate == KEPT
    assert quality == measure(picture(), 0.25)
    assert np.array_equal(TileCodec("zstd").decode(data, SIDE), 255 - picture())


def test_a_filter_names_its_column_and_nothing_is_encoded():
    fate, quality, data = finisher()(0, TileRead(picture(INK), 0.0))
    assert (fate, data) == ("pen", b"")
    assert quality[Quality._fields.index("pen")] > 0.9
    assert finisher(filters={"max_pen": 1})(0, TileRead(picture(INK), 0.0)).fate == KEPT


def test_without_measuring_no_filter_applies():
    plain = finisher(filters={"measure": False})
    assert plain.quality_names == ("tissue", "outside")
    fate, quality, _ = plain(1, TileRead(picture(INK), 0.0))
    assert (fate, tuple(quality)) == (KEPT, (0.75, 0.0))


def test_in_fluorescence_black_and_ink_are_no_reasons():
    dark = finisher(tissue={"background": "dark"})
    assert dark(0, TileRead(np.zeros((SIDE, SIDE, 3), np.uint8), 0.0)).fate == KEPT
    assert dark(0, TileRead(picture(INK), 0.0)).fate == KEPT
    assert finisher()(0, TileRead(np.zeros((SIDE, SIDE, 3), np.uint8), 0.0)).fate == "black"


@pytest.mark.parametrize("measured", [True, False])
def test_outside_is_dropped_or_flagged(measured):
    half = picture()
    half[:, 32:] = 255
    given = {"filters": {"measure": measured}}
    assert finisher(**given)(0, TileRead(half, 0.5)).fate == OUTSIDE
    fate, quality, data = finisher(edge="pad", **given)(0, TileRead(half, 0.5))
    assert (fate, quality[1]) == (KEPT, 0.5)
    assert np.array_equal(TileCodec("zstd").decode(data, SIDE), half)


def test_a_stream_of_the_slide_goes_before_the_codec():
    stream = jpeg.encode(picture(), 80)
    blind = finisher("jpeg", filters={"measure": False})
    assert blind(0, TileRead(None, 0.0, stream)) == (KEPT, (0.25, 0.0), stream)
    seen = finisher("jpeg")(0, TileRead(jpeg.decode(stream), 0.0, stream))
    assert (seen.fate, seen.data) == (KEPT, stream)
    # A stream that cannot be passed on comes as pixels, and is encoded as any other tile.
    encoded = finisher("jpeg")(0, TileRead(picture(), 0.0)).data
    assert encoded == jpeg.encode(picture(), 90)


def test_coordinates_alone_have_no_data():
    assert finisher("none")(0, TileRead(picture(), 0.0)).data == b""
    assert finisher("none", filters={"measure": False})(0, TileRead(None, 0.0)) == (KEPT, (0.25, 0.0), b"")


def test_fates_are_counted_by_name():
    assert counted([KEPT, "pen", "no tissue", "pen", KEPT]) == {"grid": 5, "kept": 2, "no tissue": 1, "pen": 2}
    assert counted([]) == {"grid": 0, "kept": 0}


def test_why_nothing_was_kept():
    assert why_empty(counted([KEPT, "pen"]), "too small") == ""
    assert why_empty(counted([]), "too small") == "too small"
    assert why_empty(counted(["white", "no tissue", "white"]), "") == "no tile of 3 was kept: no tissue 1, white 2"
