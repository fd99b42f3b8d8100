"""What a scheduler says to all processes of a job reaches the helpers of Python too, and must not end them."""

import os
import signal
import subprocess
import sys
from multiprocessing import resource_tracker

import pytest

from pathfm.pretrain.launch import in_processes
from pathfm.study import ComputeSettings
from pathfm.workers import map_isolated

CODE = """
import os, signal, sys
from multiprocessing import forkserver, resource_tracker
from pathfm.pretrain.data import load_batches

heard = []
for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda number, _: heard.append(number))
batches = iter(load_batches(range(100), range(20), workers=1))
assert next(batches) == 0
for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
    os.killpg(0, number)
assert list(batches) == list(range(1, 20)) and len(heard) == 3
for process in (resource_tracker._resource_tracker._pid, forkserver._forkserver._forkserver_pid):
    assert os.waitpid(process, os.WNOHANG) == (0, 0)
assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
"""


@pytest.mark.long
def test_signals_to_a_whole_job_leave_its_helpers_alive_and_its_log_clean():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, start_new_session=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "spawn",
    [
        lambda: in_processes(print, ComputeSettings(device="cpu", devices=2), lambda network, _: network),
        lambda: list(map_isolated(abs, [1], 1)),
    ],
    ids=["training", "workers"],
)
def test_whoever_spawns_first_has_the_resource_tracker_started_deaf(monkeypatch, spawn):
    masks = []

    def start():
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        raise EOFError  # before there is any process

    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    monkeypatch.setattr(resource_tracker, "ensure_running", start)
    with pytest.raises(EOFError):
        spawn()
    assert masks[0] >= {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
