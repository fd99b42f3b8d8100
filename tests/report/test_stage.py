import base64
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pathfm.mil.heatmap import FOOT_PX
from pathfm.report import gallery, stage
from pathfm.report.stage import run_report
from pathfm.store.commit import content_digest
from pathfm.store.record import read_record
from pathfm.store.tile_store import TileStore, open_tiles
from pathfm.study import Study
from tests.report.conftest import SLIDES, USED, MakeInputs, metrics
from tests.report.mil_results import looks, settings_of, write_folder

ADDRESSES = {"src", "href", "srcset", "poster", "action", "data", "background", "xlink:href"}


class Elements(HTMLParser):
    """Every tag with its attributes, and the text of the page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def page_of(study: Study, inputs: stage.ReportInputs) -> tuple[str, Elements]:
    run_report(study, inputs)
    html = (inputs.report_dir / "index.html").read_text(encoding="utf-8")
    return html, Elements(html)


def test_page_loads_nothing_and_runs_nothing(study: Study, make_inputs: MakeInputs) -> None:
    html, page = page_of(study, make_inputs())
    for tag, attrs in page.tags:
        for name in ADDRESSES & set(attrs):
            assert (attrs[name] or "").startswith(("data:", "#", "snakemake.html")), (tag, name, attrs[name])
        assert not [name for name in attrs if name.startswith("on")]
    assert not {"script", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert "url(http" not in html and "@import" not in html and "http://" not in html and "https://" not in html
    assert "default-src 'none'" in html
    links = {attrs["href"] for attrs in page.all("a")}
    assert links - {"snakemake.html"} <= {f"#{attrs['id']}" for _, attrs in page.tags if attrs.get("id")}


def test_page_is_accessible(study: Study, make_inputs: MakeInputs) -> None:
    _, page = page_of(study, make_inputs())
    assert page.all("html")[0]["lang"] == "en" and page.all("title")
    assert all(attrs.get("alt") for attrs in page.all("img"))
    assert all("caption" in tag for tag, _ in page.tags if tag == "caption") and page.all("caption")
    assert len(page.all("table")) == len(page.all("caption"))
    assert all(attrs.get("scope") for attrs in page.all("th"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_what_comes_from_files_is_escaped(study: Study, make_inputs: MakeInputs) -> None:
    html, page = page_of(study, make_inputs())
    assert "<script>" not in html and "Trial <i>" not in html and "decoded <b>" not in html
    assert "n2 <script>alert(1)" in page.text and "p2 \"&'" in page.text and "Trial <i>one</i>" in page.text


def test_same_study_gives_the_same_page_anywhere(study: Study, make_inputs: MakeInputs, tmp_path: Path) -> None:
    first = make_inputs(tmp_path / "here")
    second = make_inputs(tmp_path / "over there")
    for inputs in (first, second):
        moved = study.model_copy(update={"out": inputs.out})
        run_report(moved, inputs)
    assert content_digest(first.report_dir) == content_digest(second.report_dir)
    html = (first.report_dir / "index.html").read_text(encoding="utf-8")
    assert str(tmp_path) not in html and "my slides" not in html


def test_second_run_keeps_the_page_until_something_changes(study: Study, make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    assert run_report(study, inputs).statuses == {"done": 4}
    before = (inputs.report_dir / "index.html").stat().st_mtime_ns
    again = run_report(study, inputs)
    assert again.did_nothing and again.statuses == {"kept": 4}
    assert (inputs.report_dir / "index.html").stat().st_mtime_ns == before
    renamed = study.model_copy(update={"name": "another"})
    assert run_report(renamed, inputs).statuses == {"done": 4}
    record = read_record(inputs.report_dir)
    assert record is not None and record.stage == "report"


def test_failures_are_listed_and_the_flow_adds_up(study: Study, make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    _, page = page_of(study, inputs)
    for words in (
        "broken.svs: cannot be decoded <b>",
        "no tissue was found",
        "no label",
        "2 slides of 9",
        "1 slide of 9 had no label",
        "1 slide without label",
    ):
        assert words in page.text
    summary = json.loads((inputs.report_dir / "summary.json").read_text(encoding="utf-8"))
    flow = summary["flow"]
    assert flow.pop("in the cohort") == len(SLIDES) == sum(flow.values())
    assert flow["used"] == len(USED)
    assert [row["slide_id"] for row in summary["failures"]] == ["blank", "broken", "unlabelled"]


def test_numbers_and_notes_are_on_the_page(study: Study, make_inputs: MakeInputs) -> None:
    _, page = page_of(study, make_inputs())
    for words in ("0.91", "0.81 to 0.99", "transductive", "colour histogram", "shuffled labels", "on 3 slides", "f" * 64):
        assert words in page.text
    assert "predicted probability of positive" in page.text and "whole patient" in page.text
    charts = [attrs["src"] or "" for attrs in page.all("img") if "svg+xml" in (attrs["src"] or "")]
    assert len(charts) == 4
    assert all(b"<svg" in base64.b64decode(chart.partition(",")[2]) for chart in charts)


def test_parts_that_are_absent_become_sentences(study: Study, make_inputs: MakeInputs, tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "bare", mil=False, pretrained=False)
    _, page = page_of(study.model_copy(update={"extract": study.extract.model_copy(update={"encoder": "timm:x"})}), inputs)
    for words in ("mil stage has not run", "No encoder was pretrained", "No heatmaps", "What failed"):
        assert words in page.text
    summary = json.loads((inputs.report_dir / "summary.json").read_text(encoding="utf-8"))
    assert summary["auroc"] is None and summary["n_slides"] == 6


def test_features_that_cannot_be_read_do_not_cost_the_page(study: Study, make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    inputs.features_dir.mkdir(parents=True)
    for slide_id in ("n1", "p1"):
        (inputs.features_dir / f"{slide_id}.h5").write_bytes(b"no")
    _, page = page_of(study, inputs)
    assert "There is no map of the features: no slide has usable features." in page.text


def test_an_unnamed_study_is_called_by_its_folder_and_the_report_says_where_it_is(make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    shutil.rmtree(inputs.mil_dir / "heatmaps")
    unnamed = Study.model_validate({"out": "some/trial-7", "mil": {"label": "diagnosis"}})
    report = run_report(unnamed, inputs)
    assert not report.did_nothing and report.note == f"page: {inputs.report_dir / 'index.html'}"
    assert "<h1>trial-7</h1>" in (inputs.report_dir / "index.html").read_text(encoding="utf-8")


def test_the_strip_of_a_heatmap_is_cut_off_and_the_scale_bar_is_right(make_inputs: MakeInputs) -> None:
    assert gallery.STRIP_PX == FOOT_PX
    picture = np.zeros((50 + FOOT_PX, 100, 3), dtype=np.uint8)
    assert gallery.without_strip(picture, 2.0).shape == (50, 100, 3) and gallery.without_strip(picture, 1.5) is picture
    store = open_tiles(make_inputs().stores_dir / "n1.zarr")
    store.mpp = None
    assert gallery.scale_bar(store) is None
    store.mpp = 0.5  # as wide as the picture of the slide, tiles of 16 px as they are
    share, words = gallery.scale_bar(store) or (0.0, "")
    width_um = store.thumbnail.shape[1] * store.thumbnail_downsample * 0.5
    assert 0.1 <= share <= 0.25 and float(words.removesuffix(" µm")) == pytest.approx(share * width_um)


def test_without_tile_truth_the_page_says_so(study: Study, make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    content = metrics()
    content["models"]["our encoder"]["localisation_auroc"] = None  # type: ignore[index]
    (inputs.mil_dir / "metrics.json").write_text(json.dumps(content), encoding="utf-8")
    _, page = page_of(study, inputs)
    assert "could not be measured" in page.text


def test_heatmaps_alternate_between_labels(study: Study, make_inputs: MakeInputs) -> None:
    report = run_report(study, make_inputs())
    assert [outcome.slide_id for outcome in report.outcomes] == ["n1", "n2 <script>alert(1)", "p1", "p2 \"&'"]


def test_highest_lowest_and_class_tiles_are_shown(study: Study, make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    listed = {"bottom_tiles.json": {"p1": [2]}, "class_tiles.json": {"p1": {"positive": {"top": [1], "bottom": [3]}}}}
    for name, content in listed.items():
        (inputs.mil_dir / name).write_text(json.dumps(content), encoding="utf-8")
    shutil.copy(inputs.mil_dir / "heatmaps" / "p1.png", inputs.mil_dir / "heatmaps" / "p1.classes.png")
    _, page = page_of(study, inputs)
    for words in ("Tiles of highest attention", "Tiles of lowest attention", "Highest for positive", "map by map"):
        assert words in page.text
    alts = [attrs["alt"] for attrs in page.all("img")]
    assert "Tile 2 of p1: tiles of lowest attention, place 1" in alts and "Tile 1 of p1: highest for positive, place 1" in alts


def test_tiles_whose_pixels_stayed_in_the_slide_are_skipped_with_a_word(
    study: Study, make_inputs: MakeInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_pixels(path: Path) -> TileStore:
        store = open_tiles(path)
        object.__setattr__(store, "has_pixels", False)
        return store

    monkeypatch.setattr(gallery, "open_tiles", without_pixels)
    html, page = page_of(study, make_inputs())
    assert "their pixels were left in the slide" in page.text and "Tiles of highest attention" not in html


def test_signed_maps_have_their_own_words(study: Study, make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    content = metrics() | {"looks": {"kind": "gradient x input", "deletion_insertion": {"p1": looks()}}}
    (inputs.mil_dir / "metrics.json").write_text(json.dumps(content), encoding="utf-8")
    html, page = page_of(study, inputs)
    assert "Red tiles speak for the label" in page.text and "viridis" not in html
    assert "Gradient x input says" in page.text and "Do these tiles decide?" in page.text


def test_page_of_a_survival_study_has_its_labels_and_bundle(study: Study, make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    shutil.rmtree(inputs.mil_dir)
    write_folder(inputs.mil_dir, "cox")
    (inputs.mil_dir / "bundle").mkdir()
    (inputs.mil_dir / "bundle" / "bundle.json").write_bytes(b"{}")
    rows = tuple(replace(row, labels={"months": "7", "dead": "1"}) for row in inputs.cohort.rows)
    survival = study.model_copy(update={"mil": settings_of("cox")})
    _, page = page_of(survival, replace(inputs, cohort=replace(inputs.cohort, rows=rows)))
    for words in ("C-index", "months=7 dead=1", "Kaplan-Meier", "44136fa355b3678a", "pathfm mil predict --bundle"):
        assert words in page.text
    assert "AUROC" not in page.text.replace("AUROC against", "") and "No tiles or regions are marked" in page.text


def test_synthetic_coordinates_are_named(study: Study, make_inputs: MakeInputs, tmp_path: Path) -> None:
    assert "synthetic coordinates" in page_of(study, make_inputs(tmp_path / "mosaic", synthetic=True))[1].text
    assert "synthetic coordinates" not in page_of(study, make_inputs(tmp_path / "tissue"))[1].text


def test_a_slide_without_pictures_is_a_row_and_a_sentence(study: Study, make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    (inputs.mil_dir / "heatmaps" / "p1.png").write_bytes(b"no picture")
    shutil.rmtree(inputs.stores_dir / "n1.zarr")
    report = run_report(study, inputs)
    assert {row.slide_id: row.reason for row in report.outcomes if row.status == "failed"} == {
        "n1": "no tile store",
        "p1": "the heatmap is damaged",
    }
    assert "could not be shown" in (inputs.report_dir / "index.html").read_text(encoding="utf-8")
    assert run_report(study, inputs).statuses["failed"] == 2  # not kept: the pictures may be back


def test_page_stays_small(study: Study, make_inputs: MakeInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "BUDGET_BYTES", 9_000)
    html, page = page_of(study, make_inputs())
    pictures = re.findall(r"data:image/jpeg;base64,[^\"]*", html)
    assert sum(map(len, pictures)) <= 9_000
    assert "left out to keep this page small" in page.text


def test_pictures_are_shrunk_not_enlarged() -> None:
    tall = np.zeros((300, 30, 3), dtype=np.uint8)
    sizes = [len(gallery.picture_uri(tall, longest_px)) for longest_px in (10, 100, 300, 900)]
    assert sizes[0] < sizes[1] < sizes[2] == sizes[3]
