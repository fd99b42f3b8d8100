"""The page of a pretraining run: made from what a run leaves, also from little of it; nothing fetched, nothing believed."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from pathfm.errors import StoreError
from pathfm.report.pretrain_curves import SECTIONS, Panel, _draw, read_run
from pathfm.report.pretrain_page import render_pretrain_page, write_pretrain_page

HOSTILE = '<script>alert(1)</script> & "quoted" in /home/someone/tiles'


def _write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _step(step):
    return {
        "step": step,
        "loss": 14 - 0.01 * step,
        "dino_global": 1.8,
        "dino_local": 7.2 - 0.005 * step,
        "ibot": 4.5,
        "koleo": 0,
        "kde": 0.1,
        "teacher_entropy": 9 - 0.004 * step,
        "teacher_kl": 0.3,
        "prototype_perplexity": 0.8,
        "prototypes_used": 0.1,
        "grad_norm_backbone": 5 if step % 4 == 0 else 1,
        "grad_norm_dino_head": 0.5,
        "ema_distance": 0.05 if (step + 1) % 10 == 0 else "nan",
        "lr": 1e-3,
        "teacher_temperature": 0.04,
    }


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A finished run of 600 steps with probes, pictures and an alarm."""
    folder = tmp_path_factory.mktemp("encoder") / "vit_small-3f9c"
    _write(folder / "metrics.csv", [_step(step) for step in range(600)])
    times = [{"step": step, "seconds": 2, "images_per_second": 40, "data_wait_seconds": 0.1} for step in range(9, 600, 10)]
    _write(folder / "timing.csv", [{**row, "peak_memory_gb": 1.5} for row in times])
    looks = [
        {"step": step, "rankme": 5 + step / 20, "patch_cosine": 0.5, "probe_linear": 0.7 + step / 6000}
        for step in range(0, 601, 200)
    ]
    _write(folder / "health" / "snapshots.csv", looks)
    _write(folder / "health" / "alarms.csv", [{"step": 431, "fault": "diverging", "what": HOSTILE, "fix": "lower pretrain.lr"}])
    for step in range(0, 601, 200):
        cv2.imwrite(str(folder / "health" / f"step-{step:07d}.png"), np.full((20, 30, 3), step % 256, np.uint8))
    card = {"preset": "dinov2", "differs": {"prototypes": 8192, "steps": 600, "crops.global_px": 96}}
    (folder / "teacher").mkdir()
    (folder / "teacher" / "card.json").write_text(json.dumps(card))
    return folder


class _Reader(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def html(encoder, tmp_path_factory):
    """Its page, drawn once."""
    return write_pretrain_page(encoder, tmp_path_factory.mktemp("page") / "page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return _Reader(html)


def test_headline_numbers(html):
    cards = dict(re.findall(r'<p class="label">([^<]+)</p><p class="value">([^<]+)</p>', html))
    assert cards == {
        "Steps": "600",
        "Loss": "8.01",
        "Teacher entropy": "6.60",
        "RankMe": "35.0",
        "Linear probe": "0.800",
        "Images per second": "40",
    }
    assert "of 600" in html
    assert "uniform is 9.01" in html
    assert "5.0% of the time waiting" in html


def test_every_section_with_numbers_is_drawn(page):
    assert [section.name for section in SECTIONS if section.name not in page.text] == []
    charts = [image["alt"] for image in page.all("img") if image["alt"].startswith("At the last step")]
    drawn = "; ".join(charts)
    for known in ("teacher entropy [nat], entropy: 6.6", "gradient norm, dino head: 0.5", "DINO loss [nat], sum: 6", "RankMe"):
        assert known in drawn
    assert "KDE" in drawn
    assert "KoLeo" not in drawn  # it has no weight in this run


def test_the_newest_and_the_first_picture_are_shown(page):
    assert [image["alt"][-8:] for image in page.all("img") if "Principal" in image["alt"]] == ["step 600", ", step 0"]


def test_nothing_is_fetched_and_nothing_believed(page):
    assert page.all("script") == []
    addresses = [attributes[name] for _, attributes in page.tags for name in ("src", "href") if name in attributes]
    assert {address.partition(":")[0] for address in addresses if not address.startswith("#")} == {"data"}
    assert "alert(1)" in page.text
    assert "/home" not in page.text
    policy = next(meta["content"] for meta in page.all("meta") if "default-src" in meta.get("content", ""))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {address[1:] for address in addresses if address.startswith("#")} <= targets


def test_alarms_are_told_first(encoder, page):
    assert "diverging at step 431" in " ".join(page.text.split())
    again = replace(read_run(encoder), alarms=(), steps=(), times=(), looks=())
    assert "No alarm was raised." in render_pretrain_page(again, "run")


def test_settings_are_those_of_the_card(encoder, page):
    run = read_run(encoder)
    assert run.settings is not None
    assert (run.settings.preset, run.settings.crops.global_px, run.settings.koleo_weight) == ("dinov2", 96, 0.1)
    assert len([row for row in page.all("tr") if row.get("class") == "changed"]) == 3


def test_curves_that_lie_on_each_other_are_both_seen_below_the_edge():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    panel = Panel("norm", "looks", {"a": "class token", "b": "patches"}, axis="zero")
    _draw(axes, panel, {"class token": [(0, 13.9), (9, 13.9)], "patches": [(0, 13.9), (9, 13.9)]}, {})
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 1.05 * 13.9
    assert [line.get_linestyle() for line in axes.lines] == ["-", "--"]


def test_clipped_steps_are_counted(encoder):
    clipped = [value for _, value in read_run(encoder).points("steps", "clipped_backbone")]
    assert sum(clipped) / len(clipped) == 0.25


def test_the_same_run_gives_the_same_bytes(encoder, html):
    assert render_pretrain_page(read_run(encoder), encoder.name) == html


def test_a_run_that_has_only_begun(tmp_path):
    _write(tmp_path / "metrics.csv", [{"step": 0, "loss": 14.0}])
    page = _Reader(render_pretrain_page(read_run(tmp_path), "run"))
    assert "No alarm was raised." in page.text
    assert "Settings" not in page.text


@pytest.mark.parametrize("card", [{}, {"preset": "gone"}, {"preset": "dinov2", "differs": {"no.such": 1}}])
def test_a_card_of_another_version_leaves_the_settings_out(tmp_path, card):
    _write(tmp_path / "metrics.csv", [_step(0)])
    (tmp_path / "untrained").mkdir()
    (tmp_path / "untrained" / "card.json").write_text(json.dumps(card))
    assert read_run(tmp_path).settings is None


def test_a_distillation_has_its_own_curves(tmp_path):
    rows = [
        {"step": step, "loss": 1.0, "cls": 0.6, "patches": 0.4, "grad_norm_backbone": 1.0, "lr": 1e-3} for step in range(30)
    ]
    _write(tmp_path / "metrics.csv", rows)
    page = _Reader(render_pretrain_page(read_run(tmp_path), "run"))
    assert any("distillation, tile: 0.6" in image["alt"] for image in page.all("img"))
    assert "Targets" not in page.text


def test_where_nothing_has_run_there_is_no_page(tmp_path):
    with pytest.raises(StoreError, match="no pretraining has run here"):
        write_pretrain_page(tmp_path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
