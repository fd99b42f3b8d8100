"""Encoders as folders: our own exports, timm's, and those ``pathfm encoders fetch`` makes for machines without a network.

A fetched folder is one that plain timm (or transformers) loads, with ``card.json`` beside it that keeps the recipe.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from pathfm.config import fingerprint
from pathfm.errors import StoreError, UsageError
from pathfm.models.checkpoints import CARD, CONFIG, WEIGHTS, load_encoder_folder, read_card
from pathfm.models.encoder_card import EncoderCard
from pathfm.models.foreign import ForeignNetwork, StageFeatures, transformers_network
from pathfm.models.timm_networks import created, timm_card
from pathfm.store.commit import commit_dir, read_json
from pathfm.store.manifest import file_digest

RECIPE = "recipe"
"""Key of ``card.json`` under which a fetched folder keeps its encoder's card."""


def load_folder(path: str, input_px: int | None) -> tuple[nn.Module, EncoderCard]:
    """The network of a folder, and how it is fed: by its card, else as timm's configuration says.

    Raises:
        UsageError: there is no such folder, it is damaged, or it is not said how its images are prepared.
    """
    folder = Path(path)
    name = f"local-dir:{folder.name}"
    try:
        if not (folder / CONFIG).is_file():
            fix = "name a folder made by `pathfm pretrain`, `pathfm encoders fetch` or timm"
            raise UsageError(f"no encoder folder ({CONFIG} is missing)", where=path, fix=fix)
        config, said = read_json(folder / CONFIG), read_card(folder) or {}
        card = _recipe(said, folder) if RECIPE in said else None
        if "model_type" in config:
            return _of_transformers(folder, card, said, input_px)
        model = load_encoder_folder(folder).model
        if input_px and not getattr(model, "dynamic_img_size", False):  # built for one side: build it again for this one
            model = created(f"local-dir:{folder}", input_px, pretrained=True)
    except StoreError as error:
        raise UsageError(error.what.splitlines()[0][:200], where=error.where, fix=error.fix or _hint(folder)) from error
    if card is None:
        card = dataclasses.replace(
            timm_card(model, name),
            mpp=(float(said["mpp"]),) if said.get("mpp") else (),
            tile_px=said.get("tile_px"),
            source="its folder",
        )
    card = as_configured(card, config)
    return (model if card.stage is None else StageFeatures(model, card.stage)), card


def folder_digest(folder: Path) -> str:
    """Of all that ``load_folder`` makes an encoder of: weights, configuration and recipe; empty where no encoder is.

    Raises:
        StoreError: the card is damaged.
    """
    files = (folder / WEIGHTS, folder / CONFIG)
    if not all(file.is_file() for file in files):
        return ""
    return fingerprint([file_digest(file) for file in files], (read_card(folder) or {}).get(RECIPE))


def as_configured(card: EncoderCard, config: Mapping[str, Any]) -> EncoderCard:
    """The card of what timm's ``config.json`` builds, whatever the card says was to be built."""
    architecture = str(config.get("architecture", ""))
    is_same = card.architecture.partition(".")[0] == architecture  # a tag names weights, and is in the card only
    kept = card.architecture if is_same else architecture
    return dataclasses.replace(card, architecture=kept, arguments=config.get("model_args") or {})


def _recipe(said: Mapping[str, Any], folder: Path) -> EncoderCard:
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in said[RECIPE].items()}
    try:
        return EncoderCard(**plain)
    except TypeError as error:
        fix = "fetch the encoder again with this version"
        raise UsageError(f"a recipe of another version of pathfm ({error})", where=str(folder / CARD), fix=fix) from error


def _of_transformers(
    folder: Path, card: EncoderCard | None, said: Mapping[str, Any], input_px: int | None
) -> tuple[nn.Module, EncoderCard]:
    if card is None:
        fix = "write the encoder's name (pathfm encoders) and set extract.weights to the file in this folder"
        raise UsageError("a folder of transformers does not say how its images are prepared", where=str(folder), fix=fix)
    if hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() != said.get("weights_sha256"):
        raise StoreError("the weights are not those the card was written for", where=str(folder), fix="fetch the encoder again")
    return transformers_network(card, folder, input_px), card


def _hint(folder: Path) -> str:
    others = sorted(file.name for file in folder.glob("*") if file.suffix in {".bin", ".pt", ".pth"})
    return f"name the network itself (uni, timm:NAME) and set extract.weights to {folder / others[0]}" if others else ""


def write_folder(model: nn.Module, card: EncoderCard, folder: Path) -> str:
    """Writes a network and its recipe as a folder for ``local-dir:``, whole or not at all.

    Args:
        model: as ``load_network`` gives it.
        card: its recipe.
        folder: to make or replace.

    Returns:
        SHA-256 of the file of weights.

    Raises:
        StoreError: the drive fails.
    """
    network: Any = model.network if isinstance(model, ForeignNetwork) else model
    with commit_dir(folder) as temporary:
        if card.loader == "transformers":
            network.save_pretrained(temporary, max_shard_size="100GB")
        else:
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
            (temporary / WEIGHTS).write_bytes(save(state, metadata={"format": "pt"}))
            _write_json(temporary / CONFIG, _timm_config(model, card))
        digest = hashlib.sha256((temporary / WEIGHTS).read_bytes()).hexdigest()
        recipe = dataclasses.asdict(card) | {"arguments": dict(card.arguments)}
        # From now on the folder is where it comes from, and what it was called stays its name.
        _write_json(temporary / CARD, {"weights_sha256": digest, RECIPE: recipe, "mpp": card.mpp[0] if card.mpp else None})
    return digest


def _timm_config(model: nn.Module, card: EncoderCard) -> dict[str, Any]:
    cfg: Mapping[str, Any] = getattr(getattr(model, "network", model), "pretrained_cfg", None) or {}
    return {
        "architecture": card.architecture.partition(".")[0],
        "num_classes": 0,
        "model_args": dict(card.arguments),
        "pretrained_cfg": {
            "input_size": [3, card.input_px, card.input_px],
            "num_classes": 0,
            "pool_size": None,
            "mean": card.mean,
            "std": card.std,
            "interpolation": card.interpolation,
            "crop_pct": card.input_px / card.resize_px,
            "crop_mode": "center",
            "fixed_input_size": False,
            "first_conv": cfg.get("first_conv"),
            "classifier": cfg.get("classifier"),
            "license": card.licence,
        },
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
