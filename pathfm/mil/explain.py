"""Which tiles speak for what was predicted: attention where there is some, else gradient x input; and whether that is so.

Attention comes from ``fit.ask``, which is how networks are asked for their predictions too; gradients come from the same
network, in the same mode, on the same bag, and give back the same outputs. What a picture explains is what was predicted.

Legend: N tiles, D feature length, H width, O outputs of a network, C maps, Q queries, K steps of a curve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pathfm.mil.aggregators.contract import Packed
from pathfm.mil.bags import Bag
from pathfm.mil.fit import ASK_TILES, CPU, ask
from pathfm.mil.heatmap import Kind
from pathfm.mil.network import Network
from pathfm.mil.tasks.contract import State, Task
from pathfm.mil.tasks.task_set import TaskSet

Floats = NDArray[np.float64]

STEPS, REPEATS = 20, 5
"""Points of a deletion or insertion curve, and random orders they are compared with."""


@dataclass(frozen=True)
class Explained:
    """Scores of the tiles of a bag, mean over the networks of an ensemble.

    Attributes:
        value_NC: attention, summing to 1 in each map; or gradient x input, positive where a tile speaks for the map's name.
        names: of the maps; "" for the only map of attention.
        kind: what the values are.
        logit_NC: of attention, before the softmax.
        main: number of the map that stands for all: of the positive class, where that has one.
    """

    value_NC: Floats
    names: tuple[str, ...]
    kind: Kind
    logit_NC: Floats | None = None
    main: int = 0


class Gradient(NamedTuple):
    """Gradient x input of the tiles [N, C], and the outputs [O] that it explains."""

    score_NC: Floats
    output_O: Floats


class Said(Protocol):
    """What ``ask`` gives of a bag, or the mean of several answers."""

    @property
    def attention_NQ(self) -> Floats | None:
        """Sums to 1 for each query; None without attention."""

    @property
    def logit_NQ(self) -> Floats | None:
        """The same before the softmax."""


class Trained(Protocol):
    """A network and what its tasks fitted besides."""

    @property
    def network(self) -> Network:
        """Trained."""

    @property
    def states(self) -> Mapping[str, State]:
        """By task name."""


def tile_scores(said: Said, members: Sequence[Trained], bag: Bag, tasks: TaskSet, device: torch.device = CPU) -> Explained:
    """What an ensemble looked at when it said this of a bag, for the main task: its attention, else gradient x input.

    Raises:
        SlideError: the bag has no tiles.
    """
    if said.attention_NQ is None:
        return gradient_maps([member.network for member in members], bag, tasks, device)
    return attention_maps(said.attention_NQ, said.logit_NQ, tasks)


def attention_maps(attention_NQ: Floats, logit_NQ: Floats | None, tasks: TaskSet) -> Explained:
    """Attention as maps: one, or one per output of the main task where every output has its own."""
    if attention_NQ.shape[1] == 1:
        return Explained(attention_NQ, ("",), "attention", logit_NQ)
    place = tasks.slice_of(tasks.main).outputs
    logit_NC = None if logit_NQ is None else logit_NQ[:, place]
    names = _output_names(tasks.main)
    return Explained(attention_NQ[:, place], names, "attention", logit_NC, _main(tasks.main, names))


def gradient_maps(networks: Sequence[Network], bag: Bag, tasks: TaskSet, device: torch.device = CPU) -> Explained:
    """Mean gradient x input of networks for the main task: one map per class, or one of what is predicted.

    Of two classes only the positive one has a map, since the other is its negative.

    Raises:
        SlideError: the bag has no tiles.
    """
    names, direction_CO = directions(tasks)
    found = [gradient_x_input(network, bag, direction_CO, device).score_NC for network in networks]
    return Explained(np.mean(found, axis=0), names, "gradient x input", main=_main(tasks.main, names))


def directions(tasks: TaskSet) -> tuple[tuple[str, ...], Floats]:
    """Names of the main task's maps, and for each the sum of outputs [C, O] that rises with it.

    For classes that exclude each other this is the class's logit less the mean of the others', since only differences of
    logits matter; ordinal tasks and survival have one map, of all outputs together (higher; more risk).
    """
    task, place = tasks.main, tasks.slice_of(tasks.main).outputs
    if task.kind in {"binary", "multiclass"}:
        count = len(task.classes)
        own_CO = (np.eye(count) * count - 1) / max(1, count - 1)
        names: tuple[str, ...] = task.classes
        if count == 2:
            own_CO, names = own_CO[[task.positive]], (names[task.positive],)
    elif task.kind == "multilabel":
        own_CO, names = np.eye(task.outputs), task.classes
    else:
        risk = {"cox": "risk", "discrete": "risk", "ordinal": task.classes[-1] if task.classes else ""}
        own_CO, names = np.ones((1, task.outputs)), (risk.get(task.kind, task.name),)
    direction_CO = np.zeros((len(own_CO), tasks.outputs))
    direction_CO[:, place] = own_CO
    return names, direction_CO


def gradient_x_input(network: Network, bag: Bag, direction_CO: Floats, device: torch.device = CPU) -> Gradient:
    """Gradient of sums of outputs times the input, summed over the features of each tile; in eval mode and fp32.

    The input is how a feature differs from the mean training tile, so a tile like that has 0. The network's first layer is
    linear, hence the sum is the same behind it, where tiles are narrower.

    Args:
        network: it is put in eval mode.
        bag: one bag.
        direction_CO: the sums, one backward pass each.
        device: where to compute.

    Raises:
        SlideError: the bag has no tiles.
    """
    network = network.to(device).eval()
    with torch.no_grad():
        tile_NH = torch.cat([network.embed(part_ND.to(device).float()) for part_ND in torch.split(bag.feature_ND, ASK_TILES)])
        input_NH = tile_NH - network.embed(network.mean_D[None])
    packed = Packed(tile_NH.requires_grad_(), (len(tile_NH),), bag.xy_N2.to(device))
    with torch.enable_grad():
        output_O = network.pool(packed.tile_NH, packed).output_BO[0]
        sums_C = torch.from_numpy(direction_CO).to(output_O) @ output_O
    scores = []
    for sum_ in sums_C:
        (slope_NH,) = torch.autograd.grad(sum_, tile_NH, retain_graph=True, materialize_grads=True)
        scores.append((slope_NH * input_NH).sum(dim=1))
    score_NC = torch.stack(scores, dim=1).double().cpu().numpy()
    return Gradient(score_NC, output_O.detach().double().cpu().numpy())


class Curves(NamedTuple):
    """What becomes of a prediction as tiles are taken away.

    Attributes:
        kept_K: numbers of tiles that are left, from 1 to all.
        deletion_K: prediction when the highest tiles are gone and so many are left.
        insertion_K: prediction from so many highest tiles alone.
        random_K: prediction from so many tiles drawn at random, mean of all draws.
        deletion_area: mean height of the curve over the share of tiles left; below ``random_area``: the scores find tiles that
            matter.
        insertion_area: the same; above ``random_area``: these tiles are enough.
        random_area: the same.
    """

    kept_K: tuple[int, ...]
    deletion_K: tuple[float, ...]
    insertion_K: tuple[float, ...]
    random_K: tuple[float, ...]
    deletion_area: float
    insertion_area: float
    random_area: float

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self._asdict().items()}


def deletion_insertion(
    predict: Callable[[NDArray[np.int64]], float], score_N: Floats, seed: int, steps: int = STEPS, repeats: int = REPEATS
) -> Curves:
    """Asks for the prediction again with tiles taken out of the bag by score, and at random (Petsiuk et al. 2018).

    Bags cannot be empty, so a curve begins at one tile. It costs (2 + repeats) x (steps + 1) predictions, whatever the bag.

    Args:
        predict: the prediction from the tiles of these numbers, which are ascending.
        score_N: the highest go first; of equal ones those of lower number.
        seed: of the random orders.
        steps: stretches of the curves.
        repeats: random orders.
    """
    count = len(score_N)
    kept_K = np.unique(np.rint(np.linspace(1, count, min(steps, count) + 1)).astype(np.int64))
    order_N = np.argsort(-score_N, kind="stable")
    rng = np.random.default_rng(seed)

    def curve(order_N: NDArray[np.int64]) -> Floats:
        return np.array([predict(np.sort(order_N[:kept])) for kept in kept_K])

    deletion_K, insertion_K = curve(order_N[::-1]), curve(order_N)
    random_K = np.mean([curve(rng.permutation(count)) for _ in range(repeats)], axis=0)
    areas = [_mean_height(kept_K, value_K) for value_K in (deletion_K, insertion_K, random_K)]
    curves = [tuple(value_K.tolist()) for value_K in (deletion_K, insertion_K, random_K)]
    return Curves(tuple(kept_K.tolist()), curves[0], curves[1], curves[2], areas[0], areas[1], areas[2])


def asked_again(
    members: Sequence[Trained], bag: Bag, tasks: TaskSet, column: int, device: torch.device = CPU
) -> Callable[[NDArray[np.int64]], float]:
    """For ``deletion_insertion``: the ensemble's prediction, a column of ``tasks.columns``, from some tiles of a bag."""

    def predict(kept: NDArray[np.int64]) -> float:
        rows = torch.from_numpy(kept)
        part = Bag(bag.feature_ND[rows], bag.xy_N2[rows])
        said = [tasks.predict(ask(member.network, part, device).output_O[None], member.states) for member in members]
        return float(np.mean(said, axis=0)[0, column])

    return predict


def _mean_height(kept_K: NDArray[np.int64], value_K: Floats) -> float:
    width = kept_K[-1] - kept_K[0]
    return float(np.trapezoid(value_K, kept_K) / width) if width else float(value_K[0])


def _main(task: Task, names: tuple[str, ...]) -> int:
    positive = task.classes[task.positive] if task.positive >= 0 else ""
    return names.index(positive) if positive in names else 0


def _output_names(task: Task) -> tuple[str, ...]:
    """What each output of a task stands for."""
    if len(task.classes) == task.outputs:
        return task.classes
    if len(task.classes) == task.outputs + 1:
        return tuple(f"above {name}" for name in task.classes[:-1])
    return tuple(f"{task.name} {number + 1}" for number in range(task.outputs)) if task.outputs > 1 else (task.name,)
