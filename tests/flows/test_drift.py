"""From drawn slides to flags: another colour, blur, scanner or scale is seen in the slides that have it, not in the others."""

from __future__ import annotations

import json
import time

import cv2
import numpy as np
import pytest

from pathfm import workflow
from pathfm.config import load_study
from pathfm.geometry import Mpp, Size
from pathfm.mil.drift import fit_reference, flag_texts, slide_facts
from pathfm.mil.drift_cohort import cohort_flags
from pathfm.mil.drift_facts import facts_from_record
from pathfm.report.drift_page import render_drift_page
from pathfm.slides.synthetic import SyntheticSpec, draw_slide
from pathfm.slides.synthetic_tiff import TiffOptions, write_pyramid
from pathfm.store.tile_store import open_tiles
from pathfm.tile.stage import run_tile

TRAINED, PLAIN = 24, 5
SETTINGS = ("tile.tile_px=64", "tile.tissue.min_area_um2=500", "tile.codec=none", "compute.workers=1", "compute.threads=1")


def paler_and_pinker(rgb):
    """Another laboratory: more of what takes away green, less of what takes away red."""
    density = -np.log(np.maximum(rgb, 1) / 240.0)
    return (240 * np.exp(-density * np.array([0.4, 1.4, 1.0]))).clip(0, 255).astype(np.uint8)


def blurred(rgb):
    return cv2.GaussianBlur(rgb, (0, 0), 2.0)


SHIFTS = {
    "colour": (paler_and_pinker, {}, {"haematoxylin", "eosin", "other"}),
    "blur": (blurred, {}, {"sharpness"}),
    "scanner": (lambda rgb: rgb, {"dialect": "aperio", "tile_px": Size(256, 256)}, {"scanner"}),
    "scale": (lambda rgb: rgb, {"mpp": Mpp(0.25, 0.25)}, {"mpp"}),
    "dark": (lambda rgb: (rgb * 0.85).astype(np.uint8), {}, {"glass"}),
}


def varied(drawn, number):
    """A drawn slide as another day's: turned, stained and lit a little differently. Drawing takes longer than all the rest."""
    rng = np.random.default_rng(number)
    density = -np.log(np.maximum(np.rot90(drawn[number % len(drawn)], number // len(drawn)), 1) / 255.0)
    density = density * np.exp(rng.normal(0, 0.06, 3)) + rng.normal(0, 0.005)
    return cv2.GaussianBlur((255 * np.exp(-density)).clip(0, 255).astype(np.uint8), (0, 0), rng.uniform(0.3, 0.5))


def write(path, rgb, **options):
    write_pyramid(path, [rgb], TiffOptions(**{"mpp": Mpp(0.5, 0.5), **options}))


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Tile stores of all slides by slide_id: ``t..`` are the training's, ``plain.`` like them, the others shifted."""
    folder = tmp_path_factory.mktemp("drift")
    drawn = [draw_slide(SyntheticSpec(size_px=Size(320, 320), seed=seed, tissue_fraction=0.5))[0] for seed in range(4)]
    for number in range(TRAINED + PLAIN):
        name = f"t{number:02d}" if number < TRAINED else f"plain{number - TRAINED}"
        write(folder / f"{name}.tiff", varied(drawn, number))
    for number, (name, (change, options, _)) in enumerate(SHIFTS.items()):
        suffix = "svs" if options.get("dialect") else "tiff"
        write(folder / f"{name}.{suffix}", change(varied(drawn, 100 + number)), **options)
    run = workflow.begin(load_study(None, [*SETTINGS, f"out={folder / 'out'}", f"cohort.slides=[{folder}]"]))
    run_tile(run.study, run.cohort, run.layout)
    return {row.slide_id: open_tiles(run.layout.store(row.slide_id)) for row in run.cohort.rows}


@pytest.fixture(scope="module")
def reference(stores):
    names = sorted(name for name in stores if name.startswith("t"))
    means = [features(stores[name]) for name in names]
    facts = [slide_facts(stores[name], mean) for name, mean in zip(names, means, strict=True)]
    return fit_reference(facts, np.concatenate(means), names, {"lesion": 14, "normal": 14, "abstain:uncertain": 2}, "lesion")


def features(store):
    """What an encoder that knows nothing but colour says of a slide, as a mean feature [1, D]."""
    return store.thumbnail[store.tissue].mean(axis=0)[None]


def test_the_shift_of_each_slide_is_named_and_slides_without_one_have_no_flag(stores, reference):
    for name, store in stores.items():
        facts = slide_facts(store, features(store), reference)
        assert facts_from_record(json.loads(json.dumps(facts.record()))) == facts
        found = {flag.name for flag in reference.flags(facts)}
        if name.startswith("plain"):
            assert found == set(), name
        elif name in SHIFTS:
            assert found & SHIFTS[name][2], name
    of = {name: flag_texts(reference.flags(slide_facts(stores[name], features(stores[name]), reference))) for name in SHIFTS}
    assert any("blurrier than the training slides" in text for text in of["blur"])
    assert "unknown scanner: aperio, training has generic-tiff" in of["scanner"]
    assert "slide of another scale: 0.25 um per px, training has 0.5" in of["scale"]
    assert any("features are far" in text for text in of["colour"])


def test_facts_come_without_pixels_and_in_little_time(stores, reference):
    store = open_tiles(stores["plain0"].path)
    assert not store.has_pixels
    started = time.perf_counter()
    facts = slide_facts(store, features(store), reference)
    assert time.perf_counter() - started < 0.5  # about 0.01; other tests may run beside this one
    assert facts.scanner == "generic-tiff" and facts.mpp == 0.5 and facts.tiles == len(store)
    assert all(facts.numbers[name] is not None for name in ("sharpness", "pen", "white", "haematoxylin", "glass", "features"))


def test_shifted_slides_one_after_another_are_a_shift_of_the_cohort_and_plain_ones_are_not(stores, reference):
    def rows(*names, decision):
        found = [slide_facts(stores[name], features(stores[name]), reference) for name in names]
        flags = [[flag.record() for flag in reference.flags(each)] for each in found]
        return [
            {"slide_id": f"<{name}>", "facts": each.record(), "flags": own, "decision": decision}
            for name, each, own in zip(names, found, flags, strict=True)
        ]

    plain = rows(*sorted(name for name in stores if name.startswith("t"))[:20], decision="lesion")
    plain = [{**row, "decision": ("lesion", "normal")[place % 2]} for place, row in enumerate(plain)]
    assert cohort_flags(reference, plain).flags == ()
    shifted = cohort_flags(reference, plain + rows(*["blur"] * 25, decision="abstain:uncertain"), window=25)
    assert {"sharpness", "abstention", "doubt"} <= {flag.name for flag in shifted.flags}
    assert "look different from the training and are decided differently" in shifted.verdict
    html = render_drift_page(reference.record(), plain, shifted.record())
    assert shifted.verdict in html and "&lt;t00&gt;" in html and "<t00>" not in html
