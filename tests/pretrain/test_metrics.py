"""The training curve on disk: whole rows, the same after a resume, nothing twice, nothing of the clock in the content."""

import csv
import math

import pytest
import torch

from pathfm.pretrain.metrics import EVENTS, FLUSH_EVERY, METRICS, TIMES, TIMING, MetricsLog


def log(folder, start=0):
    return MetricsLog(folder, ("loss", "distance"), ("lr",), images_per_step=4, start=start)


def numbers(step):
    return torch.tensor([1 / (step + 1), math.nan if step % 3 else 0.5 * step])


def write(folder, steps, start=0):
    kept = log(folder, start)
    rows = []
    for step in steps:
        rows += kept.add(step, numbers(step), (0.1 * step,), waited_s=0.25)
    rows += kept.sync()
    kept.close()
    return rows


def table(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_step_is_a_row_on_disk_and_in_the_hand(tmp_path):
    rows = write(tmp_path, range(23))
    written = table(tmp_path / METRICS)
    assert [row["step"] for row in rows] == list(range(23)) == [int(row["step"]) for row in written]
    assert list(rows[0]) == list(written[0]) == ["step", "loss", "distance", "lr"]
    for row, text in zip(rows, written, strict=True):
        for name, value in row.items():
            assert float(text[name]) == pytest.approx(value, rel=1e-7, nan_ok=True)


def test_rows_come_when_they_are_due(tmp_path):
    kept = log(tmp_path)
    counts = [len(kept.add(step, numbers(step), (0.0,))) for step in range(2 * FLUSH_EVERY)]
    assert [step for step, count in enumerate(counts) if count] == [FLUSH_EVERY - 1, 2 * FLUSH_EVERY - 1]
    assert set(counts) == {0, FLUSH_EVERY}
    assert kept.flush() == []
    kept.close()


def test_a_number_that_is_not_finite_is_written_as_it_is(tmp_path):
    kept = log(tmp_path)
    kept.add(0, torch.tensor([math.nan, math.inf]), (0.0,))
    assert math.isnan(kept.flush()[0]["loss"])
    kept.close()
    assert table(tmp_path / METRICS)[0] == {"step": "0", "loss": "nan", "distance": "inf", "lr": "0"}


def test_a_resumed_curve_equals_an_undisturbed_one(tmp_path):
    write(tmp_path / "whole", range(30))
    write(tmp_path / "resumed", range(25))  # killed after 25, the checkpoint is at 20
    with (tmp_path / "resumed" / METRICS).open("a") as stream:
        stream.write("25,0.1")  # half a row
    write(tmp_path / "resumed", range(20, 30), start=20)
    assert (tmp_path / "resumed" / METRICS).read_bytes() == (tmp_path / "whole" / METRICS).read_bytes()
    assert [int(row["step"]) for row in table(tmp_path / "resumed" / TIMING)] == [9, 19, 29]


def test_time_is_told_apart_from_content(tmp_path):
    write(tmp_path, range(FLUSH_EVERY))
    (row,) = table(tmp_path / TIMING)
    assert tuple(row) == TIMES
    assert float(row["data_wait_seconds"]) == 0.25 * FLUSH_EVERY
    assert float(row["peak_memory_gb"]) > 0.01
    assert float(row["images_per_second"]) > 0


def test_a_fresh_start_keeps_nothing(tmp_path):
    write(tmp_path, range(12))
    write(tmp_path, range(3))
    assert len(table(tmp_path / METRICS)) == 3
    assert len(table(tmp_path / TIMING)) == 1


def test_other_processes_get_the_rows_and_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = log(None)
    kept.add(0, numbers(0), (0.0,))
    assert kept.sync() == [{"step": 0, "loss": 1.0, "distance": 0.0, "lr": 0.0}]
    kept.show(0, {"rankme": 3.0})
    kept.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    import numpy as np
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, range(40))
    (first,) = (tmp_path / EVENTS).iterdir()
    first.rename(first.with_name("events.out.tfevents.1000000000.before"))  # readers go by the second in the name
    kept = log(tmp_path, start=20)
    for step in range(20, 50):
        kept.add(step, numbers(step) * 2, (0.0,))
    kept.show(50, {"rankme": 7.0, "probe_linear": math.nan}, np.zeros((8, 8, 3), dtype=np.uint8))
    kept.sync()
    kept.close()
    events = EventAccumulator(str(tmp_path / EVENTS))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert shown == [(step, pytest.approx((2 if step >= 20 else 1) / (step + 1))) for step in range(9, 50, 10)]
    assert [event.value for event in events.Scalars("rankme")] == [7.0]
    assert sorted(events.Tags()["scalars"]) == ["distance", "loss", "lr", "rankme"]
    assert events.Tags()["images"] == ["maps"]


def test_without_tensorboard_nothing_is_missing(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    write(tmp_path, range(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [METRICS, TIMING]
