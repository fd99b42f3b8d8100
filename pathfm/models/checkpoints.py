"""An encoder on disk: a folder that plain ``timm.create_model("local-dir:PATH", pretrained=True)`` loads, plus a card.

``config.json`` and ``model.safetensors`` are timm's; ``card.json`` says where the weights come from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from pathfm.config import fingerprint
from pathfm.errors import StoreError
from pathfm.models.vit import timm_recipe
from pathfm.presets import PRESETS
from pathfm.pretrain_settings import PretrainSettings
from pathfm.settings import Settings
from pathfm.store.commit import commit_dir, read_json, recover
from pathfm.store.manifest import DIGEST, MANIFEST, file_digest

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "card.json"


class EncoderFolder(NamedTuple):
    """An encoder read back: the network in eval mode, its card, and how its input is prepared (timm's pretrained_cfg)."""

    model: nn.Module
    card: dict[str, Any]
    pretrained_cfg: dict[str, Any]


def export_encoder(
    vit: nn.Module, settings: PretrainSettings, img_px: int, card: Mapping[str, Any], folder: Path, manifest: Path | None = None
) -> None:
    """Writes the folder, whole or not at all, once timm has proved to load it.

    Args:
        vit: the network that ``build_backbone(settings, img_px)`` makes.
        settings: of pretraining.
        img_px: the input side it is best used at [px].
        card: provenance (fingerprint, mpp, tile_px, step, and what ``provenance`` says); the digest of the weights is added.
        folder: where to.
        manifest: what the training has seen; a copy travels with the weights.

    Raises:
        StoreError: timm does not load the network from its configuration, or the drive fails.
    """
    architecture, arguments = timm_recipe(settings, img_px)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in vit.state_dict().items()}
    weights = save(state, metadata={"format": "pt"})
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": int(vit.num_features),  # type: ignore[arg-type]
        "global_pool": "token",
        # timm leaves out what is None when it is asked to build, but not when it reads a configuration.
        "model_args": {name: value for name, value in arguments.items() if value is not None},
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
    full_card = {**card, "architecture": settings.backbone, "weights_sha256": hashlib.sha256(weights).hexdigest()}
    if manifest:
        full_card[DIGEST] = file_digest(manifest)
    with commit_dir(folder) as temporary:
        (temporary / WEIGHTS).write_bytes(weights)
        if manifest:
            shutil.copyfile(manifest, temporary / MANIFEST)
        for name, content in ((CONFIG, config), (CARD, full_card)):
            (temporary / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _check_loads(temporary, state, folder)


def _check_loads(written: Path, state: Mapping[str, Tensor], folder: Path) -> None:
    loaded = load_encoder_folder(written).model.state_dict()
    if loaded.keys() != state.keys() or not all(torch.equal(loaded[name], tensor) for name, tensor in state.items()):
        raise StoreError("timm does not load these weights as they are", where=str(folder))


def provenance(settings: PretrainSettings, store_fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """What a card says about how and on what an encoder was trained: plain JSON, the same for the same training.

    Args:
        settings: of pretraining.
        store_fingerprints: of the tile stores, by slide.
    """
    return {
        "preset": settings.preset,
        "differs": differences(settings),
        "settings_fingerprint": fingerprint(settings),
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "slides": len(store_fingerprints),
        "stores_digest": fingerprint(dict(store_fingerprints)),
    }


def differences(settings: PretrainSettings) -> dict[str, Any]:
    """Settings whose values are not those of their preset, by dotted name, as plain JSON."""
    required = {"teacher": ""} if settings.preset == "distill" else {}
    plain = PretrainSettings.model_validate({"preset": settings.preset, **PRESETS[settings.preset], **required})
    before, after = dict(_leaves(plain)), dict(_leaves(settings))
    return {name: value for name, value in after.items() if value != before[name]}


def _leaves(settings: Settings, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    plain = settings.model_dump(mode="json")
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        found += _leaves(value, f"{prefix}{name}.") if isinstance(value, Settings) else [(prefix + name, plain[name])]
    return found


def read_card(folder: Path) -> dict[str, Any] | None:
    """The card of an encoder folder, or None when there is no whole encoder."""
    recover(folder)
    return read_json(folder / CARD) if (folder / CARD).is_file() else None


def load_encoder_folder(folder: Path) -> EncoderFolder:
    """Reads an encoder folder; one without a card (any timm folder) is welcome and has an empty card.

    The random generators stay as they are.

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
        with torch.random.fork_rng(devices=[]):
            model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    except (RuntimeError, TypeError, KeyError, ValueError, SafetensorError) as error:
        raise StoreError(f"timm cannot load this encoder: {error}", where=str(folder)) from error
    return EncoderFolder(model.eval(), card, dict(cast("Mapping[str, Any]", model.pretrained_cfg)))
