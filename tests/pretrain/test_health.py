"""The alarm: it names the fault of recorded broken runs, and is silent on recorded healthy ones.

The curves come from ViT-Ti with 8,192 prototypes on tiles of lung and stomach, batch 16, bf16, with one thing changed each.
"""

import csv
import json
import math
from pathlib import Path

import pytest

from pathfm.pretrain.health import UNIFORM_STEPS, Watch, record_alarm
from pathfm.pretrain_settings import PretrainSettings

CURVES = Path(__file__).parent / "curves"
LOG_K = math.log(8192)


def curve(name):
    with (CURVES / f"{name}.csv").open() as stream:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(stream)]
    # In training the distance is measured at every tenth step only.
    return [row if (row["step"] + 1) % 10 == 0 else {**row, "ema_distance": math.nan} for row in rows]


def watch(**settings):
    return Watch(PretrainSettings(**{"prototypes": 8192, "warmup_steps": 40, **settings}))


def row(step, entropy=5.0, kl=0.5, perplexity=0.9, **more):
    numbers = {"teacher_entropy": entropy, "teacher_kl": kl, "prototype_perplexity": perplexity, "teacher_temperature": 0.05}
    return {"step": step, "loss": 1.0, "grad_norm_backbone": 1.0, "ema_distance": 0.05, **numbers, **more}


BROKEN = {
    "no-centring": ({"centering": "none"}, "one prototype", "softmax or sinkhorn"),
    "soft-teacher": ({}, "teacher too soft", "teacher_temperature"),
    "high-rate": ({}, "diverging", "pretrain.lr"),
    "high-rate-slow-warm-up": ({"warmup_steps": 1000}, "diverging", "pretrain.lr"),
}


@pytest.mark.parametrize(("name", "settings", "fault", "fix"), [(name, *rest) for name, rest in BROKEN.items()], ids=BROKEN)
def test_each_fault_is_named_within_500_steps(name, settings, fault, fix):
    alarm = watch(**settings).see(curve(name))
    assert alarm is not None
    assert (alarm.fault, alarm.step < 500) == (fault, True)
    assert fix in alarm.fix


@pytest.mark.parametrize("warmup", [0, 40, 1000])
@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_a_healthy_start_near_log_k_is_no_alarm(warmup, centering):
    assert watch(warmup_steps=warmup, centering=centering).see(curve("healthy")) is None


@pytest.mark.parametrize("name", ["loss", "ibot", "grad_norm_backbone", "teacher_entropy"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_named_with_its_step(name, value):
    alarm = watch().see([row(7), row(8, **{name: value}), row(9)])
    assert alarm is not None
    assert (alarm.fault, alarm.step) == ("not finite", 8)
    assert alarm.what == f"{name} is {value}"


def test_the_terms_are_named_rather_than_their_sum():
    alarm = watch().see([row(3, loss=math.nan, ibot=math.nan, grad_norm_backbone=math.inf)])
    assert alarm is not None
    assert alarm.what == "grad_norm_backbone is inf, ibot is nan"


def test_a_distance_that_was_not_measured_is_no_fault():
    assert watch().see([row(step, ema_distance=math.nan) for step in range(300)]) is None


def test_uniform_collapse_needs_the_end_of_the_warm_up_and_patience():
    flat = [row(step, entropy=LOG_K - 1e-4, kl=1e-4, perplexity=1.0) for step in range(2000)]
    alarm = watch(warmup_steps=300).see(flat)
    assert alarm is not None
    assert (alarm.fault, alarm.step) == ("uniform collapse", 300 + UNIFORM_STEPS - 1)
    assert watch(warmup_steps=300, steps=100_000).see(flat) is None  # a twentieth of a long run


def test_targets_that_grow_apart_slowly_are_no_collapse():
    rows = [row(step, entropy=LOG_K - 1e-4 * 1.003**step, kl=1e-3, perplexity=1.0) for step in range(2500)]
    assert rows[2400]["teacher_entropy"] > 0.98 * LOG_K
    assert watch(warmup_steps=0).see(rows) is None


def test_a_student_worse_than_a_uniform_guess_diverges():
    alarm = watch().see([row(step, entropy=7.0, kl=4.0) for step in range(100)])
    assert alarm is not None
    assert alarm.fault == "diverging"
    assert "uniform guess" in alarm.what


def test_gradients_that_explode_and_stay_so_diverge():
    spike = [row(step, grad_norm_dino_head=10_000.0 if step < 20 else 1.0) for step in range(100)]
    assert watch().see(spike) is None
    alarm = watch().see([row(step, grad_norm_dino_head=10_000.0) for step in range(100)])
    assert alarm is not None
    assert (alarm.fault, "grad_norm_dino_head" in alarm.what) == ("diverging", True)


def test_a_student_far_away_that_tells_images_apart_is_no_alarm_until_it_is_lost():
    assert watch().see([row(step, ema_distance=0.6) for step in range(300)]) is None
    alarm = watch().see([row(step, ema_distance=0.8) for step in range(300)])
    assert alarm is not None
    assert alarm.fault == "diverging"


def test_a_fall_of_rank_is_an_alarm_and_a_low_start_is_none():
    looks = [1.0, 2.0, 9.0, 30.0, 38.0, 41.0, 33.0, 12.0, 6.0]
    found = [watch_look for watch_look in _looks(watch(), looks) if watch_look]
    assert [(alarm.fault, alarm.step) for alarm in found] == [("rank collapse", 800)]
    assert "6.0" in found[0].what
    spike = [5.0, 6.0, 60.0, 7.0, 6.0, 8.0]
    assert not any(_looks(watch(), spike))


def _looks(health, ranks):
    return [health.look(step * 100, {"rankme": rank}) for step, rank in enumerate(ranks)]


def test_a_teacher_that_is_not_finite_is_an_alarm_at_once():
    alarm = watch().look(0, {"rankme": math.nan})
    assert alarm is not None
    assert alarm.fault == "not finite"
    assert watch().look(0, {}) is None


def test_a_teacher_without_prototypes_is_watched_too():
    rows = [{"step": step, "loss": 1.0, "grad_norm_backbone": 1.0} for step in range(100)]
    assert watch().see(rows) is None
    alarm = watch().see([*rows, {"step": 100, "loss": math.nan, "grad_norm_backbone": 1.0}])
    assert alarm is not None
    assert alarm.fault == "not finite"


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_alarms_depend_neither_on_portions_nor_on_resumes(name, size):
    """State goes through JSON, as in a checkpoint, between portions of any size."""
    rows, settings = curve(name), BROKEN[name][0]
    health, found = watch(**settings), []
    for start in range(0, len(rows), size):
        found.append(health.see(rows[start : start + size]))
        state = json.loads(json.dumps(health.state_dict()))
        health = watch(**settings)
        health.load_state_dict(state)
    assert next(alarm for alarm in found if alarm) == watch(**settings).see(rows)


def test_the_ranks_survive_a_resume():
    first, second = watch(), watch()
    for step, rank in enumerate([30.0, 38.0, 41.0, 33.0]):
        first.look(step * 100, {"rankme": rank})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.look(900, {"rankme": 6.0}) == first.look(900, {"rankme": 6.0}) is not None


def test_an_alarm_is_recorded_once(tmp_path):
    alarm = watch().see([row(8, loss=math.nan)])
    for what in ("first, with its tiles", "first, with its tiles", "second"):
        record_alarm(tmp_path, alarm, what)
    with (tmp_path / "health" / "alarms.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(each["step"], each["fault"], each["what"]) for each in rows] == [
        ("8", "not finite", "first, with its tiles"),
        ("8", "not finite", "second"),
    ]
