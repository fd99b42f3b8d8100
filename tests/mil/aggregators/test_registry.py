"""Names and options: what there is, and what is refused with a word on what to do."""

import numpy as np
import pytest

from pathfm.errors import SlideError, UsageError
from pathfm.mil.aggregators.contract import Aggregator
from pathfm.mil.aggregators.registry import AGGREGATORS, find_aggregator
from tests.mil.aggregators.examples import FUNCTION, OWN, OwnMean, bag, network, pack

HERE = __name__


def test_every_entry_is_a_documented_aggregator():
    assert all(issubclass(kind, Aggregator) and kind.__doc__ for kind in AGGREGATORS.values())
    assert len(set(AGGREGATORS.values())) == len(AGGREGATORS)


def test_the_page_about_aggregators_names_all(request):
    page = (request.config.rootpath / "docs/aggregators.md").read_text()
    for name, kind in AGGREGATORS.items():
        assert f"| `{name}` |" in page
        for option in set(kind.__init__.__annotations__) - {"width", "outputs", "attention", "heads", "return"}:
            assert f"`{option}" in page


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("abmill", {}, "did you mean 'abmil'"),
        ("titn", {}, "did you mean 'titan'"),
        ("nothing", {}, "use mean, max, abmil.*titan.*MODULE:CLASS"),
        ("no_such_module:Class", {}, "cannot be imported"),
        (f"{HERE}:NoSuchClass", {}, "cannot be imported"),
        (f"{HERE}:HERE", {}, "is no aggregator"),
        ("torch.nn:Linear", {}, "is no aggregator"),
        ("python:no_such_module:function", {}, "cannot be imported"),
        ("abmil", {"layers": 2}, "abmil has no option 'layers'.*it has none"),
        ("dtfd", {"pseudobags": 2}, "did you mean 'pseudo_bags'"),
        ("dtfd", {"pseudo_bags": 2.5}, "no int"),
        ("dtfd", {"pseudo_bags": True}, "no int"),
        ("dtfd", {"pseudo_bags": 0}, "1 or more"),
        ("clam-sb", {"subtyping": "yes"}, "no bool"),
        ("clam-sb", {"instance_tiles": 0}, "1 or more"),
        ("clam-mb", {"instance_weight": 1}, "less than 1"),
        ("abmil", {"heads": 2}, "set mil.heads"),
        ("transmil", {"landmarks": 0}, "1 or more"),
        ("transformer", {"layers": 0}, "1 or more"),
        ("perceiver", {"latents": 0}, "1 or more"),
        (FUNCTION, {"encoder": "mean"}, "no option 'encoder'"),
        (OWN, {"powr": 2.0}, "did you mean 'power'"),
    ],
)
def test_what_does_not_exist_is_refused(name, options, words):
    with pytest.raises(UsageError, match=words):
        network(name, options=options)


@pytest.mark.parametrize("name", ["transmil", "transformer", "perceiver"])
def test_heads_must_divide_the_width(name):
    with pytest.raises(UsageError, match=r"multiple of mil\.heads"):
        network(name, heads=3)


def test_ones_own_class_is_given_its_options_and_the_settings_it_asks_for():
    model = network(OWN, options={"power": 4}, heads=2)
    assert isinstance(model.aggregator, OwnMean)
    assert model.aggregator.power == 2.0
    assert model.aggregator.head.in_features == 6  # features as they are


def one_of_titan(features_ND, coords_N2, tile_side_level0):
    """Says what it was given."""
    return np.concatenate([features_ND[0], coords_N2[0], coords_N2[-1], [tile_side_level0]])


def broken(features_ND, coords_N2, tile_side_level0):
    return features_ND[:, 0] * (np.nan if len(features_ND) > 2 else 1.0)


def test_slide_encoders_are_given_raw_features_and_corners_in_pixels():
    model = network(f"python:{HERE}:one_of_titan", options={"tile_side_level0": 448.0})
    model.mean_D.fill_(7.0)
    model.scale_D.fill_(3.0)
    one = bag(20)
    first = int((one.xy_N2[:, 1] * 1000 + one.xy_N2[:, 0]).argmin())
    vector = model(pack(one)).slide_BH[0].numpy()
    np.testing.assert_array_equal(vector[:6], one.tile_NH[first].numpy())
    np.testing.assert_array_equal(vector[6:8], np.round(one.xy_N2[first].numpy() * 448))
    assert vector[-1] == 448
    assert model.aggregator.identity.startswith(f"python:{HERE}:one_of_titan ")


def test_only_the_head_of_a_slide_encoder_is_trained_and_saved():
    model = network(FUNCTION)
    assert {name for name, _ in model.named_parameters()} == {"aggregator.head.weight", "aggregator.head.bias"}


def test_a_slide_encoder_that_gives_no_vector_is_named():
    with pytest.raises(SlideError, match=r"broken gives \[20\], not one vector of finite numbers"):
        network(f"python:{HERE}:broken")(pack(bag(20)))


def test_a_slide_encoder_refuses_features_of_another_length(monkeypatch):
    from pathfm.models import slide_encoders
    from pathfm.models.cards import CARDS

    def load(device):
        return slide_encoders.SlideEncoder("titan", "titan 1", slide_encoders.mean_vector, 768, CARDS["conch-v1.5"])

    monkeypatch.setitem(slide_encoders.SLIDE_ENCODERS, "titan", load)
    with pytest.raises(UsageError, match=r"titan takes 768 features per tile, these are 6 .*conch-v1\.5"):
        network("titan")
    assert network("titan", dim=768).aggregator.head.in_features == 768


def test_names_are_looked_up_before_slide_encoders():
    assert find_aggregator("mean") == (AGGREGATORS["mean"], {})
