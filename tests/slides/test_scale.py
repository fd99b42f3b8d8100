"""Every way a file says how large its pixels are, and every way it lies."""

import math
import re

import openslide
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfm.geometry import Mpp, mpp_is_sane
from pathfm.slides.scale import KEYS, OBJECTIVES, TEXTS, find_scale, number

DICOM = "dicom.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing"
MIRAX = "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_"
APERIO_TEXT = (
    "Aperio Image Library v11.2.1\r\n46000x32914 (240x240) JPEG/RGB Q=30|AppMag = 20|User = Jane Doe|MPP = 0.4990|Left = 25"
)
CM = {"tiff.ResolutionUnit": "centimeter"}
INCH = {"tiff.ResolutionUnit": "inch"}


@pytest.mark.parametrize(
    ("facts", "mpp", "source"),
    [
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.26"}, (0.25, 0.26), "openslide.mpp-x"),
        ({"openslide.mpp-y": "0.25"}, (0.25, 0.25), "openslide.mpp-x"),
        ({"aperio.MPP": "0.2527"}, (0.2527, 0.2527), "aperio.MPP"),
        ({"aperio.MPP": "0,2527"}, (0.2527, 0.2527), "aperio.MPP"),
        ({MIRAX + "X": "0.23", MIRAX + "Y": "0.231"}, (0.23, 0.231), MIRAX + "X"),
        ({"ventana.ScanRes": "0.2325"}, (0.2325, 0.2325), "ventana.ScanRes"),
        ({"sakura.ResolutionMmPerPix": "0.00028"}, (0.28, 0.28), "sakura.ResolutionMmPerPix"),
        ({f"{DICOM}[0]": "0.0004", f"{DICOM}[1]": "0.00025"}, (0.25, 0.4), f"{DICOM}[1]"),
        (
            {"hamamatsu.PhysicalWidth": "25000", "hamamatsu.PhysicalHeight": "13000"}
            | {"openslide.level[0].width": "100", "openslide.level[0].height": "50"},
            (0.25, 0.26),
            "hamamatsu.PhysicalWidth",
        ),
        ({"philips.DICOM_PIXEL_SPACING": '"0.00026" "0.00025"'}, (0.25, 0.26), "philips.DICOM_PIXEL_SPACING"),
        (
            {"ome.PhysicalSizeX": "250", "ome.PhysicalSizeXUnit": "nm", "ome.PhysicalSizeY": "0.26"},
            (0.25, 0.26),
            "ome.PhysicalSizeX",
        ),
        (
            {"tiff.ImageDescription": '<Pixels PhysicalSizeXUnit="mm" PhysicalSizeX="0.00025" PhysicalSizeY="0.26"/>'},
            (0.25, 0.26),
            "ome.PhysicalSizeX",
        ),
        ({"openslide.comment": APERIO_TEXT, "tiff.ImageDescription": APERIO_TEXT}, (0.499, 0.499), "openslide.comment"),
        ({"tiff.ImageDescription": '{"mpp": 0.25, "who": "Jane"}'}, (0.25, 0.25), "tiff.ImageDescription"),
        ({"tiff.ImageDescription": "Microns per pixel: 0,25"}, (0.25, 0.25), "tiff.ImageDescription"),
        ({"tiff.XResolution": "40000", "tiff.YResolution": "20000", **CM}, (0.25, 0.5), "tiff.XResolution"),
        ({"tiff.XResolution": "50800", **INCH}, (0.5, 0.5), "tiff.XResolution"),
        (
            {"tiff.XResolution": "4", "tiff.ResolutionUnit": "none", "tiff.ImageDescription": "ImageJ=1.53\nunit=\\u00B5m\n"},
            (0.25, 0.25),
            "tiff.XResolution",
        ),
    ],
)
def test_every_key_is_understood_in_its_own_unit(facts, mpp, source):
    found = find_scale(facts)
    assert found.mpp == pytest.approx(Mpp(*mpp))
    assert found.source == source


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.25", 0.25),
        (" 0,25 ", 0.25),
        (".25", 0.25),
        ("2.5e-1", 0.25),
        ("0.25 µm", 0.25),
        ("0.25 μm", 0.25),
        ("0.25Âµm", 0.25),
        ("0.25 \ufffdm", 0.25),
        ("0.25 um/px", 0.25),
        ("0.25 microns", 0.25),
        ("250 nm", 0.25),
        ('"0.25"', 0.25),
        ("０．２５", 0.25),
        ("inf", math.inf),
        ("-1", -1.0),
    ],
)
def test_numbers_of_any_locale(text, value):
    assert number(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "nan", "Jane", "1,234.5", "0.25 furlongs", "0x10", "1 2", "0.25;", "--1"])
def test_what_is_not_a_number(text):
    assert math.isnan(number(text))


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        ({"tiff.XResolution": "72", **INCH}, "tiff.XResolution says 352.8, which is no microscope's but a default of 72 dpi"),
        ({"tiff.XResolution": "28.34", **CM}, "352.9, which is no microscope's but a default of 72 dpi"),
        ({"tiff.XResolution": "96", **INCH}, "264.6, which is no microscope's but a default of 96 dpi"),
        ({"tiff.XResolution": "300", **INCH}, "84.67, which is no microscope's but a default of 300 dpi"),
        ({"tiff.XResolution": "1", **CM}, "says 1e+04"),
        ({"openslide.mpp-x": "352.77777"}, "openslide.mpp-x says 352.8"),
        ({"openslide.mpp-x": "28.97"}, "openslide.mpp-x says 28.97, which is no microscope's"),
        ({"aperio.MPP": "0"}, "aperio.MPP says 0, which is no microscope's"),
        ({"aperio.MPP": "-0.25"}, "aperio.MPP says -0.25"),
        ({"aperio.MPP": "inf"}, "aperio.MPP says inf"),
        ({"aperio.MPP": "nan"}, "aperio.MPP is not a number"),
        ({"aperio.MPP": "Jane Doe"}, "aperio.MPP is not a number"),
        ({"philips.DICOM_PIXEL_SPACING": "0.00025"}, "philips.DICOM_PIXEL_SPACING is not a number"),
        ({"ome.PhysicalSizeX": "1e999"}, "ome.PhysicalSizeX says inf"),
    ],
)
def test_a_value_that_no_microscope_has_is_missing_and_the_source_says_why(facts, word):
    found = find_scale(facts)
    assert found.mpp is None
    assert word in found.source


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"tiff.ResolutionUnit": "inch"},
        {"tiff.XResolution": "0", **INCH},
        {"tiff.XResolution": "1", "tiff.YResolution": "1", "tiff.ResolutionUnit": "none"},
        {"ome.PhysicalSizeX": "1", "ome.PhysicalSizeXUnit": "pixel"},
        {"aperio.MPP": "  "},
        {"hamamatsu.PhysicalWidth": "25000"},
        {"openslide.comment": "Jane Doe, born 0.25"},
    ],
)
def test_nothing_said_is_nothing_found(facts):
    found = find_scale(facts)
    assert found == (None, "", (), None)


def test_a_later_key_helps_where_an_earlier_one_is_a_default():
    found = find_scale({"openslide.mpp-x": "352.78", "openslide.comment": APERIO_TEXT, "tiff.XResolution": "72", **INCH})
    assert (found.mpp, found.source) == (Mpp(0.499, 0.499), "openslide.comment")
    assert found.notes == ()


def test_pixels_that_are_not_square_stay_two_numbers():
    assert find_scale({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.252"}).notes == ()
    found = find_scale({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.3"})
    assert found.mpp == Mpp(0.25, 0.3)
    assert found.notes == ("pixels are not square: 0.25 x 0.3 mpp",)


def test_one_sane_axis_stands_for_both_and_says_so():
    found = find_scale({"openslide.mpp-x": "nan", "openslide.mpp-y": "0.25"})
    assert found.mpp == Mpp(0.25, 0.25)
    assert found.notes == ("openslide.mpp-x along x is not a number; the other axis stands for both",)


def test_keys_that_contradict_each_other_are_named_once_per_value():
    facts = {
        "openslide.mpp-x": "0.25",
        "aperio.MPP": "0.5",
        "openslide.comment": "|MPP = 0.5|",
        "tiff.ImageDescription": "MPP=0.5",
    }
    assert find_scale(facts).notes == ("openslide.mpp-x says 0.25, aperio.MPP says 0.5",)
    assert find_scale({"openslide.mpp-x": "0.25", "aperio.MPP": "0.2545"}).notes == ()


@pytest.mark.parametrize("vendor", ["trestle", "leica", "ventana"])
def test_resolution_tags_that_mean_something_else_bear_no_witness(vendor):
    facts = {"openslide.vendor": vendor, "openslide.mpp-x": "0.25", "tiff.XResolution": "10000", **CM}
    assert find_scale(facts).notes == ()
    assert find_scale({**facts, "openslide.vendor": "aperio"}).notes == ("openslide.mpp-x says 0.25, tiff.XResolution says 1",)


@pytest.mark.parametrize("key", OBJECTIVES)
def test_the_objective_is_a_second_witness(key):
    assert find_scale({"openslide.mpp-x": "0.25", key: "40"}).notes == ()
    found = find_scale({"openslide.mpp-x": "0.25", key: "20x"})
    assert found.objective == 20
    assert found.notes == ("objective 20x would mean 0.5 mpp, the file says 0.25",)
    assert find_scale({key: "20"}).notes == ("objective 20x would mean 0.5 mpp, the file gives none",)


def test_the_objective_may_stand_in_a_text():
    assert find_scale({"openslide.comment": APERIO_TEXT}).objective == 20
    assert find_scale({"tiff.ImageDescription": '<Objective NominalMagnification="40.0"/>'}).objective == 40
    assert find_scale({"aperio.AppMag": "0"}).objective is None


WORDS = st.text("abcJQ µ=.,:;|\"'<>0123456789-+eE\n", max_size=60)
FACTS = st.dictionaries(
    st.sampled_from(
        [key for keys in KEYS for key in keys[:2]]
        + [*OBJECTIVES, *TEXTS, "ome.PhysicalSizeX", "ome.PhysicalSizeXUnit", "philips.DICOM_PIXEL_SPACING"]
        + ["tiff.XResolution", "tiff.YResolution", "tiff.ResolutionUnit", "hamamatsu.PhysicalWidth", "openslide.level[0].width"]
    ),
    WORDS | st.floats(width=32).map(str) | WORDS.map(lambda words: f"{words}MPP = {words}"),
)


@given(FACTS)
def test_anything_gives_a_microscopes_scale_or_none(facts):
    found = find_scale(facts)
    assert found.mpp is None or (mpp_is_sane(found.mpp.x) and mpp_is_sane(found.mpp.y))
    assert (found.mpp is None) or found.source in {
        *facts,
        "openslide.mpp-x",
        "ome.PhysicalSizeX",
        f"{DICOM}[1]",
        MIRAX + "X",
    } | {"tiff.XResolution"}


def test_no_text_of_the_file_leaves_but_numbers():
    name = "Zebediah"
    facts = {key: f"{name} 1961" for keys in KEYS for key in keys[:2]} | dict.fromkeys(
        (*TEXTS, *OBJECTIVES), f"{name} MPP = 0.25 {name}"
    )
    facts |= {"ome.PhysicalSizeX": name, "ome.PhysicalSizeXUnit": name, "tiff.XResolution": name, "tiff.ResolutionUnit": name}
    found = find_scale({**facts, "openslide.mpp-y": "0.4", "philips.DICOM_PIXEL_SPACING": f"{name} {name}"})
    assert found.notes
    assert not re.search("Zebediah|1961", f"{found.source} {found.notes}")


@pytest.mark.parametrize(
    ("name", "mpp", "objective"),
    [
        ("slides/CMU-1-Small-Region.svs", 0.499, 20),
        ("slides/TCGA-5P-A9K0_1.svs", 0.19448, 40),
        ("slides/TCGA-CR-7395-01A-01-TS1.svs", None, None),
        ("slides/her2st_B4.svs", 0.25, 40),
        ("slides/her2st_C2.svs", 0.5, 20),
        ("formats/test3-DAPI-2-387.ndpi", 0.228175, 40),
        ("formats/boxes.tiff", None, None),
        ("formats/yb10kx5k.zstd.tiff", None, None),
        ("formats/dicom/sm_image/sm_image.dcm", 0.499, None),
        ("formats/dicom/camelyon/multiframe_camelyon_challenge_image.dcm", None, None),
    ],
)
def test_real_files(shared_data, name, mpp, objective):
    with openslide.OpenSlide(shared_data / name) as slide:
        found = find_scale(slide.properties)
    assert (found.mpp.mean if found.mpp else None) == (pytest.approx(mpp, rel=1e-4) if mpp else None)
    assert found.objective == objective
    assert found.notes == ()
