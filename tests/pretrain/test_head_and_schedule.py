import json
import math

import numpy as np
import pytest
import torch

from pathfm.pretrain.head import DinoHead
from pathfm.pretrain.optim import Schedules
from pathfm.pretrain.schedule import Cosine, linear
from tests.pretrain.conftest import tiny


def test_the_head_matches_the_golden_output(golden):
    with np.load(golden / "dinov2_losses.npz") as file:
        content = {name: torch.tensor(file[name]).float() for name in file.files if name.startswith("head/")}
    head = DinoHead(32, 48, 16, 64)
    head.load_state_dict({name.removeprefix("head/state/"): value for name, value in content.items() if "state" in name})
    torch.testing.assert_close(head(content["head/x"]), content["head/out"], rtol=1e-5, atol=1e-5)


def test_the_head_compares_directions_with_unit_prototypes():
    torch.manual_seed(0)
    head = DinoHead(6, 8, 4, 10)
    x = torch.randn(3, 6)
    bottleneck = head.mlp(x)
    rows = head.last_layer.weight_v
    cosine = (bottleneck / bottleneck.norm(dim=1, keepdim=True)) @ (rows / rows.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(head(x), cosine)
    assert float(head.mlp[0].bias.detach().abs().max()) == 0
    assert float(head.mlp[0].weight.detach().std()) == pytest.approx(0.02, rel=0.3)


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


def test_the_line_ends_where_it_should():
    assert [linear(step, 0.04, 0.07, 4) for step in (0, 3, 4, 99)] == pytest.approx([0.04, 0.07, 0.07, 0.07])
    assert linear(0, 0.04, 0.07, 0) == linear(0, 0.04, 0.07, 1) == 0.07


def test_the_schedules_follow_the_settings():
    schedules = Schedules(
        tiny(steps=100, batch_size=256, lr=0.01, warmup_steps=11, freeze_last_layer_steps=20, teacher_warmup_steps=5)
    )
    start, peak, late = schedules(0), schedules(11), schedules(100)
    assert (start.lr, start.last_layer_lr, start.weight_decay, start.ema) == pytest.approx((0.0, 0.0, 0.04, 0.992))
    assert start.teacher_temperature == 0.04 and peak.teacher_temperature == 0.07
    assert peak.lr == pytest.approx(0.01 * math.sqrt(256 / 1024)) and peak.last_layer_lr == 0.0
    assert schedules(20).last_layer_lr == schedules(20).lr > 0
    assert (late.lr, late.weight_decay, late.ema) == (1e-6, 0.4, 1.0)
