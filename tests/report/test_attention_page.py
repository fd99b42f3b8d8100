"""Sheets and page of attention maps: colours mean what the bar says, and pages load nothing."""

from __future__ import annotations

import re

import cv2
import numpy as np
import pytest

from pathfm.report import attention_page
from pathfm.report.attention_page import TileAttention, _blended, _heat, _overlay, _scale_end, write_attention_page

SIDE = 64


def shown(heads: int, slide_id: str = "s1", sharp: float = 0.0, mpp: float | None = 0.5) -> TileAttention:
    rng = np.random.default_rng(heads)
    attention = rng.uniform(0.5, 1.5, (heads, 17)).astype(np.float32)
    attention[:, 6] += sharp
    attention /= attention.sum(axis=1, keepdims=True)
    patches = attention[:, 1:].reshape(heads, 4, 4)
    pixels = rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    return TileAttention(slide_id, 7, (1200, 3400), pixels, mpp, patches, patches.mean(axis=0), 17)


def test_a_sheet_per_tile_and_a_page_that_loads_nothing(tmp_path):
    tiles = [shown(6, "a $x$ <b>", sharp=20), shown(6, "s2", mpp=None)]
    page = write_attention_page(tmp_path, tiles, [("encoder", "timm:<x>"), ("block", "3 of 12")])
    html = page.read_text(encoding="utf-8")
    assert page == tmp_path / "index.html" and "&lt;b&gt;" in html and "<b>" not in html and "timm:&lt;x&gt;" in html
    assert not re.search(r"(src|href)=\"(?!data:|#)", html) and html.count("data:image/png;base64,") == 2
    assert "a $x$ &lt;b&gt;, tile #7 at 1,200, 3,400" in html and "Sharpest head" in html
    names = {"a $x$ <b>_1200_3400.png", "s2_1200_3400.png"}
    assert {file.name for file in tmp_path.glob("*.png")} == names
    picture = cv2.imread(str(tmp_path / "s2_1200_3400.png"))
    assert picture.shape[1] == round(attention_page.WIDTH * attention_page.DPI) and (picture != 255).mean() > 0.3


@pytest.mark.parametrize("heads", [1, 16])
def test_any_number_of_heads_has_room(tmp_path, heads):
    write_attention_page(tmp_path, [shown(heads)], [])
    picture = cv2.imread(str(tmp_path / "s1_1200_3400.png"))
    rim = np.concatenate([picture[:4].reshape(-1, 3), picture[-4:].reshape(-1, 3), picture[:, -4:].reshape(-1, 3)])
    assert (rim == 255).all()  # nothing is cut off


def test_the_same_gives_the_same_bytes(tmp_path):
    for folder in (tmp_path, tmp_path / "again"):
        write_attention_page(folder, [shown(1)], [("block", "1 of 2")])
    for name in ("s1_1200_3400.png", "index.html"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_patches_at_their_even_share_or_below_stay_grey():
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    shares = np.array([[0.0, 1.0], [2.0, 64.0]], dtype=np.float32)
    colour = _overlay(pixels, shares, 8.0).astype(int)
    spread = colour.max(axis=2) - colour.min(axis=2)
    assert spread[:16].max() == 0 and spread[16:, :16].min() > 0 and spread[16:, 16:].min() > spread[16:, :16].max()


def test_colours_grow_with_attention_and_end_at_the_end():
    assert _heat(np.array([0.0, 1.0, 2.0, 4.0, 16.0, 99.0]), 16.0).tolist() == [0.0, 0.0, 0.25, 0.5, 1.0, 1.0]
    blue = _blended(np.full(50, 225, dtype=np.uint8), np.linspace(0, 1, 50))[:, 2].astype(int)
    assert (np.diff(blue) <= 0).all() and blue[0] - blue[-1] > 50


@pytest.mark.parametrize(
    ("high", "least", "end"), [(1.06, 1.1, 1.1), (1.3, 1.1, 1.5), (1.06, 2.0, 2.0), (2.1, 2.0, 4.0), (30.0, 2.0, 32.0)]
)
def test_the_scale_ends_at_a_round_number_above_almost_all(high, least, end):
    assert _scale_end([np.full((2, 3), high, dtype=np.float32), np.ones((1, 1), dtype=np.float32)], least) == end
