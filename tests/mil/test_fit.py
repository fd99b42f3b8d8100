"""Training: against a plain loop, to the bit whatever runs beside it, and without the field's known mistakes."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn.functional import cross_entropy

from pathfm.errors import SlideError, StoreError, TrainingError
from pathfm.mil.aggregators.contract import Packed
from pathfm.mil.aggregators.registry import AGGREGATORS
from pathfm.mil.bags import Bag, Bags
from pathfm.mil.batches import Collector, draw_copies
from pathfm.mil.feature_cache import FeatureCache
from pathfm.mil.fit import CPU, FoldJob, Machine, ask, fit_folds, training_dtype
from pathfm.mil.learner import Course, FoldLearner
from pathfm.mil.member import FoldTargets
from pathfm.mil.network import NetworkSpec, build_network, spec_of
from pathfm.mil.passes import Reader
from pathfm.mil.projection import Stretch, project_together
from pathfm.mil.tasks import make_tasks
from pathfm.mil_settings import MilSettings
from pathfm.store.feature_file import write_features

DIM, COUNT = 8, 24


def settings(**changes) -> MilSettings:
    small = {"hidden": 12, "attention": 6, "epochs": 4, "batch_bags": 4, "precision": "fp32", "max_bag_tiles": 20, "lr": 3e-3}
    return MilSettings(**{**small, **changes})


def make_bags(folder, offset=0.0, strange=(), shift=4.0):
    """24 bags of 10 to 40 tiles; in odd ones two tiles carry a signal. ``strange`` ones hold something else altogether."""
    folder.mkdir(exist_ok=True)
    rng, cache = np.random.default_rng(0), FeatureCache(10**7, folder / "scratch")
    for number in range(COUNT):
        count = int(rng.integers(10, 40))
        feature_ND = rng.normal(offset, 1, (count, DIM))
        feature_ND[:2, :3] += shift * (number % 2)
        if number in strange:
            feature_ND = feature_ND * -7 + 3
        xy_level0 = np.stack([np.arange(count) % 5, np.arange(count) // 5], 1).astype(np.int64) * 16
        write_features(folder / f"{number}.h5", feature_ND.astype(np.float16), xy_level0, {"fingerprint": "f"})
        cache.add(str(number), folder / f"{number}.h5")
    return Bags(cache, [(str(number),) for number in range(COUNT)])


@pytest.fixture(scope="module")
def bags(tmp_path_factory):
    return make_bags(tmp_path_factory.mktemp("bags"))


def folds(number=3, seeds=(1, 2)):
    parts = [tuple(place for place in range(COUNT) if place // 2 % (number + 1) == part) for part in range(number + 1)]
    rest = [[part for part in parts if part not in parts[k : k + 2]] for k in range(number)]
    return [FoldJob(k, tuple(sorted(sum(rest[k], ()))), parts[k + 1], seeds) for k in range(number)]


def unseen(job):
    return [place for place in range(COUNT) if place not in job.train + job.validation]


def labels(**columns):
    rows = [{"label": "pos" if number % 2 else "neg"} for number in range(COUNT)]
    return [{**row, **{name: values[number] for name, values in columns.items()}} for number, row in enumerate(rows)]


def train(bags, mil, jobs, workers=1, rows=None):
    tasks, fitted = make_tasks(mil, rows or labels()), {}
    fit_folds(
        bags,
        tasks.encode(rows or labels()),
        tasks,
        jobs,
        mil,
        lambda job, nets: fitted.setdefault(job.number, nets),
        Machine(CPU, workers),
    )
    return fitted


def weights(fitted):
    return torch.cat([value.double().flatten() for value in fitted.network.state_dict().values()])


def same(first, second):
    return all(
        torch.equal(weights(a), weights(b)) and a.curve == b.curve and a.best_epoch == b.best_epoch
        for a, b in zip(first, second, strict=True)
    )


def plain_loop(bags, mil, job, seed):
    """The slow plain version: one network, features standardised by itself, a pass of its own for every use."""
    network = build_network(spec_of(mil, bags.dim, 2))
    network.draw_weights(torch.Generator().manual_seed(seed))
    for buffer, value in zip((network.mean_D, network.scale_D), bags.statistics(job.train), strict=True):
        buffer.copy_(value)
    optimizer = torch.optim.AdamW(network.parameters(), lr=mil.lr, weight_decay=mil.weight_decay)
    steps = mil.epochs * -(-len(job.train) // mil.batch_bags)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + np.cos(np.pi * step / steps)) / 2)
    reader, curve = Reader(bags, mil.seed, mil.max_bag_tiles, torch.float32, CPU), []
    for epoch in range(mil.epochs):
        network.train()
        order, losses = [place for place in reader.order(epoch) if place in job.train], []
        while order:
            places, order = order[: mil.batch_bags], order[mil.batch_bags :]
            shown = [reader.show(place, epoch, False).drawn for place in places]
            features, xy = torch.cat([each.features() for each in shown]), torch.cat([each.xy_N2 for each in shown])
            output_BO = network(Packed(features, tuple(len(each.rest_ND) for each in shown), xy)).output_BO
            loss = cross_entropy(output_BO, torch.tensor([place % 2 for place in places]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        curve.append((np.mean(losses), held_loss(network, bags, job.validation)))
    return network, np.array(curve)


def held_loss(network, bags, places):
    said = torch.tensor(np.stack([ask(network, bags.read(place)).output_O for place in places]))
    return float(cross_entropy(said, torch.tensor([place % 2 for place in places])))


def test_training_in_lock_step_is_a_plain_loop(bags):
    mil, job = settings(dropout=0.0, balance="none", batch_bags=5), folds()[1]
    fitted = train(bags, mil, folds())[1]
    for member, seed in zip(fitted, job.seeds, strict=True):
        network, curve = plain_loop(bags, mil, job, seed)
        np.testing.assert_allclose(np.array(member.curve), curve, atol=2e-4)
        assert member.best_epoch == mil.epochs - 1
        for place in range(COUNT):
            said = [ask(each, bags.read(place)).output_O for each in (member.network, network)]
            np.testing.assert_allclose(*said, atol=2e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_planted_signal_is_found_in_bags_never_seen(bags, precision):
    jobs = folds()
    fitted = train(bags, settings(epochs=25, lr=1e-2, precision=precision, patience=25), jobs)
    for job in jobs:
        for member in fitted[job.number]:
            said = [ask(member.network, bags.read(place)) for place in unseen(job)]
            assert roc_auc_score([place % 2 for place in unseen(job)], [a.output_O[1] - a.output_O[0] for a in said]) > 0.9


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_workers_and_other_folds_change_nothing(bags, precision):
    mil, jobs = settings(precision=precision), folds()
    alone = train(bags, mil, jobs)
    for workers, some in ((2, jobs), (3, jobs[::-1]), (1, jobs[1:2]), (2, jobs[:2])):
        for number, fitted in train(bags, mil, some, workers).items():
            assert same(fitted, alone[number])


def test_seeds_make_members_and_nothing_else_is_random(bags):
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    first, second = train(bags, settings(), folds(seeds=(1, 2)))[0]
    assert not torch.equal(weights(first), weights(second))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    other = train(bags, settings(seed=1), folds(seeds=(1, 2)))[0][0]
    assert not torch.equal(weights(first), weights(other))


def test_bags_are_read_and_cast_once_per_epoch_however_many_networks(bags, monkeypatch):
    shown, show = [], Reader.show
    monkeypatch.setattr(Reader, "show", lambda self, place, *rest: shown.append(place) or show(self, place, *rest))
    before, mil = bags.cache.bytes_read, settings(patience=9)
    train(bags, mil, folds(seeds=(1, 2, 3)), workers=2)
    held = {place for job in folds() for place in job.validation}
    assert len(shown) == mil.epochs * COUNT + len(held)  # the last validation has a pass of its own
    assert all(shown.count(place) == mil.epochs + (place in held) for place in range(COUNT))
    size = 2 * DIM * (mil.epochs * sum(bags.lengths) + sum(bags.lengths[place] for place in held))
    assert bags.cache.bytes_read - before == size


def test_tiles_are_drawn_afresh_each_epoch_and_the_same_for_all(bags):
    """Not so where a generator is made from the seed and the index alone, in every call: the same tiles every epoch."""
    reader = Reader(bags, 3, 8, torch.float32, CPU)
    draws = [reader.show(0, epoch, False).drawn.features() for epoch in range(4)]
    assert all(len(draw) == 8 for draw in draws)
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(draws))
    assert torch.equal(draws[2], reader.show(0, 2, True).drawn.features())
    whole_ND = torch.cat([piece.features() for piece in reader.show(0, 2, True).whole()])
    torch.testing.assert_close(whole_ND, bags.read(0).feature_ND.float(), atol=1e-6, rtol=0)
    rows = {tuple(row) for row in whole_ND.tolist()}
    assert len({tuple(row) for row in draws[2].tolist()} & rows) == 8
    assert sorted(reader.order(0)) == sorted(reader.order(1)) != reader.order(1)


def test_bags_that_are_tested_have_no_part(bags, tmp_path):
    """Not even in early stopping, standardisation or rounding."""
    job = folds()[0]
    changed = make_bags(tmp_path / "changed", strange=unseen(job))
    for precision in ("fp32", "bf16"):
        mil = settings(precision=precision)
        rows = labels()
        for place in unseen(job):
            rows[place] = {"label": "pos"}
        assert same(train(bags, mil, [job])[0], train(changed, mil, [job], rows=rows)[0])


def test_validation_stops_and_does_not_teach(bags):
    job = folds()[0]
    rows = labels()
    for place in job.validation:
        rows[place] = {"label": "neg" if place % 2 else "pos"}
    mil = settings(balance="none", epochs=6, patience=6)
    honest, swapped = train(bags, mil, [job])[0][0], train(bags, mil, [job], rows=rows)[0][0]
    assert [loss.train for loss in honest.curve] == [loss.train for loss in swapped.curve]
    assert [loss.validation for loss in honest.curve] != [loss.validation for loss in swapped.curve]


def test_validation_runs_in_eval_mode_on_whole_bags(bags):
    """Not with dropout, moving statistics and gradients, as in a known trainer; nor on the tiles drawn for training."""
    job = folds()[0]
    for member in train(bags, settings(dropout=0.9, max_bag_tiles=3, balance="none"), [job])[0]:
        assert not member.network.training
        assert not any(parameter.grad is not None for parameter in member.network.parameters())
        stated = member.curve[member.best_epoch].validation
        assert stated == min(loss.validation for loss in member.curve)
        assert stated == pytest.approx(held_loss(member.network, bags, job.validation), abs=1e-5)


def test_training_stops_when_validation_has_not_improved_for_so_long(bags):
    fitted = train(bags, settings(epochs=60, patience=3, lr=0.05), folds(seeds=(1, 2, 3)))
    lengths = {(len(member.curve), member.best_epoch) for members in fitted.values() for member in members}
    assert all(length in (best + 4, 60) for length, best in lengths)
    assert len(lengths) > 1  # members stop on their own
    assert min(length for length, _ in lengths) < 60


def test_a_loss_that_is_not_finite_names_fold_and_member(bags):
    with pytest.raises(TrainingError, match=r"fold 1, member 0: the loss is not finite in epoch \d \(lower mil.lr\)"):
        train(bags, settings(lr=1e30), folds()[1:2], workers=2)


@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_fold_without_bags_is_refused(bags, part):
    parts = {"train": (0, 1), "validation": (2, 3), part: ()}
    with pytest.raises(TrainingError, match="fold 7: there are no"):
        train(bags, settings(), [FoldJob(7, seeds=(1,), **parts)])


def test_a_file_that_goes_ends_training_with_its_name(tmp_path):
    bags = make_bags(tmp_path)
    with FeatureCache(0, tmp_path / "scratch") as cache:
        for number in range(COUNT):
            cache.add(str(number), tmp_path / f"{number}.h5")
        (tmp_path / "5.h5").unlink()
        with pytest.raises(StoreError, match=r"5\.h5"):
            train(Bags(cache, bags.units), settings(), folds(), workers=2)


def test_done_is_called_as_folds_finish_and_may_raise(bags):
    calls = []

    def done(job, fitted):
        calls.append((job.number, len(fitted)))
        raise OSError("full")

    tasks = make_tasks(settings(), labels())
    with pytest.raises(OSError, match="full"):
        fit_folds(bags, tasks.encode(labels()), tasks, folds(), settings(), done, Machine(CPU, 2))
    assert calls == [(0, 2)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_every_aggregator_can_be_trained(bags, aggregator, precision):
    mil = settings(aggregator=aggregator, precision=precision, epochs=2, hidden=16, attention=8)
    for member in train(bags, mil, folds()[:1])[0]:
        assert np.isfinite(member.curve).all()
        assert np.isfinite(ask(member.network, bags.read(0)).output_O).all()


TIMES = [f"{1 + number * 7 % 11}" for number in range(COUNT)]
KINDS = {
    "ordinal": ({"kind": "ordinal", "order": ("neg", "pos")}, {}),
    "multilabel": ({"kind": "multilabel", "columns": ("x", "y")}, {"x": ["0", "1"] * 12, "y": ["1", "", "0"] * 8}),
    "regression": ({"kind": "regression", "label": "v"}, {"v": [*["", "2.5"] * 6, *["-1", "4"] * 6]}),
    "cox": ({"kind": "cox", "time": "t", "event": "e"}, {"t": TIMES, "e": ["1", "1", "0"] * 8}),
    "discrete": ({"kind": "discrete", "time": "t", "event": "e"}, {"t": TIMES, "e": ["1", "1", "0"] * 8}),
    "several": ({"also": ({"kind": "cox", "label": "os", "time": "t", "event": "e"},)}, {"t": TIMES, "e": ["1", "1", "0"] * 8}),
}


@pytest.mark.parametrize(("changes", "columns"), KINDS.values(), ids=KINDS)
def test_every_kind_of_task_can_be_trained(bags, changes, columns):
    mil, rows = settings(**changes), labels(**columns)
    alone = train(bags, mil, folds(), rows=rows)
    assert all(np.isfinite(member.curve).all() for fitted in alone.values() for member in fitted)
    assert same(train(bags, mil, folds()[2:], workers=2, rows=rows)[2], alone[2])
    tasks = make_tasks(mil, rows)
    output_BO = np.stack([ask(alone[0][0].network, bags.read(place)).output_O for place in range(COUNT)])
    assert np.isfinite(tasks.predict(output_BO, alone[0][0].states)).all()


def test_a_loss_over_the_whole_fold_sees_the_latest_outputs_of_all_its_bags(bags):
    """Not those of a small batch alone, in which few risk sets mean anything."""
    changes, columns = KINDS["cox"]
    mil, rows, job = settings(**changes, dropout=0.0), labels(**columns), folds()[0]
    tasks = make_tasks(mil, rows)
    learner = FoldLearner(job, Course(bags, tasks.encode(rows), tasks, mil, CPU, torch.float32))
    reader, member = Reader(bags, 0, None, torch.float32, CPU), learner.members[0]
    before = [ask(member.snapshot, bags.read(place)).output_O for place in job.train]
    for place in job.train:
        learner.see(reader.show(place, 0, True))
    learner.end_pass()
    torch.testing.assert_close(member.bank_FO, torch.tensor(np.stack(before)).float())
    for place in job.train[: mil.batch_bags] * 2:
        learner.see(reader.show(place, 1, True))
    changed = (member.bank_FO - torch.tensor(np.stack(before)).float()).abs().sum(1) > 1e-4
    assert changed[: mil.batch_bags].all()
    assert not changed[mil.batch_bags :].any()


@pytest.mark.parametrize("batch_bags", [1, 8])
def test_a_rare_class_weighs_as_much_as_the_common_one_over_an_epoch(batch_bags):
    """Where a batch's loss is divided by the weights in it, they cancel when a batch is one bag."""
    tasks = make_tasks(settings(), labels())
    target_FT = (np.arange(COUNT) % 6 == 0).astype(float)[:, None]
    targets, output_FO = FoldTargets(tasks, target_FT, target_FT, "weights", CPU), torch.zeros(COUNT, 2, requires_grad=True)
    for place in torch.arange(COUNT).split(batch_bags):
        tasks.loss(output_FO[place], targets.train_FT[place], targets.train_FK[place]).backward()
    rare, common = (output_FO.grad[targets.train_FT[:, 0] == value].abs().sum().item() for value in (1, 0))
    assert rare == pytest.approx(common)
    assert rare + common == pytest.approx(COUNT / batch_bags)


def test_a_bag_that_is_shown_whole_comes_in_pieces_however_large(bags, monkeypatch):
    before = train(bags, settings(), folds()[:1])[0]
    monkeypatch.setattr("pathfm.mil.passes.PIECE_TILES", 7)
    reader = Reader(bags, 3, 8, torch.bfloat16, CPU)
    assert [len(piece.rest_ND) for piece in reader.show(0, 0, True).whole()][:2] == [7, 7]
    for one, other in zip(train(bags, settings(), folds()[:1])[0], before, strict=True):
        np.testing.assert_allclose(np.array(one.curve), np.array(other.curve), atol=1e-6)


def test_progress_is_shown_by_pass_and_an_early_end_is_no_error(bags, monkeypatch):
    passes = []
    monkeypatch.setattr("pathfm.mil.fit.track", lambda made, label, total: [passes.append((label, total)) for _ in made])
    train(bags, settings(epochs=60, patience=2, lr=0.05), folds()[:1])
    assert set(passes) == {("mil: passes over the bags", 61)}
    assert 3 < len(passes) < 61


def test_precision_is_half_by_itself_only_where_that_is_quicker(bags, monkeypatch):
    long = (10, 300, 5000)
    monkeypatch.setattr("pathfm.mil.fit.cpu_has_bf16", lambda: True)
    assert training_dtype(settings(precision="auto"), CPU, bags.lengths) is torch.float32
    assert training_dtype(settings(precision="auto", max_bag_tiles=None), CPU, long) is torch.bfloat16
    assert training_dtype(settings(precision="auto", max_bag_tiles=100), CPU, long) is torch.float32
    assert training_dtype(settings(precision="fp32"), CPU, long) is torch.float32
    monkeypatch.setattr("pathfm.mil.fit.cpu_has_bf16", lambda: False)
    assert training_dtype(settings(precision="auto", max_bag_tiles=None), CPU, long) is torch.float32
    assert training_dtype(settings(precision="bf16"), CPU, bags.lengths) is torch.bfloat16


def test_sampling_draws_rare_classes_as_often_as_common_ones():
    weight_F = np.where(np.arange(40) < 4, 5.0, 5 / 9)
    counts = np.array([draw_copies(weight_F, torch.Generator().manual_seed(seed)) for seed in range(400)])
    assert (counts.sum(1) == 40).all()
    assert counts.min() >= 0
    np.testing.assert_allclose(counts.mean(0), weight_F, atol=0.12)


def test_copies_of_a_bag_are_strewn_and_none_is_lost():
    stretch, copies = Stretch(torch.zeros(2, 3), torch.zeros(3), torch.zeros(2, 2)), [6, 0, 1, 1] * 10
    collector = Collector(4, copies, torch.Generator().manual_seed(0))
    batches = [batch for bag in range(40) for batch in collector.add(bag, stretch)] + collector.rest()
    learned = [bag for batch in batches for bag in batch.place_R]
    assert np.bincount(learned, minlength=40).tolist() == copies
    assert all(len(batch.lengths) == 4 for batch in batches[:-1])
    assert max(batch.place_R.count(0) for batch in batches) < 6


@pytest.mark.parametrize("balance", ["weights", "sampling", "none"])
def test_every_balance_trains_repeatably(bags, balance):
    mil = settings(balance=balance, max_bag_tiles=None)
    assert same(train(bags, mil, folds(), 2)[0], train(bags, mil, folds()[:1])[0])


@pytest.mark.parametrize("name", ["noise", "dropout", "mixup", "statistics"])
def test_augmentation_changes_training_repeatably(bags, name):
    plain, mil = settings(balance="none"), settings(balance="none", augment={name: 0.5})
    first = train(bags, mil, folds(), 2)[0]
    assert same(first, train(bags, mil, folds()[:1])[0])
    assert not same(first, train(bags, plain, folds()[:1])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shared_product_is_each_networks_own_also_far_from_zero(dtype):
    """bfloat16 has eight bits: of features around 100 with a deviation of 1 it would keep next to nothing."""
    feature_ND = torch.randn(60, 16, generator=torch.Generator().manual_seed(0)) + 100
    networks = [build_network(NetworkSpec(16, 2, hidden=width)) for width in (8, 8, 8)]
    for seed, network in enumerate(networks):
        network.draw_weights(torch.Generator().manual_seed(seed))
        network.mean_D.fill_(100.0)
    stretches = []
    for part_ND in feature_ND.split([20, 40]):
        centre_D = part_ND.mean(0)
        stretches.append(Stretch((part_ND - centre_D).to(dtype), centre_D, torch.zeros(len(part_ND), 2)))
    together, gradients = project_together(networks, stretches).split(8, dim=1), []
    tolerance = 1e-4 if dtype is torch.float32 else 0.05
    for network, tile_NH in zip(networks, together, strict=True):
        torch.testing.assert_close(tile_NH.float(), network.embed(feature_ND), atol=tolerance, rtol=tolerance)
    for embedded in (together, [network.embed(feature_ND) for network in networks]):
        loss = sum(tile_NH.float().square().sum() for tile_NH in embedded)
        found = torch.autograd.grad(loss, [p for n in networks for p in n.project.parameters()])
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    torch.testing.assert_close(*gradients, atol=tolerance * float(gradients[1].abs().max()), rtol=tolerance)


def test_a_bag_is_asked_alone_in_pieces_of_any_size(monkeypatch):
    network = build_network(NetworkSpec(DIM, 2, hidden=12, attention=6, dropout=0.5))
    network.draw_weights(torch.Generator().manual_seed(0))
    bag = Bag(torch.randn(30, DIM, generator=torch.Generator().manual_seed(1)).half(), torch.zeros(30, 2))
    network.train()
    first = ask(network, bag)
    monkeypatch.setattr("pathfm.mil.fit.ASK_TILES", 7)
    second = ask(network, bag)
    np.testing.assert_allclose(first.output_O, second.output_O, atol=1e-6)
    assert first.output_O.shape == (2,)
    assert first.attention_NQ.shape == (30, 1)
    assert first.attention_NQ.sum() == pytest.approx(1, abs=1e-6)
    with pytest.raises(SlideError, match="without tiles"):
        ask(network, Bag(bag.feature_ND[:0], bag.xy_N2[:0]))
