"""Networks by name, each with the card that says how it is fed and read.

Every network has ``forward_features(x)``, which gives tokens [B, T, D] (prefix tokens first, ``num_prefix_tokens`` of them) or
a map [B, D, h, w] ([B, h, w, D] for some of timm's), and ``forward_head(features, pre_logits=True)``, its own vectors [B, D].
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from pathfm.errors import UsageError
from pathfm.log import get_log
from pathfm.models.cards import EncoderCard, card_of_hub, find_card, similar_cards
from pathfm.models.encoder_folders import RECIPE, as_configured, load_folder
from pathfm.models.foreign import StageFeatures, measured, python_card, python_network, transformers_network, wrapped
from pathfm.models.hugging_face import WEIGHT_NAMES, hub_file, hub_folder, weight_names
from pathfm.models.pooling import prefix_tokens
from pathfm.models.state_files import load_state, read_state
from pathfm.models.timm_networks import check_known, created, published, timm_card, untrained
from pathfm.store.commit import read_json

WHERE, WEIGHTS_WHERE = "extract.encoder", "extract.weights"
AS_TIMM = "@timm"
"""After the name of a timm network: fed and read exactly as timm evaluates it."""


CONFIGURED = ("hidden_act", "layer_norm_eps", "num_attention_heads")
"""Fields of a transformers configuration that decide features and leave no trace in the weights."""


class Network(NamedTuple):
    """A network on the CPU and how it is fed and read.

    Attributes:
        model: keeps the contract above.
        card: how it is built, fed and read.
        name: for records; of a path its last part only.
        code: hash of the user's own file that makes it; empty: none does.
    """

    model: nn.Module
    card: EncoderCard
    name: str
    code: str = ""

    def digest(self) -> str:
        """What is computed with the weights, as 16 hex digits; neither places nor the side of images play a role."""
        card, config = self.card, getattr(getattr(self.model, "network", None), "config", None)
        built = card.architecture.partition(".")[0], dict(card.arguments), card.stage, prefix_tokens(self.model)
        said = *built, self.code, [getattr(config, field, None) for field in CONFIGURED]
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]


def load_network(name: str, input_px: int | None = None, weights: Path | None = None) -> Network:
    """The network of an encoder.

    Args:
        name: a card's name, ``timm:NAME`` (with ``@timm``: timm's own recipe), ``hf-hub:ORG/NAME``, ``local-dir:PATH``,
            ``untrained:NAME`` (of timm or of a card; always the same random weights) or ``python:MODULE:FUNCTION``.
        input_px: side of the images [px]; the card is then one for this side. None: the card's own.
        weights: state dict that is put into the network of a card or of timm, instead of the published one.

    Raises:
        UsageError: no such network, or its weights are not to be had here.
    """
    scheme, colon, rest = name.partition(":")
    if not colon:
        network = _of_card(_known_card(name), input_px, weights)
    elif scheme not in SCHEMES or not rest:
        raise _unknown(name)
    else:
        if weights is not None and scheme != "timm":
            fix = "name the network itself: one of pathfm encoders, or timm:NAME"
            raise UsageError(f"{scheme}:... has weights of its own", where=WEIGHTS_WHERE, fix=fix)
        network = _of_timm(rest, input_px, weights) if scheme == "timm" else SCHEMES[scheme](rest, input_px)
    return network if input_px is None else network._replace(card=_for_side(network.card, input_px))


def _for_side(card: EncoderCard, input_px: int) -> EncoderCard:
    return dataclasses.replace(card, input_px=input_px, resize_px=round(input_px * card.resize_px / card.input_px))


def _known_card(name: str) -> EncoderCard:
    card = find_card(name)
    if card is None:
        raise _unknown(name)
    return card


def _unknown(name: str) -> UsageError:
    near = similar_cards(name)
    more = [f"timm:{name}"] if timm.is_model(name.partition(".")[0]) else []
    guess = f"did you mean {' or '.join([*more, *near])}? " if near or more else ""
    schemes = ", ".join(f"{key}:..." for key in SCHEMES)
    return UsageError(f"unknown encoder {name!r}", where=WHERE, fix=f"{guess}pathfm encoders lists them; or one of {schemes}")


def _of_card(card: EncoderCard, input_px: int | None, weights: Path | None) -> Network:
    if card.loader == "python":
        raise _bring_your_own(card)
    if card.loader == "transformers":
        folder = hub_folder(card.hub_id, weight_names(card), card.name) if weights is None else _folder_of(weights)
        return Network(transformers_network(card, folder, input_px), card, card.name)
    if not card.architecture:
        return _as_configured(card, input_px, weights)
    if weights is None and card.hub_id.startswith("timm/"):
        model = published(card.architecture, input_px, card.name, card.arguments)
    else:
        file = weights or hub_file(card.hub_id, weight_names(card), card.name)
        model = _filled(card.architecture, input_px, card.arguments, file, is_users=weights is not None)
    return Network(model if card.stage is None else StageFeatures(model, card.stage), card, card.name)


def _bring_your_own(card: EncoderCard) -> UsageError:
    fix = f'load it in a function of your own that returns it with {{"card": "{card.base}"}}, and use python:MODULE:FUNCTION'
    return UsageError(
        f"the network of {card.name} is code of others, which is not run from here: {card.note}", where=WHERE, fix=fix
    )


def _as_configured(card: EncoderCard, input_px: int | None, weights: Path | None) -> Network:
    """A card that leaves the network and the way it is fed to the hub's configuration."""
    if weights is not None:
        fix = f"copy the hub's folder of {card.hub_id} and use local-dir:PATH"
        raise UsageError(f"what network {card.name} is stands in the hub's configuration", where=WEIGHTS_WHERE, fix=fix)
    folder = hub_folder(card.hub_id, weight_names(card), card.name)
    model = _checked(f"local-dir:{folder}", input_px, card.name)
    found = timm_card(model, card.name, as_timm=True)
    read = {key: getattr(found, key) for key in ("input_px", "resize_px", "mean", "std", "interpolation", "parameters")}
    built = as_configured(dataclasses.replace(card, **read), read_json(folder / "config.json"))
    return Network(model, measured(model, built), card.name)


def _checked(name: str, input_px: int | None, encoder: str) -> nn.Module:
    try:
        return created(name, input_px, pretrained=True)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UsageError(f"timm cannot load {encoder}: {reason}", where=WHERE) from error


def _folder_of(weights: Path) -> Path:
    """A file of weights that transformers reads lies beside its configuration."""
    if weights.name not in WEIGHT_NAMES or not weights.is_file() or not (weights.parent / "config.json").is_file():
        fix = f"name {' or '.join(WEIGHT_NAMES)} in a copy of the hub's folder, with its config.json"
        raise UsageError(f"transformers cannot load {weights.name} alone", where=WEIGHTS_WHERE, fix=fix)
    return weights.parent


def _filled(name: str, input_px: int | None, options: Mapping[str, Any], file: Path, *, is_users: bool) -> nn.Module:
    """A network of timm with weights from a file, every one of them."""
    state, remarks = read_state(file)
    source = f"{WEIGHTS_WHERE}: {file.name}" if is_users else file.name
    with torch.device("meta"):  # to draw random weights that are then replaced takes as long as to read them
        model = created(name, input_px, options)
    remarks += load_state(model, state, source)
    if any(buffer.is_meta for buffer in model.buffers()):  # computed when it is built, and in no file
        model = created(name, input_px, options)
        load_state(model, state, source)
    if remarks:
        (get_log(__name__).warning if is_users else get_log(__name__).info)("weights %s: %s", file.name, "; ".join(remarks))
    return model


def _of_timm(name: str, input_px: int | None, weights: Path | None = None) -> Network:
    plain, as_timm = name.removesuffix(AS_TIMM), name.endswith(AS_TIMM)
    check_known(plain)
    if weights is None:
        model = published(plain, input_px, f"timm:{plain}")
    else:
        model = _filled(plain, input_px, {}, weights, is_users=True)
    return Network(model, timm_card(model, f"timm:{name}", as_timm=as_timm), f"timm:{name}")


def _of_hub(name: str, input_px: int | None) -> Network:
    card = card_of_hub(name.partition("@")[0])
    if card is not None:  # what builds it right is rarely in the hub's own configuration
        return _of_card(dataclasses.replace(card, hub_id=name), input_px, None)
    folder = hub_folder(name, WEIGHT_NAMES, f"hf-hub:{name}")
    config = read_json(folder / "config.json")
    if "model_type" in config or "auto_map" in config:
        fix = "load it in a function of your own, and use python:MODULE:FUNCTION"
        raise UsageError(f"{name} is no network of timm, and its recipe is unknown", where=WHERE, fix=fix)
    model = _checked(f"local-dir:{folder}", input_px, name)
    card = as_configured(dataclasses.replace(timm_card(model, f"hf-hub:{name}"), hub_id=name), config)
    return Network(model, card, f"hf-hub:{name}")


def _of_folder(path: str, input_px: int | None) -> Network:
    return Network(*load_folder(path, input_px), f"local-dir:{Path(path).name}")


def _untrained(name: str, input_px: int | None) -> Network:
    card = find_card(name)
    shown = f"untrained:{name}"
    if card is None:
        plain, as_timm = name.removesuffix(AS_TIMM), name.endswith(AS_TIMM)
        check_known(plain)
        model = untrained(plain, input_px)
        return Network(model, dataclasses.replace(timm_card(model, shown, as_timm=as_timm), hub_id="", licence=""), shown)
    if card.loader == "python" or not card.architecture:
        what = f"the network of {card.name} is not described here, so it cannot be had untrained"
        raise UsageError(what, where=WHERE, fix="name one that is loaded through timm or transformers")
    if card.loader == "timm":
        model = untrained(card.architecture, input_px, card.arguments)
        model = model if card.stage is None else StageFeatures(model, card.stage)
    else:
        model = transformers_network(card, None, input_px)
    return Network(model, dataclasses.replace(card, name=shown), shown)


def _of_python(name: str, input_px: int | None) -> Network:
    network, facts, code = python_network(name)
    shown = f"python:{name}"
    if hasattr(network, "pretrained_cfg") and not facts:
        return Network(network, timm_card(network, shown), shown, code)
    model, card = wrapped(network, facts), python_card(shown, facts)
    if input_px:
        card = _for_side(card, input_px)
    return Network(model, measured(model, card), shown, code)


SCHEMES: dict[str, Callable[[str, int | None], Network]] = {
    "timm": _of_timm,
    "hf-hub": _of_hub,
    "local-dir": _of_folder,
    "untrained": _untrained,
    "python": _of_python,
}


def declared_input_px(name: str) -> int | None:
    """The side [px] of the input that an encoder was trained with, as far as it is known without its weights."""
    scheme, colon, rest = name.partition(":")
    card = find_card(rest if scheme == "untrained" else name) if scheme == "untrained" or not colon else None
    if scheme == "hf-hub":
        card = card_of_hub(rest.partition("@")[0])
    if card is not None:
        return card.input_px
    if scheme in {"timm", "untrained"}:
        plain = rest.removesuffix(AS_TIMM)
        model_config = timm.get_pretrained_cfg(plain) if timm.is_model(plain.partition(".")[0]) else None
        return int(model_config.input_size[-1]) if model_config else None
    config = Path(rest) / "config.json"
    if scheme != "local-dir" or not config.is_file():
        return None
    said = read_json(Path(rest) / "card.json") if (Path(rest) / "card.json").is_file() else {}
    stated = said.get(RECIPE, {}).get("input_px")
    size = [stated] if stated else read_json(config).get("pretrained_cfg", {}).get("input_size")
    return int(size[-1]) if size else None
