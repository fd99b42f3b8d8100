"""Device, threads and seeds: how the work is done, which must not change what comes out."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.utils.deterministic

from pathfm.errors import UsageError
from pathfm.study import ComputeSettings
from pathfm.workers import usable_cores as usable_cores


def pick_device(settings: ComputeSettings) -> torch.device:
    """The device named in the settings; ``auto`` is the first GPU if there is one, else the CPU.

    Raises:
        UsageError: the name is not a device, or there is no such device here.
    """
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}", where="compute.device", fix="use auto, cpu, cuda or cuda:N") from error
    if device.type not in {"cpu", "cuda"}:
        raise UsageError(f"device {name!r} is not supported", where="compute.device", fix="use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        present = ", ".join(["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])
        raise UsageError(f"no device {name!r} here", where="compute.device", fix=f"use one of: {present}")
    return device


def device_names(settings: ComputeSettings) -> list[str]:
    """Names of the devices that ``compute.devices`` asks for: so many GPUs, or processes on a CPU.

    Raises:
        UsageError: there are not so many GPUs here.
    """
    first = pick_device(settings)
    present = torch.cuda.device_count()
    if first.type == "cpu":
        return ["cpu"] * min(max(1, settings.devices), usable_cores())
    if settings.devices == 1:
        return [str(first)]
    if settings.devices > present:
        raise UsageError(
            f"{settings.devices} GPUs are asked for, {present} are here", where="compute.devices", fix="use 0: all"
        )
    return [f"cuda:{index}" for index in range(settings.devices or present)]


def use_threads(settings: ComputeSettings) -> int:
    """Sets how many threads the tensor library uses, and returns it."""
    threads = settings.threads or usable_cores()
    torch.set_num_threads(threads)
    return threads


def seed_everything(seed: int) -> None:
    """Seeds every generator and asks for algorithms that repeat bit for bit.

    On a GPU a few operations have no such algorithm (bicubic resizing backwards); they run, and only there may a rerun differ
    in the last bits.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True)
        # Repeating needs no filling of fresh memory, which is meant for finding bugs and takes a fifth of a step.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
