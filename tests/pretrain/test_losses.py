"""The losses against golden numbers, against a second library, and against themselves written out slowly."""

import math

import numpy as np
import pytest
import torch

from pathfm.pretrain import losses

B, L, K, STUDENT_T, TEACHER_T = 6, 4, 64, 0.1, 0.05
TERMS = 2 + 2 * L


@pytest.fixture(scope="module")
def file(golden):
    with np.load(golden / "dinov2_losses.npz") as content:
        return {name: content[name] for name in content.files}


def tensor(array, grad=False):
    return torch.tensor(np.asarray(array), dtype=torch.float32, requires_grad=grad)


def close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(found.detach()), np.asarray(expected), rtol=tolerance, atol=tolerance)


def test_dino_with_softmax_centring_matches_the_golden_values_and_gradients(file):
    teacher = tensor(file["dino/teacher_logits"])
    center = tensor(file["dino/center_before"])[0]
    targets = losses.softmax_targets(teacher, center, TEACHER_T).view(2, B, K)
    close(targets.flip(0), file["dino/softmax_center_targets_swapped"])
    close(losses.updated_center(center, teacher), file["dino/center_after"][0])
    seen, local = tensor(file["dino/student_global_logits"], True), tensor(file["dino/student_local_logits"], True)
    loss_global = losses.dino_loss_paired(seen.view(2, B, K), targets.flip(0), STUDENT_T) / TERMS
    loss_local = losses.dino_loss(local.view(L, B, K), targets, STUDENT_T) / TERMS
    close(loss_global, file["dino/loss_global"])
    close(loss_local, file["dino/loss_local"])
    (loss_global + loss_local).backward()
    close(seen.grad, file["dino/grad_student_global"])
    close(local.grad, file["dino/grad_student_local"])


def test_sinkhorn_matches_the_golden_targets(file):
    found = losses.sinkhorn_targets(tensor(file["dino/teacher_logits"]), TEACHER_T)
    close(found.view(2, B, K).flip(0).flatten(0, 1), file["dino/sinkhorn_targets_swapped"])
    close(losses.sinkhorn_targets(tensor(file["ibot/teacher_logits"]), TEACHER_T), file["ibot/sinkhorn_targets"])


@pytest.mark.parametrize(
    ("targets", "loss"), [("softmax_center_targets", "loss_softmax_center"), ("sinkhorn_targets", "loss_sinkhorn")]
)
def test_ibot_matches_the_golden_values(file, targets, loss):
    masks = torch.tensor(file["ibot/masks"]).flatten(1)
    weight = (1 / masks.sum(1, keepdim=True).clamp(min=1)).expand_as(masks)[masks]
    student = tensor(file["ibot/student_logits"], True)
    found = losses.ibot_loss(student, tensor(file[f"ibot/{targets}"]), weight, 2 * B, STUDENT_T)
    close(found, file[f"ibot/{loss}"])
    if targets == "softmax_center_targets":
        found.backward()
        close(student.grad, file["ibot/grad_student"])


def test_koleo_matches_the_golden_value_and_gradient(file):
    features = tensor(file["koleo/x"], True)
    loss = losses.koleo_loss(features)
    close(loss, file["koleo/loss"])
    loss.backward()
    close(features.grad, file["koleo/grad"])


@pytest.fixture
def random():
    return torch.Generator().manual_seed(1)


def test_dino_is_the_mean_cross_entropy_over_images_summed_over_pairs(random):
    student, teacher = torch.randn(3, 4, 5, generator=random), torch.randn(2, 4, 5, generator=random)
    targets = losses.softmax_targets(teacher, torch.zeros(5), 1.0)

    def cross_entropy(view, target):
        log_softmax = [[z - math.log(sum(math.exp(y) for y in row)) for z in row] for row in (view / 0.5).tolist()]
        return -sum(t * z for ts, zs in zip(target.tolist(), log_softmax, strict=True) for t, z in zip(ts, zs, strict=True)) / 4

    close(losses.dino_loss(student, targets, 0.5), sum(cross_entropy(s, t) for s in student for t in targets))
    close(losses.dino_loss_paired(student[:2], targets, 0.5), sum(cross_entropy(student[i], targets[i]) for i in (0, 1)))


def test_sinkhorn_gives_every_row_one_and_every_prototype_the_same(random):
    targets = losses.sinkhorn_targets(torch.randn(40, 8, generator=random), 0.5, iterations=50)
    close(targets.sum(1), torch.ones(40))
    close(targets.sum(0), torch.full((8,), 40 / 8), 1e-3)


def test_sinkhorn_survives_logits_that_overflow_exp(random):
    logits = torch.randn(6, 8, generator=random) * 100
    assert torch.isfinite(losses.sinkhorn_targets(logits, 0.04)).all()
    close(losses.sinkhorn_targets(logits + 1e4, 5.0), losses.sinkhorn_targets(logits, 5.0), 1e-2)


def test_the_centre_is_a_moving_average():
    close(losses.updated_center(torch.zeros(2), torch.tensor([[1.0, 3.0], [3.0, 5.0]])), [0.2, 0.4])


def test_ibot_weighs_images_not_patches():
    # Two images, with one and with three masked patches, all wrong by the same amount: each image counts half.
    student, targets = torch.zeros(4, 2), torch.tensor([[1.0, 0.0]] * 4)
    weight = torch.tensor([1.0, 1 / 3, 1 / 3, 1 / 3])
    close(losses.ibot_loss(student, targets, weight, 2, 0.1), math.log(2))
    close(losses.ibot_loss(student[:0], targets[:0], weight[:0], 2, 0.1), 0.0)


def test_koleo_is_minus_the_log_of_the_nearest_distance(random):
    features = torch.nn.functional.normalize(torch.randn(5, 3, generator=random), dim=1)
    nearest = [min(math.dist(a, b) for j, b in enumerate(features.tolist()) if j != i) for i, a in enumerate(features.tolist())]
    close(losses.koleo_loss(3 * features), -sum(map(math.log, nearest)) / 5)


def test_koleo_pushes_neighbours_apart():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [-1.0, 0.2]], requires_grad=True)
    losses.koleo_loss(features).backward()
    moved = features.detach() - 0.01 * features.grad
    assert torch.isfinite(features.grad).all()
    assert losses.koleo_loss(moved) < losses.koleo_loss(features)


def test_entropy_is_log_k_when_uniform_and_zero_when_certain():
    close(losses.mean_entropy(torch.full((2, 8), 1 / 8)), math.log(8))
    close(losses.mean_entropy(torch.eye(8)), 0.0)


def test_a_second_library_agrees(random):
    oracle = pytest.importorskip("lightly.loss")
    teacher, student = torch.randn(2, 6, 16, generator=random), torch.randn(5, 6, 16, generator=random)
    targets = losses.softmax_targets(teacher, torch.zeros(16), TEACHER_T)
    both = losses.dino_loss(student[2:], targets, STUDENT_T) + losses.dino_loss_paired(student[:2], targets.flip(0), STUDENT_T)
    reference = oracle.DINOLoss(16, teacher_temp=TEACHER_T, warmup_teacher_temp_epochs=1, student_temp=STUDENT_T)
    close(both / 8, reference(list(teacher), list(student), teacher_temp=TEACHER_T))
    close(losses.updated_center(torch.zeros(16), teacher.flatten(0, 1)), reference.center.flatten())
    mask = torch.rand(4, 3, 3, generator=random) > 0.5
    weight = (1 / mask.sum((1, 2), keepdim=True)).expand_as(mask)[mask]
    logits = torch.randn(2, len(weight), 16, generator=random)
    targets = losses.softmax_targets(logits[0], torch.zeros(16), TEACHER_T)
    reference = oracle.IBOTPatchLoss(16, teacher_temp=TEACHER_T, student_temp=STUDENT_T)
    close(losses.ibot_loss(logits[1], targets, weight, 4, STUDENT_T), reference(logits[0], logits[1], mask))
    close(losses.koleo_loss(student[0]), oracle.KoLeoLoss()(student[0]))
