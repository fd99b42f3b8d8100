"""Where everything of a study lies under its output folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pathfm.study import TileSettings

PICTURES = "pictures"
"""Folder of overlays and contact sheets, beside the stores."""


def tile_spec(settings: TileSettings, digest: str) -> str:
    """The folder name of one way of tiling: ``224px-0.5mpp-3f9c``; changing a setting never overwrites earlier work."""
    several = settings.mpp if isinstance(settings.mpp, tuple) else (settings.mpp,)
    scale = "+".join("native" if isinstance(mpp, str) else f"{mpp:g}" for mpp in several)
    scale += "mpp" * (settings.mpp != "native")
    return f"{settings.tile_px}px-{scale}-{digest[:4]}"


@dataclass(frozen=True)
class Layout:
    """Paths of one study.

    Attributes:
        out: the study's output folder.
        spec: folder name of the tile settings (``tile_spec``).
    """

    out: Path
    spec: str

    @property
    def study_file(self) -> Path:
        """The resolved settings of the last command."""
        return self.out / "study.yaml"

    @property
    def tiles(self) -> Path:
        """Folder of tile stores."""
        return self.out / "tiles" / self.spec

    def store(self, slide_id: str) -> Path:
        """The tile store of a slide."""
        return self.tiles / f"{slide_id}.zarr"

    def pictures(self, slide_id: str) -> tuple[Path, Path]:
        """The overlay and the contact sheet of a slide."""
        folder = self.tiles / PICTURES
        return folder / f"{slide_id}.overlay.png", folder / f"{slide_id}.contact.jpg"

    def encoder(self, backbone: str, digest: str) -> Path:
        """The study's own encoder (checkpoints, teacher, untrained), one folder per fingerprint: no training is overwritten."""
        return self.out / "encoder" / f"{_safe(backbone)}-{digest[:8]}"

    def features(self, encoder_name: str, digest: str) -> Path:
        """Folder of feature files of one encoder and recipe."""
        return self.out / "features" / self.spec / f"{_safe(encoder_name)}-{digest[:8]}"

    @property
    def mil(self) -> Path:
        """Folds, models, predictions, attention."""
        return self.out / "mil"

    @property
    def report(self) -> Path:
        """The page people look at."""
        return self.out / "report"


def _safe(name: str) -> str:
    return "".join(character if character.isalnum() or character in "._-" else "-" for character in name)
