"""What holds for every aggregator: of the registry, of a user, and slide encoders."""

import re
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pathfm.errors import SlideError
from pathfm.mil.aggregators.contract import Packed
from pathfm.mil.aggregators.registry import AGGREGATORS, find_aggregator
from tests.mil.aggregators.examples import ATTENTION, DIM, FUNCTION, NAMES, OUTPUTS, Bag, bag, close, network, pack

LENGTHS = (1, 7, 40, 3, 2)


@pytest.fixture(params=NAMES, ids=lambda name: name.split(":")[-1])
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return network(name)


def test_bags_that_are_packed_together_are_as_they_are_alone(model):
    bags = [bag(length, seed) for seed, length in enumerate(LENGTHS)]
    together, alone = model(pack(*bags)), [model(pack(one)) for one in bags]
    close(together.output_BO, torch.cat([one.output_BO for one in alone]))
    close(together.slide_BH, torch.cat([one.slide_BH for one in alone]))
    if together.attention_NQ is not None:
        close(together.attention_NQ, torch.cat([one.attention_NQ for one in alone]))
        close(together.logit_NQ, torch.cat([one.logit_NQ for one in alone]))
    for mine, others in zip(together.side, zip(*(one.side for one in alone), strict=True), strict=True):
        close(mine.output_KO, torch.cat([other.output_KO for other in others]))
        assert mine.bag_K.tolist() == [place for place, other in enumerate(others) for _ in other.bag_K]


def _gradients(model, *packs):
    """Of the tiles, and of the weights, for the sum of squared outputs over all packs."""
    tiles = [packed.tile_NH.clone().requires_grad_() for packed in packs]
    model.zero_grad()
    for packed, tile_NH in zip(packs, tiles, strict=True):
        pooled = model(packed._replace(tile_NH=tile_NH))
        outputs = [pooled.output_BO, *(side.output_KO for side in pooled.side)]
        sum(output.square().sum() for output in outputs).backward()
    zero = [torch.zeros_like(tile) if tile.grad is None else tile.grad for tile in tiles]
    return torch.cat(zero), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_gradients_too_are_those_of_the_bags_alone(model):
    bags = [bag(length, seed) for seed, length in enumerate(LENGTHS)]
    tile_gradient, weight_gradients = _gradients(model, pack(*bags))
    tile_gradient_alone, weight_gradients_alone = _gradients(model, *(pack(one) for one in bags))
    pairs = [(tile_gradient, tile_gradient_alone), *zip(weight_gradients, weight_gradients_alone, strict=True)]
    largest = max(float(alone.abs().max()) for _, alone in pairs)
    for mine, alone in pairs:
        close(mine, alone, 1e-5 * max(1.0, largest))


def test_a_neighbour_of_extreme_values_changes_nothing(model):
    one, other = bag(5), bag(9, 2)
    beside = model(pack(one, Bag(other.tile_NH * 1e6, other.xy_N2)))
    close(beside.output_BO[:1], model(pack(one)).output_BO)


def test_gradients_of_a_bag_do_not_reach_its_neighbour(name, model):
    packed = pack(bag(4), bag(5, 2))
    tile_NH = packed.tile_NH.requires_grad_()
    model(packed).output_BO[0].sum().backward()
    if name == FUNCTION:  # frozen, and not of torch
        assert tile_NH.grad is None
        return
    assert tile_NH.grad[:4].abs().sum() > 0
    assert tile_NH.grad[4:].abs().sum() == 0


@pytest.mark.parametrize("tiles", [2, 60])
def test_the_order_of_the_tiles_has_no_part_in_it(model, tiles):
    one = bag(tiles)
    order = torch.randperm(tiles, generator=torch.Generator().manual_seed(2))
    stored, shuffled = model(pack(one)), model(pack(Bag(one.tile_NH[order], one.xy_N2[order])))
    close(stored.output_BO, shuffled.output_BO)
    if stored.attention_NQ is not None:
        close(stored.attention_NQ[order], shuffled.attention_NQ)


def test_positions_have_a_part_only_where_it_is_declared(name, model):
    one = bag(40)
    stored, moved = model(pack(one)), model(pack(Bag(one.tile_NH, one.xy_N2.flip(0))))
    is_same = torch.allclose(stored.output_BO, moved.output_BO, atol=1e-6)
    assert is_same or find_aggregator(name)[0].uses_positions
    if name in ("transmil", "dtfd", FUNCTION):
        assert not is_same


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (3, 500)])
def test_attention_sums_to_one_in_every_bag_or_is_declared_absent(name, model, lengths):
    pooled = model(pack(*(bag(length, seed) for seed, length in enumerate(lengths))))
    assert pooled.output_BO.shape == (len(lengths), OUTPUTS)
    assert torch.isfinite(pooled.output_BO).all()
    if name not in ATTENTION:
        assert pooled.attention_NQ is None
        assert pooled.logit_NQ is None
        return
    assert pooled.attention_NQ.shape == pooled.logit_NQ.shape == (sum(lengths), ATTENTION[name])
    for attention, logit in zip(pooled.attention_NQ.split(lengths), pooled.logit_NQ.split(lengths), strict=True):
        close(attention.double().sum(0), torch.ones(ATTENTION[name], dtype=torch.float64))
        close(logit.softmax(0), attention)


def test_a_tile_that_is_there_twice_does_what_is_declared(name, model):
    one = bag(30)
    twice = Bag(one.tile_NH.repeat(2, 1), one.xy_N2.repeat(2, 1))
    is_same = torch.allclose(model(pack(one)).output_BO, model(pack(twice)).output_BO, atol=1e-5)
    declared = find_aggregator(name)[0].duplicates
    assert declared in ("weight", "change")
    assert is_same or declared == "change"


@pytest.mark.parametrize("lengths", [[0], [3, 0], []])
def test_an_empty_bag_is_a_named_error(model, lengths):
    with pytest.raises(SlideError, match="without tiles"):
        model(Packed(torch.zeros(sum(lengths), DIM), tuple(lengths), torch.zeros(sum(lengths), 2)))


def test_lengths_that_do_not_add_up_are_refused(model):
    with pytest.raises(ValueError, match="add up"):
        model(Packed(torch.zeros(5, DIM), (2, 2), torch.zeros(5, 2)))


def test_a_network_that_is_asked_twice_says_the_same(name):
    model = network(name, dropout=0.5)
    packed = pack(bag(50), bag(3), noise=torch.Generator().manual_seed(0))
    assert torch.equal(model(packed).output_BO, model(packed).output_BO)


def test_chance_in_training_comes_from_the_noise_alone(name):
    model = network(name, dropout=0.5).train()
    packed = pack(bag(50), bag(3))
    one, two, other = (model(packed._replace(noise=torch.Generator().manual_seed(seed))).output_BO for seed in (0, 0, 1))
    assert torch.equal(one, two)
    if find_aggregator(name)[0].projected:
        assert not torch.equal(one, other)
    assert torch.equal(model(packed).output_BO, model.eval()(packed).output_BO)


def test_the_global_generator_is_neither_used_nor_moved(name):
    outputs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model = network(name, dropout=0.5).train()
        outputs.append(model(pack(bag(20), noise=torch.Generator().manual_seed(0))).output_BO)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*outputs)


def test_the_same_seed_draws_the_same_weights(name):
    one, two, other = (network(name, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_half_precision_is_close(name):
    model = network(name)
    packed = pack(bag(40), bag(1), class_B=torch.tensor([1, 0]), noise=torch.Generator().manual_seed(0))
    single = model(packed).output_BO
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        half = model(packed._replace(tile_NH=packed.tile_NH.half()))
        loss = half.output_BO.float().square().sum() + sum(side.output_KO.float().sum() for side in half.side)
        loss = loss + (0 if half.extra is None else half.extra)
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)
    if name != "dtfd":  # which draws other pseudo-bags in training
        torch.testing.assert_close(half.output_BO.float(), single, atol=0.1, rtol=0.1)


class HalfProducts(TorchDispatchMode):
    """Notes the shapes of all matrix products in bfloat16."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if re.search(r"mm|matmul|linear|attention|addmv|dot", function.name()) and tensors[-1].dtype is torch.bfloat16:
            self.shapes.add((function.name(), *(tensor.shape for tensor in tensors)))
        return function(*args, **(kwargs or {}))


def test_products_in_half_precision_have_few_shapes_on_a_cpu(name):
    """oneDNN keeps a megabyte for each, for good."""
    model, shapes = network(name, dropout=0.5).train(), []
    with HalfProducts() as products:
        for lengths in (range(2, 400, 9), range(3, 300, 14)):
            for length in lengths:
                _learn_in_half(model, pack(bag(length), bag(2 * length, 2), class_B=torch.tensor([1, 0])))
            shapes.append(set(products.shapes))
    assert shapes[1] == shapes[0]
    assert bool(shapes[-1]) == find_aggregator(name)[0].half_precision


def _learn_in_half(model, packed):
    tile_NH = model.embed(packed.tile_NH).detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        pooled = model.pool(tile_NH, packed._replace(noise=torch.Generator().manual_seed(0)))
    loss = sum(output.float().square().sum() for output in (pooled.output_BO, *(side.output_KO for side in pooled.side)))
    (loss if pooled.extra is None else loss + pooled.extra).backward()


def test_every_weight_can_learn(name):
    model = network(name).train()
    packed = pack(bag(40), bag(20, 2), class_B=torch.tensor([1, 0]), noise=torch.Generator().manual_seed(0))
    pooled = model(packed)
    loss = pooled.output_BO.square().sum() + sum(side.output_KO.square().sum() for side in pooled.side)
    (loss + (0 if pooled.extra is None else pooled.extra)).backward()
    # No softmax over tiles sees what is added to all of them.
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    silent = {key for key, gradient in gradients.items() if gradient is None or not gradient.abs().sum() > 1e-9}
    assert {key for key in silent if "score" not in key and "query" not in key} == set()


HEAVY = ("transmil", "transformer", "perceiver")


@pytest.mark.parametrize("large", [pytest.param(n, marks=pytest.mark.long if n in HEAVY else ()) for n in AGGREGATORS])
def test_a_bag_of_100_000_tiles(large):
    model = network(large, hidden=128, attention=64, dim=32)
    start = time.perf_counter()
    with torch.inference_mode():
        pooled = model(pack(bag(100_000, dim=32, columns=400)))
    assert time.perf_counter() - start < 60  # a guard against squares of N; a few seconds on one core
    assert torch.isfinite(pooled.output_BO).all()
    if pooled.attention_NQ is not None:
        close(pooled.attention_NQ.double().sum(0), torch.ones(pooled.attention_NQ.shape[1], dtype=torch.float64))
