"""Settings of stage 4 (``mil``): what is predicted, by which network, how it is trained, split, judged and locked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pathfm.settings import Count, Fraction, NonNegative, Positive, PositiveFloat, Settings

Choice = str | int | float | bool
TaskKind = Literal["auto", "binary", "multiclass", "multilabel", "ordinal", "regression", "cox", "discrete"]


class TaskSettings(Settings):
    """One thing that is predicted. A slide without a value takes no part in this task, and may in others."""

    label: str = "label"
    """Label column of the cohort table: classes, or numbers for regression. For several columns (multilabel, survival) the
    name that the task goes by."""
    kind: TaskKind = "auto"
    """auto: by the labels and the settings below; two classes are binary, more multiclass. cox, discrete: survival."""
    positive: str | None = None
    """The class that counts as positive; default: the last in sorted order (of an ordinal task: the highest)."""
    order: tuple[str, ...] = ()
    """Ordinal: all classes, from lowest to highest."""
    columns: tuple[str, ...] = ()
    """Multilabel: the label columns, each with 0, 1 or nothing."""
    time: str | None = None
    """Survival: column with the time to event or censoring, a positive number in any unit."""
    event: str | None = None
    """Survival: column with 1 where the event was observed, 0 where it was censored."""
    intervals: Annotated[int, Field(ge=2)] = 4
    """Discrete survival: time intervals, of equal numbers of events in the training part."""
    horizons: tuple[PositiveFloat, ...] = ()
    """Survival: times at which survival and the time-dependent AUC are given; default: quartiles of the event times."""
    weight: PositiveFloat = 1.0
    """Weight of this task's loss among several."""


class AugmentSettings(Settings):
    """Augmentation of features, in training only."""

    noise: NonNegative = 0.0
    """Gaussian noise, in standard deviations of each feature."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the feature channels that is silenced in a whole bag."""
    mixup: NonNegative = 0.0
    """Alpha of the Beta law by which the tiles and losses of two bags are mixed; 0: none."""
    statistics: Fraction = 0.0
    """Chance that the channel means and deviations of a bag are mixed with those of another one (MixStyle)."""


class SplitSettings(Settings):
    """Who is tested by networks that learned from whom. Patients are never on two sides, whatever the scheme."""

    scheme: Literal["folds", "monte-carlo", "column", "site", "site-preserved", "file"] = "folds"
    """folds: stratified k-fold; monte-carlo: random test parts; column: train/validation/test (or fold numbers) in the column
    split; site: each site in turn is tested; site-preserved: folds of whole sites; file: a saved splits.json."""
    repeats: Positive = 1
    """Folds: how often the cohort is cut anew."""
    rounds: Positive = 10
    """Monte Carlo: test parts drawn."""
    test_fraction: Annotated[float, Field(gt=0.0, lt=0.9)] = 0.2
    """Monte Carlo: share of the patients in a test part."""
    file: Path | None = None
    """Scheme file: splits.json of an earlier run."""
    keep: bool = True
    """Patients of an earlier run (splits.json) keep their places as the cohort grows; false: the cohort is cut anew."""
    leaks: Literal["refuse", "merge"] = "refuse"
    """What happens when different patients share files, pictures or features: refuse with the list; merge: keep them on one
    side of every split."""

    @model_validator(mode="after")
    def _file_is_named(self) -> Self:
        if (self.scheme == "file") != (self.file is not None):
            raise ValueError("scheme file and the setting file belong together")
        return self


class NumberSettings(Settings):
    """How results are judged."""

    bootstrap: Positive = 2000
    """Resamples of patients for bootstrap intervals."""
    subgroups: tuple[str, ...] = ()
    """Columns of the cohort table by which numbers are also given group by group (site counts as one)."""
    permutations: Count = 0
    """Trainings with shuffled labels for the permutation control; 20 or more, 0: none."""
    label_fractions: tuple[Annotated[float, Field(gt=0.0, lt=1.0)], ...] = ()
    """Shares of the training patients with which the main model is also trained, as 0.25, 0.5, 0.75."""
    operating_points: tuple[Annotated[str, Field(pattern=r"^(youden|(sensitivity|specificity)=0?\.\d+)$")], ...] = ("youden",)
    """Thresholds chosen on out-of-fold scores: youden, sensitivity=0.95, specificity=0.9. Decisions follow the first."""
    calibration: Literal["none", "temperature", "platt", "isotonic"] = "platt"
    """How probabilities are calibrated, on out-of-fold scores (more than two classes: temperature instead of platt)."""
    alpha: Annotated[float, Field(gt=0.0, lt=0.5)] | None = 0.1
    """Error rate that conformal sets may have; none: the model never abstains for doubt."""
    class_wise: bool = False
    """Conformal sets that keep the error rate in every class (Mondrian)."""
    max_distance: Annotated[float, Field(gt=0.5, lt=1.0)] | None = 0.99
    """A slide farther from the training bags than this share of them are from each other is out of distribution; none: off."""

    @model_validator(mode="after")
    def _enough_permutations(self) -> Self:
        if 0 < self.permutations < 20:
            raise ValueError("permutations needs 20 or more to show a spread")
        return self


class MilSettings(TaskSettings):
    """Stage 4: features x labels -> slide classifier. The task of this page comes first; ``also`` has further ones."""

    also: tuple[TaskSettings, ...] = ()
    """Further tasks of the same network."""
    level: Literal["patient", "specimen", "slide"] = "patient"
    """What a bag is: all slides of a patient together (early fusion), of a specimen, or each slide (late fusion: predictions
    are averaged). Numbers are given at this level and at all above."""
    features: Path | None = None
    """Folder of finished feature files (of pathfm, CLAM, TRIDENT, STAMP, LazySlide) instead of the study's own."""
    aggregator: str = "abmil"
    """mean, max, abmil, abmil-plain, clam-sb, clam-mb, dsmil, transmil, dtfd, transformer, perceiver, class-queries, a slide
    encoder of `pathfm encoders`, or one's own MODULE:CLASS."""
    options: Mapping[str, Choice] = {}
    """Options of the aggregator alone, as docs/aggregators.md lists them; an unknown one is refused."""
    hidden: Positive = 128
    """Width of the tile projection."""
    attention: Positive = 64
    """Width of the attention."""
    heads: Positive = 1
    """Attention heads of abmil, or of the transformers."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.25
    """Share of the tile projection's outputs that is dropped in training."""
    split: SplitSettings = SplitSettings()
    """Who is tested by networks that learned from whom."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Outer folds, stratified, grouped by patient."""
    inner_fraction: Annotated[float, Field(gt=0.0, lt=0.9)] = 0.2
    """Share of the training patients kept for early stopping; the test fold is never used for it."""
    ensemble: Positive = 5
    """Networks (seeds) per fold; their probabilities are averaged."""
    search: Mapping[str, Annotated[tuple[Choice, ...], Field(min_length=1)]] = {}
    """Settings of this page that are chosen inside each outer fold (nested cross-validation), as lr: [0.001, 0.0003]."""
    search_folds: Annotated[int, Field(ge=2)] = 3
    """Inner folds of that choice."""
    lr: PositiveFloat = 1e-3
    """Learning rate (AdamW, cosine)."""
    weight_decay: NonNegative = 1e-3
    """Weight decay."""
    epochs: Positive = 60
    """Largest number of epochs."""
    patience: Positive = 15
    """Epochs without a better inner-validation loss before training stops."""
    batch_bags: Positive = 8
    """Bags per optimiser step, packed end to end; 1: one bag per step."""
    max_bag_tiles: Positive | None = 4096
    """Tiles drawn afresh from larger bags each epoch, in training only."""
    balance: Literal["weights", "sampling", "none"] = "weights"
    """Rare classes: weigh more in the loss, are drawn more often, or neither."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of training; auto: bf16 where the device computes it itself, on a CPU only if half of the bags have 200 tiles
    or more (and max_bag_tiles allows as many). Finished networks are always asked in fp32."""
    augment: AugmentSettings = AugmentSettings()
    """Augmentation of features."""
    numbers: NumberSettings = NumberSettings()
    """How results are judged."""
    controls: bool = True
    """Run the controls on the same folds: colour histogram, tile count, untrained encoder, shuffled labels."""
    seen_in_pretraining: Literal["refuse", "mark", "exclude"] | None = None
    """Patients whom the encoder was pretrained on: refuse to judge them; mark what rests on them as transductive; exclude them
    (a study's own encoder is then pretrained without a test part). Default: mark for the study's own encoder, else refuse."""
    seed: int = 0
    """Seed of folds, initial weights and resampling."""

    @property
    def tasks(self) -> tuple[TaskSettings, ...]:
        """All tasks, the main one first."""
        main = TaskSettings.model_validate({name: getattr(self, name) for name in TaskSettings.model_fields})
        return (main, *self.also)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [task.label for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError("two tasks have the same label")
        unknown = sorted(set(self.search) - SEARCHABLE)
        if unknown:
            raise ValueError(f"search knows {', '.join(sorted(SEARCHABLE))}, not {', '.join(unknown)}")
        return self


SEARCHABLE = frozenset(
    {"aggregator", "hidden", "attention", "heads", "dropout", "lr", "weight_decay", "epochs", "patience", "batch_bags"}
)
"""What nested cross-validation may choose."""
