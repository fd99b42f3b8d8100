"""Perceptual hashes: the same picture is found however it was saved, another one never is."""

import itertools

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfm.geometry import Size
from pathfm.slides.reader import open_slide
from pathfm.slides.synthetic import SyntheticSpec, draw_slide
from pathfm.stats.phash import BITS, SAME_PICTURE_BITS, near_hashes, picture_hash, turned_hashes


def bits_between(left, right):
    return int(np.bitwise_count(left ^ right).sum())


def saved_again(picture, quality, scale=1.0):
    shrunk = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return cv2.imdecode(cv2.imencode(".jpg", shrunk, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)


def turned(picture, way):
    return np.ascontiguousarray(np.rot90(picture[:, ::-1] if way >= 4 else picture, way % 4))


@pytest.fixture(scope="module")
def pictures():
    specs = [SyntheticSpec(size_px=Size(512, 448), seed=seed, lesion=seed % 2 == 1) for seed in range(6)]
    return [draw_slide(spec)[0] for spec in specs]


def test_saved_again_smaller_and_a_little_cropped_is_the_same_picture(pictures):
    for picture in pictures:
        own = picture_hash(picture)
        height, width = picture.shape[:2]
        copies = [saved_again(picture, 50), saved_again(picture, 30, 0.5), picture[height // 100 :, width // 100 :]]
        assert all(bits_between(own, picture_hash(copy)) <= SAME_PICTURE_BITS * 3 // 4 for copy in copies)


def test_different_pictures_differ_whichever_way_they_are_turned(pictures):
    hashes = np.stack([picture_hash(picture) for picture in pictures])
    ways = turned_hashes(hashes)
    for first, second in itertools.permutations(range(len(pictures)), 2):
        assert min(bits_between(hashes[first], way) for way in ways[:, second]) > SAME_PICTURE_BITS * 3 // 2


@pytest.mark.parametrize("way", range(8))
def test_turning_the_hash_is_hashing_the_turned_picture(pictures, way):
    for picture in pictures[:3]:
        ways = turned_hashes(picture_hash(picture)[None])[:, 0]
        assert min(bits_between(picture_hash(turned(picture, way)), each) for each in ways) == 0


def test_turned_hashes_are_eight_different_ones_that_hold_the_hash_itself(pictures):
    own = picture_hash(pictures[0])
    ways = turned_hashes(own[None])[:, 0]
    assert ways.shape == (8, BITS // 64)
    assert len({way.tobytes() for way in ways}) == 8
    assert any(np.array_equal(way, own) for way in ways)


def test_blank_pictures_have_no_hash():
    noise = np.random.default_rng(0).integers(238, 244, (300, 300, 3), dtype=np.uint8)
    assert picture_hash(np.full((64, 64, 3), 255, dtype=np.uint8)) is None
    assert picture_hash(noise) is None


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.integers(0, BITS))
def test_search_finds_exactly_the_near_pairs(seed, queries, stored, most_bits):
    rng = np.random.default_rng(seed)
    left, right = (rng.integers(0, 2**64, (count, 4), dtype=np.uint64) for count in (queries, stored))
    right[0] = left[0] ^ np.uint64(1 << 7)
    found = {(near.query, near.stored): near.bits for near in near_hashes(left, right, most_bits)}
    pairs = itertools.product(range(queries), range(stored))
    assert found == {(q, s): bits for q, s in pairs if (bits := bits_between(left[q], right[s])) <= most_bits}


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    stored = rng.integers(0, 2**64, (500, 4), dtype=np.uint64)
    before = list(near_hashes(stored[::7], stored))
    monkeypatch.setattr("pathfm.stats.phash.BLOCK_PAIRS", 1200)
    assert list(near_hashes(stored[::7], stored)) == before
    assert len(before) == len(stored[::7])


def test_real_sections_of_one_tumour_are_different_pictures_and_their_copies_are_not(shared_data):
    names = ("B4", "C2", "C3", "C4")
    thumbnails = []
    for name in names:
        with open_slide(shared_data / "slides" / f"her2st_{name}.svs") as slide:
            thumbnails.append(slide.thumbnail(1024)[0])
    hashes = np.stack([picture_hash(thumbnail) for thumbnail in thumbnails])
    ways = turned_hashes(hashes)
    for first, second in itertools.permutations(range(4), 2):
        assert min(bits_between(hashes[first], way) for way in ways[:, second]) > 2 * SAME_PICTURE_BITS
    for own, thumbnail in zip(hashes, thumbnails, strict=True):
        assert bits_between(own, picture_hash(saved_again(thumbnail, 40, 0.6))) <= SAME_PICTURE_BITS // 2


def test_tiles_of_different_patients_are_different_pictures_unless_they_are_the_same_file(shared_data):
    files = sorted((shared_data / "hpylori" / "tiles").glob("*/*"))
    hashed = [(path, words) for path in files if (words := picture_hash(cv2.imread(str(path)))) is not None]
    hashes = np.stack([words for _, words in hashed])
    pairs = [(hashed[near.query][0], hashed[near.stored][0]) for near in near_hashes(hashes, hashes)]
    across = [(first, second) for first, second in pairs if first.parent != second.parent]
    # Two pairs of patients of this public set share tiles, byte for byte: a leak that only the pictures show.
    assert {(first.parent.name, second.parent.name) for first, second in across if first < second} == {
        ("B22-141", "B22-68"),
        ("B22-124", "B22-74"),
    }
    assert all(first.read_bytes() == second.read_bytes() for first, second in across)
