"""Encoders: tiles go in as RGB bytes, feature vectors come out, and the whole recipe is on record.

Shapes: B tiles, H x W pixels, C channels, D features, h x w patches.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pathfm.errors import UsageError
from pathfm.geometry import effective_mpp
from pathfm.models.calibration import calibration_tiles
from pathfm.models.fidelity import Arithmetic, Forward, Judged, Precision, judge, wanted_precision
from pathfm.models.networks import Network, load_network
from pathfm.models.preprocess import Preprocessing, turns_and_flips
from pathfm.store.manifest import file_digest
from pathfm.study import ExtractSettings

Pixels = npt.NDArray[np.uint8]
CALIBRATION_TILES = 8


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the features of given pixels.

    Attributes:
        encoder: name as in the settings, without the path of a folder.
        weights_sha256: hash over the names and values of all weights, as loaded.
        network: hash over what is computed with them (``Network.digest``).
        card: the record that says how the encoder is fed and read.
        resize_px: side the whole tile is resized to [px].
        input_px: side of the middle that the network sees [px].
        mean, std: channel normalisation of values in 0..1.
        interpolation: of the resize.
        antialias: whether the resize smooths before it shrinks.
        pooling: how tokens become one vector.
        precision: of the numbers that are used, not the one that was wished for.
        arithmetic: plain float32, or half precision, whole or mixed (see ``fidelity``).
        compiled: whether the network runs compiled.
        symmetry: whether features are averaged over turns and flips.
        scales: factors by which tiles are enlarged (S2).
        merge_tokens: share of the patches that is merged.
        dim: length of a feature vector.
    """

    encoder: str
    weights_sha256: str
    network: str
    card: str
    resize_px: int
    input_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    antialias: bool
    pooling: str
    precision: Precision
    arithmetic: Arithmetic
    compiled: bool
    symmetry: str
    scales: tuple[int, ...]
    merge_tokens: float
    dim: int


class TileEncoder:
    """A network with its preprocessing, pooling and arithmetic.

    Args:
        network: with the card that says how it is fed and read, for the side that the settings ask for.
        settings: what is asked for.
        device: where it runs.
        compiled: compile the network.

    Attributes:
        recipe: everything that decides the features.
        device: where tiles must be.
        fidelity: least cosine with plain float32 features on the calibration tiles; None: it is plain float32.

    Raises:
        UsageError: pooling or token merging do not go with this network.
    """

    def __init__(self, network: Network, settings: ExtractSettings, device: torch.device, *, compiled: bool = False) -> None:
        name, card = network.name, network.card
        model = network.model.eval().requires_grad_(requires_grad=False)
        digest = weights_sha256(model)
        model = model.to(device)
        if not hasattr(model, "num_prefix_tokens"):
            model = model.to(memory_format=torch.channels_last)
        self.device, self._card, self._settings = device, card, settings
        sides_px = card.resize_px, card.input_px
        self._prepare = Preprocessing(*sides_px, card.mean, card.std, card.interpolation, card.antialias).to(device)
        plain = Forward(model, card.pooling if settings.pooling == "recipe" else settings.pooling)
        judged = self._judged(plain, name, compiled)
        self._forward, self.fidelity = judged.forward, judged.cosine
        self._vectors = judged.compiled or judged.forward
        self.recipe = Recipe(
            encoder=name,
            weights_sha256=digest,
            network=network.digest(),
            card=card.name,
            resize_px=card.resize_px,
            input_px=card.input_px,
            mean=tuple(card.mean),
            std=tuple(card.std),
            interpolation=card.interpolation,
            antialias=card.antialias,
            pooling=plain.pool,
            precision=judged.precision,
            arithmetic=judged.forward.arithmetic,
            compiled=judged.compiled is not None,
            symmetry=settings.symmetry,
            scales=settings.scales,
            merge_tokens=settings.merge_tokens,
            dim=judged.dim * len(settings.scales),
        )

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        return self.recipe.dim

    @property
    def model(self) -> nn.Module:
        """The bare network, as it runs: it may be in half precision."""
        return self._forward.model

    @torch.inference_mode()
    def images(self, tiles_BHWC: Tensor) -> Tensor:
        """What the network sees of tiles [B, H, W, 3] uint8: normalised [B, 3, side, side], in its number type."""
        return self._prepare(tiles_BHWC).to(self._forward.dtype)

    @torch.inference_mode()
    def features(self, tiles_BHWC: Tensor) -> Tensor:
        """Features [B, D] float32 of RGB tiles [B, H, W, 3] uint8; both are on ``device``, which is not waited for."""
        views = turns_and_flips(tiles_BHWC) if self._settings.symmetry == "d4" else [tiles_BHWC]
        total_BD = self._scaled(views[0])
        for view in views[1:]:
            total_BD = total_BD + self._scaled(view)
        return total_BD / len(views)

    @torch.inference_mode()
    def dense(self, tiles_BHWC: Tensor) -> Tensor:
        """Patch features [B, h, w, D] float32 of tiles as they lie, at their plain scale.

        Raises:
            UsageError: the network has no square grid of patches.
        """
        return self._forward.patch_map(self._prepare(tiles_BHWC))

    def __call__(self, tiles: Pixels) -> npt.NDArray[np.float32]:
        """Features [B, D] float32 of RGB tiles [B, H, W, 3] uint8."""
        features: npt.NDArray[np.float32] = self.features(torch.tensor(tiles, device=self.device)).cpu().numpy()
        return features

    def check_precision(self) -> None:
        """Refuses an encoder that does not run in the precision that the settings name; ``auto`` names none.

        Raises:
            UsageError: the device does not compute in it, or features would suffer.
        """
        asked, used = self._settings.precision, self.recipe.precision
        if asked not in {"auto", used}:
            what = f"{self.recipe.encoder} is to run in {asked}, and here it runs in {used}"
            fix = f"use a device that computes in {asked}, or set extract.precision: {used} from the first slide on"
            raise UsageError(what, where="extract.precision", fix=fix)

    def check_tiles(self, mpp: float | None, tile_px: int) -> str:
        """One line that says which resolution the encoder really sees.

        Args:
            mpp: of the tiles [um per px]; None: unknown.
            tile_px: their side [px].

        Raises:
            UsageError: it is further than ``extract.mpp_tolerance`` from every resolution the encoder was trained for.
        """
        side, cut, trained = self.recipe.resize_px, self.recipe.input_px, self._card.mpp
        seen = effective_mpp(mpp, tile_px, side)
        line = f"tiles {tile_px} px" + ("" if seen is None else f" at {mpp:.3g} mpp")
        line += f", resized to {side}" * (side != tile_px) + f", the middle {cut} of it" * (cut != side)
        if mpp is None or seen is None:
            return f"{line}: which mpp the encoder sees is not known"
        line += f": the encoder sees {seen:.3g} mpp"
        line += "".join(f", {seen / factor:.3g} where enlarged by {factor}" for factor in self.recipe.scales if factor > 1)
        if not trained:
            return line
        line += f"; trained for {', '.join(f'{known:g}' for known in trained)}"
        ratios = [seen / factor / known for factor in self.recipe.scales for known in trained]
        if min(max(ratio, 1 / ratio) for ratio in ratios) <= 1 + self._settings.mpp_tolerance + 1e-9:
            return line
        best = min(trained, key=lambda known: max(seen / known, known / seen))
        fix = f"set tile.tile_px: {round(best * side / mpp)} or tile.mpp: {best * side / tile_px:.3g}"
        raise UsageError(line, where="extract.encoder", fix=f"{fix}, or raise extract.mpp_tolerance")

    def _scaled(self, tiles_BHWC: Tensor) -> Tensor:
        return torch.cat([self._at_scale(tiles_BHWC, factor) for factor in self._settings.scales], dim=1)

    def _at_scale(self, tiles_BHWC: Tensor, factor: int) -> Tensor:
        """S2 (Shi et al. 2024, arXiv 2403.13043): features of the pieces of an enlarged tile, averaged."""
        images, side = self._prepare(tiles_BHWC, factor), self.recipe.input_px
        corners = [(top * side, left * side) for top in range(factor) for left in range(factor)]
        total_BD = torch.zeros((), device=self.device)
        for top, left in corners:
            total_BD = total_BD + self._vectors(images[:, :, top : top + side, left : left + side])
        return total_BD / len(corners)

    def _calibration(self, count: int) -> Tensor:
        tiles = calibration_tiles(count, self._prepare.resize_px)
        return self._prepare(torch.from_numpy(tiles).to(self.device))

    @torch.inference_mode()
    def _judged(self, plain: Forward, name: str, compiled: bool) -> Judged:
        precision = wanted_precision(self._settings.precision, self._card.precision, self.device, name)
        is_plain = precision == "fp32" and not self._settings.merge_tokens and not compiled
        images_BCHW = self._calibration(1 if is_plain else CALIBRATION_TILES)
        return judge(plain, precision, self._settings, images_BCHW, name, compiled=compiled)


def load_encoder(name: str, settings: ExtractSettings, device: torch.device, *, compiled: bool = False) -> TileEncoder:
    """An encoder by name, as ``extract.encoder`` has it, ready on its device.

    Args:
        name: a card's name, or timm:NAME, hf-hub:ORG/NAME, local-dir:PATH, untrained:NAME, python:MODULE:FUNCTION.
        settings: pooling, input side, precision and the other options.
        device: where it runs.
        compiled: compile the network (torch.compile).

    Raises:
        UsageError: no such network, its weights are not to be had here, or what is asked does not go with it.
    """
    return TileEncoder(load_network(name, settings.input_px, settings.weights), settings, device, compiled=compiled)


def check_pinned(name: str, sha256: str) -> None:
    """Refuses an encoder folder whose weights are not those that a study was made for.

    Args:
        name: ``local-dir:PATH``.
        sha256: of its ``model.safetensors`` (hex), as ``pathfm inspect`` and the model card of ``pathfm export encoder`` say.

    Raises:
        UsageError: other weights, or an encoder that is no folder.
    """
    scheme, _, place = name.partition(":")
    file, where = Path(place, "model.safetensors"), "extract.encoder_sha256"
    if scheme != "local-dir" or not file.is_file():
        fix = "name a folder with model.safetensors: local-dir:PATH (`pathfm encoders fetch` and `pathfm export` make them)"
        raise UsageError("only an encoder in a folder can be named by the hash of its file", where=where, fix=fix)
    found = file_digest(file)
    if found != sha256.lower():
        what = f"the encoder is another one: its weights have the SHA-256 {found}, not {sha256}"
        raise UsageError(what, where=f"{where}: {file.parent.name}", fix="put the encoder back that the study was made with")


def weights_sha256(model: nn.Module) -> str:
    """Hash over the names and values of a network's state."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
