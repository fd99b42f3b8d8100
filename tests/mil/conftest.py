"""A small planted study: in positive patients some tiles carry a signal that no other tile has."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pathfm.mil.stage import MilInputs
from pathfm.store.cohort import Cohort, SlideRow
from pathfm.store.feature_file import write_features
from pathfm.store.tile_store import write_tiles
from pathfm.study import Study

DIM = 8


@dataclass
class Planted:
    """Cohort and inputs on disk; ``study(**mil)`` gives settings small enough for tests."""

    base: Path
    cohort: Cohort
    inputs: MilInputs

    def study(self, **mil) -> Study:
        small = {"folds": 3, "ensemble": 1, "hidden": 16, "attention": 8, "epochs": 6, "controls": False}
        return Study.model_validate(
            {
                "cohort": {"tile_labels": str(self.base / "tile_labels.csv")},
                "mil": {**small, **mil, "numbers": {"bootstrap": 50, **mil.get("numbers", {})}},
                "report": {"heatmaps": 2, "top_tiles": 3},
                "compute": {"device": "cpu", "workers": 1, "threads": 1},
            }
        )

    def into(self, name: str) -> MilInputs:
        """The same inputs with another output folder."""
        return MilInputs(**{**vars(self.inputs), "mil_dir": self.base / name})


def grid(count):
    return np.stack([np.arange(count) % 3, np.arange(count) // 3], 1).astype(np.int64) * 16


def planted(base: Path, patients: int = 24, slides_each: int = 2, stores: bool = True, seed: int = 0) -> Planted:
    rng = np.random.default_rng(seed)
    dirs = {role: base / role for role in ("main", "untrained", "colour")}
    rows, labels = [], ["tile,tile_label"]
    for patient in range(patients):
        positive = patient % 2 == 1
        for number in range(slides_each):
            slide_id, count = f"s{patient:03d}-{number}", int(rng.integers(5, 9))
            names = [f"{slide_id}_{tile}.png" for tile in range(count)]
            lesion = np.zeros(count, dtype=bool)
            lesion[rng.integers(count)] = positive
            feature = rng.normal(size=(count, DIM)) + 4.0 * lesion[:, None] * (np.arange(DIM) < 2)
            values = {"main": feature, "untrained": rng.normal(size=(count, DIM)), "colour": rng.random((count, 6))}
            for role, value in values.items():
                attrs = {"fingerprint": "f", "recipe_encoder": role, "recipe_weights_sha256": role}
                write_features(dirs[role] / f"{slide_id}.h5", value.astype(np.float16), grid(count), attrs)
            if stores:
                pixels = rng.integers(0, 255, (count, 16, 16, 3), dtype=np.uint8)
                write_tiles(
                    base / "tiles" / f"{slide_id}.zarr", pixels, slide_id=slide_id, xy_level0=grid(count), source_names=names
                )
            labels += [f"{name[:-4]},{int(value)}" for name, value in zip(names, lesion, strict=True)]
            label = {"label": "tumour" if positive else "normal"}
            rows.append(SlideRow(slide_id, base / slide_id, len(rows) + 2, patient_id=f"p{patient:03d}", labels=label))
    (base / "tile_labels.csv").write_text("\n".join(labels) + "\n")
    inputs = MilInputs(dirs, base / "tiles", base / "mil", {}, "pretrained encoder", "features")
    return Planted(base, Cohort(tuple(rows), ("label",)), inputs)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Planted:
    """24 patients with two slides each, tile stores and tile labels; read-only for tests."""
    return planted(tmp_path_factory.mktemp("planted"))
