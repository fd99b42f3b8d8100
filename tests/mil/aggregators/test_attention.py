"""Attention pooling against golden numbers, and its heads."""

import numpy as np
import pytest
import torch

from pathfm.mil.aggregators.attention import Abmil, AbmilPlain, ClassQueries
from pathfm.mil.aggregators.contract import Packed
from tests.mil.aggregators.examples import bag, close, pack


@pytest.mark.parametrize("kind", ["gated", "plain"])
def test_pooling_matches_the_golden_numbers(golden, kind):
    numbers = {name: torch.from_numpy(value) for name, value in np.load(golden / "attention_mil.npz").items()}
    model = (Abmil if kind == "gated" else AbmilPlain)(width=20, outputs=1, attention=8)
    parts = ["V", "U"] if kind == "gated" else ["V"]
    state = {f"project.{what}": torch.cat([numbers[f"{part}.{what}"] for part in parts]) for what in ("weight", "bias")}
    model.scores.load_state_dict({**state, "score.weight": numbers["w.weight"], "score.bias": numbers["w.bias"]})
    pooled = model(Packed(numbers["h"], (11,), torch.zeros(11, 2)))
    close(pooled.attention_NQ[:, 0], numbers[f"{kind}/attention"])
    close(pooled.slide_BH[0], numbers[f"{kind}/pooled"])


def test_heads_have_their_own_maps_and_one_is_given_out():
    model = Abmil(width=6, outputs=2, attention=8, heads=3)
    packed = pack(bag(20), bag(4, 2))
    pooled = model(packed)
    assert pooled.slide_BH.shape == (2, 18)
    logit_NM = model.scores(packed.tile_NH)
    maps = torch.cat([logit_NM[:20].softmax(0), logit_NM[20:].softmax(0)])
    close(pooled.attention_NQ, maps.mean(1, keepdim=True))
    close(pooled.logit_NQ[:20].softmax(0), pooled.attention_NQ[:20])
    close(pooled.slide_BH[1, :6], maps[20:, 0] @ packed.tile_NH[20:])


def test_an_output_depends_on_its_own_map_alone():
    model = ClassQueries(width=6, outputs=3, attention=8)
    packed = pack(bag(20))
    before = model(packed)
    with torch.no_grad():
        model.scores.score.weight[1] += 1.0
    after = model(packed)
    changed = (before.output_BO - after.output_BO).abs()[0] > 1e-6
    assert changed.tolist() == [False, True, False]
    vector_OH = after.attention_NQ.T @ packed.tile_NH
    close(after.output_BO[0], (vector_OH * model.head.weight).sum(1) + model.head.bias)
