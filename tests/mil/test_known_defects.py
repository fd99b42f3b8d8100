"""Mistakes that other tools make, and ours must not: named after the tool. ``docs/known-defects.md`` lists all of them.

Those that are tested elsewhere are not tested again; that their tests exist is.
"""

import ast
import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.metrics import roc_auc_score

from pathfm.errors import UsageError
from pathfm.mil.aggregators.contract import Aggregator, Packed, Pooled
from pathfm.mil.aggregators.registry import AGGREGATORS
from pathfm.mil.bags import Bag, Bags
from pathfm.mil.ensemble import load_member
from pathfm.mil.explain import gradient_maps, tile_scores
from pathfm.mil.feature_cache import FeatureCache
from pathfm.mil.fit import FoldJob, ask, fit_folds
from pathfm.mil.network import NetworkSpec, build_network, spec_from_record
from pathfm.mil.passes import Reader
from pathfm.mil.splits import PatientFacts, make_splits
from pathfm.mil.stage import run_mil
from pathfm.mil.tasks import make_tasks
from pathfm.mil_settings import MilSettings
from pathfm.store.commit import content_digest
from pathfm.store.feature_file import write_features

from .conftest import planted

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "known-defects.md"
DIM, COUNT = 7, 12
TRAIN, HELD = tuple(range(8)), (8, 9, 10, 11)
TILES = [3 + place for place in range(COUNT)]


SEEN = []
"""Of each call of a ``Spy``: whether it was in training mode, with gradients, lengths of the bags, places of the tiles."""


class Spy(Aggregator):
    """Mean pooling with batch normalisation, which notes how it was asked."""

    def __init__(self, width, outputs):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(width)
        self.head = torch.nn.Linear(width, outputs)

    def forward(self, packed):
        SEEN.append((self.training, torch.is_grad_enabled(), packed.lengths, packed.xy_N2))
        tile_NH = self.norm(packed.tile_NH)
        slide_BH = torch.stack([part.mean(0) for part in tile_NH.split(list(packed.lengths))])
        return Pooled(self.head(slide_BH), slide_BH)


def settings(**changes):
    small = {"hidden": 8, "attention": 4, "epochs": 3, "batch_bags": 4, "precision": "fp32"}
    return MilSettings(**{**small, **changes})


def make_bags(folder, shift_held=0.0):
    rng, cache = np.random.default_rng(0), FeatureCache(10**7, folder / "scratch")
    folder.mkdir(exist_ok=True)
    for place, tiles in enumerate(TILES):
        feature_ND = rng.normal(place % 2 + shift_held * (place in HELD), 1, (tiles, DIM)).astype(np.float16)
        xy_level0 = np.stack([np.arange(tiles) % 3, np.arange(tiles) // 3], 1).astype(np.int64) * 16
        write_features(folder / f"{place}.h5", feature_ND, xy_level0, {"fingerprint": "f"})
        cache.add(str(place), folder / f"{place}.h5")
    return Bags(cache, [(str(place),) for place in range(COUNT)])


@pytest.fixture(scope="module")
def bags(tmp_path_factory):
    return make_bags(tmp_path_factory.mktemp("bags"))


def fitted(bags, mil, rows=None, train=TRAIN, held=HELD):
    """One network of one fold."""
    rows = rows or [{"label": "ab"[place % 2]} for place in range(COUNT)]
    tasks, found = make_tasks(mil, rows), []
    fit_folds(bags, tasks.encode(rows), tasks, [FoldJob(0, train, held, (1,))], mil, lambda _, members: found.extend(members))
    return found[0]


def network(name, outputs=2, dim=DIM, seed=0):
    built = build_network(NetworkSpec(dim, outputs, name, hidden=8, attention=4))
    built.draw_weights(torch.Generator().manual_seed(seed))
    return built


def tiles(count, seed=1):
    draw = torch.Generator().manual_seed(seed)
    place = torch.arange(count)
    return Bag(torch.randn(count, DIM, generator=draw), torch.stack([place % 9, place // 9], dim=1).float())


# Training and validation


def test_torchmil_validation_runs_in_eval_mode_without_gradients(bags):
    SEEN.clear()
    fitted(bags, settings(aggregator=f"{__name__}:Spy"))
    assert {(training, gradients) for training, gradients, *_ in SEEN} == {(True, True), (False, False)}
    asked = [lengths for training, _, lengths, _ in SEEN if not training]
    assert sorted(asked) == sorted((TILES[place],) for place in HELD * 3)


def test_torchmil_batch_statistics_learn_nothing_from_validation(bags, tmp_path):
    mil = settings(aggregator=f"{__name__}:Spy", epochs=1)
    one, other = fitted(bags, mil), fitted(make_bags(tmp_path / "strange", shift_held=9.0), mil)
    states = [member.network.state_dict() for member in (one, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert one.curve[0].train == other.curve[0].train
    assert one.curve[0].validation != other.curve[0].validation


def test_stamp_small_bags_are_the_same_bags_in_training_and_when_asked(bags):
    """Elsewhere filled with zeros up to 512 tiles in training only."""
    SEEN.clear()
    fitted(bags, settings(aggregator=f"{__name__}:Spy", epochs=1))
    learned = [length for training, _, lengths, _ in SEEN if training for length in lengths]
    assert sorted(learned) == sorted(TILES[place] for place in TRAIN)


def test_nnmil_draws_other_tiles_every_epoch(bags):
    SEEN.clear()
    fitted(bags, settings(aggregator=f"{__name__}:Spy", max_bag_tiles=2, batch_bags=8, patience=3))
    epochs = [sorted(map(tuple, places_N2.tolist())) for training, _, _, places_N2 in SEEN if training]
    assert [len(places) for places in epochs] == [2 * len(TRAIN)] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_patho_bench_a_validation_part_smaller_than_a_batch_has_a_loss(bags):
    member = fitted(bags, settings(batch_bags=8), train=tuple(range(11)), held=(11,))
    assert np.isfinite(member.curve).all()


@pytest.mark.parametrize("kind", ["cox", "discrete"])
def test_stamp_a_validation_part_without_events_does_not_end_training(bags, kind):
    rows = [{"t": str(1 + place % 5), "e": str(int(place not in HELD))} for place in range(COUNT)]
    member = fitted(bags, settings(label="os", kind=kind, time="t", event="e"), rows)
    assert np.isfinite(member.curve).all()


def test_rrt_a_part_to_stop_by_cannot_be_done_without():
    """Elsewhere its share is 0 by default, and the tested part takes its place."""
    with pytest.raises(ValidationError, match="inner_fraction"):
        MilSettings(inner_fraction=0.0)
    stratum = {f"p{number:02d}": "ab"[number % 2] for number in range(24)}
    facts = {patient: PatientFacts(site=("abcd"[number % 4],)) for number, patient in enumerate(stratum)}
    for scheme in ("folds", "monte-carlo", "site", "site-preserved"):
        mil = settings(split={"scheme": scheme}, folds=2, inner_fraction=0.01)
        for fold in make_splits(stratum, facts, (), mil, "binary").folds:
            assert fold.validation and not set(fold.validation) & {*fold.train, *fold.test}


def test_slideflow_a_misspelt_setting_is_not_passed_on():
    with pytest.raises(ValidationError, match="shufle"):
        MilSettings(shufle=False)


# Aggregators


@pytest.mark.parametrize("aggregator", ["clam-sb", "clam-mb"])
def test_torchmil_clam_learns_with_a_binary_cross_entropy_too(bags, aggregator):
    rows = [{"x": str(place % 2), "y": str(place // 2 % 2)} for place in range(COUNT)]
    member = fitted(bags, settings(aggregator=aggregator, label="both", kind="multilabel", columns=("x", "y")), rows)
    assert np.isfinite(member.curve).all()
    assert ask(member.network, bags.read(0)).output_O.shape == (2,)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_mil_lab_no_network_needs_a_label_when_it_is_asked(name):
    model, bag = network(name).eval(), tiles(20)
    packed = Packed(bag.feature_ND, (20,), bag.xy_N2)
    said = [model(packed._replace(class_B=label)) for label in (None, torch.tensor([0]), torch.tensor([1]))]
    assert all(torch.equal(each.output_BO, said[0].output_BO) and each.extra is None for each in said)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_slideflow_no_head_shares_statistics_between_bags(name):
    assert not any(isinstance(part, torch.nn.modules.batchnorm._NormBase) for part in network(name).modules())


@pytest.mark.parametrize("name", AGGREGATORS)
def test_slideflow_networks_of_every_kind_have_a_map(bags, name):
    tasks = make_tasks(settings(), [{"label": "a"}, {"label": "b"}])
    member = fitted(bags, settings(aggregator=name, epochs=1))
    explained = tile_scores(ask(member.network, bags.read(5)), [member], bags.read(5), tasks)
    assert len(explained.value_NC) == TILES[5]
    assert np.isfinite(explained.value_NC).all() and np.ptp(explained.value_NC) > 0


@pytest.mark.parametrize("name", ["mean", "abmil", "clam-sb", "dtfd"])
def test_eva_every_tile_of_a_large_bag_counts(name):
    """Elsewhere tiles beyond the ten-thousandth are cut off."""
    bag, model = tiles(12_000), network(name)
    feature_ND = bag.feature_ND.clone()
    feature_ND[-1] += 300
    changed = ask(model, Bag(feature_ND, bag.xy_N2)).output_O - ask(model, bag).output_O
    assert np.abs(changed).max() > 1e-4


def test_nnmil_the_length_of_features_is_never_guessed(bags):
    assert fitted(bags, settings(epochs=1)).network.spec.dim == DIM
    record = network("abmil").spec.record()
    del record["dim"]
    with pytest.raises(UsageError, match="dim missing"):
        spec_from_record(record)


def test_slideflow_attention_has_no_sign_and_the_signed_map_has():
    """A tile may be looked at for what speaks against the class (slideflow#233, CLAM#95)."""
    tasks = make_tasks(settings(), [{"label": "a"}, {"label": "b"}])
    model = network("abmil")
    with torch.no_grad():
        model.project.weight.zero_()
        model.project.weight[0, 0] = model.project.weight[1, 1] = 1  # feature 0 is looked at, feature 1 is not
        model.project.bias.zero_()
        model.aggregator.head.weight.zero_()
        model.aggregator.head.weight[:, 0] = torch.tensor([1.0, -1.0])  # and speaks against the positive class
    bag = Bag(torch.zeros(5, DIM), tiles(5).xy_N2)
    bag.feature_ND[2, 0] = 3
    said = ask(model, bag)
    assert said.attention_NQ.min() > 0
    assert said.output_O[1] < said.output_O[0]
    signed = gradient_maps([model], bag, tasks).value_NC[:, 0]
    assert signed[2] < 0
    assert signed[2] == signed.min()


# Reported numbers, and runs beside each other


def table(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    study = planted(tmp_path_factory.mktemp("study"), patients=12, slides_each=1, stores=False)
    run_mil(study.study(epochs=3, ensemble=2), study.cohort, study.inputs)
    return study


def test_dsmil_reported_numbers_are_those_of_the_tested_patients(finished):
    """Elsewhere the score of the validation part is reported as that of the test."""
    folder = finished.inputs.mil_dir
    rows = table(folder / "predictions.csv")
    positive = [row["label"] == "tumour" for row in rows]
    said = json.loads((folder / "metrics.json").read_text())["models"]["pretrained encoder"]
    assert said["auroc"]["value"] == pytest.approx(roc_auc_score(positive, [float(row["probability_tumour"]) for row in rows]))
    with FeatureCache(10**7, folder / "scratch") as cache:
        for row in rows:
            cache.add(row["slide_id"], finished.inputs.feature_file("main", row["slide_id"]))
            members = [load_member(folder / f"models/fold-{row['fold']}/member-{number}.safetensors") for number in (0, 1)]
            bag = Bags(cache, [(row["slide_id"],)]).read(0)
            logits = np.array([ask(member.network, bag).output_O for member in members])
            mean = np.mean(1 / (1 + np.exp(logits[:, 0] - logits[:, 1])))
            assert float(row["probability_tumour"]) == pytest.approx(mean, abs=1e-5)


SECOND = """
import sys; sys.path.insert(0, {root!r})
from pathlib import Path
from tests.mil.test_known_defects import short_of_memory
short_of_memory(Path({base!r}))
"""


def short_of_memory(base):
    """A run that copies all features into its scratch folder, as it does where they are stored row by row."""
    study = planted(base, patients=12, slides_each=1, stores=False)
    mil = study.study(epochs=3, ensemble=2)
    mil = mil.model_copy(update={"compute": mil.compute.model_copy(update={"feature_cache_gb": 1e-9})})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pathfm.mil.feature_cache.find_place", lambda path: None)
        run_mil(mil, study.cohort, study.inputs)
    return study


@pytest.mark.long
def test_dsmil_a_second_run_in_the_same_folder_does_not_destroy_the_first(finished, tmp_path, monkeypatch):
    """Elsewhere every run empties the temporary folder that all share."""
    show, second = Reader.show, []

    def interrupted(self, *more):
        if not second:
            code = SECOND.format(root=str(ROOT), base=str(tmp_path))
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            second.append(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False))
        return show(self, *more)

    monkeypatch.setattr(Reader, "show", interrupted)
    study = short_of_memory(tmp_path)
    assert second[0].returncode == 0, second[0].stderr.decode()
    assert content_digest(study.inputs.mil_dir) == content_digest(finished.inputs.mil_dir)


# The list

LISTED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def rows():
    """Rows of the tables of defects that can concern us."""
    page = PAGE.read_text(encoding="utf-8").split("## What cannot concern")[0]
    return [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| tool |")]


def functions_of(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_row_of_the_page_has_tests_and_they_exist():
    assert len(rows()) > 60
    assert [row for row in rows() if not LISTED.search(row)] == []
    named = {place for row in rows() for place in LISTED.findall(row)}
    known = {file: functions_of(ROOT / file) for file, _ in named}
    assert sorted(f"{file}::{name}" for file, name in named if name not in known[file]) == []


def test_every_test_of_this_file_is_on_the_page():
    named = {name for row in rows() for _, name in LISTED.findall(row)}
    assert {name for name in functions_of(Path(__file__)) if not name.endswith(("they_exist", "on_the_page"))} <= named
