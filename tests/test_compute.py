import numpy as np
import pytest
import torch

from pathfm.compute import pick_device, seed_everything, use_threads
from pathfm.errors import UsageError
from pathfm.study import ComputeSettings


def test_the_device_is_the_one_asked_for():
    assert pick_device(ComputeSettings(device="cpu")).type == "cpu"
    assert pick_device(ComputeSettings()).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", ""])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(UsageError, match=r"^compute.device: "):
        pick_device(ComputeSettings(device=name))


def test_threads_are_set():
    before = torch.get_num_threads()
    try:
        assert use_threads(ComputeSettings(threads=1)) == torch.get_num_threads() == 1
        assert use_threads(ComputeSettings()) >= 1
    finally:
        torch.set_num_threads(before)


def test_a_seed_repeats_everything():
    def draw():
        seed_everything(7)
        return float(torch.rand(())), float(np.random.rand())

    assert draw() == draw()
