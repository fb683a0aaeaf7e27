"""Run configurations: dataclass defaults < YAML < command line, strict about every key and type.

A configuration is a frozen dataclass. A YAML file fills it, `key.sub=value` overrides come last. One optional
line `base: other.yaml` takes over another file's values, one level deep. An unknown key is an error that names
the nearest known one. `fingerprint` hashes the resolved values; finished work is recognised by it.
"""

import dataclasses
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from fmda.errors import UserError, did_you_mean

T = TypeVar("T")

FREE: Mapping[str, Any] = types.MappingProxyType({"free": True})
"""`dataclasses.field(metadata=FREE)`: a value that may change between the parts of a run, since it decides how far a
run goes, how it is told of or how it is cut to the machine, and not what it makes."""


class _StrictLoader(yaml.SafeLoader):
    """YAML without silent surprises: a key given twice is an error, and 1e-4 is a number."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict:
    keys: list[Any] = []
    for node_key, _ in node.value:
        key = loader.construct_object(node_key)
        if key in keys:
            mark = node_key.start_mark
            raise yaml.constructor.ConstructorError(None, None, f"key '{key}' stands twice", mark)
        keys.append(key)
    return {k: loader.construct_object(v, deep=True) for k, (_, v) in zip(keys, node.value, strict=True)}


def _number(loader: _StrictLoader, node: yaml.ScalarNode) -> Any:
    return float(loader.construct_scalar(node).replace("_", ""))


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _mapping)
# YAML 1.1 reads 1e-4 (no dot) as text
_StrictLoader.add_implicit_resolver(
    "!exponent", re.compile(r"^[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)
_StrictLoader.add_constructor("!exponent", _number)


def parse_value(text: str) -> Any:
    """Returns the value that YAML reads from one override: `8`, `1e-4`, `[a, b]`, `null` mean the same in a file."""
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.YAMLError:
        return text


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file, with its `base:` file (one level) merged underneath.

    Raises UserError for a missing file, broken YAML (with the line) or a top level that is no mapping.
    """
    path = Path(path)
    values = _read_one(path)
    base = values.pop("base", None)
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
        values = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except yaml.MarkedYAMLError as fault:
        line = fault.problem_mark.line + 1 if fault.problem_mark else "?"
        raise UserError(f"{path}, line {line}: not valid YAML: {fault.problem}; mend that line") from None
    except (yaml.YAMLError, UnicodeDecodeError) as fault:
        raise UserError(f"{path}: not a YAML text file ({fault}); check that this is the file you meant") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, not `key: value` lines; mend the file")
    return values


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested mappings merged, `above` winning; lists are replaced whole."""
    out = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(out.get(key), Mapping):
            out[key] = merge(out[key], value)
        else:
            out[key] = value
    return out


def override(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Returns `values` with each `key.sub=value` applied, in order.

    Raises UserError for an override without `=` or one that goes below a plain value.
    """
    out = merge({}, values)
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise UserError(f"'{item}': an override reads key.sub=value; add the '=' and the value")
        nested: Any = parse_value(text)
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        out = merge(out, nested)
    return out


def load(cls: type[T], path: str | Path, overrides: Iterable[str] = ()) -> T:
    """Returns the dataclass `cls` filled from a YAML file and `key.sub=value` overrides.

    Raises UserError, in one line, for unknown keys (naming the nearest), wrong types and missing values.
    """
    return from_dict(cls, override(read_yaml(path), overrides), str(path))


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """Returns the dataclass `cls` filled from nested plain values; `where` names the source in errors."""
    return _convert(cls, values, where, "")


def _convert(kind: Any, value: Any, where: str, key: str) -> Any:
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        if type(value) is kind:
            return value
        return _dataclass(kind, value, where, key)
    if origin in (Union, types.UnionType):
        return _union(typing.get_args(kind), value, where, key)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value in choices:
            return value
        hint = did_you_mean(str(value), map(str, choices))
        raise UserError(f"{where}: {key}: '{value}' is none of the choices{hint}")
    if origin is tuple:
        return _tuple(typing.get_args(kind), value, where, key)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _mismatch(where, key, "a mapping", value)
        _, inner = typing.get_args(kind)
        return {str(k): _convert(inner, v, where, f"{key}.{k}") for k, v in value.items()}
    return _scalar(kind, value, where, key)


def _dataclass(kind: Any, value: Any, where: str, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise _mismatch(where, key, "a group of keys", value)
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in fields:
            raise UserError(f"{where}: unknown key '{prefix}{name}'{did_you_mean(str(name), fields)}")
    filled = {n: _convert(hints[n], v, where, prefix + n) for n, v in value.items()}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in filled:
            raise UserError(f"{where}: key '{prefix}{name}' is missing; add it or pass {prefix}{name}=...")
    return kind(**filled)


def _union(kinds: tuple[Any, ...], value: Any, where: str, key: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    fault: UserError | None = None
    for kind in kinds:
        if kind is type(None):
            continue
        try:
            return _convert(kind, value, where, key)
        except UserError as reason:
            fault = fault or reason
    raise fault if fault else _mismatch(where, key, "a value", value)


def _tuple(kinds: tuple[Any, ...], value: Any, where: str, key: str) -> tuple:
    if not isinstance(value, list | tuple):
        raise _mismatch(where, key, "a list", value)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise _mismatch(where, key, f"a list of {len(kinds)} values", value)
    return tuple(_convert(k, v, where, f"{key}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))


def _scalar(kind: Any, value: Any, where: str, key: str) -> Any:
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    raise _mismatch(where, key, names.get(kind, getattr(kind, "__name__", str(kind))), value)


def _mismatch(where: str, key: str, wanted: str, value: Any) -> UserError:
    return UserError(f"{where}: {key or 'the file'}: expected {wanted}, got {value!r}; mend the value")


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
    return config


def to_yaml(config: Any) -> str:
    """Returns the resolved configuration as YAML text in the order of its fields."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=110)


def fingerprint(config: Any) -> str:
    """Returns 12 hexadecimal digits that change whenever a resolved value changes."""
    text = json.dumps(to_dict(config), sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def identity(config: Any, values: Any = None) -> Any:
    """Returns `to_dict(config)` without the fields that are `FREE`, at any depth of dataclasses and mappings.

    With `values`, those values in place of the configuration's own: what a file recorded of such a configuration.
    """
    values = to_dict(config) if values is None else values
    if not isinstance(values, Mapping):
        return values
    if isinstance(config, Mapping):
        return {name: identity(config[name], value) if name in config else value for name, value in values.items()}
    if not dataclasses.is_dataclass(config):
        return values
    known = {field.name: field for field in dataclasses.fields(config)}
    return {
        name: identity(getattr(config, name), value) if name in known else value
        for name, value in values.items()
        if name not in known or "free" not in known[name].metadata
    }


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
