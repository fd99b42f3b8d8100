"""An encoder on disk: a folder that plain ``timm.create_model("local-dir:PATH", pretrained=True)`` loads, plus a card.

``config.json`` and ``model.safetensors`` are timm's; ``card.json`` says where the weights come from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
from safetensors import SafetensorError
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pathfm.errors import StoreError
from pathfm.store.commit import commit_dir, read_json, recover

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "card.json"


class EncoderFolder(NamedTuple):
    """An encoder read back: the network in eval mode, its card, and how its input is prepared (timm's pretrained_cfg)."""

    model: nn.Module
    card: dict[str, Any]
    pretrained_cfg: dict[str, Any]


def export_encoder(vit: VisionTransformer, architecture: str, img_px: int, card: Mapping[str, Any], folder: Path) -> None:
    """Writes the folder, whole or not at all.

    Args:
        vit: the network, as ``build_backbone`` makes it.
        architecture: its timm name.
        img_px: the input side it is best used at [px].
        card: provenance (fingerprint, mpp, tile_px, step, ...); the digest of the weights is added.
        folder: where to.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in vit.state_dict().items()}
    weights = save(state, metadata={"format": "pt"})
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": vit.num_features,
        "global_pool": "token",
        "model_args": _model_args(vit),
        "pretrained_cfg": {
            "input_size": [3, img_px, img_px],
            "num_classes": 0,
            "pool_size": None,
            "mean": MEAN,
            "std": STD,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "fixed_input_size": False,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    full_card = {**card, "architecture": architecture, "weights_sha256": hashlib.sha256(weights).hexdigest()}
    with commit_dir(folder) as temporary:
        (temporary / WEIGHTS).write_bytes(weights)
        for name, content in ((CONFIG, config), (CARD, full_card)):
            (temporary / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _model_args(vit: VisionTransformer) -> dict[str, Any]:
    """The arguments that rebuild the network under its architecture name (stochastic depth is for training only)."""
    arguments = {
        "img_size": vit.patch_embed.img_size[0],
        "patch_size": vit.patch_embed.patch_size[0],
        "num_classes": 0,
        "dynamic_img_size": True,
        "reg_tokens": vit.num_reg_tokens,
        "no_embed_class": vit.no_embed_class,
    }
    # The value only matters for fresh weights; its presence makes the LayerScale parameters exist.
    return arguments | ({"init_values": 1e-5} if hasattr(vit.blocks[0].ls1, "gamma") else {})


def read_card(folder: Path) -> dict[str, Any] | None:
    """The card of an encoder folder, or None when there is no whole encoder."""
    recover(folder)
    return read_json(folder / CARD) if (folder / CARD).is_file() else None


def load_encoder_folder(folder: Path) -> EncoderFolder:
    """Reads an encoder folder; one without a card (any timm folder) is welcome and has an empty card.

    Raises:
        StoreError: the folder is absent or damaged, or its weights are not those its card was written for.
    """
    recover(folder)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise StoreError(f"no encoder ({CONFIG} and {WEIGHTS})", where=str(folder))
    card = read_card(folder) or {}
    expected = card.get("weights_sha256")
    if expected and hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() != expected:
        raise StoreError(
            "the weights are not those the card was written for", where=str(folder), fix="export the encoder again"
        )
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    except (RuntimeError, TypeError, KeyError, ValueError, SafetensorError) as error:
        raise StoreError(f"timm cannot load this encoder: {error}", where=str(folder)) from error
    return EncoderFolder(model.eval(), card, dict(cast("Mapping[str, Any]", model.pretrained_cfg)))
