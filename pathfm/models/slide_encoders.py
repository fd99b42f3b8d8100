"""Slide encoders: the features of a slide's tiles become one vector. A registry that can be read, and one's own functions.

``mean`` and ``max`` need nothing. The pretrained ones are other people's code and weights, which come with their own packages
and licences; none is shipped. Any function of one's own is ``python:MODULE:FUNCTION``.

Shapes: N tiles, D features of a tile or of the slide.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pathfm.config import did_you_mean
from pathfm.errors import MissingExtraError, SlideError, UsageError
from pathfm.models.cards import CARDS, EncoderCard
from pathfm.models.encoders import weights_sha256
from pathfm.models.foreign import source_sha256

Features = npt.NDArray[np.floating[Any]]
Coords = npt.NDArray[np.int64]
Vector = npt.NDArray[Any]
PYTHON = "python"
WHERE = "extract.slide_vectors"
MAX_MISFIT = 0.2
"""How far the side of a tile [um] may be from what a slide encoder was trained with."""
FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What goes wrong inside other people's code; it ends the slide, not the run."""


Pool = Callable[[Features, Coords, float], Vector]
"""The vector [D] of: features [N, D] of the valid tiles; their upper left corners [N, 2] and their side, in level-0 px."""


@dataclass(frozen=True)
class SlideEncoder:
    """Turns the tiles of a slide into one vector.

    Attributes:
        name: as in ``extract.slide_vectors``.
        identity: changes whenever the vectors of the same features do (version, hash of weights).
        pool: the function.
        dim: length of the vector; None: whatever comes.
        needs: the tile encoder whose features it takes, of tiles as that card recommends; None: any.
    """

    name: str
    identity: str
    pool: Pool
    dim: int | None = None
    needs: EncoderCard | None = None

    def __call__(self, features_ND: Features, coords_N2: Coords, tile_side_level0: float) -> Vector:
        """The vector [D] of a slide, see ``Pool``."""
        return self.pool(features_ND, coords_N2, tile_side_level0)


def mean_vector(features_ND: Features, coords_N2: Coords, tile_side_level0: float) -> Vector:
    """The mean of the tiles, summed in double precision."""
    return np.asarray(features_ND.mean(axis=0, dtype=np.float64))


def max_vector(features_ND: Features, coords_N2: Coords, tile_side_level0: float) -> Vector:
    """The largest value of each feature."""
    return np.asarray(features_ND.max(axis=0))


def load_slide_encoder(name: str, device: torch.device) -> SlideEncoder:
    """A slide encoder by its name: a key of ``SLIDE_ENCODERS`` or ``python:MODULE:FUNCTION``.

    Raises:
        UsageError: there is none of this name, or its package or weights are not here; says how to get them.
    """
    if name in SLIDE_ENCODERS:
        return SLIDE_ENCODERS[name](device)
    if name.startswith(f"{PYTHON}:"):
        return _own_function(name)
    fix = f"use {', '.join(SLIDE_ENCODERS)} or {PYTHON}:MODULE:FUNCTION"
    raise UsageError(f"no slide encoder is named {name!r}{did_you_mean(name, SLIDE_ENCODERS)}", where=WHERE, fix=fix)


def check_features(encoder: SlideEncoder, attrs: dict[str, Any], dim: int) -> None:
    """Whether the features of a file are those that the slide encoder was trained on, by the recipe they carry.

    Args:
        encoder: the slide encoder.
        attrs: of the feature file.
        dim: features of a tile.

    Raises:
        SlideError: features of another tile encoder, of another pooling, or of tiles of another size.
    """
    needs = encoder.needs
    if needs is None:
        return
    made_by = str(attrs.get("recipe_encoder", "an unknown encoder"))
    tile_px, mpp = needs.tile_px or needs.resize_px, needs.mpp[0]
    fix = f"extract with extract.encoder={needs.name}, tile.tile_px={tile_px}, tile.mpp={mpp:g}"
    known = {_plain_name(needs.name), _plain_name(needs.hub_id)}
    if not known & {_plain_name(made_by), _plain_name(str(attrs.get("recipe_card", "")))}:
        raise SlideError(f"{encoder.name} was trained on features of {needs.name}, these are of {made_by}", fix=fix)
    if dim != needs.dim:
        raise SlideError(f"{encoder.name} takes {needs.dim} features per tile, these are {dim} (another pooling?)", fix=fix)
    side_um = float(attrs["tile_px"]) * float(attrs["mpp"])
    if abs(side_um / (tile_px * mpp) - 1) > MAX_MISFIT:
        raise SlideError(f"{encoder.name} was trained on tiles of {tile_px * mpp:g} um, these have {side_um:g} um", fix=fix)


def _plain_name(encoder: str) -> str:
    """Letters and digits of an encoder's name, without scheme, organisation and the tool whose recipe it is.

    So a folder or a function of one's own that hands over the known network is recognised by its name.
    """
    bare = encoder.rpartition(":")[2].rpartition("/")[2].partition("@")[0]
    return "".join(character for character in bare.lower() if character.isalnum())


def _own_function(name: str) -> SlideEncoder:
    module_name, _, function_name = name.removeprefix(f"{PYTHON}:").rpartition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, ValueError, AttributeError) as error:
        fix = "install the module where pathfm runs, and check both names"
        raise UsageError(f"the slide encoder {name} cannot be imported: {error}", where=WHERE, fix=fix) from error
    if not callable(function):
        raise UsageError(f"the slide encoder {name} is not a function", where=WHERE, fix="name a function")
    return SlideEncoder(name, f"{name} {source_sha256(function, module_name)}", function)


def _titan(device: torch.device) -> SlideEncoder:
    """TITAN (Ding et al. 2024, arXiv 2411.19666): CONCH v1.5 features of 512 px tiles at 0.5 mpp -> 768."""
    model = _from_hub("titan", "MahmoodLab/TITAN", "einops", "einops_exts").to(device)

    def run(features_1ND: Tensor, grid_1N2: Tensor) -> Tensor:
        return model.encode_slide_from_patch_features(features_1ND, grid_1N2 * 512, 512)  # type: ignore[operator,no-any-return]

    return _pretrained("titan", model, run, 768, CARDS["conch-v1.5"])


def _prism(device: torch.device) -> SlideEncoder:
    """PRISM (Shaikovski et al. 2024, arXiv 2405.10254): Virchow features (class token and mean) at 0.5 mpp -> 1280."""
    model = _from_hub("prism", "paige-ai/Prism", "einops", "environs", "sacremoses").to(device)

    def run(features_1ND: Tensor, grid_1N2: Tensor) -> Tensor:
        return model.slide_representations(features_1ND)["image_embedding"]  # type: ignore[operator,no-any-return]

    return _pretrained("prism", model, run, 1280, CARDS["virchow"])


def _gigapath(device: torch.device) -> SlideEncoder:
    """Prov-GigaPath's slide encoder (Xu et al. 2024, Nature 630): its own tile features at 0.5 mpp -> 768, class token."""
    install = "pip install fairscale git+https://github.com/prov-gigapath/prov-gigapath.git"
    _check_packages("gigapath-slide", install, "gigapath", "fairscale")
    hub_id, arch = "prov-gigapath/prov-gigapath", "gigapath_slide_enc12l768d"
    try:
        create_model = importlib.import_module("gigapath.slide_encoder").create_model
        weights = importlib.import_module("huggingface_hub").hf_hub_download(hub_id, "slide_encoder.pth", local_files_only=True)
        model: nn.Module = create_model(weights, arch, 1536).eval().to(device)
    except (OSError, ImportError, *FAULTS) as error:
        raise _no_weights("gigapath-slide", hub_id, error) from error

    def run(features_1ND: Tensor, grid_1N2: Tensor) -> Tensor:
        return model(features_1ND, grid_1N2 * 256.0)[-1]  # type: ignore[no-any-return]

    return _pretrained("gigapath-slide", model, run, 768, CARDS["gigapath"])


SLIDE_ENCODERS: dict[str, Callable[[torch.device], SlideEncoder]] = {
    "mean": lambda _: SlideEncoder("mean", "mean 1", mean_vector),
    "max": lambda _: SlideEncoder("max", "max 1", max_vector),
    "titan": _titan,
    "prism": _prism,
    "gigapath-slide": _gigapath,
}
"""By name, what loads it onto a device."""


def _pretrained(
    name: str, model: nn.Module, run: Callable[[Tensor, Tensor], Tensor], dim: int, needs: EncoderCard
) -> SlideEncoder:
    """A network as a slide encoder. ``run`` takes features [1, N, D] and grid places [1, N, 2] on its device.

    On a GPU it computes in half precision, as its authors do, on a CPU in single.
    """
    device = next(model.parameters()).device

    @torch.inference_mode()
    def function(features_ND: Features, coords_N2: Coords, tile_side_level0: float) -> Vector:
        features = torch.from_numpy(features_ND.astype(np.float32)).unsqueeze(0).to(device)
        grid = torch.from_numpy(grid_places(coords_N2, tile_side_level0)).unsqueeze(0).to(device)
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            vector_1D = run(features, grid)
        return np.asarray(vector_1D.float().reshape(-1).cpu().numpy())

    # The code of a network from the hub is part of what its vectors depend on.
    revision = str(getattr(getattr(model, "config", None), "_commit_hash", None) or "")
    return SlideEncoder(name, f"{name} {revision} {weights_sha256(model)}", function, dim, needs)


def grid_places(coords_N2: Coords, tile_side_level0: float) -> Coords:
    """Column and row [N, 2] of each tile in a grid of tiles from the slide's upper left corner.

    Corners are whole pixels while sides need not be; one pixel makes up for that.
    """
    return np.floor_divide(coords_N2 + 1, tile_side_level0).astype(np.int64)


def _from_hub(name: str, hub_id: str, *packages: str) -> nn.Module:
    """A network whose code and weights were fetched from the Hugging Face hub. Naming it is consent to run that code.

    Nothing is fetched here: what runs is what was fetched, and a run does not depend on the network.
    """
    _check_packages(name, f"pip install transformers {' '.join(packages)}", "transformers", *packages)
    try:
        auto_model = importlib.import_module("transformers").AutoModel
        model: nn.Module = auto_model.from_pretrained(hub_id, trust_remote_code=True, local_files_only=True)
    except (OSError, ImportError, *FAULTS) as error:
        raise _no_weights(name, hub_id, error) from error
    return model.eval().requires_grad_(requires_grad=False)


def _check_packages(name: str, install: str, *packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingExtraError(f"the slide encoder {name} needs {', '.join(missing)}", where=WHERE, fix=install)


def _no_weights(name: str, hub_id: str, error: BaseException) -> UsageError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    fix = f"accept the licence at https://huggingface.co/{hub_id}, then: hf auth login; hf download {hub_id}"
    return UsageError(f"the slide encoder {name} cannot be loaded: {reason}", where=WHERE, fix=fix)
