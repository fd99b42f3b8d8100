"""Every setting of every stage on one page: unit, default, and one line that says what it does.

The models are frozen, unknown keys are refused (``config.py`` says "did you mean"), and each stage's whole table goes into its
fingerprint. What cannot change a result (workers, devices, inference batch) lives in ``compute`` and is not hashed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pathfm.mil_settings import MilSettings
from pathfm.pretrain_settings import PretrainSettings
from pathfm.settings import Count, Fraction, NonNegative, Positive, PositiveFloat, Settings


class CohortSettings(Settings):
    """Which slides belong to the study."""

    table: Path | None = None
    """CSV with slide_id, path, patient_id, labels and optionally mpp, site, split, lesion_mask; paths relative to it."""
    clinical: Path | None = None
    """Table of patients with more columns (labels), joined to the table by patient_id, as STAMP keeps them; CSV or xlsx."""
    slides: tuple[str, ...] = ()
    """Without a table: folders (searched), globs or files."""
    folder_of_tiles: bool = False
    """Treat every sub-folder of images as one slide made of pre-cut tiles (cytology, pre-tiled sets)."""
    patient_is_slide: bool = False
    """Accept that every slide is its own patient when no patient_id is given (else mil refuses to split)."""
    pseudonym_key: Path | None = None
    """File with a secret key: slide_id, patient_id and specimen_id are replaced by keyed hashes as the cohort is read, so that
    nothing that is written names a patient."""
    tile_labels: Path | None = None
    """CSV with tile and tile_label (1 present, 0 absent, empty unknown): truth for the attention of folder-of-tiles slides."""


class TissueSettings(Settings):
    """How tissue is told from glass on a low-power thumbnail."""

    method: Literal["otsu", "entropy", "off"] = "otsu"
    """otsu: stain density and texture; entropy: texture alone, for pale tissue; off: keep everything."""
    min_fraction: Fraction = 0.5
    """Smallest share of a tile that must be tissue for the tile to be kept."""
    min_area_um2: NonNegative = 20_000.0
    """Tissue pieces smaller than this are dropped [um2]."""
    max_hole_um2: NonNegative = 40_000.0
    """Holes in the tissue smaller than this are filled [um2]."""
    thumbnail_px: Annotated[int, Field(ge=64)] = 2048
    """Longer side of the thumbnail the mask is made on [px]."""
    background: Literal["bright", "dark"] = "bright"
    """bright: transmitted light, where a slide on black is refused by name; dark: fluorescence, where tissue is what is lit
    and neither black nor the colours of ink are reasons to drop a tile."""
    plugin: str | None = None
    """A mask function of one's own, as module:function or the name of an entry point in the group pathfm.tissue."""
    annotations: Path | None = None
    """Folder of <slide_id>.geojson files (QuPath) with regions to keep or to leave out."""
    include: tuple[str, ...] = ()
    """Classes of annotated regions that tiles must lie in; with none, annotations only leave out."""
    exclude: tuple[str, ...] = ()
    """Classes of annotated regions that are left out."""

    @model_validator(mode="after")
    def _classes_need_regions(self) -> Self:
        if (self.include or self.exclude) and self.annotations is None:
            raise ValueError("include and exclude need annotations, the folder of GeoJSON files")
        return self


class FilterSettings(Settings):
    """Which tiles the quality columns drop; each dropped tile is counted under the name of its column."""

    measure: bool = True
    """Measure quality; without it only the tissue share is known, no filter applies, and stored tiles are not decoded."""
    max_white: Fraction = 0.95
    """Tiles with a larger share of near-white pixels are dropped."""
    max_black: Fraction = 0.5
    """Tiles with a larger share of near-black pixels are dropped."""
    max_pen: Fraction = 0.2
    """Tiles with a larger share of marker-pen ink are dropped."""
    min_blur: NonNegative = 0.0
    """Tiles with a smaller variance of the Laplacian are dropped as out of focus; 0: none, it depends on stain and scanner."""
    max_damage: Fraction = 0.03
    """Tiles with a larger value of the damage column (see docs/quality.md) are dropped; 1: none."""


class ColourSettings(Settings):
    """What happens to colours before tiles are stored."""

    icc: bool = False
    """Apply the scanner's ICC profile (to sRGB) where a slide has one."""
    normalise: Literal["none", "reinhard", "macenko"] = "none"
    """Stain normalisation to a fixed reference: reinhard (2001) or macenko (2009)."""


class TileSettings(Settings):
    """Stage 1: slides -> tile stores."""

    mpp: PositiveFloat | Literal["native"] | Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = 0.5
    """Resolution of the tiles [um per px], or several; native: level 0 as it is, also for images whose mpp is unknown."""
    tile_px: Annotated[int, Field(ge=16, le=16_384)] = 224
    """Side of a tile [px]."""
    overlap_px: Count = 0
    """How far neighbouring tiles overlap [px]."""
    keep_px: Annotated[int, Field(ge=16, le=16_384)] | None = None
    """Side of the region stored around each tile, larger than the tile, as room for crops [px]; none: the tile itself."""
    edge: Literal["drop", "pad"] = "drop"
    """Tiles partly outside the scan: drop them, or pad with white and flag them in the column `outside`."""
    upsample: bool = False
    """Allow tiles finer than the slide."""
    assume_mpp: PositiveFloat | None = None
    """mpp of slides that carry none in the file or in the cohort table [um per px]."""
    mpp_tolerance: Fraction = 0.02
    """A pyramid level this close to the wanted mpp is used unscaled; its true mpp is stored."""
    tissue: TissueSettings = TissueSettings()
    """Tissue detection."""
    filters: FilterSettings = FilterSettings()
    """Which tiles the quality columns drop."""
    colour: ColourSettings = ColourSettings()
    """Colour profile and stain normalisation."""
    max_unreadable: Fraction = 0.05
    """A slide fails when a larger share of its tiles cannot be decoded; below it they are dropped and counted."""
    codec: Literal["auto", "jpeg", "zstd", "none"] = "auto"
    """How pixels are stored: jpeg (small); auto: the slide's own JPEG data where tiles coincide with it, else jpeg; zstd
    (lossless); none: coordinates only, pixels stay in the slide."""
    jpeg_quality: Annotated[int, Field(ge=50, le=100)] = 90
    """JPEG quality of stored tiles."""
    shard_tiles: Positive = 256
    """Tiles per shard file."""
    keep_thumbnail_px: Annotated[int, Field(ge=64)] = 1024
    """Longer side of the thumbnail kept in the store [px]."""
    reader: Literal["auto", "openslide"] = "auto"
    """auto: compressed tiles are read directly where that is proved equal to OpenSlide; openslide: never."""
    coords: Path | None = None
    """Folder of coordinate files of other tools (CLAM, TRIDENT, STAMP, LazySlide), <slide_id>.*, instead of our own grid."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.overlap_px >= self.tile_px:
            raise ValueError("overlap_px must be smaller than tile_px")
        if self.keep_px is not None and self.keep_px < self.tile_px:
            raise ValueError("keep_px must be at least tile_px")
        several = self.mpp if isinstance(self.mpp, tuple) else ()
        if len({f"{mpp:g}" for mpp in several}) < len(several):
            raise ValueError("mpp names a resolution twice")
        if self.coords is not None and (several or self.keep_px or self.overlap_px):
            raise ValueError("coords come as they are: one mpp, no keep_px, no overlap_px")
        return self


class ExtractSettings(Settings):
    """Stage 3: tiles x encoder -> features."""

    encoder: str = "pretrained"
    """pretrained (the study's own), a name of `pathfm encoders` (uni2-h, virchow2@trident), timm:NAME, hf-hub:ORG/NAME,
    local-dir:PATH, untrained:NAME, or python:MODULE:FUNCTION."""
    encoder_sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")] | None = None
    """SHA-256 of the file of weights that `encoder` must have, as `pathfm inspect` shows it; for encoders in a folder."""
    also: tuple[str, ...] = ()
    """Further encoders, each by its own recipe, whose features are written in the same pass over the tiles."""
    weights: Path | None = None
    """State dict (.safetensors, .pt, .bin) that is loaded into the named encoder instead of its hub's, for offline machines."""
    pooling: Literal["recipe", "cls", "mean", "cls+mean", "gem", "map-attention", "average"] = "recipe"
    """How the tokens of a tile become one vector. recipe: as the encoder's card says; without a card cls+mean for vision
    transformers with a class token, else the network's own average."""
    input_px: Positive | None = None
    """Side the tiles are resized to [px]; default: the encoder's own."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the encoder. auto: what its card says, bf16 without a card; fp32 where the device does not compute it
    itself or where features would differ by more than min_fidelity allows. The outcome is said and recorded."""
    min_fidelity: Fraction = 0.999
    """Least cosine with the plain fp32 features, on calibration tiles, that half precision and merged tokens must keep."""
    symmetry: Literal["none", "d4"] = "none"
    """d4: features averaged over the eight turns and flips of each tile, at eight times the cost."""
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1,)
    """S2 features: at each factor the tile is enlarged, cut into factor x factor pieces, and their features averaged; the
    vectors of all factors are joined."""
    merge_tokens: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    """Share of patch tokens that is merged with similar ones before the last block (ToMe); refused below min_fidelity."""
    mpp_tolerance: Fraction = 0.2
    """How far the resolution that the encoder really sees may be from those it was trained for; beyond it is refused."""
    dtype: Literal["float16", "float32"] = "float16"
    """Number type of stored features."""
    dense: bool = False
    """Also keep the patch tokens of every tile, as zarr."""
    slide_vectors: tuple[str, ...] = ()
    """Vectors of whole slides besides: mean, max, a slide encoder's name, or python:MODULE:FUNCTION."""
    controls: bool = True
    """Also write the features of the controls in the same pass: the untrained encoder and the colour histogram."""


class ReportSettings(Settings):
    """What the report shows."""

    heatmaps: Count = 12
    """Slides shown with a heatmap."""
    top_tiles: Count = 8
    """Tiles of highest and of lowest attention shown per slide."""
    heat_layers: bool = False
    """Also write the heatmaps of all slides as OME-TIFF layers."""


class ComputeSettings(Settings):
    """How the work is done. Nothing here may change a result, so nothing here is fingerprinted."""

    workers: Count = 0
    """Worker processes; 0: as many as there are usable cores."""
    threads: Count = 0
    """Threads of the numerical libraries; 0: as many as there are usable cores."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    devices: Count = 1
    """GPUs (or, on a CPU, processes) per node that pretraining and extraction use; 0: all GPUs."""
    nodes: Positive = 1
    """Nodes that pretraining uses, started by torchrun or SLURM."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share pretraining: ddp, each holds everything; fsdp, weights and moments are sharded (FSDP2)."""
    compile: bool = False
    """Compile the networks (torch.compile) in pretraining and extraction."""
    checkpoint_activations: bool = False
    """Compute activations of blocks again in the backward pass, to save memory in pretraining."""
    batch_size: Count = 0
    """Tiles per inference batch; 0: 16 on a CPU, on a GPU what its memory holds. Halved when memory runs out."""
    slide_timeout_s: NonNegative = 7200.0
    """A slide that takes longer to tile fails, and the next one goes on; 0: no limit [s]."""
    shard: Annotated[str, Field(pattern=r"^(\d+(/|-of-)\d+)?$")] = ""
    """i/n (1-based): work only on every n-th slide, for array jobs; i-of-n: on a group of slides that others joining do not
    change, for workflows; empty: on all."""
    group_slides: Positive = 64
    """About how many slides a job of a workflow has (`pathfm run --engine snakemake`): a hash deals them into groups."""
    cache_dir: Path | None = None
    """Local folder that slides are copied to before they are read, ahead of need; for network drives."""
    cache_gb: PositiveFloat = 50.0
    """Most that the cache may hold [GB]."""
    feature_cache_gb: PositiveFloat = 4.0
    """RAM that features of slides may take in mil; what does not fit is read anew each epoch [GB]."""
    lease_s: Annotated[float, Field(ge=10.0)] = 120.0
    """A slide whose worker on another machine has shown no sign of life for so long is taken over [s]."""

    @field_validator("shard")
    @classmethod
    def _shard_exists(cls, shard: str) -> str:
        index, _, count = shard.replace("-of-", "/").partition("/")
        if shard and not 1 <= int(index) <= int(count):
            raise ValueError("must be i/n, with i from 1 to n")
        return shard


class Study(Settings):
    """One study: a cohort, four stages and a report, kept under one output folder."""

    name: str = "study"
    """Name shown in the report."""
    out: Path = Path("out")
    """Output folder; relative paths start at the study file."""
    cohort: CohortSettings = CohortSettings()
    """Slides, patients and labels."""
    tile: TileSettings = TileSettings()
    """Stage 1."""
    pretrain: PretrainSettings = PretrainSettings()
    """Stage 2."""
    extract: ExtractSettings = ExtractSettings()
    """Stage 3."""
    mil: MilSettings = MilSettings()
    """Stage 4."""
    report: ReportSettings = ReportSettings()
    """The report."""
    compute: ComputeSettings = ComputeSettings()
    """Workers, threads, device."""

    @property
    def has_own_encoder(self) -> bool:
        """Whether the features are those of the encoder that the study itself pretrains."""
        return self.extract.encoder == "pretrained" and self.mil.features is None
