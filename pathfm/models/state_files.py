"""Weights from a file of the user's: only tensors are read, names are cleaned openly, and nothing is left to chance."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pathfm.errors import UsageError

WHERE = "extract.weights"
_PREFIXES = ("module.", "teacher.", "model.", "state_dict.", "backbone.")
_OFFICIAL = re.compile(r"^(mask_token|register_tokens)$|^(dino|ibot)_head\.|\.mlp\.w12\.|^blocks\.\d+\.\d+\.")
_SHOWN = 3


def read_state(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by name from a .safetensors, .pt, .pth or .bin file, and in words what was done to their names.

    Prefixes that wrappers and trainings leave (``module.``, ``teacher.``, ``backbone.`` and the like) are taken off, a student
    is left out, and names of the official DINOv2 code become timm's.

    Raises:
        UsageError: it cannot be read, holds more than tensors, or holds several networks.
    """
    named, remarks = _flat(_content(path)), []
    state: dict[str, Tensor] = {}
    cut: dict[str, int] = {}
    for name, tensor in named.items():
        short = name
        while short.startswith(_PREFIXES):
            prefix, _, short = short.partition(".")
            cut[prefix] = cut.get(prefix, 0) + 1
        if short in state:
            raise UsageError(
                f"it holds several networks ({short} is there twice)", where=_place(path), fix="save the state of one of them"
            )
        state[short] = tensor
    remarks += [f"{prefix}. was taken off {count} names" for prefix, count in sorted(cut.items())]
    if any(_OFFICIAL.search(name) for name in state):
        from pathfm.models.weights import from_official  # it stands above the networks that are loaded here

        state = from_official(state).vit
        remarks.append("names of the official DINOv2 code became timm's")
    if not state:
        raise UsageError("it holds no tensors", where=_place(path))
    return state, remarks


def _content(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = "it holds more than tensors, or is no state dict; code in a file is never run"
        raise UsageError(what, where=_place(path), fix="save only model.state_dict()") from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, SafetensorError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UsageError(f"not a state dict that can be read ({reason})", where=_place(path)) from error


def _flat(content: object) -> dict[str, Tensor]:
    """Tensors by dotted names; what a training keeps besides (optimisers, counters, a student) is left out."""
    if not isinstance(content, Mapping):
        return {}
    flat: dict[str, Tensor] = {}
    for name, value in content.items():
        inner: Mapping[Any, Any] = value if isinstance(value, Mapping) else {"": value}
        flat |= {f"{name}.{key}".rstrip("."): tensor for key, tensor in inner.items() if isinstance(tensor, Tensor)}
    return {name: tensor for name, tensor in flat.items() if not re.search(r"(^|\.)(student|optimizer)\.", name)}


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> list[str]:
    """Puts weights into a network, every one of them, and says in words what was left over.

    Args:
        model: on the CPU, or on the meta device: the tensors become its own, in its number types.
        state: tensors by the network's names; those of a classifier that the network does not have are left out.
        source: what the weights are called in messages.

    Raises:
        UsageError: a tensor is missing, left over, or of another shape.
    """
    wanted: dict[str, Tensor] = model.state_dict()
    spare = [name for name in state if name not in wanted and name.startswith(_classifiers(model))]
    fitting = {name: tensor for name, tensor in state.items() if name not in spare}
    wrong = [
        f"{name} {_shape(fitting.get(name))} where {_shape(wanted.get(name))} is needed"
        for name in [*wanted, *(name for name in fitting if name not in wanted)]
        if _shape(fitting.get(name)) != _shape(wanted.get(name))
    ]
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        shown = "; ".join(wrong[:_SHOWN])
        raise UsageError(
            f"the weights are of another network: {shown}{more}", where=source, fix="name the network that they are of"
        )
    model.load_state_dict({name: tensor.to(wanted[name].dtype) for name, tensor in fitting.items()}, assign=True)
    return [f"left out: {', '.join(spare[:_SHOWN])}{', ...' if len(spare) > _SHOWN else ''}"] if spare else []


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("classifier") or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def _shape(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else str(list(tensor.shape))


def _place(path: Path) -> str:
    return f"{WHERE}: {path.name}"
