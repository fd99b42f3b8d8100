"""A look at the teacher every so many steps: rank and norms of its features, probes, and pictures of what it sees.

Looking changes neither weights nor random numbers. The numbers go to ``health/snapshots.csv``, the pictures to
``health/step-0000500.png``: for each tile the tile, its patches in the colours of their first three principal components, and
where each head of the last block attends to from the class token.

Shapes: N tiles, P patches of a tile in a square grid, D features, A attention heads.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pathfm.models.vit import MaskedViT, Tokens
from pathfm.pretrain import diagnostics
from pathfm.pretrain.colour import NEUTRAL, apply_colour
from pathfm.pretrain.health import HEALTH
from pathfm.pretrain.metrics import line
from pathfm.pretrain.probe_table import ProbeTable, middle
from pathfm.pretrain_settings import PretrainSettings
from pathfm.stats import probes
from pathfm.store.commit import commit_file

Pixels = npt.NDArray[np.uint8]

SNAPSHOTS = "snapshots.csv"
BATCH = 64
"""Tiles looked at together."""
TURNED = 64
"""Tiles that are also looked at turned and mirrored."""
SHOWN_HEADS = 6
CELL_PX, HEADER_PX, GAP_PX = 160, 22, 4
NUMBERS = (
    "rankme",
    "cls_norm",
    "patch_norm",
    "outliers",
    "patch_cosine",
    "cls_patch_cosine",
    "cls_cosine",
    "d4_cosine",
    "alignment",
    "uniformity",
)
"""Columns of ``snapshots.csv`` beside the step; ``alignment`` is between a tile and the same mirrored."""
PROBES = ("probe_knn", "probe_knn_accuracy", "probe_linear", "probe_linear_accuracy")
"""Further columns with a probe table: AUROC and balanced accuracy on its val part."""


class Snapshot:
    """Looks at a teacher and keeps what it saw.

    Args:
        folder: of the encoder; everything goes into its ``health``.
        settings: of the run.
        tiles: uint8 [N, H, W, 3], the same at every look; their middle is taken where crops are smaller.
        probe: labelled tiles, if there are any.
    """

    def __init__(self, folder: Path, settings: PretrainSettings, tiles: Pixels, probe: ProbeTable | None = None) -> None:
        self._folder, self._seed, self._maps = folder / HEALTH, settings.seed, settings.health.maps
        self._side_px = settings.crops.global_px
        self._tiles, self._probe = np.stack([middle(tile, self._side_px) for tile in tiles]), probe
        self._columns = ("step", *NUMBERS, *(PROBES if probe else ()))

    def trim(self, step: int) -> None:
        """Removes what was seen after ``step``, from where a run goes on."""
        self._write([row for row in self._rows() if int(row["step"]) <= step])
        for picture in self._folder.glob("step-*.png"):
            if int(picture.stem.partition("-")[2]) > step:
                picture.unlink()

    @torch.no_grad()
    def take(self, teacher: MaskedViT, step: int) -> dict[str, float]:
        """Looks, writes, and returns the numbers by name; only ``rankme``, NaN, when the features are not finite."""
        with _as_it_was(teacher):
            found, picture = self._look(teacher)
        rows = [row for row in self._rows() if int(row["step"]) < step]
        self._write([*rows, {"step": str(step), **{name: f"{value:.8g}" for name, value in found.items()}}])
        if picture is not None:
            ok, encoded = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
            assert ok
            with commit_file(self.picture_path(step)) as temporary:
                temporary.write_bytes(encoded.tobytes())
        return found

    def picture(self, step: int) -> Pixels | None:
        """The picture of a step [H, W, 3], if maps are drawn."""
        path = self.picture_path(step)
        return np.asarray(cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)) if path.is_file() else None

    def picture_path(self, step: int) -> Path:
        """Where the picture of a step lies, if maps are drawn."""
        return self._folder / f"step-{step:07d}.png"

    def _look(self, teacher: MaskedViT) -> tuple[dict[str, float], Pixels | None]:
        seen = _features(teacher, self._tiles)
        if not all(bool(part.isfinite().all()) for part in seen):
            return {"rankme": math.nan}, None
        turned_8ND = torch.stack([_features(teacher, view).cls_ND for view in _turned(self._tiles[:TURNED])])
        unit_8ND = torch.nn.functional.normalize(turned_8ND, dim=-1)
        numbers = {
            "rankme": diagnostics.rankme(seen.cls_ND),
            **diagnostics.token_statistics(*seen)._asdict(),
            "d4_cosine": diagnostics.mean_cosine(unit_8ND.transpose(0, 1)).mean(),
            "alignment": diagnostics.alignment(turned_8ND[0], turned_8ND[4]),
            "uniformity": diagnostics.uniformity(seen.cls_ND),
        }
        found = {name: float(value) for name, value in numbers.items()}
        if self._probe:
            found |= self._probed(teacher, self._probe)
        return found, self._picture(teacher) if self._maps else None

    def _probed(self, teacher: MaskedViT, table: ProbeTable) -> dict[str, float]:
        batches = (table.pixels(self._side_px, start, start + BATCH) for start in range(0, len(table.paths), BATCH))
        features = torch.cat([_features(teacher, batch).cls_ND for batch in batches]).double().cpu().numpy()
        train, label = np.array(table.is_train), np.array(table.labels)
        groups = [group for group, fits in zip(table.groups, table.is_train, strict=True) if fits]
        found = {}
        for name, probe in probes.PROBES.items():
            scores = probe(features[train], label[train], groups, features[~train], table.classes, self._seed)
            found[f"probe_{name}"] = probes.score_metric("auroc", scores, label[~train])
            found[f"probe_{name}_accuracy"] = probes.score_metric("balanced accuracy", scores, label[~train])
        return found

    def _picture(self, teacher: MaskedViT) -> Pixels:
        tiles = self._tiles[: self._maps]
        attention_NAP = class_attention(teacher, _images(teacher, tiles)).cpu().numpy()
        colours_NP3 = principal_colours(_features(teacher, tiles).patches_NPD.cpu().numpy())
        return draw_maps(tiles, colours_NP3, attention_NAP)

    def _rows(self) -> list[dict[str, str]]:
        path = self._folder / SNAPSHOTS
        if not path.is_file():
            return []
        with path.open(encoding="utf-8", newline="") as stream:
            return list(csv.DictReader(stream))

    def _write(self, rows: list[dict[str, str]]) -> None:
        lines = [line([row.get(name) or "" for name in self._columns]) for row in rows]
        with commit_file(self._folder / SNAPSHOTS) as temporary:
            temporary.write_text("".join([line(self._columns), *lines]), encoding="utf-8")


@contextmanager
def _as_it_was(teacher: MaskedViT) -> Iterator[None]:
    """Evaluation mode for a while; random numbers go on as if nothing had been drawn."""
    training = teacher.training
    device = next(teacher.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        teacher.eval()
        try:
            yield
        finally:
            teacher.train(training)


def _images(teacher: MaskedViT, tiles: Pixels) -> Tensor:
    """Tiles as the network takes them, on its device."""
    pixels = torch.from_numpy(np.ascontiguousarray(tiles)).to(next(teacher.parameters()).device)
    return apply_colour(pixels, torch.tensor(NEUTRAL, device=pixels.device).expand(len(pixels), -1))


def _features(teacher: MaskedViT, tiles: Pixels) -> Tokens:
    """fp32 class and patch tokens of all tiles."""
    batches = [teacher.tokens(_images(teacher, tiles[start : start + BATCH])) for start in range(0, len(tiles), BATCH)]
    return Tokens(*(torch.cat([part.float() for part in parts]) for parts in zip(*batches, strict=True)))


def _turned(tiles: Pixels) -> list[Pixels]:
    """The eight views of squares by turning and mirroring: four turns, then four turns of the mirrored ones."""
    return [np.rot90(view, turns, axes=(1, 2)) for view in (tiles, tiles[:, :, ::-1]) for turns in range(4)]


@torch.no_grad()
def class_attention(teacher: MaskedViT, images: Tensor) -> Tensor:
    """What each head of the last block attends to from the class token, patches only, [N, A, P]; sums to at most 1.

    Computed from the queries and keys that the block itself makes, rotated by their positions where it does so.
    """
    block: Any = teacher.blocks[-1]
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:  # noqa: ANN401 - a hook
        return lambda _module, _inputs, output: found.update({name: output})

    hooks = [getattr(block.attn, f"{name}_norm").register_forward_hook(keep(name)) for name in "qk"]
    # A compiled block would not call the hooks.
    compiled, block._compiled_call_impl = block._compiled_call_impl, None
    try:
        teacher.tokens(images)
    finally:
        block._compiled_call_impl = compiled
        for hook in hooks:
            hook.remove()
    query, key = found["q"].float(), found["k"].float()
    rope = teacher._rope(images)
    if rope is not None:
        query, key = block._rotated(query, rope), block._rotated(key, rope)
    scores_NAT = torch.einsum("nad,natd->nat", query[:, :, 0], key) / math.sqrt(key.shape[-1])
    attention_NAT: Tensor = scores_NAT.softmax(dim=-1)
    return attention_NAT[:, :, teacher.vit.num_prefix_tokens :]


def principal_colours(patches_NPD: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """First three principal components of all patches together as red, green and blue in 0..1, [N, P, 3].

    The sign of each is fixed by its longest entry, so that equal features have equal colours.
    """
    flat = patches_NPD.reshape(-1, patches_NPD.shape[-1]).astype(np.float64)
    centred = flat - flat.mean(axis=0)
    basis = np.linalg.svd(centred, full_matrices=False)[2][:3]
    basis = basis * np.sign(basis[np.arange(len(basis)), np.abs(basis).argmax(axis=1)])[:, None]
    parts = np.zeros((len(flat), 3))
    parts[:, : len(basis)] = centred @ basis.T
    low, high = np.percentile(parts, [1, 99], axis=0)
    scaled: npt.NDArray[np.float64] = np.clip((parts - low) / np.maximum(high - low, 1e-12), 0, 1)
    return scaled.reshape(*patches_NPD.shape[:2], 3)


def draw_maps(tiles: Pixels, colours_NP3: npt.NDArray[np.float64], attention_NAP: npt.NDArray[np.float32]) -> Pixels:
    """A row for each tile: the tile, its patches' colours, the mean attention, and the first heads' attention."""
    names = ["tile", "patches (PCA)", "attention, mean"]
    names += [f"head {number + 1}" for number in range(min(SHOWN_HEADS, attention_NAP.shape[1]))]
    columns = [
        [_cell(tile) for tile in tiles],
        [_cell(_grid((colours * 255).astype(np.uint8))) for colours in colours_NP3],
        [_heat(heads.mean(axis=0)) for heads in attention_NAP],
        *([_heat(heads[number]) for heads in attention_NAP] for number in range(len(names) - 3)),
    ]
    width, height = (CELL_PX + GAP_PX) * len(names) - GAP_PX, (CELL_PX + GAP_PX) * len(tiles) - GAP_PX
    canvas = np.full((HEADER_PX + height, width, 3), 255, dtype=np.uint8)
    for number, (name, cells) in enumerate(zip(names, columns, strict=True)):
        left = number * (CELL_PX + GAP_PX)
        cv2.putText(canvas, name, (left + 2, HEADER_PX - 7), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (27, 37, 48), 1, cv2.LINE_AA)
        for row, cell in enumerate(cells):
            top = HEADER_PX + row * (CELL_PX + GAP_PX)
            canvas[top : top + CELL_PX, left : left + CELL_PX] = cell
    return canvas


def _grid(patches: Pixels) -> Pixels:
    side = math.isqrt(len(patches))
    return patches.reshape(side, side, *patches.shape[1:])


def _heat(attention_P: npt.NDArray[np.float32]) -> Pixels:
    """Attention from none (dark) to the most in this map (bright)."""
    scaled = (attention_P / max(float(attention_P.max()), 1e-12) * 255).astype(np.uint8)
    colours: Pixels = cv2.applyColorMap(_grid(scaled), cv2.COLORMAP_INFERNO)
    return _cell(colours[..., ::-1])


def _cell(image: Pixels) -> Pixels:
    larger = image.shape[0] > CELL_PX
    resized: Pixels = cv2.resize(
        np.ascontiguousarray(image), (CELL_PX, CELL_PX), interpolation=cv2.INTER_AREA if larger else cv2.INTER_NEAREST
    )
    return resized
