"""How far continued pretraining has carried an encoder from its first weights: likeness of features, and what probes gained.

Shapes: N tiles, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pathfm.models.checkpoints import MEAN, STD
from pathfm.stats.probes import PROBES, Metric, linear_cka, paired_difference, score_metric

Pixels = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float64]

BATCH = 32
METRIC: Metric = "balanced accuracy"


class Labelled(NamedTuple):
    """Tiles [N, H, W, 3] with what a probe learns: class numbers from 0, patients, and which tiles it may fit on."""

    tiles: Pixels
    label: Sequence[int]
    group: Sequence[str]
    is_train: Sequence[bool]


def drift(initial: nn.Module, trained: nn.Module, tiles: Pixels, labelled: Labelled | None = None) -> dict[str, Any]:
    """What ``drift.json`` says; plain JSON.

    Args:
        initial: the timm transformer before training.
        trained: the same after it (the EMA teacher).
        tiles: [N, H, W, 3], any fixed ones, N of several D for a trustworthy CKA.
        labelled: tiles for probes; none: no probes.

    Returns:
        ``cka_cls`` and ``cka_patch_mean``: linear CKA in [0, 1], 1 for features that are equal up to turning and scaling; and
        per probe its metric with both encoders on the tiles that are not for fitting, and the difference (trained - initial)
        with its 95 % bootstrap interval over patients.
    """
    before, after = token_features(initial, tiles), token_features(trained, tiles)
    said: dict[str, Any] = {f"cka_{name}": round(linear_cka(before[name], after[name]), 6) for name in before}
    said["tiles"] = len(tiles)
    if labelled is not None:
        said["probes"] = _probe_change(initial, trained, labelled)
    return said


@torch.inference_mode()
def token_features(vit: nn.Module, tiles: Pixels) -> dict[str, Features]:
    """``cls`` and ``patch_mean`` [N, D] of tiles, of which the middle is taken that is whole patches wide."""
    patch_px = int(vit.patch_embed.patch_size[0])  # type: ignore[union-attr,index]
    side = tiles.shape[1] // patch_px * patch_px
    start = (tiles.shape[1] - side) // 2
    device = next(vit.parameters()).device
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))
    found: dict[str, list[npt.NDArray[np.float32]]] = {"cls": [], "patch_mean": []}
    was_training = vit.training
    vit.eval()
    for first in range(0, len(tiles), BATCH):
        part = np.ascontiguousarray(tiles[first : first + BATCH, start : start + side, start : start + side])
        images = torch.from_numpy(part).to(device).permute(0, 3, 1, 2).float() / 255
        tokens = vit.forward_features((images - mean) / std)  # type: ignore[operator]
        found["cls"].append(tokens[:, 0].float().cpu().numpy())
        found["patch_mean"].append(tokens[:, vit.num_prefix_tokens :].mean(dim=1).float().cpu().numpy())
    vit.train(was_training)
    return {name: np.concatenate(parts).astype(np.float64) for name, parts in found.items()}


def _probe_change(initial: nn.Module, trained: nn.Module, labelled: Labelled) -> dict[str, Any]:
    """Probes on class token and mean patch together, with both encoders on the same tiles."""
    label, group, fits = np.asarray(labelled.label), np.asarray(labelled.group), np.asarray(labelled.is_train, dtype=bool)
    classes, changes = int(label.max()) + 1, {}
    features = [np.concatenate(list(token_features(vit, labelled.tiles).values()), axis=1) for vit in (initial, trained)]
    for name, probe in PROBES.items():
        before, after = (probe(each[fits], label[fits], group[fits].tolist(), each[~fits], classes, 0) for each in features)
        truth, patients = label[~fits].tolist(), group[~fits].tolist()
        changes[name] = {
            "metric": METRIC,
            "initial": score_metric(METRIC, before, truth),
            "trained": score_metric(METRIC, after, truth),
            "difference": paired_difference(METRIC, (after, before), truth, patients)._asdict(),
        }
    return changes
