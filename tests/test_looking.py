import csv
import re
from pathlib import Path

import numpy as np
import pytest

from pathfm import looking
from pathfm.config import load_study
from pathfm.errors import ExitCode, StoreError, UsageError
from pathfm.looking import MapOptions, SearchOptions
from pathfm.store.commit import content_digest
from pathfm.store.feature_file import write_features
from pathfm.store.tile_store import write_tiles
from pathfm.workflow import begin

DIM, SIDE = 8, 32
SLIDES = ("a", "b", "c 1", "d", "e")
PATIENTS = {"a": "p1", "b": "p1", "c 1": "p2", "d": "p3", "e": "p4"}


def corners(count):
    return np.stack([np.arange(count) % 3, np.arange(count) // 3], 1).astype(np.int64) * SIDE


def values(number):
    return np.random.default_rng(number).normal(size=(7 + number, DIM)).astype(np.float16)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Five slides: one without pixels that fit its features, one without features."""
    home = tmp_path_factory.mktemp("looking")
    lines = ["slide_id,path,patient_id,site,grade"]
    for slide_id in SLIDES:
        (home / f"{slide_id}.svs").write_bytes(b"")
        lines.append(
            f"{slide_id},{slide_id}.svs,{PATIENTS[slide_id]},{'xy'[slide_id < 'c']},{'hi' if slide_id < 'd' else 'lo'}"
        )
    (home / "cohort.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    study = load_study(
        None, [f"out={home / 'out'}", f"cohort.table={home / 'cohort.csv'}", "extract.encoder=untrained:x/y", "name=Trial"]
    )
    layout = begin(study).layout
    for number, slide_id in enumerate(SLIDES[:4]):
        count = 7 + number
        pixels = np.random.default_rng(number).integers(0, 255, (count, SIDE, SIDE, 3), dtype=np.uint8)
        write_tiles(layout.store(slide_id), pixels, slide_id=slide_id, xy_level0=corners(count))
        attrs = {"fingerprint": "f", "tile_side_level0": float(SIDE), "mpp": 0.5}
        attrs["store_fingerprint"] = "another" if slide_id == "d" else "in memory"
        write_features(layout.features("untrained:x/y", "0" * 8) / f"{slide_id}.h5", values(number), corners(count), attrs)
    write_features(layout.features("colour", "0" * 8) / "a.h5", values(0), corners(7), {"fingerprint": "f"})
    return study


def folder_of(study):
    return begin(study).layout.features("untrained:x/y", "0" * 8)


def test_features_are_found_by_the_encoder_of_the_study(study, tmp_path):
    run = begin(study)
    assert looking.find_features(run) == folder_of(study)
    assert looking.find_features(run, "colour").name == "colour-00000000"
    with pytest.raises(UsageError, match=r"no features of this encoder .*--features: colour-00000000, untrained-x-y-00000000"):
        looking.find_features(run, "foo")
    with pytest.raises(UsageError, match="run `pathfm extract` first"):
        looking.find_features(begin(study.model_copy(update={"out": tmp_path})))


def test_of_several_features_those_made_with_the_settings(study, tmp_path):
    run = begin(study.model_copy(update={"out": tmp_path}))
    for digest in ("1" * 8, "2" * 8):
        write_features(run.layout.features("untrained:x/y", digest) / "a.h5", values(0), corners(7), {"fingerprint": "f"})
    with pytest.raises(UsageError, match="several features fit"):
        looking.find_features(run)
    from pathfm.store.record import StageReport, write_record

    write_record(run.layout.features("untrained:x/y", "2" * 8), StageReport("extract"), study.extract)
    assert looking.find_features(run).name == "untrained-x-y-22222222"


def test_map(study, tmp_path, capsys):
    assert looking.feature_map(study, MapOptions(umap=False, out=tmp_path / "m")) == ExitCode.DONE
    names = {path.relative_to(tmp_path / "m").as_posix() for path in (tmp_path / "m").rglob("*.png")}
    columns = ("slide", "grade", "site", "patient")
    assert names == {
        *(f"{what}-pca-by-{column}.png" for what in ("tiles", "slides") for column in columns),
        "tiles-pca-atlas.png",
        *(f"slides/{slide_id}.png" for slide_id in SLIDES[:4]),
    }
    html = (tmp_path / "m" / "index.html").read_text(encoding="utf-8")
    assert "all 34 tiles of 4 slides" in html and "e (no feature file)" in html and str(tmp_path) not in html
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    assert "all 34 tiles of 4 slides" in capsys.readouterr().out


def test_map_of_one_column_and_one_slide_is_the_same_each_time(study, tmp_path):
    for name in ("m", "n"):
        looking.feature_map(study, MapOptions(umap=False, by=("grade",), slides=("b",), fit="slide", out=tmp_path / name))
    assert content_digest(tmp_path / "m") == content_digest(tmp_path / "n")
    assert [path.name for path in (tmp_path / "m" / "slides").iterdir()] == ["b.png"]
    assert "3 slides are not shown" in (tmp_path / "m" / "index.html").read_text(encoding="utf-8")


def test_map_without_umap_says_how_to_install_it(study, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    looking.feature_map(study, MapOptions(by=("grade",), slides=("b",), out=tmp_path))
    assert "pip install &#39;pathfm[umap]&#39;" in (tmp_path / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("options", "words"), [({"by": ("z",)}, "no column 'z'"), ({"slides": ("z",)}, "slide 'z'")])
def test_map_of_what_is_not_there(study, tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        looking.feature_map(study, MapOptions(umap=False, out=tmp_path, **options))


def table(folder):
    with (folder / "neighbours.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def plain_neighbours(query, slides):
    slide, tile = query
    wanted = values(SLIDES.index(slide))[tile].astype(float)
    found = []
    for other in slides:
        for number, row in enumerate(values(SLIDES.index(other)).astype(float)):
            cosine = row @ wanted / np.linalg.norm(row) / np.linalg.norm(wanted)
            found += [(-cosine, other, number)] * ((other, number) != query)
    return [(slide_id, number) for _, slide_id, number in sorted(found)]


@pytest.mark.parametrize(("other", "slides"), [("none", "abcd"), ("slide", "acd"), ("patient", "cd")])
def test_search_agrees_with_the_plain_one(study, tmp_path, other, slides):
    assert looking.search(study, "b:40,70", SearchOptions(count=9, other=other, out=tmp_path)) == ExitCode.DONE
    searched = [slide_id for slide_id in SLIDES[:4] if slide_id[0] in slides]
    rows = table(tmp_path)
    assert [(row["slide_id"], int(row["tile"])) for row in rows] == plain_neighbours(("b", 7), searched)[:9]
    for row in rows:
        assert [int(row["x_level0"]), int(row["y_level0"])] == corners(20)[int(row["tile"])].tolist()
        assert row["patient_id"] == PATIENTS[row["slide_id"]] and row["grade"] in {"hi", "lo"}
    assert (tmp_path / "contact.png").read_bytes().startswith(b"\x89PNG")


def test_search_page(study, tmp_path):
    looking.search(study, "c 1:3", SearchOptions(count=100, out=tmp_path))
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert html.count("<img") == 34 and "Tiles like c 1:0,32" in html
    assert "10 tiles are grey: the slide was tiled anew since" in html and "33 tiles of 4 slides, 8 of them" in html
    assert not re.search(r"(src|href)=\"(?!data:)", html)


def test_search_writes_into_the_study(study):
    looking.search(study, "c 1:3", SearchOptions(count=2))
    assert (study.out / "search" / folder_of(study).name / "c 1-3" / "index.html").is_file()


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("a:500,20", r"no tile lies there \(the nearest one is a:80,16\)"),
        ("a:7", "no such tile .*tiles 0 to 6"),
        ("a", "not a tile"),
        ("a:", "not a tile"),
        ("a:1,x", "not a tile"),
        ("a:1,2,3", "not a tile"),
        ("c1:1,2", "did you mean 'c 1'"),
    ],
)
def test_what_is_no_tile(study, tmp_path, query, words):
    with pytest.raises(UsageError, match=words):
        looking.search(study, query, SearchOptions(out=tmp_path))


def test_slide_without_features_and_senseless_counts(study, tmp_path):
    with pytest.raises(StoreError, match="no feature file"):
        looking.search(study, "e:1,1", SearchOptions(out=tmp_path))
    with pytest.raises(UsageError, match="at least one"):
        looking.search(study, "a:1,1", SearchOptions(count=0, out=tmp_path))
    assert not list(Path(tmp_path).iterdir())
