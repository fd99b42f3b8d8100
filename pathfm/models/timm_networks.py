"""timm's own networks: made for a side, with their published weights, and how timm's configuration says they are fed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import nn

from pathfm.errors import UsageError
from pathfm.models.encoder_card import EncoderCard
from pathfm.models.foreign import check_side
from pathfm.models.hugging_face import WEIGHT_NAMES, hub_file
from pathfm.models.pooling import has_class_token

WHERE = "extract.encoder"


def check_known(name: str) -> None:
    """Refuses what is no model of timm.

    Raises:
        UsageError: with names that look alike.
    """
    plain = name.partition(".")[0]
    if timm.is_model(plain):
        return
    close = timm.list_models(f"*{plain.split('_')[0]}*")[:5]
    hint = f"did you mean one of {', '.join(close)}?" if close else "see timm.list_models()"
    raise UsageError(f"timm has no model {name!r}", where=WHERE, fix=hint)


def created(
    name: str, input_px: int | None, options: Mapping[str, Any] | None = None, *, pretrained: bool = False
) -> nn.Module:
    """The network, ready for ``input_px``: position embeddings resized as needed, or built for that side, or of any side.

    The random generators stay as they are.

    Args:
        name: of timm, or local-dir:PATH.
        input_px: side of the images [px]; None: the network's own.
        options: of ``timm.create_model``.
        pretrained: with the published weights.

    Raises:
        UsageError: the network's patches do not divide the side.
    """
    arguments: dict[str, Any] = {"num_classes": 0} | dict(options or {})
    sides: list[dict[str, Any]] = [{"dynamic_img_size": True}, {"img_size": input_px}, {}]
    for side in sides[2:] if input_px is None or "dynamic_img_size" in arguments else sides:
        try:
            with torch.random.fork_rng(devices=[]):
                model: nn.Module = timm.create_model(name, pretrained=pretrained, **(side | arguments))
            break
        except TypeError:  # this kind of network has no such option
            if not side:
                raise
    check_side(input_px or 0, _patch_px(model))
    return model


def _patch_px(model: nn.Module) -> int:
    if not hasattr(model, "num_prefix_tokens"):
        return 1
    size = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    return int(size[0] if isinstance(size, tuple | list) else size)


def untrained(name: str, input_px: int | None, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """A network with random weights, the same ones every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return created(name, input_px, arguments)


def published(name: str, input_px: int | None, encoder: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """A network with the weights that timm publishes under its name, from this machine where they lie here.

    Raises:
        UsageError: there are none, or they are not to be had.
    """
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        fix = f"one of {', '.join(tags[:5])}, " if tags else ""
        raise UsageError(
            f"timm has no weights of {name!r}", where=WHERE, fix=f"use {fix}untrained:{name}, or set extract.weights"
        )
    options = dict(arguments or {})
    if config.hf_hub_id:
        names = (config.hf_hub_filename,) if config.hf_hub_filename else WEIGHT_NAMES
        folder = hub_file(config.hf_hub_id, names, encoder).parent
        options["pretrained_cfg_overlay"] = {"source": "local-dir", "file": str(folder), "custom_load": False}
    try:
        return created(name, input_px, options, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        fix = "download the weights where there is a network and set extract.weights"
        raise UsageError(f"weights of {name!r} cannot be loaded: {reason}", where=WHERE, fix=fix) from error


def timm_card(model: nn.Module, name: str, *, as_timm: bool = False) -> EncoderCard:
    """How a network of timm is fed and read.

    Args:
        model: made by timm.
        name: of the encoder.
        as_timm: exactly as timm evaluates it: with its crop, and what its head makes of the features. Otherwise the whole tile
            is seen, and vision transformers give class token and mean.
    """
    facts: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    side = int(facts["input_size"][-1])
    both = hasattr(model, "num_prefix_tokens") and has_class_token(model) and not as_timm
    width = int(getattr(model, "num_features" if both else "head_hidden_size", None) or model.num_features)  # type: ignore[arg-type]
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    tag = config.get("tag")
    return EncoderCard(
        name=name,
        hub_id=str(config.get("hf_hub_id") or ""),
        loader="timm",
        architecture=f"{config.get('architecture', '')}{f'.{tag}' if tag else ''}",
        dim=2 * width if both else width,
        arguments={"num_classes": 0},
        input_px=side,
        resize_px=math.floor(side / float(facts["crop_pct"])) if as_timm else side,
        mpp=(),
        tile_px=None,
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
        interpolation="bilinear" if facts["interpolation"] == "bilinear" else "bicubic",
        pooling="cls+mean" if both else "average",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        licence=str(config.get("license") or ""),
        source="timm's configuration",
    )
