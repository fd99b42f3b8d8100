"""Checkpoints: everything a run needs to go on, in a folder that is whole or absent.

Tensors are written by torch's distributed checkpoint as safetensors (nothing in them runs when they are read), so that a run
goes on with another number of processes, sharded or not. Schedules, data and random draws are functions of the step and need
no state.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from pathfm.errors import StoreError
from pathfm.faults import crash_point
from pathfm.log import get_log
from pathfm.store.commit import commit_dir, read_json, recover, write_json

VERSION = 2
logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)  # it tells of every tensor

STATE = "state.json"
PREFIX = "step-"


class Checkpoint(NamedTuple):
    """A whole checkpoint on disk: its folder, the finished steps, and what the run noted."""

    folder: Path
    step: int
    notes: dict[str, Any]


def save_checkpoint(
    folder: Path, fingerprint: str, step: int, parts: tuple[nn.Module, torch.optim.Optimizer], notes: dict[str, Any]
) -> Checkpoint:
    """Writes the state after ``step`` steps as ``folder/step-N``; a kill leaves the earlier ones. All processes call it.

    Args:
        folder: where checkpoints lie; with several machines, a file system that all of them share.
        fingerprint: of the run.
        step: finished steps.
        parts: the method and its optimiser.
        notes: plain values that go into ``state.json``.
    """
    target = folder / f"{PREFIX}{step:08d}"
    with _written_together(target) as temporary:
        # The library warns that without a process group it saves alone, which is meant.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
            save(_tensors(*parts), storage_writer=writer, no_dist=not dist.is_initialized())
        if _first():
            files = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
            state = {"version": VERSION, "fingerprint": fingerprint, "step": step, "notes": notes, "files": files}
            write_json(temporary / STATE, state)
            crash_point("pretrain.checkpoint.before_rename")
    return Checkpoint(target, step, notes)


@contextmanager
def _written_together(target: Path) -> Iterator[Path]:
    """One process makes and commits the folder; the others write into it and wait."""
    if not dist.is_initialized():
        with commit_dir(target) as temporary:
            yield temporary
        return
    told: list[str] = [""]
    if _first():
        with commit_dir(target) as temporary:
            told[0] = str(temporary)
            dist.broadcast_object_list(told)
            yield temporary
            dist.barrier()
    else:
        dist.broadcast_object_list(told)
        yield Path(told[0])
        dist.barrier()
    dist.barrier()


def newest_checkpoint(folder: Path, fingerprint: str, before: int | None = None) -> Checkpoint | None:
    """The newest whole checkpoint of this run, or None when there is none. A damaged one is named and passed over.

    Args:
        folder: where checkpoints lie.
        fingerprint: of the run; checkpoints of others do not count.
        before: only those of fewer steps.

    Raises:
        StoreError: there are checkpoints, and all are damaged: days of work may be in them, so none is thrown away in silence.
    """
    damaged, any_whole = "", False
    for place in sorted(folder.glob(f"{PREFIX}*"), reverse=True):
        recover(place)
        try:
            state = read_json(place / STATE)
            whole = _is_whole(place, state)
            found = Checkpoint(place, int(state["step"]), dict(state["notes"]))
            ours = (state["version"], state["fingerprint"]) == (VERSION, fingerprint)
        except (StoreError, KeyError, TypeError, ValueError, OSError):
            whole = ours = False
        if whole and ours and (before is None or found.step < before):
            return found
        any_whole = any_whole or whole
        if not whole:
            damaged = damaged or str(place)
            get_log(__name__).warning("%s: the checkpoint is damaged", place)
    if damaged and not any_whole:
        raise StoreError("the checkpoint is damaged", where=damaged, fix="delete it to start anew")
    return None


def load_checkpoint(checkpoint: Checkpoint, method: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts a checkpoint into the method and its optimiser, however both are spread over processes. All processes call it.

    Raises:
        StoreError: it does not fit.
    """
    tensors = _tensors(method, optimizer)  # views of the live state: what is read lands in it
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            reader = HuggingFaceStorageReader(str(checkpoint.folder))
            load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except (CheckpointException, RuntimeError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1][:200] if str(error).strip() else type(error).__name__
        raise StoreError(f"the checkpoint does not fit: {reason}", where=str(checkpoint.folder)) from error


def prune(folder: Path, keep: int, best: int | None, newest: int | None = None) -> None:
    """Removes all but the newest ``keep`` checkpoints and the one of step ``best``; also those after step ``newest``."""
    if not _first():
        return
    places = sorted(folder.glob(f"{PREFIX}*"))
    late = [place for place in places if newest is not None and int(place.name.removeprefix(PREFIX)) > newest]
    early = [place for place in places if place not in late][:-keep]
    for place in (*late, *early):
        if place.name != f"{PREFIX}{best or 0:08d}":
            shutil.rmtree(place)


def _tensors(method: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All state by name; moments by the number of their parameter in the optimiser's order, which follows from the settings."""
    tensors = {f"method.{name}": tensor for name, tensor in method.state_dict().items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in optimizer.state[parameter].items()}
    return tensors


def _first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_whole(place: Path, state: dict[str, Any]) -> bool:
    return all((place / name).is_file() and _digest(place / name) == digest for name, digest in state["files"].items())
