"""DICOM objects of a prediction, read back: numbers, places on the glass, codes, and what is not in them."""

from __future__ import annotations

import datetime
import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pathfm.errors import MissingExtraError, MissingMppError, SlideError
from pathfm.geometry import Mpp, Size
from pathfm.store.interop.dicom_results import DicomResult, TaskResult, TileMap, write_dicom

pydicom = pytest.importorskip("pydicom", reason="pip install 'pathfm[dicom]'")
highdicom = pytest.importorskip("highdicom", reason="pip install 'pathfm[dicom]'")

MPP = Mpp(0.25, 0.5)
SIDE = (400.0, 200.0)
"""Tiles of 100 um."""
COLUMNS, ROWS = 7, 5
PLANTED = (4, 2)
"""Column and row of the tile that everything is about."""
TIME = datetime.datetime(2026, 1, 2, 4, 4, 5, 6, tzinfo=datetime.timezone(datetime.timedelta(hours=1)))
TASK = TaskResult(
    "label",
    {"normal": 0.125, "tumour": 0.875},
    calibrated={"normal": 1 / 3, "tumour": 2 / 3},
    decision="tumour",
    conformal_set=("tumour", "normal"),
    doubts=("close to the \\ threshold",),
)


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    """Values that DICOM does not allow are errors, written or read."""
    monkeypatch.setattr(pydicom.config.settings, "writing_validation_mode", pydicom.config.RAISE)
    monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.RAISE)


def tiles_of(columns=COLUMNS, rows=ROWS, names=("",), kind="attention", **changed):
    value_Chw = np.full((len(names), rows, columns), np.nan)
    value_Chw[:, 1:, 1:] = np.random.default_rng(0).random((len(names), rows - 1, columns - 1)) / 100
    marked_hw = np.zeros((rows, columns), dtype=bool)
    if columns > PLANTED[0]:
        value_Chw[0, PLANTED[1], PLANTED[0]] = 0.5
        marked_hw[PLANTED[1], PLANTED[0]] = True
    return replace(TileMap((0.0, 0.0), SIDE, value_Chw, names, kind, marked_hw, "Highest tenth of attention"), **changed)


def result_of(**changed):
    tiles = changed.pop("tiles", None) or tiles_of()
    rows, columns = tiles.marked_hw.shape
    size = Size(int(columns * SIDE[0]), int(rows * SIDE[1]))
    thumbnail = np.full((rows * 20, columns * 20, 3), 230, dtype=np.uint8)
    known = DicomResult("slide-1", "ab" * 32, size, MPP, 24, tiles, (TASK,), "cd" * 32, "abmil on vit", "0.1.0", TIME, "P-1")
    return replace(known, **{"thumbnail": thumbnail, "qc": ("blurred", "few tiles"), **changed})


def written(folder, result):
    return {path.name: pydicom.dcmread(path) for path in write_dicom(folder / "dicom", result)}


def corner_mm(dataset, column, row):
    """Where the upper left corner of a pixel lies on the glass, by the attributes of the image alone."""
    place = dataset.TotalPixelMatrixOriginSequence[0]
    origin = [float(place.get(f"{axis}OffsetInSlideCoordinateSystem", 0)) for axis in "XYZ"]
    direction = np.array(dataset.ImageOrientationSlide, dtype=float).reshape(2, 3)
    rows_mm, columns_mm = map(float, dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing)
    return origin + direction[0] * column * columns_mm + direction[1] * row * rows_mm


def matrix(path, **kwargs):
    image = highdicom.imread(path)
    return image.get_total_pixel_matrix(**kwargs)


def test_scores_are_those_given_at_their_place_on_the_glass(tmp_path):
    result = result_of()
    files = written(tmp_path, result)
    assert sorted(files) == ["map-1.dcm", "report.dcm", "segmentation.dcm", "slide.dcm"]
    found = files["map-1.dcm"]
    pixels = matrix(tmp_path / "dicom" / "map-1.dcm", apply_real_world_transform=True)
    assert pixels.shape == (ROWS, COLUMNS) and found.ContentQualification == "RESEARCH"
    assert np.array_equal(pixels, np.nan_to_num(result.tiles.value_Chw[0]).astype(np.float32))
    column, row = np.argwhere(pixels == pixels.max())[0][::-1]
    slide = files["slide.dcm"]
    # Four tiles of 100 um right of and two below the corner of the slide, which is 20 px a tile in the picture of it.
    expected = corner_mm(slide, 0, 0) + np.array([-0.2, -0.4, 0])
    assert np.allclose(corner_mm(found, column, row), expected, atol=1e-9)
    assert np.allclose(corner_mm(slide, 20 * PLANTED[0], 20 * PLANTED[1]), expected, atol=1e-9)
    assert np.allclose(corner_mm(files["segmentation.dcm"], *PLANTED), expected, atol=1e-9)
    assert found.FrameOfReferenceUID == slide.FrameOfReferenceUID and found.StudyInstanceUID == slide.StudyInstanceUID
    assert found.SourceImageSequence[0].ReferencedSOPInstanceUID == slide.SOPInstanceUID


def test_a_grid_that_starts_elsewhere_moves_the_map(tmp_path):
    files = written(tmp_path, result_of(tiles=tiles_of(origin_level0=(40.0, 10.0))))
    moved = corner_mm(files["map-1.dcm"], 0, 0) - corner_mm(files["slide.dcm"], 0, 0)
    assert np.allclose(moved, [-0.005, -0.01, 0], atol=1e-9)


def test_segments_are_the_analysed_tiles_and_the_marked_ones(tmp_path):
    result = result_of()
    written(tmp_path, result)
    found = highdicom.seg.segread(tmp_path / "dicom" / "segmentation.dcm")
    pixels = found.get_total_pixel_matrix()
    assert np.array_equal(pixels[..., 0], result.tiles.analysed_hw) and np.array_equal(pixels[..., 1], result.tiles.marked_hw)
    first, second = found.get_segment_description(1), found.get_segment_description(2)
    assert first.segmented_property_category.value == "85756007" and second.segment_label == "Highest tenth of attention"
    assert first.algorithm_identification.version == "0.1.0" and first.algorithm_identification.name == "abmil on vit"
    assert first.algorithm_identification.parameters == {"bundle": "cd" * 32}


def test_several_maps_and_signs(tmp_path):
    names = ("normal", "a class whose name is longer than labels may be")
    result = result_of(tiles=tiles_of(names=names, kind="gradient x input"))
    result.tiles.value_Chw[1] *= -1
    files = written(tmp_path, result)
    for index, value_hw in enumerate(result.tiles.value_Chw, 1):
        assert np.array_equal(matrix(tmp_path / "dicom" / f"map-{index}.dcm"), np.nan_to_num(value_hw).astype(np.float32))
    one, two = files["map-1.dcm"], files["map-2.dcm"]
    assert one.SeriesInstanceUID == two.SeriesInstanceUID and one.SOPInstanceUID != two.SOPInstanceUID
    window = two.SharedFunctionalGroupsSequence[0].FrameVOILUTSequence[0]
    assert float(window.WindowCenter) == 0 and window.VOILUTFunction == "LINEAR_EXACT"
    assert two.ContentDescription == f"Gradient x input {names[1]}"[:64] and two.ContentLabel == "GRADIENT_X_INPUT"


def group_of(folder):
    report = highdicom.sr.srread(folder / "dicom" / "report.dcm")
    return report, report.content.get_image_measurement_groups()


def told(group):
    numbers = {each.name.meaning: each.value for each in group.get_measurements()}
    return numbers, [(each.name.meaning, each.value.meaning) for each in group.get_qualitative_evaluations()]


def test_the_report_tells_numbers_decision_algorithm_and_doubts(tmp_path):
    further = TaskResult("survival", {"risk": 1.5}, has_classes=False)
    files = written(tmp_path, result_of(tasks=(TASK, further)))
    report, (group, second) = group_of(tmp_path)
    numbers, said = told(group)
    assert numbers == {
        "Probability of normal": 0.125,
        "Probability of tumour": 0.875,
        "Calibrated probability of normal": pytest.approx(1 / 3, abs=1e-12),
        "Calibrated probability of tumour": pytest.approx(2 / 3, abs=1e-12),
        "Number of analysed tiles": 24,
    }
    assert {each.unit.value for each in group.get_measurements()} == {"1"}
    not_ruled_out = "Class that is not ruled out"
    assert said == [("Decision", "tumour"), (not_ruled_out, "tumour"), (not_ruled_out, "normal")]
    assert told(second) == ({"Predicted risk": 1.5}, []) and second.finding_type.meaning == "survival"
    assert group.tracking_identifier == "slide-1: label" and group.finding_type.scheme_designator == "99PATHFM"
    texts = {item.ConceptNameCodeSequence[0].CodeMeaning: item.get("TextValue") for item in group[0].ContentSequence}
    assert texts["Comment"] == "close to the / threshold" and texts["Flag of quality control"] == "few tiles"
    assert (texts["Algorithm Name"], texts["Algorithm Version"]) == ("abmil on vit", "0.1.0")
    assert texts["Algorithm Parameters"] == "bundle=" + "cd" * 32
    (observer,) = report.content.get_observer_contexts()
    assert observer.observer_type.meaning == "Device" and observer.observer_identifying_attributes.name == "pathfm"
    assert group.source_images[0].referenced_sop_instance_uid == files["slide.dcm"].SOPInstanceUID
    others = {file.SOPInstanceUID for name, file in files.items() if name != "report.dcm"}
    assert {uids[2] for uids in report.get_evidence()} == others
    assert (report.CompletionFlag, report.VerificationFlag, report.PreliminaryFlag) == ("COMPLETE", "UNVERIFIED", "PRELIMINARY")


def test_an_abstention_is_indeterminate_and_says_why(tmp_path):
    written(tmp_path, result_of(tasks=(replace(TASK, decision="abstain:far from the training", conformal_set=()),)))
    _, (group,) = group_of(tmp_path)
    assert told(group)[1] == [("Decision", "Indeterminate"), ("Reason of abstention", "far from the training")]
    assert group.get_qualitative_evaluations()[0].value.scheme_designator == "SCT"


def test_the_same_result_gives_the_same_bytes_and_no_clock_or_chance_gets_in(tmp_path):
    one, two = ({path.name: path.read_bytes() for path in write_dicom(tmp_path / name, result_of())} for name in "ab")
    assert one == two
    for name in one:
        found = pydicom.dcmread(tmp_path / "a" / name)
        assert found.InstanceCreationTime == found.ContentTime == "030405" and found.TimezoneOffsetFromUTC == "+0000"
        dates = [str(item.value) for item in found.iterall() if item.VR in {"DA", "DT"} and item.value]
        assert dates and all(date.startswith("20260102") for date in dates)
        uids = [str(item.value) for item in found.iterall() if item.VR == "UI" and not item.keyword.endswith("ClassUID")]
        assert all(value.startswith("2.25.") for value in uids)


def test_another_prediction_has_other_uids_in_the_same_study(tmp_path):
    one, two = written(tmp_path / "a", result_of()), written(tmp_path / "b", result_of(bundle="ef" * 32))
    assert one["slide.dcm"].SOPInstanceUID == two["slide.dcm"].SOPInstanceUID
    for name in ("report.dcm", "map-1.dcm", "segmentation.dcm"):
        assert one[name].SOPInstanceUID != two[name].SOPInstanceUID
        assert one[name].StudyInstanceUID == two[name].StudyInstanceUID == one["slide.dcm"].StudyInstanceUID
    later = written(tmp_path / "c", result_of(time=TIME + datetime.timedelta(days=1)))
    assert later["report.dcm"].SOPInstanceUID == one["report.dcm"].SOPInstanceUID


def test_a_slide_of_one_tile(tmp_path):
    tiles = replace(tiles_of(2, 2), value_Chw=np.ones((1, 1, 1)), marked_hw=np.zeros((1, 1), dtype=bool))
    written(tmp_path, result_of(tiles=tiles, n_tiles=1))
    assert matrix(tmp_path / "dicom" / "map-1.dcm").tolist() == [[1.0]]
    pixels = highdicom.seg.segread(tmp_path / "dicom" / "segmentation.dcm").get_total_pixel_matrix()
    assert pixels.tolist() == [[[1, 0]]]


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"n_tiles": 0}, SlideError, "no tiles"),
        ({"tiles": tiles_of(value_Chw=np.full((1, ROWS, COLUMNS), np.nan))}, SlideError, "no tiles"),
        ({"mpp": None}, MissingMppError, "resolution"),
        ({"thumbnail": None}, SlideError, "nothing to refer to"),
        ({"patient_id": "a\\b"}, SlideError, "patient_id"),
        ({"slide_id": "s" * 65}, SlideError, "slide_id"),
        ({"sources": (Path(__file__),)}, SlideError, "no DICOM"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, changed, error, words):
    with pytest.raises(error, match=words):
        write_dicom(tmp_path / "dicom", result_of(**changed))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["measures per frame", "no measures", "origin", "letters"])
def test_an_odd_header_of_a_dicom_slide_is_the_slides_fault(tmp_path, fault):
    thumbnail = result_of()
    write_dicom(tmp_path / "dicom", thumbnail)
    slide = pydicom.dcmread(tmp_path / "dicom" / "slide.dcm")
    rows, columns = slide.TotalPixelMatrixRows, slide.TotalPixelMatrixColumns
    source = result_of(size_level0=Size(columns, rows), sources=(tmp_path / "odd.dcm",), thumbnail=None, mpp=None)
    slide.save_as(tmp_path / "odd.dcm")
    assert write_dicom(tmp_path / "sound", source)
    shared = slide.SharedFunctionalGroupsSequence[0]
    if fault == "measures per frame":
        slide.PerFrameFunctionalGroupsSequence = [pydicom.Dataset()]
        slide.PerFrameFunctionalGroupsSequence[0].PixelMeasuresSequence = shared.PixelMeasuresSequence
        del shared.PixelMeasuresSequence
    elif fault == "no measures":
        shared.PixelMeasuresSequence = []
    elif fault == "origin":
        slide.TotalPixelMatrixOriginSequence = []
    else:
        shared.PixelMeasuresSequence[0].PixelSpacing = [0.001]
    slide.save_as(tmp_path / "odd.dcm")
    with pytest.raises(SlideError, match="its DICOM header is not as the libraries expect it"):
        write_dicom(tmp_path / "none", source)
    assert not (tmp_path / "none").exists()


def test_the_install_line_where_highdicom_is_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pathfm\[dicom\]"):
        write_dicom(tmp_path / "dicom", result_of())


def test_without_a_patient_the_field_is_there_and_empty(tmp_path):
    for file in written(tmp_path, result_of(patient_id="")).values():
        assert not file.PatientID and not file.PatientName and not file.StudyDate


def openable(path):
    openslide = pytest.importorskip("openslide")
    with openslide.OpenSlide(path) as slide:
        return slide.dimensions, float(slide.properties["openslide.mpp-x"]), float(slide.properties["openslide.mpp-y"])


def test_the_picture_of_the_slide_opens_elsewhere(tmp_path):
    written(tmp_path, result_of())
    assert openable(tmp_path / "dicom" / "slide.dcm") == ((140, 100), pytest.approx(5), pytest.approx(5))


@pytest.mark.long
def test_a_dicom_slide_is_referred_to_and_nobodys_name_is_copied(tmp_path, shared_data):
    source = shared_data / "formats" / "dicom" / "sm_image" / "sm_image.dcm"
    slide = pydicom.dcmread(source)
    size = Size(slide.TotalPixelMatrixColumns, slide.TotalPixelMatrixRows)
    marked = np.zeros((5, 5), dtype=bool)
    marked[PLANTED[1], PLANTED[0]] = True
    tiles = TileMap((0.0, 0.0), (10.0, 10.0), marked[None] + 0.25, ("",), "attention", marked, "Highest tenth of attention")
    files = written(tmp_path, result_of(tiles=tiles, size_level0=size, mpp=None, sources=(source,), thumbnail=None))
    assert sorted(files) == ["map-1.dcm", "report.dcm", "segmentation.dcm"]
    for file in files.values():
        assert file.StudyInstanceUID == slide.StudyInstanceUID and file.PatientID == "P-1" and not file.PatientName
        assert "ContainerIdentifier" not in file and "SpecimenDescriptionSequence" not in file and not file.AccessionNumber
    found = files["map-1.dcm"]
    assert found.FrameOfReferenceUID == slide.FrameOfReferenceUID
    assert found.SourceImageSequence[0].ReferencedSOPInstanceUID == slide.SOPInstanceUID
    assert np.allclose(corner_mm(found, *PLANTED), corner_mm(slide, 10 * PLANTED[0], 10 * PLANTED[1]), atol=1e-6)
    texts = {str(item.value) for file in files.values() for item in file.iterall() if item.VR not in {"SQ", "UI"}}
    hidden = [slide[name].value for name in ("PatientID", "ContainerIdentifier", "DeviceSerialNumber") if slide.get(name)]
    assert hidden and not texts & {str(value) for value in hidden} and str(source) not in texts
    with pytest.raises(SlideError, match="size of the slide"):
        write_dicom(tmp_path / "other", result_of(tiles=tiles, sources=(source,)))
