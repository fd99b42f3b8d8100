"""Where the feature file of a slide lies in the folders of other tools, and what becomes of files that cannot be used."""

from __future__ import annotations

import shutil

import h5py
import numpy as np
import pytest
import torch

from pathfm.errors import StoreError, UsageError
from pathfm.feature_export import export_features
from pathfm.mil.feature_cache import FeatureCache
from pathfm.mil.foreign_inputs import ForeignFolder, foreign_notes, read_foreign, reader_of, repeated_tiles
from pathfm.store.cohort import Cohort, SlideRow
from tests.foreign_features import LAYOUTS, samples, write_layout
from tests.interop_files import CMU, CMU_MPP, interop_folder


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    return samples(tmp_path_factory.mktemp("own"), patients=3)


def touched(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return ForeignFolder(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("budget", [0, 1_000_000])
def test_every_layout_gives_the_same_features(layout, budget, slides, tmp_path):
    folder = ForeignFolder(write_layout(layout, tmp_path / "features", slides))
    tools = set()
    with FeatureCache(budget, tmp_path / "scratch") as cache:
        for slide in slides:
            path = folder.find(slide.slide_id)
            facts = cache.add(slide.slide_id, path, reader_of(path, 0.5))
            np.testing.assert_array_equal(cache.read(slide.slide_id), slide.file.features)
            tools.add((facts.encoder.get("tool"), facts.encoder.get("encoder"), facts.encoder.get("recipe_encoder")))
            if layout not in ("clam-pt", "trident-pt", "slide2vec"):
                np.testing.assert_array_equal(facts.xy_level0, slide.file.coords)
    tool = {"clam-pt": "CLAM", "clam": "CLAM", "trident-pt": "TRIDENT", "stamp": "STAMP", "slide2vec": "slide2vec"}.get(layout)
    encoder = "" if layout.startswith("clam") else "uni"
    assert len(tools) == 1
    if layout == "pathfm":
        assert tools == {(None, None, "uni")}
    else:
        assert (tool or next(iter(tools))[0], encoder, None) in tools


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_found_for_other_slides(layout, slides, tmp_path):
    folder = ForeignFolder(write_layout(layout, tmp_path / "features", slides))
    assert folder.find("S00") is None
    assert folder.find("") is None
    assert folder.notes([slide.slide_id for slide in slides]) == []


@pytest.mark.parametrize("format", ["clam", "trident", "stamp"])
def test_what_we_export_for_others_is_read_again(format, slides, tmp_path):
    own = write_layout("pathfm", tmp_path / "own", slides)
    assert export_features(own, tmp_path / "out", format) == 0
    folder = ForeignFolder(tmp_path / "out")
    for slide in slides:
        found = read_foreign(folder.find(slide.slide_id), 0.5)
        assert found.tool.casefold() == format
        np.testing.assert_array_equal(found.features, slide.file.features)
        np.testing.assert_array_equal(found.coords, slide.file.coords)


def test_clam_files_with_coordinates_go_before_copies_without(tmp_path):
    folder = touched(tmp_path, "h5_files/a.h5", "pt_files/a.pt", "pt_files/b.pt", "masks/a.jpg")
    assert folder.find("a") == tmp_path / "h5_files/a.h5"
    assert folder.find("b") == tmp_path / "pt_files/b.pt"
    assert folder.find("a.svs") == tmp_path / "h5_files/a.h5"


def test_coordinates_and_vectors_of_slides_are_not_taken_for_features(tmp_path):
    folder = touched(
        tmp_path,
        *("patches/a.h5", "patches/a_patches.h5", "features_uni/a.h5", "slide_features_titan/a.h5", "patches/b.h5"),
        *("tiles/a.coordinates.npz", ".hidden/a.h5"),
    )
    assert folder.find("a") == tmp_path / "features_uni/a.h5"
    assert folder.find("b") == tmp_path / "patches/b.h5"  # AtlasPatch; of CLAM, reading it says that there are no features
    assert ForeignFolder(tmp_path / "slide_features_titan").find("a") == tmp_path / "slide_features_titan/a.h5"


def test_two_encoders_of_one_slide_are_refused_by_name(tmp_path):
    folder = touched(tmp_path, "features_uni/a.h5", "features_conch/a.h5", "features_uni/b.h5")
    with pytest.raises(UsageError, match=r"slide a has 2 feature files: features_conch/a.h5, features_uni/a.h5.*point it at"):
        folder.find("a")
    assert folder.find("b") == tmp_path / "features_uni/b.h5"


def test_names_may_differ_in_case_and_endings_and_that_is_said(tmp_path):
    folder = touched(tmp_path, "A.svs.h5", "TCGA-1.X.h5", "extra.h5", "more.h5")
    assert folder.find("a") == tmp_path / "A.svs.h5"
    assert folder.find("TCGA-1.X") == tmp_path / "TCGA-1.X.h5"
    assert folder.notes(["a", "TCGA-1.X", "gone"]) == [
        "2 feature files are of slides that are not in the table: extra.h5, more.h5",
        "1 slides are written differently in the table, as a for A.svs.h5",
    ]
    both = touched(tmp_path / "both", "a.h5", "A.h5")
    assert (both.find("a").name, both.find("A").name) == ("a.h5", "A.h5")


def test_a_folder_without_features_is_refused(tmp_path):
    with pytest.raises(UsageError, match="there is no such folder"):
        ForeignFolder(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"no feature files in this folder"):
        touched(tmp_path, "a.svs")


def test_links_are_followed_and_may_go_round(slides, tmp_path):
    write_layout("clam", tmp_path / "elsewhere", slides)
    (tmp_path / "features").mkdir()
    (tmp_path / "features/linked").symlink_to(tmp_path / "elsewhere")
    assert ForeignFolder(tmp_path / "features").find(slides[0].slide_id) is not None


@pytest.mark.parametrize(
    ("name", "shape", "tool", "encoder"),
    [
        ("clam/features", (50, 192), "CLAM", None),
        ("trident/20x_256px_0px_overlap/features_vit_tiny_random", (58, 192), "TRIDENT", "vit_tiny_random"),
        ("trident/20x_256px_0px_overlap/slide_features_mean-vit_tiny_random", (1, 192), "TRIDENT slide vector", None),
        ("trident_edge/features_one", (1, 192), "TRIDENT", "vit_tiny_random"),
        ("stamp", (18, 192), "STAMP", "vit_tiny_random"),
        ("slide2vec/npz", (73, 192), "slide2vec", "vit-tiny-random"),
        ("slide2vec/pt", (73, 192), "slide2vec", "vit-tiny-random"),
        ("lazyslide", (31, 192), "LazySlide", "vit_tiny_random"),
    ],
)
@pytest.mark.parametrize("mpp", [None, CMU_MPP])
def test_files_that_other_tools_have_written(name, shape, tool, encoder, mpp):
    if name == "lazyslide":
        pytest.importorskip("pyarrow", reason="needs pathfm[interop]")
    path = ForeignFolder(interop_folder() / name).find(f"{CMU}.svs")
    found = reader_of(path, mpp)(path)
    assert (found.tool, found.features.shape) == (tool, shape)
    assert found.encoder == encoder or (encoder is None and tool != "CLAM")
    assert (found.coords is None) == (tool == "TRIDENT slide vector" or (tool == "STAMP" and mpp is None))


def test_a_folder_of_two_encoders_is_refused_on_real_files():
    with pytest.raises(UsageError, match=r"slide .* has 3 feature files: 20x_256px_0px_overlap/features_resnet18"):
        ForeignFolder(interop_folder() / "trident").find(CMU)


def test_a_slide_without_tiles_is_empty_and_no_error(tmp_path):
    path = ForeignFolder(interop_folder() / "trident_edge/features_empty").find(CMU)
    with FeatureCache(1000, tmp_path) as cache:
        assert len(cache.add(CMU, path, reader_of(path))) == 0


@pytest.mark.parametrize("mpp", [None, 0.5])
@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda file: file["feats"].__setitem__((0, 0), np.nan), "not finite: 1 of"),
        (lambda file: file.__delitem__("coords"), "damaged|no file|coordinates"),
        (lambda file: file.attrs.__setitem__("feat_type", "patient"), "of a patient, not of a slide"),
    ],
)
def test_damaged_files_of_stamp_are_refused_in_one_line(damage, match, mpp, slides, tmp_path):
    path = ForeignFolder(write_layout("stamp", tmp_path / "f", slides)).find(slides[0].slide_id)
    with h5py.File(path, "a") as file:
        damage(file)
    with pytest.raises(StoreError, match=match) as caught:
        read_foreign(path, mpp)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "lazyslide"])  # which is a folder
def test_cut_off_files_are_refused_in_one_line(layout, slides, tmp_path):
    folder = ForeignFolder(write_layout(layout, tmp_path / "f", slides))
    path = folder.find(slides[0].slide_id)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with FeatureCache(1000, tmp_path / "scratch") as cache, pytest.raises(StoreError) as caught:
        cache.add("s", path, reader_of(path))
    assert "\n" not in str(caught.value)


def test_a_torch_file_cannot_run_anything(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save(Evil(), tmp_path / "a.pt")
    with pytest.raises(StoreError, match="something else than features"):
        read_foreign(ForeignFolder(tmp_path).find("a"))
    assert not (tmp_path / "ran").exists()


def test_what_a_reader_should_know_is_noted(slides, tmp_path):
    folder = ForeignFolder(write_layout("clam", tmp_path / "f", slides))
    rows = tuple(SlideRow(slide.slide_id, tmp_path) for slide in slides[1:])
    with FeatureCache(1000, tmp_path / "scratch") as cache:
        for row in rows:
            path = folder.find(row.slide_id)
            cache.add(row.slide_id, path, reader_of(path))
        notes = foreign_notes(folder, Cohort(rows, notes=("patient_id is the column 'case'",)), cache.facts)
    assert notes == [
        "patient_id is the column 'case'",
        f"1 feature files are of slides that are not in the table: {slides[0].slide_id}.h5",
        f"the encoder of {len(rows)} slides is unknown: only the length of their features says that it is one",
    ]


def test_tiles_that_are_stored_twice_are_counted(slides, tmp_path):
    path = write_layout("clam", tmp_path / "f", slides[:1]) / "h5_files" / f"{slides[0].slide_id}.h5"
    with h5py.File(path, "a") as file:
        for name in ("features", "coords"):
            values = file[name][()]
            del file[name]
            file[name] = np.concatenate([values, values[:2]])
    with FeatureCache(1000, tmp_path / "scratch") as cache:
        facts = cache.add("s", path, reader_of(path))
        assert repeated_tiles(facts) == 2
        notes = foreign_notes(ForeignFolder(tmp_path / "f"), Cohort((SlideRow("s", path),)), {"s": facts})
    assert any(note.startswith("2 tiles of 1 slides are there twice") for note in notes)
    shutil.rmtree(tmp_path / "f")
