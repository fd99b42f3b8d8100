"""``pathfm attention``: what each head of the encoder looks at in chosen tiles, as pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pathfm.compute import pick_device, use_threads
from pathfm.config import did_you_mean
from pathfm.errors import ExitCode, StoreError, UsageError
from pathfm.extraction import read_tile
from pathfm.geometry import effective_mpp
from pathfm.log import say, track
from pathfm.models.attention_maps import attention_maps
from pathfm.models.encoders import TileEncoder, load_encoder
from pathfm.report.attention_page import TileAttention, write_attention_page
from pathfm.stats.neighbours import tile_at
from pathfm.store.tile_store import TileStore, open_tiles
from pathfm.study import Study
from pathfm.workflow import PRETRAINED, Run, begin, own_encoder

Pixels = npt.NDArray[np.uint8]

ADDRESS = re.compile(r"(?P<slide>.+):\s*(?:#?(?P<number>\d+)|(?P<x>\d+(?:\.\d+)?)\s*,\s*(?P<y>\d+(?:\.\d+)?))")
FIX = "name it as SLIDE:x,y in level-0 pixels, or as SLIDE:#NUMBER"


class Chosen(NamedTuple):
    """A tile of a store, by its number."""

    store: TileStore
    number: int

    @property
    def xy_level0(self) -> tuple[int, int]:
        """Its upper left corner."""
        x, y = self.store.xy_level0[self.number].tolist()
        return x, y


def attention(study: Study, tiles: Sequence[str], out: Path | None = None, block: int = -1) -> ExitCode:
    """``pathfm attention``: one picture per tile and a page of them all.

    Tiles are prepared as for features; the network computes in single precision, whatever the features' own.

    Args:
        study: whose encoder, and whose tile stores.
        tiles: SLIDE:x,y (any point of the tile, level-0 pixels) or SLIDE:#NUMBER.
        out: where to; None: ``attention`` of the output folder.
        block: whose heads are shown, from 0; from the end if negative.

    Raises:
        UsageError: no such slide, tile or block; or the encoder has no class token or does not suit these tiles.
        StoreError: the slide has no tiles, or the study no encoder yet.
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    if not tiles:
        raise UsageError("no tile is named", where="--tile", fix=FIX)
    run = begin(study)
    chosen = [find_tile(run, address) for address in dict.fromkeys(tiles)]
    use_threads(study.compute)
    encoder, label = _encoder(run)
    for line in dict.fromkeys(encoder.check_tiles(tile.store.mpp, tile.store.tile_px) for tile in chosen):
        say(line)
    shown = [_looked_at(run, encoder, tile, block) for tile in track(chosen, "attention", len(chosen))]
    depth = shown[0].depth
    facts = [("encoder", label), ("block", f"{block % depth + 1} of {depth}")]
    page = write_attention_page(out or run.layout.out / "attention", [each.tile for each in shown], facts)
    say(f"attention: {len(shown)} tiles in {page}")
    return ExitCode.DONE


def find_tile(run: Run, address: str) -> Chosen:
    """The tile that an address on the command line means.

    Raises:
        UsageError: not an address, or there is no such slide or tile; names the nearest one.
        StoreError: the slide has no tiles.
    """
    found = ADDRESS.fullmatch(address.strip())
    if found is None:
        raise UsageError("not a tile", where=address, fix=FIX)
    slides, slide_id = {row.slide_id for row in run.cohort.rows}, found["slide"]
    if slide_id not in slides:
        raise UsageError(f"the cohort has no slide {slide_id!r}{did_you_mean(slide_id, slides)}", where=address, fix=FIX)
    store = open_tiles(run.layout.store(slide_id))
    if not len(store):
        raise StoreError("the slide has no tiles", where=str(store.path), fix="choose another slide")
    if found["number"] is not None:
        if int(found["number"]) >= len(store):
            raise UsageError("no such tile", where=address, fix=f"the slide has tiles 0 to {len(store) - 1}")
        return Chosen(store, int(found["number"]))
    number, inside = tile_at(store.xy_level0, store.tile_sides_level0, (float(found["x"]), float(found["y"])))
    if not inside:
        x, y = Chosen(store, number).xy_level0
        raise UsageError("no tile lies there", where=address, fix=f"the nearest one is {slide_id}:{x},{y}")
    return Chosen(store, number)


def _encoder(run: Run) -> tuple[TileEncoder, str]:
    """The study's encoder in single precision, and what to call it."""
    # What is done to features besides one plain pass of the network has no part in a map of that pass.
    plain = {"precision": "fp32", "merge_tokens": 0.0, "symmetry": "none", "scales": (1,), "pooling": "recipe"}
    settings, own = run.study.extract.model_copy(update=plain), own_encoder(run)
    device = pick_device(run.study.compute)
    if settings.encoder != "pretrained":
        encoder = load_encoder(settings.encoder, settings, device)
        return encoder, encoder.recipe.encoder
    if own is None or not (own / "teacher" / "config.json").is_file():
        fix = "run `pathfm pretrain`, or set extract.encoder=timm:NAME"
        raise StoreError("the study has no encoder yet", where=str(own or run.layout.out), fix=fix)
    return load_encoder(f"local-dir:{own / 'teacher'}", settings, device), PRETRAINED


class _Looked(NamedTuple):
    tile: TileAttention
    depth: int


def _looked_at(run: Run, encoder: TileEncoder, chosen: Chosen, block: int) -> _Looked:
    """What the encoder looks at in a tile, and how many blocks it has."""
    store = chosen.store
    images_1CHW = encoder.images(torch.tensor(_pixels(run, chosen)[None], device=encoder.device))
    maps = attention_maps(encoder.model, images_1CHW)
    depth = len(maps.class_LBHT)
    if not -depth <= block < depth:
        raise UsageError(f"the encoder has no block {block}", where="--block", fix=f"it has blocks 0 to {depth - 1}")
    tile = TileAttention(
        slide_id=store.slide_id,
        number=chosen.number,
        xy_level0=chosen.xy_level0,
        pixels=_visible(encoder, images_1CHW),
        mpp=effective_mpp(store.mpp, store.tile_px, encoder.recipe.resize_px),
        heads_Hhw=maps.heads(block)[0].cpu().numpy(),
        rollout_hw=maps.rollout()[0].cpu().numpy(),
        tokens=maps.rollout_BT.shape[1],
    )
    return _Looked(tile, depth)


def _visible(encoder: TileEncoder, images_1CHW: torch.Tensor) -> Pixels:
    """What the network sees, as RGB [s, s, 3]: the normalisation undone."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.recipe.mean, encoder.recipe.std))
    rgb = (images_1CHW[0].float().cpu() * std + mean).clamp(0, 1) * 255
    return rgb.round().byte().permute(1, 2, 0).contiguous().numpy()


def _pixels(run: Run, tile: Chosen) -> Pixels:
    """The tile's pixels [H, W, 3], from its store or, where that holds coordinates alone, from the slide."""
    if tile.store.has_pixels:
        return tile.store[tile.number]
    pixels = read_tile(run, tile.store, tile.number)
    if pixels is None:
        raise StoreError(
            f"tile {tile.number} cannot be read from the slide", where=tile.store.slide_id, fix="choose another tile"
        )
    return pixels
