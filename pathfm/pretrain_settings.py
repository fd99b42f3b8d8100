"""Every setting of pretraining: unit, default, and one line that says what it does. The defaults are the preset dinov2-path.

A ``preset`` (``presets.py``) fills in what a study leaves open; whatever the study names wins over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pathfm.presets import PRESETS, filled_in
from pathfm.settings import Count, Fraction, NonNegative, Positive, PositiveFloat, Settings

PATH_SCHEMES = ("local-dir", "dinov2")
"""Kinds of encoder names whose rest is a path."""
Range = tuple[PositiveFloat, PositiveFloat]
PerView = tuple[Fraction, Fraction, Fraction]


class CropSettings(Settings):
    """Multi-crop views of a tile, and what happens to their colours."""

    global_px: Positive = 224
    """Side of the two global crops [px]."""
    local_px: Positive = 96
    """Side of the local crops [px]."""
    local_count: Count = 8
    """Local crops per tile."""
    scale_of: Literal["crop", "tile"] = "crop"
    """What the scales below are shares of: crop, the crop's own area, so that nuclei keep their size (ECT, Virchow2), which
    needs tiles 1.1x as wide as the crops (smaller tiles get smaller crops); tile, the tile's area, which zooms (DINOv2)."""
    global_scale: Range = (0.9, 1.1)
    """Area range of global crops."""
    local_scale: Range = (0.9, 1.1)
    """Area range of local crops."""
    aspect: Range = (0.95, 1.05)
    """Range of width / height of a crop before it is made square."""
    flips: Literal["d4", "horizontal", "none"] = "d4"
    """d4: mirror and turn crops by multiples of 90 degrees, since tissue has no up."""
    jitter_probability: Fraction = 0.8
    """Share of crops whose brightness, contrast, saturation and hue are changed."""
    brightness: NonNegative = 0.2
    """Colour jitter: brightness range."""
    contrast: NonNegative = 0.2
    """Colour jitter: contrast range."""
    saturation: NonNegative = 0.1
    """Colour jitter: saturation range."""
    hue: NonNegative = 0.05
    """Colour jitter: hue range, as a share of the circle."""
    hed: NonNegative = 0.05
    """Stain jitter: standard deviation in haematoxylin-eosin-DAB space (Tellez et al. 2018) [optical density]."""
    hed_probability: Fraction = 0.5
    """Share of crops with stain jitter."""
    gray_probability: Fraction = 0.2
    """Share of crops turned to grey."""
    blur_probability: PerView = (0.5, 0.1, 0.5)
    """Share of blurred crops: first global, second global, local."""
    solarize_probability: PerView = (0.0, 0.0, 0.0)
    """Share of solarised crops (values above a half inverted): first global, second global, local."""


class SamplingSettings(Settings):
    """Which tiles are drawn how often, and in which order. A slide's share is (its tiles) ** slide_power x its weights."""

    slide_power: Fraction = 0.5
    """1: every tile equally often; 0: every slide equally often."""
    weights: Mapping[str, Mapping[str, NonNegative]] = {}
    """Shares of groups, as {mpp: {"0.5": 1, "0.25": 2}, site: {A: 1}}: keys are mpp or columns of the cohort table; values not
    named share what one unit is worth to each of them, and 0 leaves a group out."""
    quality: tuple[str, ...] = ()
    """Quality columns of the stores, as tissue; a tile's share grows with their product."""
    max_repeats: PositiveFloat = 4.0
    """Most times an average tile of a slide may come per epoch, whatever the weights say."""
    max_tiles_per_slide: Positive | None = None
    """At most this many tiles of a slide are used."""
    run_tiles: Positive = 16
    """Tiles read in a row from one shard file."""
    window_runs: Positive = 256
    """Runs whose tiles are shuffled together: the most shard files that are open at a time."""


class GramSettings(Settings):
    """Gram anchoring (DINOv3): late in training, patch similarities are held to those of an earlier teacher."""

    start: Fraction = 1.0
    """Share of the steps after which it begins; 1: never."""
    weight: NonNegative = 2.0
    """Weight of the loss."""
    refresh_steps: Positive = 10_000
    """Steps after which the anchor becomes the present teacher."""
    max_refreshes: Count = 3
    """How often it does."""
    scale: Annotated[float, Field(ge=1.0)] = 2.0
    """How much larger the anchor sees the crops, whose features are resized back; 1: as they are."""
    local_weight: NonNegative = 0.5
    """Factor on the loss of local crops in this phase."""


class HighResolutionSettings(Settings):
    """A last phase with larger crops (DINOv3, Midnight)."""

    start: Fraction = 1.0
    """Share of the steps after which it begins; 1: never."""
    global_px: Positive = 384
    """Side of the global crops [px]."""
    local_px: Positive = 160
    """Side of the local crops [px]."""
    lr_factor: PositiveFloat = 0.1
    """Factor on the learning rate in this phase."""


class HealthSettings(Settings):
    """What is watched, and what happens when training is not healthy. Looking changes no weights."""

    on_alarm: Literal["stop", "rollback", "warn"] = "stop"
    """stop: end with an error that names the fault; rollback: once, go on from the last healthy checkpoint with half the
    learning rate; warn: go on."""
    snapshot_steps: Positive = 500
    """Steps between looks at the teacher: RankMe, feature norms, probes, maps."""
    tiles: Annotated[int, Field(ge=16)] = 512
    """Tiles looked at."""
    maps: Count = 6
    """Tiles drawn as PCA and attention maps."""
    probe: Path | None = None
    """CSV with path, label, group and part (train or val): a small labelled set of tiles for kNN and linear probes. Never a
    test set: the best checkpoint is chosen on it."""


class PretrainSettings(Settings):
    """Stage 2: tile stores -> encoder, by self-distillation (DINO, iBOT, DINOv2, DINOv3) or distillation from an encoder."""

    preset: Literal[tuple(PRESETS)] = "dinov2-path"  # type: ignore[valid-type]
    """dino, ibot, dinov2, dinov2-as-released (with its inverted blur), dinov2-path (for tissue), dinov3, distill."""
    backbone: str = "vit_small_patch16_224"
    """timm name of the vision transformer."""
    patch_px: Positive | None = None
    """Patch side that replaces the backbone's own [px]."""
    registers: Count = 4
    """Register tokens (Darcet et al. 2023)."""
    layer_scale: NonNegative = 1e-5
    """Initial LayerScale; 0: none, which suits runs of a few hundred steps."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """Feed-forward layers of the blocks."""
    positions: Literal["learned", "rope"] = "learned"
    """Position embedding: learned, or rotary as in DINOv3."""
    drop_path: Fraction = 0.0
    """Stochastic depth of the student, over subsets of the batch as in DINOv2."""
    init: str | None = None
    """Start from these weights: timm:NAME, hf-hub:ORG/NAME, local-dir:PATH, or dinov2:PATH (an official checkpoint)."""
    train: Literal["all", "last", "lora"] = "all"
    """With init: train everything, only the last blocks, or low-rank additions (LoRA, Hu et al. 2021)."""
    train_blocks: Positive = 4
    """Blocks trained with train: last."""
    lora_rank: Positive = 8
    """Rank with train: lora."""
    teacher: str | None = None
    """With the preset distill: the frozen encoder to learn from, named as in extract.encoder."""
    steps: Positive = 10_000
    """Optimiser steps."""
    batch_size: Annotated[int, Field(ge=2)] = 64
    """Tiles per step, over all processes."""
    accumulate: Positive = 1
    """Parts of a step's batch computed one after another, to save memory. Sinkhorn, KoLeo and KDE see one part at a time."""
    crops: CropSettings = CropSettings()
    """Views."""
    sampling: SamplingSettings = SamplingSettings()
    """Which tiles."""
    prototypes: Positive = 8192
    """Outputs of the projection heads."""
    head_hidden: Positive = 2048
    """Hidden width of the projection heads."""
    head_bottleneck: Positive = 256
    """Bottleneck width of the projection heads."""
    separate_ibot_head: bool = False
    """Give the patch loss its own head."""
    prototype_norm: Literal["trained", "fixed", "none"] = "trained"
    """Weight-normalised prototypes with trained (DINOv2) or fixed (DINO) lengths, or a plain linear layer (DINOv3)."""
    centering: Literal["softmax", "sinkhorn", "none"] = "sinkhorn"
    """How teacher targets are kept from collapsing; none is for showing that they do."""
    dino_weight: NonNegative = 1.0
    """Weight of the CLS loss."""
    ibot_weight: NonNegative = 1.0
    """Weight of the masked-patch loss."""
    koleo_weight: NonNegative = 0.0
    """Weight of the KoLeo regulariser (distance to the nearest neighbour)."""
    kde_weight: NonNegative = 0.05
    """Weight of the KDE regulariser (mean closeness to all others, Virchow2)."""
    kde_concentration: PositiveFloat = 5.0
    """Concentration of the von Mises-Fisher kernel of KDE."""
    gram: GramSettings = GramSettings()
    """Gram anchoring."""
    high_resolution: HighResolutionSettings = HighResolutionSettings()
    """High-resolution phase."""
    mask_probability: Fraction = 0.5
    """Share of global crops that are masked."""
    mask_ratio: tuple[Fraction, Fraction] = (0.1, 0.5)
    """Range of the masked share of patches; equal values mask exactly as many patches of every masked crop."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: cosine to lr_min, or constant with a linear decay at the end (WSD)."""
    decay_share: Fraction = 0.2
    """Share of the steps in the final decay of the constant schedule."""
    lr: PositiveFloat = 4e-3
    """Learning rate at batch 1024; scaled by sqrt(batch / 1024)."""
    lr_min: NonNegative = 1e-6
    """Final learning rate."""
    warmup_steps: Count = 1000
    """Steps of linear learning-rate warm-up."""
    weight_decay: tuple[NonNegative, NonNegative] = (0.04, 0.4)
    """Weight decay at the start and at the end (cosine)."""
    beta2: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999
    """Second moment's momentum of AdamW; 0.99 suits small batches."""
    layer_decay: PositiveFloat = 0.9
    """Learning-rate factor per layer from the top."""
    patch_embed_lr: NonNegative = 0.2
    """Learning-rate factor of the patch embedding."""
    freeze_last_layer_steps: Count = 100
    """Steps during which the prototypes stay fixed."""
    clip_norm: PositiveFloat = 3.0
    """Largest gradient norm per sub-module."""
    ema: tuple[Fraction, Fraction] = (0.992, 1.0)
    """Teacher momentum at the start and at the end (cosine)."""
    student_temperature: PositiveFloat = 0.1
    """Softmax temperature of the student."""
    teacher_temperature: tuple[PositiveFloat, PositiveFloat] = (0.04, 0.07)
    """Softmax temperature of the teacher at the start and after its warm-up (linear)."""
    teacher_warmup_steps: Count = 3000
    """Steps over which the teacher temperature rises."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the networks; losses are always fp32."""
    checkpoint_every: Positive = 100
    """Steps between checkpoints."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints kept, beside the best one."""
    health: HealthSettings = HealthSettings()
    """Diagnostics, alarms, probes."""
    seed: Count = 0
    """Seed of initial weights, sampling, crops and masks."""

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, given: object) -> object:
        return filled_in(given) if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError("accumulate must divide batch_size")
        if (self.teacher is not None) != (self.preset == "distill"):
            raise ValueError("teacher and the preset distill belong together")
        if self.train != "all" and self.init is None:
            raise ValueError("train: last and train: lora need init, the weights to start from")
        if self.mask_ratio[0] > self.mask_ratio[1]:
            raise ValueError("mask_ratio must rise")
        return self

    def decisive(self) -> PretrainSettings:
        """With everything at its default that cannot change the encoder: what is watched, what is kept, folders of weights."""
        names = {"init": _without_folders(self.init), "teacher": _without_folders(self.teacher)}
        return self.model_copy(update={"health": HealthSettings(), "checkpoint_every": 100, "keep_checkpoints": 2, **names})


def _without_folders(name: str | None) -> str | None:
    """The name of an encoder without the folders of a path, which say nothing of its weights and are nobody's business."""
    scheme, _, rest = (name or "").partition(":")
    return f"{scheme}:{PurePath(rest).name}" if scheme in PATH_SCHEMES else name
