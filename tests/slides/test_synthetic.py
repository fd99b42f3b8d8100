"""The synthetic slides: same seed same bytes, right scale, truth in its place."""

import csv
from dataclasses import replace

import cv2
import numpy as np
import openslide
import pytest

from pathfm.geometry import Size
from pathfm.slides import synthetic
from pathfm.slides.reader import open_slide
from pathfm.slides.synthetic import MASK_SCALE, SyntheticSpec, draw_slide, write_cohort, write_slide
from pathfm.slides.synthetic_plan import make_plan

SMALL = SyntheticSpec(size_px=Size(768, 640), seed=3, lesion=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    return write_slide(folder / "s.tiff", SMALL), draw_slide(SMALL)


def test_same_seed_same_bytes(written, tmp_path):
    truth, _ = written
    again = write_slide(tmp_path / "again.tiff", SMALL)
    assert again.path.read_bytes() == truth.path.read_bytes()
    assert again.lesion_mask.read_bytes() == truth.lesion_mask.read_bytes()
    other = write_slide(tmp_path / "other.tiff", replace(SMALL, seed=4))
    assert other.path.read_bytes() != truth.path.read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.4991])
def test_openslide_reads_the_scale(mpp, tmp_path):
    truth = write_slide(tmp_path / "s.tiff", replace(SMALL, mpp=mpp))
    with openslide.OpenSlide(truth.path) as slide:
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(mpp, rel=1e-6)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(mpp, rel=1e-6)
        assert slide.properties["openslide.vendor"] == "generic-tiff"


def test_what_was_drawn_is_read(written):
    truth, (rgb, _) = written
    with open_slide(truth.path) as slide:
        assert [level.size for level in slide.metadata.levels] == [(768, 640), (384, 320)]
        whole = slide.read_region(0, 0, 0, SMALL.size_px)
        half = slide.read_region(0, 0, 1, slide.metadata.levels[1].size)
    assert np.abs(whole.astype(int) - rgb).mean() < 5
    assert np.abs(half.astype(int) - cv2.resize(rgb, (384, 320), interpolation=cv2.INTER_AREA)).mean() < 5


def test_the_lesion_mask_lies_over_the_lesion(written):
    truth, (rgb, lesion) = written
    mask = cv2.imread(str(truth.lesion_mask), cv2.IMREAD_UNCHANGED)
    assert mask.shape == (640 // MASK_SCALE, 768 // MASK_SCALE)
    assert set(np.unique(mask)) == {0, 255}
    shares = cv2.resize(lesion.astype(np.float32), mask.shape[::-1], interpolation=cv2.INTER_AREA)
    clear = np.abs(shares - 0.5) > 0.01
    assert np.array_equal((mask > 0)[clear], (shares > 0.5)[clear])
    assert truth.lesion_share == pytest.approx(lesion.mean(), abs=0.01)
    calm, _ = draw_slide(replace(SMALL, lesion=False))
    changed = (rgb != calm).any(axis=2)
    assert changed[lesion].mean() > 0.5
    assert changed[~cv2.dilate(lesion.astype(np.uint8), np.ones((61, 61))).astype(bool)].mean() < 1e-3


def test_negatives_have_no_lesion_and_the_same_tissue():
    shares = []
    for seed in range(4):
        positive, negative = (replace(SMALL, seed=seed, lesion=lesion) for lesion in (True, False))
        (rgb, lesion), (calm, none) = draw_slide(positive), draw_slide(negative)
        assert not none.any()
        shares.append([(picture.mean(axis=2) < 130)[lesion].mean() for picture in (rgb, calm)])
        assert np.array_equal(make_plan(positive).tissue, make_plan(negative).tissue)
        assert np.array_equal(make_plan(positive).focus, make_plan(negative).focus)
    dark, calm_dark = np.mean(shares, axis=0)
    assert dark == pytest.approx(calm_dark, rel=0.1)


def test_lesion_nuclei_are_larger_and_fewer():
    large, small = (
        make_plan(replace(SMALL, lesion=lesion)).layers[-3 if lesion else -2].outlines_NK2 for lesion in (True, False)
    )
    area = [np.mean([cv2.contourArea(outline) for outline in outlines]) for outlines in (large, small)]
    assert area[0] > 2.5 * area[1]
    assert len(small) > 2 * len(large)


def test_tissue_has_the_wanted_area_and_the_glass_is_not_quite_white():
    rgb, _ = draw_slide(replace(SMALL, tissue_fraction=0.4))
    assert make_plan(replace(SMALL, tissue_fraction=0.4)).tissue.mean() == pytest.approx(0.4, abs=0.01)
    corner = rgb[:20, :20].astype(float)
    assert 220 < corner.mean() < 253
    assert 0.5 < corner.std() < 8


@pytest.mark.parametrize(("extra", "darker"), [({"pen": "blue"}, 0), ({"fold": True}, 1)])
def test_pen_and_fold_darken(extra, darker):
    plain, _ = draw_slide(SMALL)
    marked, lesion = draw_slide(replace(SMALL, **extra))
    fall = plain.astype(int)[..., darker] - marked[..., darker]
    assert (fall > 30).mean() > 0.004
    assert np.array_equal(lesion, draw_slide(SMALL)[1])


def test_blocks_do_not_show(monkeypatch):
    whole, mask = draw_slide(SMALL)
    monkeypatch.setattr(synthetic, "BLOCK_PX", 256)
    blocks, blocks_mask = draw_slide(SMALL)
    assert (np.abs(whole.astype(int) - blocks) > 8).any(axis=2).mean() < 2e-3
    assert (mask != blocks_mask).mean() < 1e-3


def test_a_cohort_is_balanced_and_kept(tmp_path):
    small = SyntheticSpec(size_px=Size(256, 256))
    table = write_cohort(tmp_path, 16, 5, small)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["slide_id"] for row in rows] == [f"slide-{number:02}" for number in range(1, 17)]
    labels = [row["label"] for row in rows]
    assert labels.count("lesion") == labels.count("normal") == 8
    patients = {}
    for row in rows:
        patients.setdefault(row["patient_id"], []).append(row["label"])
        assert (tmp_path / row["path"]).is_file()
        mask = cv2.imread(str(tmp_path / row["lesion_mask"]), cv2.IMREAD_UNCHANGED)
        assert mask.any() == (row["label"] == "lesion")
    assert len(patients) == 12
    assert sorted(len(labels) for labels in patients.values())[-4:] == [2, 2, 2, 2]
    assert all(len(set(labels)) == 1 for labels in patients.values())
    for site in synthetic.SITES:
        assert sorted(row["label"] for row in rows if row["site"] == site) == ["lesion"] * 4 + ["normal"] * 4
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tiff")}
    text = table.read_bytes()
    write_cohort(tmp_path, 16, 5, small)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tiff")} == stamps
    assert table.read_bytes() == text


def test_writing_needs_no_optional_codec(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "imagecodecs", None)
    assert write_slide(tmp_path / "s.tiff", SMALL).path.is_file()
