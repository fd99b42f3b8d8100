"""Finding slides."""

import os
import shutil
from pathlib import Path

import pytest

from pathfm.errors import UsageError
from pathfm.slides.discover import discover

DATA = Path(os.environ.get("PATHFM_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real slides are not here (set PATHFM_TEST_DATA)")


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def ids(*args, **kwargs):
    return [slide.slide_id for slide in discover(*args, **kwargs).slides]


def test_a_folder_is_searched_through(tmp_path):
    touch(tmp_path, "b.svs", "a/s10.tiff", "a/s2.NDPI", "a/deep/x.y.png", "notes.txt", ".hidden.svs", "a/.git/z.svs")
    found = discover([tmp_path])
    assert [slide.slide_id for slide in found.slides] == ["a__deep__x.y", "a__s2", "a__s10", "b"]
    assert found.ignored == (tmp_path / "notes.txt",)
    assert all(slide.path.is_file() for slide in found.slides)


def test_slides_that_differ_in_the_suffix_keep_it(tmp_path):
    touch(tmp_path, "a.svs", "a.tif", "b.svs")
    assert ids([tmp_path]) == ["a.svs", "a.tif", "b"]


def test_files_and_globs(tmp_path):
    touch(tmp_path, "one/s.svs", "two/s.svs", "two/odd.slide")
    assert ids([tmp_path / "two" / "odd.slide"]) == ["odd"]
    assert ids([str(tmp_path / "*" / "*.svs")]) == ["one__s", "two__s"]
    assert ids([str(tmp_path / "t*")]) == ["two__s"]
    assert ids([tmp_path / "one", tmp_path / "one" / "s.svs"]) == ["s"]


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(UsageError, match="absent"):
        discover([tmp_path / "absent"])
    with pytest.raises(UsageError, match="nothing matches"):
        discover([tmp_path / "*.svs"])


def test_two_slides_with_one_id(tmp_path):
    touch(tmp_path, "one/s.svs", "two/s.svs")
    with pytest.raises(UsageError, match="'s"):
        discover([tmp_path / "one", tmp_path / "two"])


def test_companions_are_no_slides(tmp_path):
    touch(tmp_path, "m.mrxs", "m/Slidedat.ini", "m/preview.jpg", "h/s.vms", "h/s.jpg", "h/s_map.jpg", "out.zarr/thumbnail.png")
    assert ids([tmp_path]) == ["h__s", "m"]


def test_folders_of_tiles(tmp_path):
    touch(tmp_path, "p1/a.png", "p2/b.jpg", "p2/inner/c.png", "p3/none.txt")
    found = discover([tmp_path], folder_of_tiles=True)
    assert [slide.slide_id for slide in found.slides] == ["p1", "p2", "p2__inner"]
    assert ids([tmp_path / "p1"], folder_of_tiles=True) == ["p1"]


@pytest.mark.parametrize("folder_of_tiles", [False, True])
def test_links_back_into_the_way_are_not_followed(tmp_path, folder_of_tiles):
    touch(tmp_path, "in/a/1.png", "in/a/2.png")
    before = ids([tmp_path / "in"], folder_of_tiles)
    for place, target in (("in/loop", "."), ("in/a/up", ".."), ("in/out", "..")):
        (tmp_path / place).symlink_to(target)
    assert ids([tmp_path / "in"], folder_of_tiles) == before


def test_links_to_slides_elsewhere_are_slides(tmp_path):
    touch(tmp_path, "store/x.svs", "in/b.svs")
    (tmp_path / "in" / "a.svs").symlink_to(tmp_path / "store" / "x.svs")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "store")
    assert ids([tmp_path / "in"]) == ["a", "b", "more__x"]


def test_output_folders_are_not_searched(tmp_path):
    made = ("out/study.yaml", "out/tiles/spec/pictures/a.overlay.png", "out/tiles/spec/index.html", "b.zarr/x.png")
    touch(tmp_path, "a.png", "tiles/b.png", "tiles/study.yaml", *made)
    assert ids([tmp_path]) == ["a", "tiles__b"]
    assert discover([tmp_path]).ignored == (tmp_path / "tiles" / "study.yaml",)
    assert ids([tmp_path], folder_of_tiles=True) == [tmp_path.name, "tiles"]
    for pattern in ("*", "**/*.png"):
        assert ids([str(tmp_path / pattern)]) == ["a", "tiles__b"]


def test_unreadable_dicom_files_are_slides_of_their_own(tmp_path):
    touch(tmp_path, "x/a.dcm", "x/b.dcm")
    assert ids([tmp_path]) == ["x__a", "x__b"]


@needs_data
def test_a_real_dicom_series_is_one_slide(tmp_path):
    shutil.copytree(DATA / "formats" / "dicom" / "boxes", tmp_path / "case" / "boxes")
    found = discover([tmp_path])
    assert [slide.slide_id for slide in found.slides] == ["case__boxes"]
    assert found.slides[0].path.is_dir()
    assert ids([tmp_path / "case" / "boxes"]) == ["boxes"]
    touch(tmp_path, "case/boxes/extra.svs")
    assert ids([tmp_path]) == ["case__boxes__boxes_0", "case__boxes__extra"]


@needs_data
def test_every_real_malformed_file_is_found():
    names = {path.stem for path in (DATA / "malformed").iterdir()}
    assert set(ids([DATA / "malformed"])) == names
