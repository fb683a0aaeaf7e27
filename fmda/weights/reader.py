"""Checked reading of a checkpoint's JSON: every value has a type and a range, and each fault names file and key."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fmda.errors import UserError, did_you_mean
from fmda.models.dino import IMAGENET_MEAN, IMAGENET_STD
from fmda.weights.files import read_json

MISSING: Any = object()
"""Default of a key that must be there."""

Keys = Mapping[str, tuple[str, Callable[["Fields", str, Any], Any], Any]]
"""{field of a configuration: (key in JSON, method of `Fields`, default)}: drives reader and writer."""

IMAGENET = {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
"""What configurations of networks with ImageNet's normalisation say of it."""


class Fields:
    """The keys of one JSON object. Each method returns the value of a key, or `default` where the key is absent.

    Raises UserError "<file>: <key> is <value>, not <what belongs there>; <fix>".
    """

    def __init__(self, values: Mapping[str, Any], where: Path, fix: str, prefix: str = "") -> None:
        self.values, self.where, self.fix, self.prefix = values, where, fix, prefix

    @classmethod
    def read(cls, path: Path, fix: str = "take weights and configuration from the same source") -> "Fields":
        return cls(read_json(path), path, fix)

    def fault(self, key: str, expected: str) -> UserError:
        value = f"is {self.values[key]!r}, not {expected}" if key in self.values else f"is missing: {expected}"
        return UserError(f"{self.where}: {self.prefix}{key} {value}; {self.fix}")

    def _checked(self, key: str, default: Any, valid: Any, expected: str) -> Any:
        value = self.values.get(key, default)
        if value is MISSING or (key in self.values and not valid(value)):
            raise self.fault(key, expected)
        return value

    def size(self, key: str, default: Any = MISSING) -> int:
        return self._checked(key, default, is_size, "one whole number above 0")

    def size_or_null(self, key: str, default: int) -> int:
        """Returns a whole number above 0; null counts as absent."""
        return default if self.values.get(key) is None else self.size(key)

    def index(self, key: str, default: Any, below: int) -> int:
        expected = f"one whole number from 0 to {below - 1}"
        return self._checked(key, default, lambda v: v == 0 or (is_size(v) and v < below), expected)

    def sizes(self, key: str, default: Any = MISSING, *, count: int | None = None) -> tuple[int, ...]:
        """Returns whole numbers above 0, at least one, or exactly `count`."""

        def valid(value: Any) -> bool:
            whole = isinstance(value, list) and bool(value) and all(map(is_size, value))
            return whole and count in (None, len(value))

        number = "" if count is None else f"{count} "
        return tuple(self._checked(key, default, valid, f"a list of {number}whole numbers above 0"))

    def number(self, key: str, default: Any = MISSING) -> float:
        return self._checked(key, default, lambda v: is_number(v) and v > 0, "one finite number above 0")

    def share(self, key: str, default: Any) -> float:
        expected = "a number from 0 to below 1"
        return self._checked(key, default, lambda v: is_number(v) and 0 <= v < 1, expected)

    def share_or_null(self, key: str, default: float | None) -> float | None:
        """Returns a number from 0 to 1, or None."""
        expected = "null or a number from 0 to 1"
        return self._checked(key, default, lambda v: v is None or (is_number(v) and 0 <= v <= 1), expected)

    def triple(self, key: str, default: Any, *, positive: bool) -> tuple[float, float, float]:
        """Returns three finite numbers, one a channel; with `positive` they are above 0."""

        def valid(value: Any) -> bool:
            numbers = isinstance(value, list) and len(value) == 3 and all(map(is_number, value))
            return numbers and (not positive or min(value) > 0)

        r, g, b = self._checked(key, default, valid, "three finite numbers" + " above 0" * positive)
        return r, g, b

    def flag(self, key: str, default: bool) -> bool:
        return self._checked(key, default, lambda v: isinstance(v, bool), "true or false")

    def word(self, key: str, default: Any, choices: Iterable[str]) -> str:
        known = tuple(choices)
        value = self.values.get(key, default)
        hint = did_you_mean(value, known) if isinstance(value, str) else f"; known: {', '.join(known)}"
        return self._checked(key, default, lambda v: isinstance(v, str) and v in known, f"a known word{hint}")

    def of(self, keys: Keys) -> dict[str, Any]:
        return {field: method(self, key, default) for field, (key, method, default) in keys.items()}

    def section(self, *keys: str) -> "Fields":
        """Returns the fields of nested objects, merged, the last first; absent and null ones count as empty."""
        merged: dict[str, Any] = {}
        for key in keys:
            value = self.values.get(key)
            if not isinstance(value, dict | None):
                raise self.fault(key, "an object")
            merged |= value or {}
        return Fields(merged, self.where, self.fix, f"{self.prefix}{keys[0]}.")

    def only(self, allowed: Mapping[str, tuple[Any, ...]]) -> None:
        """Raises UserError for a key that is there with another value than those that can be built here."""
        for key, values in allowed.items():
            if key in self.values and self.values[key] not in values:
                raise self.fault(key, f"{' or '.join(map(repr, values))}, which alone can be built")

    def divides(self, key: str, divisor: int, whole: int, what: str) -> None:
        """Raises UserError unless the value `divisor` of a key divides `whole`, which `what` names."""
        if whole % divisor:
            raise UserError(f"{self.where}: {self.prefix}{key} {divisor} does not divide {what}, {whole}; {self.fix}")


def written(config: Any, keys: Keys, fixed: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Returns the JSON object that `Fields.of` reads as the fields of `config`, and the first of each fixed value."""
    values = {key: getattr(config, field) for field, (key, _, _) in keys.items()}
    constants = {key: allowed[0] for key, allowed in fixed.items()}
    return constants | {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def is_size(value: Any) -> bool:
    """Returns whether a value of a configuration is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_number(value: Any) -> bool:
    """Returns whether a value of a configuration is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
