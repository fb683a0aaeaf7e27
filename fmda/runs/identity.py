"""One answer to "does this folder hold the same work?": facts recorded once, compared with defaults filled in.

Facts are named dataclasses and plain values: a configuration, weight fingerprints, digests of data. A folder records
them in full. A later claim fills the record with the declared defaults of the dataclasses it is compared with, so a
configuration that gains a field with a default still accepts the folders made before. Fields marked
`fmda.config.FREE` (logging, checkpointing, batch splitting) may change at any depth.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fmda.atomic import occupied, write_json
from fmda.config import differences, to_dict
from fmda.errors import UserError

RECORD = "identity.json"
"""The file that holds a folder's facts."""


def claim(
    folder: str | Path,
    facts: Mapping[str, Any],
    free: Collection[str] = (),
    *,
    record: str = RECORD,
    remedy: str = "choose another work_dir=, or restore the earlier values",
    exclusive: bool = False,
) -> bool:
    """Records the facts in a new folder, or compares them with those on record; returns whether there was a record.

    Args:
        folder: made if missing.
        facts: dataclasses and JSON values by name.
        free: dotted names, such as "config.batch", that are neither recorded nor compared, besides `FREE` fields.
        record: name of the file.
        remedy: the end of the refusal: how to proceed.
        exclusive: whether a folder that holds other files and no record is refused.

    Raises:
        UserError: the folder holds other work; the message names the values that differ. OSError: it is not writable.
    """
    path = Path(folder) / record
    if path.is_file():
        compare(path, facts, free, remedy=remedy)
        return True
    if exclusive and occupied(path.parent):
        raise UserError(f"{folder}: is not empty and has no {record}: its files are not of fmda; {remedy}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, recorded(facts, free))
    return False


def compare(path: str | Path, facts: Mapping[str, Any], free: Collection[str] = (), *, remedy: str) -> None:
    """Raises UserError unless the facts in a record are these, naming up to three that differ."""
    path = Path(path)
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError):
        before = None
    if not isinstance(before, Mapping):
        raise UserError(f"{path}: damaged or not a record of fmda; {remedy}")
    changed = changes(before, facts, free)
    if changed:
        raise UserError(f"{path.parent}: holds work of another configuration ({listed(changed)}); {remedy}")


def listed(changed: list[str]) -> str:
    """Returns the first three of some changes as one text, and how many more there are."""
    return "; ".join(changed[:3]) + (f"; and {len(changed) - 3} more" if len(changed) > 3 else "")


def changes(before: Mapping[str, Any], facts: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
    """Returns a line `name: old -> new` for each fact that differs from a record."""
    return differences(_kept(filled(before, facts), facts, free), recorded(facts, free))


def recorded(facts: Any, free: Collection[str] = ()) -> Any:
    """Returns facts as JSON values, without what is free to change."""
    return json.loads(json.dumps(_kept(to_dict(facts), facts, free), default=str))


def filled(before: Any, now: Any) -> Any:
    """Returns recorded values with the declared defaults of the dataclasses in `now` for fields the record lacks."""
    if isinstance(before, list) and isinstance(now, list | tuple) and len(before) == len(now):
        return [filled(value, one) for value, one in zip(before, now, strict=True)]
    if not isinstance(before, Mapping):
        return before
    if isinstance(now, Mapping):
        return {name: filled(value, now.get(name)) for name, value in before.items()}
    if not dataclasses.is_dataclass(now):
        return dict(before)
    values = dict(before)
    for field in dataclasses.fields(now):
        if field.name in values:
            values[field.name] = filled(values[field.name], getattr(now, field.name))
        elif field.default is not dataclasses.MISSING:
            values[field.name] = to_dict(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = to_dict(field.default_factory())
    return json.loads(json.dumps(values, default=str))


def _kept(values: Any, now: Any, free: Collection[str], prefix: str = "") -> Any:
    """Returns values without the fields of `now` that are `FREE` and without the dotted names in `free`."""
    if not isinstance(values, Mapping):
        return values
    fields = {f.name: f for f in dataclasses.fields(now)} if dataclasses.is_dataclass(now) else {}

    def inner(name: str) -> Any:
        return now.get(name) if isinstance(now, Mapping) else getattr(now, name, None) if name in fields else None

    return {
        name: _kept(value, inner(name), free, f"{prefix}{name}.")
        for name, value in values.items()
        if f"{prefix}{name}" not in free and not (name in fields and "free" in fields[name].metadata)
    }
