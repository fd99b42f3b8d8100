"""A look at the teacher: it changes nothing, sees what is there, and leaves files that a resume trims."""

import csv
import math

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional

from pathfm.errors import UsageError
from pathfm.models.vit import MaskedViT, build_backbone
from pathfm.pretrain import snapshot
from pathfm.pretrain.health import HEALTH
from pathfm.pretrain.probe_table import middle, read_probe_table
from pathfm.pretrain.snapshot import SNAPSHOTS, Snapshot, class_attention, principal_colours
from pathfm.pretrain_settings import CropSettings, HealthSettings, PretrainSettings

SIDE = 32


def settings(**changes):
    given = {"maps": 3, **changes.pop("health", {})}
    crops = CropSettings(global_px=SIDE, local_px=16)
    return PretrainSettings(backbone="vit_tiny_patch16_224", patch_px=8, crops=crops, health=HealthSettings(**given), **changes)


def teacher(seed=0, **changes):
    torch.manual_seed(seed)
    return MaskedViT(build_backbone(settings(**changes), SIDE)).eval()


def tiles(count=20, side=40, seed=0):
    coarse = np.random.default_rng(seed).integers(40, 255, (count, side // 8, side // 8, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def table(folder):
    with (folder / HEALTH / SNAPSHOTS).open(newline="") as stream:
        return list(csv.DictReader(stream))


def probe_csv(folder, rows=None):
    """Twelve patients with three tiles each; reddish and bluish ones."""
    for patient in range(12):
        for number in range(3):
            image = tiles(1, seed=patient * 3 + number)[0]
            image[..., 0 if patient % 2 else 2] //= 3
            cv2.imwrite(str(folder / f"{patient}-{number}.png"), image)
    usual = [(f"{p}-{n}.png", "ab"[p % 2], f"p{p}", "train" if p < 8 else "val") for p in range(12) for n in range(3)]
    lines = [",".join(row) for row in [("path", "label", "group", "part"), *(usual if rows is None else rows)]]
    (folder / "probe.csv").write_text("\n".join(lines) + "\n")
    return folder / "probe.csv"


def test_a_look_changes_neither_weights_nor_modes_nor_random_numbers(tmp_path):
    net = teacher().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in net.modules()]
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    Snapshot(tmp_path, settings(), tiles(), read_probe_table(probe_csv(tmp_path))).take(net, 1)
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert [len(module._forward_hooks) for module in net.modules()] == hooks


def test_the_same_look_gives_the_same_bytes(tmp_path):
    for name in "ab":
        Snapshot(tmp_path / name, settings(), tiles()).take(teacher(), 5)
    for name in (SNAPSHOTS, "step-0000005.png"):
        assert (tmp_path / "a" / HEALTH / name).read_bytes() == (tmp_path / "b" / HEALTH / name).read_bytes()


def test_numbers_are_returned_and_written(tmp_path):
    found = Snapshot(tmp_path, settings(), tiles()).take(teacher(), 7)
    (row,) = table(tmp_path)
    assert list(row) == ["step", *snapshot.NUMBERS]
    assert row.pop("step") == "7"
    assert {name: float(value) for name, value in row.items()} == pytest.approx(found, rel=1e-6)
    assert 1 <= found["rankme"] <= 20
    assert -1 <= found["d4_cosine"] <= 1


def test_more_tiles_than_a_batch_are_all_seen(tmp_path, monkeypatch):
    whole = Snapshot(tmp_path / "a", settings(), tiles()).take(teacher(), 0)
    monkeypatch.setattr(snapshot, "BATCH", 7)
    assert Snapshot(tmp_path / "b", settings(), tiles()).take(teacher(), 0) == pytest.approx(whole, rel=1e-4, abs=1e-5)


def test_a_net_that_sees_only_the_mean_colour_is_the_same_under_all_turns(tmp_path):
    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(3))

        def tokens(self, images):
            means = images.mean(dim=(2, 3)) @ self.weight + 1
            patches = functional.avg_pool2d(images, 8).flatten(2).mT
            return snapshot.Tokens(means, patches)

    found = Snapshot(tmp_path, settings(health={"maps": 0}), tiles()).take(Mean(), 0)
    assert found["d4_cosine"] == pytest.approx(1, abs=1e-5)
    assert found["alignment"] == pytest.approx(0, abs=1e-5)
    assert not list((tmp_path / HEALTH).glob("*.png"))


def test_the_eight_views_are_all_of_the_square(tmp_path):
    square = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
    views = {view.tobytes() for view in map(np.ascontiguousarray, snapshot._turned(square))}
    assert len(views) == 8


def test_features_that_are_not_finite_are_told_and_not_drawn(tmp_path):
    net = teacher()
    with torch.no_grad():
        net.vit.norm.weight[0] = math.nan
    found = Snapshot(tmp_path, settings(), tiles()).take(net, 3)
    assert list(found) == ["rankme"]
    assert math.isnan(found["rankme"])
    assert table(tmp_path)[0]["rankme"] == "nan"
    assert not list((tmp_path / HEALTH).glob("*.png"))


def test_a_resume_trims_and_takes_again_without_doubling(tmp_path):
    look = Snapshot(tmp_path, settings(), tiles(6))
    for step in (0, 10, 20, 30):
        look.take(teacher(seed=step), step)
    whole = {path.name: path.read_bytes() for path in (tmp_path / HEALTH).iterdir()}
    again = Snapshot(tmp_path, settings(), tiles(6))
    again.trim(15)
    assert [row["step"] for row in table(tmp_path)] == ["0", "10"]
    assert sorted(path.name for path in (tmp_path / HEALTH).glob("*.png")) == ["step-0000000.png", "step-0000010.png"]
    for step in (10, 20, 30):
        again.take(teacher(seed=step), step)
    assert {path.name: path.read_bytes() for path in (tmp_path / HEALTH).iterdir()} == whole


@pytest.mark.parametrize(
    "changes", [{}, {"positions": "rope"}, {"registers": 0}, {"mlp": "swiglu"}, {"positions": "rope", "mlp": "swiglu"}]
)
def test_attention_maps_are_those_of_the_network(changes, monkeypatch):
    """Multiplied with the values, they give what the block computes with the fused kernel."""
    net = teacher(**changes)
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    fused = functional.scaled_dot_product_attention
    seen = []
    monkeypatch.setattr(
        functional, "scaled_dot_product_attention", lambda q, k, v, **rest: seen.append((q, k)) or fused(q, k, v)
    )
    with torch.no_grad():
        net.tokens(images)
    query, key = seen[-1]
    expected = (query[:, :, :1] @ key.mT / math.sqrt(query.shape[-1])).softmax(dim=-1)[:, :, 0]
    found = class_attention(net, images)
    prefix = net.vit.num_prefix_tokens
    assert found.shape == (2, net.blocks[-1].attn.num_heads, 16)
    torch.testing.assert_close(found, expected[..., prefix:], atol=1e-5, rtol=1e-4)
    assert float(found.sum(dim=-1).max()) < 1


def test_colours_of_patches_do_not_depend_on_signs_and_spread_over_the_range():
    patches = np.random.default_rng(0).normal(size=(4, 9, 6)).astype(np.float32) * [9, 5, 3, 0.1, 0.1, 0.1]
    colours = principal_colours(patches)
    assert colours.shape == (4, 9, 3)
    assert colours.min() == 0
    assert colours.max() == 1
    for axis in range(3):
        assert abs(np.corrcoef(colours[..., axis].ravel(), patches[..., axis].ravel())[0, 1]) > 0.95
    np.testing.assert_allclose(principal_colours(patches.copy()), colours)
    assert principal_colours(patches[..., :2]).shape == (4, 9, 3)
    assert np.isfinite(principal_colours(np.ones((2, 4, 5), np.float32))).all()


def test_the_picture_has_a_row_for_each_tile(tmp_path):
    look = Snapshot(tmp_path, settings(health={"maps": 2}), tiles())
    look.take(teacher(), 12)
    picture = cv2.imread(str(look.picture_path(12)))
    cell, gap, header = snapshot.CELL_PX, snapshot.GAP_PX, snapshot.HEADER_PX
    assert picture.shape == (header + 2 * cell + gap, 6 * (cell + gap) - gap, 3)  # tile, PCA, mean, three heads
    shown = picture[header : header + cell, :cell, ::-1]
    middle = cv2.resize(tiles()[0][4:36, 4:36], (cell, cell), interpolation=cv2.INTER_NEAREST)
    assert np.array_equal(shown, middle)


def test_probes_are_fitted_on_train_and_scored_on_val(tmp_path):
    look = Snapshot(tmp_path, settings(health={"maps": 0}), tiles(), read_probe_table(probe_csv(tmp_path)))
    found = look.take(teacher(), 0)
    assert set(snapshot.PROBES) < set(found)
    assert all(0 <= found[name] <= 1 for name in snapshot.PROBES)
    assert found["probe_linear"] > 0.9  # colour alone tells them apart


BAD_TABLES = {
    "a group in both parts": (("0-0.png", "a", "p1", "val"), "group 'p1' is in both parts"),
    "an unknown part": (("0-0.png", "a", "p99", "test"), "part 'test' is unknown"),
    "no such image": (("none.png", "a", "p99", "val"), "none.png: there is no such file"),
    "no label": (("0-0.png", "", "p99", "val"), "no label"),
    "a label in one part": (("0-0.png", "c", "p99", "val"), "only one part has the label c"),
}


@pytest.mark.parametrize(("row", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_bad_probe_table_is_refused_by_row(tmp_path, row, message):
    path = probe_csv(tmp_path)
    path.write_text(path.read_text() + ",".join(row) + "\n")
    with pytest.raises(UsageError, match=message) as caught:
        read_probe_table(path)
    assert str(caught.value).startswith(f"{path}:38: " if "label c" not in message else f"{path}: ")


def test_a_probe_table_that_is_none(tmp_path):
    with pytest.raises(UsageError, match="there is no such file"):
        read_probe_table(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(UsageError, match="no column path, label, group, part"):
        read_probe_table(tmp_path / "empty.csv")
    with pytest.raises(UsageError, match="two labels or more"):
        read_probe_table(probe_csv(tmp_path, [("0-0.png", "a", "p0", "train"), ("1-0.png", "a", "p1", "val")]))


def test_a_tile_that_cannot_be_used_is_named(tmp_path):
    path = probe_csv(tmp_path)
    (tmp_path / "3-1.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"3-1\.png: not a readable image"):
        Snapshot(tmp_path, settings(), tiles(), read_probe_table(path)).take(teacher(), 0)


@pytest.mark.parametrize("shape", [(20, 20), (20, 50), (64, 31), (33, 32)])
def test_tiles_smaller_than_the_crops_are_enlarged(shape):
    picture = np.tile(np.linspace(0, 255, shape[1]).astype(np.uint8)[None, :, None], (shape[0], 1, 3))
    found = middle(picture, 32)
    assert found.shape == (32, 32, 3) and found[:, 0].mean() < found[:, -1].mean()
