"""The list of encoders, folders for machines without a network, and features compared with recorded ones."""

import dataclasses
import json
import os
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
import timm
import torch

from pathfm import encoder_listing
from pathfm.encoder_listing import RECORDED, fetch, list_encoders, verify
from pathfm.errors import ExitCode, StoreError, UsageError
from pathfm.models.cards import CARDS
from pathfm.models.encoders import load_encoder
from pathfm.models.networks import load_network
from pathfm.study import ExtractSettings

TINY = {"img_size": 28, "num_classes": 0, "dynamic_img_size": True, "embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return cache


@pytest.fixture
def virchow2(monkeypatch, no_network):
    """A small network in its place, whose weights lie in the cache."""
    arguments = TINY | {"mlp_ratio": 5.33334, "reg_tokens": 4}
    for name in ("virchow2", "virchow2@stamp"):
        dim = 48 if name == "virchow2" else 24
        card = dataclasses.replace(CARDS[name], arguments=arguments, input_px=28, resize_px=28, dim=dim)
        monkeypatch.setitem(CARDS, name, card)
    torch.manual_seed(1)
    source = timm.create_model(CARDS["virchow2"].architecture, **arguments)
    folder = no_network / "models--paige-ai--Virchow2"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("abc")
    (folder / "snapshots/abc").mkdir(parents=True)
    torch.save(source.state_dict(), folder / "snapshots/abc/pytorch_model.bin")
    return source


def test_the_list_names_every_encoder_on_narrow_lines(virchow2):
    lines = list_encoders().splitlines()
    assert max(len(line) for line in lines) <= 120
    rows = {line.split()[0]: line for line in lines if line}
    assert set(CARDS) <= set(rows)
    assert rows["virchow2"].split()[1:4] == ["48", "28", "0.25,"] and rows["virchow2"].endswith("yes    here")
    assert rows["uni2-h"].endswith("yes    -") and rows["conch"].endswith("bring it") and "256>224" in rows["gigapath"]
    assert "cls " in rows["virchow2@stamp"] and "fp32" in rows["virchow2@stamp"]


def test_the_list_comes_without_torch():
    code = "import sys; from pathfm.encoder_listing import list_encoders; list_encoders(); print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert output.stdout.strip() == "False"


@pytest.mark.parametrize("name", ["virchow2", "virchow2@stamp"])
def test_a_fetched_folder_gives_the_same_features_without_the_hub(virchow2, tmp_path, monkeypatch, capsys, name):
    fetch(name, tmp_path / "e")
    said = capsys.readouterr().out
    assert f"{tmp_path / 'e'}: {name}, weights" in said and "CC-BY-NC-ND-4.0" in said and "local-dir:" in said
    assert {file.name for file in (tmp_path / "e").iterdir()} == {"config.json", "model.safetensors", "card.json"}
    tiles = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), np.uint8)
    settings = ExtractSettings(precision="fp32")
    online = load_encoder(name, settings, torch.device("cpu"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: pytest.fail("the cache was asked"))
    offline = load_encoder(f"local-dir:{tmp_path / 'e'}", settings, torch.device("cpu"))
    assert np.array_equal(online(tiles), offline(tiles)) and offline.dim == CARDS[name].dim
    differing = {key for key, value in dataclasses.asdict(online.recipe).items() if getattr(offline.recipe, key) != value}
    assert differing == {"encoder"}, "but for the name, the recipe is that of the card"


def test_a_fetched_folder_is_replaced_and_other_folders_are_not_touched(virchow2, tmp_path):
    fetch("virchow2", tmp_path / "e")
    fetch("virchow2@stamp", tmp_path / "e")
    assert load_network(f"local-dir:{tmp_path / 'e'}").card.pooling == "cls"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("all of it")
    for place in (tmp_path / "mine", tmp_path / "mine/thesis.txt"):
        with pytest.raises(UsageError, match="there is something else already"):
            fetch("virchow2", place)
    assert (tmp_path / "mine/thesis.txt").read_text() == "all of it"


@pytest.mark.parametrize("place", ["data/thesis.txt", "card.json/thesis.txt", ".hidden"])
def test_a_folder_that_holds_more_than_an_encoder_is_not_replaced(virchow2, tmp_path, place):
    file = tmp_path / "e" / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("all of it")
    (tmp_path / "e/config.json").write_text("{}")
    with pytest.raises(UsageError, match="there is something else already"):
        fetch("virchow2", tmp_path / "e")
    assert file.read_text() == "all of it" and (tmp_path / "e/config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("name", "message"), [("uni2-h", "not on this machine"), ("conch", "code of others"), ("python:a:b", "own")]
)
def test_what_cannot_be_fetched_leaves_nothing(tmp_path, name, message):
    with pytest.raises(UsageError, match=message):
        fetch(name, tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_a_recipe_of_another_version_is_refused(virchow2, tmp_path):
    fetch("virchow2", tmp_path / "e")
    card = json.loads((tmp_path / "e/card.json").read_text())
    card["recipe"]["new_in_a_later_version"] = 1
    (tmp_path / "e/card.json").write_text(json.dumps(card))
    with pytest.raises(UsageError, match="a recipe of another version of pathfm"):
        load_network(f"local-dir:{tmp_path / 'e'}")


@pytest.mark.parametrize("file", sorted(RECORDED.glob("*.json")), ids=lambda file: file.stem)
def test_recorded_features_that_come_with_pathfm_are_found_again(file, capsys):
    recorded = json.loads(file.read_text())
    assert recorded["encoder"].startswith("untrained:"), "none is of published weights"
    code = verify(recorded["encoder"])
    said = capsys.readouterr().out
    if "other weights" in said:
        pytest.skip(f"this timm draws other random weights than {recorded['versions']}")
    assert code == ExitCode.DONE and "the recorded features" in said and "the same weights" in said


def test_features_are_recorded_and_compared(virchow2, tmp_path, capsys, monkeypatch):
    file = tmp_path / "v.json"
    assert verify("virchow2", file, record=True) == ExitCode.DONE
    assert verify("virchow2", file) == ExitCode.DONE
    assert "largest relative error 0.0e+00" in capsys.readouterr().out
    fetch("virchow2", tmp_path / "e")
    assert verify(f"local-dir:{tmp_path / 'e'}", file) == ExitCode.DONE, "the folder is the encoder"
    assert verify("virchow2@stamp", file) == ExitCode.SOME_FAILED
    assert "another recipe (pooling cls+mean, here cls; dim 48, here 24)" in capsys.readouterr().out
    assert "features" in json.loads(file.read_text()) and file.stat().st_size < 5_000
    monkeypatch.chdir(tmp_path)
    verify("virchow2", record=True)
    assert (tmp_path / "virchow2.features.json").read_bytes() == file.read_bytes()


def test_other_weights_are_noticed(virchow2, tmp_path, capsys, no_network):
    file = tmp_path / "v.json"
    verify("virchow2", file, record=True)
    state = virchow2.state_dict() | {"norm.weight": 1.02 * virchow2.state_dict()["norm.weight"]}
    torch.save(state, next(no_network.rglob("pytorch_model.bin")))
    assert verify("virchow2", file) == ExitCode.SOME_FAILED
    assert "OTHER FEATURES" in capsys.readouterr().out


def test_nothing_to_compare_with_is_said(virchow2, tmp_path):
    with pytest.raises(
        UsageError, match=r"no recorded features of virchow2 \(make one with --record .*recorded here: untrained:"
    ):
        verify("virchow2")
    file = tmp_path / "v.json"
    verify("virchow2", file, record=True)
    whole = json.loads(file.read_text())
    damages = ({"tiles_sha256": "0"}, "of other tiles"), ({"format": "x"}, "no recorded"), ({"features": "AAAA"}, "damaged")
    for change, message in damages:
        file.write_text(json.dumps(whole | change))
        with pytest.raises(StoreError, match=message):
            verify("virchow2", file)
    assert whole["shape"][0] == encoder_listing.TILES
