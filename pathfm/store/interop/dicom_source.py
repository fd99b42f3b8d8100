"""The image that all objects of a slide refer to: the slide itself where it is DICOM, else a small picture of it.

Only UIDs and geometry of a source are taken: its patient, its study's dates, its specimen and its barcode stay where they are.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from highdicom import PixelMeasuresSequence
from highdicom.sr import CodedConcept
from numpy.typing import NDArray
from PIL import Image, ImageCms
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.errors import InvalidDicomError
from pydicom.sr.codedict import codes
from pydicom.uid import JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage
from pydicom.valuerep import DS

from pathfm.errors import SlideError
from pathfm.geometry import Mpp
from pathfm.store.interop.dicom_codes import MAKER, identifier, moment, settle, text, uid
from pathfm.store.interop.dicom_results import DicomResult

JPEG_QUALITY = 85
UM_PER_MM = 1000
THICKNESS_MM = 0.001
"""Depth of the image, which DICOM wants to be told and nobody knows: the field's usual placeholder, one micrometre."""
ORIENTATION = (0.0, -1.0, 0.0, -1.0, 0.0, 0.0)
"""Directions of rows and columns on the glass, as scanners have it; how a slide that is not DICOM lay, nobody knows."""
PROFILE_DATE = slice(24, 36)
"""Bytes of an ICC profile that hold the time at which it was made."""
FROM_SOURCE = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "PositionReferenceIndicator",
    "Modality",
    "ImageType",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "TotalPixelMatrixRows",
    "TotalPixelMatrixColumns",
    "TotalPixelMatrixOriginSequence",
    "ImageOrientationSlide",
    "DimensionOrganizationType",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "LossyImageCompressionMethod",
)
"""All that is taken from a source. Whatever is not named stays behind."""
NEEDED = ("FrameOfReferenceUID", "TotalPixelMatrixOriginSequence", "ImageOrientationSlide", "SharedFunctionalGroupsSequence")
NOT_KNOWN = ("PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime")
"""Fields that every object must have and that stay empty."""


def open_reference(result: DicomResult) -> Dataset:
    """Level 0 among the files of a DICOM slide, without its pixels and without whom it is of.

    Raises:
        SlideError: the files are no DICOM, none has the size of the slide, or it does not say where it lies.
    """
    for header in (_header(path) for path in result.sources):
        size = (header.get("TotalPixelMatrixColumns"), header.get("TotalPixelMatrixRows"))
        if "VOLUME" in header.get("ImageType", ()) and size == tuple(result.size_level0):
            break
    else:
        raise SlideError("no level of the DICOM files has the size of the slide", fix="name the files of one slide")
    absent = [name for name in NEEDED if name not in header]
    if absent:
        raise SlideError(f"the DICOM slide does not say where it lies ({', '.join(absent)})", fix="convert it again")
    image = Dataset()
    for name in (name for name in FROM_SOURCE if name in header):
        setattr(image, name, header[name].value)
    measures = header.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    spacing = [float(value) for value in measures.PixelSpacing]
    image.SharedFunctionalGroupsSequence = [_item(PixelMeasuresSequence=PixelMeasuresSequence(spacing, THICKNESS_MM))]
    _patient(image, result)
    return image


def _header(path: Path) -> Dataset:
    try:
        return dcmread(path, stop_before_pixels=True)
    except (InvalidDicomError, OSError) as error:
        raise SlideError("a file of the slide is no DICOM") from error


def make_reference(result: DicomResult) -> Dataset:
    """The thumbnail as a one-frame VL Whole Slide Microscopy image, whose pixels lie where those of the slide do.

    Raises:
        SlideError: there is no thumbnail.
    """
    if result.thumbnail is None or result.mpp is None:
        raise SlideError("neither the slide as DICOM nor a thumbnail of it, so there is nothing to refer to")
    image = Dataset()
    image.SOPClassUID = VLWholeSlideMicroscopyImageStorage
    image.StudyInstanceUID = uid(result.identity, result.patient_id, "study")
    image.SeriesInstanceUID = uid(result.identity, result.slide_id, result.patient_id, "slide")
    image.FrameOfReferenceUID = uid(result.identity, "frame of reference")
    image.PositionReferenceIndicator = "SLIDE_CORNER"
    _patient(image, result)
    _about(image, result)
    _specimen(image, result)
    _pixels(image, result.thumbnail, result.size_level0, result.mpp)
    image.SOPInstanceUID = uid(image.SeriesInstanceUID, result.version, hashlib.sha256(image.PixelData).hexdigest())
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    settle(image, result, "thumbnail")
    image.DimensionOrganizationSequence = [_item(DimensionOrganizationUID=uid(image.SOPInstanceUID, "dimensions"))]
    return image


def _patient(image: Dataset, result: DicomResult) -> None:
    image.SpecificCharacterSet = "ISO_IR 192"
    image.PatientID = identifier(result.patient_id, "patient_id")
    for name in NOT_KNOWN:
        setattr(image, name, "")


def _about(image: Dataset, result: DicomResult) -> None:
    """Series, equipment and what else such an image must say of itself."""
    image.ReferringPhysicianName = ""
    image.Modality, image.SeriesNumber, image.InstanceNumber = "SM", 1, 1
    # The picture is the same whichever classifier is asked, so none is named.
    image.Manufacturer = image.ManufacturerModelName = image.DeviceSerialNumber = MAKER
    image.SoftwareVersions = text(result.version)
    # Type 1, and unknown: the comment says whose time it is.
    image.AcquisitionDateTime = moment(result.time)
    image.ImageComments = "Small picture of a slide that is not DICOM. Time of acquisition unknown: that of the prediction."
    image.ImageType = ["DERIVED", "PRIMARY", "VOLUME", "RESAMPLED"]
    image.VolumetricProperties, image.FocusMethod = "VOLUME", "AUTO"
    image.ExtendedDepthOfField = image.SpecimenLabelInImage = image.BurnedInAnnotation = "NO"
    image.AcquisitionContextSequence = []
    image.OpticalPathSequence = [
        _item(
            OpticalPathIdentifier="1",
            IlluminationTypeCodeSequence=[CodedConcept.from_code(codes.DCM.BrightfieldIllumination)],
            IlluminationColorCodeSequence=[CodedConcept.from_code(codes.SCT.FullSpectrum)],
            ICCProfile=_srgb(),
        )
    ]


def _specimen(image: Dataset, result: DicomResult) -> None:
    image.ContainerIdentifier = identifier(result.slide_id, "slide_id")
    image.IssuerOfTheContainerIdentifierSequence = []
    image.ContainerTypeCodeSequence = [CodedConcept.from_code(codes.SCT.MicroscopeSlide)]
    image.SpecimenDescriptionSequence = [
        _item(
            SpecimenIdentifier=text(result.slide_id),
            IssuerOfTheSpecimenIdentifierSequence=[],
            SpecimenUID=uid(result.identity, "specimen"),
            SpecimenPreparationSequence=[],
        )
    ]


def _pixels(image: Dataset, thumbnail: NDArray[np.uint8], size_level0: Sequence[int], mpp: Mpp) -> None:
    """One JPEG frame over the whole slide; its corner is where a scanner's would be, so that all coordinates are positive."""
    rows, columns = thumbnail.shape[:2]
    width_mm, height_mm = (length * each / UM_PER_MM for length, each in zip(size_level0, mpp, strict=True))
    image.SamplesPerPixel, image.PlanarConfiguration, image.PixelRepresentation = 3, 0, 0
    image.PhotometricInterpretation = "YBR_FULL_422"
    image.Rows, image.Columns, image.NumberOfFrames = rows, columns, 1
    image.BitsAllocated, image.BitsStored, image.HighBit = 8, 8, 7
    image.TotalPixelMatrixRows, image.TotalPixelMatrixColumns, image.TotalPixelMatrixFocalPlanes = rows, columns, 1
    image.NumberOfOpticalPaths, image.DimensionOrganizationType = 1, "TILED_FULL"
    image.ImageOrientationSlide = list(ORIENTATION)
    image.TotalPixelMatrixOriginSequence = [
        _item(
            XOffsetInSlideCoordinateSystem=DS(height_mm, auto_format=True),
            YOffsetInSlideCoordinateSystem=DS(width_mm, auto_format=True),
            ZOffsetInSlideCoordinateSystem=0,
        )
    ]
    image.ImagedVolumeWidth, image.ImagedVolumeHeight, image.ImagedVolumeDepth = width_mm, height_mm, THICKNESS_MM * UM_PER_MM
    image.SharedFunctionalGroupsSequence = [
        _item(
            PixelMeasuresSequence=PixelMeasuresSequence([height_mm / rows, width_mm / columns], THICKNESS_MM),
            WholeSlideMicroscopyImageFrameTypeSequence=[_item(FrameType=image.ImageType)],
            OpticalPathIdentificationSequence=[_item(OpticalPathIdentifier="1")],
        )
    ]
    stream = io.BytesIO()
    Image.fromarray(thumbnail).save(stream, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:2")
    image.PixelData = encapsulate([stream.getvalue()])
    image["PixelData"].is_undefined_length = True
    image.LossyImageCompression, image.LossyImageCompressionMethod = "01", "ISO_10918_1"
    image.LossyImageCompressionRatio = DS(thumbnail.nbytes / stream.tell(), auto_format=True)


def _srgb() -> bytes:
    """The usual colour space of pictures on screens, without the time at which the library made the profile."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[PROFILE_DATE] = bytes(PROFILE_DATE.stop - PROFILE_DATE.start)
    return bytes(profile)


def _item(**values: object) -> Dataset:
    item = Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return item
