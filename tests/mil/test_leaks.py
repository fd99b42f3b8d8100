"""Leaks: every planted one is found whatever its name, and slides that are merely alike are not."""

import csv
import hashlib
import itertools
from collections import Counter
from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfm.errors import UsageError
from pathfm.geometry import Size
from pathfm.mil import leaks as module
from pathfm.mil.leaks import COMMON, Leak, SlideTrace, check_leaks, find_leaks, together
from pathfm.slides.synthetic import SyntheticSpec, draw_slide
from pathfm.stats.folds import Fold
from pathfm.stats.phash import picture_hash


def rows(seed, count=50):
    return np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)


def digest(row_N):
    return hashlib.sha256(row_N.tobytes()).hexdigest()


def trace(number, picture=None, row_N=None, patient=None):
    row_N = rows(number) if row_N is None else row_N
    return SlideTrace(f"s{number:02d}", patient or f"p{number:02d}", f"file {number}", picture, digest(row_N), row_N)


@pytest.fixture(scope="module")
def pictures():
    specs = [SyntheticSpec(size_px=Size(512, 448), seed=seed, lesion=seed % 2 == 1) for seed in range(6)]
    return [draw_slide(spec)[0] for spec in specs]


@pytest.fixture(scope="module")
def slides(pictures):
    return [trace(number, picture) for number, picture in enumerate(pictures)]


def saved_again(picture, quality=50, scale=0.7):
    shrunk = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return cv2.imdecode(cv2.imencode(".jpg", shrunk, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)


def kinds(leaks):
    return [(leak.kind, leak.slides, leak.patients) for leak in leaks]


def test_different_slides_are_no_leak(slides):
    assert find_leaks(slides) == []


PLANTED = {
    "renamed slide": (lambda slide: {}, "same file"),
    "saved again as another file": (lambda slide: {"thumbnail": saved_again(slide.thumbnail)}, "same picture"),
    "turned": (lambda slide: {"thumbnail": np.ascontiguousarray(np.rot90(saved_again(slide.thumbnail)))}, "same picture"),
    "mirrored": (lambda slide: {"thumbnail": np.ascontiguousarray(slide.thumbnail[:, ::-1])}, "same picture"),
    "a little cut off": (lambda slide: {"thumbnail": slide.thumbnail[4:, 4:]}, "same picture"),
    "copied features": (lambda slide: {"thumbnail": None}, "same features"),
    "features in another order": (lambda slide: {"thumbnail": None, "feature_digest": "other"}, "same tiles"),
    "a tenth of the tiles": (
        lambda slide: {"thumbnail": None, "feature_digest": "other", "row_hashes": np.r_[slide.row_hashes[:5], rows(98, 200)]},
        "same tiles",
    ),
}


@pytest.mark.parametrize(("change", "kind"), PLANTED.values(), ids=PLANTED)
def test_a_planted_leak_is_found_and_refused(slides, change, kind):
    changed = {"slide_id": "copy", "patient_id": "somebody else", **change(slides[2])}
    if changed.keys() & {"thumbnail"}:
        changed["file_digest"] = None
    if kind == "same picture":
        changed |= {"feature_digest": "other", "row_hashes": rows(99)}
    leaks = find_leaks([*slides, replace(slides[2], **changed)])
    assert kinds(leaks) == [(kind, ("copy", "s02"), ("p02", "somebody else"))]
    fold = Fold(("p02",), ("p00", "p01"), ("somebody else",))
    with pytest.raises(UsageError, match=rf"mil.split: .*{kind}: copy, s02 of patients p02, somebody else.*leaks=merge"):
        check_leaks(leaks, [fold], "refuse")
    assert together(leaks) == [{"p02", "somebody else"}]


def test_order_of_the_slides_does_not_matter(slides):
    copies = [replace(slides[n], slide_id=f"copy{n}", patient_id=f"q{n}") for n in (1, 4, 4)]
    copies[2] = replace(copies[2], slide_id="another", file_digest="x")
    found = find_leaks([*slides, *copies])
    assert found == find_leaks(iter([*slides, *copies][::-1])) and len(found) == 3


def test_a_slide_twice_within_a_patient_is_a_note(slides):
    leaks = find_leaks([*slides, replace(slides[2], slide_id="again")])
    assert kinds(leaks) == [("same file", ("again", "s02"), ("p02",))]
    assert together(leaks) == []
    assert check_leaks(leaks, [Fold(("p02",), ("p00",), ("p01",))], "refuse") == ["noted: same file: again, s02 of patient p02"]


def test_patients_on_one_side_are_a_note_and_any_two_sides_are_refused():
    leak = Leak("same file", ("a", "b"), ("p0", "p1"))
    assert "kept on one side" in check_leaks([leak], [Fold(("p0", "p1"), ("p2",), ("p3",))], "merge")[0]
    for fold in (Fold(("p0",), ("p1",), ("p2",)), Fold(("p2",), ("p0",), ("p1",)), Fold(("p1",), ("p2",), ("p0",))):
        with pytest.raises(UsageError, match="put them on one side of the split"):
            check_leaks([leak], [Fold(("p0", "p1"), ("p2",), ("p3",)), fold], "merge")


def test_a_refusal_lists_them_all():
    leaks = [Leak("same file", (f"a{n}", f"b{n}"), ("p0", "p1")) for n in range(30)]
    with pytest.raises(UsageError, match=r"(?s)30 problems.*a0, b0.*a19, b19.*and 10 more"):
        check_leaks(leaks, [Fold(("p0",), ("p2",), ("p1",))], "refuse")


def test_leaks_are_joined_into_sets_that_stay_together():
    leaks = [Leak("same file", ("a", "b"), ("p0", "p1")), Leak("same tiles", ("b", "c"), ("p1", "p2"))]
    assert together([*leaks, Leak("few same tiles", ("c", "d"), ("p2", "p3"))]) == [{"p0", "p1", "p2"}]


def test_many_renamed_copies_are_one_leak(slides):
    copies = [replace(slides[0], slide_id=f"c{n:02d}", patient_id=f"q{n:02d}") for n in range(30)]
    for kind, change in (("same file", {}), ("same picture", {"file_digest": None}), ("same features", {"thumbnail": None})):
        copies = [replace(copy, **change) for copy in copies]
        (leak,) = find_leaks([*copies, *slides[1:]])
        assert leak.kind == kind and len(leak.slides) == 30


def test_patients_whose_names_differ_only_in_writing_are_one():
    names = ["P-01", "p-01 ", "P-02", "Müller", "Muller", "P-1"]
    leaks = find_leaks([SlideTrace(f"s{n}", name) for n, name in enumerate(names)])
    assert [leak.patients for leak in leaks] == [("P-01", "p-01 "), ("Muller", "Müller")]


def test_patients_whose_numbers_a_spreadsheet_has_changed_are_one():
    names = ["007", "7", "7.0", "70", "0", "000", "7.5", "A007", "A7"]
    leaks = find_leaks([SlideTrace(f"s{n}", name) for n, name in enumerate(names)])
    assert [leak.patients for leak in leaks] == [("007", "7", "7.0"), ("0", "000")]


# ---- what must not match ----


def on_glass(seed, jitter=0.0):
    """A small piece of tissue of random outline near the middle of white glass, as a scanner shows a biopsy."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:400, :600].astype(np.float32)
    left, top = 300 + jitter * rng.normal(), 200 + jitter * rng.normal()
    angle = np.arctan2(y - top, x - left)
    outline = 60 + sum(rng.uniform(4, 14) * np.cos(k * angle + rng.uniform(0, 6.3)) for k in range(1, 6))
    texture = cv2.GaussianBlur(rng.normal(size=x.shape).astype(np.float32), (0, 0), 6)
    colour = np.array([200, 130, 180]) + 20 * (texture / texture.std())[..., None]
    glass = np.full((400, 600, 3), 243.0)
    picture = np.where((np.hypot(x - left, y - top) < outline)[..., None], colour, glass) + rng.normal(0, 1.5, glass.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)


def test_white_slides_of_one_site_are_no_leak():
    pieces = [on_glass(seed, jitter=3.0) for seed in range(24)]
    noise = np.random.default_rng(0)
    blank = [noise.integers(238, 244, (300, 300, 3), dtype=np.uint8) for _ in range(4)]
    assert find_leaks([trace(n, picture) for n, picture in enumerate([*pieces, *blank])]) == []


def test_small_pieces_of_tissue_are_found_again():
    pieces = [on_glass(seed) for seed in range(8)]
    shown = [picture for picture in pieces if picture_hash(picture) is not None]
    assert len(shown) >= 6
    copies = [trace(50 + n, saved_again(picture, 70, 0.8)) for n, picture in enumerate(shown)]
    leaks = find_leaks([*(trace(n, picture) for n, picture in enumerate(shown)), *copies])
    assert [leak.slides for leak in leaks] == [(f"s{n:02d}", f"s{50 + n}") for n in range(len(shown))]


def test_tiles_that_many_slides_have_are_no_leak():
    blank = rows(1000, 20)
    assert find_leaks([trace(n, row_N=np.r_[rows(n, 30), blank]) for n in range(COMMON + 1)]) == []
    assert find_leaks([trace(n, row_N=np.repeat(blank[:1], 40)) for n in range(COMMON + 1)]) == []


def test_one_blank_tile_many_times_is_no_leak_but_an_equal_bag_is():
    one, two = np.repeat(rows(7, 1), 30), np.repeat(rows(7, 1), 40)
    assert find_leaks([trace(0, row_N=np.r_[rows(0), one]), trace(1, row_N=np.r_[rows(1), two])]) == []
    assert kinds(find_leaks([trace(0, row_N=one), trace(1, row_N=one)])) == [("same features", ("s00", "s01"), ("p00", "p01"))]


def test_few_of_many_tiles_are_a_note():
    shared = rows(500, 10)
    leaks = find_leaks([trace(n, row_N=np.r_[rows(n, 300), shared]) for n in range(2)])
    assert [(leak.kind, leak.crosses, leak.detail) for leak in leaks] == [("few same tiles", False, "10 of 310 distinct tiles")]
    assert check_leaks(leaks, [Fold(("p00",), ("p02",), ("p01",))], "refuse") == [
        "noted: few same tiles: s00, s01 of patients p00, p01 (10 of 310 distinct tiles)"
    ]


@given(st.lists(st.lists(st.integers(0, 40), max_size=15), max_size=14), st.sampled_from([3, 1 << 22]))
def test_shared_rows_are_those_of_comparing_all_pairs(rows_S, block):
    row_SR = [np.unique(np.array(own, dtype=np.uint64) * np.uint64(2**64 // 41)) for own in rows_S]
    held = Counter(value for own in row_SR for value in own.tolist())
    usual, module.BLOCK_ROWS = module.BLOCK_ROWS, block
    try:
        found = module._shared_rows(row_SR)
    finally:
        module.BLOCK_ROWS = usual
    slow = {
        (one, two): sum(held[value] <= COMMON for value in {*row_SR[one].tolist()} & {*row_SR[two].tolist()})
        for one, two in itertools.combinations(range(len(row_SR)), 2)
    }
    assert found == {pair: count for pair, count in slow.items() if count}


def test_the_patients_of_a_public_cohort_that_share_tiles_are_found(shared_data):
    """Two pairs of patients of the H. pylori set hold the same tiles under other names."""
    folder = shared_data / "hpylori"
    with (folder / "cohort.csv").open() as stream:
        patients = [row["patient_id"] for row in csv.DictReader(stream)]
    slides = []
    for patient in patients:
        if int(patient.split("-")[1]) % 7 not in {4, 5, 6, 1}:  # enough to hold both pairs
            continue
        tiles = [cv2.imread(str(path)) for path in sorted((folder / "tiles" / patient).iterdir())]
        digests = [hashlib.sha256(tile.tobytes()).digest() for tile in tiles]
        row_N = np.array([int.from_bytes(each[:8], "little") for each in digests], dtype=np.uint64)
        slides.append(SlideTrace(patient, patient, feature_digest=digest(row_N), row_hashes=row_N))
    assert len(slides) > 60
    leaks = find_leaks(slides)
    assert {leak.patients for leak in leaks} == {("B22-141", "B22-68"), ("B22-124", "B22-74")}
    assert {leak.detail for leak in leaks} >= {"4 of 7 distinct tiles"}
