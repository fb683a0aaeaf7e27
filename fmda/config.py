"""Run configurations: dataclass defaults < YAML < command line, strict about every key, type and range.

A configuration is a frozen dataclass. A YAML file fills it, `key.sub=value` overrides come last. One optional
line `base: other.yaml` takes over another file's values, one level deep. An unknown key is an error that names
the nearest known one. Unquoted scalars keep the text that was written until the type of their field is known: text
stays `0123456` or `12e4`, a number becomes one. Types declare bounds (`PositiveInt`, `Share`, `Bounds`) and paths
(`Path`, `FileOrName`, `FolderOrName`, `DataPath`). `fingerprint` hashes the resolved values; finished work is
recognised by it.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import yaml

from fmda.errors import UserError, did_you_mean
from fmda.places import below_data
from fmda.text import read_text

T = TypeVar("T")

FREE: Mapping[str, Any] = types.MappingProxyType({"free": True})
"""`dataclasses.field(metadata=FREE)`: a setting that does not affect the result (logging, checkpointing, batch
splitting, length of a run) and may change on resume."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The range of a number, for `Annotated[int, Bounds(4)]`: `least` and `most` belong to it, `above` and `below` not.

    Every float of a configuration has to be finite, with or without bounds.
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def holds(self, value: float) -> bool:
        """Returns whether a finite number lies in the range."""
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        limits = {">=": self.least, ">": self.above, "<=": self.most, "<": self.below}
        return " and ".join(f"{sign} {limit:g}" for sign, limit in limits.items() if math.isfinite(limit))


PositiveInt = Annotated[int, Bounds(1)]
NonNegativeInt = Annotated[int, Bounds(0)]
PositiveFloat = Annotated[float, Bounds(above=0)]
NonNegativeFloat = Annotated[float, Bounds(0)]
Share = Annotated[float, Bounds(0, 1)]
Decay = Annotated[float, Bounds(0, below=1)]
"""The share that a moving average keeps at each step."""
Side = Annotated[float, Bounds(above=0, most=1)]
"""A side of a crop as a share of the image's."""

FileOrName = Annotated[str, "file"]
"""A known name, or a text file: text that leads to a file becomes its absolute path, other text stays."""
Raw = Annotated[dict[str, Any], "raw"]
"""A group of keys whose types are decided later, by `from_dict` with the dataclass that they fill."""
FolderOrName = Annotated[str, "folder"]
"""A known name or hub id, or a folder: text that leads to a folder becomes its absolute path, other text stays."""
DataPath = Annotated[str, "data"]
"""A file or folder, or its name below FMDA_DATA (`fmda.places.below_data`): the name of what is there stays, other text
becomes an absolute path, also that of a file which is gone."""


class Plain(str):
    """The text of an unquoted YAML scalar, or of an override, whose type is not known yet."""


class _Loader(yaml.SafeLoader):
    """YAML whose unquoted scalars are `Plain` text; a repeated key is an error."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    keys: list[Any] = []
    for node_key, _ in node.value:
        key = loader.construct_object(node_key)
        if key in keys:
            mark = node_key.start_mark
            raise yaml.constructor.ConstructorError(None, None, f"key '{key}' occurs twice", mark)
        keys.append(key)
    return {k: loader.construct_object(v, deep=True) for k, (_, v) in zip(keys, node.value, strict=True)}


def _text(_: _Loader, node: yaml.ScalarNode) -> str:
    return Plain(node.value) if node.style is None else node.value


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:str", _text)

_NUMBER = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)?")
_CONSTANTS: dict[str, Any] = {"": None, "~": None, "null": None, "true": True, "false": False}
_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def resolved(value: Any) -> Any:
    """Returns plain values: `Plain` text, at any depth, as the null, boolean, number, list or mapping that it reads as.

    The rules are those of YAML 1.2: `yes`, `no`, dates and `1:30` are text, `0123` is 123, `1e-4` is a number; numbers
    that are not finite stay text.
    """
    if isinstance(value, Mapping):
        return {resolved(k): resolved(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [resolved(v) for v in value]
    if not isinstance(value, Plain):
        return value
    word = value.strip()
    if word.lower() in _CONSTANTS:
        return _CONSTANTS[word.lower()]
    if re.fullmatch(r"0x[\da-fA-F]+", word):
        return int(word, 16)
    if _NUMBER.fullmatch(word):
        word = word.replace("_", "")
        return int(word) if re.fullmatch(r"[-+]?\d+", word) else float(word)
    nested = _nested(value)
    return str(value) if nested is value else resolved(nested)


def _nested(value: Any) -> Any:
    """Returns the list or mapping that override text such as `[1, 2]` or `{night: 3}` spells, else the value itself."""
    if isinstance(value, Plain) and value.lstrip()[:1] in ("[", "{"):
        try:
            return yaml.load(value, _Loader)
        except yaml.YAMLError:
            return value
    return value


def user_path(path: str | os.PathLike[str]) -> Path:
    """Returns an absolute path, `~` expanded; links stay as they are."""
    try:
        return Path(os.path.abspath(Path(path).expanduser()))
    except RuntimeError:
        raise UserError(f"{os.fspath(path)}: the home folder is unknown; set HOME, or write the path in full") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file, with its `base:` file (one level) merged underneath.

    Unquoted scalars are `Plain` text, which `from_dict` converts to the types of fields and `resolved` without them.
    Raises UserError for a missing file, broken YAML (with the line) or a top level that is not a mapping.
    """
    path = Path(path)
    values = _read_one(path)
    base = resolved(values.pop("base", None))
    if base is None:
        return values
    below = _read_one(path.parent / base)
    if "base" in below:
        raise UserError(f"{path.parent / base}: a base file may not have a base of its own; put both into {path}")
    return merge(below, values)


def _read_one(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*.yaml"))) if path.parent.is_dir() else ""
        raise UserError(f"{path}: no such configuration file{near}")
    try:
        values = yaml.load(read_text(path), _Loader)
    except yaml.MarkedYAMLError as fault:
        line = fault.problem_mark.line + 1 if fault.problem_mark else "?"
        quote = " (text that holds ': ' needs quotes)" if "mapping values" in str(fault.problem) else ""
        raise UserError(f"{path}, line {line}: not valid YAML: {fault.problem}{quote}; fix that line") from None
    except yaml.YAMLError as fault:
        raise UserError(f"{path}: not a YAML text file ({fault}); check that this is the file you meant") from None
    if resolved(values) is None:
        return {}
    if not isinstance(values, dict):
        what = "list" if isinstance(values, list) else "text"
        raise UserError(f"{path}: holds a {what}, not `key: value` lines; fix the file")
    return values


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested mappings merged, `above` winning; lists are replaced whole.

    Text in the place of a group stands for its `name`, so that `host=naclip host.crop=0` is a group of both.
    """
    out = dict(below)
    for key, value in above.items():
        group = _nested(value) if isinstance(out.get(key), Mapping) else value
        if isinstance(group, Mapping) and key in out:
            out[key] = merge(_group(out[key]), group)
        else:
            out[key] = value
    return out


def _group(value: Any) -> Mapping[str, Any]:
    value = _nested(value)
    if isinstance(value, Mapping):
        return value
    return {"name": value} if isinstance(resolved(value), str) else {}


def override(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Returns `values` with each `key.sub=value` applied, in order. A value wholly in quotes loses them.

    Raises UserError for an override without `=`.
    """
    out = merge({}, values)
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise UserError(f"'{item}': an override reads key.sub=value; add the '=' and the value")
        quoted = re.fullmatch(r"""\s*(?:'([^']*)'|"([^"\\]*)")\s*""", text)
        nested: Any = Plain(text) if quoted is None else quoted[1] or quoted[2] or ""
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        out = merge(out, nested)
    return out


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """Returns the dataclass `cls` filled from nested values; `where` names the source in errors.

    Raises UserError, in one line, for unknown keys (naming the nearest), wrong types and missing values.
    """
    return _convert(cls, values, where, "")


def _convert(kind: Any, value: Any, where: str, key: str) -> Any:
    origin = typing.get_origin(kind)
    if kind is Any:
        return resolved(value)
    if origin is Annotated:
        return _annotated(kind, value, where, key)
    if dataclasses.is_dataclass(kind):
        if type(value) is kind:
            return value
        return _dataclass(kind, value, where, key)
    if origin in (Union, types.UnionType):
        return _union(typing.get_args(kind), value, where, key)
    if origin is Literal:
        choices = typing.get_args(kind)
        for candidate in (value.strip(), resolved(value)) if isinstance(value, Plain) else (value,):
            if candidate in choices:
                return choices[choices.index(candidate)]
        hint = did_you_mean(str(value), map(str, choices))
        raise UserError(f"{where}: {key}: '{value}' is none of the choices{hint}")
    if origin is tuple:
        return _tuple(typing.get_args(kind), _nested(value), where, key)
    if origin is dict:
        _, inner = typing.get_args(kind)
        value = _group(value) if inner is Any and isinstance(value, str) else _nested(value)
        if not isinstance(value, Mapping):
            raise _mismatch(where, key, "a mapping", value)
        return {str(k): _convert(inner, v, where, f"{key}.{k}") for k, v in value.items()}
    return _scalar(kind, value, where, key)


def _annotated(kind: Any, value: Any, where: str, key: str) -> Any:
    base, mark = typing.get_args(kind)
    if mark == "raw":
        group = _nested(value)
        if not isinstance(group, Mapping):
            raise _mismatch(where, key, "a group of keys", value)
        return group
    if not isinstance(mark, Bounds):
        text = _scalar(base, value, where, key)
        path = user_path(text) if text else Path(text)
        if mark == "data":
            named = not text or text.startswith("@") or not path.exists() and below_data(text).exists()
            return text if named else str(path)
        exists = path.is_file() if mark == "file" else path.is_dir()
        return str(path) if text and exists or text.startswith("~") else text
    try:
        number = _convert(base, value, where, key)
    except UserError:
        number = None
    if number is None or not mark.holds(number):
        raise _mismatch(where, key, f"{'a whole number' if base is int else 'a number'} {mark}", value)
    return number


def _dataclass(kind: Any, value: Any, where: str, key: str) -> Any:
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    value = _group(value) if isinstance(value, str) and "name" in fields else _nested(value)
    if not isinstance(value, Mapping):
        raise _mismatch(where, key, "a group of keys", value)
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in fields:
            raise UserError(f"{where}: unknown key '{prefix}{name}'{did_you_mean(str(name), fields)}")
    filled = {str(n): _convert(hints[n], v, where, prefix + n) for n, v in value.items()}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in filled:
            raise UserError(f"{where}: key '{prefix}{name}' is missing; add it or pass {prefix}{name}=...")
    return kind(**filled)


def _union(kinds: tuple[Any, ...], value: Any, where: str, key: str) -> Any:
    if resolved(value) is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    faults = []
    for kind in kinds:
        try:
            return _convert(kind, value, where, key)
        except UserError as fault:
            faults.append(fault)
    raise faults[0]


def _tuple(kinds: tuple[Any, ...], value: Any, where: str, key: str) -> tuple:
    if not isinstance(value, list | tuple):
        raise _mismatch(where, key, "a list", value)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise _mismatch(where, key, f"a list of {len(kinds)} values", value)
    return tuple(_convert(k, v, where, f"{key}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))


_NAMES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", Path: "a path"}


def _scalar(kind: Any, value: Any, where: str, key: str) -> Any:
    written = value
    if kind is Path and isinstance(value, str | Path) and resolved(value) not in (None, ""):
        # `@name/...` leads to an earlier run of a pipeline and is not a path yet
        return Path(value) if str(value).startswith("@") else user_path(value)
    if kind is str and isinstance(value, Plain):
        return str(value)
    if kind is bool and isinstance(value, str):
        value = _SWITCHES.get(value.strip().lower(), value)
    value = resolved(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool) or kind is float):
        return value
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise _mismatch(where, key, _NAMES.get(kind, getattr(kind, "__name__", str(kind))), written)


def _mismatch(where: str, key: str, expected: str, value: Any) -> UserError:
    shown = f"'{value}'" if isinstance(value, str) else repr(resolved(value))
    return UserError(f"{where}: {key or 'the file'}: expected {expected}, got {shown}; fix the value")


def to_dict(config: Any) -> Any:
    """Returns plain values (mappings, lists, text, numbers), fit for YAML and JSON, from dataclasses at any depth."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(k): to_dict(v) for k, v in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(v) for v in config]
    if isinstance(config, Path):
        return str(config)
    return resolved(config)


def to_yaml(config: Any) -> str:
    """Returns the resolved configuration as YAML text in the order of its fields."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=110)


def fingerprint(config: Any) -> str:
    """Returns 12 hexadecimal digits that change whenever a resolved value changes."""
    text = json.dumps(to_dict(config), sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Returns one line `key: old -> new` for each value in which two configurations differ."""
    old, new = to_dict(old), to_dict(new)
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return [] if old == new else [f"{prefix or 'value'}: {old!r} -> {new!r}"]
    lines: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        name = f"{prefix}.{key}" if prefix else key
        if key not in old or key not in new:
            lines.append(f"{name}: {old.get(key, '(none)')!r} -> {new.get(key, '(none)')!r}")
        else:
            lines += differences(old[key], new[key], name)
    return lines
