"""Two processes with half the batch each compute what one computes, sharded or not; checkpoints pass between them."""

from pathlib import Path

import pytest
import torch

from pathfm.pretrain.encoder import shard
from pathfm.pretrain.launch import in_processes
from pathfm.pretrain_settings import CropSettings, PretrainSettings
from pathfm.study import ComputeSettings
from tests.pretrain.conftest import tiny
from tests.pretrain.shared_training import train_all


def case(**changes) -> PretrainSettings:
    crops = CropSettings(global_px=32, local_px=16, local_count=2)
    plain = {"steps": 3, "batch_size": 8, "drop_path": 0.0, "crops": crops, "koleo_weight": 0.1, "kde_weight": 0.05, "lr": 0.01}
    return tiny(**{**plain, "warmup_steps": 0, "freeze_last_layer_steps": 0, "layer_scale": 0.1, **changes})


CASES = {
    "softmax": case(centering="softmax", separate_ibot_head=True),
    "sinkhorn": case(),
    "in parts": case(centering="softmax", accumulate=2, koleo_weight=0.0, kde_weight=0.0),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[Path, dict[str, dict[str, dict[str, torch.Tensor]]]]:
    out = tmp_path_factory.mktemp("processes")
    found = {}
    for kind, devices, strategy in (("one", 1, "ddp"), ("ddp", 2, "ddp"), ("fsdp", 2, "fsdp")):
        compute = ComputeSettings(device="cpu", threads=1, devices=devices, strategy=strategy)
        in_processes(train_all, compute, shard, CASES, out)
        found[kind] = torch.load(out / f"{kind}.pt", weights_only=True)
    # Once more alone, now that checkpoints of all kinds are there.
    in_processes(train_all, ComputeSettings(device="cpu", threads=1), shard, CASES, out)
    found["one again"] = torch.load(out / "one.pt", weights_only=True)
    return out, found


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 1e-9 if value.dtype == torch.float64 else 1e-5  # what is only watched is computed in float32
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_compute_what_one_computes(results, kind, name):
    _, found = results
    close(found[kind][name], found["one"][name])
    assert not torch.equal(found["one"][name]["terms 0"], found["one"][name]["terms 2"])


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("saved", ["one", "ddp", "fsdp"])
@pytest.mark.parametrize("resumed", ["one again", "fsdp"])
def test_checkpoints_pass_between_numbers_of_processes_and_strategies(results, resumed, saved, name):
    _, found = results
    if (resumed, saved) == ("fsdp", "fsdp") or saved != "fsdp" or resumed == "one again":
        whole, again = found["one"][name], found[resumed][f"{name}-{saved} resumed"]
        close({key: again[key] for key in again}, {key: whole[key] for key in again})


@pytest.mark.long
def test_accumulated_parts_compute_what_one_batch_computes(results):
    """With terms that do not look across the batch: softmax centring, no KoLeo, no KDE."""
    out, found = results
    compute = ComputeSettings(device="cpu", threads=1)
    whole = {"whole": case(centering="softmax", koleo_weight=0.0, kde_weight=0.0)}
    in_processes(train_all, compute, shard, whole, out)
    at_once = torch.load(out / "one.pt", weights_only=True)["whole"]
    watched = {"watched 0", "watched 1", "watched 2"}  # the perplexity of half a batch is not that of the whole
    close(
        {key: value for key, value in found["one"]["in parts"].items() if key not in watched},
        {key: value for key, value in at_once.items() if key not in watched},
    )
