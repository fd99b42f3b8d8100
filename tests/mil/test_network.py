"""The whole network: standardisation, projection, dropout, and its record."""

import json

import pytest
import torch

from pathfm.errors import UsageError
from pathfm.mil.aggregators.registry import AGGREGATORS
from pathfm.mil.network import Network, NetworkSpec, build_network, spec_from_record, spec_of
from pathfm.mil_settings import MilSettings
from tests.mil.aggregators.examples import Bag, bag, close, network, pack


def _standardised(model):
    draw = torch.Generator().manual_seed(5)
    model.mean_D.copy_(torch.randn(6, generator=draw))
    model.scale_D.copy_(torch.rand(6, generator=draw) + 0.5)
    return model


def test_the_standardisation_is_folded_into_the_projection():
    model = _standardised(network("mean"))
    one = bag(30)
    hidden = model.project((one.tile_NH - model.mean_D) / model.scale_D)
    close(model.embed(one.tile_NH), hidden)
    close(model(pack(one)).output_BO, model.aggregator.head(hidden.relu().mean(0, keepdim=True)))


def test_folding_keeps_its_precision_under_autocast():
    model = _standardised(network("mean"))
    single = model.folded()
    with torch.autocast("cpu", torch.bfloat16):
        half = model.folded()
    assert all(torch.equal(one, two) for one, two in zip(single, half, strict=True))


@pytest.mark.parametrize("name", ["abmil", "transmil", "dtfd"])
def test_several_networks_may_share_one_matrix_product(name):
    models = [_standardised(network(name, seed=seed)) for seed in range(3)]
    packed = pack(bag(30), bag(4, 2))
    weights, biases = zip(*(model.folded() for model in models), strict=True)
    embedded_NK = torch.nn.functional.linear(packed.tile_NH, torch.cat(weights), torch.cat(biases))
    for model, embedded_NH in zip(models, embedded_NK.chunk(3, dim=1), strict=True):
        close(model.pool(embedded_NH, packed).output_BO, model(packed).output_BO)


def test_features_of_half_precision_are_read_as_they_are():
    model, one = _standardised(network("abmil")), bag(30)
    half = Bag(one.tile_NH.half(), one.xy_N2)
    assert torch.equal(model(pack(half)).output_BO, model(pack(Bag(half.tile_NH.float(), one.xy_N2))).output_BO)


@pytest.mark.parametrize("dropout", [0.25, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_the_stated_share_and_keeps_the_mean(dropout, dtype):
    model = network("mean", dropout=dropout).train()
    x_NH = torch.ones(5000, 64, dtype=dtype, requires_grad=True)
    active_NH = model._activate(x_NH, torch.Generator().manual_seed(0))
    active_NH.sum().backward()
    y_NH = active_NH.detach()
    assert abs(float((y_NH == 0).double().mean()) - min(dropout, 255 / 256)) < 1 / 256
    assert abs(float(y_NH.double().mean()) - 1) < 0.1
    assert abs(float((y_NH == 0).double().mean(0).max()) - dropout) < 0.05
    assert torch.equal(x_NH.grad, y_NH)  # of ones: what came out is the slope


def test_the_gradient_of_dropout_is_that_of_relu_and_a_mask():
    model = network("mean", dropout=0.5).train()
    x_NH = torch.randn(50, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y_NH = model._activate(x_NH, torch.Generator().manual_seed(0))
    mask_NH = model._activate(torch.ones(50, 16), torch.Generator().manual_seed(0))
    close(y_NH, x_NH.relu() * mask_NH)
    (y_NH**2).sum().backward()
    other_NH = x_NH.detach().clone().requires_grad_()
    ((other_NH.relu() * mask_NH) ** 2).sum().backward()
    close(x_NH.grad, other_NH.grad)


def test_dropout_needs_training_and_noise():
    model, one = network("mean", dropout=0.5), bag(30)
    silent = model(pack(one)).output_BO
    assert torch.equal(model(pack(one, noise=torch.Generator())).output_BO, silent)
    assert torch.equal(model.train()(pack(one)).output_BO, silent)
    assert not torch.equal(model(pack(one, noise=torch.Generator())).output_BO, silent)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_network_comes_back_from_its_record_and_its_state(name):
    options = {"dtfd": {"pseudo_bags": 3}, "clam-sb": {"subtyping": True}, "perceiver": {"latents": 4}}.get(name, {})
    model = _standardised(network(name, options=options, heads=2))
    record = json.loads(json.dumps(model.spec.record()))
    again = build_network(spec_from_record(record)).eval()
    again.load_state_dict(model.state_dict())
    assert again.spec == model.spec
    packed = pack(bag(30), bag(3, 2))
    assert torch.equal(again(packed).output_BO, model(packed).output_BO)


def test_a_record_of_another_version_is_refused():
    record = NetworkSpec(4, 2).record()
    with pytest.raises(UsageError, match="colour missing or unknown"):
        spec_from_record({**record, "colour": 1})
    with pytest.raises(UsageError, match="dim missing or unknown"):
        spec_from_record({name: value for name, value in record.items() if name != "dim"})


def test_the_settings_make_the_spec():
    settings = MilSettings(aggregator="dtfd", options={"pseudo_bags": 3}, hidden=32, attention=16, heads=2, dropout=0.1)
    assert spec_of(settings, 10, 4) == NetworkSpec(10, 4, "dtfd", {"pseudo_bags": 3}, 32, 16, 2, 0.1)


def test_the_weights_do_not_depend_on_the_place_where_they_were_made():
    torch.manual_seed(0)
    one = Network(NetworkSpec(6, 2))
    torch.manual_seed(1)
    two = Network(NetworkSpec(6, 2))
    for model in (one, two):
        model.draw_weights(torch.Generator().manual_seed(3))
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
