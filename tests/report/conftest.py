"""A small study, fabricated on disk as the other stages would leave it; nothing is trained."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from pathfm.report.stage import ReportInputs
from pathfm.store.cohort import Cohort, SlideRow
from pathfm.store.record import Outcome, StageReport
from pathfm.store.tile_store import write_tiles
from pathfm.study import Study

SLIDES = ("n1", "n2 <script>alert(1)", "n3", "p1", "p2 \"&'", "p3", "broken", "blank", "unlabelled")
USED = SLIDES[:6]
MODELS = ("our encoder", "colour histogram", "tile count", "untrained encoder", "shuffled labels")

MakeInputs = Callable[..., ReportInputs]


def write_csv(path: Path, header: str, rows: list[tuple[object, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([header.split(","), *rows])


def interval(value: float, low: float, high: float, **more: object) -> dict[str, object]:
    return {"value": value, "low": low, "high": high, "method": "DeLong", **more}


def metrics() -> dict[str, object]:
    values = (0.91, 0.78, 0.55, 0.7, 0.48)
    models: dict[str, dict[str, object]] = {
        name: {
            "auroc": interval(value, value - 0.1, min(1.0, value + 0.08)),
            "balanced_accuracy": interval(value - 0.05, value - 0.14, value + 0.05),
            "localisation_auroc": None,
        }
        for name, value in zip(MODELS, values, strict=True)
    }
    models[MODELS[0]]["localisation_auroc"] = {"value": 0.88, "low": 0.8, "high": 0.94, "n_slides": 3}
    return {
        "label": "diagnosis",
        "classes": ["negative", "positive"],
        "positive": "positive",
        "level": "patient",
        "n_slides": 6,
        "n_patients": 6,
        "models": models,
        "primary": MODELS[0],
        "flow": {"cohort": 9, "no file": 0, "failed": 1, "empty": 1, "no label": 1, "used": 6},
        "notes": ["transductive: the encoder saw the tiles of all patients, never their labels"],
    }


def write_mil(folder: Path) -> None:
    (folder / "heatmaps").mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics()), encoding="utf-8")
    predictions = [(f"P{index}", "positive" if index > 2 else "negative", 0.2 + 0.1 * index) for index in range(6)]
    write_csv(
        folder / "predictions.csv",
        "patient_id,label,predicted,probability_negative,probability_positive",
        [(who, label, "positive" if p >= 0.5 else "negative", 1 - p, p) for who, label, p in predictions],
    )
    write_csv(
        folder / "roc.csv",
        "model,fpr,tpr",
        [(name, x / 4, (x / 4) ** (0.2 + 0.2 * row)) for row, name in enumerate(MODELS) for x in range(5)],
    )
    write_csv(
        folder / "curves.csv",
        "model,fold,member,epoch,train_loss,validation_loss",
        [
            (MODELS[0], fold, member, epoch, 0.7 / (epoch + 1), 0.7 / (epoch + 1) + 0.05 * fold)
            for fold in range(2)
            for member in range(2)
            for epoch in range(5)
        ],
    )
    ramp = np.tile(np.linspace(0, 255, 90, dtype=np.uint8), (60, 1))
    for slide_id in USED:
        cv2.imwrite(str(folder / "heatmaps" / f"{slide_id}.png"), cv2.applyColorMap(ramp, cv2.COLORMAP_VIRIDIS))
    (folder / "top_tiles.json").write_text(json.dumps({slide_id: [3, 1, 0] for slide_id in USED}), encoding="utf-8")


def cohort(home: Path) -> Cohort:
    def label(slide_id: str) -> str:
        return {"n": "negative", "p": "positive"}.get(slide_id[0], "positive") if slide_id != "unlabelled" else ""

    rows = [
        SlideRow(
            slide_id, home / "my slides" / f"{slide_id}.svs", index + 2, f"P{index}", labels={"diagnosis": label(slide_id)}
        )
        for index, slide_id in enumerate(SLIDES)
    ]
    return Cohort(tuple(rows), ("diagnosis",))


def records(home: Path) -> dict[str, StageReport]:
    where = home / "my slides" / "broken.svs"
    bad = {"broken": ("failed", f"{where}: cannot be decoded <b>"), "blank": ("empty", "no tissue was found")}
    tile = [Outcome(slide_id, *bad.get(slide_id, ("done", ""))) for slide_id in SLIDES]
    extract = [outcome for outcome in tile if outcome.status == "done"]
    mil = [replace(row, status="empty", reason="no label") if row.slide_id == "unlabelled" else row for row in extract]
    return {stage: StageReport(stage, tuple(rows)) for stage, rows in (("tile", tile), ("extract", extract), ("mil", mil))}


@pytest.fixture
def study() -> Study:
    return Study.model_validate({"name": "Trial <i>one</i>", "mil": {"label": "diagnosis"}, "report": {"heatmaps": 4}})


@pytest.fixture
def make_inputs(tmp_path: Path) -> MakeInputs:
    def make(
        home: Path = tmp_path / "here", *, mil: bool = True, pretrained: bool = True, synthetic: bool = False
    ) -> ReportInputs:
        out = home / "out"
        for folder in ("mil", "encoder", "tiles"):
            (out / folder).mkdir(parents=True)
        if mil:
            write_mil(out / "mil")
        if pretrained:
            steps = [(step, 5 - step / 100, 3 - step / 200, 1e-3) for step in range(0, 200, 10)]
            write_csv(out / "encoder" / "metrics.csv", "step,loss,ibot,lr", steps)
        corners = np.array([[0, 0], [16, 0], [0, 16], [16, 16]])
        for row, slide_id in enumerate(USED):
            images = np.random.default_rng(row).integers(0, 255, (4, 16, 16, 3), dtype=np.uint8)
            xy_level0 = None if synthetic else corners
            write_tiles(out / "tiles" / f"{slide_id}.zarr", images, slide_id=slide_id, xy_level0=xy_level0)
        return ReportInputs(
            out=out,
            report_dir=out / "report",
            mil_dir=out / "mil",
            encoder_dir=out / "encoder",
            stores_dir=out / "tiles",
            features_dir=out / "features",
            records=records(home),
            fingerprint="f" * 64,
            cohort=cohort(home),
        )

    return make
