"""What must be known of a public encoder to compute its features as its authors do: one frozen record each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Loader = Literal["timm", "transformers", "python"]
Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class EncoderCard:
    """How an encoder is built, fed and read.

    Attributes:
        name: as in ``extract.encoder``; NAME@TOOL is how another tool uses the encoder NAME.
        hub_id: ORG/NAME on the Hugging Face hub.
        loader: timm; transformers; python: its network exists only as code of others (in a package or on the hub), which is
            never run from here: a function of the user's own hands the network over.
        architecture: name of the timm model, or class of transformers; empty: as the hub's configuration says.
        arguments: what it is built with, plain JSON; for transformers the fields of its configuration.
        dim: length of a feature vector.
        input_px: side of what the network sees [px].
        resize_px: side the whole tile is resized to before the middle ``input_px`` are cut out [px]; equal: nothing is cut.
        mpp: resolutions it was trained for [um per px]; empty: any, or unknown.
        tile_px: recommended side of a tile at the first of ``mpp`` [px].
        mean, std: channel normalisation of values in 0..1.
        interpolation: of the resize.
        antialias: whether the resize smooths before it shrinks.
        pooling: how tokens become a vector (the words of ``extract.pooling``); average: as the network's own head does.
        parameters: how many numbers the network holds; None: not stated.
        precision: arithmetic that is recommended; None: nobody states one.
        licence: of the weights, as registries state it.
        gated: whether the hub asks for an account and an agreement.
        source: which model cards and tools these values are from.
        note: what else a user should know.
        weights_file: name of the state dict on the hub; empty: one of the usual names.
        stage: which of timm's stages of features is read, from 0 (the stem); None: the last, with what comes after it.
    """

    name: str
    hub_id: str
    loader: Loader
    architecture: str
    dim: int
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    input_px: int = 224
    resize_px: int = 224
    mpp: tuple[float, ...] = (0.5,)
    tile_px: int | None = 224
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    antialias: bool = True
    pooling: str = "cls"
    parameters: int | None = None
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    licence: str = ""
    gated: bool = False
    source: str = ""
    note: str = ""
    weights_file: str = ""
    stage: int | None = None

    @property
    def base(self) -> str:
        """The encoder's name without the tool whose recipe this is."""
        return self.name.partition("@")[0]
