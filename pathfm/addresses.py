"""Addresses of slides on servers (``https://...``, ``s3://...``), which travel through the pipeline as paths do."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

SCHEMES = frozenset({"http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hdfs", "sftp", "ftp", "memory"})
"""How addresses of remote slides begin."""

_ADDRESS = re.compile(r"([a-z][a-z0-9]+):/{1,2}(?=[^/])", re.IGNORECASE)


def is_remote(path: Path | str) -> bool:
    """Whether a path is an address (``https://...``, ``s3://...``), also one that has been a ``Path``."""
    match = _ADDRESS.match(_text(path))
    return match is not None and match.group(1).lower() in SCHEMES


def remote_url(path: Path | str) -> str:
    """The address that a path was made of.

    A ``Path`` joins doubled slashes: ``https://host/a`` becomes ``https:/host/a``, and is given back as it was. Doubled slashes
    behind the host cannot be told any more: they must be written ``%2F`` in addresses that become paths.
    """
    return _ADDRESS.sub(r"\1://", _text(path), count=1)


def placed(base: Path, path: Path | str) -> Path:
    """A path that starts at a folder unless it is absolute or an address."""
    return Path(path) if is_remote(path) else base / path


def public_name(path: Path | str) -> str:
    """What to call a slide in messages: a local path as it is, an address without user, password, query and fragment."""
    if not is_remote(path):
        return str(path)
    parts = urlsplit(remote_url(path))
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _text(path: Path | str) -> str:
    return path.as_posix() if isinstance(path, Path) else path
