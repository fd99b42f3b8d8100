import json
import math

import numpy as np
import pytest
import torch

from pathfm.pretrain.head import DinoHead
from pathfm.pretrain.schedule import Cosine, Schedules, WarmupStableDecay, linear, phase_start
from pathfm.pretrain_settings import GramSettings, HighResolutionSettings
from tests.pretrain.conftest import tiny


def head(**changes):
    torch.manual_seed(0)
    return DinoHead(6, tiny(head_hidden=8, head_bottleneck=4, prototypes=10, **changes))


def test_the_head_compares_directions_with_unit_prototypes():
    compared, x = head(), torch.randn(3, 6)
    bottleneck, rows = compared.mlp(x), compared.last_layer.weight_v
    cosine = (bottleneck / bottleneck.norm(dim=1, keepdim=True)) @ (rows / rows.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(compared(x), cosine)
    assert float(compared.mlp[0].bias.detach().abs().max()) == 0
    assert float(compared.mlp[0].weight.detach().std()) == pytest.approx(0.02, rel=0.3)


def test_lengths_of_prototypes_are_trained_fixed_or_free():
    x = torch.randn(3, 6)
    trained, fixed, free = (head(prototype_norm=norm) for norm in ("trained", "fixed", "none"))
    assert trained.last_layer.weight_g.requires_grad and not fixed.last_layer.weight_g.requires_grad
    torch.testing.assert_close(trained(x), fixed(x))
    assert [name for name, _ in free.last_layer.named_parameters()] == ["weight"]
    with torch.no_grad():
        logits = free(x)
        free.last_layer.weight *= 2
        torch.testing.assert_close(free(x), 2 * logits)


def test_the_cosine_matches_the_golden_values(golden):
    with np.load(golden / "cosine_schedule.npz") as file:
        values, meta = file["values"], json.loads(str(file["meta"]))
    schedule = Cosine(meta["base"], meta["final"], meta["total"], meta["warmup"], meta["start_warmup"], meta["freeze"])
    np.testing.assert_allclose([schedule(step) for step in range(len(values))], values, rtol=0, atol=1e-12)


def test_the_cosine_freezes_warms_up_falls_and_stays():
    schedule = Cosine(2.0, 1.0, total=24, warmup=3, start=1.0, freeze=1)
    assert [schedule(step) for step in range(4)] == [0.0, 1.0, 1.5, 2.0]
    assert schedule(4) == 2.0
    assert schedule(14) == pytest.approx(1.5)
    assert schedule(23) == pytest.approx(1.5 + 0.5 * math.cos(math.pi * 19 / 20))
    assert schedule(24) == schedule(1000) == 1.0


def test_the_constant_schedule_warms_up_stays_and_falls_in_a_line():
    schedule = WarmupStableDecay(2.0, 1.0, total=20, warmup=3, decay=5)
    assert [schedule(step) for step in range(4)] == [0.0, 1.0, 2.0, 2.0]
    assert {schedule(step) for step in range(3, 16)} == {2.0}
    assert [schedule(step) for step in range(16, 20)] == [1.75, 1.5, 1.25, 1.0]
    assert schedule(1000) == 1.0


def test_the_line_ends_where_it_should():
    assert [linear(step, 0.04, 0.07, 4) for step in (0, 1, 3, 4, 99)] == pytest.approx([0.04, 0.05, 0.07, 0.07, 0.07])
    assert linear(0, 0.04, 0.07, 0) == linear(0, 0.04, 0.07, 1) == 0.07


def test_the_schedules_follow_the_settings():
    settings = tiny(steps=100, batch_size=256, lr=0.01, warmup_steps=11, freeze_last_layer_steps=20, teacher_warmup_steps=5)
    schedules = Schedules(settings)
    start, peak, late = schedules(0), schedules(11), schedules(100)
    assert (start.lr, start.last_layer_lr, start.weight_decay, start.ema) == pytest.approx((0.0, 0.0, 0.04, 0.992))
    assert start.teacher_temperature == 0.04 and peak.teacher_temperature == 0.07
    assert peak.lr == pytest.approx(0.01 * math.sqrt(256 / 1024)) and peak.last_layer_lr == 0.0
    assert schedules(20).last_layer_lr == schedules(20).lr > 0
    assert (late.lr, late.weight_decay, late.ema) == (1e-6, 0.4, 1.0)
    assert [values.step for values in (start, peak, late)] == [0, 11, 100]
    assert Schedules(settings, lr_factor=0.5)(11).lr == pytest.approx(peak.lr / 2)


def test_a_constant_rate_decays_over_its_share_of_the_steps():
    schedules = Schedules(tiny(steps=100, schedule="constant", decay_share=0.2, warmup_steps=10))
    assert schedules(10).lr == schedules(79).lr == schedules(80).lr > schedules(81).lr > schedules(99).lr
    assert schedules(99).lr == pytest.approx(1e-6)


def test_late_phases_begin_after_their_share_of_the_steps():
    gram = GramSettings(start=0.5, weight=2.0, local_weight=0.25, refresh_steps=10, max_refreshes=2)
    settings = tiny(steps=100, gram=gram, high_resolution=HighResolutionSettings(start=0.9, lr_factor=0.1))
    schedules, plain = Schedules(settings), Schedules(tiny(steps=100))
    assert [(values.gram_weight, values.local_weight) for values in (schedules(49), schedules(50))] == [(0.0, 1.0), (2.0, 0.25)]
    assert [step for step in range(100) if schedules.refreshes_anchor(step)] == [50, 60, 70]
    assert schedules(89).lr == plain(89).lr
    assert schedules(90).lr == pytest.approx(0.1 * plain(90).lr)
    assert not any(plain.refreshes_anchor(step) or plain(step).gram_weight for step in range(101))
    assert phase_start(1.0, 100) > 100
