"""Encoders: a tile goes in as RGB bytes, a feature vector comes out, and the whole recipe is on record."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import nn
from torch.nn import functional

from pathfm.errors import UsageError
from pathfm.store.commit import read_json
from pathfm.study import ExtractSettings

Pixels = npt.NDArray[np.uint8]
Encode = Callable[[Pixels], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the features of given pixels.

    Attributes:
        encoder: name as in the settings.
        weights_sha256: hash over the names and values of all weights.
        input_px: side the tiles are resized to [px].
        mean, std: channel normalisation of values in 0..1.
        interpolation: resampling used when the tile side differs from ``input_px`` (always antialiased).
        pooling: how tokens become one vector.
        precision: arithmetic.
        dim: length of a feature vector.
    """

    encoder: str
    weights_sha256: str
    input_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    pooling: str
    precision: str
    dim: int


class TileEncoder:
    """A network with its preprocessing and pooling.

    Args:
        model: a timm model without classifier.
        name: the encoder's name for the recipe.
        settings: pooling, precision, input side.
        device: where it runs.
    """

    def __init__(self, model: nn.Module, name: str, settings: ExtractSettings, device: torch.device) -> None:
        self._model = model.eval().requires_grad_(requires_grad=False).to(device)
        self._device, self._precision = device, settings.precision
        facts: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        is_vit = hasattr(model, "num_prefix_tokens") and hasattr(model, "patch_embed")
        self._pooling = settings.pooling if is_vit else "average"
        self._input_px = settings.input_px or int(facts["input_size"][-1])
        patch_px = int(model.patch_embed.patch_size[0]) if is_vit else 1  # type: ignore[union-attr,index]
        if self._input_px % patch_px:
            what = f"{self._input_px} px is not a whole number of the encoder's patches ({patch_px} px)"
            raise UsageError(what, where="extract.input_px", fix=f"use {self._input_px // patch_px * patch_px or patch_px}")
        self._interpolation = str(facts["interpolation"]) if facts["interpolation"] in {"bilinear", "bicubic"} else "bicubic"
        self._mean = torch.tensor(facts["mean"], device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(facts["std"], device=device).view(1, 3, 1, 1)
        dim = int(model.num_features) * (2 if self._pooling == "cls+mean" else 1)  # type: ignore[arg-type]
        self.recipe = Recipe(
            encoder=name,
            weights_sha256=weights_sha256(model),
            input_px=self._input_px,
            mean=tuple(facts["mean"]),
            std=tuple(facts["std"]),
            interpolation=self._interpolation,
            pooling=self._pooling,
            precision=settings.precision,
            dim=dim,
        )

    @torch.inference_mode()
    def __call__(self, tiles: Pixels) -> npt.NDArray[np.float32]:
        """Features [B, D] float32 of RGB tiles [B, H, W, 3] uint8."""
        images_BCHW = torch.from_numpy(tiles).to(self._device).permute(0, 3, 1, 2).float().div_(255)
        if images_BCHW.shape[-1] != self._input_px:
            side = (self._input_px, self._input_px)
            images_BCHW = functional.interpolate(images_BCHW, size=side, mode=self._interpolation, antialias=True).clamp_(0, 1)
        images_BCHW = (images_BCHW - self._mean) / self._std
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            features_BD = self._pool(self._model.forward_features(images_BCHW))  # type: ignore[operator]
        result: npt.NDArray[np.float32] = features_BD.float().cpu().numpy()
        return result

    def _pool(self, output: torch.Tensor) -> torch.Tensor:
        if self._pooling == "average":
            pooled: torch.Tensor = self._model.forward_head(output, pre_logits=True)  # type: ignore[operator]
            return pooled
        cls_BD, mean_BD = output[:, 0], output[:, int(self._model.num_prefix_tokens) :].mean(dim=1)  # type: ignore[arg-type]
        if self._pooling == "cls":
            return cls_BD
        return mean_BD if self._pooling == "mean" else torch.cat([cls_BD, mean_BD], dim=1)


def weights_sha256(model: nn.Module) -> str:
    """Hash over the names and values of a network's state."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_encoder(name: str, settings: ExtractSettings, device: torch.device) -> TileEncoder:
    """An encoder by name: ``timm:NAME``, ``hf-hub:ORG/NAME``, ``local-dir:PATH`` or ``untrained:NAME``.

    Raises:
        UsageError: no such network, or its weights are not to be had here.
    """
    scheme, _, rest = name.partition(":")
    shown = name if scheme != "local-dir" else f"local-dir:{Path(rest).name}"
    return TileEncoder(load_network(name, settings.input_px), shown, settings, device)


def load_network(name: str, input_px: int | None = None) -> nn.Module:
    """The bare network of an encoder, named as for ``load_encoder``, which also says what it raises."""
    scheme, _, rest = name.partition(":")
    if scheme not in SCHEMES or not rest:
        raise UsageError(
            f"unknown encoder {name!r}",
            where="extract.encoder",
            fix=f"use pretrained, or one of {', '.join(f'{key}:...' for key in SCHEMES)}",
        )
    return SCHEMES[scheme](rest, input_px)


def _check_known(name: str) -> None:
    if timm.is_model(name.partition(".")[0]):
        return
    close = timm.list_models(f"*{name.partition('.')[0].split('_')[0]}*")[:5]
    hint = f"did you mean one of {', '.join(close)}?" if close else "see timm.list_models()"
    raise UsageError(f"timm has no model {name!r}", where="extract.encoder", fix=hint)


def _from_timm(name: str, input_px: int | None) -> nn.Module:
    _check_known(name)
    return _with_weights(name, input_px)


def _create(name: str, input_px: int | None, *, pretrained: bool) -> nn.Module:
    """The network, ready for ``input_px``: position embeddings resized as needed, or built for that side, or of any side."""
    sides: list[dict[str, Any]] = [{"dynamic_img_size": True}, {"img_size": input_px}, {}] if input_px else [{}]
    for options in sides[:-1]:
        try:
            sized: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
        except TypeError:  # this kind of network has no such option
            continue
        return sized
    plain: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0)
    return plain


def _with_weights(name: str, input_px: int | None) -> nn.Module:
    try:
        model = _create(name, input_px, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        fix = "download the weights where there is a network and use local-dir:PATH"
        raise UsageError(f"weights of {name!r} cannot be loaded: {reason}", where="extract.encoder", fix=fix) from error
    return model


def _from_folder(path: str, input_px: int | None) -> nn.Module:
    if not (Path(path) / "config.json").is_file():
        raise UsageError(
            "no encoder folder (config.json is missing)", where=path, fix="name a folder made by `pathfm pretrain` or timm"
        )
    return _with_weights(f"local-dir:{path}", input_px)


def _untrained(name: str, input_px: int | None) -> nn.Module:
    _check_known(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _create(name, input_px, pretrained=False)


SCHEMES: dict[str, Callable[[str, int | None], nn.Module]] = {
    "timm": _from_timm,
    "hf-hub": lambda name, input_px: _with_weights(f"hf-hub:{name}", input_px),
    "local-dir": _from_folder,
    "untrained": _untrained,
}


def declared_input_px(name: str) -> int | None:
    """The side [px] of the input that an encoder was trained with, as far as it is known without its weights."""
    scheme, _, rest = name.partition(":")
    if scheme in {"timm", "untrained"} and timm.is_model(rest):
        model_config = timm.get_pretrained_cfg(rest)
        return int(model_config.input_size[-1]) if model_config else None
    config = Path(rest) / "config.json"
    if scheme != "local-dir" or not config.is_file():
        return None
    size = read_json(config).get("pretrained_cfg", {}).get("input_size")
    return int(size[-1]) if size else None


def effective_mpp(mpp: float | None, tile_px: int, input_px: int) -> float | None:
    """Micrometres per pixel that the network really sees, after its resize."""
    return None if mpp is None or math.isnan(mpp) else mpp * tile_px / input_px
