"""Cohort table for pretraining on four public sets, with the patients of the probes left out; and who they are.

    python pipelines/tissue/prepare.py DATA OUT [--seed 0]

DATA holds the folders hpylori, lymphoma, lc25000 and slides. Written to OUT: ``cohort.csv`` (what pretraining may see) and
``lymphoma.csv`` (what of it the study of the lymphoma fields sees), ``parts.csv`` (set, patient_id, label, part: every probe
patient, ``held-out`` or ``pretraining``), ``watched.csv`` (labelled tiles of pretraining patients, for the probes during
training) and ``lc25000/`` (its fields of 224 px resized to the 256 px of the other tiles).
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np

TILE_PX = 256
HELD_OUT = {"hpylori": 0.5, "lymphoma": 2 / 3}
"""Share of the patients of each label that pretraining never sees."""
LYMPHOMA_SITES = ("lymphoma", "her2st")
ALWAYS_PRETRAINING = {"B22-250"}
"""One patient has a fifth of all tiles; held out, every interval would be his."""

WATCHED_PER_PATIENT = 20


def main() -> None:
    """Reads the sets, splits the patients, writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    data, out = arguments.data.resolve(), arguments.out
    out.mkdir(parents=True, exist_ok=True)
    tables = {name: rows(data / name / "cohort.csv") for name in HELD_OUT}
    parts = {name: split(tables[name], name, arguments.seed) for name in HELD_OUT}
    cohort = [
        (row["slide_id"], data / name / row["path"], row["patient_id"], name)
        for name, table in tables.items()
        for row in table
        if parts[name][row["patient_id"]][1] == "pretraining"
    ]
    cohort += [(path.stem, path, f"her2st-{path.stem[7]}", "her2st") for path in sorted((data / "slides").glob("her2st_*.svs"))]
    cohort += [(folder.name, folder.resolve(), folder.name, "lc25000") for folder in resized(data / "lc25000", out / "lc25000")]
    columns = ("slide_id", "path", "patient_id", "site")
    write(out / "cohort.csv", columns, cohort)
    write(out / "lymphoma.csv", columns, [row for row in cohort if row[-1] in LYMPHOMA_SITES])
    write(
        out / "parts.csv",
        ("set", "patient_id", "label", "part"),
        [(name, patient, *of_patient) for name, patients in parts.items() for patient, of_patient in sorted(patients.items())],
    )
    write(out / "watched.csv", ("path", "label", "group", "part"), watched(data / "hpylori", parts["hpylori"]))


def watched(hpylori: Path, parts: dict[str, tuple[str, str]]) -> list[tuple[Path, str, str, str]]:
    """Labelled tiles of pretraining patients; of a patient with many tiles the first ones. Every second patient is val."""
    tiles = defaultdict(list)
    for row in rows(hpylori / "tile_labels.csv"):
        patient = row["patient_id"]
        if row["tile_label"] and parts[patient][1] == "pretraining" and len(tiles[patient]) < WATCHED_PER_PATIENT:
            tiles[patient].append((hpylori / "tiles" / patient / f"{row['tile']}.jpg", row["tile_label"], patient))
    return [(*tile, ("train", "val")[number % 2]) for number, patient in enumerate(sorted(tiles)) for tile in tiles[patient]]


def split(table: Sequence[dict[str, str]], name: str, seed: int) -> dict[str, tuple[str, str]]:
    """Label and part of every patient: within each stratum (label, and density where given) the share is held out."""
    strata: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in table:
        strata[row["label"], row.get("density", "")].add(row["patient_id"])
    random = np.random.default_rng(seed)
    parts = {}
    for (label, _), patients in sorted(strata.items()):
        free = sorted(patients - ALWAYS_PRETRAINING)
        held_out = set(random.permutation(free)[: round(HELD_OUT[name] * len(patients))].tolist())
        parts |= {patient: (label, "held-out" if patient in held_out else "pretraining") for patient in patients}
    return parts


def resized(source: Path, target: Path) -> list[Path]:
    """The classes of lc25000 as folders of tiles of ``TILE_PX``."""
    for row in rows(source / "labels.csv"):
        picture = (target / row["path"]).with_suffix(".png")
        if not picture.exists():
            picture.parent.mkdir(parents=True, exist_ok=True)
            tile = cv2.imread(str(source / row["path"]))
            cv2.imwrite(str(picture), cv2.resize(tile, (TILE_PX, TILE_PX), interpolation=cv2.INTER_CUBIC))
    return sorted(path for path in target.iterdir() if path.is_dir())


def rows(table: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(table: Path, columns: Sequence[str], content: Iterable[Sequence[object]]) -> None:
    """Writes a CSV file."""
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(content)


if __name__ == "__main__":
    main()
