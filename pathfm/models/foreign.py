"""Networks that are not timm's, made to look as if they were: of transformers, and of a user's own function.

Shapes: B images, T tokens (prefix tokens first), D features.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pathfm.errors import MissingExtraError, UsageError
from pathfm.models.cards import find_card
from pathfm.models.encoder_card import EncoderCard

WHERE = "extract.encoder"
PREFIX_TOKENS = "prefix_tokens"
_FACTS = {field.name for field in dataclasses.fields(EncoderCard)} - {"name", "loader", "dim"}


class ForeignNetwork(nn.Module):
    """A network whose ``forward`` gives tokens [B, T, D] (also as ``last_hidden_state``), a map [B, D, h, w] or vectors [B, D].

    Args:
        network: takes images [B, 3, H, W], normalised.
        prefix_tokens: tokens before those of the patches; None: it gives no tokens.
        arguments: passed on with every batch.
    """

    def __init__(self, network: nn.Module, prefix_tokens: int | None, arguments: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.network: Any = network
        self._arguments = dict(arguments or {})
        if prefix_tokens is not None:
            self.num_prefix_tokens = prefix_tokens

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens [B, T, D], or a map [B, D, h, w] (of one cell, where the network gives vectors)."""
        output = self.network(x, **self._arguments)
        hidden = getattr(output, "last_hidden_state", output)
        if not isinstance(hidden, Tensor) or hidden.ndim not in (2, 3, 4):
            got = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            fix = "return tokens [B, T, D], a map [B, D, h, w] or vectors [B, D]"
            raise UsageError(f"the network gives {got}", where=WHERE, fix=fix)
        return hidden[:, :, None, None] if hidden.ndim == 2 else hidden

    def forward_head(self, x: Tensor, pre_logits: bool = True) -> Tensor:
        """The vectors [B, D] that the network itself makes of its features: the first token, or the average of the map."""
        return x[:, 0] if x.ndim == 3 else x.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Vectors [B, D] of images."""
        return self.forward_head(self.forward_features(x))


class ProjectedNetwork(ForeignNetwork):
    """CLIP's vision network, whose own vector is a projection of the first token."""

    def forward_head(self, x: Tensor, pre_logits: bool = True) -> Tensor:
        """The projected vectors [B, D] of tokens, not normalised."""
        projected: Tensor = self.network.visual_projection(self.network.vision_model.post_layernorm(x[:, 0]))
        return projected


class StageFeatures(ForeignNetwork):
    """A network of timm that is read after one of its stages; what comes after it is not computed.

    Args:
        network: of timm, whole.
        stage: counted from 0, the stem.
    """

    def __init__(self, network: nn.Module, stage: int) -> None:
        super().__init__(network, None)
        self._stage = stage

    def forward_features(self, x: Tensor) -> Tensor:
        """The map [B, D, h, w] after the stage."""
        maps: list[Tensor] = self.network.forward_intermediates(
            x, indices=[self._stage], stop_early=True, intermediates_only=True
        )
        return maps[0]


def transformers_network(card: EncoderCard, folder: Path | None, input_px: int | None) -> nn.Module:
    """A network of transformers as its card describes it.

    Args:
        card: names the class; none: the one that the folder's configuration names.
        folder: with config.json and weights; None: random weights.
        input_px: side of the images [px]; default: the card's.

    Raises:
        UsageError: transformers is not installed, or the folder does not hold all weights of the network.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtraError(f"{card.name} needs transformers", where=WHERE, extra="transformers") from error
    kind = getattr(transformers, card.architecture or "AutoModel")
    pooler = {"add_pooling_layer": False} if card.architecture == "ViTModel" else {}
    network: Any = _read(kind, folder, pooler) if folder else kind(kind.config_class(**card.arguments), **pooler)
    config = network.config
    made_px, patch_px = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    side = input_px or card.input_px
    check_side(side, patch_px if isinstance(patch_px, int) else 1)
    # These two refuse other sides unless they are asked to resize their positions; DINOv2 always does.
    resizes = {"interpolate_pos_encoding": True} if config.model_type in ("vit", "clip_vision_model") else {}
    wrapper = ProjectedNetwork if hasattr(network, "visual_projection") else ForeignNetwork
    prefix = 1 + int(getattr(config, "num_register_tokens", 0))
    return wrapper(network, prefix, resizes if side != made_px else {})


def _read(kind: type[Any], folder: Path, pooler: Mapping[str, bool]) -> nn.Module:
    """From files only: nothing is downloaded, and code that lies beside them is not run."""
    try:
        network, found = kind.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True, **pooler
        )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UsageError(f"transformers cannot load this network: {reason}", where=folder.name) from error
    missing = sorted(str(key) for key in [*found["missing_keys"], *found["mismatched_keys"]])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UsageError(f"the weights lack {missing[0]}{more}", where=folder.name, fix="name the network that they are of")
    read: nn.Module = network
    return read


def check_side(side_px: int, patch_px: int) -> None:
    """Refuses images that patches do not divide.

    Raises:
        UsageError: with the nearest side below.
    """
    if side_px % patch_px:
        what = f"{side_px} px is not a whole number of the encoder's patches ({patch_px} px)"
        raise UsageError(what, where="extract.input_px", fix=f"use {side_px // patch_px * patch_px or patch_px}")


def python_network(name: str) -> tuple[nn.Module, dict[str, Any], str]:
    """What a user's function ``MODULE:FUNCTION`` returns, a network and facts about its recipe, and its ``source_sha256``.

    The module is also looked for in the current folder. The function returns a module, or a module and a dict with fields of
    ``EncoderCard``, ``card`` (the name of a card whose recipe holds) and ``prefix_tokens``.

    Raises:
        UsageError: there is no such function, or it returns something else, or an unknown fact.
    """
    module, _, function = name.partition(":")
    with _current_folder_importable():
        try:
            found = getattr(importlib.import_module(module), function)
        except (ImportError, ValueError, AttributeError) as error:
            fix = "write python:MODULE:FUNCTION; the module lies in the current folder or is installed"
            raise UsageError(f"no function {name}: {error}", where=WHERE, fix=fix) from error
        returned = found()
    network, facts = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})
    if not isinstance(network, nn.Module) or not isinstance(facts, Mapping):
        fix = "return a torch.nn.Module, or it and a dict of facts"
        raise UsageError(f"{name} returns {type(returned).__name__}", where=WHERE, fix=fix)
    unknown = sorted(set(facts) - _FACTS - {"card", PREFIX_TOKENS})
    if unknown:
        near = difflib.get_close_matches(unknown[0], sorted(_FACTS | {"card", PREFIX_TOKENS}), n=1)
        fix = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(_FACTS))}"
        raise UsageError(f"{name} states {unknown[0]!r}, which no recipe has", where=WHERE, fix=fix)
    return network, dict(facts), source_sha256(found, module)


def source_sha256(function: object, module: str) -> str:
    """Hash of the file that a function is written in, by default the module it was taken from; empty: there is none."""
    file = getattr(inspect.getmodule(function) or importlib.import_module(module), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else ""


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def wrapped(network: nn.Module, facts: Mapping[str, Any]) -> nn.Module:
    """A user's network as it is, where it has timm's methods; else so that it has them."""
    if hasattr(network, "forward_features") and hasattr(network, "forward_head"):
        return network
    config = getattr(network, "config", None)
    stated = facts.get(PREFIX_TOKENS, getattr(network, "num_prefix_tokens", None))
    return ForeignNetwork(network, 1 + int(getattr(config, "num_register_tokens", 0)) if stated is None else int(stated))


def python_card(name: str, facts: Mapping[str, Any]) -> EncoderCard:
    """The recipe that a user's facts describe; what they leave open is as for networks trained on ImageNet.

    Raises:
        UsageError: they name an unknown card.
    """
    stated: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in facts.items() if key in _FACTS
    }
    if isinstance(stated.get("mpp"), (int, float)):
        stated["mpp"] = (float(stated["mpp"]),)
    if "card" in facts:
        card = find_card(str(facts["card"]))
        if card is None:
            raise UsageError(
                f"{name} names the card {facts['card']!r}, which does not exist", where=WHERE, fix="see pathfm encoders"
            )
        return dataclasses.replace(card, **stated)
    if "input_px" in stated:
        stated.setdefault("resize_px", stated["input_px"])
    open_facts = [key for key in ("mean", "std") if key not in stated]
    note = "normalised as ImageNet, since nothing is stated" if open_facts else ""
    made: dict[str, Any] = {"name": name, "loader": "python", "hub_id": "", "architecture": "", "dim": 0, "mpp": ()}
    return EncoderCard(**made | {"tile_px": None, "pooling": "average", "source": name, "note": note} | stated)


def measured(model: nn.Module, card: EncoderCard) -> EncoderCard:
    """The card with the dimension that the network really has, found with one blank image.

    Raises:
        UsageError: it has another one than the card states, or gives no vectors.
    """
    with torch.inference_mode():
        features: Tensor = model.eval().forward_features(torch.zeros(1, 3, card.input_px, card.input_px))  # type: ignore[operator]
        vectors: Tensor = model.forward_head(features, pre_logits=True)  # type: ignore[operator]
    if not isinstance(vectors, Tensor) or vectors.ndim != 2:
        raise UsageError(f"the head of {type(model).__name__} does not give one vector per tile", where=WHERE)
    is_row = isinstance(features, Tensor) and features.ndim == 3 and card.pooling != "average"
    width = features.shape[2] if is_row else vectors.shape[1]
    dim = width * (2 if card.pooling == "cls+mean" else 1)
    if card.dim not in (0, dim):
        raise UsageError(f"the network gives {dim} numbers per tile, the card {card.name} has {card.dim}", where=WHERE)
    return dataclasses.replace(card, dim=dim)
