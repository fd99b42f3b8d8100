"""Patients' names, dates and label pictures: they stand in slides in many places, and in nothing that comes out."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image, PngImagePlugin

from pathfm.errors import UnreadableSlideError
from pathfm.geometry import Size
from pathfm.slides import openslide_reader
from pathfm.slides.reader import open_slide, slide_identity
from pathfm.slides.source import LocalSource
from pathfm.slides.synthetic import SyntheticSpec, draw_slide
from pathfm.slides.synthetic_tiff import PATIENT, TiffOptions, write_pyramid
from pathfm.store.cohort import SlideRow
from pathfm.store.commit import content_digest
from pathfm.study import TileSettings
from pathfm.tile.slide import tile_slide
from pathfm.tile.task import TileTask
from tests.flows.conftest import run
from tests.slides.crosses import pyramid

NAMES = (PATIENT, "DOE JANE", "JANE DOE", "DOE^JANE", "1948-02-29", "19480229", "1948:02:29")
"""Texts that must not come out, in any case or order of bytes that is in use."""
YELLOW = (250, 235, 20)
"""Colour of the drawn label and macro pictures, which no tissue has."""
WAYS = {
    "passed through": ["--mpp=native", "--tile-px=128"],
    "jpeg": ["--mpp=0.5,1.0", "--tile-px=100", "--set=tile.codec=jpeg", "--set=tile.edge=pad"],
    "zstd": ["--mpp=0.6", "--tile-px=64", "--set=tile.codec=zstd", "--set=tile.colour.normalise=macenko"],
    "none": ["--mpp=native", "--tile-px=200", "--set=tile.codec=none"],
    "openslide": ["--mpp=0.5", "--tile-px=64", "--set=tile.reader=openslide"],
}
NO_FILTERS = ["--set=tile.tissue.method=off", "--set=tile.filters.max_white=1", "--set=tile.filters.max_pen=1"]


def assert_no_names(data: bytes, where: object) -> None:
    upper = data.upper()
    for name in NAMES:
        for spelling in (name.encode(), name.encode("utf-16-le")):
            assert spelling not in upper, (name, where)


def assert_no_label(picture: np.ndarray, where: object) -> None:
    apart = np.abs(picture[..., :3].astype(np.int16) - YELLOW).max(axis=-1)
    assert apart.min(initial=255) > 24, where


def check_output(folder: Path, said: str) -> int:
    """Looks into every file of an output folder, and into what is compressed there. Returns the number of pictures."""
    assert_no_names(said.encode(), "said")
    pictures = 0
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert_no_names(path.name.encode() + path.read_bytes(), path)
        if path.suffix in {".png", ".jpg", ".jpeg"}:
            with Image.open(path) as image:
                assert not image.getexif()
                assert not {"comment", "icc_profile", "exif"} & image.info.keys()
                assert_no_label(np.asarray(image.convert("RGB")), path)
                pictures += 1
    for path in folder.rglob("*.zarr"):
        for name, array in zarr.open_group(path, mode="r").arrays():
            values = np.asarray(array[...])
            assert_no_names(values.tobytes(), (path, name))
            if values.ndim >= 3:
                assert_no_label(values, (path, name))
                pictures += len(values)
    return pictures


@pytest.fixture(scope="module")
def tissue():
    return draw_slide(SyntheticSpec(size_px=Size(900, 700), seed=3))[0]


@pytest.fixture(scope="module")
def aperio(tmp_path_factory, tissue):
    """A slide as Aperio writes it, with a name in its descriptions, on its label and macro, and in every JPEG stream."""
    path = tmp_path_factory.mktemp("aperio") / "slide.svs"
    options = TiffOptions("aperio", Size(128, 128), shared_tables=True, comment=PATIENT, icc=b"profile of " + PATIENT.encode())
    write_pyramid(path, pyramid(tissue, (1, 4)), options)
    return path


def test_the_slide_of_these_tests_is_full_of_names_and_yellow(aperio):
    assert aperio.read_bytes().count(PATIENT.encode()) > 50
    with tifffile.TiffFile(aperio) as tiff, pytest.raises(AssertionError):
        assert_no_label(tiff.pages[-2].asarray(), "label")
    with pytest.raises(AssertionError):
        assert_no_names(b"-" + PATIENT.encode(), "")


@pytest.mark.parametrize("way", ["passed through", *(pytest.param(way, marks=pytest.mark.long) for way in list(WAYS)[1:])])
def test_aperio_slides(aperio, tmp_path, way):
    code, out, err = run("--verbose", "tile", aperio, "--out", tmp_path / "out", *NO_FILTERS, *WAYS[way])
    assert code == 0, err
    assert check_output(tmp_path / "out", out + err) > 2
    (store,) = (tmp_path / "out" / "tiles").glob("*/*.zarr")
    attrs = json.loads((store / "zarr.json").read_text())["attributes"]["pathfm"]
    assert attrs["reader"] == ("openslide" if way == "openslide" else "direct")
    assert attrs["passed_through"] == (way in {"passed through", "none"} and attrs["codec"] == "jpeg")
    code, out, err = run("inspect", aperio)
    assert_no_names((out + err).encode(), "inspect")
    code, out, err = run("tile", aperio, "--out", tmp_path / "none", "--check")
    assert_no_names((out + err).encode(), "check")


@pytest.mark.long
@pytest.mark.parametrize("format", ["png", "jpeg", "webdataset", "trident", "geojson"])
def test_exports(aperio, tmp_path, format):
    assert run("tile", aperio, "--out", tmp_path / "out", *NO_FILTERS, *WAYS["passed through"])[0] == 0
    code, out, err = run("export", "tiles", tmp_path / "out", "--out", tmp_path / "export", "--format", format)
    assert code == 0, err
    check_output(tmp_path / "export", out + err)


def task(path: Path, folder: Path, **settings) -> TileTask:
    settings = TileSettings(**{"mpp": "native", "tile_px": 128, "tissue": {"method": "off"}, **settings})
    pictures = (folder / "overlay.png", folder / "contact.jpg")
    return TileTask(SlideRow("slide", path), settings, folder / "slide.zarr", "same", ("same", "same"), pictures)


def label_places(path: Path) -> list[tuple[int, int]]:
    """Where the pixels of thumbnail, label and macro pages lie in a file, as (start, end)."""
    with tifffile.TiffFile(path) as tiff:
        pages = [page if isinstance(page, tifffile.TiffPage) else page.aspage() for page in tiff.pages]
        strips = [page for page in pages if not page.is_tiled]
        assert len(strips) == 3
        return [
            (start, start + length)
            for page in strips
            for start, length in zip(page.dataoffsets, page.databytecounts, strict=True)
        ]


@pytest.mark.parametrize(
    "settings", [{}, {"mpp": 0.6, "tile_px": 64}, {"reader": "openslide"}], ids=["direct", "shrunk", "openslide"]
)
def test_label_pixels_and_names_change_nothing_but_the_hash_of_the_file(aperio, tmp_path, settings):
    """What goes into a store cannot depend on what may not: another label and other names, and the same store."""
    data = bytearray(aperio.read_bytes().replace(PATIENT.encode(), b"ROE RICHARD  1234-5"))
    for start, end in label_places(aperio):
        data[start:end] = np.random.default_rng(0).bytes(end - start)
    other = tmp_path / "other" / "slide.svs"
    other.parent.mkdir()
    other.write_bytes(data)
    # The profile is part of the picture, and its hash is kept.
    profile = aperio.read_bytes().index(b"profile of")
    data[profile : profile + 40] = aperio.read_bytes()[profile : profile + 40]
    other.write_bytes(data)
    for name, path in (("one", aperio), ("two", other)):
        tile_slide(task(path, tmp_path / name, **settings))
    assert content_digest(tmp_path / "one") == content_digest(tmp_path / "two")
    assert slide_identity(aperio) != slide_identity(other)


def test_label_pixels_are_never_read(aperio, tmp_path, monkeypatch):
    read: list[tuple[int, int]] = []
    plain_read, plain_open = LocalSource.read_at, LocalSource.open_file

    class Watched(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            start = self.tell()
            found = super().read(size)
            read.append((start, self.tell()))
            return found

        def readinto(self, buffer) -> int:
            start = self.tell()
            count = super().readinto(buffer)
            read.append((start, start + count))
            return count

    def watched_open(self):
        with plain_open(self) as file:
            return Watched(file.read())

    def watched_read(self, offset, length):
        read.append((offset, offset + length))
        return plain_read(self, offset, length)

    monkeypatch.setattr(LocalSource, "read_at", watched_read)
    monkeypatch.setattr(LocalSource, "open_file", watched_open)
    tile_slide(task(aperio, tmp_path))
    with open_slide(aperio) as reader:
        assert reader.name == "direct"
        reader.thumbnail(300)
    assert len(read) > 100
    for start, end in label_places(aperio):
        assert not [each for each in read if each[0] < end and start < each[1]]


def write_pictures(folder: Path, tissue: np.ndarray) -> None:
    """A JPEG with EXIF and XMP, a PNG with texts, a TIFF with tags, an OME-TIFF with people in it."""
    exif = Image.Exif()
    for tag in (0x010E, 0x013B, 0x8298, 0x9C9B):  # description, artist, copyright, title
        exif[tag] = PATIENT
    exif[0x0132] = exif[0x9003] = "1948:02:29 10:00:00"
    xmp = f"<x:xmpmeta xmlns:x='adobe:ns:meta/'>{PATIENT}</x:xmpmeta>".encode()
    Image.fromarray(tissue).save(folder / "exif.jpg", exif=exif, comment=PATIENT.encode(), xmp=xmp)
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", PATIENT)
    info.add_itxt("Title", PATIENT)
    Image.fromarray(tissue).save(folder / "texts.png", pnginfo=info, exif=exif)
    tags = {"software": PATIENT, "datetime": "1948:02:29 10:00:00", "extratags": [(315, "s", 0, PATIENT, True)]}
    qptiff = "PerkinElmer-QPI-ImageDescription"
    qptiff = f'<?xml version="1.0"?><{qptiff}><SlideID>{PATIENT}</SlideID></{qptiff}>'
    tifffile.imwrite(folder / "tags.tif", tissue, tile=(128, 128), photometric="rgb", description=qptiff, metadata=None, **tags)
    write_pyramid(folder / "people.ome.tif", [tissue], TiffOptions("ome", Size(128, 128), comment=PATIENT))
    data = (folder / "people.ome.tif").read_bytes()
    people = f'<Experimenter ID="Experimenter:0" LastName="{PATIENT}"/><Image ID="Image:0" Name="{PATIENT}">'
    with tifffile.TiffFile(folder / "people.ome.tif") as tiff:
        words = tiff.pages[0].tags["ImageDescription"]
        start, length, where = words.valueoffset, words.count, words.offset
    longer = data[start : start + length].replace(b'<Image ID="Image:0" Name="slide">', people.encode())
    # The longer text goes to the end of the file, and the tag points there.
    patched = bytearray(data + longer)
    patched[where + 4 : where + 12] = len(longer).to_bytes(4, "little") + len(data).to_bytes(4, "little")
    (folder / "people.ome.tif").write_bytes(patched)


@pytest.mark.long
def test_other_kinds_of_pictures(tissue, tmp_path):
    (tmp_path / "slides").mkdir()
    write_pictures(tmp_path / "slides", tissue)
    assert all(PATIENT.encode() in path.read_bytes() for path in (tmp_path / "slides").iterdir())
    ways = ["--mpp=native", "--tile-px=128", *NO_FILTERS]
    code, out, err = run("--verbose", "tile", tmp_path / "slides", "--out", tmp_path / "out", *ways)
    assert code == 0, err
    assert "tile: 4 done" in out
    assert check_output(tmp_path / "out", out + err) > 8


def test_reasons_of_damaged_files_quote_nobody(tissue, tmp_path):
    (tmp_path / "slides").mkdir()
    write_pictures(tmp_path / "slides", tissue)
    options = TiffOptions("aperio", Size(128, 128), comment=PATIENT)
    write_pyramid(tmp_path / "slides" / "aperio.svs", [tissue], options)
    write_pyramid(tmp_path / "slides" / "odd.svs", [tissue], replace(options, mpp=None))
    for path in (tmp_path / "slides").iterdir():
        data = path.read_bytes().replace(b"MPP = 0.25", b"MPP = DOE ").replace(b'SizeX="900"', b'SizeX="DOE"')
        path.write_bytes(data[: len(data) * 2 // 3] if path.suffix in {".png", ".jpg"} else data)
    code, out, err = run("--verbose", "tile", tmp_path / "slides", "--out", tmp_path / "out")
    assert code == 3
    assert "Traceback" not in err
    check_output(tmp_path / "out", out + err)


INCOMPLETE = {
    "DOE JANE.mrxs": b"\xff\xd8\xff\xe0",
    "DOE JANE/Slidedat.ini": (
        b"[GENERAL]\nSLIDE_VERSION = 01.02\nSLIDE_ID = AABB\nIMAGENUMBER_X = 4\nIMAGENUMBER_Y = 4\n"
        b"OBJECTIVE_MAGNIFICATION = 20\n[HIERARCHICAL]\nHIER_COUNT = 1\nNONHIER_COUNT = 0\nINDEXFILE = Index.dat\n"
        b"HIER_0_NAME = Slide zoom level\nHIER_0_COUNT = 1\nHIER_0_VAL_0_SECTION = S\nHIER_0_VAL_0 = ZoomLevel_0\n"
        b"[S]\nIMAGE_CONCAT_FACTOR = 0\nOVERLAP_X = 0\nOVERLAP_Y = 0\nMICROMETER_PER_PIXEL_X = 0.25\n"
        b"MICROMETER_PER_PIXEL_Y = 0.25\nIMAGE_FILL_COLOR_BGR = 0\nDIGITIZER_WIDTH = 256\nDIGITIZER_HEIGHT = 256\n"
        b"IMAGE_FORMAT = JPEG\n[DATAFILE]\nFILE_COUNT = 1\nFILE_0 = Data0000.dat\n"
    ),
    "DOE: (JANE) 2.mrxs": b"\xff\xd8\xff\xe0",
    "DOE: (JANE) 2/Slidedat.ini": b"[GENERAL]\nDOE JANE\n",
    "of another name.vms": (
        b"[Virtual Microscope Specimen]\nNoLayers=1\nNoJpegColumns=1\nNoJpegRows=1\n"
        b"ImageFile=DOE JANE.jpg\nMapFile=DOE JANE_map.jpg\n"
    ),
}
"""Files of slides whose other files are not there: OpenSlide says which."""
REASONS = {
    "DOE JANE.mrxs": "Couldn't open a .dat file: No such file or directory",
    "DOE: (JANE) 2.mrxs": "Can't load Slidedat.ini file: Key file contains line which is not a key-value pair",
    "of another name.vms": "Couldn't open a .jpg file: No such file or directory",
}


@pytest.fixture
def incomplete(tmp_path):
    for name, data in INCOMPLETE.items():
        (tmp_path / "slides" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "slides" / name).write_bytes(data)
    return tmp_path / "slides"


@pytest.mark.parametrize("name", REASONS)
def test_reasons_of_incomplete_slides_name_no_file(incomplete, monkeypatch, name):
    monkeypatch.chdir(incomplete)
    for path in (incomplete / name, Path(name), incomplete / ".." / "slides" / name):
        with pytest.raises(UnreadableSlideError) as failed:
            open_slide(path)
        assert failed.value.what.removesuffix(", group, or comment") == f"cannot be opened: {REASONS[name]}"


def test_openslide_is_not_quoted():
    """What it may say of other kinds, as its source has it; UIDs lead to the study of a patient."""
    words = (
        "opening /d/DOE: JANE.dcm: SOP instance UID 1.2.34.5.6 matches /d/DOE JANE 2.dcm: Value “DOE” of syntax "
        '1.2.840.10008.1.2.4.80 != 3.2 (DOE JANE) at "DOE\nJANE" of /d/DOE JANE'
    )
    said = "opening a .dcm file: SOP instance UID matches a .dcm file: Value of syntax 1.2.840.10008.1.2.4.80 != 3.2 at of"
    assert openslide_reader._reason(ValueError(words), Path("/d/DOE: JANE.dcm")) == f"{said} a file"


@pytest.mark.long
def test_pseudonyms_stand_for_names_of_files_in_reasons_and_in_the_log(aperio, incomplete, tmp_path):
    shutil.copyfile(aperio, incomplete / "DOE JANE.svs")
    (tmp_path / "key").write_bytes(bytes(range(32)))
    (tmp_path / "key").chmod(0o600)
    hidden = [f"--set=cohort.pseudonym_key={tmp_path / 'key'}", "--set=compute.cache_gb=1e-6"]
    cache = f"--cache-dir={tmp_path / 'cache'}"
    code, out, err = run("--verbose", "tile", incomplete, "--out", tmp_path / "out", "--mpp=1", *hidden, cache)
    assert code == 3
    assert all(reason in err for reason in REASONS.values()), err
    assert "read where it is: larger than compute.cache_gb" in err
    check_output(tmp_path / "out", (out + err).replace(str(tmp_path), ""))


@pytest.mark.long
def test_patient_tags_and_label_files_of_dicom(shared_data, tmp_path):
    pydicom = pytest.importorskip("pydicom", reason="pip install 'pathfm[dicom]'")
    (tmp_path / "slides" / "series").mkdir(parents=True)
    data = pydicom.dcmread(shared_data / "formats" / "dicom" / "sm_image" / "sm_image.dcm")
    data.PatientName = data.ReferringPhysicianName = data.OperatorsName = "DOE^JANE"
    data.PatientID = data.AccessionNumber = data.StudyID = data.ContainerIdentifier = "DOE JANE"
    data.PatientBirthDate = data.StudyDate = data.ContentDate = "19480229"
    data.InstitutionName = data.StudyDescription = data.ImageComments = data.DeviceSerialNumber = "DOE JANE"
    data.add_new(0x00091010, "LO", PATIENT)
    data.save_as(tmp_path / "slides" / "series" / "volume.dcm")
    label = pydicom.dcmread(tmp_path / "slides" / "series" / "volume.dcm")
    label.ImageType = ["ORIGINAL", "PRIMARY", "LABEL", "NONE"]
    label.SOPInstanceUID = label.file_meta.MediaStorageSOPInstanceUID = label.SOPInstanceUID[:-2] + "77"
    label.PixelData = bytes(YELLOW) * (len(label.PixelData) // 3)
    label.save_as(tmp_path / "slides" / "series" / "label.dcm")
    options = ["--mpp=native", "--tile-px=16", *NO_FILTERS]
    code, out, err = run("--verbose", "tile", tmp_path / "slides", "--out", tmp_path / "out", *options)
    assert code == 0, err
    assert "tile: 1 done" in out, out + err
    assert check_output(tmp_path / "out", out + err) > 8
