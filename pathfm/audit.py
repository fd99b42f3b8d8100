"""``pathfm audit``: whether the records of what happened are whole and unchanged, line by line. See ``docs/audit.md``."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pathfm.chain import ID, KEY_FILE, Head, Sealed, SecretKey, chain_files, key_of_environment, parse_sealed, read_id, read_key
from pathfm.errors import ExitCode, UsageError
from pathfm.log import plural, say
from pathfm.run_manifest import PATTERN, RUNS, manifest_text

Keys = Mapping[str, SecretKey]
CLOSING = {"recovered", "chain_started"}
"""Events that say what lies before them and is no line of the chain."""


class Finding(NamedTuple):
    """Something that cannot be explained by kills and full disks.

    Attributes:
        path: the file.
        line: of it; 0: no line in particular.
        what: in words.
        unproved: where only the key is missing, how many lines nothing else proves; None: something was altered.
    """

    path: Path
    line: int
    what: str
    unproved: int | None = None


@dataclass
class Chain:
    """One file of events, as it was read.

    Attributes:
        path: the file.
        lines: sealed ones, by key id (None: hashed only).
        hashes: sequence -> hash of that line.
        recovered: torn lines that the next process has closed.
        older: lines from before there were chains.
        torn: bytes of a last line that no process has closed yet.
        records: line number, name and hash of manifests that events tell of.
        runs: kind -> runs that have begun or ended.
        folders: ids of the folder, as its lines say; one, unless somebody has put together what does not belong so.
        last: its head.
    """

    path: Path
    lines: Counter[str | None] = field(default_factory=Counter)
    hashes: dict[int, str] = field(default_factory=dict)
    recovered: int = 0
    older: int = 0
    torn: int = 0
    records: list[tuple[int, str, str]] = field(default_factory=list)
    runs: dict[str, set[str]] = field(default_factory=lambda: {"run_started": set(), "run_ended": set()})
    folders: set[str] = field(default_factory=set)
    last: Head = field(default_factory=Head)


def audit(folder: Path, keys: Sequence[Path] = (), head: str = "") -> ExitCode:
    """Checks all chains of events, and all manifests of runs, below a folder.

    Args:
        folder: an output folder, an outbox, or a folder of those.
        keys: files of keys that were in use, besides that of ``PATHFM_AUDIT_KEY``.
        head: hash of a manifest or line that was kept elsewhere: it must be among them.

    Returns:
        0 when everything is as it was written, 3 when something is not: each finding is one line.

    Raises:
        UsageError: a file of ``keys`` has no key, or there is nothing to check.
    """
    if not folder.is_dir():
        raise UsageError("there is no such folder", where=str(folder))
    known = {key.id: key for key in [*map(read_key, keys), key_of_environment()] if key}
    findings: list[Finding] = []
    chains = {path: read_chain(path, known, findings) for path in chain_files(folder)}
    manifests = [path for place in _folders_of_runs(folder, chains) for path in sorted(place.glob(PATTERN))]
    if not chains and not manifests:
        raise UsageError("there are no events and no manifests of runs here", where=str(folder), fix="name an output folder")
    pinned = _check_manifests(manifests, chains, known, findings)
    for chain in chains.values():
        findings += _unproved(chain, known, pinned.get(chain.path))
        findings += _records(chain)
    findings += _strangers(chains.values())
    seen = {each for chain in chains.values() for each in chain.hashes.values()} | {_digest(path) for path in manifests}
    if head and head not in seen:
        findings.append(Finding(folder, 0, f"no manifest or line has the hash {head}: the end was cut off or written anew"))
    for path, line, what, _ in sorted(findings, key=lambda finding: finding[:3]):
        place = path.relative_to(folder).as_posix() if path != folder else str(folder)
        say(f"{place}{f':{line}' if line else ''}: {what}")
    _tell(list(chains.values()), manifests, known)
    say(f"audit: {_summary(findings)}")
    return ExitCode.SOME_FAILED if findings else ExitCode.DONE


def read_chain(path: Path, keys: Keys, findings: list[Finding]) -> Chain:
    """Reads a file of events from end to end, and adds what is wrong with it."""
    walk = _Walk(Chain(path), keys, findings)
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            walk.take(number, raw)
    walk.finish()
    return walk.chain


class _Walk:
    """The state between two lines: the last sealed one, whether it was sound, and what came since that is none."""

    def __init__(self, chain: Chain, keys: Keys, findings: list[Finding]) -> None:
        self.chain, self._keys, self._findings = chain, keys, findings
        self._is_sound, self._strays = True, list[tuple[int, bytes]]()

    def take(self, number: int, raw: bytes) -> None:
        """The next line, with its end."""
        sealed = parse_sealed(raw.removesuffix(b"\n"))
        if sealed is None:
            self._strays.append((number, raw))
            return
        problem = self._mac_problem(sealed)
        if self._strays:
            self._explain(sealed, is_proved=not problem)
        last, self.chain.last = self.chain.last, sealed.head
        if not problem:
            problem = _order_problem(sealed, last, self._is_sound)
        self._is_sound = not problem
        if problem:
            self._found(number, problem, 1 if self._lacks_key(sealed) else None)
        if last.key and not sealed.head.key:
            self._found(number, "no key from here on, though the lines before have one", unproved=0)
        self.chain.lines[sealed.head.key] += 1
        self.chain.hashes.setdefault(sealed.head.sequence, sealed.head.hash)
        self._note(number, sealed.said)

    def finish(self) -> None:
        """Behind the last line."""
        if self._strays and not self._strays[-1][1].endswith(b"\n"):
            self.chain.torn = len(self._strays.pop()[1])
        if self.chain.last.sequence:
            self._report_strays()
        else:
            self.chain.older = len(self._strays)

    def _lacks_key(self, sealed: Sealed) -> bool:
        return bool(self._keys) and sealed.head.key is not None and sealed.head.key not in self._keys

    def _mac_problem(self, sealed: Sealed) -> str:
        key = sealed.head.key
        if key is None or not self._keys:
            return ""
        if self._lacks_key(sealed):
            return f"written with the key {key}, which is not given: not ours, or an older one (add it with --key)"
        return "" if self._keys[key].is_mac(sealed.head.mac, "event", sealed.body) else "altered: its MAC is wrong"

    def _explain(self, sealed: Sealed, is_proved: bool) -> None:
        """A closing event that fits what lies before it makes it a torn line, or lines older than the chain."""
        said, region = sealed.said, b"".join(raw for _, raw in self._strays)
        for candidate in (region, region.removesuffix(b"\n")):
            fits = said.get("bytes") == len(candidate) and said.get("sha256") == hashlib.sha256(candidate).hexdigest()
            if not fits or not is_proved or said.get("kind") not in CLOSING:
                continue
            if said["kind"] == "recovered":
                self.chain.recovered += 1
            else:
                self.chain.older = len(self._strays)
            self._strays = []
            return
        self._report_strays()
        self._is_sound = False

    def _report_strays(self) -> None:
        for number, _ in self._strays:
            self._found(number, "no line of the chain: altered or inserted")
        self._strays = []

    def _note(self, number: int, said: Mapping[str, Any]) -> None:
        kind = said.get("kind")
        self.chain.folders |= {str(said[ID])} if ID in said else set()
        if kind == "run_recorded":
            self.chain.records.append((number, str(said.get("manifest")), str(said.get("sha256"))))
        if kind in self.chain.runs:
            self.chain.runs[kind].add(str(said.get("run")))

    def _found(self, number: int, what: str, unproved: int | None = None) -> None:
        self._findings.append(Finding(self.chain.path, number, what, unproved))


def _order_problem(sealed: Sealed, last: Head, is_sound: bool) -> str:
    """What is wrong with the place of a line; after an unsound one only its number is looked at."""
    missing = sealed.head.sequence - last.sequence - 1
    if missing > 0:
        return f"{missing} {'line is' if missing == 1 else 'lines are'} missing before this one: dropped or swapped"
    if missing < 0:
        return "out of order: swapped, copied or inserted"
    if is_sound and sealed.previous != last.hash:
        return "does not follow the line before it: one of the two was altered or replaced"
    return ""


def _unproved(chain: Chain, keys: Keys, pinned: int | None) -> Iterator[Finding]:
    """With a key, everything must be proved by it: by a MAC, by a later line with one, or by a manifest that has one.

    Files without a chain, of earlier versions, must at least be known to such a manifest (``pinned`` is None where not).
    """
    if keys and chain.last.key is None and chain.last.sequence > (pinned or 0):
        what = f"lines {(pinned or 0) + 1} to {chain.last.sequence} are proved by no key: anybody may have written them"
        yield Finding(chain.path, 0, what, chain.last.sequence - (pinned or 0))
    if keys and not chain.last.sequence and chain.older and pinned is None:
        what = f"{plural(chain.older, 'line')} without a chain: anybody may have written them"
        yield Finding(chain.path, 0, what, chain.older)


def _records(chain: Chain) -> Iterator[Finding]:
    for number, name, digest in chain.records:
        path = chain.path.parent / RUNS / Path(name).name
        if not path.is_file():
            yield Finding(chain.path, number, f"the manifest {RUNS}/{path.name} was removed")
        elif _digest(path) != digest:
            yield Finding(path, 0, "altered since it was written")


def _strangers(chains: Collection[Chain]) -> Iterator[Finding]:
    """All chains of a folder must be of that folder."""
    ids: dict[Path, set[str]] = {}
    for chain in chains:
        ids.setdefault(chain.path.parent, {read_id(chain.path.parent)} - {""}).update(chain.folders)
    for chain in chains:
        if chain.folders and len(ids[chain.path.parent]) > 1:
            what = f"of the folder {', '.join(sorted(chain.folders))}, and others here are of another: copied from elsewhere"
            yield Finding(chain.path, 0, what)


def _folders_of_runs(folder: Path, chains: Mapping[Path, Chain]) -> list[Path]:
    """Where manifests are, or have been: beside every chain, in the folder itself, and one below."""
    places = {folder, *(path.parent for path in chains), *(path.parent for path in folder.glob(f"*/{RUNS}"))}
    return sorted(place / RUNS for place in places)


def _check_manifests(
    manifests: Sequence[Path], chains: Mapping[Path, Chain], keys: Keys, findings: list[Finding]
) -> dict[Path, int]:
    """Adds what is wrong with manifests and with the heads they keep; gives how far each chain is proved by them."""
    pinned: dict[Path, int] = {}
    last: dict[Path, tuple[int, str, str | None]] = {}
    for path in manifests:
        raw = path.read_bytes()
        said = _content(raw)
        if said is None:
            findings.append(Finding(path, 0, "altered: not as manifests are written"))
            continue
        sequence, previous, key = last.get(path.parent, (0, "", None))
        problem = _manifest_problem(said, keys)
        problem = problem or _manifest_order(said["sequence"] - sequence - 1, said["previous"] == previous)
        if key and not said["key"]:
            findings.append(Finding(path, 0, "no key from here on, though the manifests before have one", 0))
        lacks_key = bool(keys) and said["key"] is not None and said["key"] not in keys
        findings += [Finding(path, 0, problem, 0 if lacks_key else None)] if problem else []
        last[path.parent] = said["sequence"], hashlib.sha256(raw).hexdigest(), said["key"]
        lost = list(_check_heads(path, said, chains))
        findings += lost
        if said["key"] in keys and not problem and not lost:
            pinned |= {path.parent.parent / head["file"]: head["sequence"] for head in said["chains"]}
    for place, (_, _, key) in last.items():
        if keys and key is None:
            findings.append(Finding(place, 0, "the last manifests are proved by no key: anybody may have written them", 0))
    findings += [finding for path in chains for finding in _check_results(path.parent, chains)]
    return pinned


def _content(raw: bytes) -> dict[str, Any] | None:
    """A manifest; None when it is not written as manifests are."""
    try:
        said = json.loads(raw)
        fits = {type(said["sequence"]), type(said["previous"]), type(said["chains"])} == {int, str, list}
        heads = [(str(head["file"]), int(head["sequence"]), str(head["hash"])) for head in said["chains"]]
        text = manifest_text(said)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (
        said
        if fits and "key" in said and "mac" in said and len(heads) == len(said["chains"]) and text.encode() == raw
        else None
    )


def _manifest_problem(said: Mapping[str, Any], keys: Keys) -> str:
    if said["key"] is None or not keys:
        return ""
    if said["key"] not in keys:
        return f"written with the key {said['key']}, which is not given: not ours, or an older one (add it with --key)"
    body = manifest_text({name: value for name, value in said.items() if name != "mac"}).encode()
    return "" if keys[said["key"]].is_mac(said["mac"], "manifest", body) else "altered: its MAC is wrong"


def _manifest_order(missing: int, follows: bool) -> str:
    if missing:
        return f"{missing} recorded runs before this one were removed" if missing > 0 else "out of order: copied or inserted"
    return "" if follows else "the manifest before this one was altered or replaced"


def _check_heads(path: Path, said: Mapping[str, Any], chains: Mapping[Path, Chain]) -> Iterator[Finding]:
    """Every chain must still hold the line that was its last one when the manifest was written."""
    for head in said["chains"]:
        chain = chains.get(path.parent.parent / head["file"])
        problem = _head_problem(chain, head)
        if problem:
            yield Finding(chain.path if chain else path, 0, f"{problem} (head kept in {path.parent.name}/{path.name})")


def _check_results(folder: Path, chains: Mapping[Path, Chain]) -> Iterator[Finding]:
    """Results of a batch keep the head of the chain beside them too."""
    for path in sorted(folder.glob("results/*/result.json")):
        head = (_json(path) or {}).get("events")
        if not isinstance(head, dict) or not {"file", "sequence", "hash"} <= head.keys():
            continue
        problem = _head_problem(chains.get(folder / str(head["file"])), head)
        if problem:
            yield Finding(path, 0, f"{head['file']}: {problem}")


def _head_problem(chain: Chain | None, head: Mapping[str, Any]) -> str:
    if not head["sequence"]:
        return ""
    if chain is None:
        return f"{head['file']} was removed"
    if head["sequence"] > chain.last.sequence:
        return f"cut off behind line {chain.last.sequence} of {head['sequence']}"
    if chain.hashes.get(head["sequence"]) != head["hash"]:
        return f"line {head['sequence']} of the chain is another one than when the run ended: altered or written anew"
    return ""


def _json(path: Path) -> dict[str, Any] | None:
    try:
        said = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _summary(findings: Sequence[Finding]) -> str:
    """What was altered, apart from what merely lacks the key: that may be honest, and proves nothing."""
    altered = [finding for finding in findings if finding.unproved is None]
    lines = sum(finding.unproved or 0 for finding in findings)
    parts = [f"{len(altered)} altered"] if altered else []
    if len(altered) < len(findings):
        parts.append(f"{plural(lines, 'line')} proved by no key" if lines else "runs without the key")
    return f"{plural(len(findings), 'finding')} ({', '.join(parts)})" if findings else "nothing was found"


def _tell(chains: Sequence[Chain], manifests: Sequence[Path], keys: Keys) -> None:
    """How much was looked at, and how far that goes."""
    lines = sum((chain.lines for chain in chains), Counter[str | None]())
    parts = [f"{plural(lines.total(), 'line')} in {plural(len(chains), 'chain')}", plural(len(manifests), "recorded run")]
    parts += [f"{plural(sum(chain.recovered for chain in chains), 'torn line')} recovered"]
    older, torn = sum(chain.older for chain in chains), sum(chain.torn > 0 for chain in chains)
    parts += [f"{plural(older, 'line')} from before the chain"] if older else []
    parts += [f"{plural(torn, 'torn last line')} that the next run will close"] if torn else []
    begun, ended = (set().union(*(chain.runs[kind] for chain in chains)) for kind in ("run_started", "run_ended"))
    parts += [f"{plural(len(begun - ended), 'run')} that never ended (killed, or still going)"] if begun - ended else []
    say(", ".join(parts))
    for key, count in sorted(lines.items(), key=lambda pair: pair[0] or ""):
        shown = f"key {key}{'' if key in keys else ' (not given: not checked)'}" if key else "no key"
        say(f"{shown}: {plural(count, 'line')}")
    if not keys:
        say(f"no key was given ({KEY_FILE}, --key): single changes are found, but whoever writes a whole log anew is not")
    for path in manifests[-1:]:
        say(f"head: {_digest(path)} (kept elsewhere, it proves the end: --head)")
