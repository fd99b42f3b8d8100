"""The structured report: what was predicted, how sure that is, what decided it, and what to be careful about (TID 1500)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from highdicom.sr import (
    AlgorithmIdentification,
    CodedConcept,
    Comprehensive3DSR,
    DeviceObserverIdentifyingAttributes,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    SourceImageForMeasurementGroup,
    TextContentItem,
    TrackingIdentifier,
)
from pydicom import Dataset
from pydicom.sr.codedict import codes

from pathfm.store.interop.dicom_codes import MAKER, equipment, named, plain, private, scheme, settle, text, uid
from pathfm.store.interop.dicom_results import DicomResult, TaskResult

REPORT_SERIES = 4
ABSTAIN = "abstain:"


def report(result: DicomResult, image: Dataset, derived: Sequence[Dataset]) -> Comprehensive3DSR:
    """A complete, unverified, preliminary report: one measurement group per task.

    Args:
        result: what it says.
        image: of the slide; the source of every measurement.
        derived: images that belong to it.
    """
    observer = DeviceObserverIdentifyingAttributes(
        uid("device", result.bundle), MAKER, MAKER, text(result.model), text(result.bundle)
    )
    content = MeasurementReport(
        ObservationContext(ObserverContext(codes.DCM.Device, observer)),
        codes.SCT.LightMicroscopy,
        [_group(result, task, image, is_first=not index) for index, task in enumerate(result.tasks)],
    )
    found = Comprehensive3DSR(
        [image, *derived],
        content[0],
        uid(result.identity, result.digest, "series", str(REPORT_SERIES)),
        REPORT_SERIES,
        uid(result.identity, result.digest, "report"),
        1,
        is_complete=True,
        coding_schemes=[scheme()],
        **equipment(result),
    )
    settle(found, result, "prediction")
    return found


def _group(result: DicomResult, task: TaskResult, image: Dataset, *, is_first: bool) -> MeasurementsAndQualitativeEvaluations:
    about = TrackingIdentifier(uid(result.identity, result.digest, "task", task.name), plain(f"{result.slide_id}: {task.name}"))
    group = MeasurementsAndQualitativeEvaluations(
        about,
        finding_type=named("TASK", task.name),
        # Without its family, which readers would take for one of the evaluations.
        algorithm_id=AlgorithmIdentification(
            plain(result.model), plain(result.version), [f"bundle={result.bundle}"], manufacturer=MAKER
        ),
        measurements=[*_numbers(task), *(_counts(result) if is_first else ())],
        qualitative_evaluations=list(_evaluations(task)),
        source_images=[SourceImageForMeasurementGroup.from_source_image(image)],
    )
    flags = [(private("QC-FLAG", "Flag of quality control"), flag) for flag in result.qc if is_first]
    doubts = [(CodedConcept.from_code(codes.DCM.Comment), doubt) for doubt in task.doubts]
    for name, value in (*doubts, *flags):
        group[0].ContentSequence.append(TextContentItem(name, plain(value), "CONTAINS"))
    return group


def _numbers(task: TaskResult) -> Iterator[Measurement]:
    said: tuple[tuple[str, str, Mapping[str, float]], ...] = (
        ("P", "Probability of ", task.predicted) if task.has_classes else ("V", "Predicted ", task.predicted),
        ("CP", "Calibrated probability of ", task.calibrated),
    )
    for prefix, meaning, values in said:
        for name, value in values.items():
            yield Measurement(named(prefix, name, meaning + name), value, codes.UCUM.NoUnits)


def _counts(result: DicomResult) -> Iterator[Measurement]:
    yield Measurement(private("ANALYSED-COUNT", "Number of analysed tiles"), result.n_tiles, codes.UCUM.NoUnits)


def _evaluations(task: TaskResult) -> Iterator[QualitativeEvaluation]:
    """The decision, the reason of an abstention, and each class of the conformal set."""
    if task.decision.startswith(ABSTAIN):
        reason = task.decision.removeprefix(ABSTAIN)
        yield QualitativeEvaluation(private("DECISION", "Decision"), codes.SCT.Indeterminate)
        yield QualitativeEvaluation(private("ABSTAINS", "Reason of abstention"), named("R", reason))
    elif task.decision:
        yield QualitativeEvaluation(private("DECISION", "Decision"), named("C", task.decision))
    for name in task.conformal_set:
        yield QualitativeEvaluation(private("NOT-RULED-OUT", "Class that is not ruled out"), named("C", name))
