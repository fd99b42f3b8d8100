"""A folder of pre-cut tiles as one slide."""

import numpy as np
import pytest
from PIL import Image

from pathfm.errors import UnreadableSlideError
from pathfm.slides.tile_folder import TileFolder


def write(path, value, size=(8, 8)):
    Image.fromarray(np.full((size[1], size[0], 3), value, dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    for name, value, size in (("t10.png", 10, (8, 8)), ("t2.png", 2, (8, 8)), ("t1.png", 1, (9, 7)), ("T3.tif", 3, (8, 8))):
        write(tmp_path / name, value, size)
    (tmp_path / "notes.txt").write_text("no tile")
    (tmp_path / "._t2.png").write_bytes(b"resource fork")
    return tmp_path


def test_natural_order_and_pixels(folder):
    tiles = TileFolder(folder)
    assert tiles.names == ("t1.png", "t2.png", "T3.tif", "t10.png")
    assert len(tiles) == 4
    assert [int(pixels[0, 0, 0]) for _, pixels in tiles] == [1, 2, 3, 10]
    assert tiles.sizes()["t1.png"] == (9, 7)


def test_an_unreadable_tile_is_named_and_the_others_still_come(folder):
    (folder / "t5.png").write_bytes(b"no picture")
    (folder / "t6.png").write_bytes(b"")
    tiles = TileFolder(folder)
    with pytest.raises(UnreadableSlideError, match=r"t5\.png"):
        tiles.read("t5.png")
    outcomes = dict(tiles)
    assert [name for name, outcome in outcomes.items() if isinstance(outcome, UnreadableSlideError)] == ["t5.png", "t6.png"]
    assert set(tiles.sizes()) == set(tiles.names) - {"t5.png", "t6.png"}


def test_folders_without_tiles(tmp_path):
    with pytest.raises(UnreadableSlideError, match="no tile pictures"):
        TileFolder(tmp_path)
    with pytest.raises(UnreadableSlideError, match="no such folder"):
        TileFolder(tmp_path / "absent")
