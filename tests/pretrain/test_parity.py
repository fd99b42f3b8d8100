"""Golden numbers of the official losses and head, and the same losses of a second library."""

import json

import numpy as np
import pytest
import torch

from pathfm.pretrain import losses
from pathfm.pretrain.head import DinoHead
from tests.pretrain.conftest import tiny

GOLDEN = {"rtol": 2e-6, "atol": 2e-7}
"""What numbers computed in float32 allow."""
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Golden:
    """A file of golden numbers as float64 tensors."""

    def __init__(self, path):
        with np.load(path) as content:
            self._arrays = {name: content[name] for name in content.files}

    def __call__(self, name, grad=False):
        return torch.tensor(self._arrays[name], dtype=torch.float64, requires_grad=grad)

    def meta(self):
        return json.loads(str(self._arrays["meta"]))

    def part(self, prefix):
        return {name.removeprefix(prefix): self(name) for name in self._arrays if name.startswith(prefix)}


@pytest.fixture(scope="module")
def official(golden):
    return Golden(golden / "dinov2_losses.npz")


@pytest.fixture(scope="module")
def meta(official):
    return official.meta()


def close(found, expected, **tolerance):
    np.testing.assert_allclose(found.detach().numpy(), expected.detach().numpy(), **(tolerance or GOLDEN))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dino_with_softmax_centring(official, meta, dtype):
    images, prototypes, local_count = meta["B"], meta["K"], meta["L"]
    teacher, center_K = official("dino/teacher_logits").to(dtype), official("dino/center_before")[0].to(dtype)
    targets = losses.softmax_targets(teacher, center_K, meta["teacher_temp"]).view(2, images, prototypes)
    loose = {} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    close(targets.flip(0), official("dino/softmax_center_targets_swapped"), **loose)
    moved_K = losses.moved_center(center_K, losses.sum_of_rows(teacher), len(teacher), meta["center_momentum"])
    close(moved_K, official("dino/center_after")[0], **loose)

    seen = official("dino/student_global_logits").to(dtype).requires_grad_()
    local = official("dino/student_local_logits").to(dtype).requires_grad_()
    terms = 2 + 2 * local_count
    loss_global = losses.dino_loss_paired(seen.view(2, images, -1), targets.flip(0), meta["student_temp"]) / terms
    loss_local = losses.dino_loss(local.view(local_count, images, -1), targets, meta["student_temp"]) / terms
    (loss_global + loss_local).backward()
    close(loss_global, official("dino/loss_global"), **loose)
    close(loss_local, official("dino/loss_local"), **loose)
    close(seen.grad, official("dino/grad_student_global"), **loose)
    close(local.grad, official("dino/grad_student_local"), **loose)


def test_sinkhorn(official, meta):
    arguments = (meta["teacher_temp"], meta["sinkhorn_iterations"])
    found = losses.sinkhorn_targets(official("dino/teacher_logits"), *arguments)
    close(found.view(2, meta["B"], meta["K"]).flip(0).flatten(0, 1), official("dino/sinkhorn_targets_swapped"))
    close(losses.sinkhorn_targets(official("ibot/teacher_logits"), *arguments), official("ibot/sinkhorn_targets"))


@pytest.mark.parametrize(
    ("targets", "loss"), [("softmax_center_targets", "loss_softmax_center"), ("sinkhorn_targets", "loss_sinkhorn")]
)
def test_ibot(official, meta, targets, loss):
    masks = official("ibot/masks").bool().flatten(1)
    weight = (1 / masks.sum(1, keepdim=True).clamp(min=1)).expand_as(masks)[masks].double()
    student = official("ibot/student_logits", grad=True)
    found = losses.ibot_loss(student, official(f"ibot/{targets}"), weight, len(masks), meta["student_temp"])
    close(found, official(f"ibot/{loss}"))
    if targets == "softmax_center_targets":
        found.backward()
        close(student.grad, official("ibot/grad_student"))


def test_ibot_targets_are_softmax_targets_of_the_masked_patches(official, meta):
    center_K = torch.zeros(meta["K"], dtype=torch.float64)
    found = losses.softmax_targets(official("ibot/teacher_logits"), center_K, meta["teacher_temp"])
    close(found, official("ibot/softmax_center_targets"))


def test_koleo(official):
    features = official("koleo/x", grad=True)
    loss = losses.koleo_loss(features)
    loss.backward()
    close(loss, official("koleo/loss"))
    close(features.grad, official("koleo/grad"))


def test_the_head(official):
    head = DinoHead(32, tiny(head_hidden=48, head_bottleneck=16, prototypes=64)).double()
    head.load_state_dict(official.part("head/state/"))
    close(head(official("head/x")), official("head/out"))


@pytest.mark.parametrize(("variant", "negatives"), [("plain", "keep"), ("clip_both", "clip"), ("clip_teacher", "clip_anchor")])
def test_gram(golden, variant, negatives):
    official = Golden(golden / "gram_loss.npz")
    student = official("student", grad=True)
    loss = losses.gram_loss(student, official("teacher"), negatives)
    loss.backward()
    close(loss, official(f"{variant}/loss"))
    close(student.grad, official(f"{variant}/grad"))


@pytest.fixture
def library():
    return pytest.importorskip("lightly.loss", reason="lightly is not installed (it comes with the extra dev)")


@pytest.fixture
def random():
    return torch.Generator().manual_seed(1)


def drawn(random, *shape):
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def test_dino_of_a_second_library(library, random):
    teacher, student, center_K = drawn(random, 2, 6, 16), drawn(random, 5, 6, 16).requires_grad_(), 0.1 * drawn(random, 16)
    targets = losses.softmax_targets(teacher, center_K, 2**-4)
    both = losses.dino_loss(student[2:], targets, 0.1) + losses.dino_loss_paired(student[:2], targets.flip(0), 0.1)
    (gradient,) = torch.autograd.grad(both / 8, student)
    reference = library.DINOLoss(16, teacher_temp=2**-4, warmup_teacher_temp_epochs=1, student_temp=0.1).double()
    reference.center.copy_(center_K)
    expected = reference(list(teacher), list(student), teacher_temp=2**-4)  # exact in its float32
    close(both / 8, expected, **EXACT)
    close(gradient, torch.autograd.grad(expected, student)[0], **EXACT)
    rows = teacher.flatten(0, 1)
    close(losses.moved_center(center_K, losses.sum_of_rows(rows), len(rows)), reference.center.flatten(), **EXACT)


def test_ibot_of_a_second_library(library, random):
    mask = torch.rand(4, 3, 3, generator=random) > 0.5
    weight = (1 / mask.sum((1, 2), keepdim=True)).expand_as(mask)[mask].double()
    teacher, student = drawn(random, len(weight), 16), drawn(random, len(weight), 16).requires_grad_()
    targets = losses.softmax_targets(teacher, torch.zeros(16, dtype=torch.float64), 0.05)
    found = losses.ibot_loss(student, targets, weight, 4, 0.1)
    expected = library.IBOTPatchLoss(16, teacher_temp=0.05, student_temp=0.1).double()(teacher, student, mask)
    close(found, expected, rtol=1e-7)  # its weights are float32
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (found, expected)]
    close(*gradients, rtol=1e-6, atol=1e-9)


def test_koleo_of_a_second_library(library, random):
    features = drawn(random, 7, 12).requires_grad_()
    found, expected = losses.koleo_loss(features), library.KoLeoLoss()(features)
    close(found, expected, **EXACT)
    close(*(torch.autograd.grad(loss, features)[0] for loss in (found, expected)), **EXACT)
