"""First weights from elsewhere: timm, the Hugging Face hub, a folder, or an official DINOv2 checkpoint.

Official checkpoints and timm differ in names (register tokens, gated layers, chunks of blocks) and in where the class token's
position is kept; the numbers are the same, and what is converted there and back is unchanged to the bit.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pathfm.errors import StoreError, UsageError
from pathfm.models.checkpoints import load_encoder_folder
from pathfm.models.encoders import weights_sha256
from pathfm.models.networks import load_network
from pathfm.models.vit import MaskedViT, resized_positions

_WHERE = "pretrain.init"
_PREFIXES = ("module.", "teacher.", "model.", "state_dict.", "backbone.")
_NAMES = {"register_tokens": "reg_token", "mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2"}
OFFICIAL_OFFSET = 0.1
"""How official networks without registers resize their positions (``vit.resized_positions``)."""


class TimmState(NamedTuple):
    """Weights by timm's names, and the mask token [D], which timm does not have."""

    vit: dict[str, Tensor]
    mask_token: Tensor | None


def from_official(state: Mapping[str, Tensor]) -> TimmState:
    """The weights of an official DINOv2 network by timm's names.

    With registers, timm keeps positions of patches only: the class token's own position becomes part of the class token.

    Args:
        state: as published, or as training writes it (prefixes ``teacher.backbone.`` or ``module.``, chunks of blocks, heads).
    """
    named = {_without_prefixes(name): tensor for name, tensor in state.items()}
    vit = {}
    for name, tensor in named.items():
        if not name.startswith(("dino_head.", "ibot_head.", "dino_loss.", "ibot_patch_loss.", "head.")):
            renamed = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)  # blocks are numbered through their chunks
            for theirs, ours in _NAMES.items():
                renamed = renamed.replace(theirs, ours)
            vit[renamed] = tensor
    mask_token = vit.pop("mask_token", None)
    if "reg_token" in vit and "pos_embed" in vit:
        vit["cls_token"] = vit["cls_token"] + vit["pos_embed"][:, :1]
        vit["pos_embed"] = vit["pos_embed"][:, 1:]
    return TimmState(vit, None if mask_token is None else mask_token.flatten())


def _without_prefixes(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def to_official(state: Mapping[str, Tensor], mask_token: Tensor | None = None) -> dict[str, Tensor]:
    """Weights by timm's names as the official DINOv2 code names them, with a position of the class token (zero if it has none).

    Raises:
        UsageError: rotary positions, which DINOv2 does not have.
    """
    if "pos_embed" not in state:
        raise UsageError("a network with rotary positions has no official DINOv2 form", where="pretrain.positions")
    official = {}
    for name, tensor in state.items():
        renamed = name.replace("reg_token", "register_tokens")
        if _is_gated(state, name):
            renamed = renamed.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        official[renamed] = tensor
    positions = state["pos_embed"]
    if not _prefix_length(positions):
        official["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    # The official class needs a mask token; without one, hidden patches are nothing.
    blank = torch.zeros_like(state["cls_token"]).flatten()
    official["mask_token"] = (blank if mask_token is None else mask_token).view(1, -1)
    return official


def _is_gated(state: Mapping[str, Tensor], name: str) -> bool:
    block, layer, _ = name.partition("mlp.fc")
    return bool(layer) and state[f"{block}mlp.fc1.weight"].shape[0] == 2 * state[f"{block}mlp.fc2.weight"].shape[1]


def _prefix_length(positions_1LD: Tensor) -> int:
    """Prefix tokens with a position: the rest is a square grid of patches."""
    length = positions_1LD.shape[1]
    return length - math.isqrt(length) ** 2


def load_initial(backbone: MaskedViT, init: str) -> dict[str, Any]:
    """Puts the named weights into a backbone; position embeddings are resized to its grid.

    Args:
        backbone: on the CPU; its mask token is set where the weights have one.
        init: ``timm:NAME``, ``hf-hub:ORG/NAME``, ``local-dir:PATH``, or ``dinov2:PATH``, an official checkpoint (.pth or
            .safetensors) whose positions are resized as the official code does.

    Returns:
        Provenance, plain JSON: ``source`` (a path's last part only), ``weights_sha256`` of the file, or of names and values.

    Raises:
        UsageError: no such weights, or they are of another network; it says what does not fit and which settings would.
        StoreError: a damaged folder.
    """
    scheme, _, rest = init.partition(":")
    offset = 0.0
    if scheme == "dinov2" and rest:
        state, digest = _official_file(Path(rest))
        offset = 0.0 if "reg_token" in state.vit else OFFICIAL_OFFSET
    elif scheme in ("timm", "hf-hub", "local-dir") and rest:
        state, digest = _from_network(scheme, rest)
    else:
        fix = "use timm:NAME, hf-hub:ORG/NAME, local-dir:PATH or dinov2:PATH"
        raise UsageError(f"unknown weights {init!r}", where=_WHERE, fix=fix)
    source = init if scheme in ("timm", "hf-hub") else f"{scheme}:{Path(rest).name}"
    fitted = _fitted(state.vit, backbone, offset)
    _check(fitted, backbone, source)
    backbone.vit.load_state_dict(fitted)
    if state.mask_token is not None:
        with torch.no_grad():
            backbone.mask_token.copy_(state.mask_token)
    return {"source": source, "weights_sha256": digest}


def _from_network(scheme: str, rest: str) -> tuple[TimmState, str]:
    if scheme == "local-dir":
        try:
            folder = load_encoder_folder(Path(rest))
        except StoreError as error:
            raise UsageError(error.what, where=f"{_WHERE}: {error.where}", fix=error.fix) from error
        return TimmState(folder.model.state_dict(), None), weights_sha256(folder.model)
    try:
        network = load_network(f"{scheme}:{rest}").model
    except UsageError as error:
        raise UsageError(error.what, where=_WHERE, fix=error.fix) from error
    return TimmState(network.state_dict(), None), weights_sha256(network)


def _official_file(path: Path) -> tuple[TimmState, str]:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if path.suffix == ".safetensors":
            content: Mapping[str, Any] = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UsageError(f"not a checkpoint that can be read ({reason})", where=f"{_WHERE}: {path.name}") from error
    flat: dict[str, Tensor] = {}
    if isinstance(content, Mapping):
        for name, value in content.items():
            inner = value if isinstance(value, Mapping) else {"": value}
            flat |= {f"{name}.{key}".rstrip("."): tensor for key, tensor in inner.items() if isinstance(tensor, Tensor)}
    # A training checkpoint holds student and teacher; the teacher is the encoder.
    flat = {name: tensor for name, tensor in flat.items() if not re.search(r"(^|\.)student\.", name)}
    state = from_official(flat)
    if "cls_token" not in state.vit:
        raise UsageError("no DINOv2 network in this checkpoint", where=f"{_WHERE}: {path.name}")
    return state, digest


def _fitted(state: Mapping[str, Tensor], backbone: MaskedViT, offset: float) -> dict[str, Tensor]:
    """The state with its positions on the backbone's grid, the class token's own where the backbone keeps it."""
    fitted = {name: tensor for name, tensor in state.items() if not name.startswith(("head.", "fc_norm."))}
    theirs, ours = fitted.get("pos_embed"), backbone.vit.pos_embed
    if theirs is None or ours is None or theirs.shape[2] != ours.shape[2]:
        return fitted
    has, wants = _prefix_length(theirs), _prefix_length(ours)
    if (has, wants) == (1, 0):
        fitted["cls_token"] = fitted["cls_token"] + theirs[:, :1]
        theirs = theirs[:, 1:]
    if (has, wants) == (0, 1):
        theirs = torch.cat([torch.zeros_like(theirs[:, :1]), theirs], dim=1)
    if _prefix_length(theirs) == wants:
        rows, columns = backbone.vit.patch_embed.grid_size
        fitted["pos_embed"] = resized_positions(theirs, (rows, columns), wants, offset)
    return fitted


def _check(state: Mapping[str, Tensor], backbone: MaskedViT, source: str) -> None:
    wanted: dict[str, Tensor] = backbone.vit.state_dict()
    wrong = [
        f"{name} {_shape(state.get(name))} where {_shape(wanted.get(name))} is needed"
        for name in [*wanted, *(name for name in state if name not in wanted)]
        if _shape(state.get(name)) != _shape(wanted.get(name))
    ]
    if wrong:
        shown = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise UsageError(f"the weights {source} do not fit the backbone: {shown}", where=_WHERE, fix=_advice(state, wanted))


def _shape(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else str(list(tensor.shape))


def _advice(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """The settings that would make the backbone that of the weights."""
    advice = []
    patches = state.get("patch_embed.proj.weight")
    if patches is not None and patches.shape[-1] != wanted["patch_embed.proj.weight"].shape[-1]:
        advice.append(f"pretrain.patch_px: {patches.shape[-1]}")
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    if registers != (wanted["reg_token"].shape[1] if "reg_token" in wanted else 0):
        advice.append(f"pretrain.registers: {registers}")
    scaled, scales = (any(re.search(r"\.ls1\.|gamma_1", name) for name in names) for names in (state, wanted))
    if scaled != scales:
        advice.append(f"pretrain.layer_scale: {1e-5 if scaled else 0}")
    if ("pos_embed" in state) != ("pos_embed" in wanted):
        advice.append(f"pretrain.positions: {'learned' if 'pos_embed' in state else 'rope'}")
    gated, gates = (_gates(names) for names in (state, wanted))
    if gated != gates:
        advice.append(f"pretrain.mlp: {'swiglu' if gated else 'gelu'}")
    return f"set {', '.join(advice)}" if advice else "set pretrain.backbone to the network that they are of"


def _gates(state: Mapping[str, Tensor]) -> bool:
    return "blocks.0.mlp.fc1.weight" not in state or _is_gated(state, "blocks.0.mlp.fc1.weight")
