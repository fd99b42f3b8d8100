"""What an encoder has learnt: probes of its frozen features on patients that pretraining never saw.

    python pipelines/tissue/evaluate.py DATA OUT ENCODER [--only lymphoma --field-tile-px 160] [--everyone]

DATA holds the folders hpylori and lymphoma, OUT the ``parts.csv`` of ``prepare.py``, ENCODER the folders ``teacher`` and
``untrained`` of a pretraining run. Written to ENCODER: ``probes.json`` and ``probes.md``.

*H. pylori*: tiles, bacteria or none. Lymphoma: fields of three classes, each the mean of its tiles. Every sample is scored
by a probe that saw no sample of its patient (five folds); probes learn from everyone else, and only
patients left out of pretraining are counted (``--everyone``: all of them, for nets that were never trained). The main
pooling is that of ``pathfm extract``; the others are shown beside it and decide nothing.

Shapes: N samples, T tiles, P patches, D features, C classes.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import timm
import torch

from pathfm.extract.colour import colour_histogram
from pathfm.models.checkpoints import MEAN, STD
from pathfm.stats.probes import PROBES, out_of_fold_scores, paired_difference, score_metric

Pixels = npt.NDArray[np.uint8]
Array = npt.NDArray[np.float64]

BATCH = 32
SEEDS = (0,)
"""Of the folds; with several, the scores of a sample are averaged."""
MAIN, OTHERS = "cls+mean", ("mean+std",)
COLOUR, UNTRAINED, TEACHER = "colour histogram", "untrained", "teacher"
RESAMPLES = 2000


class Task(NamedTuple):
    """Samples with their tiles: [T, side, side, 3] per sample; ``counted`` are the patients left out of pretraining."""

    tiles: list[Pixels]
    labels: list[int]
    patients: list[str]
    counted: npt.NDArray[np.bool_]


def main() -> None:
    """Reads, probes, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "out", "encoder"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--everyone", action="store_true", help="count every patient")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--only", choices=tuple(LOADERS), help="one set alone")
    parser.add_argument("--field-tile-px", type=int, default=256, help="side of the tiles a lymphoma field is cut into")
    arguments = parser.parse_args()
    nets = {name: arguments.encoder / name for name in (UNTRAINED, TEACHER) if (arguments.encoder / name).is_dir()}
    probed = rows(arguments.out / "parts.csv")
    held_out = {row["patient_id"] for row in probed if arguments.everyone or row["part"] == "held-out"}
    results = {}
    for name in [arguments.only] if arguments.only else LOADERS:
        task = LOADERS[name](arguments.data / name, held_out, arguments.field_tile_px)
        features = {COLOUR: colour_features(task)}
        for net, folder in nets.items():
            features |= {f"{net}, {pooling}": values for pooling, values in net_features(folder, task, arguments.precision)}
        results[name] = compare(task, features)
    (arguments.encoder / "probes.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    table = "\n".join(markdown(results))
    (arguments.encoder / "probes.md").write_text(table + "\n", encoding="utf-8")
    print(table)


def load_hpylori(folder: Path, held_out: set[str], _: int) -> Task:
    """Labelled tiles."""
    labelled = [row for row in rows(folder / "tile_labels.csv") if row["tile_label"]]
    tiles = [read(folder / "tiles" / row["patient_id"] / f"{row['tile']}.jpg")[None] for row in labelled]
    return _task(tiles, [int(float(row["tile_label"])) for row in labelled], labelled, held_out)


def load_lymphoma(folder: Path, held_out: set[str], tile_px: int) -> Task:
    """Fields, cut into tiles."""
    fields = rows(folder / "cohort.csv")
    classes = sorted({row["label"] for row in fields})
    tiles = [cut_field(read(folder / row["path"]), tile_px) for row in fields]
    return _task(tiles, [classes.index(row["label"]) for row in fields], fields, held_out)


LOADERS: dict[str, Callable[[Path, set[str], int], Task]] = {"hpylori": load_hpylori, "lymphoma": load_lymphoma}
"""The labelled sets: (folder, patients left out, side of a field's tiles [px]) -> task. Tiles keep their own resolution."""


def _task(tiles: list[Pixels], labels: list[int], table: Sequence[dict[str, str]], held_out: set[str]) -> Task:
    patients = [row["patient_id"] for row in table]
    return Task(tiles, labels, patients, np.array([patient in held_out for patient in patients]))


def read(picture: Path) -> Pixels:
    """A picture as RGB [H, W, 3]."""
    pixels = cv2.imread(str(picture))
    if pixels is None:
        raise FileNotFoundError(picture)
    return np.ascontiguousarray(pixels[:, :, ::-1])


def cut_field(field: Pixels, tile_px: int) -> Pixels:
    """As many tiles [T, side, side, 3] as fit side by side, spread evenly over a square field."""
    starts = np.linspace(0, len(field) - tile_px, len(field) // tile_px).astype(int)
    return np.stack([field[top : top + tile_px, left : left + tile_px] for top in starts for left in starts])


def colour_features(task: Task) -> Array:
    """Mean colour histograms of the samples [N, D]."""
    return np.stack([colour_histogram(tiles).mean(axis=0) for tiles in task.tiles]).astype(np.float64)


@torch.inference_mode()
def net_features(folder: Path, task: Task, precision: str) -> Iterator[tuple[str, Array]]:
    """Poolings of the tokens of a timm folder's network, each [N, D], averaged over the tiles of a sample."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, dynamic_img_size=True).eval()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    tiles, kept = np.concatenate(task.tiles), []
    for start in range(0, len(tiles), BATCH):
        images = torch.from_numpy(tiles[start : start + BATCH]).permute(0, 3, 1, 2).float().div_(255)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            tokens = model.forward_features((images - mean) / std).float()
        patches_TPD = tokens[:, model.num_prefix_tokens :]
        kept.append(torch.stack([tokens[:, 0], patches_TPD.mean(dim=1), patches_TPD.std(dim=1)], dim=1))
    sizes = [len(each) for each in task.tiles]
    per_sample = torch.stack([part.mean(dim=0) for part in torch.cat(kept).split(sizes)]).double().numpy()
    cls_ND, mean_ND, std_ND = per_sample.transpose(1, 0, 2)
    yield "cls+mean", np.concatenate([cls_ND, mean_ND], axis=1)
    yield "mean+std", np.concatenate([mean_ND, std_ND], axis=1)


def compare(task: Task, features: dict[str, Array]) -> dict[str, Any]:
    """Metrics of every probe and feature on the counted patients, and paired differences from the teacher."""
    counted = task.counted
    labels = np.array(task.labels)[counted].tolist()
    patients = np.array(task.patients)[counted].tolist()
    result: dict[str, Any] = {"samples": len(labels), "patients": len(set(patients))}
    for probe in PROBES:
        scores = {
            name: np.mean([out_of_fold_scores(probe, values, task.labels, task.patients, seed=seed) for seed in SEEDS], axis=0)[
                counted
            ]
            for name, values in features.items()
        }
        result[probe] = {
            name: {metric: score_metric(metric, each, labels) for metric in ("auroc", "balanced accuracy")}
            for name, each in scores.items()
        }
        pairs = [(f"{TEACHER}, {pooling}", f"{UNTRAINED}, {pooling}") for pooling in (MAIN, *OTHERS)]
        pairs += [(f"{net}, {MAIN}", COLOUR) for net in (TEACHER, UNTRAINED)]
        result[f"{probe} differences"] = {
            f"{first} - {second}": paired_difference(
                "auroc", (scores[first], scores[second]), labels, patients, RESAMPLES
            )._asdict()
            for first, second in pairs
            if first in scores and second in scores
        }
    return result


def markdown(results: dict[str, Any]) -> Iterator[str]:
    """The results as tables."""
    for name, result in results.items():
        yield f"\n### {name}: {result['samples']} samples of {result['patients']} patients\n"
        yield "| features | " + " | ".join(f"{probe} AUROC | {probe} balanced accuracy" for probe in PROBES) + " |"
        yield "|---|" + "---|" * (2 * len(PROBES))
        for features in result[next(iter(PROBES))]:
            cells = [f"{value:.3f}" for probe in PROBES for value in result[probe][features].values()]
            yield f"| {features} | {' | '.join(cells)} |"
        yield "\n| difference in AUROC | " + " | ".join(PROBES) + " |"
        yield "|---|" + "---|" * len(PROBES)
        for pair in result[f"{next(iter(PROBES))} differences"]:
            found = [result[f"{probe} differences"][pair] for probe in PROBES]
            cells = [f"{each['value']:+.3f} ({each['low']:+.3f} to {each['high']:+.3f})" for each in found]
            yield f"| {pair} | {' | '.join(cells)} |"


def rows(table: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
