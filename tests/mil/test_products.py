"""Products over tiles: what plain torch gives, in few shapes whatever the lengths of the bags."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import linear as plain_linear

from pathfm.mil import products
from pathfm.mil.bags import Bags
from pathfm.mil.feature_cache import FeatureCache
from pathfm.mil.fit import CPU, FoldJob, Machine, fit_folds
from pathfm.mil.products import BLOCK_ROWS, TileLinear, linear, summed_product, weighted_sums
from pathfm.mil.tasks import make_tasks
from pathfm.mil_settings import MilSettings
from pathfm.store.feature_file import write_features

LENGTHS = [1, 63, 64, 65, 500, 1023, 1024, 1025, 2500]
DIM = 16


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(function, *values):
    leaves = [value.clone().requires_grad_() for value in values]
    result = function(*leaves)
    result.backward(drawn(*result.shape, dtype=result.dtype, seed=9))
    return [result.detach(), *(leaf.grad for leaf in leaves)]


def check(found, expected, digits):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        largest = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one.double(), other.double(), atol=largest * digits, rtol=digits)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("operands", ["layer", "sums"])
def test_products_and_their_gradients_are_those_of_torch(length, operands):
    x_NK = drawn(length, 24)
    values = (x_NK, drawn(8, 24, seed=1), drawn(8, seed=2)) if operands == "layer" else (drawn(length, 3, seed=1), x_NK)
    ours, plain = (linear, plain_linear) if operands == "layer" else (weighted_sums, lambda a, b: a.T @ b)
    expected = gradients(plain, *values)
    assert all(torch.equal(*pair) for pair in zip(gradients(ours, *values), expected, strict=True))
    rounded = [value.bfloat16() for value in values]
    with torch.autocast("cpu", torch.bfloat16):
        half = gradients(ours, *(value.float() for value in rounded))
    check(half, gradients(plain, *(value.double() for value in rounded)), 2**-7)
    check(gradients(ours, *rounded), [value.double() for value in half], 2**-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_many_tiles_are_exact_to_the_digits_of_their_blocks(dtype):
    """Added up in half precision, they would stop growing at 256."""
    assert summed_product(torch.ones(50_000, 2, dtype=dtype), torch.ones(50_000, 3, dtype=dtype)).unique().item() == 50_000


def test_a_layer_over_tiles_has_the_state_of_a_linear_layer():
    assert TileLinear(4, 2).state_dict().keys() == torch.nn.Linear(4, 2).state_dict().keys()
    assert TileLinear(4, 2)(drawn(7, 4)).shape == (7, 2)


def make_bags(folder, lengths, dim=DIM):
    """Bags of these lengths; in odd ones all tiles carry a signal."""
    folder.mkdir(exist_ok=True)
    rng, cache = np.random.default_rng(0), FeatureCache(10**9, folder / "scratch")
    for number, length in enumerate(lengths):
        feature_ND = rng.normal(0.5 * (number % 2), 1, (length, dim)).astype(np.float16)
        write_features(folder / f"{number}.h5", feature_ND, np.zeros((length, 2), np.int64), {"fingerprint": "f"})
        cache.add(str(number), folder / f"{number}.h5")
    return Bags(cache, [(str(number),) for number in range(len(lengths))])


def train(bags, **changes):
    """Two folds of two networks; the last quarter of the bags is for validation."""
    small = {"hidden": 12, "attention": 6, "epochs": 2, "precision": "bf16", "max_bag_tiles": 900, "heads": 2}
    mil, count = MilSettings(**{**small, **changes}), len(bags)
    rows = [{"label": "pos" if number % 2 else "neg"} for number in range(count)]
    tasks, fitted = make_tasks(mil, rows), []
    held = tuple(range(3 * count // 4, count))
    jobs = [FoldJob(fold, tuple(range(fold * 4, held[0])), held, (1, 2)) for fold in range(2)]
    fit_folds(bags, tasks.encode(rows), tasks, jobs, mil, lambda _, members: fitted.extend(members), Machine(CPU, 2))
    return fitted


def test_bags_of_many_lengths_take_few_shapes(tmp_path, monkeypatch):
    """Each new shape would cost a megabyte for good."""
    seen, product = set(), products.block_product

    def noted(a, b, *rest):
        seen.add((a.dtype, a.shape, b.shape, a.stride(), b.stride()))
        return product(a, b, *rest)

    monkeypatch.setattr(products, "block_product", noted)
    bags = make_bags(tmp_path, [1 + number * 37 % 1511 for number in range(200)])
    assert len(set(bags.lengths)) == 200
    train(bags)
    # Of the first layer and the two of the attention, the mean: forwards, weights, tiles; full and filled blocks.
    assert len(seen) <= 9 * 2 * len(BLOCK_ROWS)
    assert all(dtype is torch.bfloat16 for dtype, *_ in seen)


@pytest.mark.parametrize("aggregator", ["abmil", "dsmil"])
def test_training_in_blocks_is_training(tmp_path, monkeypatch, aggregator):
    bags = make_bags(tmp_path, [1 + number * 97 % 1511 for number in range(24)])
    fitted, single = (train(bags, aggregator=aggregator, precision=precision) for precision in ("bf16", "fp32"))
    monkeypatch.setattr(products, "_blocks", lambda x_NK: [(0, len(x_NK))])
    whole = train(bags, aggregator=aggregator)
    for mine, other, exact in zip(fitted, whole, single, strict=True):
        np.testing.assert_allclose(np.array(mine.curve), np.array(other.curve), atol=2e-3)
        np.testing.assert_allclose(np.array(mine.curve), np.array(exact.curve), atol=1e-2)


@pytest.mark.long
@pytest.mark.parametrize("aggregator", ["abmil", "transmil", "dtfd"])
def test_memory_does_not_grow_with_the_number_of_lengths(tmp_path, aggregator):
    """In a process of its own, which notes its memory [MB] after training on few bags, and after many."""
    script = (
        "import sys; from pathlib import Path; from tests.mil.test_products import grown_mb;"
        "print(grown_mb(Path(sys.argv[1]), sys.argv[2]))"
    )
    command = [sys.executable, "-c", script, str(tmp_path), aggregator]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[2])
    assert float(done.stdout) < 150


def grown_mb(folder, aggregator):
    """Growth of a process's memory [MB] by 1,000 bags of 1,000 lengths, after two dozen other ones."""
    few = make_bags(folder / "few", [40 + 50 * number for number in range(24)], 64)
    many = make_bags(folder / "many", [1 + number for number in range(1000)], 64)
    changes = {"hidden": 64, "attention": 32, "epochs": 1, "max_bag_tiles": None, "aggregator": aggregator}
    train(few, **changes)
    before_mb = _memory_mb()
    train(many, **changes)
    return _memory_mb() - before_mb


def _memory_mb():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def test_helpers_make_the_blocks_and_change_no_bit(monkeypatch):
    values = drawn(5000, 512), drawn(256, 512, seed=1), drawn(256, seed=2)
    makers, made = set(), products.block_product

    def watched(*arguments):
        makers.add(threading.get_ident())
        return made(*arguments)

    def results():
        makers.clear()
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(linear, *values)
        with torch.inference_mode():
            found.append(products.rows_product(values[0].bfloat16(), values[1].bfloat16().T, values[2].bfloat16()))
        return found, len(makers)

    monkeypatch.setattr(products, "block_product", watched)
    alone, by_one = results()
    with products.helpers(2):
        helped, by_many = results()
    again, by_one_again = results()
    assert by_one == by_one_again == 1 < by_many
    assert all(torch.equal(*pair) for found in (helped, again) for pair in zip(alone, found, strict=True))


def test_what_fails_with_a_helper_fails_here(monkeypatch):
    def refuse(*_):
        raise ValueError("no memory")

    monkeypatch.setattr(products, "block_product", refuse)
    with products.helpers(1), pytest.raises(ValueError, match="no memory"):
        products.rows_product(drawn(4096, 512).bfloat16(), drawn(512, 256).bfloat16())
