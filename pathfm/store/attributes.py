"""What a zarr group of ours says of itself, checked before anything counts on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from pathfm.errors import StoreError
from pathfm.store.commit import read_json

ZARR_ERRORS = (LookupError, OSError, ValueError, RuntimeError, TypeError, AttributeError, ArithmeticError, MemoryError)
"""What zarr raises on an array that is absent or damaged, its metadata included."""
TWO = Field(min_length=2, max_length=2)


class Known(BaseModel):
    """Attributes that readers use. Those with a default may be absent, as in older stores; others may be there too."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    version: PositiveInt
    slide_id: str
    fingerprint: str
    shard_tiles: int = Field(gt=0, lt=2**24)
    tiles: int = Field(ge=0, lt=2**31)


class TileAttributes(Known):
    """Those of a tile store, as ``docs/tile-store.md`` explains them."""

    tile_px: PositiveInt
    mpp: PositiveFloat | None
    tile_side_level0: NonNegativeFloat
    tile_height_level0: NonNegativeFloat = 0.0
    size_level0: Annotated[list[NonNegativeInt], TWO]
    quality_names: list[str]
    thumbnail_downsample: PositiveFloat
    coords: Literal["level0", "synthetic"]
    codec: Literal["jpeg", "zstd", "none"]
    has_pixels: bool = True
    jpeg_quality: PositiveInt | None
    scales: list[PositiveFloat] = []
    scale_of: str = ""
    counts: dict[str, int | float] = {}
    empty_reason: str = ""
    identity: str | None = None
    vendor: str | None = None
    objective: float | None = None
    slide_mpp: Annotated[list[PositiveFloat], TWO] | None = None
    mpp_source: str | None = None


class DenseAttributes(Known):
    """Those of a dense store, as ``docs/dense-store.md`` explains them."""

    grid: Annotated[list[PositiveInt], TWO]
    dim: PositiveInt
    dtype: Literal["float16", "float32"]


class Kind(NamedTuple):
    """A kind of store: the name and version of its format, what is said of a folder that is none, and its attributes."""

    format: str
    version: int
    absent: str
    make: str
    foreign: str
    again: str
    known: type[Known]


def read_attributes(path: Path, kind: Kind) -> dict[str, Any]:
    """The attributes of the group ``path``, as they are written.

    Raises:
        StoreError: there is no group, it is foreign or of a newer version, or an attribute is damaged or absent.
    """
    try:
        content: Any = read_json(path / "zarr.json").get("attributes")
    except StoreError as error:
        raise StoreError(kind.absent, where=str(path), fix=kind.make) from error
    attrs = content.get("pathfm") if isinstance(content, dict) else None
    if not isinstance(attrs, dict) or attrs.get("format") != kind.format:
        raise StoreError(kind.foreign, where=str(path))
    version = attrs.get("version")
    if isinstance(version, int) and version > kind.version:
        raise StoreError(f"written by a newer pathfm (format version {version})", where=str(path), fix="upgrade pathfm")
    try:
        kind.known.model_validate(attrs)
    except ValidationError as error:
        name = error.errors(include_url=False, include_input=False, include_context=False)[0]["loc"][0]
        raise StoreError(f"attribute {name} is damaged or absent", where=str(path), fix=kind.again) from None
    return attrs
