"""``pathfm bundle env``: a folder to carry to machines without internet (docs/offline.md), and its check on the other side.

Wheels of exactly the versions of this environment, locked classifiers, encoders, the list of software, and a script that checks
every byte and installs from nothing but the folder. pip gets the wheels from wherever it is configured to look; no address is
written anywhere.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import Distribution
from importlib.util import find_spec
from pathlib import Path
from string import Template
from urllib.parse import urlsplit
from urllib.request import url2pathname

from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from pathfm.errors import ExitCode, StoreError, UsageError
from pathfm.faults import crash_point
from pathfm.log import say, track
from pathfm.sbom import ROOT, installed, say_licences, sbom
from pathfm.store.commit import beside, commit_dir, content_digest, disk_errors, write_json

SUMS, CONSTRAINTS, INSTALL, README, SBOM = "SHA256SUMS", "constraints.txt", "install.sh", "README.txt", "sbom.json"
WHEELS, BUNDLES, ENCODERS = "wheels", "bundles", "encoders"
LEFT_OUT = frozenset({"pip"})
"""Every new environment brings its own."""
SOURCE = ("pyproject.toml", "README.md", "LICENSE", "pathfm", "pipelines")
"""What of a checkout goes into pathfm's own wheel."""
COPY = "source"
GB = 1e9
_TEXTS = Path(__file__).parent / "offline_texts"


def carry(out: Path, bundles: Sequence[Path] = (), encoders: Sequence[Path] = (), wheels: bool = True) -> ExitCode:
    """Writes the folder, whole or not at all. Wheels that an interrupted run had are kept beside it and not fetched again.

    Args:
        out: the folder; absent, empty, or an earlier one, which is replaced.
        bundles: folders of locked classifiers, checked before and after they are copied.
        encoders: folders with encoders, loaded before they are copied.
        wheels: False to carry models only (the wheels of CUDA alone are several GB).

    Raises:
        UsageError: there is something else at ``out``, it is the current folder or a whole drive, a bundle or encoder is not
            whole, or pip cannot get a wheel.
        MissingExtraError: the library for the list of software is not installed.
        StoreError: the drive fails.
    """
    if out.exists() and (out.samefile(os.curdir) or out.is_mount()):
        fix = f"name a folder in it, e.g. {out / 'carry'}"
        raise UsageError("this folder cannot be replaced: it is the current one, or a drive", where=str(out), fix=fix)
    if not _is_replaceable(out):
        raise UsageError("there is something else already", where=str(out), fix="name a folder that is absent or empty")
    models = {
        **{_bundle_place(folder): folder for folder in bundles},
        **{_encoder_place(folder): folder for folder in encoders},
    }
    software, kept = sbom(), beside(out, f".{WHEELS}")
    if wheels:
        _fetch(kept, {name: found for name, found in installed().items() if name not in LEFT_OUT})
    with commit_dir(out) as folder:
        if wheels:
            _link(kept, folder / WHEELS)
        for place, source in models.items():
            _copy(source, folder / place)
        write_json(folder / SBOM, software)
        _write_texts(folder, wheels)
        _write_sums(folder)
    shutil.rmtree(kept, ignore_errors=True)
    say_licences()
    size = sum(path.stat().st_size for path in _files(out))
    count = len(list((out / WHEELS).glob("*.whl")))
    say(f"{out}: {count} wheels, {len(models)} bundles and encoders, {size / GB:.2f} GB; there: sh {INSTALL} FOLDER")
    return ExitCode.DONE


def _is_replaceable(out: Path) -> bool:
    if not out.exists():
        return True
    names = {path.name for path in out.iterdir()} if out.is_dir() else {""}
    return not names or {SUMS, INSTALL} <= names


def _bundle_place(folder: Path) -> str:
    from pathfm.mil.bundle import open_bundle

    return f"{BUNDLES}/{folder.resolve().name}-{open_bundle(folder).digest[:8]}"  # all studies call theirs "bundle"


def _encoder_place(folder: Path) -> str:
    from pathfm.models.encoder_folders import load_folder

    load_folder(str(folder), None)
    return f"{ENCODERS}/{folder.resolve().name}-{content_digest(folder)[:8]}"


def _fetch(folder: Path, wanted: Mapping[str, Distribution]) -> None:
    """Fills ``folder`` with a wheel of each distribution; those that are there already are kept."""
    if find_spec("pip") is None:
        raise UsageError("this environment has no pip to get wheels with", fix="run python -m ensurepip, or use --no-wheels")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    have = _wheels(folder)
    missing = [name for name, found in wanted.items() if (name, Version(found.version)) not in have]
    size = sum(_installed_bytes(found) for found in wanted.values())
    say(
        f"{len(wanted)} packages, {size / GB:.1f} GB when installed; {len(missing)} wheels to get (--no-wheels leaves them out)"
    )
    for name in track(missing, "wheels"):
        _fetch_one(folder, name, wanted[name])
        crash_point("offline.wheel")
    needed = {(name, Version(found.version)) for name, found in wanted.items()}
    for other, path in _wheels(folder).items():
        if other not in needed:  # an interrupted run got it, and the environment has changed since
            path.unlink()


def _fetch_one(folder: Path, name: str, found: Distribution) -> None:
    with disk_errors(folder), tempfile.TemporaryDirectory(prefix=".", dir=folder) as scratch:
        source = _requirement(name, found, Path(scratch))
        options = ("--disable-pip-version-check", "--quiet", "--no-deps", "--wheel-dir", scratch)
        done = subprocess.run([sys.executable, "-m", "pip", "wheel", *options, source], capture_output=True, check=False)
        made = _wheels(Path(scratch))
        if done.returncode or not made:
            # What pip says may hold the address of an index, and a password in it.
            what = f"pip cannot get a wheel of {name} {found.version}: no index is in reach, or it has none for this machine"
            raise UsageError(what, fix=f"see why: pip wheel --no-deps {name}=={found.version}; what was got is kept")
        wheel = made.get((name, Version(found.version)))
        if wheel is None or ((Path(scratch) / COPY).exists() and not _is_what_runs(wheel, found)):
            what = f"the source of {name} has changed since version {found.version} was installed from it"
            raise UsageError(what, fix="install it again, then run the same command; what was got is kept")
        wheel.replace(folder / wheel.name)


def _requirement(name: str, found: Distribution, scratch: Path) -> str:
    """What pip is asked for: a version, or where a distribution came from if not from an index (PEP 610)."""
    said = json.loads(found.read_text("direct_url.json") or "{}")
    url = str(said.get("url") or "")
    if "vcs_info" in said:
        return f"{said['vcs_info']['vcs']}+{url}@{said['vcs_info']['commit_id']}"
    if "dir_info" not in said:
        return url or f"{name}=={found.version}"
    folder = Path(url2pathname(urlsplit(url).path))
    if not folder.is_dir():
        raise UsageError(f"the folder that {name} was installed from is gone", where=str(folder), fix="install it again")
    if name != ROOT:
        return str(folder)
    # A copy, as building leaves files in the source, and files that were left there by older ones would go into the wheel.
    for part in SOURCE:
        _copy_part(folder / part, scratch / COPY / part)
    return str(scratch / COPY)


def _is_what_runs(wheel: Path, found: Distribution) -> bool:
    """Whether pathfm's own wheel has no other file, and needs nothing else, than the pathfm that makes it."""
    here = Path(__file__).parents[1]
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    metadata = next(text.decode() for name, text in files.items() if name.endswith(".dist-info/METADATA"))
    needs = [line.partition(": ")[2] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    own = {here / name: text for name, text in files.items() if name.startswith(f"{ROOT}/")}
    return needs == (found.requires or []) and all(path.is_file() and path.read_bytes() == text for path, text in own.items())


def _copy_part(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copyfile(source, target)


def _wheels(folder: Path) -> dict[tuple[str, Version], Path]:
    parsed = ((parse_wheel_filename(path.name), path) for path in sorted(folder.glob("*.whl")))
    return {(str(facts[0]), facts[1]): path for facts, path in parsed}


def _installed_bytes(found: Distribution) -> int:
    rows = csv.reader((found.read_text("RECORD") or "").splitlines())
    return sum(int(row[2]) for row in rows if len(row) > 2 and row[2].isdigit())


def _link(source: Path, target: Path) -> None:
    """The same files in another folder of the drive; copies where the drive has no hard links."""
    target.mkdir()
    for path in source.glob("*.whl"):
        try:
            os.link(path, target / path.name)
        except OSError:
            shutil.copyfile(path, target / path.name)


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*"), copy_function=shutil.copyfile)
    if content_digest(source) != content_digest(target):
        raise StoreError("the copy is not what was copied", where=str(source), fix="check the drives, then run again")


def _write_texts(folder: Path, wheels: bool) -> None:
    needed = sum(map(_installed_bytes, installed().values())) / GB
    facts = {
        "version": installed()[ROOT].version,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "platform": sysconfig.get_platform(),
        "libc": " ".join(platform.libc_ver()),
        "sums": SUMS,
        "wheels": f"{needed:.1f} GB when installed" if wheels else "left out: pathfm must be installed already",
    }
    for name in (INSTALL, README):
        text = Template((_TEXTS / name).read_text(encoding="utf-8")).substitute(facts)
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    lines = [f"{name}=={found.version}\n" for name, found in installed().items() if name not in {*LEFT_OUT, ROOT}]
    (folder / CONSTRAINTS).write_text("".join(lines if wheels else ()), encoding="utf-8", newline="\n")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _write_sums(folder: Path) -> None:
    lines = [f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in _files(folder)]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8", newline="\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_carried(folder: Path) -> ExitCode:
    """Checks a carried folder where it has arrived: every byte, every model, and whether this environment is the same.

    Returns:
        SOME_FAILED when the environment differs; each difference is listed.

    Raises:
        StoreError: a file is changed, missing or too many, or a model is not whole.
    """
    _check_sums(folder)
    from pathfm.mil.bundle import open_bundle
    from pathfm.models.encoder_folders import load_folder

    for bundle in sorted((folder / BUNDLES).glob("*")):
        say(f"bundle {bundle.name}: whole, digest {open_bundle(bundle).digest}")
    for encoder in sorted((folder / ENCODERS).glob("*")):
        load_folder(str(encoder), None)
        say(f"encoder {encoder.name}: loads")
    differing = _differing((folder / CONSTRAINTS).read_text(encoding="utf-8").splitlines())
    for line in differing:
        say(f"differs: {line}")
    return ExitCode.SOME_FAILED if differing else ExitCode.DONE


def _check_sums(folder: Path) -> None:
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise StoreError(f"no carried folder ({SUMS} is missing)", where=str(folder), fix="make it again") from error
    wanted = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = {path.relative_to(folder).as_posix() for path in _files(folder)} - {SUMS}
    for name in sorted(found ^ wanted.keys()):
        raise StoreError(f"{name} is {'missing' if name in wanted else 'too many'}", where=str(folder), fix="copy it again")
    for name, digest in track(wanted.items(), "check"):
        if _sha256(folder / name) != digest:
            raise StoreError(f"{name} is not the file that was carried", where=str(folder), fix="copy it again")
    say(f"{folder}: {len(wanted)} files, all as they were")


def _differing(lines: Iterable[str]) -> list[str]:
    """What of the lines ``name==version`` is not installed in that version."""
    here = {name: found.version for name, found in installed().items()}
    found = []
    for name, _, version in (line.partition("==") for line in lines):
        if here.get(canonicalize_name(name)) != version:
            found.append(f"{name} {version} was carried, {here.get(canonicalize_name(name), 'nothing')} is here")
    return found
