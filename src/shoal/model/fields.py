"""Typed access to a checkpoint's metadata: JSON objects and GGUF key-value pairs.

Knows nothing of what the fields mean; a wrong type or a missing key names the file and key.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.core.errors import ModelError


@dataclass(frozen=True, slots=True)
class Fields:
    """A mapping that says where it came from when it disappoints.

    A value of None counts as absent: that is how config.json says "not set".
    """

    source: str
    values: Mapping[str, Any]
    prefix: str = ""

    def __contains__(self, key: str) -> bool:
        return self.values.get(self.prefix + key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        # JSON writes some whole numbers as 2.0.
        if not _is_number(value) or abs(value) > _MAX_WHOLE or value != int(value):
            raise self._wrong(key, value, "a whole number")
        return int(value)

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.integer(key, default)
        if value <= 0:
            raise self._wrong(key, value, "a number above 0")
        return value

    def count(self, key: str, at_most: int) -> int:
        """How many there are of what takes memory for each: before it is taken."""
        value = self.positive(key)
        if value > at_most:
            raise self._wrong(key, value, f"at most {at_most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if not _is_number(value):
            raise self._wrong(key, value, "a number")
        return float(value)

    def above(self, limit: float, key: str, default: float | None = None) -> float:
        value = self.number(key, default)
        if value <= limit:
            raise self._wrong(key, value, f"a number above {limit:g}")
        return value

    def optional_number(self, key: str) -> float | None:
        return self.number(key) if key in self else None

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """Token ids: one, a list of them, or none."""
        value = self.values.get(self.prefix + key)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(each, int) and not isinstance(each, bool) for each in found):
            raise self._wrong(key, value, "a token id or a list of them")
        return tuple(found)

    def child(self, key: str) -> Fields:
        value = self.values.get(self.prefix + key)
        if not isinstance(value, Mapping):
            raise self._wrong(key, value, "an object")
        return Fields(f"{self.source}: {key}", value)

    def _get(self, key: str, default: object) -> Any:
        value = self.values.get(self.prefix + key)
        value = default if value is None else value
        if value is None:
            raise ModelError(f"{self.source} lacks {self.prefix + key}; the model needs it")
        return value

    def _wrong(self, key: str, value: object, needed: str) -> ModelError:
        # GGUF files have arrays of a million values.
        shown = reprlib.repr(value)
        return ModelError(f"{self.source}: {self.prefix + key} is {shown}; needed {needed}")


_MAX_WHOLE = 2**53
"""Beyond it JSON's numbers are not exact, and no model counts anything so large."""


def _is_number(value: object) -> bool:
    # Python's reader of JSON takes NaN and Infinity too; bool is an int to Python alone.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < _MAX_NUMBER


_MAX_NUMBER = 1e38
"""What is computed with it is fp32."""
