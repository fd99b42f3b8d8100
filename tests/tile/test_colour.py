"""Colour profiles and stain normalisation, against plain slow versions and mixtures whose stains are known."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import ImageCms

from pathfm.errors import SlideError
from pathfm.study import ColourSettings
from pathfm.tile import colour
from pathfm.tile.colour import REFERENCE_LAB, REFERENCE_STAINS, estimate_stains, icc_to_srgb, lab_statistics, make_normaliser

BLUE_PINK = np.array([[0.65, 0.70, 0.29], [0.07, 0.95, 0.30]])
PURPLE_RED = np.array([[0.50, 0.78, 0.38], [0.02, 0.80, 0.60]])
TISSUE = np.s_[20:180, 20:180]
METHODS = ("macenko", "reinhard")


def _slide(vectors, strength=(1.0, 1.0), glass=(240.0, 236.0, 243.0)):
    """A picture of tissue in the given stains on glass, always with the same amounts of stain, and its mask."""
    rng = np.random.default_rng(5)
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    amounts = rng.gamma(2.0, 0.35, (200, 200, 2))
    kind = rng.integers(0, 3, (200, 200))  # only the one, only the other, both
    amounts[kind == 0, 0] = 0
    amounts[kind == 1, 1] = 0
    density = (amounts * strength) @ vectors
    mask = np.zeros((200, 200), dtype=bool)
    mask[TISSUE] = True
    density[~mask] = 0
    return np.rint(np.array(glass) * np.exp(-density)).astype(np.uint8), mask


def _normalised(method, rgb, mask):
    normalise = make_normaliser(ColourSettings(normalise=method), rgb, mask)
    assert normalise is not None
    return normalise(rgb)


def _srgb_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _noise(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (64, 48, 3), dtype=np.uint8)


def test_an_srgb_profile_changes_nothing():
    assert np.abs(icc_to_srgb(_srgb_profile())(_noise()).astype(int) - _noise()).max() <= 1


def test_a_profile_with_red_and_blue_exchanged_exchanges_them():
    exchanged = _srgb_profile().replace(b"rXYZ", b"temp").replace(b"bXYZ", b"rXYZ").replace(b"temp", b"bXYZ")
    assert np.abs(icc_to_srgb(exchanged)(_noise()).astype(int) - _noise()[:, :, ::-1]).max() <= 1


def test_the_profile_of_a_real_slide(shared_data):
    openslide = pytest.importorskip("openslide")
    with openslide.OpenSlide(shared_data / "slides" / "TCGA-CR-7395-01A-01-TS1.svs") as slide:
        profile = slide._profile
    assert np.abs(icc_to_srgb(profile)(_noise()).astype(int) - _noise()).max() <= 1  # it says sRGB


@pytest.mark.parametrize("name", ["nothing", "noise", "a part", "not RGB"])
def test_a_profile_that_cannot_be_used_is_named(name):
    profiles = {
        "nothing": b"",
        "noise": b"\x00icc" * 200,
        "a part": _srgb_profile()[:300],
        "not RGB": ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(),
    }
    with pytest.raises(SlideError, match="colour profile is damaged"):
        icc_to_srgb(profiles[name])


@pytest.mark.parametrize("name", ["icc", *METHODS])
def test_threads_may_share_one(name):
    rgb, mask = _slide(BLUE_PINK)
    recolour = icc_to_srgb(_srgb_profile()) if name == "icc" else make_normaliser(ColourSettings(normalise=name), rgb, mask)
    assert recolour is not None
    tiles = [_noise(seed) for seed in range(40)]
    with ThreadPoolExecutor(4) as pool:
        assert all((one == recolour(tile)).all() for one, tile in zip(pool.map(recolour, tiles), tiles, strict=True))


@pytest.mark.parametrize("vectors", [BLUE_PINK, PURPLE_RED])
def test_known_stains_are_found(vectors):
    stains = estimate_stains(*_slide(vectors))
    assert stains is not None
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert np.allclose(stains.haematoxylin, vectors[0], atol=0.04)
    assert np.allclose(stains.eosin, vectors[1], atol=0.04)
    assert np.allclose(np.linalg.norm([stains.haematoxylin, stains.eosin], axis=1), 1, atol=1e-4)
    assert stains.glass == (240, 236, 243)


def test_twice_the_stain_is_twice_the_concentration():
    weak, strong = estimate_stains(*_slide(BLUE_PINK, (0.5, 0.5))), estimate_stains(*_slide(BLUE_PINK))
    assert weak is not None
    assert strong is not None
    assert np.allclose(np.array(strong.max_concentration) / weak.max_concentration, 2, atol=0.25)


def test_white_that_was_never_scanned_is_no_glass():
    rgb, mask = _slide(BLUE_PINK)
    rgb[:, :15] = 255
    stains = estimate_stains(rgb, mask)
    assert stains is not None
    assert stains.glass == (240, 236, 243)


@pytest.mark.parametrize("case", ["no tissue", "hardly any", "glass", "one colour", "one stain"])
def test_no_stains_without_two_of_them(case):
    rgb, mask = _slide(BLUE_PINK)
    if case == "no tissue":
        mask[:] = False
    if case == "hardly any":
        mask[:] = False
        mask[50:60, 50:60] = True
    if case == "glass":
        rgb[:] = 240
    if case == "one colour":
        rgb[TISSUE] = (150, 90, 160)
    if case == "one stain":
        rgb, mask = _slide(BLUE_PINK[[0, 0]])
    assert estimate_stains(rgb, mask) is None
    assert make_normaliser(ColourSettings(normalise="macenko"), rgb, mask) is None


def test_reinhard_needs_tissue_and_none_means_none():
    rgb, mask = _slide(BLUE_PINK)
    assert make_normaliser(ColourSettings(), rgb, mask) is None
    assert make_normaliser(ColourSettings(normalise="reinhard"), rgb, np.zeros_like(mask)) is None


def test_macenko_is_what_a_plain_loop_computes():
    rgb, mask = _slide(PURPLE_RED)
    stains = estimate_stains(rgb, mask)
    assert stains is not None
    own, reference = np.array([stains.haematoxylin, stains.eosin]), np.array(REFERENCE_STAINS[:2])
    pixels = np.concatenate([rgb[::5, ::5].reshape(-1, 3), _noise().reshape(-1, 3)])  # also colours that no stain has
    for pixel, result in zip(pixels[::7], colour.macenko(stains)(pixels[None])[0, ::7], strict=True):
        density = -np.log(np.minimum(np.maximum(pixel, 1) / np.array(stains.glass), 1))
        amounts = np.linalg.lstsq(own.T, density, rcond=None)[0]
        amounts *= np.array(REFERENCE_STAINS.max_concentration) / stains.max_concentration
        assert np.abs(result - 255 * np.exp(-np.maximum(amounts @ reference, 0))).max() <= 1


def _lab(light):
    """CIE L*a*b* (D65) of sRGB in 0..1, by the book."""
    linear = np.where(light <= 0.04045, light / 12.92, ((light + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
    scaled = linear @ matrix.T / matrix.sum(axis=1)
    root = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
    return np.stack(
        [116 * root[..., 1] - 16, 500 * (root[..., 0] - root[..., 1]), 200 * (root[..., 1] - root[..., 2])], axis=-1
    )


def test_reinhard_is_what_the_book_says():
    rgb, mask = _slide(PURPLE_RED)
    statistics = lab_statistics(rgb, mask)
    assert statistics is not None
    light = np.minimum(np.maximum(rgb, 1) / np.array(statistics.glass), 1)
    stained = mask & (np.linalg.norm(np.log(light), axis=2) >= colour.LEAST_DENSITY)
    assert np.allclose(_lab(light[stained]).mean(axis=0), statistics.mean, atol=0.2)
    assert np.allclose(_lab(light[stained]).std(axis=0), statistics.deviation, atol=0.2)
    lab, mean = _lab(light), np.array(statistics.mean)
    gain = np.clip(np.array(REFERENCE_LAB.deviation) / statistics.deviation, 0.5, 2)
    moved = (lab - mean) * gain + REFERENCE_LAB.mean
    share = np.minimum((100 - lab[..., :1]) / (100 - mean[0]), 1)
    result = colour.reinhard(statistics)(rgb)
    inside = (result > 2).all(axis=2) & (result < 253).all(axis=2)  # colours that sRGB can show
    assert inside.sum() > 10_000
    difference = np.abs(_lab(result / 255.0) - (lab + share * (moved - lab)))[inside]
    assert np.percentile(difference, 99) < 1.5


@pytest.mark.parametrize("method", METHODS)
def test_two_stainings_of_one_tissue_come_closer(method):
    one, mask = _slide(BLUE_PINK)
    other, _ = _slide(PURPLE_RED, (0.8, 1.3), (225.0, 215.0, 230.0))
    before = np.abs(one.astype(float) - other)[mask].mean()
    after = np.abs(_normalised(method, one, mask).astype(float) - _normalised(method, other, mask))[mask].mean()
    assert after < before / 2


@pytest.mark.parametrize("method", METHODS)
def test_normalising_again_changes_little(method):
    rgb, mask = _slide(PURPLE_RED)
    once = _normalised(method, rgb, mask)
    twice = _normalised(method, once, mask)
    first = np.abs(once.astype(float) - rgb)[mask].mean()
    assert np.abs(twice.astype(float) - once)[mask].mean() < first / 4


@pytest.mark.parametrize("method", METHODS)
def test_glass_becomes_white_and_nothing_else_is_invented(method):
    rgb, mask = _slide(BLUE_PINK)
    normalise = make_normaliser(ColourSettings(normalise=method), rgb, mask)
    assert normalise is not None
    assert (normalise(rgb)[:15] == 255).all()
    assert (normalise(np.full((32, 32, 3), 255, dtype=np.uint8)) == 255).all()
    assert (normalise(np.full((4, 4, 3), 250, dtype=np.uint8)) == 255).all()
    assert normalise(np.zeros((4, 4, 3), dtype=np.uint8)).max() < 120


@pytest.mark.parametrize("method", METHODS)
def test_a_tile_is_normalised_alike_alone_and_within_the_slide(method):
    rgb, mask = _slide(BLUE_PINK)
    normalise = make_normaliser(ColourSettings(normalise=method), rgb, mask)
    assert normalise is not None
    assert (normalise(rgb)[40:80, 60:90] == normalise(rgb[40:80, 60:90])).all()


def test_estimates_are_plain_numbers_and_repeatable():
    rgb, mask = _slide(BLUE_PINK)
    assert estimate_stains(rgb, mask) == estimate_stains(rgb.copy(), mask.copy())
    stains = estimate_stains(rgb, mask)
    assert stains is not None
    assert {type(value) for part in stains for value in part} == {float}
    assert json.loads(json.dumps(stains.as_dict())) == {name: list(part) for name, part in stains._asdict().items()}
