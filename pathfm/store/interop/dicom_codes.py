"""Codes, UIDs and texts of pathfm's DICOM objects: public codes where there are some, else the private scheme ``99PATHFM``."""

from __future__ import annotations

import hashlib
import re
import unicodedata
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from highdicom import AlgorithmIdentificationSequence
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from highdicom.sr import CodedConcept
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.valuerep import DA, DT, TM

from pathfm.errors import SlideError
from pathfm.store.interop.dicom_results import DicomResult

SCHEME = "99PATHFM"
UIDS = uuid.UUID("5c0f29c3-3fd7-5d0c-9f0d-7f2c54f0b6a1")
"""Namespace of the UIDs; changing it gives every object another one."""
MAKER = "pathfm"
LONG_STRING, HASH_LENGTH = 64, 8
"""Most characters of a DICOM LO, and hexadecimal digits that tell names apart in private codes."""


def uid(*parts: str) -> str:
    """A UID that depends on the parts alone: ``2.25.`` and the number of a name-based UUID (RFC 4122, version 5)."""
    return f"2.25.{uuid.uuid5(UIDS, '/'.join(parts)).int}"


def private(value: str, meaning: str) -> CodedConcept:
    """A code of pathfm's own scheme."""
    return CodedConcept(value, SCHEME, text(meaning))


def named(prefix: str, name: str, meaning: str = "") -> CodedConcept:
    """A private code that stands for a name (of a class, task or reason) and is the same wherever the name is."""
    return private(f"{prefix}-{hashlib.sha256(name.encode()).hexdigest()[:HASH_LENGTH].upper()}", meaning or name)


def text(value: str) -> str:
    """What fits a DICOM LO: 64 characters without backslashes and control characters; ``-`` where nothing is left."""
    return re.sub(r"\s+", " ", plain(value)).strip()[:LONG_STRING].strip() or "-"


def plain(value: str) -> str:
    """Text without backslashes, which separate values in DICOM, and control characters."""
    return "".join(letter if unicodedata.category(letter)[0] != "C" else " " for letter in value.replace("\\", "/"))


def identifier(value: str, what: str) -> str:
    """An id as it is.

    Raises:
        SlideError: DICOM cannot hold it, and a shortened id would be somebody else's.
    """
    if value and text(value) != value:
        raise SlideError(f"{what} is no DICOM id", fix="at most 64 characters, no backslash, no spaces at the ends")
    return value


def equipment(result: DicomResult) -> dict[str, Any]:
    """What says in every object which software made it."""
    return {
        "manufacturer": MAKER,
        "manufacturer_model_name": text(result.model),
        "software_versions": text(result.version),
        "device_serial_number": text(result.bundle),
    }


def algorithm(result: DicomResult) -> AlgorithmIdentificationSequence:
    """The classifier, for images."""
    family = codes.DCM.ArtificialIntelligence
    return AlgorithmIdentificationSequence(
        text(result.model), family, text(result.version), source=MAKER, parameters={"bundle": result.bundle}
    )


def scheme() -> CodingSchemeIdentificationItem:
    """What the private scheme is, for the objects that use it."""
    return CodingSchemeIdentificationItem(SCHEME, name="pathfm private codes", responsible_organization=MAKER)


def settle(dataset: Dataset, result: DicomResult, series: str) -> None:
    """Replaces every clock reading and every random UID that the library has put into an object, and names its series."""
    stamp(dataset, result.time)
    dataset.SeriesDescription = text(f"pathfm {series}")
    for item in dataset.get("ContributingEquipmentSequence", ()):
        item.ContributionDateTime = moment(result.time)
    dimensions = uid(dataset.SOPInstanceUID, "dimensions")
    for name in ("DimensionOrganizationSequence", "DimensionIndexSequence"):
        for item in dataset.get(name, ()):
            item.DimensionOrganizationUID = dimensions


def stamp(dataset: Dataset, time: datetime, names: Iterable[str] = ("InstanceCreation", "Content")) -> None:
    """Dates and times of an object, in UTC."""
    utc = time.astimezone(UTC)
    dataset.TimezoneOffsetFromUTC = "+0000"
    for name in names:
        setattr(dataset, f"{name}Date", DA(utc.date()))
        setattr(dataset, f"{name}Time", TM(utc.time().replace(microsecond=0)))


def moment(time: datetime) -> DT:
    """A point in time, in UTC, to the second."""
    return DT(time.astimezone(UTC).strftime("%Y%m%d%H%M%S+0000"))
