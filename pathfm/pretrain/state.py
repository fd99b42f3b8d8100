"""The checkpoint: everything a run needs to go on, in one safetensors file that is whole or absent.

Schedules, data and random draws are functions of the step and need no state. Equal states give equal bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pathfm.errors import StoreError
from pathfm.faults import crash_point
from pathfm.pretrain.method import DinoV2
from pathfm.store.commit import commit_file

LAST = "last.ckpt"
VERSION = 1
HEADER = "pathfm"


class Checkpoint(NamedTuple):
    """A checkpoint read back, on the CPU: finished steps, ``DinoV2`` state, optimiser state by parameter number and name."""

    step: int
    method: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def save_checkpoint(path: Path, fingerprint: str, step: int, method: DinoV2, optimizer: torch.optim.Optimizer) -> None:
    """Writes the state after ``step`` steps; a kill leaves the previous checkpoint in place."""
    tensors = {f"method.{name}": tensor.contiguous() for name, tensor in method.state_dict().items()}
    for number, parameter in enumerate(_parameters(optimizer)):
        tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in optimizer.state[parameter].items()}
    # One entry only: the library writes several in random order.
    header = {HEADER: json.dumps({"version": VERSION, "fingerprint": fingerprint, "step": step}, sort_keys=True)}
    with commit_file(path) as temporary:
        save_file(tensors, temporary, metadata=header)
        crash_point("pretrain.checkpoint.before_rename")


def load_checkpoint(path: Path, fingerprint: str) -> Checkpoint | None:
    """The checkpoint, or None when there is none or it belongs to other settings or other tiles.

    Raises:
        StoreError: the file is damaged. It is not passed over in silence: days of work may be in it.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()[HEADER])
            if (header["version"], header["fingerprint"]) != (VERSION, fingerprint):
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise StoreError("the checkpoint is damaged", where=str(path), fix="delete it to start anew") from error
    return Checkpoint(int(header["step"]), _part(tensors, "method."), _part(tensors, "optimizer."))


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Gives every parameter its moments back; learning rates and decays are set afresh at each step anyway."""
    for number, parameter in enumerate(_parameters(optimizer)):
        moments = _part(tensors, f"{number}.")
        optimizer.state[parameter] = {name: tensor.to(parameter.device) for name, tensor in moments.items()}


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
