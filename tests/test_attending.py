"""``pathfm attention``: the right tiles, prepared as for features; what cannot be is refused with what to do."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from pathfm import attending
from pathfm.attending import attention, find_tile
from pathfm.config import load_study
from pathfm.errors import ExitCode, StoreError, UsageError
from pathfm.models.attention_maps import attention_maps
from pathfm.models.encoders import load_encoder
from pathfm.store.tile_store import open_tiles, write_tiles
from pathfm.workflow import begin

ENCODER = "untrained:vit_tiny_patch16_224"
CORNERS = np.array([[0, 0], [100, 0], [0, 100], [300, 300]])


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    for name in ("s:1", "empty", "untiled"):
        cv2.imwrite(str(folder / f"{name}.png"), np.full((40, 60, 3), 200, dtype=np.uint8))
    table = "\n".join(["slide_id,path", *(f"{name},{name}.png" for name in ("s:1", "empty", "untiled"))])
    (folder / "cohort.csv").write_text(table)
    settings = [
        f"cohort.table={folder}/cohort.csv",
        f"out={folder}/out",
        f"extract.encoder={ENCODER}",
        "extract.precision=bf16",
    ]
    made = load_study(None, [*settings, "extract.symmetry=d4", "compute.device=cpu"])
    tiles = np.random.default_rng(0).integers(0, 255, (4, 12, 12, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    layout = begin(made).layout
    write_tiles(layout.store("s:1"), tiles, slide_id="s:1", xy_level0=CORNERS, codec="zstd", mpp=1.0)
    write_tiles(layout.store("empty"), tiles[:0], slide_id="empty", xy_level0=CORNERS[:0], codec="zstd")
    return made


def test_tiles_are_found_by_point_or_number(study):
    run = begin(study)
    addresses = {"s:1:0,0": 0, "s:1:95.5,95": 0, "s:1:100,0": 1, " s:1: 310 , 395 ": 3, "s:1:#2": 2, "s:1:2": 2}
    for address, number in addresses.items():
        assert find_tile(run, address).number == number
    assert find_tile(run, "s:1:#3").xy_level0 == (300, 300)


@pytest.mark.parametrize(
    ("address", "kind", "words"),
    [
        ("s:1", UsageError, r"cohort has no slide 's'"),
        ("#3", UsageError, r"not a tile \(name it as SLIDE:x,y"),
        ("s:1:-5,0", UsageError, "not a tile"),
        ("s:2:0,0", UsageError, r"no slide 's:2', did you mean 's:1'"),
        ("s:1:#4", UsageError, "tiles 0 to 3"),
        ("s:1:250,290", UsageError, r"no tile lies there \(the nearest one is s:1:300,300\)"),
        ("empty:#0", StoreError, "has no tiles"),
        ("untiled:#0", StoreError, "pathfm tile"),
    ],
)
def test_what_is_no_tile_is_refused(study, address, kind, words):
    with pytest.raises(kind, match=words):
        find_tile(begin(study), address)


def test_pictures_are_of_what_the_network_computes(study, tmp_path, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(
        attending, "write_attention_page", lambda folder, tiles, facts: shown.append((folder, tiles, facts)) or folder
    )
    assert attention(study, ["s:1:#1", "s:1:5,105", "s:1:#1"], tmp_path, block=2) is ExitCode.DONE
    [(folder, tiles, facts)] = shown
    assert folder == tmp_path and [tile.number for tile in tiles] == [1, 2]
    assert facts == [("encoder", ENCODER), ("block", "3 of 12")] and "the encoder sees 0.429 mpp" in capsys.readouterr().out
    encoder = load_encoder(ENCODER, study.extract.model_copy(update={"precision": "fp32"}), torch.device("cpu"))
    pixels = torch.from_numpy(open_tiles(begin(study).layout.store("s:1")).read([2]))
    maps = attention_maps(encoder.model, encoder.images(pixels))
    np.testing.assert_allclose(tiles[1].heads_Hhw, maps.heads(2)[0].numpy(), atol=1e-6)
    np.testing.assert_allclose(tiles[1].rollout_hw, maps.rollout()[0].numpy(), atol=1e-6)
    assert tiles[1].tokens == 197 and tiles[1].mpp == pytest.approx(96 / 224)
    expected = cv2.resize(pixels[0].numpy(), (224, 224), interpolation=cv2.INTER_CUBIC)
    assert np.abs(tiles[1].pixels.astype(int) - expected).mean() < 8


def test_the_page_is_written(study, tmp_path):
    assert attention(study, ["s:1:#0"], tmp_path) is ExitCode.DONE
    assert {file.name for file in tmp_path.iterdir()} == {"index.html", "s:1_0_0.png"}
    assert "block" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_what_cannot_be_shown_is_refused(study, tmp_path):
    with pytest.raises(UsageError, match="no tile is named"):
        attention(study, [], tmp_path)
    with pytest.raises(UsageError, match=r"no block 12 \(it has blocks 0 to 11\)"):
        attention(study, ["s:1:#0"], tmp_path, block=12)
    other = study.model_copy(update={"extract": study.extract.model_copy(update={"encoder": "untrained:resnet18"})})
    with pytest.raises(UsageError, match="no class token"):
        attention(other, ["s:1:#0"], tmp_path)
    own = study.model_copy(update={"extract": study.extract.model_copy(update={"encoder": "pretrained"})})
    with pytest.raises(StoreError):
        attention(own, ["s:1:#0"], tmp_path)
    assert not list(tmp_path.iterdir())
