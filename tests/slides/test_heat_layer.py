"""Heat layers: one pixel per tile step, in the right place, with the right size, readable by others."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from pathfm.geometry import Mpp, Size
from pathfm.slides.heat_layer import HeatGrid, heat_grid, paint_tiles, write_heat_layer

OME = {"ome": "http://www.openmicroscopy.org/Schemas/OME/2016-06"}


def lattice(columns, rows, step, offset=(0.0, 0.0)):
    index = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2)
    return np.floor(index * step + offset + 0.5).astype(np.int64), index


@given(
    side=st.floats(100, 900),
    overlap=st.sampled_from([0.0, 0.25, 0.5]),
    offset=st.tuples(st.integers(0, 700), st.integers(0, 700)),
    holes=st.floats(0, 0.7),
    seed=st.integers(0, 99),
)
def test_every_tile_of_a_grid_has_a_pixel_of_its_own(side, overlap, offset, holes, seed):
    rng = np.random.default_rng(seed)
    step = side * (1 - overlap)
    xy, index = lattice(30, 20, step, offset)
    keep = rng.random(len(xy)) >= holes
    keep[[0, 1, 30]] = True  # neighbours, by which the step is known
    size = Size(int(30 * step + side + 800), int(20 * step + side + 800))
    grid = heat_grid(xy[keep], (side, side), size)
    assert grid.step_level0 == pytest.approx((step, step), abs=0.05)  # corners are rounded
    place = np.rint((xy[keep] - grid.origin_level0) / grid.step_level0).astype(int)
    assert (place >= 0).all() and (place < grid.size).all()
    assert (place - place[0] == index[keep] - index[keep][0]).all()
    corners = grid.origin_level0 + place * grid.step_level0
    assert np.abs(corners - xy[keep]).max() <= 1.5
    assert np.abs(grid.origin_level0).max() <= step / 2 + 1e-6 + 1


def test_large_slides_do_not_drift():
    # 682.67 px tiles: taking the smallest distance of two tiles for the step would be off by a column on the far side.
    xy, _ = lattice(400, 2, 682 + 2 / 3)
    grid = heat_grid(xy, (682 + 2 / 3,) * 2, Size(273067, 1366))
    assert grid.size == (400, 2)
    assert grid.origin_level0 == (0.0, 0.0)
    value = np.arange(len(xy), dtype=np.float64)
    np.testing.assert_allclose(paint_tiles(xy, (682 + 2 / 3,) * 2, value, grid).ravel(), value, atol=1e-6)


def test_without_overlap_a_pixel_has_the_value_of_its_tile_and_holes_none():
    xy, _ = lattice(5, 4, 224, (100, 60))
    keep = np.arange(20) % 7 != 3
    value = np.random.default_rng(0).random(20)
    grid = heat_grid(xy[keep], (224.0, 224.0), Size(1400, 1100))
    assert grid.origin_level0 == (100.0, 60.0)
    picture = paint_tiles(xy[keep], (224.0, 224.0), value[keep], grid)[:4, :5].ravel()
    np.testing.assert_allclose(picture[keep], value[keep], atol=1e-12)
    assert np.isnan(picture[~keep]).all()


def test_tiles_on_no_grid_get_pixels_of_their_side():
    xy = np.array([[0, 0], [230, 5], [471, 9]])
    grid = heat_grid(xy, (224.0, 224.0), Size(800, 300))
    assert grid == HeatGrid((0.0, 0.0), (224.0, 224.0), Size(4, 1))
    assert np.isfinite(paint_tiles(xy, (224.0, 224.0), np.arange(3.0), grid)[0, :3]).all()


def test_tiles_that_overhang_the_slide_are_in_the_layer():
    xy = np.array([[-300, 0], [0, 0], [300, 0]])
    grid = heat_grid(xy, (300.0, 300.0), Size(450, 300))
    assert grid == HeatGrid((-300.0, 0.0), (300.0, 300.0), Size(3, 1))
    assert paint_tiles(xy, (300.0, 300.0), np.arange(3.0), grid).tolist() == [[0.0, 1.0, 2.0]]


def test_no_tiles_make_an_empty_layer():
    grid = heat_grid(np.empty((0, 2), np.int64), (224.0, 224.0), Size(448, 224))
    assert np.isnan(paint_tiles(np.empty((0, 2), np.int64), (224.0, 224.0), np.empty(0), grid)).all()
    assert grid.size == (2, 1)


def slowly(xy, sides, value, grid):
    """What ``paint_tiles`` says, tile by tile and pixel by pixel."""
    seen = [[[] for _ in range(grid.size.width)] for _ in range(grid.size.height)]
    for (x, y), one in zip(xy.tolist(), value.tolist(), strict=True):
        for row, column in np.ndindex(grid.size.height, grid.size.width):
            centre = (np.array([column, row]) + 0.5) * grid.step_level0 + grid.origin_level0
            if np.isfinite(one) and x <= centre[0] < x + sides[0] and y <= centre[1] < y + sides[1]:
                seen[row][column].append(one)
    return np.array([[np.mean(cell) if cell else np.nan for cell in row] for row in seen])


@given(seed=st.integers(0, 999))
def test_overlapping_tiles_are_averaged_over_the_centres_of_pixels(seed):
    rng = np.random.default_rng(seed)
    sides = tuple(rng.uniform(30, 90, 2).tolist())
    xy = rng.integers(-40, 200, (8, 2))
    value = np.where(rng.random(8) < 0.2, np.nan, rng.normal(size=8))
    grid = HeatGrid((-3.3, 4.1), (17.3, 11.9), Size(12, 15))
    np.testing.assert_allclose(paint_tiles(xy, sides, value, grid), slowly(xy, sides, value, grid), atol=1e-12)


def test_a_tile_smaller_than_a_pixel_is_not_lost():
    grid = HeatGrid((0.0, 0.0), (100.0, 100.0), Size(3, 3))
    assert np.nansum(paint_tiles(np.array([[110, 210]]), (20.0, 20.0), np.array([5.0]), grid)) == 5.0


MPP = Mpp(0.25, 0.5)


def write(path, mpp: Mpp | None = MPP, channels=2):
    grid = HeatGrid((-20.0, 60.0), (224.0, 112.0), Size(6, 5))
    layer = np.random.default_rng(0).normal(size=(channels, 5, 6))
    layer[:, 0, 0] = np.nan
    write_heat_layer(path, layer, grid, mpp, ["tumour", "émigré µ"][:channels])
    return layer


def test_others_read_values_sizes_place_and_names(tmp_path):
    layer = write(tmp_path / "heat.ome.tif")
    with tifffile.TiffFile(tmp_path / "heat.ome.tif") as tiff:
        assert tiff.is_ome
        assert (tiff.series[0].axes, tiff.series[0].shape) == ("CYX", (2, 5, 6))
        assert tiff.series[0].dtype == np.float32
        np.testing.assert_array_equal(tiff.asarray(), np.nan_to_num(layer).astype(np.float32))
        tags = tiff.pages[0].tags
        assert tags["ResolutionUnit"].value == 3
        assert np.divide(*tags["XResolution"].value) == pytest.approx(1e4 / 56)
        root = ElementTree.fromstring(tiff.ome_metadata)
    pixels, plane = root.find(".//ome:Pixels", OME), root.find(".//ome:Plane", OME)
    assert float(pixels.get("PhysicalSizeX")) == 224 * 0.25  # um, the unit without a word
    assert float(pixels.get("PhysicalSizeY")) == 112 * 0.5
    assert float(plane.get("PositionX")) == pytest.approx(-20 * 0.25 / 1000)
    assert (float(plane.get("PositionY")), plane.get("PositionYUnit")) == (pytest.approx(60 * 0.5 / 1000), "mm")
    assert [channel.get("Name") for channel in root.findall(".//ome:Channel", OME)] == ["tumour", "émigré µ"]
    assert "origin_level0=-20,60 step_level0=224,112" in root.find(".//ome:Description", OME).text


def test_without_a_resolution_there_is_no_physical_size(tmp_path):
    write(tmp_path / "heat.ome.tif", mpp=None, channels=1)
    with tifffile.TiffFile(tmp_path / "heat.ome.tif") as tiff:
        assert "PhysicalSize" not in tiff.ome_metadata
        assert "Plane " not in tiff.ome_metadata
        assert tiff.asarray().shape == (5, 6)


def test_same_layer_same_bytes(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
