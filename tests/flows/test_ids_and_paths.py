"""Names as people and scanners give them: what they become in the output, and which are refused, in one line."""

from __future__ import annotations

import os
import shutil
import unicodedata
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from pathfm.errors import UsageError
from pathfm.slides.discover import discover
from pathfm.store.cohort import load_cohort
from pathfm.store.tile_store import open_tiles
from pathfm.study import CohortSettings
from tests.flows.tile_runs import digest, is_plain, litter, made, outcomes, stores_of, tile, write_slides

LONG = "long " + "ß" * 97
"""199 bytes."""
PLAIN = [
    "with space",
    "two  spaces.and.dots",
    unicodedata.normalize("NFC", "café"),
    unicodedata.normalize("NFD", "naïve"),
    "🔬 slide",
    "标本 7",
    LONG,
    "a%20b",
    "a#b",
    "what?",
    "star*",
    "[a-z]",
    'it\'s "quoted"',
    "<b>&amp;",
    "-dash",
    "--out",
    "$(touch x)`y`",
    "~tilde",
    "C:drive",
    "com,ma;semi=equal",
    "CON",
    "x.zarr",
]


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return write_slides(tmp_path_factory.mktemp("one") / "slides", 1, 384) / "s0.svs"


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in {"href", "src"}]


def _links_of(page):
    parser = _Links()
    parser.feed(page.read_text(encoding="utf-8"))
    return [link for link in parser.found if not link.startswith("data:")]


def _tree(folder, slide):
    """Slides of all names, twins, and links; their expected ids."""
    folder.mkdir()
    for name in PLAIN:
        shutil.copy(slide, folder / f"{name}.svs")
    for name in ("a", "b b/ü"):
        (folder / name).mkdir(parents=True)
        shutil.copy(slide, folder / name / "same.svs")
    for suffix in (".svs", ".tif", ".TIF"):
        shutil.copy(slide, folder / f"twin{suffix}")
    away = folder.parent / "away"
    away.mkdir()
    shutil.copy(slide, away / "far.svs")
    (folder / "link.svs").symlink_to(away / "far.svs")
    (folder / "linked").symlink_to(away)
    return {*PLAIN, "a__same", "b b__ü__same", "twin.svs", "twin.tif", "link", "linked__far"}


@pytest.mark.long
def test_slides_of_all_names(tmp_path, slide):
    source, out = tmp_path / "sli des#1", tmp_path / "o ut%20é"
    expected = _tree(source, slide)
    (source / "twin.TIF").unlink()
    code, told, err = tile(source, out, workers=2)
    assert code == 0, err
    assert is_plain(err)
    assert {path.name.removesuffix(".zarr") for path in stores_of(out).glob("*.zarr")} == expected
    assert set(outcomes(out)) == expected
    whole = {(len(store), store.attrs["identity"]) for store in map(open_tiles, stores_of(out).glob("*.zarr"))}
    assert len(whole) == 1, "they are copies of one slide"
    for slide_id in expected:
        assert open_tiles(stores_of(out) / f"{slide_id}.zarr").slide_id == slide_id
    links = _links_of(stores_of(out) / "index.html")
    assert len(set(links)) == 2 * len(expected)
    for link in links:
        assert urlsplit(link)[:2] == ("", "")
        assert (stores_of(out) / unquote(urlsplit(link).path)).is_file(), link
    assert litter(out) == []
    before = digest(out)
    code, told, err = tile(source, out)
    assert (code, "nothing to do" in told, digest(out)) == (0, True, before)


def test_names_that_only_some_file_systems_tell_apart_are_refused(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café.svs") for form in ("NFC", "NFD"))
    for one, other in (("twin.tif", "twin.TIF"), ("a.svs", "A.svs"), (composed, decomposed)):
        folder = tmp_path / one
        folder.mkdir()
        for name in (one, other):
            (folder / name).touch()
        with pytest.raises(UsageError, match=r"differs from .* only in case or in how accents are written"):
            load_cohort(CohortSettings(slides=(str(folder),)), tmp_path, lambda *sources: discover(*sources).slides)


@pytest.mark.parametrize("name", ["x" * 201 + ".svs", " space.svs", "line\nbreak.svs", os.fsdecode(b"caf\xe9.svs")])
def test_names_that_no_output_can_have_are_refused_in_one_line(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UsageError, match="slide_id") as refused:
        load_cohort(CohortSettings(slides=(str(tmp_path),)), tmp_path, lambda *sources: discover(*sources).slides)
    assert len(str(refused.value).splitlines()) == 1
    str(refused.value).encode()


OUTSIDE = ["../evil", "a/b", "/evil", "..", ".", "..\\evil", ".hidden", "../../evil", "a/../../evil"]


@pytest.mark.parametrize("slide_id", OUTSIDE)
def test_a_slide_id_that_leaves_the_output_folder_is_refused(tmp_path, slide, slide_id):
    table = tmp_path / "cohort.csv"
    table.write_text(f"slide_id,path\ngood,{slide}\n{slide_id},{slide}\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"line 3: slide_id .* (holds a slash|starts with a dot)") as refused:
        load_cohort(CohortSettings(table=table), tmp_path)
    assert len(str(refused.value).splitlines()) == 1


def test_path_traversal_is_refused_before_anything_is_written(tmp_path, slide):
    table, out = tmp_path / "cohort.csv", tmp_path / "deep" / "out"
    table.write_text(f"slide_id,path\n../../../evil,{slide}\n")
    before = sorted(tmp_path.rglob("*"))
    code, told, err = tile(table, out)
    assert (code, told, len(err.splitlines())) == (2, "", 1), err
    assert "would leave the output folder" in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.long
def test_a_slide_may_lie_outside_of_its_table(tmp_path, slide):
    """Also behind links, and named by a relative path: only ids name files of the output."""
    (tmp_path / "tables").mkdir()
    (tmp_path / "outside ü").mkdir()
    shutil.copy(slide, tmp_path / "outside ü" / "-s, 1.svs")
    (tmp_path / "tables" / "link").symlink_to(tmp_path / "outside ü")
    table, out = tmp_path / "tables" / "cohort.csv", tmp_path / "out"
    table.write_text('slide_id,path\none,"../outside ü/-s, 1.svs"\n"two, ü","link/-s, 1.svs"\n', encoding="utf-8")
    code, _, err = tile(table, out)
    assert code == 0, err
    assert made(out) == ["one", "two, ü"]


def test_a_link_to_nothing_is_no_slide_that_is_silently_left_out(tmp_path):
    (tmp_path / "a.svs").touch()
    (tmp_path / "gone.svs").symlink_to(tmp_path / "nowhere.svs")
    found = discover([tmp_path])
    assert [each.slide_id for each in found.slides] == ["a", "gone"]


def test_a_folder_that_links_to_itself_is_searched_once(tmp_path):
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "a.svs").touch()
    (tmp_path / "slides" / "loop").symlink_to(tmp_path / "slides")
    assert [each.slide_id for each in discover([tmp_path / "slides"]).slides] == ["a"]
