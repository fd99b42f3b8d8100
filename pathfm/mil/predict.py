"""New slides through the kept networks: all folds, all members, mean probability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pathfm.errors import StoreError
from pathfm.mil.bags import SlideFeatures, read_slide
from pathfm.mil.ensemble import load_member, one_thread
from pathfm.mil.fit import ask


@dataclass(frozen=True)
class Prediction:
    """What the ensemble says of one slide.

    Attributes:
        slide_id: name of the feature file.
        probability: by class, sums to 1.
        predicted: the class of highest probability.
        lowest, highest: range of the positive class's probability over the networks: how much they disagree.
    """

    slide_id: str
    probability: Mapping[str, float]
    predicted: str
    lowest: float
    highest: float


def predict(mil_dir: Path, feature_paths: Sequence[Path]) -> list[Prediction]:
    """Predictions for feature files, one bag per file, in the given order.

    Raises:
        StoreError: no networks, damaged ones, or features of another encoder or length than they were trained on.
    """
    paths = sorted((mil_dir / "models").glob("fold-*/member-*.safetensors"))
    # The stage writes its numbers last, and takes them away first: without them, networks of two runs may lie there together.
    if not paths or not (mil_dir / "metrics.json").is_file():
        raise StoreError("there are no finished networks", where=str(mil_dir), fix="run `pathfm mil` first")
    members = [load_member(path) for path in paths]
    facts = members[0][1]
    classes: list[str] = facts["classes"]
    slides = [_checked(path, facts) for path in feature_paths]
    bags = [torch.from_numpy(slide.feature_ND) for slide in slides]
    with one_thread():
        said_MBC = np.array([[answer.probability_C for answer in ask(model, bags)] for model, _ in members])
    predictions = []
    for index, slide in enumerate(slides):
        mean_C = said_MBC[:, index].mean(axis=0)
        positive_M = said_MBC[:, index, classes.index(facts["positive"])]
        probability = dict(zip(classes, mean_C.tolist(), strict=True))
        predicted = classes[int(mean_C.argmax())]
        predictions.append(Prediction(slide.slide_id, probability, predicted, float(positive_M.min()), float(positive_M.max())))
    return predictions


def _checked(path: Path, facts: Mapping[str, object]) -> SlideFeatures:
    slide, network = read_slide(path), facts["network"]
    dim = network["dim"] if isinstance(network, dict) else None
    if slide.feature_ND.shape[1] != dim:
        what = f"{slide.feature_ND.shape[1]} features per tile, but the networks were trained on {dim}"
        raise StoreError(what, where=str(path), fix="extract with the encoder of the study")
    if dict(slide.encoder) != facts["encoder"]:
        raise StoreError(
            "features of another encoder than the networks were trained on",
            where=str(path),
            fix="extract with the encoder of the study",
        )
    if not len(slide.feature_ND):
        raise StoreError("the slide has no tiles, so nothing can be said of it", where=str(path))
    return slide
