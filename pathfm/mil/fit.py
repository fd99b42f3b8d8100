"""Training of all networks of all folds in one pass of the bags per epoch, and how a network is asked.

Legend: B bags, N tiles of a bag, O outputs, T targets, Q queries, H slide vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathfm.errors import SlideError
from pathfm.log import track
from pathfm.mil.aggregators.contract import Packed
from pathfm.mil.bags import Bag, Bags
from pathfm.mil.learner import Course, FoldJob, FoldLearner
from pathfm.mil.member import EpochLoss, Fitted
from pathfm.mil.network import Network
from pathfm.mil.passes import Reader, one_thread, run_passes, worker_threads
from pathfm.mil.tasks import TaskSet
from pathfm.mil_settings import MilSettings
from pathfm.models.processor import cpu_has_bf16

__all__ = ["CPU", "Answer", "EpochLoss", "Fitted", "FoldJob", "Machine", "ask", "fit_folds", "one_thread", "worker_threads"]

CPU = torch.device("cpu")
SMALL_BAG_TILES = 200
"""Where bags have fewer tiles, what half precision saves on a CPU is lost in its many small steps."""
ASK_TILES = 4096
"""Tiles that are embedded together when a network is asked: bags of any size then need memory for their embedding only."""


@dataclass(frozen=True)
class Machine:
    """What training runs on.

    Attributes:
        device: where networks are.
        workers: threads that train folds or help those that do, one core each; has no part in what comes out.
    """

    device: torch.device = CPU
    workers: int = 1


@dataclass(frozen=True)
class Answer:
    """What a network says of one bag.

    Attributes:
        output_O: of the heads.
        attention_NQ: sums to 1 over the tiles for each query; None where the aggregator has none of its own.
        logit_NQ: attention before the softmax.
        slide_H: the slide vector.
    """

    output_O: NDArray[np.float64]
    attention_NQ: NDArray[np.float64] | None
    logit_NQ: NDArray[np.float64] | None
    slide_H: NDArray[np.float64]


def fit_folds(
    bags: Bags,
    target_BT: NDArray[np.float64],
    tasks: TaskSet,
    jobs: Sequence[FoldJob],
    settings: MilSettings,
    done: Callable[[FoldJob, list[Fitted]], None],
    machine: Machine = Machine(),
) -> None:
    """Trains all members of all folds; each bag is read and cast once per epoch, however many networks learn from it.

    AdamW with a cosine; the epoch with the lowest loss on the validation part is kept. All chance comes from ``settings.seed``
    (order of the bags, tiles drawn from them) and the seeds of the members; a fold comes out the same to the last bit whatever
    other folds are trained beside it and in however many threads. Each worker computes on one core.

    Args:
        bags: all bags; those in no part of a job are not read.
        target_BT: of all bags.
        tasks: what is learned.
        jobs: folds to train.
        settings: how.
        done: is called in this thread as each fold finishes, so that it can be saved.
        machine: where.

    Raises:
        TrainingError: a loss is not finite, or a fold has nothing to learn from or to stop by.
    """
    dtype = training_dtype(settings, machine.device, bags.lengths)
    course = Course(bags, target_BT, tasks, settings, machine.device, dtype)
    reader = Reader(bags, settings.seed, settings.max_bag_tiles, dtype, machine.device)

    def over(learner: FoldLearner) -> None:
        done(learner.job, learner.fitted())

    passes = run_passes(reader, [FoldLearner(job, course) for job in jobs], machine.workers, over)
    for _ in track(passes, "mil: passes over the bags", settings.epochs + 1):
        pass


def training_dtype(settings: MilSettings, device: torch.device, lengths: Sequence[int]) -> torch.dtype:
    """The precision of training; auto is bf16 where the device computes it itself, on a CPU only if bags are not small.

    The lengths are those of all bags, whoever learns from them, so that a fold is the same beside any others.
    """
    precision = settings.precision
    if precision == "auto" and device.type == "cpu":
        typical = min(float(np.median(lengths)), settings.max_bag_tiles or math.inf)
        precision = "bf16" if typical >= SMALL_BAG_TILES and cpu_has_bf16() else "fp32"
    elif precision == "auto":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def ask(network: Network, bag: Bag, device: torch.device = CPU) -> Answer:
    """What a network says of a bag, alone, in fp32, in eval mode: the only way networks are asked.

    Raises:
        SlideError: the bag has no tiles.
    """
    if not len(bag.feature_ND):
        raise SlideError("a bag without tiles cannot be classified", fix="see what became of its slides in tiling")
    network.to(device).eval()
    with torch.inference_mode():
        parts = [network.embed(part_ND.to(device).float()) for part_ND in torch.split(bag.feature_ND, ASK_TILES)]
        tile_NH = torch.cat(parts)
        packed = Packed(tile_NH, (len(tile_NH),), bag.xy_N2.to(device))
        pooled = network.pool(tile_NH, packed)
    attention_NQ, logit_NQ = (None if value is None else _plain(value) for value in (pooled.attention_NQ, pooled.logit_NQ))
    return Answer(_plain(pooled.output_BO[0]), attention_NQ, logit_NQ, _plain(pooled.slide_BH[0]))


def _plain(value: Tensor) -> NDArray[np.float64]:
    values: NDArray[np.float64] = value.double().cpu().numpy()
    return values
