"""One process that trains, or several: started here on this machine, by torchrun or SLURM on more. They compute the same.

Lightning brings the strategies (DDP, FSDP2) and knows the clusters; the training loop is ours.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import nn

from pathfm.compute import pick_device
from pathfm.errors import PathfmError, TrainingError, UsageError
from pathfm.study import ComputeSettings
from pathfm.workers import deaf

Shard = Callable[[nn.Module, Any], nn.Module]
"""Shards a network over a device mesh (FSDP2), in place, and returns it."""
RELAYED = (signal.SIGTERM, signal.SIGUSR1)
"""What the scheduler says to this process is told to those it has started."""


def process_rank() -> int:
    """Number of this process among those that torchrun or SLURM has started; 0 when nobody has."""
    environment = _launcher()
    return environment.global_rank() if environment else 0


def process_count(settings: ComputeSettings) -> int:
    """Processes that train together.

    Raises:
        UsageError: the settings want several nodes, which only torchrun or SLURM can start, or more GPUs than there are.
    """
    if environment := _launcher():
        return environment.world_size()
    if settings.nodes > 1:
        fix = "start one process per GPU with torchrun or srun"
        raise UsageError("several nodes need a launcher", where="compute.nodes", fix=fix)
    if settings.devices != 1 and settings.device.startswith("cuda:"):
        what = f"{settings.device} is one GPU, and compute.devices is {settings.devices}"
        raise UsageError(what, where="compute.device", fix="use cuda, and choose GPUs by CUDA_VISIBLE_DEVICES")
    present = torch.cuda.device_count() if pick_device(settings).type == "cuda" else settings.devices or 1
    if settings.devices > present:
        raise UsageError(f"there are {present} GPUs", where="compute.devices", fix=f"use at most {present}, or 0 for all")
    return settings.devices or present


def in_processes(work: Callable[..., None], settings: ComputeSettings, shard: Shard, *arguments: object) -> None:
    """Calls ``work(fabric, *arguments)`` in every process that trains, and returns when all are done.

    With one process it is this one. Under torchrun or SLURM each of theirs calls this. Else processes are started here: the
    first of them whose work raises a ``PathfmError`` raises it here too, the others are ended.

    Raises:
        TrainingError: a process ended without a word (killed, out of memory).
    """
    processes = process_count(settings)
    if processes == 1 or _launcher():
        work(_fabric(settings, shard), *arguments)
        return
    deaf(resource_tracker.ensure_running)
    context = multiprocessing.get_context("spawn")
    port, started, ends = _free_port(), [], []
    for rank in range(processes):
        end, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_enter, args=(theirs, rank, processes, port, work, (settings, shard, arguments)))
        process.start()
        theirs.close()
        started.append(process)
        ends.append(end)
    with _relayed_to(started):
        try:
            _wait_for(started, ends)
        finally:
            for process in started:
                process.kill()
                process.join()


def _wait_for(started: list[SpawnProcess], ends: list[Connection]) -> None:
    running = dict(enumerate(started))
    while running:
        wait([process.sentinel for process in running.values()])
        for rank in [rank for rank, process in running.items() if not process.is_alive()]:
            code = running.pop(rank).exitcode
            if code:
                what = f"process {rank} ended with {code}"
                raise _last_words(ends[rank]) or TrainingError(what, where="pretrain", fix="see the messages above")


def _last_words(end: Connection) -> BaseException | None:
    # The end of a pipe that nobody has written to counts as something to read.
    with suppress(EOFError):
        said = end.recv() if end.poll() else None
        return said if isinstance(said, BaseException) else None
    return None


def _enter(end: Connection, rank: int, world: int, port: int, work: Callable[..., None], rest: tuple[Any, ...]) -> None:
    """What a started process does: it takes the place that torchrun would give it."""
    settings, shard, arguments = rest
    threading.Thread(target=_end_with_parent, daemon=True).start()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "pathfm"}
    try:
        work(_fabric(settings, shard), *arguments)
    except (PathfmError, KeyboardInterrupt) as error:
        end.send(error)
        raise SystemExit(1) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _end_with_parent() -> None:
    """A killed parent can end nobody; and the same command would start others on the same folder."""
    parent = multiprocessing.parent_process()
    if parent:
        wait([parent.sentinel])
        os._exit(1)


def _fabric(settings: ComputeSettings, shard: Shard) -> Fabric:
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # it tells of every process that it has found
    # What torch recommends instead is not in all versions that we run with.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
    device, environment = pick_device(settings), _launcher()
    if environment is None or environment.world_size() == 1:
        devices: Any = [device.index or 0] if device.type == "cuda" else 1
        return Fabric(accelerator=device.type, devices=devices, plugins=[LightningEnvironment()])
    local = _processes_per_node(environment.world_size())
    strategy = (
        ModelParallelStrategy(shard, data_parallel_size=environment.world_size(), tensor_parallel_size=1)
        if settings.strategy == "fsdp"
        else DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    )
    nodes = environment.world_size() // local
    fabric = Fabric(accelerator=device.type, devices=local, num_nodes=nodes, strategy=strategy, plugins=[environment])
    fabric.launch()
    return fabric


def _processes_per_node(world: int) -> int:
    """Processes on each node, as torchrun or SLURM says.

    Raises:
        UsageError: SLURM was not told, or put different numbers on its nodes.
    """
    said = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE")
    nodes = int(os.environ.get("SLURM_NNODES", "1"))
    if (said is None and nodes > 1) or (said is not None and not said.isdigit()):
        raise UsageError("SLURM does not say how many processes a node has", where="srun", fix="use --ntasks-per-node")
    return int(said) if said else world


def _launcher() -> TorchElasticEnvironment | SLURMEnvironment | None:
    """Whoever has started this process as one of several. No requeueing of Lightning's: saving and exit code 75 are ours."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return SLURMEnvironment(auto_requeue=False)
    return None


@contextmanager
def _relayed_to(started: list[SpawnProcess]) -> Iterator[None]:
    def relay(number: int, _: object) -> None:
        for process in started:
            if process.pid and process.is_alive():
                os.kill(process.pid, number)

    before = {number: signal.signal(number, relay) for number in RELAYED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
