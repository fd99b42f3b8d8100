"""A study file (YAML) and ``--set`` overrides become one frozen ``Study``; settings become fingerprints and text again.

Every plain YAML value is read as the text that was written, and the settings page decides what it is. So ``off`` stays text
where text is wanted, ``1e-3`` is a number where a number is wanted, and the label ``0012`` keeps its zeros. Only ``null`` and
``~`` and nothing at all mean "not given".
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError

from pathfm.addresses import is_remote
from pathfm.errors import UsageError
from pathfm.pretrain_settings import PATH_SCHEMES, PretrainSettings
from pathfm.settings import Settings
from pathfm.study import Study

_NULL = "tag:yaml.org,2002:null"
_STR = "tag:yaml.org,2002:str"


class _TextLoader(yaml.SafeLoader):
    """Mappings, lists, null and text; nothing else, and no key twice."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own class attribute
    yaml_constructors = {  # noqa: RUF012 - PyYAML's own class attribute
        _NULL: yaml.SafeLoader.construct_yaml_null,
        _STR: lambda loader, node: _joined(loader.construct_scalar(node)),
        "tag:yaml.org,2002:seq": yaml.SafeLoader.construct_yaml_seq,
        "tag:yaml.org,2002:map": yaml.SafeLoader.construct_yaml_map,
        None: yaml.SafeLoader.construct_undefined,
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a setting's name must be text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}


_TextLoader.add_implicit_resolver(_NULL, re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])


def _joined(text: str) -> str:
    """Text in which JSON's two escapes for one character beyond U+FFFF are that character, as in YAML they are not."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


class _TextDumper(yaml.SafeDumper):
    """Writes text so that ``_TextLoader`` reads the same text back, on one line."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_TextDumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar(_STR, text, style=None if text.isprintable() else '"')
)


PATHS = frozenset(
    {
        "out",
        "cohort.table",
        "cohort.clinical",
        "cohort.pseudonym_key",
        "cohort.tile_labels",
        "mil.features",
        "mil.split.file",
        "tile.coords",
        "tile.tissue.annotations",
        "pretrain.health.probe",
        "compute.cache_dir",
        "extract.weights",
    }
)
"""Settings that are one path."""
ENCODER_NAMES = frozenset({"pretrain.init", "pretrain.teacher", "extract.encoder", "extract.also"})
"""Settings that may be a path after a scheme, or several of them."""


def load_study(path: Path | None, overrides: Sequence[str] = ()) -> Study:
    """The study in a YAML file, with overrides such as ``tile.mpp=0.5`` applied; no file means all defaults.

    Relative paths start at the study file's folder, or at the current folder without a file; those of overrides, which people
    type, at the current folder.

    Raises:
        UsageError: unreadable file, YAML that is broken or gives a key twice, unknown settings ("did you mean"), values that
            do not fit; all problems in one message, each with its dotted path.
    """
    tree = {} if path is None else _read_tree(path)
    study, problems = _checked(tree, overrides)
    if study is None:
        raise _refusal(problems, _checked(tree)[1], str(path or ""))
    return _resolved(study, (path.absolute().parent if path else Path.cwd()))


def _checked(tree: Mapping[str, object], overrides: Sequence[str] = ()) -> tuple[Study | None, list[str]]:
    """The study of a tree and overrides, or all that is wrong with them."""
    given, problems = dict(tree), []
    for override in overrides:
        problem = _apply(given, _from_here(override))
        problems += [problem] if problem else []
    known = _without_unknown(given, Study, "", problems)
    try:
        study = Study.model_validate(known)
    except ValidationError as error:
        return None, problems + _value_problems(error)
    return (None if problems else study), problems


def dump_study(study: Study, *, keeps_preset: bool = False) -> str:
    """YAML text of all settings, each under its description; ``load_study`` of it gives the same study.

    Args:
        study: the settings.
        keeps_preset: what pretraining has from its preset is a comment, so that another preset can be chosen later.
    """
    pretrain = study.pretrain
    given = {"preset": pretrain.preset, "teacher": pretrain.teacher}
    preset = PretrainSettings.model_validate(given).model_copy(update={"preset": None, "teacher": None})
    return "\n".join(_table_lines(study, "", {"pretrain": preset} if keeps_preset else {})) + "\n"


def not_default(study: Study, table: str) -> dict[str, str]:
    """Dotted name -> value, as ``--set`` takes them, of a stage's settings that are not the defaults (of the preset)."""
    section, preset = getattr(study, table), study.pretrain.preset
    given = {"preset": preset, "teacher": study.pretrain.teacher} if table == "pretrain" else {}
    found = dict(_differences(section, type(section).model_validate(given), f"{table}."))
    own = type(section)()
    return {f"{table}.{name}": _one_line(value) for name, value in given.items() if value != getattr(own, name)} | found


def _differences(table: Settings, plain: Settings, prefix: str) -> Iterator[tuple[str, str]]:
    values = table.model_dump(mode="json")
    for key in type(table).model_fields:
        value, default = getattr(table, key), getattr(plain, key)
        if isinstance(value, Settings):
            yield from _differences(value, default, f"{prefix}{key}.")
        elif value != default:
            yield f"{prefix}{key}", _one_line(values[key])


def fingerprint(*parts: object) -> str:
    """SHA-256 (hex) over the canonical JSON of settings, mappings, sequences, text, numbers and None.

    Raises:
        TypeError: a part holds something whose identity is not its content, such as a path.
        ValueError: a part holds a number that is not finite.
    """
    text = json.dumps([_canonical(part) for part in parts], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``, did you mean 'x'?`` for the closest known name whatever its case; empty when nothing is close."""
    by_fold = {other.casefold(): other for other in known}
    close = difflib.get_close_matches(name.casefold(), by_fold, n=1)
    return f", did you mean {by_fold[close[0]]!r}?" if close else ""


def bullet_list(problems: Sequence[str], limit: int = 100) -> str:
    """One problem as it is; several as a count and one line each (at most ``limit``)."""
    if len(problems) == 1:
        return problems[0]
    more = [f"... and {len(problems) - limit} more"] if len(problems) > limit else []
    return "".join([f"{len(problems)} problems", *(f"\n  - {line}" for line in [*problems[:limit], *more])])


def _from_here(override: str) -> str:
    """An override whose relative path starts at the current folder."""
    name, _, text = override.partition("=")
    value = text.strip()
    if name.strip() in ENCODER_NAMES and value.partition(":")[0] in PATH_SCHEMES:
        # What YAML would make of a number sign or a colon in it is not meant.
        return f"{name}={json.dumps(_placed_name(Path.cwd(), value))}"
    if name.strip() in ENCODER_NAMES and isinstance(given := _parse(value, f"--set {name}"), list):
        return f"{name}={json.dumps([_placed_name(Path.cwd(), each) if isinstance(each, str) else each for each in given])}"
    if name.strip() not in PATHS or not value or value in {"null", "~"} or value[0] in "\"'[":
        return override
    return f"{name}={json.dumps(str(Path.cwd() / value))}"


def _read_tree(path: Path) -> dict[str, object]:
    try:
        tree = _parse(path.read_text(encoding="utf-8-sig"), str(path))
    except FileNotFoundError:
        raise UsageError("there is no such study file", where=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the study file cannot be read: {error}", where=str(path)) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError("a study file must be a table of settings", where=str(path), fix=f"tables: {_names(Study)}")
    return tree


def _parse(text: str, where: str) -> object:
    try:
        return yaml.load(text, _TextLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise UsageError(f"not valid YAML: {said}", where=place) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, int(error.position)) + 1
        raise UsageError("not valid YAML: a character that is not text", where=f"{where}, line {line}") from None
    except (RecursionError, ValueError, OverflowError) as error:
        # Thousands of nested brackets, or an escape beyond the last Unicode character: the parser itself gives up.
        raise UsageError(f"not valid YAML: {error}", where=where) from None


def _apply(tree: dict[str, object], override: str) -> str:
    """Write one ``a.b=value`` into the tree; returns the problem, or nothing."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        return f"--set {override}: must look like table.setting=value"
    table: dict[str, object] = tree
    model: type[Settings] = Study
    for depth, key in enumerate(keys[:-1], start=1):
        inner = _table_of(model, key)
        if inner is None:
            return _unknown(".".join(keys[:depth]), model) if key not in model.model_fields else f"{name}: {key} is not a table"
        below = table.get(key)
        table[key] = table = dict(below) if isinstance(below, dict) else {}
        model = inner
    table[keys[-1]] = _parse(text, f"--set {name}")
    return ""


def _without_unknown(tree: Mapping[str, object], model: type[Settings], prefix: str, problems: list[str]) -> dict[str, object]:
    """The tree without names the settings do not have; each of those is added to ``problems``."""
    known: dict[str, object] = {}
    for key, value in tree.items():
        path, inner = f"{prefix}{key}", _table_of(model, key)
        if key not in model.model_fields:
            problems.append(_unknown(path, model))
        elif inner is None:
            known[key] = value
        elif isinstance(value, dict):
            known[key] = _without_unknown(value, inner, f"{path}.", problems)
        elif value is not None:  # a table with all its lines commented out is an empty table
            problems.append(f"{path}: must be a table of settings ({_names(inner)}), got {value!r}")
    return known


def _table_of(model: type[Settings], key: str) -> type[Settings] | None:
    field = model.model_fields.get(key)
    kind = field.annotation if field else None
    return kind if isinstance(kind, type) and issubclass(kind, Settings) else None


def _names(model: type[Settings]) -> str:
    return ", ".join(model.model_fields)


def _unknown(path: str, model: type[Settings]) -> str:
    table, _, key = path.rpartition(".")
    elsewhere = [known for known in _paths(Study, "") if known.rpartition(".")[2] == key]
    hint = f", did you mean {' or '.join(elsewhere)}?" if elsewhere else did_you_mean(key, model.model_fields)
    return f"{path}: unknown setting{hint or ','} {table or 'the study'} has: {_names(model)}"


def _paths(model: type[Settings], prefix: str) -> Iterator[str]:
    for key in model.model_fields:
        yield f"{prefix}{key}"
        inner = _table_of(model, key)
        if inner:
            yield from _paths(inner, f"{prefix}{key}.")


def _value_problems(error: ValidationError) -> list[str]:
    """One line per setting; the branches of a union ("a number, or native") share a line."""
    wrong: dict[str, list[str]] = {}
    given: dict[str, object] = {}
    for detail in error.errors(include_url=False):
        path = _setting_path(detail["loc"])
        wrong.setdefault(path, []).append(detail["msg"].replace("Input should", "must").replace("Value error, ", ""))
        given.setdefault(path, detail["input"])
    # What is wrong with a whole table is said without the table.
    shown = {path: "" if isinstance(value, Mapping) else f", got {value!r}" for path, value in given.items()}
    return [f"{path}: {' or '.join(dict.fromkeys(said))}{shown[path]}" for path, said in wrong.items()]


def _setting_path(loc: tuple[int | str, ...]) -> str:
    """Dotted path of a pydantic location, without the names of union branches at its end."""
    model: type[Settings] | None = Study
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif model is not None and part in model.model_fields:
            path += f".{part}"
            model = _table_of(model, part)
    return path.removeprefix(".")


def _refusal(problems: Sequence[str], of_file: Collection[str], file: str) -> UsageError:
    """What is wrong, and where: in the file, or in what was given beside it."""
    said = [line if line in of_file or line.startswith("--set ") else f"--set {line}" for line in problems]
    return UsageError(bullet_list(said), where=file if set(problems) & set(of_file) else "")


def _resolved(study: Study, base: Path) -> Study:
    cohort = study.cohort
    placed = {
        "table": _placed(base, cohort.table),
        "clinical": _placed(base, cohort.clinical),
        "tile_labels": _placed(base, cohort.tile_labels),
        "pseudonym_key": _placed(base, cohort.pseudonym_key),
        "slides": tuple(source if is_remote(source) else str(base / source) for source in cohort.slides),
    }
    tile, cache, health = study.tile, study.compute.cache_dir, study.pretrain.health
    health = health.model_copy(update={"probe": _placed(base, health.probe)})
    named = {key: _placed_name(base, getattr(study.pretrain, key)) for key in ("init", "teacher")}
    encoders = {
        "encoder": _placed_name(base, study.extract.encoder),
        "also": tuple(_placed_name(base, name) for name in study.extract.also),
        "weights": _placed(base, study.extract.weights),
    }
    split = study.mil.split.model_copy(update={"file": _placed(base, study.mil.split.file)})
    tissue = tile.tissue.model_copy(update={"annotations": _placed(base, tile.tissue.annotations)})
    return study.model_copy(
        update={
            "out": base / study.out,
            "cohort": cohort.model_copy(update=placed),
            "tile": tile.model_copy(update={"coords": _placed(base, tile.coords), "tissue": tissue}),
            "pretrain": study.pretrain.model_copy(update={"health": health, **named}),
            "extract": study.extract.model_copy(update=encoders),
            "mil": study.mil.model_copy(update={"features": _placed(base, study.mil.features), "split": split}),
            "compute": study.compute.model_copy(update={"cache_dir": _placed(base, cache)}),
        }
    )


def _placed(base: Path, path: Path | None) -> Path | None:
    return base / path if path else None


def _placed_name(base: Path, name: str | None) -> str | None:
    """The name of an encoder; where it is a path, a relative one starts at ``base``."""
    scheme, _, rest = (name or "").partition(":")
    return f"{scheme}:{base / rest}" if scheme in PATH_SCHEMES and rest else name


def _table_lines(table: Settings, indent: str, defaults: Mapping[str, object]) -> Iterator[str]:
    plain = table.model_dump(mode="json")
    for key, field in type(table).model_fields.items():
        yield from (f"{indent}# {line}" for line in (field.description or "").splitlines())
        inner = getattr(table, key)
        if isinstance(inner, Settings):
            below = defaults.get(key)
            yield f"{indent}{key}:"
            yield from _table_lines(inner, indent + "  ", dict(below) if isinstance(below, Settings) else {})
        else:
            is_default = key in defaults and defaults[key] == inner
            yield f"{indent}{'# ' if is_default else ''}{key}: {_one_line(plain[key])}"


def _one_line(value: object) -> str:
    text: str = yaml.dump(value, Dumper=_TextDumper, default_flow_style=True, width=2**31, allow_unicode=True)
    return text.removesuffix("...\n").rstrip("\n")


def _canonical(value: object) -> object:
    if isinstance(value, BaseModel):
        return _canonical(value.model_dump())
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("the keys of a fingerprinted mapping must be text")
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise TypeError(f"{type(value).__name__} cannot be fingerprinted: only settings, text, numbers and what they make up")
