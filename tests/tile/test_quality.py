"""Quality columns: against a plain reference, in range for any tile, the same for turned tiles; and the filters over them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfm.geometry import Size
from pathfm.slides.synthetic import SyntheticSpec, draw_slide
from pathfm.study import FilterSettings
from pathfm.tile.pen import INKS, ink_of
from pathfm.tile.quality import Quality, measure, perceptual_hash, removed_by, stain_densities

SOUND = Quality(**dict.fromkeys(Quality._fields, 0.0))


@pytest.fixture(scope="module")
def tiles():
    slide, _ = draw_slide(SyntheticSpec(size_px=Size(1024, 1024), seed=2, pen="green"))
    return [slide[y : y + 256, x : x + 256] for y in range(0, 1024, 256) for x in range(0, 1024, 256)]


def _reference(tile):
    """The colour columns and the blur in plain steps, with every colour as it is."""
    small = tile.astype(float)
    while len(small) >= 96:
        small = np.round(small.reshape(len(small) // 2, 2, len(small) // 2, 2, 3).mean(axis=(1, 3)))
    low, high = small.min(axis=2), small.max(axis=2)
    inks = [(ink_of(small) == number).mean() for number in range(1, len(INKS) + 1)]
    stains = stain_densities(small)
    total = max(stains.sum(), 1e-9)
    gray = np.pad(cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY).astype(float), 1, mode="reflect")
    edges = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:] - 4 * gray[1:-1, 1:-1]
    return {
        "white": (low >= 224).mean(),
        "black": (high < 32).mean(),
        "blur": edges.var(),
        "saturation": ((high - low) / np.maximum(high, 1)).mean(),
        "pen": sum(inks),
        **{f"pen_{name}": share for name, share in zip(INKS, inks, strict=True)},
        "haematoxylin": stains[..., 0].sum() / total,
        "eosin": stains[..., 1].sum() / total,
    }


def test_agrees_with_the_plain_reference(tiles):
    for tile in tiles:
        measured = measure(tile, 0.7, 0.1)
        assert (measured.tissue, measured.outside) == (0.7, 0.1)
        for name, wanted in _reference(tile).items():
            tolerance = {"rel": 1e-6} if name == "blur" else {"abs": 0.04}
            assert getattr(measured, name) == pytest.approx(wanted, **tolerance), name


def _in_range(quality):
    values = np.array(quality)
    assert np.isfinite(values).all()
    assert (values >= 0).all()
    assert (np.delete(values, Quality._fields.index("blur")) <= 1 + 1e-6).all()
    inks = quality.pen_green + quality.pen_red + quality.pen_blue + quality.pen_black
    assert quality.pen == pytest.approx(inks)
    assert quality.haematoxylin + quality.eosin <= 1 + 1e-6


@given(st.integers(16, 300), st.integers(0, 2**32 - 1), st.sampled_from(["noise", "blocks", "dark"]))
def test_any_tile_is_in_range(side, seed, kind):
    rng = np.random.default_rng(seed)
    if kind == "blocks":
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        tile = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_NEAREST)
    else:
        tile = rng.integers(0, 256 if kind == "noise" else 12, (side, side, 3), dtype=np.uint8)
    _in_range(measure(tile, 1.0))


@given(st.integers(16, 128), st.tuples(*[st.integers(0, 255)] * 3))
def test_a_tile_of_one_colour(side, rgb):
    quality = measure(np.full((side, side, 3), rgb, dtype=np.uint8), 1.0)
    _in_range(quality)
    assert quality.blur == quality.damage == 0
    assert {quality.white, quality.black, quality.pen} <= {0.0, 1.0}


def test_glass_and_darkness():
    white, black = (measure(np.full((256, 256, 3), level, dtype=np.uint8), 0.0) for level in (255, 0))
    assert white == SOUND._replace(white=1.0)
    assert black.black == 1
    assert black.pen == black.saturation == black.eosin == 0


def test_stains_are_told_apart():
    nuclei, fibres = (measure(np.full((64, 64, 3), rgb, dtype=np.uint8), 1.0) for rgb in ((86, 78, 158), (230, 90, 215)))
    assert nuclei.haematoxylin > 0.8 > 0.2 > nuclei.eosin
    assert fibres.eosin > 0.8 > 0.2 > fibres.haematoxylin


def test_blur_falls_as_focus_goes(tiles):
    sharp = max(tiles, key=lambda tile: measure(tile, 1.0).blur)
    soft = cv2.GaussianBlur(sharp, (0, 0), 2)
    assert measure(soft, 1.0).blur < 0.2 * measure(sharp, 1.0).blur


@pytest.mark.parametrize("side", [256, 224, 225])
def test_turned_tiles_have_the_same_columns(tiles, side):
    tile = tiles[5][:side, :side]
    straight = measure(tile, 1.0)
    for turned in (tile[::-1], tile[:, ::-1], np.rot90(tile), np.rot90(tile, 2)):
        quality = measure(turned, 1.0)
        for name, value, wanted in zip(Quality._fields, quality, straight, strict=True):
            assert value == pytest.approx(wanted, abs=0.01, rel=1e-6), name


def test_threads_measure_alike(tiles):
    alone = [measure(tile, 1.0) for tile in tiles]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda tile: measure(tile, 1.0), tiles * 4)) == alone * 4


@pytest.mark.parametrize(
    ("column", "value", "filters"),
    [
        ("white", 0.96, FilterSettings()),
        ("black", 0.51, FilterSettings()),
        ("pen", 0.21, FilterSettings()),
        ("damage", 0.04, FilterSettings(max_damage=0.03)),
    ],
)
def test_each_column_drops_under_its_own_name(column, value, filters):
    assert removed_by(SOUND, filters) == ""
    assert removed_by(SOUND._replace(**{column: value}), filters) == column
    assert removed_by(SOUND._replace(**{column: value}), FilterSettings(measure=False)) == ""


def test_blurred_tiles_go_only_when_asked():
    assert removed_by(SOUND, FilterSettings(min_blur=0.0)) == ""
    assert removed_by(SOUND, FilterSettings(min_blur=10.0)) == "blur"


def test_the_telling_reason_comes_first():
    filters = FilterSettings(max_damage=0.03, min_blur=1)
    tile = SOUND._replace(damage=1.0, white=1.0, pen=1.0, black=1.0)
    reasons = []
    for column in ("damage", "white", "pen", "black"):
        reasons.append(removed_by(tile, filters))
        tile = tile._replace(**{column: 0.0})
    assert [*reasons, removed_by(tile, filters)] == ["damage", "white", "pen", "black", "blur"]


def test_perceptual_hash_survives_rescaling(tiles):
    picture = tiles[5]
    smaller = cv2.resize(picture, (200, 200), interpolation=cv2.INTER_AREA)
    different = bin(int(perceptual_hash(picture), 16) ^ int(perceptual_hash(smaller), 16)).count("1")
    assert different <= 6
    assert len(perceptual_hash(picture)) == 16
