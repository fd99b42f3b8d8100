"""Diagnostics: the identities they rest on, and their values where these are known."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from pathfm.pretrain import diagnostics
from pathfm.stats import probes


def targets(rows=6, prototypes=10, seed=0):
    return torch.randn(rows, prototypes, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(dim=-1)


def test_perplexity_is_1_when_prototypes_share_alike_and_1_over_k_when_one_has_all():
    assert float(diagnostics.perplexity_share(torch.eye(8))) == pytest.approx(1)
    assert float(diagnostics.perplexity_share(torch.full((3, 8), 1 / 8))) == pytest.approx(1)
    assert float(diagnostics.perplexity_share(torch.eye(8)[[2, 2, 2]])) == pytest.approx(1 / 8)
    assert float(diagnostics.perplexity_share(torch.eye(8)[[2, 5]])) == pytest.approx(2 / 8)


def test_prototype_use_equals_counting_over_the_window():
    use, window = diagnostics.PrototypeUse(50, 7), 7
    chosen = []
    for step in range(30):
        rows = targets(4, 50, seed=step)
        chosen.append(set(rows.argmax(dim=-1).tolist()))
        assert float(use(rows, step)) == pytest.approx(len(set().union(*chosen[-window:])) / 50)


def test_prototype_use_goes_on_from_its_state():
    use = diagnostics.PrototypeUse(50, 5)
    for step in range(10):
        use(targets(4, 50, seed=step), step)
    other = diagnostics.PrototypeUse(50, 5)
    other.load_state_dict(use.state_dict())
    assert float(other(targets(4, 50, seed=10), 10)) == float(use(targets(4, 50, seed=10), 10))


def test_relative_distance_is_that_of_all_weights_as_one_vector():
    teacher, student = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    ours, theirs = (torch.nn.utils.parameters_to_vector(net.parameters()).detach() for net in (teacher, student))
    found = diagnostics.relative_distance(teacher.parameters(), student.parameters())
    assert float(found) == pytest.approx(float((ours - theirs).norm() / theirs.norm()))
    assert not found.requires_grad
    assert float(diagnostics.relative_distance(teacher.parameters(), teacher.parameters())) == 0


def test_rankme_equals_the_plain_one_and_counts_directions():
    features = torch.randn(60, 12, generator=torch.Generator().manual_seed(0))
    assert float(diagnostics.rankme(features)) == pytest.approx(probes.rankme(features.numpy()), rel=1e-5)
    flat = torch.linalg.qr(features)[0][:, :4] @ torch.linalg.qr(features.T)[0][:4]
    assert float(diagnostics.rankme(flat)) == pytest.approx(4, rel=1e-3)
    assert float(diagnostics.rankme(torch.ones(20, 12))) == pytest.approx(1, rel=1e-3)


def test_token_statistics_equal_the_plain_ones():
    generator = torch.Generator().manual_seed(0)
    cls_ND, patches_NPD = torch.randn(5, 8, generator=generator), torch.randn(5, 9, 8, generator=generator)
    patches_NPD[1, 3] *= 40
    found = diagnostics.token_statistics(cls_ND, patches_NPD)
    norms = patches_NPD.norm(dim=-1)
    assert float(found.patch_norm) == pytest.approx(float(norms.median()))
    assert float(found.outliers) == pytest.approx(1 / 45)
    assert float(found.cls_norm) == pytest.approx(float(cls_ND.norm(dim=-1).mean()))
    pairs = [
        float(functional.cosine_similarity(patches_NPD[n, p], patches_NPD[n, q], dim=0))
        for n in range(5)
        for p in range(9)
        for q in range(9)
        if p != q
    ]
    assert float(found.patch_cosine) == pytest.approx(np.mean(pairs), abs=1e-6)
    to_cls = functional.cosine_similarity(cls_ND[:, None], patches_NPD, dim=-1)
    assert float(found.cls_patch_cosine) == pytest.approx(float(to_cls.mean()), abs=1e-6)


def test_collapsed_tokens_have_cosine_1():
    found = diagnostics.token_statistics(torch.ones(4, 6), torch.ones(4, 5, 6))
    assert float(found.patch_cosine) == pytest.approx(1)
    assert float(found.cls_cosine) == pytest.approx(1)
    assert float(found.outliers) == 0


def test_alignment_and_uniformity():
    axes = torch.eye(4)
    assert float(diagnostics.alignment(axes, 3 * axes)) == 0
    assert float(diagnostics.alignment(axes, -axes)) == pytest.approx(4)
    assert float(diagnostics.uniformity(torch.ones(4, 3))) == pytest.approx(0, abs=1e-5)
    assert float(diagnostics.uniformity(axes)) == pytest.approx(-4)  # all pairs are sqrt 2 apart
    spread = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    assert float(diagnostics.uniformity(spread)) == pytest.approx(-4, abs=0.2)


def test_nothing_waits_for_the_device_or_keeps_gradients():
    """On the meta device no number can be read."""
    features = torch.empty(6, 4, 8, device="meta", requires_grad=True)
    found = [
        diagnostics.perplexity_share(features[:, 0].softmax(dim=-1)),
        diagnostics.alignment(features[:, 0], features[:, 1]),
        diagnostics.relative_distance([features], [features + 1]),
        *diagnostics.token_statistics(features[:, 0], features),
    ]
    assert {(value.device.type, value.requires_grad, value.ndim) for value in found} == {("meta", False, 0)}


def test_half_precision_is_computed_in_single():
    patches = torch.randn(3, 9, 8, generator=torch.Generator().manual_seed(0))
    half = diagnostics.token_statistics(patches[:, 0].bfloat16(), patches.bfloat16())
    whole = diagnostics.token_statistics(patches[:, 0].bfloat16().float(), patches.bfloat16().float())
    assert [value.dtype for value in half] == [torch.float32] * 6
    assert all(math.isclose(first, second) for first, second in zip(map(float, half), map(float, whole), strict=True))
