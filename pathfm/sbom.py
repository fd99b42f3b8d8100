"""What this environment is made of: a list of its software (SBOM, CycloneDX 1.6), their licences, and one digest of it all.

The list holds no time, host or path: two machines with the same environment write the same file.
"""

from __future__ import annotations

import csv
import hashlib
import json
import platform
import re
import uuid
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pathfm.errors import ExitCode, MissingExtraError
from pathfm.log import say
from pathfm.store.commit import write_json

if TYPE_CHECKING:
    from cyclonedx.model.component import Component
    from cyclonedx.model.license import License

ROOT = "pathfm"
INSTALLERS = frozenset({"pip", "setuptools", "wheel"})
"""They put software in its place and take no part in any result: every new environment brings its own."""
MADE_BY_INSTALLING = frozenset({"INSTALLER", "RECORD", "REQUESTED", "direct_url.json"})
"""Files of a distribution that tell how it came here, and not what it is."""
REFUSED = re.compile(
    r"\bA?GPL|\bGNU (Affero )?General Public|[-\s]NC\b|non-?commercial|\bSSPL|\bBUSL|\bCommons Clause", re.IGNORECASE
)
"""Licences that bind whoever passes software on, or forbid some uses. LGPL and MPL are none: their libraries stay separate."""
WITH_EXCEPTION = re.compile(r"\S+ WITH (GCC|Classpath|Bootloader|Autoconf)-exception\S*", re.IGNORECASE)
KNOWN: Mapping[str, str] = {"docutils": "only its Emacs mode is under the GPL, and that is not installed"}
"""Distributions whose metadata names a licence of the kind above, and why it does not matter; by normalised name."""
_SHORT = 100
"""A longer text in the field for the licence's name is the licence itself [characters]."""


@cache
def installed() -> Mapping[str, Distribution]:
    """Everything that is installed, by normalised name; of two with one name that which is imported."""
    found: dict[str, Distribution] = {}
    for distribution in distributions():
        if name := _field(distribution, "Name"):  # a damaged installation has none
            found.setdefault(canonicalize_name(name), distribution)
    return dict(sorted(found.items()))


def environment_digest() -> str:
    """SHA-256 over the lines ``name==version``, sorted, of everything that is installed but the installers."""
    lines = "".join(f"{name}=={found.version}\n" for name, found in installed().items() if name not in INSTALLERS)
    return hashlib.sha256(lines.encode()).hexdigest()


def dependencies() -> dict[str, list[str]]:
    """What needs what, both by normalised name, sorted: of what is installed, and of ``pathfm`` with all its extras."""
    found = installed()
    extras = {name: {""} for name in found}
    if ROOT in found:
        extras[ROOT] |= set(found[ROOT].metadata.get_all("Provides-Extra") or ())
    needed: dict[str, set[str]] = {name: set() for name in found}
    to_do = list(found)
    while to_do:
        name = to_do.pop()
        for requirement in _requirements(found[name], extras[name]):
            other = canonicalize_name(requirement.name)
            if other not in found or other == name:
                continue
            needed[name].add(other)
            if not requirement.extras <= extras[other]:
                extras[other] |= requirement.extras
                to_do.append(other)
    return {name: sorted(others) for name, others in needed.items()}


def _requirements(distribution: Distribution, extras: set[str]) -> Iterator[Requirement]:
    """What a distribution with some extras requires here."""
    for text in distribution.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            yield requirement


def licences(distribution: Distribution) -> tuple[str, ...]:
    """What a distribution says its licence is: an SPDX expression, else a name, else classifiers, sorted; () for nothing."""
    if expression := _field(distribution, "License-Expression"):
        return (expression,)
    text = _field(distribution, "License")
    if text not in {"", "UNKNOWN"} and "\n" not in text and len(text) <= _SHORT:
        return (text,)
    classifiers = (line.split(" :: ") for line in distribution.metadata.get_all("Classifier") or ())
    names = {parts[-1] for parts in classifiers if parts[0] == "License"}
    return tuple(sorted(names - {"OSI Approved", "DFSG approved"}))


def _field(distribution: Distribution, name: str) -> str:
    """A field of the metadata that is there once at most; empty where it is absent."""
    return str((distribution.metadata.get_all(name) or [""])[0]).strip()


def is_refused(licence: str) -> bool:
    """Whether a licence, a name or an SPDX expression, leaves no choice but one that ``REFUSED`` names."""
    licence = WITH_EXCEPTION.sub("free", licence)
    while inner := re.search(r"\(([^()]*)\)", licence):
        licence = licence[: inner.start()] + (" GPL " if is_refused(inner[1]) else " free ") + licence[inner.end() :]
    return all(REFUSED.search(choice) for choice in re.split(r"\sOR\s", licence))


def licence_findings() -> list[str]:
    """Installed software whose licence is not permissive, as ``name version: licence``."""
    found = []
    for name, distribution in installed().items():
        said = licences(distribution)
        if name not in KNOWN and any(is_refused(licence) for licence in said):
            found.append(f"{name} {distribution.version}: {', '.join(said)}")
    return found


def write_sbom(out: Path) -> ExitCode:
    """Writes the list of software, ``pathfm sbom``, and says which licences need a look.

    Args:
        out: the JSON file to make or replace.

    Returns:
        SOME_FAILED when a licence is not permissive; the file is written all the same.

    Raises:
        MissingExtraError: the CycloneDX library is not installed.
        StoreError: the drive fails.
    """
    write_json(out, sbom())
    say(f"{out}: {len(installed())} distributions, environment {environment_digest()[:12]}")
    return say_licences()


def say_licences() -> ExitCode:
    """Says which licences need a look; SOME_FAILED when one is not permissive."""
    found = licence_findings()
    for line in found:
        say(f"licence: {line}")
    for name, reason in KNOWN.items():
        if name in installed():
            say(f"licence: {name} is fine: {reason}")
    stated = {name: licences(distribution) for name, distribution in installed().items()}
    closed = [name for name, said in stated.items() if any("proprietary" in licence.lower() for licence in said)]
    silent = [name for name, said in stated.items() if not said]
    for what, names in (("proprietary, with terms of their own", closed), ("no licence in the metadata", silent)):
        if names:
            say(f"note: {what}: {', '.join(names)}")
    return ExitCode.SOME_FAILED if found else ExitCode.DONE


def sbom() -> dict[str, Any]:
    """The list of software as CycloneDX 1.6 JSON; pathfm is what it is about.

    Raises:
        MissingExtraError: the CycloneDX library is not installed.
    """
    try:
        from cyclonedx.model.bom import Bom
        from cyclonedx.output.json import JsonV1Dot6
    except ImportError as error:
        raise MissingExtraError("the list of software needs cyclonedx-python-lib", extra="audit") from error
    bom = Bom()
    components = {name: _component(name, distribution) for name, distribution in installed().items()}
    if ROOT in components:
        bom.metadata.component = components[ROOT]
    bom.components.update(part for name, part in components.items() if name != ROOT)
    bom.components.add(_python())
    for name, others in dependencies().items():
        bom.register_dependency(components[name], [components[other] for other in others])
    content: dict[str, Any] = json.loads(JsonV1Dot6(bom).output_as_string())
    # The library's own number and time differ from run to run.
    content["metadata"].pop("timestamp", None)
    content.pop("serialNumber", None)
    number = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(content, sort_keys=True))
    return {**content, "serialNumber": number.urn}


def _component(name: str, distribution: Distribution) -> Component:
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    purl = PackageURL("pypi", name=name, version=distribution.version)
    digest = _own_hash() if name == ROOT else installed_hash(distribution)
    return Component(
        name=name,
        version=distribution.version,
        type=ComponentType.APPLICATION if name == ROOT else ComponentType.LIBRARY,
        bom_ref=purl.to_string(),
        purl=purl,
        description=_field(distribution, "Summary") or None,
        licenses=_licence_objects(licences(distribution)),
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)] if digest else (),
    )


def _python() -> Component:
    from cyclonedx.model.component import Component, ComponentType

    name, version = platform.python_implementation(), platform.python_version()
    return Component(name=name, version=version, type=ComponentType.PLATFORM, bom_ref=f"{name}@{version}")


def _licence_objects(said: tuple[str, ...]) -> list[License]:
    from cyclonedx.contrib.license.factories import LicenseFactory

    factory = LicenseFactory()
    # The format allows one expression, or several names, but no mixture.
    return [factory.make_from_string(said[0])] if len(said) == 1 else [factory.make_with_name(text) for text in said]


def installed_hash(distribution: Distribution) -> str:
    """SHA-256 over the sorted lines ``name,hash`` of the files that came with a distribution; empty where none are recorded.

    Scripts are left out, since they name the environment's folder, and so are compiled files and what installing adds.
    """
    if "__editable__" in (record := distribution.read_text("RECORD") or ""):
        return ""
    lines = []
    for row in csv.reader(record.splitlines()):
        file, digest = row[0], row[1] if len(row) > 1 else ""
        is_foreign = file.startswith(("..", "/")) or (".dist-info/" in file and Path(file).name in MADE_BY_INSTALLING)
        if digest and not is_foreign and not file.endswith(".pyc"):
            lines.append(f"{file},{digest}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest() if lines else ""


def _own_hash() -> str:
    """SHA-256 over the sorted lines ``name,hash`` of pathfm's files, which may lie in a checkout."""
    package = Path(__file__).parent
    files = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    lines = [f"{path.relative_to(package).as_posix()},{hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in files]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
