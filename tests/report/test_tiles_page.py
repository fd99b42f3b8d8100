"""The index of a folder of tile stores: every slide once, nothing believed, addresses that open."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from pathfm.report.tiles_page import TilesRow, render_tiles_page, write_tiles_page

HOSTILE = ("<script>alert(1)", "a&b \"quoted\" 'x'", "100% #3 ?x=1", "é 漢 🙂", "javascript:alert(1)", "x" * 200)
COUNTS = {"grid": 2000, "kept": 360, "no tissue": 1500, "white": 30, "pen": 8, "unreadable": 2}


class _Reader(HTMLParser):
    """Rows of the table as lists of cell texts, every address, and every tag with its attributes."""

    def __init__(self, html):
        super().__init__()
        self.rows, self.addresses, self.tags, self._cell = [], [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.addresses += [value for name, value in attributes if name in {"href", "src"}]
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")
        self._cell = self._cell or tag in {"td", "th"}

    def handle_endtag(self, tag):
        self._cell = self._cell and tag not in {"td", "th"}

    def handle_data(self, data):
        if self._cell:
            self.rows[-1][-1] += f" {data}" if self.rows[-1][-1] else data


def _pictures(slide_id):
    return {"overlay": f"pictures/{slide_id}.overlay.png", "contact": f"pictures/{slide_id}.contact.jpg"}


def _rows():
    return [
        TilesRow("b", "done", counts=COUNTS, mpp=0.5, slide_mpp=(0.25, 0.25), mpp_source="aperio.MPP", reader="direct"),
        TilesRow("a", "kept", counts=COUNTS, mpp=0.5, slide_mpp=(0.25, 0.26), **_pictures("a")),
        TilesRow("z", "failed", "cannot be opened: /home/someone/z.svs"),
        TilesRow("y", "empty", "no tile was kept", {"grid": 10, "kept": 0, "no tissue": 10}),
        TilesRow("m", "done", counts=COUNTS, notes=("objective and mpp contradict each other",)),
    ]


def test_what_needs_a_look_comes_first():
    table = _Reader(render_tiles_page("slides", _rows())).rows[1:]
    assert [row[1].split()[0] for row in table] == ["z", "y", "m", "a", "b"]
    assert [row[2].split()[0] for row in table] == ["failed", "empty", "done", "done", "done"]
    assert "contradict" in table[2][10]


def test_numbers_of_a_row():
    head, *table = _Reader(render_tiles_page("slides", _rows())).rows
    row = dict(zip(head, table[4], strict=True))
    assert (row["Kept"], row["Grid"], row["No tissue"], row["Unreadable"]) == ("360", "2,000", "1,500", "2")
    assert row["Dropped"] == "38 pen 8, white 30"
    assert (row["Tile mpp"], row["Slide mpp"], row["Reader"]) == ("0.5", "0.25 aperio.MPP", "direct")
    assert dict(zip(head, table[3], strict=True))["Slide mpp"] == "0.25 x 0.26"
    assert dict(zip(head, table[0], strict=True))["Kept"] == "–"


def test_totals():
    html = render_tiles_page("slides", _rows())
    cards = dict(re.findall(r'<p class="label">([^<]+)</p><p class="value">([^<]+)</p>', html))
    assert cards == {
        "Slides": "5",
        "Kept tiles": "1,080",
        "Dropped by filters": "114",
        "Unreadable tiles": "6",
        "Failed slides": "1",
        "Empty slides": "1",
        "Flagged slides": "1",
    }


def test_a_slide_at_two_resolutions_is_one_slide():
    html = render_tiles_page("slides", [TilesRow("a", "done", mpp=mpp) for mpp in (1.0, 0.5)])
    assert '<p class="label">Slides</p><p class="value">1</p>' in html


def test_tiles_of_further_resolutions_are_no_dropped_ones():
    html = render_tiles_page("slides", [TilesRow("a", "done", counts={**COUNTS, "kept at 1 mpp": 90})])
    head, row = _Reader(html).rows
    assert dict(zip(head, row, strict=True))["Kept"] == "360 kept at 1 mpp 90"
    assert dict(zip(head, row, strict=True))["Dropped"].startswith("38 ")


def test_no_folder_of_anybody_is_shown():
    html = render_tiles_page("slides", _rows())
    assert "/home" not in html
    assert "z.svs" in html


def test_every_text_is_escaped_and_every_address_opens():
    rows = [TilesRow(name, "failed", name, mpp_source=name, notes=(name,), reader=name, **_pictures(name)) for name in HOSTILE]
    page = _Reader(render_tiles_page(HOSTILE[0], rows))
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert {name for _, attributes in page.tags for name in attributes if name.startswith("on")} == set()
    assert sorted(row[1].removesuffix(" contact sheet") for row in page.rows[1:]) == sorted(HOSTILE)
    found = set()
    for address in page.addresses:
        if address != "data:,":
            parts = urlsplit(address)
            assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == ("", "", "", "")
            found.add(unquote(parts.path))
    assert found == {path for name in HOSTILE for path in _pictures(name).values()}


def test_only_its_own_script_may_run_and_nothing_is_fetched():
    html = render_tiles_page("slides", _rows())
    script = re.search(r"<script>(.*)</script>", html, re.DOTALL)
    policy = next(
        a["content"] for tag, a in _Reader(html).tags if tag == "meta" and "content" in a and "default-src" in a["content"]
    )
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "http" not in html.replace("http-equiv", "")


def test_ten_thousand_slides_still_open():
    slide_id = "TCGA-{:05d}-01Z-00-DX1.ab12cd34-ab12-ab12-ab12-ab12cd34ef56"
    note = ("objective 20x contradicts 0.2527 um per px",)
    rows = [
        TilesRow(name, "done", "", COUNTS, 0.5, (0.2527, 0.2527), "openslide.mpp-x", note, "direct", **_pictures(name))
        for name in (slide_id.format(index) for index in range(10_000))
    ]
    html = render_tiles_page("slides", rows)
    assert len(html.encode()) < 10_000_000
    assert html.count("<img loading=") == html.count('<img loading="lazy"') == 10_000
    assert html.count("<tr class=") - len(re.findall(r"<tr class=[^>]* hidden>", html)) == 300


@pytest.mark.parametrize("rows", [[], _rows()])
def test_the_page_is_written_whole_and_does_not_depend_on_order(tmp_path, rows):
    path = write_tiles_page(tmp_path / "tiles", "slides", rows)
    assert path == tmp_path / "tiles" / "index.html"
    assert [item.name for item in path.parent.iterdir()] == ["index.html"]
    first = path.read_bytes()
    assert write_tiles_page(tmp_path / "tiles", "slides", rows[::-1]).read_bytes() == first


def test_a_rerun_that_did_nothing_gives_the_same_page():
    done = [TilesRow("a", "done", counts=COUNTS)]
    assert render_tiles_page("slides", done) == render_tiles_page("slides", [TilesRow("a", "kept", counts=COUNTS)])
