"""The losses against themselves written out slowly, against finite differences, and spread over two processes."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import multiprocessing

from pathfm.pretrain import losses
from pathfm.pretrain.processes import gather_rows, process_count, sum_over_processes


@pytest.fixture
def random():
    return torch.Generator().manual_seed(1)


def drawn(random, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=random, dtype=dtype)


def distributions(random, *shape):
    return torch.softmax(drawn(random, *shape), dim=-1)


def close(found, expected, tolerance=1e-12):
    np.testing.assert_allclose(np.asarray(found.detach()), np.asarray(expected), rtol=tolerance, atol=tolerance)


def slow_cross_entropy(logits, targets, temperature):
    """Of one row, number by number."""
    scaled = [z / temperature for z in logits.tolist()]
    log_sum = math.log(sum(math.exp(z) for z in scaled))
    return -sum(p * (z - log_sum) for p, z in zip(targets.tolist(), scaled, strict=True))


def test_dino_is_the_mean_cross_entropy_over_images_summed_over_pairs(random):
    student, targets = drawn(random, 3, 4, 5), distributions(random, 2, 4, 5)

    def mean(view, target):
        return sum(slow_cross_entropy(*rows, 0.5) for rows in zip(view, target, strict=True)) / 4

    close(losses.dino_loss(student, targets, 0.5), sum(mean(s, t) for s in student for t in targets))
    close(losses.dino_loss_paired(student[:2], targets, 0.5), sum(mean(student[i], targets[i]) for i in (0, 1)))


def test_ibot_weighs_images_not_patches(random):
    # Two images, with one and with three masked patches: each image counts half.
    student, targets = drawn(random, 4, 6), distributions(random, 4, 6)
    rows = [slow_cross_entropy(*row, 0.1) for row in zip(student, targets, strict=True)]
    weight = torch.tensor([1.0, 1 / 3, 1 / 3, 1 / 3], dtype=torch.float64)
    close(losses.ibot_loss(student, targets, weight, 2, 0.1), (rows[0] + sum(rows[1:]) / 3) / 2)


def test_without_masked_patches_there_is_no_loss_and_no_gradient():
    student = torch.zeros(0, 6, requires_grad=True)
    loss = losses.ibot_loss(student, torch.zeros(0, 6), torch.zeros(0), 2, 0.1)
    loss.backward()
    assert loss == 0 and student.grad.shape == (0, 6)


def test_gradients_are_those_of_finite_differences(random):
    student, targets, weight = drawn(random, 3, 4, 7), distributions(random, 3, 4, 7), torch.rand(4, dtype=torch.float64)
    checked = {
        "local": lambda x: losses.dino_loss(x, targets[:2], 0.3),
        "paired": lambda x: losses.dino_loss_paired(x, targets, 0.3),
        "half a distribution": lambda x: losses.dino_loss_paired(x, targets / 2, 0.3),
        "patches": lambda x: losses.ibot_loss(x[0], targets[0], weight, 3, 0.3),
        "kde": lambda x: losses.kde_loss(x[0], 5.0),
        "gram": lambda x: losses.gram_loss(x, targets, "clip_anchor"),
        "features": lambda x: losses.feature_loss(x, targets),
    }
    for loss in checked.values():
        assert torch.autograd.gradcheck(loss, student.clone().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_arithmetic_is_float32_or_better_and_gradients_come_as_the_logits_did(random, dtype):
    student, targets = drawn(random, 3, 4, 50, dtype=torch.float32).to(dtype), distributions(random, 2, 4, 50).float()
    found, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    loss, expected = (losses.dino_loss(logits, targets, 0.1) for logits in (found, exact))
    loss.backward()
    expected.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.grad.dtype == dtype
    close(loss, expected.detach(), 1e-6)
    torch.testing.assert_close(found.grad, exact.grad.to(dtype), rtol=max(torch.finfo(dtype).eps, 5e-6), atol=1e-7)


def test_autocast_changes_nothing(random):
    logits, features = drawn(random, 2, 6, 40, dtype=torch.float32), drawn(random, 2, 8, 10, dtype=torch.float32)
    targets = torch.softmax(logits, dim=-1)
    calls = (
        partial(losses.softmax_targets, logits[0], torch.zeros(40), 0.1),
        partial(losses.sinkhorn_targets, logits[0], 0.1),
        partial(losses.dino_loss, logits, targets, 0.1),
        partial(losses.koleo_loss, features[0]),
        partial(losses.kde_loss, features[0], 5.0),
        partial(losses.gram_loss, features, features.flip(0)),
        partial(losses.feature_loss, features[0], features[1]),
    )
    for call in calls:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = call()
        assert torch.equal(low, call())


def test_pieces_change_nothing(random, monkeypatch):
    student, weight = drawn(random, 9, 32, dtype=torch.float32).requires_grad_(), torch.rand(9, generator=random)
    teacher = drawn(random, 9, 32, dtype=torch.float32)

    def everything():
        targets = losses.softmax_targets(teacher, torch.zeros(32), 0.1)
        loss = losses.ibot_loss(student, targets, weight, 4, 0.1)
        return targets, losses.sinkhorn_targets(teacher, 0.1), loss, torch.autograd.grad(loss, student)[0]

    whole = everything()
    monkeypatch.setattr(losses, "PIECE", {"cpu": 64})
    assert all(torch.equal(a, b) for a, b in zip(whole, everything(), strict=True))


def slow_sinkhorn(logits, temperature, iterations):
    shares = np.exp(np.asarray(logits) / temperature)
    shares /= shares.sum()
    for _ in range(iterations):
        shares /= shares.sum(axis=0, keepdims=True) * shares.shape[1]
        shares /= shares.sum(axis=1, keepdims=True) * shares.shape[0]
    return shares * len(shares)


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_scales_columns_then_rows(random, iterations):
    logits = drawn(random, 7, 5)
    close(losses.sinkhorn_targets(logits, 0.3, iterations), slow_sinkhorn(logits, 0.3, iterations))


def test_sinkhorn_gives_every_row_one_and_every_prototype_the_same(random):
    targets = losses.sinkhorn_targets(drawn(random, 40, 8), 0.5, iterations=200)
    close(targets.sum(1), np.ones(40))
    close(targets.sum(0), np.full(8, 40 / 8), 1e-6)


def test_sinkhorn_survives_logits_that_overflow_or_vanish_under_exp(random):
    logits = drawn(random, 6, 8, dtype=torch.float32)
    large = losses.sinkhorn_targets(100 * logits, 0.04)
    assert torch.isfinite(large).all()
    close(large.sum(1), np.ones(6), 1e-5)
    close(losses.sinkhorn_targets(logits + 1e3, 5.0), losses.sinkhorn_targets(logits, 5.0), 1e-3)
    logits[2] -= 1e4  # exp of this row against the largest logit is 0
    far = losses.sinkhorn_targets(logits, 0.04)
    assert torch.isfinite(far).all()
    close(far.sum(1), np.ones(6), 1e-5)


def test_sinkhorn_and_centre_take_no_rows():
    assert losses.sinkhorn_targets(torch.zeros(0, 5), 0.1).shape == (0, 5)
    center = torch.rand(5)
    assert torch.equal(losses.moved_center(center, torch.zeros(5), 0), center)


def test_the_centre_is_a_moving_average():
    close(losses.moved_center(torch.zeros(2), torch.tensor([4.0, 8.0]), 2), [0.2, 0.4], 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_are_summed_in_float32_or_better(random, dtype, monkeypatch):
    logits = drawn(random, 50, 6).to(dtype)
    monkeypatch.setattr(losses, "PIECE", {"cpu": 24})
    total = losses.sum_of_rows(logits)
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(total, logits.double().sum(dim=0), 1e-12 if dtype == torch.float64 else 1e-5)
    assert not losses.sum_of_rows(logits[:0]).any()


def test_koleo_is_minus_the_log_of_the_nearest_distance(random):
    features = torch.nn.functional.normalize(drawn(random, 5, 3), dim=1)
    nearest = [min(math.dist(a, b) for j, b in enumerate(features.tolist()) if j != i) for i, a in enumerate(features.tolist())]
    close(losses.koleo_loss(3 * features), -sum(map(math.log, nearest)) / 5, 1e-6)


def test_koleo_pushes_neighbours_apart():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [-1.0, 0.2]], requires_grad=True)
    losses.koleo_loss(features).backward()
    moved = features.detach() - 0.01 * features.grad
    assert losses.koleo_loss(moved) < losses.koleo_loss(features)


def test_kde_is_the_log_of_the_mean_kernel_over_all_others(random):
    unit = torch.nn.functional.normalize(drawn(random, 5, 3), dim=1).numpy()
    kernel = np.exp(4.0 * unit @ unit.T)
    expected = np.log((kernel.sum(axis=1) - np.diag(kernel)) / 4).mean()
    close(losses.kde_loss(2 * torch.tensor(unit), 4.0), expected)


def mean_cosine(features):
    unit = torch.nn.functional.normalize(features, dim=1)
    return float((unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)].mean())


def test_kde_is_lower_for_spread_vectors_and_its_steps_spread_them(random):
    # With the sign turned round, as one public code base has it, descent pulls all vectors together.
    spread = torch.nn.functional.normalize(drawn(random, 32, 16), dim=1)
    bundled = torch.nn.functional.normalize(spread + 2.0, dim=1)
    collapsed = spread[:1].expand(32, -1)
    values = [float(losses.kde_loss(features, 5.0)) for features in (spread, bundled, collapsed)]
    assert values == sorted(values) and values[2] == pytest.approx(5.0)
    features = bundled.clone().requires_grad_()
    cosines = [mean_cosine(features.detach())]
    for _ in range(10):
        (gradient,) = torch.autograd.grad(losses.kde_loss(features, 5.0), features)
        features = (features - 2.0 * gradient).detach().requires_grad_()
        cosines.append(mean_cosine(features.detach()))
    assert all(after < before for before, after in pairwise(cosines))
    assert cosines[-1] < cosines[0] - 0.2


@pytest.mark.parametrize("loss", [losses.koleo_loss, partial(losses.kde_loss, concentration=5.0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_duplicates_give_no_infinity(random, loss, dtype):
    features = drawn(random, 4, 8).to(dtype)
    features = torch.cat([features, features[:2]]).requires_grad_()
    value = loss(features)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(features.grad).all()
    assert float(features.grad.norm()) < 100


@pytest.mark.parametrize("loss", [losses.koleo_loss, partial(losses.kde_loss, concentration=5.0)])
def test_a_single_row_has_nothing_to_spread_from(loss):
    features = torch.ones(1, 4, requires_grad=True)
    loss(features).backward()
    assert loss(features) == 0 and not features.grad.any()


def test_gram_sees_similarities_not_directions_or_lengths(random):
    patches = drawn(random, 2, 9, 6)
    turn, _ = torch.linalg.qr(drawn(random, 6, 6))
    close(losses.gram_loss(patches, 3 * patches @ turn), 0.0)
    assert losses.gram_loss(patches, patches.roll(1, dims=1)) > 0.01
    with pytest.raises(RuntimeError, match="does not require grad"):
        losses.gram_loss(patches, patches.clone().requires_grad_()).backward()


def test_the_feature_loss_measures_angle_and_length(random):
    teacher = drawn(random, 5, 6)
    close(losses.feature_loss(teacher, teacher), 0.0)
    longer = losses.feature_loss(2 * teacher, teacher)
    close(longer, 0.1 * torch.nn.functional.smooth_l1_loss(2 * teacher, teacher))
    assert losses.feature_loss(-teacher, teacher) > 1.8 > longer > 0


def test_entropy_is_log_k_when_uniform_and_zero_when_certain():
    close(losses.mean_entropy(torch.full((2, 8), 1 / 8)), math.log(8), 1e-6)
    close(losses.mean_entropy(torch.eye(8)), 0.0)


PROTOTYPES, FEATURES, IMAGES, TEMPERATURE = 6, 5, 4, 0.2
PATCHES_OF = ([3, 0, 2, 1], [0, 0, 0, 0], [2, 2, 1, 4])
"""Masked patches per image in three rounds; halves of them differ, and once there are none at all."""


def of_two_processes(rank, halves):
    """Everything that one process returns which holds this part of the images: values, and gradients of a shared weight."""
    random = torch.Generator().manual_seed(7)
    weight_DK = drawn(random, FEATURES, PROTOTYPES).requires_grad_()
    mix_DD = drawn(random, FEATURES, FEATURES).requires_grad_()
    center_K, results = drawn(random, PROTOTYPES), {}
    images = slice(rank * IMAGES // halves, (rank + 1) * IMAGES // halves)
    for turn, counts in enumerate(PATCHES_OF):
        image_M = torch.repeat_interleave(torch.arange(IMAGES), torch.tensor(counts))
        mine = (image_M >= images.start) & (image_M < images.stop)
        student_MD, teacher_MK = (drawn(random, len(image_M), size)[mine] for size in (FEATURES, PROTOTYPES))
        weight_M = 1 / torch.tensor(counts, dtype=torch.float64)[image_M[mine]]
        center_K = losses.moved_center(center_K, losses.sum_of_rows(teacher_MK), len(teacher_MK))
        targets = {
            "softmax": losses.softmax_targets(teacher_MK, center_K, TEMPERATURE),
            "sinkhorn": losses.sinkhorn_targets(teacher_MK, TEMPERATURE),
        }
        results[f"center {turn}"] = center_K
        for name, targets_MK in targets.items():
            own = images.stop - images.start
            loss = losses.ibot_loss(student_MD @ weight_DK, targets_MK, weight_M, own, TEMPERATURE)
            results |= averaged(f"ibot {name} {turn}", loss, weight_DK)
    x_BD = drawn(random, IMAGES, FEATURES)[images]
    results |= averaged("koleo", losses.koleo_loss(x_BD @ mix_DD), mix_DD)
    results |= averaged("kde", losses.kde_loss(x_BD @ mix_DD, 5.0), mix_DD)
    return results


def averaged(name, loss, weight):
    """Means over the processes of a loss and of its gradient, as DDP averages gradients."""
    (gradient,) = torch.autograd.grad(loss, weight)
    return {
        name: sum_over_processes(loss.detach()) / process_count(),
        f"gradient of {name}": sum_over_processes(gradient) / process_count(),
    }


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    rows, first = gather_rows(torch.full((2, 3), float(rank)))
    results = of_two_processes(rank, 2) | {"rows": rows, "first": torch.tensor(first)}
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    multiprocessing.spawn(one_of_two, args=(tmp_path,), nprocs=2)
    expected = of_two_processes(0, 1)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(found.pop("rows"), torch.tensor([[0.0] * 3] * 2 + [[1.0] * 3] * 2))
        assert found.pop("first") == 2 * rank
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-12, atol=1e-12, err_msg=name)


def test_alone_a_process_has_all_rows():
    rows = torch.rand(3, 2)
    assert gather_rows(rows) == (rows, 0) and process_count() == 1
    assert sum_over_processes(rows) is rows
